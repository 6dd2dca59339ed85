"""Options of a run: one row each, from which the rest follows."""

import json
from dataclasses import dataclass, fields

import pytest

from ccm.cli.parser import main, parser
from ccm.decoding.engines import AUTO, ENGINES
from ccm.errors import BadInput
from ccm.experiment import config
from ccm.experiment.config import RunConfig, command_line, given
from ccm.experiment.files import to_json
from ccm.experiment.options import option, option_of
from ccm.experiment.plan import identity, make_plan


@dataclass(frozen=True)
class WithFlavour(RunConfig):
    """A run with one option more."""

    flavour: str = option("plain", "what it tastes of", choices=("plain", "salt"))


def test_a_new_option_arrives_everywhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(config, "RunConfig", WithFlavour)
    with pytest.raises(SystemExit):
        parser().parse_args(["run", "--help"])
    assert "--flavour FLAVOUR" in (told := capsys.readouterr().out)
    assert "what it tastes of (default: plain)" in " ".join(told.split())
    given_ = parser().parse_args(["run", "--model", "organism", "--flavour", "salt"])
    assert given_.flavour == "salt"
    chosen = WithFlavour.read(flavour="salt")
    assert command_line(chosen)[-2:] == ["--flavour", "salt"]
    assert given(chosen) == {"flavour": "salt"}
    assert identity(make_plan(chosen))["flavour"] == "salt"
    assert identity(make_plan(WithFlavour()))["flavour"] == "plain"
    with pytest.raises(BadInput, match=r"^flavour 'sour': unknown\. Allowed: plain, salt"):
        WithFlavour.read(flavour="sour")


def test_the_engines_offered_are_those_there_are() -> None:
    """Written out in the option, because the engines themselves take seconds to import."""
    (row,) = (option_of(f) for f in fields(RunConfig) if f.name == "engine")
    assert row.choices == (AUTO, *ENGINES)


def test_every_option_has_help_and_a_flag_of_its_own() -> None:
    rows = [option_of(f) for f in fields(RunConfig)]
    assert len({row.flag for row in rows}) == len(rows)
    assert all(row.help for row in rows)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ablation_values": "all", "neurons": "3,1,2", "shard": "2/8", "memory_budget": "8G"},
        {"ablation_values": ["mode_ablation"], "neurons": "published", "full_texts": True},
        {"min_rho": "0.5", "seed": 0, "matched_controls": "0", "max_prompts": "7"},
    ],
)
def test_what_was_given_reads_back(options: dict[str, object]) -> None:
    chosen = RunConfig.read(**options)
    noted = json.loads(to_json(given(chosen)))
    assert RunConfig.read(**noted) == chosen
    parsed = parser().parse_args(["run", *command_line(chosen)])
    names = {f.name for f in fields(RunConfig)}
    assert RunConfig.read(**{k: v for k, v in vars(parsed).items() if k in names}) == chosen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, r"^seed -1: out of range\. Allowed: 0 to 4294967295, for --seed"),
        ({"max_prompts": 0}, r"^max prompts 0: out of range\. Allowed: 1 and more"),
        ({"min_rho": float("nan")}, "^min rho nan: out of range"),
        ({"engine": "warp"}, "^engine 'warp': unknown. Allowed: auto, shared, hooked"),
        ({"shard": (3, 2)}, "^shard 3/2: out of range"),
        ({"k": 2, "neurons": (1, 2)}, "^-k 2: --neurons names them already"),
        ({"ablation_values": ("all", "mean_ablation")}, "all includes the others"),
        ({"ablation_values": ("mean",)}, "^ablation value 'mean': unknown"),
    ],
)
def test_values_that_are_not_allowed(options: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        RunConfig(**options)  # type: ignore[arg-type]


def test_the_command_line_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--model", "organism", "--seed", "-1"]) == 2
    assert capsys.readouterr().err.startswith("ccm: seed -1: out of range")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ablation_values", "all"),
        ("ablation_values", ()),
        ("controls", 2.5),
        ("controls", True),
        ("controls", "100"),
        ("controls", None),
        ("full_texts", 1),
        ("model", 3),
        ("min_rho", "0.5"),
        ("model_paths", ("a=b",)),
        ("shard", "1/2"),
    ],
)
def test_values_of_another_kind(name: str, value: object) -> None:
    """Asked of the option itself: in tests, types are checked before a `RunConfig` is made."""
    rows = {f.name: option_of(f) for f in fields(RunConfig)}
    with pytest.raises(BadInput, match=r"not a value for .*RunConfig\.read takes text"):
        rows[name].check(value)
