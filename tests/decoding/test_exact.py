"""Float64 arithmetic on float32 weights, held to models that were loaded in float64."""

from typing import Any

import pytest
import torch

from ccm.decoding import exact
from ccm.decoding.exact import exact_last_positions, exact_logits, float64
from ccm.decoding.forward import run_body
from ccm.decoding.results import TIE, most_likely
from ccm.models.load import load
from ccm.models.specs import spec_for
from tests.exact import forward
from tests.toys import FAMILIES, ToyConfig, token_prompts, toy_folder

each_toy = pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.id)
WITHIN = 1e-12  # of the largest number


def largest(x: torch.Tensor) -> float:
    return float(x.abs().max())


@each_toy
def test_it_is_what_a_model_in_float64_gives(config: ToyConfig) -> None:
    model = load(spec_for(str(toy_folder(config))))
    prompts = token_prompts(9, config, seed=2, min_len=1, max_len=20)
    x, a = exact_last_positions(model, prompts, 40)
    wanted, last = forward(model.source, prompts), [len(p) - 1 for p in prompts]
    everyone = range(len(prompts))
    logits = exact_logits(model, x)
    for mine, its in ((x, wanted.x), (a, wanted.a), (logits, wanted.logits)):
        its = its[everyone, last]
        assert mine.dtype == its.dtype == torch.float64
        assert largest(mine - its) < WITHIN * largest(its)


@each_toy
def test_prefixes_of_any_lengths_share_a_forward_pass(
    config: ToyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, passes = load(spec_for(str(toy_folder(config)))), list[int]()
    prompts = token_prompts(9, config, seed=3, min_len=1, max_len=20)
    alone = [exact_last_positions(model, [prompt], 1) for prompt in prompts]

    def counted(*args: Any, **options: Any) -> Any:
        passes.append(len(args[1]))
        return run_body(*args, **options)

    monkeypatch.setattr(exact, "run_body", counted)
    together = exact_last_positions(model, prompts, 9 * 20)
    assert passes == [9]
    for mine, its in zip(together, zip(*alone, strict=True), strict=True):
        assert largest(mine - torch.cat(its)) < WITHIN * largest(mine)


@each_toy
def test_the_weights_stay_as_they_are(config: ToyConfig) -> None:
    model = load(spec_for(str(toy_folder(config))))
    tokens = torch.tensor(token_prompts(2, config, min_len=7, max_len=7))
    before = {name: (p, p.dtype, p.clone()) for name, p in model.body.named_parameters()}
    with torch.inference_mode():
        plain = run_body(model, tokens)
        with float64():
            run_body(model, tokens)
        again = run_body(model, tokens)
    for name, p in model.body.named_parameters():
        same, dtype, value = before[name]
        assert p is same
        assert p.dtype == dtype
        assert torch.equal(p, value)
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def test_what_code_asks_for_in_float32_is_float64() -> None:
    x = torch.rand(3, 4)
    with float64():
        found: dict[str, Any] = {
            "argument": x + x,
            "cast": x.half().to(torch.float32),
            "method": x.half().float(),
            "factory": torch.ones(2, dtype=torch.float32),
            "default": torch.zeros(2),
            "softmax": x.softmax(-1, dtype=torch.float32),
            "list": torch.cat([x, x.double()]),
            "view": x.T @ x,
        }
        written = torch.zeros(3, 4, dtype=torch.float64)
        written[:] = x
        written[0] += x[1]
        found["default"][[0, 1]] = x[0, :2]
        x.add_(0)
    assert {name: value.dtype for name, value in found.items()} == dict.fromkeys(found, torch.float64)
    assert torch.equal(written[0], x[0].double() + x[1].double())
    assert x.dtype == torch.float32


def test_ties_go_to_the_lowest_id() -> None:
    rows = torch.tensor([[1.0, 3.0, 3.0 + TIE / 2, 2.0], [0.0, 1.0, 1.0 + 3 * TIE, 1.0]]).double()
    rows[0, 2], rows[1, 2] = 3.0 + TIE / 2, 1.0 + 3 * TIE
    assert most_likely(rows, 3).tolist() == [[1, 2, 3], [2, 1, 3]]
