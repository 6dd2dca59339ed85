"""A sweep's runs are those that each choice alone would give; what they share is computed once."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import ccm.experiment.run
from ccm.cli.parser import main
from ccm.errors import BadInput
from ccm.experiment import probing, sweep
from ccm.experiment.config import RunConfig
from ccm.experiment.run import run
from ccm.experiment.sweep import choices, read_varied
from tests.experiment.test_merging import files
from tests.made_runs import few_facts

pytestmark = pytest.mark.whole_runs

VARIED = {
    "k": ["4", "6"],  # six is the organism's own number
    "stats_positions": ["text"],
    "controls": ["3"],
    "template": ["instruction"],
}
NAMES = ("base", "k-4", "stats-positions-text", "controls-3", "template-instruction")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    facts = few_facts(tmp_path_factory.mktemp("facts"), every=24)
    return RunConfig(model="organism", facts=str(facts), controls=2, matched_controls=1)


@pytest.fixture(scope="module")
def swept(base: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A sweep, and how often each step was done; read-only."""
    out, done = tmp_path_factory.mktemp("sweep") / "out", Counter[str]()
    with pytest.MonkeyPatch.context() as patch:
        for module, name in (
            (ccm.experiment.run, "collect"),
            (ccm.experiment.run, "decode_stored"),
            (probing, "answers_of"),
        ):
            real = getattr(module, name)

            def counted(*given: Any, _real: Any = real, _name: str = name, **options: Any) -> Any:
                done[_name] += 1
                return _real(*given, **options)

            patch.setattr(module, name, counted)
        ended = list(sweep.sweep(base, VARIED, out))
    assert [(choice.name, folder) for choice, folder in ended] == [(n, out / n) for n in NAMES]
    return out, done


def test_every_run_is_that_of_its_choice_alone(
    base: RunConfig, swept: tuple[Path, Any], tmp_path: Path
) -> None:
    out, _ = swept
    for choice in choices(base, VARIED):
        if choice.name not in NAMES:
            continue
        run(choice.config, tmp_path / choice.name)
        alone = tmp_path / choice.name
        assert files(out / choice.name) == files(alone), choice.name
        mine, its = (json.loads((f / "manifest.json").read_text()) for f in (out / choice.name, alone))
        for key in mine.keys() | its.keys():
            if key not in ("timings_s", "memory_budget", "float32_error"):
                assert mine.get(key) == its.get(key), f"{choice.name}: {key}"
        # Of the prompts that each happened to measure, by kernels that may round otherwise each time.
        assert 0.5 < mine["float32_error"] / its["float32_error"] < 2, choice.name


def test_what_runs_share_is_computed_once(swept: tuple[Path, Any]) -> None:
    _, done = swept
    # Prompts: of the base and of the other template. Statistics: of the other positions, too.
    assert done == {"answers_of": 2, "collect": 3, "decode_stored": 5}


def test_a_sweep_that_was_stopped_goes_on(
    base: RunConfig, swept: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    varied = {"k": ["4"]}
    first = next(iter(sweep.sweep(base, varied, tmp_path)))
    assert first[0].name == "base"
    monkeypatch.setattr(probing, "answers_of", None)
    monkeypatch.setattr(ccm.experiment.run, "collect", None)
    ended = [choice.name for choice, _ in sweep.sweep(base, varied, tmp_path)]
    assert ended == ["base", "k-4"]
    assert files(tmp_path / "k-4") == files(swept[0] / "k-4")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["k"], "not an option with values"),
        (["k="], "not an option with values"),
        (["warp=1"], "option 'warp': unknown"),
        (["shard=1/2"], "option 'shard': unknown"),
        (["k=x"], "not a whole number"),
        (["k=4,4"], "given twice"),
        (["k=4", "k=4"], "given twice"),
        (["engine=warp"], "Allowed: auto, shared, hooked"),
    ],
)
def test_what_cannot_be_varied(given: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        choices(RunConfig(), read_varied(given))


def test_a_choice_that_no_model_has_is_found_before_the_first_run(
    base: RunConfig, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match="k=400"):
        list(sweep.sweep(base, {"k": ["4", "400"]}, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_command_shows_a_row_for_every_choice(
    base: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["sweep", "--model", "organism", "--facts", str(base.facts), "--controls", "2"]
    # Only four neurons reach rho 0.9 in so small a null space, which a run alone can tell.
    command += ["--vary", "k=4", "--vary", "null-space-dims=4", "--out", str(out)]
    assert main(command) == 2
    shown = capsys.readouterr()
    assert "null-space-dims-4: k=6 entropy neurons: only 4 of 384 reach rho" in shown.err
    assert shown.err.splitlines()[-1].startswith("ccm: null-space-dims-4: could not be run")
    table = pd.read_csv(out / "sweep.csv")
    assert table["choice"].tolist() == ["base", "k 4"]
    for name, row in zip(("base", "k-4"), table.to_dict("records"), strict=True):
        scores = json.loads((out / name / "scores.json").read_text())["ablations"]["mean_ablation"]
        assert row["gts_count"] == scores["entropy"]["gts"]["count"]
        assert row["p"] == scores["entropy"]["permutation_p"]
        assert row["p_matched"] == scores["matched_controls"]["permutation_p"]
        assert row["cr_ck_count"] == scores["entropy"]["conversion_ratios"]["CK"]["count"]
        assert row["gts_controls_mean"] == scores["controls"]["gts"]["mean"]
        assert len(row["neurons"].split()) == (6 if name == "base" else 4)
    assert "| base |" in shown.out
    assert "| k 4 |" in shown.out


def test_every_option_that_is_not_listed_counts(base: RunConfig) -> None:
    """A new option of the identity keeps runs from sharing until somebody says that it may not."""
    from ccm.experiment.plan import identity, make_plan

    known = identity(make_plan(base))
    assert known.keys() >= sweep.NOT_OF_PROMPTS
    assert sweep.NOT_OF_STATISTICS < sweep.NOT_OF_PROMPTS
    for key in (
        "template",
        "protocol",
        "facts_sha256",
        "dtype",
        "bos",
        "max_prompts",
        "weights_sha256",
    ):
        assert key in known
        assert key not in sweep.NOT_OF_PROMPTS
    assert replace(base, seed=1) != base
