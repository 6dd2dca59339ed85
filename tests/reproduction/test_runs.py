"""Which run a pair gets, what stops it, and what of it may become a golden."""

import json
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch

from ccm.errors import BadInput, NotAvailable
from ccm.experiment.files import read_json
from ccm.experiment.folder import SCORES
from ccm.method.ablation_values import ABLATION_VALUES
from ccm.models.specs import MODELS, PUBLISHED, spec_for
from ccm.models.weights import OTHER_DIMENSIONS_VARIABLE, check_weights
from ccm.paper.report import comparisons_of
from conftest import Options
from reproduction import goldens
from reproduction.complaints import complaints
from reproduction.goldens import NotHeld
from reproduction.pairs import Pair, is_stand_in, missing, pairs, rehearsal
from reproduction.provenance import command_line, write_provenance
from reproduction.runs import Run, Runs, config_of
from tests.needs import NO_GPU
from tests.published_run import published_run
from tests.toys import ToyConfig, toy_folder

GPT2 = Pair("gpt2-small", "mean_ablation")


def options(**changed: Any) -> Options:
    given: dict[str, Any] = {
        "models": tuple(MODELS),
        "ablation_values": tuple(ABLATION_VALUES),
        "model_paths": {},
        "device": "auto",
        "dtype": "float32",
        "artifacts": None,
        "facts": None,
        "max_prompts": None,
        "require_gpu": False,
        "require_weights": False,
    }
    return Options(**(given | changed))


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A stand-in for GPT-2, with dimensions of its own."""
    monkeypatch.setenv(OTHER_DIMENSIONS_VARIABLE, "1")
    return {"gpt2-small": toy_folder(ToyConfig("gpt2"))}


# --- pairs --------------------------------------------------------------------------------------------


def test_tests_against_the_print_have_twenty_five_pairs() -> None:
    found_ = pairs(options(), published=True)
    assert [p.id for p in found_] == [f"{m}-{v}" for m in PUBLISHED for v in ABLATION_VALUES]
    assert len(found_) == 25
    assert {tuple(m.name for m in p.marks) for p in found_} == {("gpu",)}
    (none,) = pairs(options(models=("organism",)), published=True)
    assert none.values == (None,)
    assert [m.name for m in none.marks] == ["skip"]
    assert none.marks[0].kwargs["reason"] == (
        "says something about a published model under any ablation value only, and none is selected: "
        "see --models and --ablation-values"
    )


def test_a_test_of_some_pairs_has_no_others() -> None:
    mean = {"ablation_value": "mean_ablation"}
    planted = pairs(options(), model="organism", **mean)
    assert [p.id for p in planted] == ["organism-mean_ablation"]
    printed_ = pairs(options(), published=True, **mean)
    assert [p.id for p in printed_] == [f"{m}-mean_ablation" for m in PUBLISHED]
    (none,) = pairs(options(ablation_values=("mode_ablation",)), model="organism", **mean)
    assert (
        none.marks[0]
        .kwargs["reason"]
        .startswith("says something about organism under mean_ablation only, and none is selected")
    )


def test_the_cpu_has_to_be_asked_for_and_given_weights(
    toy: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert missing("gpt2-small", options(device="cpu", model_paths=toy)) is None
    for model, given, there in (
        ("gpt2-small", options(device="auto", model_paths=toy), toy["gpt2-small"]),
        ("gpt2-small", options(device="cpu"), "DIR"),
        ("Phi-1_5", options(device="cpu", model_paths=toy), "DIR"),
    ):
        assert missing(model, given) == (
            "needs CUDA: none found. On a machine with a GPU: tox -e gpu. On this CPU, if you say so: "
            f"pytest -m gpu --models {model} --model-path {model}={there} --device cpu",
            False,
        )
    reason, fail = missing("Phi-1_5", options(device="cpu", require_gpu=True)) or ("", None)
    assert reason.startswith("needs CUDA: none found. On ")
    assert fail is True


@pytest.mark.parametrize("model", PUBLISHED)
def test_missing_weights_say_what_fetches_them(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reproduction.pairs.weight_files", lambda spec: [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for required in (False, True):
        reason, fail = missing(model, options(require_weights=required)) or ("", None)
        assert reason.startswith(f"needs weights of {model}: not in the cache. Download them with ccm ")
        assert reason.endswith(f", or give --model-path {model}=DIR")
        assert f"ccm fetch {model}" in reason
        assert ("HF_TOKEN" in reason) == MODELS[model].gated
        assert fail is required


def test_what_makes_a_rehearsal(toy: dict[str, Path]) -> None:
    organism = Pair("organism", "mean_ablation")
    assert rehearsal(GPT2, options()) is None
    assert rehearsal(GPT2, options(max_prompts=60)) == "a rehearsal: --max-prompts 60"
    assert rehearsal(organism, options(max_prompts=60)) == "a rehearsal: --max-prompts 60"
    assert rehearsal(GPT2, options(facts="mine")) == "a rehearsal: other facts"
    # The published models are asked about ParaRel anyway, the organism is not.
    assert rehearsal(GPT2, options(facts="pararel")) is None
    assert rehearsal(organism, options(facts="pararel")) == "a rehearsal: other facts"
    assert rehearsal(GPT2, options(model_paths=toy)) == "a rehearsal: a stand-in of other dimensions"
    assert rehearsal(organism, options(model_paths=toy)) is None


# --- runs ---------------------------------------------------------------------------------------------


def test_published_models_follow_the_released_protocol_on_the_released_neurons() -> None:
    config = config_of(GPT2, options(device="cuda"), MODELS["gpt2-small"])
    assert config.protocol == "released"
    assert config.ablation_values == tuple(ABLATION_VALUES)
    assert config.neurons == MODELS["gpt2-small"].published_neurons
    assert (config.controls, config.seed, config.device, config.min_rho) == (100, 123, "cuda", None)
    organism = config_of(Pair("organism", "mode_ablation"), options(device="cuda"), MODELS["organism"])
    assert (organism.protocol, organism.neurons, organism.device) == ("corrected", None, "cpu")


def test_a_stand_in_selects_neurons_of_its_own(toy: dict[str, Path]) -> None:
    given = options(model_paths=toy, device="cpu", max_prompts=9, facts="pararel")
    spec = check_weights(spec_for("gpt2-small", toy))
    assert is_stand_in(spec)
    assert not any(is_stand_in(s) for s in MODELS.values())
    config = config_of(GPT2, given, spec)
    assert (config.neurons, config.min_rho, config.max_prompts, config.facts) == (
        None,
        0.0,
        9,
        "pararel",
    )


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, toy: dict[str, Path]) -> Callable[..., tuple[Runs, list]]:
    """`Runs` whose experiment is replaced by a list of starts, and an error if one is given."""

    def make(error: Exception | None = None, **changed: Any) -> tuple[Runs, list]:
        starts: list[tuple[str, Path]] = []

        def start(config: Any, folder: Path) -> dict[str, Any]:
            starts.append((config.model, folder))
            if error is not None:
                raise error
            return {"n_prompts": 1}

        monkeypatch.setattr("reproduction.runs.run", start)
        return Runs(options(device="cpu", model_paths=toy, **changed), Path("root")), starts

    return make


def test_a_model_runs_once_for_all_its_pairs(counted: Callable[..., tuple[Runs, list]]) -> None:
    runs, starts = counted()
    first = runs(GPT2)
    assert runs(Pair("gpt2-small", "mode_ablation")) is first
    assert (first.folder, first.scores) == (Path("root/gpt2-small"), {"n_prompts": 1})
    assert starts == [("gpt2-small", Path("root/gpt2-small"))]


def test_an_error_fails_once_and_is_told_again(counted: Callable[..., tuple[Runs, list]]) -> None:
    runs, starts = counted(BadInput("no probing prompt left"))
    message = "^no run of gpt2-small: no probing prompt left"
    with pytest.raises(pytest.fail.Exception, match=message):
        runs(GPT2)
    for value in ("mean_ablation", "mode_ablation"):
        with pytest.raises(pytest.skip.Exception, match=message):
            runs(Pair("gpt2-small", value))
    assert len(starts) == 1


@pytest.mark.parametrize("required", [False, True])
def test_what_cannot_be_had_is_no_failure_unless_required(
    required: bool, counted: Callable[..., tuple[Runs, list]]
) -> None:
    runs, _ = counted(NotAvailable("facts cannot be downloaded"), require_weights=required)
    outcome = pytest.fail.Exception if required else pytest.skip.Exception
    with pytest.raises(outcome, match=r"^no run of gpt2-small: facts cannot be .* --force-enable-s"):
        runs(GPT2)
    runs, _ = counted(NotAvailable("no facts."), require_weights=required, network=True)
    with pytest.raises(outcome, match=r"^no run of gpt2-small: no facts\.$"):
        runs(GPT2)


def test_a_machine_without_the_means_skips(counted: Callable[..., tuple[Runs, list]]) -> None:
    runs, starts = counted()
    NO_GPU.check()
    with pytest.raises(pytest.skip.Exception, match=r"^needs CUDA: none found"):
        runs(Pair("Phi-1_5", "mean_ablation"))
    assert starts == []


def run_folder(folder: Path, model: str) -> Run:
    """A run of a published model that found what was printed, as far as files tell."""
    published_run(folder, model)
    return Run(MODELS[model], folder, read_json(folder / SCORES))


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_rule_and_the_comparison_are_read_from_the_run(model: str, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", model)
    assert sorted(run.selected()) == sorted(MODELS[model].published_neurons)
    (of_run,) = comparisons_of([run.results])
    assert complaints(of_run.rows) == []


# --- goldens and their provenance ---------------------------------------------------------------------


@pytest.mark.parametrize("value", [{"a": 1}, [1, 2], 3])
def test_comparing_with_a_golden_that_is_not_held_skips(value: object) -> None:
    with pytest.raises(pytest.skip.Exception, match=r"^no golden"):
        assert value == NotHeld("no golden")


def test_provenance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(goldens, "GOLDEN", tmp_path / "golden")
    run = run_folder(tmp_path / "run", "gpt2-small")
    arguments = ["-m", "gpu", f"--artifacts={tmp_path}", "--snapshot-update"]
    path = write_provenance(run.spec, run.manifest, arguments, date(2026, 1, 31))
    assert path == tmp_path / "golden" / "provenance" / "gpt2-small.json"
    text = path.read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    assert json.loads(text) == {
        "model": "gpt2-small",
        "date": "2026-01-31",
        "command": "pytest -m gpu --artifacts=DIR --snapshot-update",
        "device": "cuda",
        "device_name": "a GPU",
        "dtype": "float32",
        "protocol": "released",
        "versions": {"torch": "2.13"},
        "weights": {"hub_id": "openai-community/gpt2", "revision": "abc123", "sha256": "0" * 64},
        "facts_sha256": "1" * 64,
        "prompts": 7,
        "prompts_sha256": "2" * 64,
    }


def test_paths_in_words_of_their_own_are_left_out_of_the_command() -> None:
    given = ["reproduction", "--model-path", "gpt2-small=/data/x", "--artifacts", "/tmp/a", "-k", "a=b"]
    assert command_line(given) == (
        "pytest reproduction --model-path gpt2-small=DIR --artifacts DIR -k a=b"
    )
