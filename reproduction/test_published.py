"""The five published models against the printed numbers, under the released protocol.

Percentages were printed to a digit; the whole counts behind them are nearly unique. A new run agrees
when the printed share lies in the 99 % interval of the share it measures.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from ccm.experiment import RunConfig, run
from ccm.knowledge import SOURCES
from ccm.models import PUBLISHED
from conftest import SEED, Options
from reproduction.conftest import N_CONTROLS
from reproduction.pairs import Pair, device_of, missing
from reproduction.printed import printed

PAIRS = [Pair(model, "mean_ablation").param() for model in PUBLISHED]


@pytest.fixture(scope="session")
def released_scores(options: Options, run_root: Path) -> Callable[[Pair], dict[str, Any]]:
    """Scores under the released protocol, computed once per model; read-only."""
    done: dict[str, dict[str, Any]] = {}

    def scores(pair: Pair) -> dict[str, Any]:
        lacking = missing(pair, options)
        if lacking is not None:
            reason, fail = lacking
            (pytest.fail if fail else pytest.skip)(reason)
        if pair.model not in done:
            config = RunConfig(
                model=pair.model,
                controls=N_CONTROLS,
                device=device_of(pair, options),
                dtype=options.dtype,
                seed=SEED,
                protocol="released",
                model_paths=options.model_paths,
            )
            done[pair.model] = run(config, run_root / f"{pair.model}-released")
        return done[pair.model]

    return scores


def agrees(count: int, total: int, low: float, high: float) -> bool:
    """Whether [low, high] (shares) meets the exact 99 % interval of count/total."""
    interval = stats.binomtest(count, total).proportion_ci(0.99, method="exact")
    return bool(interval.low <= high and low <= interval.high)


@pytest.mark.parametrize("published", PAIRS)
def test_transition_counts(published: Pair, released_scores: Callable[[Pair], dict[str, Any]]) -> None:
    scores = released_scores(published)
    counts = scores["ablations"]["mean_ablation"]["entropy"]["transition_counts"]
    sizes = printed("figure5_knowledge_sources")[published.model]
    for k, row in printed("transition_counts")[published.model].items():
        for j, (low, high) in row.items():
            total = sum(counts[k].values())
            assert agrees(counts[k][j], total, low / sizes[k], high / sizes[k]), (
                f"{k} to {j}: {counts[k][j]} of {total}, printed {low} to {high} of {sizes[k]} "
                f"[{published.id}]"
            )


@pytest.mark.parametrize("published", PAIRS)
def test_source_shares(published: Pair, released_scores: Callable[[Pair], dict[str, Any]]) -> None:
    scores = released_scores(published)
    sizes = printed("figure5_knowledge_sources")[published.model]
    total = sum(sizes.values())
    for s in SOURCES:
        found = scores["sources"][s]
        # Figure 5's bars are read off to about one prompt.
        low, high = (sizes[s] - 1) / total, (sizes[s] + 1) / total
        assert agrees(found["count"], found["total"], low, high), (
            f"{s}: {found['count']} of {found['total']}, printed {sizes[s]} of {total} [{published.id}]"
        )
