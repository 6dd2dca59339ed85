"""Forest plots: one proportion per row, with its exact interval and its controls (Method 8).

Across models and ablation values, with what the paper printed; and by relation group.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ccm.method.ablation_values import ABLATION_VALUES
from ccm.method.scores import ControlSummary, Ratio
from ccm.paper.values import Printed, printed_proportion
from ccm.reporting.breakdowns import RelationEffect, group_effects
from ccm.reporting.figures.canvas import (
    DOUBLE,
    GREY,
    MATCHED_COLOUR,
    PRINTED_MARKS,
    RED,
    Drawing,
    ablation_title,
    artefacts_in_words,
    draw_printed,
    drawable,
    explain_empty,
    footnote,
)
from ccm.reporting.figures.registry import register_figure
from ccm.reporting.text import IN_BRACKETS
from ccm.reporting.text import proportion as in_words

TICKS = (0.0, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 80.0, 100.0)  # percent
# Offsets within a row, as parts of its height: entropy set, controls, matched controls.
OWN, CONTROLS, MATCHED_CONTROLS = -0.2, 0.08, 0.3
SQUARE_ROOT = (lambda x: np.sqrt(np.maximum(x, 0.0)), np.square)
PANELS = (
    "conversion ratio to CK, CR(CK)\n(% of prompts that were not CK,\nsquare-root scale)",
    "global transition score, GTS\n(% of prompts,\nsquare-root scale)",
)


@dataclass(frozen=True)
class Estimate:
    """The estimate of a proportion under the entropy set's ablation, and what it is compared with."""

    own: Ratio
    controls: ControlSummary
    empty: str  # what to say if the denominator is 0
    matched: ControlSummary | None = None  # controls that resemble the entropy neurons (Method 13)
    printed: Printed | None = None
    note: str = ""  # small print below the count


@dataclass(frozen=True)
class Row:
    """One row: a proportion for each of `PANELS`."""

    label: str
    estimates: tuple[Estimate, Estimate]
    section: str = ""  # rows of one section stand together under its name


@register_figure(
    per="all runs",
    stem="entropy_set_and_controls",
    title="Entropy set against controls",
    caption=(
        "Conversion to the context and change of source, a row per model and ablation value: the "
        "entropy set with its exact interval, the control sets with their whole range, and the "
        "paper's value where there is one."
    ),
    reads=lambda runs: ([(run.model, run.display_name, run.scores["ablations"]) for run in runs],),
)
def across_runs(runs: Sequence[tuple[str, str, Mapping[str, Mapping[str, Any]]]]) -> Drawing:
    """CR(CK) and GTS of every model and ablation value, beside the paper's value if there is one.

    Args:
        runs: For each model its name, its display name, and the `ablations` of its scores.json. The
            part of an ablation value may hold `matched_controls`: like `controls`, with a `q_value`
            and a `permutation_p`.
    """
    rows, data = list[Row](), list[dict[str, Any]]()
    for name, model, ablations in runs:
        section = drawable(model) if len(runs) > 1 else ""
        for value, scores in ablations.items():
            row = Row(ABLATION_VALUES[value].label, _estimates(name, value, scores), section)
            known = {"model": name, "display_name": model, "ablation_value": value}
            rows.append(row)
            data.append({**known, **_data(row)})
    one = f"{drawable(runs[0][1])}: entropy set and controls" if len(runs) == 1 else ""
    estimates = [estimate for row in rows for estimate in row.estimates]
    small = ["Q, quantile: rank of the entropy set among its controls, 0 to 100; p: permutation test."]
    if any(estimate.matched is not None for estimate in estimates):
        small.append("Behind the bar |: against the matched controls.")
    small.append(artefacts_in_words(estimate.printed for estimate in estimates))
    title = one or "Entropy set and controls, model by model"
    return _forest(rows, title, "ablation value", small, data)


@register_figure(
    per="ablation value",
    stem="{name}/{name}_{value}_relation_groups",
    title="Effect by relation group",
    caption=(
        "Where the effect comes from: conversion to the context and change of source by the group "
        "that the prompt's relation belongs to."
    ),
    reads=lambda run, value: (partial(group_effects, run, value), run.display_name, value),
)
def relation_groups(
    effect_of_each: Callable[[], Sequence[RelationEffect]], model: str, value: str
) -> Drawing:
    """CR(CK) and GTS of each relation group under one ablation value.

    Args:
        effect_of_each: Scores each group, once the figure is drawn.
        model: Display name.
        value: Name of the ablation value.
    """
    rows, data = list[Row](), list[dict[str, Any]]()
    for effect in effect_of_each():
        none = "no prompt of this group"
        all_ck = "every prompt was CK before ablation" if effect.prompts else none
        cr_ck = Estimate(effect.cr_ck, effect.cr_ck_controls, all_ck, note=_mean(effect.cr_ck_controls))
        gts = Estimate(effect.gts, effect.gts_controls, none, note=_mean(effect.gts_controls))
        label = textwrap.fill(drawable(effect.name), 20) + f"\n(n = {effect.prompts:,})"
        rows.append(Row(label, (cr_ck, gts)))
        data.append({"group": effect.name, "prompts": effect.prompts, **_data(rows[-1])})
    title = f"{ablation_title(model, value)}: by relation group"
    return _forest(rows, title, "relation group", ["n: probing prompts of the group."], data)


