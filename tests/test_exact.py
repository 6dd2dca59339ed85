"""What float32 is held to is exact, and margins are as wide as this machine's rounding, no wider."""

from configparser import ConfigParser
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from ccm.method.ablation import PLAIN, Ablation
from ccm.models.load import load
from ccm.models.specs import MODELS, spec_for
from conftest import is_numeric
from tests.decoding.test_shared import near_ties  # noqa: F401  (a fixture)
from tests.exact import clear, forward, lead, margins, margins_from, margins_of
from tests.tolerance import ENTROPY, FLOOR, LOG_PROBABILITY, TIMES, of_rounding
from tests.toys import FAMILIES, ToyConfig, token_prompts, toy_folder

each_toy = pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.id)
EPS = torch.finfo(torch.float32).eps


@each_toy
def test_the_reference_is_float64_through_and_through(config: ToyConfig) -> None:
    folder, prompts = str(toy_folder(config)), token_prompts(5, config, min_len=9, max_len=9)
    exact, single = forward(folder, prompts), forward(folder, prompts, torch.float32)
    for name in ("x", "a", "logits"):
        wanted, rough = getattr(exact, name), getattr(single, name)
        size = float(wanted.abs().max())
        alone = torch.cat([getattr(forward(folder, [p]), name) for p in prompts])
        # What went through float32 would be rounded by 1e-8 and more, and otherwise in another batch.
        assert float((alone - wanted).abs().max()) < 1e-13 * size, f"{config.id}: {name}"
        assert 1e-8 * size < float((rough - wanted).abs().max()) < 1e-4 * size, f"{config.id}: {name}"


def test_what_fills_up_a_shorter_prompt_changes_nothing() -> None:
    folder, prompts = str(toy_folder(FAMILIES[0])), token_prompts(4, FAMILIES[0], min_len=2, max_len=9)
    together = forward(folder, prompts).logits
    for row, prompt in zip(together, prompts, strict=True):
        torch.testing.assert_close(row[: len(prompt)], forward(folder, [prompt]).logits[0])


def test_an_ablation_is_that_of_its_own_prompt() -> None:
    folder, prompts = str(toy_folder(FAMILIES[0])), token_prompts(2, FAMILIES[0], min_len=5, max_len=5)
    plain = forward(folder, prompts)
    done = forward(folder, prompts, ablations=[PLAIN, Ablation("some", (3, 7), (2.0, -2.0))])
    assert torch.equal(done.a, plain.a), "activations are those before ablation"
    assert torch.equal(done.logits[0], plain.logits[0])
    assert float((done.logits[1] - plain.logits[1]).abs().min(-1).values.max()) > 1e-3


@each_toy
def test_margins_are_some_times_what_this_machine_rounds(config: ToyConfig) -> None:
    folder, prompts = str(toy_folder(config)), token_prompts(5, config, min_len=9, max_len=9)
    exact, single = forward(folder, prompts), forward(folder, prompts, torch.float32)
    found = margins_from(single, exact)
    error, size = float((single.x.double() - exact.x).abs().max()), float(exact.x.abs().max())
    assert found.x.atol == pytest.approx(TIMES * error + FLOOR * EPS * size)
    found.x.assert_close(single.x, exact.x)
    for moved in (exact.x * (1 + 1e-3), exact.x.roll(1, dims=-1), exact.x.roll(1, dims=1)):
        with pytest.raises(AssertionError, match=r"^final residual="):
            found.x.assert_close(moved, exact.x)
    assert found.log_prob.atol < 0.02, "wide enough to hide a fault"
    assert found.lead < 0.02
    assert margins(load(spec_for(folder))) is margins_of(folder)


def test_what_is_no_rounding_gives_no_margin() -> None:
    exact = torch.linspace(1, 2, 5, dtype=torch.float64)
    assert of_rounding("x", exact.float(), exact).atol == pytest.approx(FLOOR * EPS * 2, rel=0.5)
    assert of_rounding("x", exact + 1e-5, exact, times=3).atol == pytest.approx(3e-5 + FLOOR * EPS * 2)
    for seen in (exact + 1e-2, exact * float("nan")):
        with pytest.raises(AssertionError, match=r"^x: off by .* of 2, which is no rounding"):
            of_rounding("x", seen, exact)
    assert of_rounding("x", exact + 1e-2, exact, dtype=torch.float16).atol > 0.08
    with pytest.raises(AssertionError, match="exact numbers have type float32, expected float64"):
        of_rounding("x", exact, exact.float())
    with pytest.raises(AssertionError, match=r"^x has shape \(4,\), expected \(5,\)"):
        of_rounding("x", exact[1:], exact)


def test_clear_prompts_are_those_that_no_rounding_decides(near_ties: object) -> None:  # noqa: F811
    config = FAMILIES[0]
    model, prompts = load(spec_for(str(toy_folder(config)))), token_prompts(20, config, seed=1)
    kept = clear(model, prompts)
    assert len(kept) > 15
    assert kept == [p for p in prompts if p in kept], "in order"
    assert all(lead(model, p) > margins(model).lead for p in kept)
    strict = replace(margins(model), lead=0.5)
    assert len(kept) > len([p for p in kept if lead(model, p) > strict.lead]) > 0
    assert clear(near_ties, token_prompts(6, ToyConfig("gpt2", tied=False))) == []  # type: ignore[arg-type]


def test_the_organism_rounds_less_than_its_promise() -> None:
    found = margins_of(str(MODELS["organism"].folder), times=1.0)
    assert found.entropy.atol < ENTROPY.atol, "what is promised, this machine cannot keep"
    assert found.log_prob.atol < LOG_PROBABILITY.atol


# --- which tests other kernels run again ------------------------------------------------------------

NUMERIC = (
    *("decoding.test_activations", "closed_form.test_closed_form", "decoding.test_shared"),
    *("experiment.test_effects", "test_exact", "decoding.test_hooked", "models.test_specs"),
    *("method.test_neurons", "decoding.test_pretended_gpu", "test_released"),
    *("decoding.test_exact", "decoding.test_certificate", "experiment.test_probing"),
    "reproduction.test_tolerance",
)


@pytest.mark.parametrize("name", NUMERIC)
def test_files_with_margins_are_run_by_other_kernels_too(name: str) -> None:
    assert is_numeric(import_module(f"tests.{name}"))


def test_files_without_are_not(request: pytest.FixtureRequest) -> None:
    assert not is_numeric(import_module("tests.test_layers"))
    assert not is_numeric(None)
    assert request.node.get_closest_marker("numeric") is not None, "the mark is not set"


def test_the_environment_for_other_kernels_runs_them() -> None:
    tox = ConfigParser()
    tox.read(Path(__file__).parent.parent / "tox.ini")
    kernels = tox["testenv:kernels"]
    assert '-m "numeric and not slow"' in kernels["commands"]
    assert "ATEN_CPU_CAPABILITY = default" in kernels["set_env"]
    assert set(tox["tox"]["env_list"].split(", ")) >= {"tests", "kernels"}
