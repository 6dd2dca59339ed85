"""Every number that a figure draws, writes or keeps beside it is what the run's cells hold."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from safetensors.numpy import load_file
from scipy import stats

from ccm.experiment.files import to_json
from ccm.experiment.results import read_results
from ccm.method.ablation_values import ABLATION_VALUES
from ccm.reporting.figures import canvas, gallery, layers
from ccm.reporting.figures.canvas import Drawing, style
from ccm.reporting.figures.gallery import figures_across, figures_of_run
from tests.counted import SOURCES, Counted, Others, Part, changed, conversion, others, part, rank
from tests.distinct_run import CONTROLS, MATCHED, RELATIONS, distinct_runs
from tests.shown import LABELS

# Typed in again, so that a colour cannot come to mean something else without a test that says so.
COLOURS = {"CK": "#0072b2", "ND": "#009e73", "PK": "#e69f00"}
RED, GREY, BLUE = "#c8102e", "#8a8a8a", "#56b4e9"
# The paper's GPT2-small (Table 6 and Figure 4b), percent: value, and the defect that made it.
PRINTED = {
    ("mean_ablation", "GTS"): (0.3, None),
    ("mode_ablation", "GTS"): (93.8, 4),
}
IN_BRACKETS = "In brackets: count/denominator; exact 95 % interval in percent."
each_value = pytest.mark.parametrize("value", ["mean_ablation", "mode_ablation"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Counted]:
    return [Counted(path) for path in distinct_runs(tmp_path_factory)]


@pytest.fixture(scope="module")
def run(runs: list[Counted]) -> Counted:
    return runs[0]


@pytest.fixture(scope="module")
def drawn(runs: list[Counted]) -> dict[str, Drawing]:
    """Figures of the first run, and those across both, by the end of their names; read-only."""
    results = [read_results(run.path) for run in runs]
    entries = [*figures_of_run(results[0]), *figures_across(results)]
    return {e.stem.split("/")[-1].removeprefix("gpt2-small_"): e.draw() for e in entries}


# --- what is on a panel -------------------------------------------------------------------------------


def near(value: Any) -> Any:
    """Equal but for the last digits, all the way down; NaN and None are the same to JSON."""
    if isinstance(value, dict):
        return {key: near(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)) and not all(isinstance(v, float) for v in value):
        return [near(v) for v in value]
    if isinstance(value, (float, list, tuple, np.ndarray)):
        return pytest.approx(value, rel=1e-9, abs=1e-9)
    return value


def texts(where: Figure | Axes) -> list[str]:
    found = [t.get_text() for t in where.findobj(mpl.text.Text) if t.get_text().strip()]
    return [" ".join(text.split()) for text in found]


def said(where: Figure | Axes) -> str:
    return " ".join(texts(where))


def text_at(axes: Axes, x: float) -> list[str]:
    """Texts written at a place along the axis, from the bottom."""
    found = [t for t in axes.texts if t.get_position()[0] == pytest.approx(x)]
    return [t.get_text() for t in sorted(found, key=lambda t: t.get_position()[1])]


@dataclass
class Bar:
    """One bar, with the ends of its error bar."""

    label: str
    x: float
    height: float
    colour: str
    ends: tuple[float, float] | None


def bars(axes: Axes) -> list[Bar]:
    found = []
    for container in axes.containers:
        if not isinstance(container, BarContainer):
            continue
        (patch,), ends = container.patches, None
        if container.errorbar is not None:
            ((_, low), (_, high)) = container.errorbar.lines[2][0].get_segments()[0]
            ends = (float(low), float(high))
        found.append(
            Bar(
                str(container.get_label()),
                patch.get_x() + patch.get_width() / 2,
                patch.get_height(),
                to_hex(patch.get_facecolor()),
                ends,
            )
        )
    return found


def dots(axes: Axes) -> list[np.ndarray]:
    """Places of every group of dots."""
    return [
        np.asarray(c.get_offsets())
        for c in axes.collections
        if isinstance(c, PathCollection) and len(c.get_offsets())
    ]


def colour_of(group: Any) -> str:
    return to_hex(group.get_facecolor()[0])


def marks(axes: Axes, marker: str) -> list[tuple[float, float, str]]:
    """Single marks: x, y, colour."""
    return [
        (float(line.get_xdata()[0]), float(line.get_ydata()[0]), to_hex(line.get_color()))
        for line in axes.lines
        if line.get_marker() == marker and len(line.get_xdata()) == 1
    ]


def segments(axes: Axes) -> list[tuple[tuple[float, float, float, float], str]]:
    """Lines that `hlines` and `vlines` made: x, y at both ends, and the colour."""
    return [
        ((*map(float, segment[0]), *map(float, segment[1])), to_hex(c.get_color()[0]))
        for c in axes.collections
        if isinstance(c, LineCollection)
        for segment in c.get_segments()
    ]


def legend(figure: Figure, which: int = 0) -> list[tuple[str, str]]:
    """Entries of a legend: words, and the colour of its mark."""
    box = figure.legends[which]
    found = []
    for handle, text in zip(box.legend_handles, box.get_texts(), strict=True):
        is_line = isinstance(handle, Line2D)
        colour = handle.get_color() if is_line else handle.get_facecolor()  # type: ignore[union-attr]
        colour = colour[0] if np.ndim(colour) == 2 else colour
        found.append((text.get_text(), "" if str(colour) == "none" else to_hex(colour)))
    return found


def ticks(axes: Axes, axis: str = "x") -> list[str]:
    return [t.get_text() for t in getattr(axes, f"get_{axis}ticklabels")()]


def as_data(r: Part) -> dict[str, Any]:
    return near(dict(vars(r)))


def summary(c: Others) -> dict[str, Any]:
    names = ("mean", "three_standard_errors", "low", "high", "entropy_quantile")
    return near(dict(zip(names, vars(c).values(), strict=True)))


def words(r: Part) -> str:
    return f"{r.percent:.1f} % ({r.count}/{r.total}; {r.low:.1f}-{r.high:.1f})"


def percents(run: Counted, value: str, score: Any, kind: str = "control") -> list[float]:
    return [score(counts).percent for counts in run.of_sets(value, kind)]


# --- shares -------------------------------------------------------------------------------------------


def assert_bars(drawing: Drawing, named: dict[str, tuple[Part, Others, list[float], str]]) -> None:
    """Bars in pairs: label, entropy set, controls, each control, source of the colour."""
    (axes,) = drawing.figure.axes
    assert ticks(axes) == [*named]
    found = bars(axes)
    assert len(found) == 2 * len(named)
    swarms = dots(axes)
    for x, (label, (own, rest, each, source)) in enumerate(named.items()):
        of_set, of_controls = found[2 * x : 2 * x + 2]
        assert (of_set.label, of_controls.label) == (f"entropy set, {label}", f"controls, {label}")
        assert x - 0.5 < of_set.x < x < of_controls.x < x + 0.5
        assert of_set.colour == COLOURS[source]
        assert of_controls.colour == "#d9d9d9"
        assert of_set.height == own.percent
        assert of_set.ends == near((own.low, own.high))
        assert rest.mean is not None
        assert rest.error is not None
        assert of_controls.height == near(rest.mean)
        assert of_controls.ends == near((rest.mean - rest.error, rest.mean + rest.error))
        assert text_at(axes, of_set.x) == [f"{own.percent:.1f} %\n{own.count}/{own.total}"]
        assert text_at(axes, of_controls.x) == [f"{rest.mean:.1f} %"]
        assert swarms[x][:, 1] == near(each)
        assert np.abs(swarms[x][:, 0] - of_controls.x).max() < 0.2
        bar = drawing.data["bars"][x]
        assert (bar["label"], bar["colour_of"]) == (label, source)
        assert (bar["own"], bar["summary"]) == (as_data(own), summary(rest))
        assert [*bar["controls"]] == near(each)
    told = "; ".join(
        f"{label}: {words(own)}, controls {rest.mean:.1f} % on average"
        for label, (own, rest, *_) in named.items()
    )
    assert drawing.description == f"{told}. {IN_BRACKETS}"
    assert f"Grey: mean ± 3 standard errors of {CONTROLS} control sets" in said(drawing.figure)


@each_value
def test_conversion_ratios(value: str, run: Counted, drawn: dict[str, Drawing]) -> None:
    drawing = drawn[f"{value}-conversion_ratios"]
    named = {
        f"to {k}": (*run.cr(value, k), percents(run, value, lambda c, k=k: conversion(c, k)), k)
        for k in SOURCES
    }
    assert_bars(drawing, named)  # type: ignore[arg-type]
    assert f"GPT2-small, {LABELS[value]} ablation" in texts(drawing.figure)
    (axes,) = drawing.figure.axes
    printed = marks(axes, "o") + marks(axes, "x")
    if value != "mean_ablation":
        assert not printed
        return
    # Figure 4b's bars of GPT2-small: ring, cross for ND (defect 1), ring; each left of its own bar.
    kept = [bar["printed"] for bar in drawing.data["bars"]]
    assert [p["defect"] for p in kept] == [None, 1, None]
    assert kept[1]["value"] == kept[2]["value"] != kept[0]["value"]
    places = sorted((x, y) for x, y, _ in printed)
    assert [y for _, y in places] == [p["value"] for p in kept]
    assert all(i - 0.6 < x < i - 0.3 for i, (x, _) in enumerate(places))


@each_value
def test_transitions_to_context(value: str, run: Counted, drawn: dict[str, Drawing]) -> None:
    def score(k: str) -> Any:
        return lambda c: part(c[k, "CK"], sum(c[k, j] for j in SOURCES))

    named = {
        f"{k} → CK": (*run.ts(value, k, "CK"), percents(run, value, score(k)), k) for k in ("ND", "PK")
    }
    assert_bars(drawn[f"{value}-ndck_pkck_conversion_ratios"], named)  # type: ignore[arg-type]


@each_value
def test_the_histogram_of_gts(value: str, run: Counted, drawn: dict[str, Drawing]) -> None:
    drawing = drawn[f"{value}_transition_score"]
    (axes,), data = drawing.figure.axes, drawing.data
    own, rest = run.gts(value)
    each = percents(run, value, changed)
    q, p = run.q(value), run.p(value)
    assert data["entropy"] == as_data(own)
    assert (data["q_value"], data["permutation_p"]) == (near(q), near(p))
    assert data["controls"] == near(each)
    counts, edges = np.histogram(each, 6, (min(each), max(each)))
    assert data["histogram"]["edges"] == near(edges)
    assert [*data["histogram"]["counts"]] == [*counts]
    (container,) = [c for c in axes.containers if isinstance(c, BarContainer)]
    drawn_bars = [(b.get_x(), b.get_width(), b.get_height()) for b in container.patches]
    width = (max(each) - min(each)) / 6
    assert drawn_bars == near(
        [[float(e), width, float(n)] for e, n in zip(edges[:-1], counts, strict=True)]
    )
    (line,) = axes.lines
    assert [*line.get_xdata()] == near([own.percent, own.percent])
    (band,) = [x for x in axes.patches if x not in container.patches]
    assert isinstance(band, Rectangle)
    assert (band.get_x(), band.get_x() + band.get_width()) == near((own.low, own.high))
    share = f"{own.percent:.1f} % ({own.count}/{own.total})"
    assert sorted(legend(drawing.figure)) == [
        (f"{CONTROLS} control sets", "#d9d9d9"),
        (f"entropy set {share}", RED),
    ]
    small = f"Q = {q:.1f} of 100; permutation p = {p:.4f} (at least 1/10 = 0.1000)."
    assert small in said(drawing.figure)
    assert drawing.description == (
        f"Entropy set: {words(own)}. {CONTROLS} control sets: {rest.low:.3g} to {rest.high:.3g} %. "
        f"{small} Band: exact 95 % interval of the entropy set."
    )


def test_class_sizes(runs: list[Counted], drawn: dict[str, Drawing]) -> None:
    drawing = drawn["knowledge_source_sizes"]
    (axes,) = drawing.figure.axes
    assert ticks(axes) == ["GPT2-small", "made"]
    sizes = {r.name: {s: part((r.plain["source"] == s).sum(), r.n) for s in SOURCES} for r in runs}
    assert drawing.data == {
        "models": {n: {s: as_data(p) for s, p in of.items()} for n, of in sizes.items()}
    }
    for j, (source, container) in enumerate(zip(SOURCES, axes.containers, strict=True)):
        for i, (patch, of) in enumerate(zip(container, sizes.values(), strict=True)):
            x = patch.get_x() + patch.get_width() / 2
            assert x == near(i + 0.28 * (j - 1))
            assert patch.get_height() == of[source].count
            assert to_hex(patch.get_facecolor()) == COLOURS[source]
            assert text_at(axes, x) == [f"{of[source].count}\n{of[source].percent:.1f} %"]
    assert [label for label, _ in legend(drawing.figure)] == [
        "contextual knowledge (CK)", "not defined (ND)", "parametric knowledge (PK)",
    ]  # fmt: skip
    assert [colour for _, colour in legend(drawing.figure)] == [*COLOURS.values()]
    assert (
        drawing.description
        == "; ".join(
            f"{name}: " + ", ".join(f"{s} {words(p)}" for s, p in of.items())
            for name, of in sizes.items()
        )
        + f". {IN_BRACKETS}"
    )


# --- forests ------------------------------------------------------------------------------------------

Cell = tuple[Part, Others, Others | None, str, tuple[float, int | None] | None]


def assert_row(axes: Axes, y: float, cell: Cell) -> None:
    """A share's dot and interval, its controls' and matched controls' below, words beside."""
    own, rest, matched, note, printed = cell
    assert rest.mean is not None
    if own.percent is not None:
        assert (own.percent, y - 0.2, RED) in [(near(a), near(b), c) for a, b, c in marks(axes, "o")]
        lines = [x for x in axes.lines if len(x.get_xdata()) == 2 and to_hex(x.get_color()) == RED]
        ends = [(*map(float, x.get_xdata()), *map(float, x.get_ydata())) for x in lines]
        assert near((own.low, own.high, y - 0.2, y - 0.2)) in ends
        beside = [t.get_text() for t in axes.texts if t.get_position() == (near(1.04), near(y - 0.2))]
        assert beside == [
            f"{own.percent:.1f} % ({own.count}/{own.total}; {own.low:.1f}–{own.high:.1f})"
        ]
        assert [
            t.get_text() for t in axes.texts if t.get_position() == (near(1.04), near(y + 0.2))
        ] == [note]
    for summary_, colour, marker, place in ((rest, GREY, "D", 0.08), (matched, BLUE, "s", 0.3)):
        if summary_ is not None:
            assert (near(summary_.mean), near(y + place), colour) in marks(axes, marker)
            line = (summary_.low, y + place, summary_.high, y + place)
            assert (near(line), colour) in segments(axes)
    if printed is not None:
        at = marks(axes, "o" if printed[1] is None else "x")
        assert (near(printed[0]), near(y - 0.2), "#222222") in at


