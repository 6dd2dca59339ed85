"""Forest plots and entropy by transition: what is drawn, what is said, and that it can be read."""

import copy
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from ccm.experiment.results import RunResults, read_results
from ccm.method.scores import ControlSummary
from ccm.method.sources import SOURCES
from ccm.models.specs import MODELS, PUBLISHED
from ccm.paper.values import printed_proportion
from ccm.reporting.breakdowns import EntropyChange, entropy_changes, group_effects
from ccm.reporting.figures import changes, forest, proportions
from ccm.reporting.figures.canvas import FEW, Drawing
from tests.made_runs import make_run
from tests.reporting.test_figures import render, texts

VALUES = (
    "mean_ablation",
    "median_ablation",
    "mode_ablation",
    "mean_minus_sigma_ablation",
    "mean_plus_sigma_ablation",
)
Ablations = Mapping[str, Mapping[str, Any]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunResults:
    """A run of all ablation values; read-only."""
    path = tmp_path_factory.mktemp("forest") / "run"
    make_run(path, values=VALUES, prompts=240, matched=0)
    return read_results(path)


def ablations_of(run: RunResults) -> Ablations:
    return dict(run.scores["ablations"])


def matched(ablations: Ablations) -> dict[str, dict[str, Any]]:
    """The same scores with matched controls: the controls' own, under other ranks."""
    more = {value: dict(copy.deepcopy(scores)) for value, scores in ablations.items()}
    for scores in more.values():
        ranks = {"q_value": 12.5, "permutation_p": 0.4321}
        scores["matched_controls"] = copy.deepcopy(scores["controls"]) | ranks
    return more


def marks(drawing: Drawing, panel: int, marker: str) -> list[float]:
    """Where a panel has a mark, along its numbers."""
    lines = drawing.figure.axes[panel].lines
    return [float(line.get_xdata()[0]) for line in lines if line.get_marker() == marker]


def overlapping(figure: Figure) -> list[str]:
    """Pairs of texts that lie over each other, among those beside rows and at the axes."""
    found = [t for t in figure.findobj(mpl.text.Text) if t.get_visible() and t.get_text().strip()]
    low, high = figure.bbox.y0, figure.bbox.y1
    boxes = [(t.get_text(), t.get_window_extent()) for t in found]
    boxes = [(text, box) for text, box in boxes if low <= box.y0 and box.y1 <= high]
    return [
        f"{a!r} over {b!r}"
        for (a, one), (b, two) in itertools.combinations(boxes, 2)
        if min(one.x1, two.x1) - max(one.x0, two.x0) > 1
        and min(one.y1, two.y1) - max(one.y0, two.y0) > 1
    ]


# --- across runs ------------------------------------------------------------------------------------


def test_a_row_has_the_scores_and_writes_them(run: RunResults) -> None:
    drawing = forest.across_runs([("made", "Made", ablations_of(run))])
    said = texts(drawing.figure)
    for row, value in zip(drawing.data["rows"], VALUES, strict=True):
        scores = run.scores["ablations"][value]
        assert (row["model"], row["ablation_value"]) == ("made", value)
        for key, own, controls in (
            ("cr_ck", scores["entropy"]["conversion_ratios"], scores["controls"]["conversion_ratios"]),
            ("gts", scores["entropy"], scores["controls"]),
        ):
            name = "CK" if key == "cr_ck" else "gts"
            assert row[key]["own"] == own[name]
            assert row[key]["controls"] == controls[name]
            assert row[key]["matched"] is row[key]["printed"] is None
            own = own[name]
            words = f"{own['percent']:.1f} % ({own['count']}/{own['total']}; "
            assert f"{words}{own['low']:.1f}–{own['high']:.1f})" in said
        assert (
            f"Q {scores['entropy']['q_value']:.1f}; p {scores['entropy']['permutation_p']:.4f}" in said
        )
    for panel, key in enumerate(("cr_ck", "gts")):
        rows = [row[key] for row in drawing.data["rows"]]
        assert marks(drawing, panel, "o") == [row["own"]["percent"] for row in rows]
        assert marks(drawing, panel, "D") == [row["controls"]["mean"] for row in rows]
        assert not marks(drawing, panel, "s")
    assert "matched" not in said
    assert "paper" not in said


def test_matched_controls_stand_beside_the_controls(run: RunResults) -> None:
    drawing = forest.across_runs([("made", "Made", matched(ablations_of(run)))])
    assert len(marks(drawing, 0, "s")) == len(marks(drawing, 1, "s")) == len(VALUES)
    said = texts(drawing.figure)
    assert "| 12.5; p" in said
    assert "| 0.4321" in said
    assert "matched controls: mean, full range" in said


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_papers_values_are_marked_and_its_artefacts_differently(
    model: str, run: RunResults
) -> None:
    drawing = forest.across_runs([(model, MODELS[model].display_name, ablations_of(run))])
    for panel, quantity, key in ((0, "CR(CK)", "cr_ck"), (1, "GTS", "gts")):
        paper = [p for v in VALUES if (p := printed_proportion(model, v, quantity)) is not None]
        results = [p.value for p in paper if p.defect is None]
        # The ring has the dot's marker; the dots come first in each row.
        own = [row[key]["own"]["percent"] for row in drawing.data["rows"]]
        assert sorted(marks(drawing, panel, "o")) == sorted(own + results)
        assert marks(drawing, panel, "x") == [p.value for p in paper if p.defect is not None]
    crosses = [r["ablation_value"] for r in drawing.data["rows"] if r["gts"]["printed"]["defect"]]
    wanted = [*(["mode_ablation"] if model == "gpt2-small" else []), *VALUES[-2:]]
    assert crosses == wanted
    said = texts(drawing.figure)
    assert ("defects 3 and 4 of the list" in said) == (model == "gpt2-small")
    assert ("defect 3 of the list" in said) == (model != "gpt2-small")


@pytest.mark.parametrize(("models", "values"), [(1, 1), (1, 5), (2, 1), (5, 5)])
def test_one_row_to_twenty_five_can_be_read(models: int, values: int, run: RunResults) -> None:
    ablations = {v: s for v, s in matched(ablations_of(run)).items() if v in VALUES[:values]}
    runs = [(name, MODELS[name].display_name, ablations) for name in PUBLISHED[:models]]
    drawing = forest.across_runs(runs)
    render(drawing)
    assert not overlapping(drawing.figure)
    assert len(drawing.data["rows"]) == models * values
    assert drawing.figure.get_size_inches()[1] < 11.7, "higher than a page"
    names = [MODELS[name].display_name for name in PUBLISHED[:models]]
    assert all(name in texts(drawing.figure) for name in names)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"controls": 0}, []),
        ({"controls": 1}, ["quantile"]),
        ({"k": 1}, []),
        ({"moved": 0.0}, ["0.0 % (0/60; 0.0–6.0)"]),
        ({"moved": 1.0}, ["100.0 % (60/60; 94.0–100.0)"]),
        ({"before": ("CK",), "moved": 0.0}, ["every prompt was CK before ablation"]),
        ({"before": ("ND", "PK")}, []),
        ({"relations": (("größe", "Ω-группа_模型$x$"),)}, ["no prompt of this group"]),
    ],
)
def test_edge_cases_are_drawn_and_said(
    options: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    make_run(tmp_path, **options)
    run = read_results(tmp_path)
    value = VALUES[0]
    across = forest.across_runs([(run.model, "Ünïcode_模$", ablations_of(run))])
    groups = forest.relation_groups(lambda: group_effects(run, value), "Ünïcode_模$", value)
    entropy = changes.entropy_by_transition(lambda: entropy_changes(run, value), "Ünïcode_模$", value)
    for drawing in (across, groups, entropy):
        render(drawing)
        assert not overlapping(drawing.figure)
        assert "模" not in texts(drawing.figure), "a letter that the font does not have"
    said = texts(across.figure) + texts(groups.figure)
    assert all(w in said for w in words)
    assert ("no controls" in said) == (options.get("controls") == 0)


def test_the_papers_value_stands_where_ours_has_no_denominator(tmp_path: Path) -> None:
    make_run(tmp_path, before=("CK",), moved=0.0)
    drawing = forest.across_runs([("gpt2-small", "GPT2", ablations_of(read_results(tmp_path)))])
    paper = printed_proportion("gpt2-small", VALUES[0], "CR(CK)")
    assert paper is not None
    assert marks(drawing, 0, "o") == [paper.value]


# --- by relation group ------------------------------------------------------------------------------


def test_groups_are_drawn_with_their_numbers(run: RunResults) -> None:
    effects = group_effects(run, VALUES[0])
    drawing = forest.relation_groups(lambda: effects, "Made", VALUES[0])
    said = texts(drawing.figure)
    for row, effect in zip(drawing.data["rows"], effects, strict=True):
        assert (row["group"], row["prompts"]) == (effect.name, effect.prompts)
        assert row["gts"]["own"] == vars(effect.gts)
        assert row["cr_ck"]["controls"] == vars(effect.cr_ck_controls)
        assert f"{effect.name} (n = {effect.prompts})" in said
    kept = [effect for effect in effects if effect.prompts]
    assert marks(drawing, 0, "o") == [effect.cr_ck.percent for effect in kept]
    assert marks(drawing, 1, "D") == [effect.gts_controls.mean for effect in kept]
    assert said.count("no prompt of this group") == 2, "the empty group, in both panels"


def test_no_group_at_all_is_said() -> None:
    drawing = forest.relation_groups(lambda: [], "Made", VALUES[0])
    render(drawing)
    assert "There is no prompt" in texts(drawing.figure)


# --- the paper's conversion ratios ------------------------------------------------------------------


def test_the_printed_nd_ratio_is_a_cross(run: RunResults) -> None:
    scores = run.scores["ablations"]
    drawing = proportions.conversion_ratios(scores[VALUES[0]], "Phi-1.5", VALUES[0], "Phi-1_5")
    paper = {k: printed_proportion("Phi-1_5", VALUES[0], f"CR({k})") for k in SOURCES}
    lines = drawing.figure.axes[0].lines
    found = {m: [float(x.get_ydata()[0]) for x in lines if x.get_marker() == m] for m in ("x", "o")}
    assert found == {"x": [paper["ND"].value], "o": [paper["CK"].value, paper["PK"].value]}  # type: ignore[union-attr]
    assert "defect 1 of the list" in texts(drawing.figure)
    other = proportions.conversion_ratios(scores[VALUES[1]], "Phi-1.5", VALUES[1], "Phi-1_5")
    assert "paper" not in texts(other.figure), "printed for mean ablation only"


# --- entropy by transition --------------------------------------------------------------------------


def test_transitions_are_drawn_with_their_numbers(run: RunResults) -> None:
    found = entropy_changes(run, VALUES[0])
    drawing = changes.entropy_by_transition(lambda: found, "Made", VALUES[0])
    said = texts(drawing.figure)
    boxes = 0
    for drawn, change in zip(drawing.data["transitions"], found, strict=True):
        assert np.array_equal(drawn["values"], change.values)
        assert drawn["controls"] == vars(change.controls)
        assert f"{change.before} → {change.after} n = {len(change.values)}" in said
        if len(change.values) >= FEW:
            boxes += 1
            assert drawn["box"]["med"] == np.median(change.values)
        else:
            assert drawn["box"] is None
    assert 0 < boxes < 9, "boxes or dots were not drawn at all"
    axes = drawing.figure.axes[0]
    means = [float(x.get_ydata()[0]) for x in axes.lines if x.get_marker() == "o"]
    assert means == [change.mean for change in found if len(change.values)]
    points = sum(len(c.get_offsets()) for c in axes.collections if len(c.get_offsets()) > 1)
    assert points >= sum(len(c.values) for c in found if 1 < len(c.values) < FEW)


def test_transitions_that_nobody_makes_say_so(tmp_path: Path) -> None:
    make_run(tmp_path, moved=0.0, controls=0)
    run = read_results(tmp_path)
    drawing = changes.entropy_by_transition(lambda: entropy_changes(run, VALUES[0]), "Made", VALUES[0])
    said = texts(drawing.figure)
    assert said.count("no prompt") == 6
    assert "No control sets were run" in said


def test_entropies_that_are_not_finite_or_all_alike() -> None:
    none = ControlSummary(None, None, None, None, None)
    values = [np.full(30, np.nan), np.zeros(30), np.full(3, np.inf), np.zeros(0)]
    found = [EntropyChange("CK", "ND", v, none, 0) for v in values]
    drawing = changes.entropy_by_transition(lambda: found, "Made", VALUES[0])
    render(drawing)
    assert texts(drawing.figure).count("no finite value") == 2
    assert [t["finite"] for t in drawing.data["transitions"]] == [0, 30, 0, 0]


def test_many_prompts_are_pixels_in_a_small_pdf(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=200_000)
    none = ControlSummary(None, None, None, None, None)
    found = [EntropyChange(k, k2, values, none, 0) for k in SOURCES for k2 in SOURCES]
    drawing = changes.entropy_by_transition(lambda: found, "Made", VALUES[0])
    drawing.figure.savefig(tmp_path / "many.pdf")
    assert (tmp_path / "many.pdf").stat().st_size < 500_000