def _mean(controls: ControlSummary) -> str:
    return "" if controls.mean is None else f"controls' mean {controls.mean:.1f} %"


def _estimates(name: str, value: str, scores: Mapping[str, Any]) -> tuple[Estimate, Estimate]:
    """Read the proportions of a row from one ablation value's part of scores.json."""
    own, controls, matched = scores["entropy"], scores["controls"], scores.get("matched_controls")
    both = [controls] if matched is None else [controls, matched]
    ratios = [ControlSummary(**part["conversion_ratios"]["CK"]) for part in both]
    changes = [ControlSummary(**part["gts"]) for part in both]
    ranked = [own] if matched is None else [own, matched]
    quantiles = _numbers([summary.entropy_quantile for summary in ratios], ".1f")
    q, p = (
        _numbers([part[key] for part in ranked], form)
        for key, form in (("q_value", ".1f"), ("permutation_p", ".4f"))
    )
    cr_ck = Estimate(
        Ratio(**own["conversion_ratios"]["CK"]),
        ratios[0],
        "every prompt was CK before ablation" if own["gts"]["total"] else "no prompt",
        None if matched is None else ratios[1],
        printed_proportion(name, value, "CR(CK)"),
        f"quantile {quantiles}" if quantiles else "",
    )
    gts = Estimate(
        Ratio(**own["gts"]),
        changes[0],
        "no prompt",
        None if matched is None else changes[1],
        printed_proportion(name, value, "GTS"),
        f"Q {q}; p {p}" if q else "",
    )
    return cr_ck, gts


def _numbers(values: Sequence[float | None], form: str) -> str:
    """Write numbers side by side; an empty text if all are missing."""
    if all(value is None for value in values):
        return ""
    return " | ".join("–" if value is None else format(value, form) for value in values)


def _data(row: Row) -> dict[str, Any]:
    return {"cr_ck": asdict(row.estimates[0]), "gts": asdict(row.estimates[1])}


def _forest(
    rows: Sequence[Row],
    title: str,
    of: str,  # what a row is
    small: Sequence[str],
    data: Sequence[Mapping[str, Any]],
) -> Drawing:
    """Draw rows from the top, in one panel for each kind of proportion."""
    lines = max((row.label.count("\n") + 1 for row in rows), default=1)
    at, sections = _places(rows)
    high = max(3.0, len(rows) + 0.8 * len(sections))
    figure = Figure(figsize=(DOUBLE, 1.6 + high * max(0.28, 0.06 + 0.12 * lines)))
    panels = figure.subplots(1, 2, sharey=True)
    panels[0].set_title(title, loc="left", fontsize=9)  # a suptitle would lie under the legend
    for i, axes in enumerate(panels):
        axes.set_xlabel(PANELS[i])
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        if not rows:
            explain_empty(axes, "There is no prompt.")
            continue
        estimates = [row.estimates[i] for row in rows]
        most = _highest(estimates)
        axes.set_xscale("function", functions=SQUARE_ROOT)
        axes.set_xlim(0, 1.08 * most)
        axes.set_xticks(_ticks(most), [f"{tick:g}" for tick in _ticks(most)])
        axes.grid(axis="x")
        for y, estimate in zip(at, estimates, strict=True):
            axes.axhline(y + 0.5, color="#EEEEEE", linewidth=0.6, zorder=0)
            _draw_estimate(axes, y, estimate)
        for y, name in sections.items():
            axes.text(0, y + 0.1, name, transform=axes.get_yaxis_transform(), va="center", fontsize=8)
    if rows:
        panels[0].set_ylabel(of)
        panels[0].set_yticks(at, [row.label for row in rows])
        middle = (max(at) + min([*at, *sections])) / 2
        panels[0].set_ylim(middle + 0.5 * high + 0.1, middle - 0.5 * high - 0.1)
        _legend(figure, [estimate for row in rows for estimate in row.estimates])
    footnote(figure, small, 125)
    return Drawing(figure, {"rows": list(data)}, _in_words(rows))