def test_the_forest_across_runs(runs: list[Counted], drawn: dict[str, Drawing]) -> None:
    drawing = drawn["entropy_set_and_controls"]
    rows: list[tuple[Counted, str, Cell, Cell]] = []
    for run in runs:
        for value in run.values:
            cr, gts = run.cr(value, "CK"), run.gts(value)
            cr_matched, gts_matched = run.cr(value, "CK", "matched")[1], run.gts(value, "matched")[1]
            q, p = ([f(value, kind) for kind in ("control", "matched")] for f in (run.q, run.p))
            ratio = drawing.data["rows"][len(rows)]["cr_ck"]["printed"]
            printed = None if ratio is None else (ratio["value"], ratio["defect"])
            assert (printed is None) == ((run.model, value) != ("gpt2-small", "mean_ablation"))
            known = PRINTED.get((value, "GTS")) if run.model == "gpt2-small" else None
            rows.append(
                (
                    run,
                    value,
                    (*cr, cr_matched, f"quantile {cr[1].rank:.1f} | {cr_matched.rank:.1f}", printed),
                    (
                        *gts,
                        gts_matched,
                        f"Q {q[0]:.1f} | {q[1]:.1f}; p {p[0]:.4f} | {p[1]:.4f}",
                        known,
                    ),
                )
            )
    at = [0.8, 1.8, 3.6, 4.6]  # below the names of their models
    assert [*drawing.figure.axes[0].get_yticks()] == near(at)
    assert ticks(drawing.figure.axes[0], "y") == [LABELS[value] for _, value, *_ in rows]
    told = []
    for y, (run, value, cr_cell, gts_cell), found in zip(at, rows, drawing.data["rows"], strict=True):
        assert (found["model"], found["ablation_value"]) == (run.model, value)
        for key, cell, axes in zip(
            ("cr_ck", "gts"), (cr_cell, gts_cell), drawing.figure.axes, strict=True
        ):
            assert_row(axes, y, cell)
            assert (found[key]["own"], found[key]["controls"]) == (as_data(cell[0]), summary(cell[1]))
            assert cell[2] is not None
            assert found[key]["matched"] == summary(cell[2])
            printed = found[key]["printed"]
            assert (printed and (printed["value"], printed["defect"])) == cell[4]
        told.append(
            f"{run.name}, {LABELS[value]}: "
            + "; ".join(
                f"{name} {words(cell[0])}, controls {cell[1].mean:.1f} % on average"
                for name, cell in (("CR(CK)", cr_cell), ("GTS", gts_cell))
            )
        )
    assert drawing.description == ". ".join(told) + f". {IN_BRACKETS}"
    notes = [cell[3] for row in rows for cell in row[2:]]
    assert len(set(notes)) == len(notes), "rows that cannot be told apart"
    names = [
        (t.get_text(), t.get_position()[1])
        for t in drawing.figure.axes[0].texts
        if t.get_position()[0] == 0
    ]
    assert names == [("GPT2-small", near(0.1)), ("made", near(2.9))]
    assert legend(drawing.figure) == [
        ("entropy set, exact 95 % interval", RED),
        ("controls: mean, full range", GREY),
        ("matched controls: mean, full range", BLUE),
        ("paper", "#222222"),
        ("paper, a known artefact", "#222222"),
    ]
    panels = [axes.get_xlabel() for axes in drawing.figure.axes]
    assert ["CR(CK)" in panels[0], "GTS" in panels[1]] == [True, True]


