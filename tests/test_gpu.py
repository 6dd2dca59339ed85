"""What a real GPU computes, held to the CPU: `pytest -m gpu` runs this wherever CUDA is.

No gated weights are needed: toys of every family, the organism's whole grid, and SmolLM2 where it was
fetched, both against the goldens that a CPU made.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ccm.decoding import hooked, shared
from ccm.decoding.activations import collect
from ccm.decoding.engine import Asked
from ccm.decoding.results import Work, merge
from ccm.decoding.tolerance import measure as measure_error
from ccm.experiment.config import RunConfig
from ccm.experiment.run import run as run_experiment
from ccm.method.ablation import PLAIN, Ablation
from ccm.method.ablation_values import ABLATION_VALUES
from ccm.method.neurons import measure
from ccm.method.sources import SOURCES
from ccm.method.statistics import STATISTICS
from ccm.models.load import load
from ccm.models.model import LoadedModel
from ccm.models.specs import spec_for
from ccm.models.weights import weight_files
from conftest import REAL, SEED, Options
from reproduction.goldens import GOLDEN, differences
from reproduction.runs import n_controls, n_matched, n_prompts
from tests.decoding.test_shared import random_sets, some_targets
from tests.exact import margins, margins_of
from tests.toys import FAMILIES, ToyConfig, token_prompts, toy_folder

pytestmark = pytest.mark.gpu
each_toy = pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.id)
N_PROMPTS, SIZES = 24, (5, 9, 16)


@pytest.fixture(scope="module")
def cuda(options: Options) -> str:
    """The device; skips, or fails where told to, on a machine that has none."""
    if not torch.cuda.is_available():
        reason = "needs CUDA: none found. On a machine with a GPU: tox -e gpu"
        (pytest.fail if options.require_gpu else pytest.skip)(reason)
    return "cuda"


@functools.cache
def loaded(config: ToyConfig, device: str, dtype: str = "float32") -> LoadedModel:
    """Read-only."""
    return load(spec_for(str(toy_folder(config))), device, dtype)


def case(config: ToyConfig) -> tuple[list[list[int]], list[Ablation]]:
    """Prompts of all lengths, some with a common prefix, and sets that change most continuations."""
    first, *others = token_prompts(N_PROMPTS - 2, config, seed=3, max_len=30)
    prompts = [first, *others, [*first[:-1], 5], [*first, 7, 8]]
    return prompts, random_sets(config.d_mlp, SIZES, 2.0)


# --- toys of every family -----------------------------------------------------------------------------


@each_toy
def test_tokens_are_those_of_the_reference_on_a_cpu(config: ToyConfig, cuda: str) -> None:
    prompts, sets = case(config)
    targets = some_targets(len(prompts), config.d_vocab)
    on_gpu = loaded(config, cuda)
    done = merge(list(shared.decode_sets(on_gpu, prompts, sets, targets=targets, own_top=True)))
    on_cpu, within = loaded(config, "cpu"), margins(loaded(config, "cpu"))
    for i, ablation in enumerate([PLAIN, *sets]):
        found = done.completions(i)
        wanted = hooked.decode(on_cpu, prompts, ablation, targets=targets)
        assert found.tokens == wanted.tokens, ablation.name
        assert found.texts == wanted.texts
        np.testing.assert_array_equal(found.first.top_tokens, wanted.first.top_tokens)
        within.entropy.assert_close(found.first.entropy, wanted.first.entropy, what=config.id)
        within.log_prob.assert_close(
            found.first.log_probs[:, :2], wanted.first.log_probs, what=config.id
        )


@each_toy
def test_hooks_on_a_gpu_give_the_cpus_tokens(config: ToyConfig, cuda: str) -> None:
    prompts, (ablation, *_) = case(config)
    for of in (PLAIN, ablation):
        found = hooked.decode(loaded(config, cuda), prompts, of)
        assert found.tokens == hooked.decode(loaded(config, "cpu"), prompts, of).tokens


@each_toy
def test_tokens_do_not_depend_on_batch_or_budget(config: ToyConfig, cuda: str) -> None:
    (prompts, sets), model = case(config), loaded(config, cuda)
    whole = merge(list(shared.decode_sets(model, prompts, sets)))
    parts = merge(list(shared.decode_sets(model, prompts[::-1], sets, memory_budget=1)))
    for i in range(1 + len(sets)):
        assert parts.completions(i).tokens[::-1] == whole.completions(i).tokens


@each_toy
def test_work_is_the_cpus(config: ToyConfig, cuda: str) -> None:
    """But for what is unsure, which every device finds out for itself."""
    prompts, sets = case(config)
    counted = []
    for device in ("cpu", cuda):
        work = Work()
        list(shared.decode_sets(loaded(config, device), prompts, sets, work=work))
        counted.append((work.prompts, work.nodes, work.first_rows, work.halved))
    assert counted[0] == counted[1]


@each_toy
def test_statistics_are_the_cpus(config: ToyConfig, cuda: str) -> None:
    prompts, _ = case(config)
    found, n = collect(loaded(config, cuda), prompts, shared.decode)
    wanted, m = collect(loaded(config, "cpu"), prompts, shared.decode)
    assert n == m
    within = margins(loaded(config, "cpu")).a
    for name in ("mean", "std", "min", "max"):
        within.of(name).assert_close(getattr(found, name), getattr(wanted, name), what=config.id)
    assert all(np.isfinite(getattr(found, name)).all() for name in STATISTICS)


@each_toy
def test_measures_are_the_cpus(config: ToyConfig, cuda: str) -> None:
    on_gpu, on_cpu = (
        measure(model.W_U, model.W_out, model.final_norm, 4)
        for model in (loaded(config, cuda), loaded(config, "cpu"))
    )
    for name in ("logit_var", "norm", "rho", "singular_values"):
        found, wanted = getattr(on_gpu, name), getattr(on_cpu, name)
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5, err_msg=name)


@each_toy
def test_float32_on_a_gpu_is_float32(config: ToyConfig, cuda: str) -> None:
    prompts, _ = case(config)
    on_gpu, on_cpu = (measure_error(loaded(config, d), prompts).largest for d in (cuda, "cpu"))
    assert on_gpu < 20 * on_cpu, "products are rounded more coarsely than float32's"


@each_toy
def test_bfloat16_runs_and_stays_close(config: ToyConfig, cuda: str) -> None:
    (prompts, sets), low = case(config), loaded(config, cuda, "bfloat16")
    found = merge(list(shared.decode_sets(low, prompts, sets)))
    wanted = merge(list(shared.decode_sets(loaded(config, cuda), prompts, sets)))
    within = margins_of(low.source, torch.bfloat16, times=3)
    within.entropy.assert_close(found.entropy, wanted.entropy, what=config.id)


@each_toy
def test_a_batch_that_finds_no_memory_is_halved(
    config: ToyConfig, cuda: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (prompts, sets), model = case(config), loaded(config, cuda)
    whole = merge(list(shared.decode_sets(model, prompts, sets)))
    run, work = shared.Engine.run, Work()

    def full(self: Any, asked: Asked, *args: Any) -> Any:
        if len(asked.prompts) > 7:
            torch.empty(1 << 50, dtype=torch.uint8, device=cuda)  # the allocator's own error
        return run(self, asked, *args)

    monkeypatch.setattr(shared.Engine, "run", full)
    halves = merge(list(shared.decode_sets(model, prompts, sets, work=work)))
    assert work.halved > 0
    for i in range(1 + len(sets)):
        assert halves.completions(i).tokens == whole.completions(i).tokens


def test_the_peak_stays_within_the_budget(cuda: str) -> None:
    config = FAMILIES[0]
    model, prompts = loaded(config, cuda), token_prompts(400, config, seed=1, max_len=30)
    sets = random_sets(config.d_mlp, [6] * 60, 2.0)
    budget, held = 64 << 20, torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    list(shared.decode_sets(model, prompts, sets, memory_budget=budget))
    assert torch.cuda.max_memory_allocated() - held < 1.3 * budget + (1 << 28), "rows at work included"


def test_two_gpus_give_the_tokens_of_one(cuda: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs: run it on a machine that has them")
    config = FAMILIES[0]
    prompts, sets = case(config)
    first, second = (
        merge(list(shared.decode_sets(loaded(config, device), prompts, sets)))
        for device in ("cuda:0", "cuda:1")
    )
    for i in range(1 + len(sets)):
        assert first.completions(i).tokens == second.completions(i).tokens


# --- whole runs against the goldens of a CPU --------------------------------------------------------


@functools.cache
def scores_on(device: str, model: str, folder: Path) -> Mapping[str, Any]:
    """Run a model's whole grid as the goldens were made; read-only."""
    return run_experiment(
        RunConfig(
            model=model,
            ablation_values=("all",),
            controls=n_controls(model),
            matched_controls=n_matched(model),
            max_prompts=n_prompts(model),
            device=device,
            seed=SEED,
            facts="world" if model == REAL else None,
        ),
        folder / model,
    )


@pytest.mark.parametrize("value", ABLATION_VALUES)
@pytest.mark.parametrize("model", ["organism", REAL])
def test_counts_of_a_whole_run_are_the_goldens(
    model: str, value: str, cuda: str, options: Options, run_root: Path
) -> None:
    if not weight_files(spec_for(model)):
        reason = f"needs weights of {model}: not in the cache. Download them with ccm fetch {model}"
        (pytest.fail if options.require_weights else pytest.skip)(reason)
    scores = scores_on(cuda, model, run_root / "on_gpu")
    golden = GOLDEN / "test_transition_scores" / f"test_transition_scores[{model}-{value}].json"
    own = scores["ablations"][value]["entropy"]["transition_counts"]
    wanted = json.loads(golden.read_text(encoding="utf-8"))["entropy_set"]
    assert list(differences(own, wanted)) == []
    assert {k: sum(own[k].values()) for k in SOURCES} == {
        k: scores["sources"][k]["count"] for k in SOURCES
    }
