"""The other hot pieces: measures, streamed statistics, scores, filters."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ccm.decoding.activations import Histograms, Moments
from ccm.experiment.fact_files import load_pararel
from ccm.method.neurons import FinalNorm, measure
from ccm.method.prompts import ParametricAnswer, filter_relation_groups
from ccm.method.scores import global_transition_score, summarise, transition_counts
from tests.needs import FACTS


@pytest.mark.parametrize(
    ("d_model", "d_mlp", "d_vocab", "dims"),
    [
        pytest.param(768, 3072, 50257, 40, id="gpt2"),
        pytest.param(4096, 14336, 128256, 96, id="llama-3-8b", marks=pytest.mark.slow),
    ],
)
def test_measures(d_model: int, d_mlp: int, d_vocab: int, dims: int, benchmark: Any) -> None:
    random = torch.Generator().manual_seed(0)
    W_U = torch.randn(d_model, d_vocab, generator=random)
    W_out = torch.randn(d_mlp, d_model, generator=random)
    norm = FinalNorm(False, 1e-5, torch.ones(d_model), torch.zeros(d_model))
    measures = benchmark.pedantic(measure, (W_U, W_out, norm, dims), rounds=1)
    # Two products: W_out with W_U, and W_U with itself.
    flops = 2 * d_model * d_vocab * (d_mlp + d_model)
    benchmark.extra_info.update(gflops=round(flops / benchmark.stats.stats.min / 1e9, 1))
    assert np.isfinite(measures.logit_var).all()


def test_streamed_statistics(benchmark: Any, best_of: Callable[..., float]) -> None:
    random = torch.Generator().manual_seed(0)
    chunks = [torch.randn(2048, 3072, generator=random) for _ in range(8)]

    def stream() -> None:
        moments = Moments(3072)
        for chunk in chunks:
            moments.update(chunk)
        histograms = Histograms(moments)
        for chunk in chunks:
            histograms.update(chunk)
        histograms.mode(), histograms.median()

    benchmark.pedantic(stream, rounds=3)
    rows = torch.cat(chunks).numpy()
    held = best_of(lambda: (rows.mean(0), rows.std(0), np.median(rows, 0)), 1)
    ratio = benchmark.stats.stats.min / held
    benchmark.extra_info.update(ratio=round(ratio, 3), of="numpy's mean, std and median in memory")


def test_scores_of_100_controls(benchmark: Any) -> None:
    random = np.random.default_rng(0)
    before, *after = (random.choice(["CK", "ND", "PK"], 10_000).tolist() for _ in range(101))

    def score() -> None:
        shares = [global_transition_score(transition_counts(before, a)).percent for a in after]
        summarise(50.0, [s for s in shares if s is not None])

    benchmark.pedantic(score, rounds=3)


def test_relation_group_filter_on_the_real_facts(benchmark: Any) -> None:
    FACTS.check()
    facts = load_pararel()
    answers = [ParametricAnswer(i, f, f.query, "", f.object, 0) for i, f in enumerate(facts.facts)]
    kept = benchmark.pedantic(filter_relation_groups, (answers, facts.relations), rounds=5)
    benchmark.extra_info.update(facts=len(answers), kept=len(kept))