@each_value
def test_the_forest_by_group(value: str, run: Counted, drawn: dict[str, Drawing]) -> None:
    drawing = drawn[f"{value}_relation_groups"]
    groups = run.parts("relation_group_id")
    assert [name for name, *_ in groups] == ["places", "music", "voices", "copies", "hierarchy"]
    assert ticks(drawing.figure.axes[0], "y") == [f"{name}\n(n = {of.sum()})" for name, _, of in groups]
    told = []
    for y, (name, _, of) in enumerate(groups):
        found, parts = drawing.data["rows"][y], []
        assert (found["group"], found["prompts"]) == (name, of.sum())
        for key, word, (own, rest), axes in (
            ("cr_ck", "CR(CK)", run.cr(value, "CK", of=of), drawing.figure.axes[0]),
            ("gts", "GTS", run.gts(value, of=of), drawing.figure.axes[1]),
        ):
            assert (found[key]["own"], found[key]["controls"]) == (as_data(own), summary(rest))
            if rest.mean is not None:
                assert_row(axes, y, (own, rest, None, f"controls' mean {rest.mean:.1f} %", None))
            empty = "every prompt was CK before ablation" if of.any() else "no prompt of this group"
            beside = "" if rest.mean is None else f", controls {rest.mean:.1f} % on average"
            parts.append(f"{word} {empty if own.percent is None else words(own)}{beside}")
        told.append(f"{name}, (n = {of.sum()}): {'; '.join(parts)}")
    assert drawing.description == ". ".join(told) + f". {IN_BRACKETS}"
    assert (
        len({of.sum() for *_, of in groups})
        == len(groups)
        == len({g for g, _ in RELATIONS.values()}) + 1
    )


