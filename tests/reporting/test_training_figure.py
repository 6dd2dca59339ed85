"""Runs of checkpoints are laid on an axis of steps, read off the names of revisions and folders."""

import json
from pathlib import Path
from typing import Any

import pytest

from ccm.experiment.results import RunResults, read_results
from ccm.method.sources import SOURCES
from ccm.reporting.figures.gallery import figures_across
from ccm.reporting.figures.training import checkpoints, step_of, through_training
from tests.made_runs import make_run

VALUES = ("mode_ablation", "mean_ablation")


def run_of(
    folder: Path, source: str, revision: str | None = None, seed: int = 0, **options: Any
) -> RunResults:
    path = make_run(folder, seed=seed, **{"values": VALUES, **options}).path
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["weights"]["source"] = source
    if revision is not None:
        manifest["asked"]["revision"] = revision
    (path / "manifest.json").write_text(json.dumps(manifest))
    return read_results(path)


@pytest.mark.parametrize(
    ("source", "revision", "step"),
    [
        ("models/pythia/step1000", None, 1000),
        ("models/run/checkpoint-500", None, 500),
        ("cache/snapshots/0123abc", "step143000", 143000),
        ("cache/step5/0123abc", "step7", 7),
        ("models/olmo/iter_0020", None, 20),
        ("models/gpt2", None, None),
        ("models/stepwise", None, None),
        ("models/v2", "main", None),
    ],
)
def test_a_step_is_read_off_a_name(
    source: str, revision: str | None, step: int | None, tmp_path: Path
) -> None:
    assert step_of(run_of(tmp_path / "r", source, revision)) == step


@pytest.fixture
def runs(tmp_path: Path) -> list[RunResults]:
    """Three steps, not in their order."""
    return [
        run_of(tmp_path / str(step), f"m/step{step}", seed=step, moved=step / 8000)
        for step in (4000, 0, 1000)
    ]


def test_numbers_are_those_of_each_runs_scores(runs: list[RunResults]) -> None:
    found = checkpoints(runs)
    assert found is not None
    steps, value = found
    assert value == "mode_ablation", "the first that they all have"
    assert [c.step for c in steps] == [0, 1000, 4000]
    for checkpoint, run in zip(steps, (runs[1], runs[2], runs[0]), strict=True):
        scores = run.scores["ablations"][value]
        controls = scores["controls"]["conversion_ratios"]["CK"]
        assert checkpoint.own.percent == scores["entropy"]["conversion_ratios"]["CK"]["percent"]
        assert checkpoint.controls == (controls["mean"], controls["low"], controls["high"])
        for source in SOURCES:
            assert checkpoint.sources[source].count == run.scores["sources"][source]["count"]
    drawing = through_training(steps, value)
    left, right = drawing.figure.axes
    assert [text.get_text() for text in left.get_xticklabels()] == ["0", "1,000", "4,000"]
    (bars,) = right.containers
    assert bars[0].get_ydata().tolist() == [c.own.percent for c in steps]
    for container, source in zip(left.containers[1:], SOURCES, strict=True):
        wanted = [c.sources[source].percent for c in steps]
        assert container[0].get_ydata().tolist() == wanted
    assert [c["step"] for c in drawing.data["checkpoints"]] == [0, 1000, 4000]
    assert "step 4,000: CK" in drawing.description


def test_the_gallery_draws_it_of_steps_only(runs: list[RunResults], tmp_path: Path) -> None:
    def titles(some: list[RunResults]) -> list[str]:
        return [entry.title for entry in figures_across(some)]

    assert "Through training" in titles(runs)
    assert "Through training" not in titles(runs[:1])
    other = run_of(tmp_path / "other", "m/final", seed=9)
    assert "Through training" not in titles([*runs, other])
    twice = run_of(tmp_path / "twice", "n/step1000", seed=10)
    assert "Through training" not in titles([*runs, twice])
    mean = run_of(tmp_path / "mean", "m/step9", seed=11, values=("mean_ablation",))
    found = checkpoints([*runs, mean])
    assert found is not None
    assert found[1] == "mean_ablation"
