"""The error of float32 is measured where it happens, and the decode's tolerance follows it."""

from typing import Any

import numpy as np
import pytest
import torch

from ccm.decoding import tolerance as measuring
from ccm.decoding.certificate import build_screen
from ccm.decoding.forward import run_body
from ccm.decoding.shared import decode_sets
from ccm.decoding.tolerance import LEAST, MOST, POSITIONS, ROOM, Float32Error, measure, tolerance
from ccm.errors import AssumptionBroken
from ccm.models.load import load
from ccm.models.model import LoadedModel
from ccm.models.specs import MODELS, spec_for
from tests.decoding.test_shared import random_sets, run
from tests.pretended_gpu import pretended_gpus
from tests.toys import FAMILIES, ToyConfig, token_prompts, toy_folder

each_toy = pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.id)
FLOAT32 = LEAST[torch.float32]
PROMPTS = [[0, *range(i, i + 30)] for i in range(5, 50, 3)]  # of any model


def toy(config: ToyConfig = FAMILIES[0]) -> LoadedModel:
    return load(spec_for(str(toy_folder(config))))


@each_toy
def test_float32_errs_by_some_hundred_millionths(config: ToyConfig) -> None:
    model = toy(config)
    assert model.float32_error is None, "what does not decode need not know"
    prompts = token_prompts(20, config, min_len=6)
    found = tolerance(model, prompts)
    error = model.float32_error
    assert 0 < error.largest < 5e-6
    assert found == max(FLOAT32, ROOM * error.largest)
    assert error.positions > 0


@pytest.mark.parametrize("where", ["batch", "step"])
@pytest.mark.parametrize("size", [1e-6, 4e-6])
def test_an_error_is_found_and_leads_are_held_to_it(
    where: str, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(MODELS["organism"])
    own = measure(model, PROMPTS).largest  # of this machine's kernels
    last = model.last_layer
    push = last.W_U[:, 0] - last.W_U[:, 1:].mean(1)  # a direction that some logits differ along
    push = push / push.norm()

    def off(model: Any, tokens: Any, cache: Any = None, **options: Any) -> Any:
        before = 0 if cache is None else cache.get_seq_length()
        x, a = run_body(model, tokens, cache, **options)
        hit = before > 0 if where == "step" else cache is None and x.dtype == torch.float32
        return (x + size * x.norm(dim=-1, keepdim=True) * push if hit else x), a

    monkeypatch.setattr(measuring, "run_body", off)
    found = measure(model, PROMPTS).largest
    # Along one direction a difference of logits moves by no more than twice size M |x| / s.
    assert 0.02 * size < found - own < 2.1 * size
    assert tolerance(model, PROMPTS) == max(FLOAT32, ROOM * found)
    (ablation,) = random_sets(384, [6], 1.0)
    u = tolerance(model, PROMPTS)
    with_error, without = (build_screen(last, [ablation], of) for of in (u, FLOAT32))
    assert with_error.noise / without.noise == pytest.approx(u / FLOAT32, rel=1e-5)


def test_what_is_no_number_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: Any, tokens: Any, *args: Any, **options: Any) -> Any:
        x, a = run_body(model, tokens, *args, **options)
        return (x * float("nan") if x.dtype == torch.float32 else x), a

    monkeypatch.setattr(measuring, "run_body", broken)
    with pytest.raises(AssumptionBroken, match=r"logits are no numbers .* use --engine hooked"):
        tolerance(load(MODELS["organism"]), PROMPTS)


def test_a_larger_tolerance_costs_work_and_changes_no_result() -> None:
    config = FAMILIES[0]
    prompts, sets = token_prompts(40, config, seed=3), random_sets(config.d_mlp, [5, 9], 1.0)
    runs = []
    for largest in (0.0, 1e-5):
        model = toy(config)
        model.float32_error = Float32Error(largest, POSITIONS)
        runs.append(run(model, prompts, sets))
    exact, wary = runs
    assert wary.work.refereed > exact.work.refereed
    assert wary.work.certified < exact.work.certified
    for i in range(exact.n_sets):
        assert wary.tokens(i) == exact.tokens(i)


def test_too_large_an_error_is_refused() -> None:
    model = toy()
    model.float32_error = Float32Error(5e-3, POSITIONS)
    with pytest.raises(AssumptionBroken, match=r"relative error of 5\.0e-03 .*Allowed: 1e-03"):
        list(decode_sets(model, [[0, 1]], []))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_is_not_measured(dtype: torch.dtype) -> None:
    model = load(spec_for(str(toy_folder(FAMILIES[0]))), dtype=dtype)
    assert tolerance(model, PROMPTS) == LEAST[dtype]
    assert model.float32_error is None


def test_the_error_is_measured_where_the_model_is() -> None:
    model = toy()
    with pretended_gpus():
        on_gpu = load(spec_for(str(toy_folder(FAMILIES[0]))), "cuda")
        there, here = measure(on_gpu, PROMPTS), measure(model, PROMPTS)
    assert there.positions == here.positions
    # Kernels, and so the order of sums, may differ; with several threads they do.
    assert 0.5 < there.largest / here.largest < 2


@pytest.mark.parametrize("prompts", [[[7]], [[7], [8, 9]], [[1, 2, 3]]], ids=str)
def test_few_and_short_prompts_will_do(prompts: list[list[int]]) -> None:
    error = measure(toy(), prompts)
    assert 0 <= error.largest < MOST
    assert error.positions >= 1


def test_more_is_measured_until_it_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = toy(), list[int]()

    def counted(model: Any, prompts: Any) -> Float32Error:
        seen.append(len(prompts))
        return Float32Error(1e-9 / len(seen), POSITIONS // 2)

    monkeypatch.setattr(measuring, "measure", counted)
    for n in (3, 4, 5):
        tolerance(model, PROMPTS[:n])
    assert seen == [3, 4], "as soon as enough positions were seen, no more are"
    assert model.float32_error == Float32Error(1e-9, POSITIONS), "the largest of all"
    assert np.isnan(Float32Error(np.nan, 1).joined(Float32Error(0.0, 1)).largest)
    assert np.isnan(Float32Error(0.0, 1).joined(Float32Error(np.nan, 1)).largest)