# --- log-ratios ---------------------------------------------------------------------------------------


def kernels(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """A density by Silverman's rule, value by value."""
    iqr = np.subtract(*np.percentile(values, [75, 25])) / 1.34
    h = 0.9 * min(values.std(ddof=1), iqr) * len(values) ** -0.2
    return np.asarray(stats.norm.pdf(grid[:, None], values, h).mean(1))


def assert_classes(
    axes: Axes, found: dict[str, Any], values: np.ndarray, source: pd.Series, grid: np.ndarray
) -> None:
    lines = {
        str(line.get_label()): line for line in axes.lines if not str(line.get_label()).startswith("_")
    }
    assert [*lines] == [f"{s} (n = {(source == s).sum()})" for s in SOURCES]
    assert len({line.get_linestyle() for line in lines.values()}) == 3
    for s, line in zip(SOURCES, lines.values(), strict=True):
        mine = values[source == s]
        of = found[s]
        assert (of["n"], of["finite"]) == (len(mine), len(mine))
        assert of["mean"] == near(float(mine.mean()))
        np.testing.assert_array_equal(of["values"], mine)
        np.testing.assert_array_equal(line.get_xdata(), grid)
        np.testing.assert_array_equal(line.get_ydata(), of["density"])
        assert to_hex(line.get_color()) == COLOURS[s]
        wanted = kernels(mine, grid)
        np.testing.assert_allclose(of["density"], wanted, atol=0.01 * wanted.max())


def class_means(source: pd.Series, *values: np.ndarray) -> str:
    return (
        "; ".join(
            f"{s} (n = {(source == s).sum()}) "
            + " and ".join(f"{v[source == s].mean():.2f}" for v in values)
            for s in SOURCES
        )
        + "."
    )


@each_value
@pytest.mark.parametrize("ratio", ["CK/PK", "ND/CK", "ND/PK"])
def test_a_log_ratio(value: str, ratio: str, run: Counted, drawn: dict[str, Drawing]) -> None:
    over, under = ratio.split("/")
    drawing = drawn[f"{value}_ablation_log_{over.lower()}_{under.lower()}"]
    assert drawing.data["ratio"] == ratio
    source = run.plain["source"]
    before, after = (run.log_ratios(c)[ratio] for c in (run.plain, run.cells[value]["entropy"]))
    for axes, when, values in zip(
        drawing.figure.axes, ("before", "after"), (before, after), strict=True
    ):
        assert axes.get_title(loc="left") == f"{when} ablation"
        assert_classes(axes, drawing.data[when], values, source, drawing.data["grid"])
    label = drawing.figure.axes[1].get_xlabel()
    assert f"below 0: {under} is likelier; above 0: {over}" in label
    assert label.index(f"P_{{{over}}}") < label.index(f"P_{{{under}}}")
    means = class_means(source, before, after)
    assert drawing.description == f"Mean of log {ratio} in nats, before and after: {means}"
    assert [entry for entry, _ in legend(drawing.figure)] == [
        f"{s} (n = {(source == s).sum()})" for s in SOURCES
    ]
    assert [colour for _, colour in legend(drawing.figure)] == [*COLOURS.values()]


@each_value
def test_changes_of_log_ratios(value: str, run: Counted, drawn: dict[str, Drawing]) -> None:
    drawing = drawn[f"{value}_ablation_empirical_noises"]
    before, after = (run.log_ratios(c) for c in (run.plain, run.cells[value]["entropy"]))
    source, told = run.plain["source"], []
    for axes, ratio in zip(drawing.figure.axes, ("CK/PK", "ND/CK", "ND/PK"), strict=True):
        change = before[ratio] - after[ratio]
        data = drawing.data[ratio]
        assert_classes(axes, data, change, source, data["grid"])
        over, under = ratio.split("/")
        assert axes.get_xlabel().index(f"P_{{{over}}}") < axes.get_xlabel().index(f"P_{{{under}}}")
        told.append(f"log {ratio} {class_means(source, change)}")
    assert drawing.description == "Mean change in nats: " + " ".join(told)


# --- entropy ------------------------------------------------------------------------------------------


@each_value
def test_entropy_by_transition(value: str, run: Counted, drawn: dict[str, Drawing]) -> None:
    drawing = drawn[f"{value}_entropy_by_transition"]
    (axes,) = drawing.figure.axes
    labels, told, boxes = ticks(axes), [], 0
    pairs = [(k, j) for k in SOURCES for j in SOURCES]
    for x, ((k, j), found) in enumerate(zip(pairs, drawing.data["transitions"], strict=True)):
        change = run.entropy_change(value, k, j)
        own, means = run.entropy_means(value, k, j)
        controls = others(own, [*means])
        assert labels[x] == f"{k} → {j}\nn = {len(change)}"
        assert (found["before"], found["after"]) == (k, j)
        assert (found["n"], found["finite"], found["control_sets"]) == (
            len(change),
            len(change),
            len(means),
        )
        assert found["mean"] == near(own)
        np.testing.assert_array_equal(found["values"], change)
        assert found["controls"] == summary(controls)
        assert (near(x + 0.2), near(own), RED) in marks(axes, "o")
        assert (near(x + 0.34), near(controls.mean), GREY) in marks(axes, "D")
        assert (near((x + 0.34, controls.low, x + 0.34, controls.high)), GREY) in segments(axes)
        points = [d for d in dots(axes) if abs(d[:, 0] - (x - 0.08)).max() < 0.2]
        of_points = [
            colour_of(c)
            for c in axes.collections
            if isinstance(c, PathCollection) and len(c.get_offsets())
        ][sum(bool(len(d)) and d[0, 0] < x - 0.5 for d in dots(axes))]
        assert of_points == COLOURS[k]
        if len(change) < 20:
            assert found["box"] is None
            assert sorted(points[0][:, 1]) == near(sorted(change))
        else:
            boxes += 1
            low, *middle, high = np.percentile(change, [5, 25, 50, 75, 95])
            box = found["box"]
            assert [box["q1"], box["med"], box["q3"]] == near(middle)
            # A whisker ends at the last prompt inside its percentile.
            assert box["whislo"] == change[change >= low].min()
            assert box["whishi"] == change[change <= high].max()
            outside = change[(change < low) | (change > high)]
            assert sorted(points[0][:, 1]) == near(sorted(outside))
            (patch,) = [
                p for p in axes.patches if np.mean(p.get_path().vertices[:4, 0]) == near(x - 0.08)
            ]
            assert to_hex(patch.get_facecolor()) == COLOURS[k]
            medians = [
                float(line.get_ydata()[0])
                for line in axes.lines
                if len(line.get_xdata()) == 2
                and np.mean(line.get_xdata()) == near(x - 0.08)
                and to_hex(line.get_color()) == "#222222"
            ]
            assert medians == near([middle[1]])
        told.append(
            f"{k} to {j}: {own:.3f} nats on average of {len(change)}, controls {controls.mean:.3f}"
        )
    assert boxes > 2
    assert drawing.description == "; ".join(told) + "."
    assert [entry for entry, _ in legend(drawing.figure)] == [
        "prompts: quartiles, 5 to 95 %", "entropy set's mean", "controls' means: mean, full range",
    ]  # fmt: skip


EFFECTS = ("total", "direct", "through_norm", "norm_only")
EFFECT_WORDS = ("total", "direct", "through the norm", "norm only")


@each_value
def test_effects_on_entropy(value: str, run: Counted, drawn: dict[str, Drawing]) -> None:
    drawing = drawn[f"{value}_effects"]
    (axes,), data = drawing.figure.axes, drawing.data
    table = pd.read_parquet(run.path / value / "effects.parquet")
    sets = pd.read_parquet(run.path / "set_effects.parquet")
    sets = sets[sets["ablation_value"] == value].set_index("set")
    sets["through_norm"] = sets["total"] - sets["direct"]
    own = {n: table["entropy_plain"] - table[f"entropy_{n}"] for n in ("total", "direct", "norm_only")}
    own["through_norm"] = own["total"] - own["direct"]
    assert data["prompts"] == run.n
    assert [label.split("\n")[0] for label in ticks(axes)] == [*EFFECT_WORDS]
    errors = [c for c in axes.containers if isinstance(c, ErrorbarContainer)]
    swarms = iter(dots(axes))
    for x, name in enumerate(EFFECTS):
        mean = float(own[name].mean())
        low, high = stats.ttest_1samp(own[name], 0).confidence_interval(0.95)
        assert data["entropy"][name] == near({"mean": mean, "low": float(low), "high": float(high)})
        point, _, (bar,) = errors[x].lines
        assert (point.get_xdata()[0], point.get_ydata()[0]) == near((float(x), mean))
        assert [float(y) for _, y in bar.get_segments()[0]] == near([float(low), float(high)])
        (note,) = [t for t in axes.texts if t.xy[0] == x]  # type: ignore[attr-defined]
        assert note.get_text() == f"{mean:+.3f}".replace("-", "−")
        for kind, offset in (("control", -0.24), ("matched", 0.24)):
            wanted = sets.loc[run.sets(kind), name]
            assert data["sets"][kind]["set"] == run.sets(kind)
            assert data["sets"][kind][name] == near(wanted.tolist())
            places = next(swarms)
            assert places[:, 1] == near(wanted.tolist())
            assert abs(places[:, 0] - x - offset).max() < 0.11
    total, direct, norm = (
        f"{own[n].mean():+.3f}".replace("-", "−") for n in ("total", "direct", "through_norm")
    )
    assert drawing.description == (
        f"Entropy set: {total} nats in total, {direct} of them directly and {norm} through the norm."
    )
    assert legend(drawing.figure) == [
        (f"entropy set ({run.n} prompts)", RED),
        (f"controls ({CONTROLS})", GREY),
        (f"matched ({MATCHED})", BLUE),
    ]


# --- matched controls ---------------------------------------------------------------------------------


@each_value
def test_matched_controls(value: str, run: Counted, drawn: dict[str, Drawing]) -> None:
    drawing = drawn[f"{value}_matched_controls"]
    left, middle, right = drawing.figure.axes
    kinds = {"controls": "control", "matched_controls": "matched"}
    of_ck = run.cr(value, "CK")[0]
    ranks = {"gts": {}, "conversion_to_ck": {}}  # type: dict[str, dict[str, tuple[float, float]]]
    for kind, name in kinds.items():
        q, p = run.q(value, name), run.p(value, name)
        assert q is not None
        assert p is not None
        ranks["gts"][kind] = (q, p)
        counts = [conversion(c, "CK").count for c in run.of_sets(value, name)]
        quantile = rank(of_ck.count, [*map(float, counts)])
        at_least = sum(n >= of_ck.count for n in counts)
        ranks["conversion_to_ck"][kind] = (quantile, (1 + at_least) / (1 + len(counts)))
    for key, axes, own, score in (
        ("gts", left, run.gts(value)[0], changed),
        ("conversion_to_ck", middle, of_ck, lambda c: conversion(c, "CK")),
    ):
        share = f"{own.percent:.1f} % ({own.count}/{own.total})"
        assert axes.get_title() == f"entropy set {share}"
        (line,) = axes.lines
        assert [*line.get_ydata()] == near([own.percent, own.percent])
        (band,) = axes.patches
        assert (band.get_y(), band.get_y() + band.get_height()) == near((own.low, own.high))
        swarms, lines = dots(axes), segments(axes)
        for x, (kind, name) in enumerate(kinds.items()):
            each = percents(run, value, score, name)
            found, (q, p) = drawing.data[key][kind], ranks[key][kind]
            assert [*found["percent"]] == near(each)
            assert (found["quantile"], found["permutation_p"]) == near((q, p))
            assert swarms[x][:, 1] == near(each)
            assert abs(swarms[x][:, 0] - x).max() < 0.31
            assert lines[x][0] == near(
                (x - 0.36, sum(each) / len(each), x + 0.36, sum(each) / len(each))
            )
            word = ("controls", "matched")[x]
            assert ticks(axes)[x] == f"{word} ({len(each)})\nQ = {q:.1f}\np = {p:.4f}"
        assert [colour_of(c) for c in axes.collections if isinstance(c, PathCollection)] == [GREY, BLUE]
    _assert_plane(run, drawing, right)
    (_, gts_rest), (_, gts_matched) = run.gts(value), run.gts(value, "matched")
    told = [f"Entropy set: GTS {words(run.gts(value)[0])}, CR(CK) {words(of_ck)}"]
    for word, rest, kind in (
        ("controls", gts_rest, "controls"),
        ("matched", gts_matched, "matched_controls"),
    ):
        told.append(
            f"GTS of {word}, mean and greatest: {rest.mean:.2f} % ({rest.high:.2f} %); "
            f"Q {ranks['gts'][kind][0]:.1f}"
        )
    assert drawing.description.startswith("; ".join(told) + ". Mean distance from an entropy neuron")


def _assert_plane(run: Counted, drawing: Drawing, axes: Axes) -> None:
    """Norm against sigma, and how far the matched neurons lie from theirs."""
    norm = run.measures["norm"].to_numpy()
    sigma = load_file(run.path / "activation_stats.safetensors")["std"]
    sets, own = run.manifest["sets"], sorted(run.manifest["sets"]["entropy"])
    matched = sorted({i for name in run.sets("matched") for i in sets[name]} - set(own))
    rest = [i for i in range(len(norm)) if i not in {*own, *matched}]
    data = drawing.data["neurons"]
    assert (data["entropy"], data["matched"]) == (own, matched)
    for places, chosen in zip(dots(axes), (rest, matched, own), strict=True):
        np.testing.assert_allclose(places, np.stack([norm[chosen], sigma[chosen]], 1))
    logs = np.log(np.stack([norm, sigma], 1))
    unlike = [i for i in range(len(norm)) if i not in own]
    logs /= logs[unlike].std(0)
    pairs = [
        abs(logs[i] - logs[j]) for n in run.sets("matched") for i, j in zip(own, sets[n], strict=True)
    ]
    apart = [abs(logs[i] - logs[j]) for i in own for j in unlike]
    (a, b), (c, d) = np.mean(pairs, 0), np.mean(apart, 0)
    assert data["distance_of_matched"] == near([float(a), float(b)])
    assert data["distance_of_others"] == near([float(c), float(d)])
    assert drawing.description.endswith(
        f"to its matched neurons {a:.2f} in log norm and {b:.2f} in log σ; to any other neuron {c:.2f} "
        f"and {d:.2f}."
    )
    assert legend(drawing.figure) == [
        (f"plain controls; other neurons ({len(rest)})", GREY),
        (f"matched controls; their neurons ({len(matched)})", BLUE),
        (f"entropy set; its neurons ({len(own)})", RED),
    ]


# --- neurons ------------------------------------------------------------------------------------------


def extent(values: Sequence[float] | np.ndarray) -> str:
    return f"{min(values):.3g} to {max(values):.3g}"


def test_logitvar_and_rho(run: Counted, drawn: dict[str, Drawing]) -> None:
    drawing = drawn["logitvar_and_rho-nb_neurons_with_low_logitvar=3"]
    axes, top, right = drawing.figure.axes
    table, data = run.measures, drawing.data
    chosen = table["entropy_neuron"].to_numpy()
    assert [*data["neuron_idx"]] == [*table["neuron_idx"]]
    assert (data["not_drawn"], data["min_rho"]) == (0, 0.5)
    assert [*data["entropy_neurons"]] == run.manifest["sets"]["entropy"]
    for name in ("rho", "logitvar"):
        np.testing.assert_array_equal(data[name], table[name])
    others_, own = table[~chosen], table[chosen]
    for places, rows in zip(dots(axes), (others_, own), strict=True):
        np.testing.assert_array_equal(places, rows[["rho", "logitvar"]])
    assert legend(drawing.figure)[:2] == [("other neurons (37)", GREY), ("entropy neurons (3)", RED)]
    assert legend(drawing.figure)[2][0] == "ρ ≥ 0.5"
    assert any([*line.get_xdata()] == [0.5, 0.5] for line in axes.lines)
    assert [float(x.get_xdata()[0]) for x in top.lines if to_hex(x.get_color()) == RED] == [*own["rho"]]
    assert [float(x.get_ydata()[0]) for x in right.lines if to_hex(x.get_color()) == RED] == [
        *own["logitvar"]
    ]
    for key, at, values in (
        ("rho_density", "at", table["rho"].to_numpy()),
        ("logitvar_density", "at_log10", np.log10(table["logitvar"].to_numpy())),
    ):
        wanted = kernels(values, data[key][at])
        np.testing.assert_allclose(data[key]["of"], wanted, atol=0.01 * wanted.max())
    curves = [x for x in (*top.lines, *right.lines) if to_hex(x.get_color()) == GREY]
    np.testing.assert_array_equal(curves[0].get_ydata(), data["rho_density"]["of"])
    np.testing.assert_array_equal(curves[1].get_xdata(), data["logitvar_density"]["of"])
    np.testing.assert_allclose(curves[1].get_ydata(), 10 ** data["logitvar_density"]["at_log10"])
    assert drawing.description == (
        f"Entropy neurons (3): ρ {extent(own['rho'])}, LogitVar {extent(own['logitvar'])}. "
        f"Other neurons (37): ρ {extent(others_['rho'])}, LogitVar {extent(others_['logitvar'])}."
    )


def test_the_spectrum(run: Counted, drawn: dict[str, Drawing]) -> None:
    drawing = drawn["singular_values_and_null_space_nb_dims=2"]
    (axes,), data = drawing.figure.axes, drawing.data
    values = pd.read_parquet(run.path / "singular_values.parquet")["singular_value"].to_numpy()
    np.testing.assert_array_equal(data["singular_values"], values)
    assert (data["null_space_dims"], data["below_axis"]) == (2, 1)
    rest, null, zero = dots(axes)
    np.testing.assert_array_equal(rest, np.stack([np.arange(1, 11), values[:10]], 1))
    np.testing.assert_array_equal(null, [[11, values[10]]])
    assert zero[0, 0] == 12
    assert zero[0, 1] < values[10], "zero has no place on the axis: below all others"
    box = axes.get_legend()
    assert box is not None
    assert [t.get_text() for t in box.get_texts()] == ["the other 10", "null space, the 2 lowest"]
    drawn_ = [c for c in axes.collections if len(c.get_offsets())]
    assert [colour_of(c) for c in drawn_] == ["#333333", RED, RED]
    assert "1 of ≈ 0 (below" in said(axes)
    assert drawing.description == (
        f"12 singular values of {extent(values)}; the 2 lowest, the null space, of "
        f"{extent(values[-2:])}."
    )


def test_weight_norms(run: Counted, drawn: dict[str, Drawing]) -> None:
    drawing = drawn["weight_norm_distro-nb_neurons_with_low_logitvar=3"]
    top, bottom = drawing.figure.axes
    chosen = run.measures["entropy_neuron"]
    groups = {"entropy neurons": (True, RED, 0), "other neurons": (False, GREY, 1)}
    assert [*drawing.data["groups"]] == [*groups]
    for name, (of, colour, y) in groups.items():
        norms = run.measures.loc[chosen == of, "norm"].to_numpy()
        found = drawing.data["groups"][name]
        q1, median, q3 = np.percentile(norms, [25, 50, 75])
        reach = 1.5 * (q3 - q1)
        box = {
            "whislo": norms[norms >= q1 - reach].min(),
            "q1": q1,
            "med": median,
            "q3": q3,
            "whishi": norms[norms <= q3 + reach].max(),
            "mean": norms.mean(),
        }
        assert found["n"] == len(norms)
        assert found["box"] == near({k: float(v) for k, v in box.items()})
        lines = [x for x in bottom.lines if len(x.get_ydata()) == 2 and np.mean(x.get_ydata()) == y]
        medians = [x for x in lines if to_hex(x.get_color()) == "#222222"]
        assert [*medians[0].get_xdata()] == near([float(median)] * 2)
        if of:
            assert found["density"] is None, "three neurons make no density"
            ticks_ = [float(x.get_xdata()[0]) for x in top.lines if to_hex(x.get_color()) == colour]
            assert ticks_ == [*norms]
        else:
            wanted = kernels(norms, drawing.data["grid"])
            np.testing.assert_allclose(found["density"], wanted, atol=0.01 * wanted.max())
    assert ticks(bottom, "y") == ["entropy", "other"]
    (box_,) = drawing.figure.legends
    assert [t.get_text() for t in box_.get_texts()] == ["entropy neurons (3)", "other neurons (37)"]
    with style():
        drawing.figure.get_layout_engine().execute(drawing.figure)  # as when it is saved
    assert not any(box_.get_window_extent().overlaps(axes.get_tightbbox()) for axes in (top, bottom))
    medians_ = [run.measures.loc[chosen == of, "norm"].median() for of in (True, False)]
    assert drawing.description == (
        f"Entropy neurons (3): median norm {medians_[0]:.3g}; "
        f"other neurons (37): median norm {medians_[1]:.3g}."
    )


def test_rho_by_layer(run: Counted, drawn: dict[str, Drawing]) -> None:
    drawing = drawn["rho_by_layer"]
    (axes,), data = drawing.figure.axes, drawing.data
    table = pd.read_parquet(run.path / "rho_by_layer.parquet")
    levels = {
        layer: np.percentile(rows["rho"], [0, 5, 25, 50, 75, 95, 100])
        for layer, rows in table.groupby("layer")
    }
    for row, (layer, found) in zip(data["layers"], levels.items(), strict=True):
        names = [f"percentile_{q}" for q in (0, 5, 25, 50, 75, 95, 100)]
        assert (row["layer"], row["neurons"], row["without_rho"]) == (layer, 40, 0)
        assert [row[name] for name in names] == near([*map(float, found)])
    assert data["random_direction"] == near(math.sqrt(2 / 12))
    whole = [s for s, c in segments(axes) if s[0] == s[2] and c == GREY]
    assert whole == near([[float(i), float(v[0]), float(i), float(v[6])] for i, v in levels.items()])
    medians = [s for s, c in segments(axes) if c == "#222222"]
    assert medians == near([[i - 0.31, float(v[3]), i + 0.31, float(v[3])] for i, v in levels.items()])
    wide, narrow = (c.patches for c in axes.containers if isinstance(c, BarContainer))
    for patches, low, high in ((wide, 1, 5), (narrow, 2, 4)):
        found_ = [
            [p.get_x() + p.get_width() / 2, p.get_y(), p.get_y() + p.get_height()] for p in patches
        ]
        assert found_ == near([[float(i), float(v[low]), float(v[high])] for i, v in levels.items()])
    lines = {str(x.get_linestyle()): float(x.get_ydata()[0]) for x in axes.lines}
    assert lines == {"--": near(math.sqrt(2 / 12)), ":": 0.5}
    own = table[(table["layer"] == 2) & table["neuron_idx"].isin(run.manifest["sets"]["entropy"])]
    assert data["entropy_neurons"] == own[["neuron_idx", "rho"]].to_dict("records")
    (red,) = [c for c in axes.collections if isinstance(c, PathCollection)]
    np.testing.assert_array_equal(np.asarray(red.get_offsets())[:, 1], own["rho"])
    assert abs(np.asarray(red.get_offsets())[:, 0] - 2).max() < 0.3
    assert colour_of(red) == RED
    middles = ", ".join(f"{v[3]:.2f}" for v in levels.values())
    assert drawing.description.startswith(
        f"Median of layers 0 to 2: {middles}; a random direction: 0.41. "
    )
    assert drawing.description.endswith("The entropy neurons: 0.9.")
    assert [entry for entry, _ in legend(drawing.figure)] == [
        "least to greatest", "5th to 95th percentile", "quartiles", "median", "a random direction",
        "ρ ≥ 0.5 to select", "entropy neurons (3)",
    ]  # fmt: skip


MARKS = {
    "mean_ablation": ("o", "#000000"),
    "median_ablation": ("s", "#56b4e9"),
    "mode_ablation": ("D", "#cc79a7"),
    "mean_minus_sigma_ablation": ("<", "#d55e00"),
    "mean_plus_sigma_ablation": (">", "#d55e00"),
}


def test_activation_ranges(runs: list[Counted], drawn: dict[str, Drawing]) -> None:
    drawing = drawn["neuron_activation_distributions"]
    clipped, told = set(), []
    for axes, run in zip(drawing.figure.axes, runs, strict=True):
        stored = load_file(run.path / "activation_stats.safetensors")
        own = sorted(run.manifest["sets"]["entropy"])
        assert axes.get_title(loc="left").startswith(f"{run.name}: ")
        assert ticks(axes, "y") == [*map(str, own)]
        bars_ = [line for line in axes.lines if len(line.get_xdata()) == 2]
        for row, i in enumerate(own):
            of = {k: float(stored[k][i]) for k in ("mean", "std", "median", "mode", "min", "max")}
            low, high = of["mean"] - 3 * of["std"], of["mean"] + 3 * of["std"]
            clipped |= {low < of["min"], high > of["max"]}
            constants = {
                "mean_ablation": of["mean"],
                "median_ablation": of["median"],
                "mode_ablation": of["mode"],
                "mean_minus_sigma_ablation": max(low, of["min"]),
                "mean_plus_sigma_ablation": min(high, of["max"]),
            }
            assert len({*of.values()}) == 6
            assert drawing.data["models"][run.name][row] == near({"neuron": i, **of, **constants})
            for place, (name, (marker, colour)) in enumerate(MARKS.items()):
                at = [m for m in marks(axes, marker) if m[1] == near(row + 0.15 * (place - 2))]
                assert at == [(near(constants[name]), near(row + 0.15 * (place - 2)), colour)]
            thin, thick = ([*line.get_xdata()] for line in bars_ if float(line.get_ydata()[0]) == row)
            assert thin == near([of["min"], of["max"]])
            ends = (max(of["min"], of["mean"] - of["std"]), min(of["max"], of["mean"] + of["std"]))
            assert thick == near([*ends])
        least, mean, most = (extent([stored[k][i] for i in own]) for k in ("min", "mean", "max"))
        told.append(
            f"{run.name}, {len(own)} entropy neurons: least activation {least}, mean {mean}, "
            f"greatest {most}."
        )
    assert drawing.description == " ".join(told)
    assert clipped == {True, False}
    words_ = [entry for entry, _ in legend(drawing.figure)]
    assert words_ == ["min to max", "mean ± standard deviation", *(LABELS[v] for v in MARKS)]
    assert [c for _, c in legend(drawing.figure)][2:] == [colour for _, colour in MARKS.values()]


# --- all of them --------------------------------------------------------------------------------------


def test_no_figure_is_left_out(drawn: dict[str, Drawing]) -> None:
    """Every figure of the gallery has its test in this file."""
    of_value = {
        "-conversion_ratios", "_transition_score", "-ndck_pkck_conversion_ratios",
        "_ablation_log_ck_pk", "_ablation_log_nd_ck", "_ablation_log_nd_pk",
        "_ablation_empirical_noises", "_entropy_by_transition", "_relation_groups",
        "_matched_controls", "_effects",
    }  # fmt: skip
    values = ("mean_ablation", "mode_ablation")
    assert {*drawn} == {value + stem for value in values for stem in of_value} | {
        "logitvar_and_rho-nb_neurons_with_low_logitvar=3", "singular_values_and_null_space_nb_dims=2",
        "weight_norm_distro-nb_neurons_with_low_logitvar=3", "rho_by_layer", "knowledge_source_sizes",
        "entropy_set_and_controls", "neuron_activation_distributions",
    }  # fmt: skip


def test_a_layer_without_rho_has_no_median_in_words() -> None:
    table = pd.DataFrame({"layer": [0, 1, 1], "neuron_idx": [0, 0, 1], "rho": [np.nan, 0.25, 0.75]})
    assert (
        "Median of layers 0 to 1: none, 0.50;" in layers.rho_by_layer(table, [1], "m", 2, 8).description
    )


def test_a_picture_is_told_by_its_own_title_and_words(
    runs: list[Counted], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gallery, "save", lambda drawing, stem: [stem])
    entries = [*figures_across([read_results(runs[0].path)])]
    for entry, found in zip(entries, gallery.draw(entries, tmp_path), strict=True):
        drawing = entry.draw()
        assert found.alt == f"{entry.title}. {drawing.description}"
        assert found.inches == tuple(drawing.figure.get_size_inches())
        assert found.paths == (tmp_path / gallery.FOLDER / entry.stem,)


def test_data_of_all_figures_are_json_and_differ(drawn: dict[str, Drawing]) -> None:
    found = [to_json(drawing.data) for drawing in drawn.values()]
    assert len(set(found)) == len(found), "one figure in another's place"


def test_colours_mean_the_same_everywhere() -> None:
    assert {k: v.lower() for k, v in canvas.COLOURS.items()} == COLOURS
    assert [c.lower() for c in (canvas.RED, canvas.GREY, canvas.MATCHED_COLOUR)] == [RED, GREY, BLUE]
    assert {value.name: value.label for value in ABLATION_VALUES.values()} == LABELS
