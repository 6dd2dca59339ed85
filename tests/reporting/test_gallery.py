"""A figure is one entry beside its drawing: one that is registered here arrives everywhere."""

import base64
import pickle
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from ccm.experiment.files import read_json
from ccm.experiment.results import RunResults, read_results
from ccm.reporting.figures import gallery, registry
from ccm.reporting.figures.canvas import Drawing
from ccm.reporting.figures.gallery import FOLDER, figures_across, figures_of_run, write_figures
from ccm.reporting.figures.registry import FIGURES, Per, register_figure
from ccm.reporting.report import FIGURES as FIGURES_FOLDER
from ccm.reporting.report import HTML, MARKDOWN, write_report
from ccm.reporting.text import number_in_words
from tests.made_runs import make_run

VALUES = ("mean_ablation", "mode_ablation")


def number(n: int) -> Drawing:
    """A figure of one number."""
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([0], [n], "o")
    return Drawing(figure, {"number": n}, f"The number {n}.")


@pytest.fixture
def run(tmp_path: Path) -> RunResults:
    make_run(tmp_path / "run", values=VALUES, prompts=60, controls=2, matched=0)
    return read_results(tmp_path / "run")


@pytest.fixture
def no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figure but those that the test registers."""
    monkeypatch.setattr(registry, "FIGURES", [])


def register(per: Per, stem: str, title: str, reads: Any) -> None:
    register_figure(per=per, stem=stem, title=title, caption=f"How to read {title}.", reads=reads)(
        number
    )


def register_one_of_each_kind() -> None:
    register("all runs", "runs", "Runs", lambda runs: (len(runs),))
    register(
        "ablation value",
        "{name}/{name}_{value}_gts",
        "Changed",
        lambda run, value: (run.scores["ablations"][value]["entropy"]["gts"]["count"],),
    )
    register(
        "run", "{name}/prompts_k={k}_d={null_space_dims}", "Prompts", lambda run: (len(run.plain),)
    )


def test_a_figure_of_each_kind_is_named_drawn_and_written(
    no_figure: None, run: RunResults, tmp_path: Path
) -> None:
    register_one_of_each_kind()
    entries = [*figures_of_run(run), *figures_across([run])]
    assert [(e.stem, e.title, e.caption, e.value) for e in entries] == [
        ("made/prompts_k=3_d=2", "Prompts", "How to read Prompts.", None),
        ("made/made_mean_ablation_gts", "Changed", "How to read Changed.", "mean_ablation"),
        ("made/made_mode_ablation_gts", "Changed", "How to read Changed.", "mode_ablation"),
        ("runs", "Runs", "How to read Runs.", None),
    ]
    counts = [run.scores["ablations"][v]["entropy"]["gts"]["count"] for v in VALUES]
    assert counts[0] != counts[1]
    paths = write_figures([run], tmp_path / "out")
    folder = tmp_path / "out" / FOLDER
    assert paths == [folder / f"{e.stem}.{kind}" for e in entries for kind in ("pdf", "png", "json")]
    numbers = [read_json(path)["number"] for path in paths if path.suffix == ".json"]
    assert numbers == [60, *counts, 1]


def test_it_stands_in_the_report_under_its_heading(
    no_figure: None, run: RunResults, tmp_path: Path
) -> None:
    register_one_of_each_kind()
    write_report([run], tmp_path / "out")
    html, markdown = ((tmp_path / "out" / name).read_text() for name in (HTML, MARKDOWN))
    count = run.scores["ablations"]["mode_ablation"]["entropy"]["gts"]["count"]
    below = markdown.split("### Figures of mode ablation")[1].split("\n### ")[0]
    assert "**Changed.** How to read Changed." in below
    assert f"![Changed. The number {count}.]" in below
    before = markdown.split("### Figures before ablation")[1].split("\n### ")[0]
    assert before.index("Prompts") < before.index("**Runs.**")
    assert "<strong>Prompts.</strong> How to read Prompts." in html
    png = tmp_path / "out" / FIGURES_FOLDER / FOLDER / "made" / "made_mode_ablation_gts.png"
    assert base64.b64encode(png.read_bytes()).decode() in html


def test_a_figure_whose_data_a_run_lacks_is_left_out(no_figure: None, run: RunResults) -> None:
    register("run", "{name}/some", "Some", lambda run: (1,) if len(run.plain) > 60 else None)
    assert [*figures_of_run(run)] == []
    make_run(run.path.parent / "more", prompts=61, controls=0)
    assert [e.stem for e in figures_of_run(read_results(run.path.parent / "more"))] == ["made/some"]


def test_a_figure_from_elsewhere_stands_behind_those_of_the_package(
    monkeypatch: pytest.MonkeyPatch, run: RunResults
) -> None:
    before = [e.stem for e in figures_of_run(run) if e.value is None]
    monkeypatch.setattr(registry, "FIGURES", [])
    register("run", "{name}/mine", "Mine", lambda run: (1,))
    registry.FIGURES.extend(FIGURES)
    assert [e.stem for e in figures_of_run(run) if e.value is None] == [*before, "made/mine"]


def test_the_order_of_imports_does_not_matter(monkeypatch: pytest.MonkeyPatch, run: RunResults) -> None:
    def stems() -> list[str]:
        return [e.stem for e in [*figures_of_run(run), *figures_across([run])]]

    before, modules = stems(), [f.draw.__module__ for f in FIGURES]
    assert set(modules) == {module.__name__ for module in gallery.DRAWN_BY}
    shuffled = [
        f for name in sorted(set(modules), reverse=True) for f in FIGURES if f.draw.__module__ == name
    ]
    monkeypatch.setattr(registry, "FIGURES", shuffled)
    assert stems() == before


def test_another_process_can_draw_every_figure(run: RunResults) -> None:
    for entry in [*figures_of_run(run), *figures_across([run])]:
        again = pickle.loads(pickle.dumps(entry)).draw
        assert (again.func, len(again.args)) == (entry.draw.func, len(entry.draw.args)), entry.stem  # type: ignore[attr-defined]


def test_every_figure_has_the_one_style() -> None:
    for registered in FIGURES:
        assert hasattr(registered.draw, "__wrapped__"), registered.title


def test_numbers_in_words() -> None:
    assert [number_in_words(n) for n in (0, 5, 6, 10, 11)] == ["no", "five", "six", "ten", "11"]