def _in_words(rows: Sequence[Row]) -> str:
    """Describe every row: the entropy set's proportions and the controls' means."""
    said = []
    for row in rows:
        of = ", ".join(filter(None, [row.section, *row.label.split("\n")]))
        parts = []
        for name, part in zip(("CR(CK)", "GTS"), row.estimates, strict=True):
            own, mean = part.own, part.controls.mean
            beside = "" if mean is None else f", controls {mean:.1f} % on average"
            parts.append(
                f"{name} {part.empty if own.percent is None else in_words(asdict(own))}{beside}"
            )
        said.append(f"{of}: {'; '.join(parts)}")
    return ". ".join(said) + f". {IN_BRACKETS}" if said else "There is no prompt."


def _places(rows: Sequence[Row]) -> tuple[list[float], dict[float, str]]:
    """Return the height of each row, counted from the top, and each section's height and name."""
    at: list[float] = []
    sections: dict[float, str] = {}
    y, last = 0.0, ""
    for row in rows:
        if row.section != last:
            sections[y] = last = row.section
            y += 0.8
        at.append(y)
        y += 1.0
    return at, sections


def _highest(estimates: Sequence[Estimate]) -> float:
    """Return the greatest number that a panel must hold, at least 1 %."""
    found: list[float | None] = [1.0]
    for of in estimates:
        found += [of.own.high, of.controls.high]
        found += [of.matched.high] if of.matched else []
        found += [of.printed.value] if of.printed else []
    return max(high for high in found if high is not None)


def _ticks(most: float) -> list[float]:
    """Choose ticks from 0 up that do not run into each other on a square-root scale."""
    kept: list[float] = []
    for tick in (t for t in TICKS if t <= most):
        if not kept or np.sqrt(tick) - np.sqrt(kept[-1]) >= 0.12 * np.sqrt(most):
            kept.append(tick)
    return kept


def _draw_estimate(axes: Axes, y: float, estimate: Estimate) -> None:
    """Draw one row of one panel, the entropy set above its controls, and write its count beside it."""
    for summary, colour, mark, place in (
        (estimate.controls, GREY, "D", CONTROLS),
        (estimate.matched, MATCHED_COLOUR, "s", MATCHED_CONTROLS),
    ):
        if summary is None or summary.mean is None or summary.low is None or summary.high is None:
            continue
        axes.hlines(y + place, summary.low, summary.high, color=colour, linewidth=1.6, alpha=0.5)
        axes.plot(summary.mean, y + place, mark, color=colour, markersize=3.4, clip_on=False)
    beside: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 6.5}
    if estimate.printed is not None:
        draw_printed(axes, estimate.printed.value, y + OWN, estimate.printed)
    own = estimate.own
    if own.percent is None or own.low is None or own.high is None:
        axes.text(1.04, y, textwrap.fill(estimate.empty, 30), color="#444444", **beside)
        return
    axes.plot([own.low, own.high], [y + OWN] * 2, color=RED, linewidth=1.1, marker="|", markersize=4)
    axes.plot(own.percent, y + OWN, "o", color=RED, markersize=4, clip_on=False)
    words = f"{own.percent:.1f} % ({own.count}/{own.total}; {own.low:.1f}–{own.high:.1f})"
    axes.text(1.04, y - 0.2, words, **beside)
    note = estimate.note if estimate.controls.mean is not None else "no controls"
    axes.text(1.04, y + 0.2, note, color="#555555", **beside)


def _legend(figure: Figure, estimates: Sequence[Estimate]) -> None:
    """Add a legend entry for every kind of mark in the figure."""
    artefacts = [estimate.printed.defect is not None for estimate in estimates if estimate.printed]
    style: dict[str, Any] = {"linewidth": 1.4, "markersize": 4}
    handles = [Line2D([], [], color=RED, marker="o", label="entropy set, exact 95 % interval", **style)]
    if any(estimate.controls.mean is not None for estimate in estimates):
        label = "controls: mean, full range"
        handles.append(Line2D([], [], color=GREY, marker="D", label=label, **style))
    if any(estimate.matched is not None for estimate in estimates):
        label = "matched controls: mean, full range"
        handles.append(Line2D([], [], color=MATCHED_COLOUR, marker="s", label=label, **style))
    for artefact, mark in PRINTED_MARKS.items():
        if artefact in artefacts:
            label = "paper, a known artefact" if artefact else "paper"
            handles.append(Line2D([], [], linestyle="", label=label, **mark))
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
