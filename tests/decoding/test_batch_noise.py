"""Rounding is measured where it happens, and the decode's tolerance follows it."""

from typing import Any

import pytest
import torch

from ccm.decoding import batch_noise as rounding
from ccm.decoding import certificate as screening
from ccm.decoding.batch_noise import LEAST, ROOM, batch_noise, tolerance
from ccm.decoding.forward import run_body
from ccm.decoding.shared import decode_sets
from ccm.errors import AssumptionBroken
from ccm.models.load import load
from ccm.models.specs import MODELS, spec_for
from tests.decoding.test_shared import random_sets, run
from tests.exact import margins
from tests.pretended_gpu import pretended_gpus
from tests.toys import FAMILIES, ToyConfig, token_prompts, toy_folder

each_toy = pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.id)
FLOAT32 = LEAST[torch.float32]


@each_toy
def test_float32_rounds_by_some_millionths(config: ToyConfig) -> None:
    model = load(spec_for(str(toy_folder(config))))
    assert model.noise is None, "what does not decode need not know"
    assert 0 <= batch_noise(model) < margins(model).relative
    assert margins(model).relative < 1e-4, "this is no float32"
    assert batch_noise(model) == batch_noise(model)
    assert tolerance(model) == max(FLOAT32, ROOM * model.noise)  # type: ignore[operator]


@pytest.mark.parametrize("of", ["batches", "steps"])
@pytest.mark.parametrize("size", [1e-6, 1e-5])
def test_noise_is_found_and_leads_are_held_to_it(
    of: str, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(MODELS["organism"])
    own = batch_noise(model) + 1e-7  # of this machine's kernels, and of one product more

    def noisy(model: Any, tokens: Any, cache: Any = None, **options: Any) -> Any:
        before = 0 if cache is None else cache.get_seq_length()
        x, a = run_body(model, tokens, cache, **options)
        hit = before > 0 if of == "steps" else cache is None and len(tokens) > 1
        return (x * (1 + size) if hit else x), a

    monkeypatch.setattr(rounding, "run_body", noisy)
    assert batch_noise(model) == pytest.approx(size, abs=own)
    assert tolerance(model) == pytest.approx(max(FLOAT32, ROOM * size), abs=ROOM * own)
    (ablation,) = random_sets(384, [6], 1.0)
    with_noise = screening.build_screen(model.last_layer, [ablation], rounding.tolerance(model))
    model.noise = 0.0
    without = screening.build_screen(model.last_layer, [ablation], rounding.tolerance(model))
    assert with_noise.noise / without.noise == pytest.approx(
        max(1, ROOM * size / FLOAT32), abs=ROOM * own / FLOAT32
    )


def test_what_is_no_number_is_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: Any, tokens: Any, *args: Any, **options: Any) -> Any:
        x, a = run_body(model, tokens, *args, **options)
        return (x * float("nan") if len(tokens) > 1 else x), a

    monkeypatch.setattr(rounding, "run_body", broken)
    assert batch_noise(load(MODELS["organism"])) != 0
    with pytest.raises(
        AssumptionBroken, match=r"final residuals are no numbers .* use --engine hooked"
    ):
        tolerance(load(MODELS["organism"]))


def test_a_larger_slack_costs_work_and_changes_no_result() -> None:
    config = FAMILIES[0]
    prompts, sets = token_prompts(40, config, seed=3), random_sets(config.d_mlp, [5, 9], 1.0)
    runs = []
    for noise in (0.0, 9e-5):
        model = load(spec_for(str(toy_folder(config))))
        model.noise = noise
        runs.append(run(model, prompts, sets))
    exact, wary = runs
    assert wary.work.refereed > exact.work.refereed
    assert wary.work.certified < exact.work.certified
    for i in range(exact.n_sets):
        assert wary.tokens(i) == exact.tokens(i)


def test_too_much_noise_is_refused() -> None:
    model = load(spec_for(str(toy_folder(FAMILIES[0]))))
    model.noise = 5e-4
    with pytest.raises(AssumptionBroken, match=r"the batch changes .* by 5\.0e-04 .*Allowed: 1e-04"):
        list(decode_sets(model, [[0, 1]], []))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_is_not_measured(dtype: torch.dtype) -> None:
    model = load(spec_for(str(toy_folder(FAMILIES[0]))), dtype=dtype)
    assert tolerance(model) == LEAST[dtype]
    assert model.noise is None


def test_noise_is_measured_where_the_model_is() -> None:
    model = load(spec_for(str(toy_folder(FAMILIES[0]))))
    with pretended_gpus() as waits:
        on_gpu = load(spec_for(str(toy_folder(FAMILIES[0]))), "cuda")
        waits.clear()
        assert batch_noise(on_gpu) == batch_noise(model)
    assert waits["batch_noise.batch_noise"] == 3, "of either length the prompts, and what was found"


def test_short_contexts_are_kept_to() -> None:
    model = load(spec_for(str(toy_folder(FAMILIES[0]))))
    model.n_ctx = 4
    assert 0 <= batch_noise(model) < margins(model).relative
