"""Shares of prompts: conversion ratios, transition scores, GTS against controls, class sizes.

Every bar of a single set carries its count and its exact 95 % interval (Method 8).
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ccm.method.scores import ControlSummary, Ratio, conversion_ratio, ratio, summarise
from ccm.method.sources import SOURCES, Source
from ccm.paper.values import Printed, printed_share
from ccm.reporting.figures.canvas import (
    COLOURS,
    GREY,
    HATCHES,
    RED,
    SINGLE,
    VALUE_LABELS,
    Drawing,
    artefacts_in_words,
    draw_printed,
    folded,
    foot,
    say,
    scattered,
    shown,
    styled,
    titled_legend,
)
from ccm.reporting.text import IN_BRACKETS, extent, share

Scores = Mapping[str, Any]  # one ablation value's part of scores.json
WORDS = {
    "CK": "contextual knowledge (CK)",
    "ND": "not defined (ND)",
    "PK": "parametric knowledge (PK)",
}


@dataclass(frozen=True)
class Bar:
    """One quantity: the entropy set's, and that of every control set."""

    label: str
    colour_of: Source
    own: Ratio
    controls: tuple[float, ...]  # percent, one a control set; empty where `own` has no percent
    summary: ControlSummary
    empty: str  # what to say where there is nothing to divide by
    printed: Printed | None = None


def counts_of(table: Mapping[str, Mapping[str, int]]) -> Int[np.ndarray, "from=3 to=3"]:
    """Turn the from -> to table of scores.json into an array in the order of `SOURCES`."""
    return np.asarray([[table[k][k2] for k2 in SOURCES] for k in SOURCES], dtype=np.int64)


def control_counts(scores: Scores) -> list[Int[np.ndarray, "from=3 to=3"]]:
    """Transition counts of every control set."""
    return [counts_of(entry["transition_counts"]) for entry in scores["controls"]["sets"]]


def _bar(
    label: str,
    colour_of: Source,
    own: Ratio,
    controls: Sequence[Ratio],
    empty: str,
    printed: Printed | None = None,
) -> Bar:
    values = tuple(r.percent for r in controls if r.percent is not None)
    value = float("nan") if own.percent is None else own.percent
    return Bar(label, colour_of, own, values, summarise(value, values), empty, printed)


def _draw_bars(axes: Axes, bars: Sequence[Bar]) -> None:
    """Draw pairs of bars: the entropy set in the source's colour, the mean of the controls in grey."""
    tops = [b.own.high or 0.0 for b in bars] + [max(b.controls, default=0.0) for b in bars]
    tops += [b.printed.value for b in bars if b.printed is not None]
    ceiling = min(125.0, 1.3 * max(1.0, *tops))
    for x, bar in enumerate(bars):
        if bar.own.percent is None or bar.own.low is None or bar.own.high is None:
            words = textwrap.fill(bar.empty, 14)
            axes.text(x, 0.04 * ceiling, words, ha="center", va="bottom", fontsize=6.5)
            continue
        at, width = (x - 0.2, 0.36) if bar.controls else (x, 0.5)
        axes.bar(
            at,
            bar.own.percent,
            width,
            color=COLOURS[bar.colour_of],
            edgecolor="white",
            hatch=HATCHES[bar.colour_of],
            yerr=[[bar.own.percent - bar.own.low], [bar.own.high - bar.own.percent]],
            error_kw={"elinewidth": 0.9, "capsize": 2.5, "ecolor": "#222222"},
            label=f"entropy set, {bar.label}",
        )
        words = f"{bar.own.percent:.1f} %\n{bar.own.count}/{bar.own.total}"
        axes.text(at, bar.own.high + 0.015 * ceiling, words, ha="center", va="bottom", fontsize=6.5)
        if bar.printed is not None:
            draw_printed(axes, at - 0.5 * width - 0.03, bar.printed.value, bar.printed)
        if not bar.controls or bar.summary.mean is None:
            continue
        axes.bar(
            x + 0.2,
            bar.summary.mean,
            0.36,
            color="#D9D9D9",
            edgecolor=GREY,
            yerr=bar.summary.three_standard_errors,
            error_kw={"elinewidth": 0.9, "capsize": 2.5, "ecolor": "#222222"},
            label=f"controls, {bar.label}",
        )
        spread = scattered(len(bar.controls))
        axes.scatter(x + 0.2 + 0.26 * spread, bar.controls, s=2.5, c="#555555", alpha=0.6, linewidths=0)
        axes.text(
            x + 0.2,
            max(*bar.controls, bar.summary.mean + (bar.summary.three_standard_errors or 0.0), 0.0)
            + 0.015 * ceiling,
            f"{bar.summary.mean:.1f} %",
            ha="center",
            va="bottom",
            fontsize=6.5,
            color="#444444",
        )
    axes.set_xticks(range(len(bars)), [b.label for b in bars])
    axes.set_xlim(-0.6, len(bars) - 0.4)
    axes.set_ylim(0, ceiling)


def _legend_lines(n_controls: int) -> list[str]:
    lines = ["Coloured: entropy set, with its count and exact 95 % interval."]
    if n_controls == 0:
        return [*lines, "No control sets were run."]
    if n_controls == 1:
        return [*lines, "Grey: the one control set, so no standard error."]
    return [*lines, f"Grey: mean ± 3 standard errors of {n_controls} control sets; dots: each one."]


def _bars_in_words(bars: Sequence[Bar]) -> str:
    """Say what every bar shows, the mean of its controls beside it."""
    said = []
    for bar in bars:
        if bar.own.percent is None:
            said.append(f"{bar.label}: {bar.empty}")
            continue
        mean = "" if bar.summary.mean is None else f", controls {bar.summary.mean:.1f} % on average"
        said.append(f"{bar.label}: {share(asdict(bar.own))}{mean}")
    return "; ".join(said) + ". " + IN_BRACKETS


def _bar_chart(bars: Sequence[Bar], n_controls: int, title: str, xlabel: str, ylabel: str) -> Drawing:
    """Draw one panel of bars, with the small print that explains them."""
    figure = Figure(figsize=(SINGLE, 2.9))
    axes = figure.subplots()
    figure.suptitle(title)
    _draw_bars(axes, bars)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    printed = [bar.printed for bar in bars]
    ring = "Ring: the paper's value." if any(p and p.defect is None for p in printed) else ""
    foot(figure, [*_legend_lines(n_controls), ring, artefacts_in_words(printed)], 68)
    return Drawing(figure, {"bars": [asdict(bar) for bar in bars]}, _bars_in_words(bars))


@styled
def conversion_ratios(scores: Scores, model: str, value: str, name: str = "") -> Drawing:
    """CR(CK), CR(ND) and CR(PK) of the entropy set and its controls (Figures 4b and 8).

    All three come from the transition counts, ND's too: the printed ND bars are PK's (defect 1).

    Args:
        scores: One ablation value's part of scores.json.
        model: Display name.
        value: Name of the ablation value.
        name: Name of the model, by which the paper's values are found.
    """
    own, others = counts_of(scores["entropy"]["transition_counts"]), control_counts(scores)
    bars = [
        _bar(
            f"to {source}",
            source,
            conversion_ratio(own, source),
            [conversion_ratio(counts, source) for counts in others],
            f"every prompt was {source} before ablation" if own.sum() else "there is no prompt at all",
            printed_share(name, value, f"CR({source})"),
        )
        for source in SOURCES
    ]
    return _bar_chart(
        bars,
        len(others),
        f"{shown(model)}, {VALUE_LABELS[value]} ablation",
        "source K after ablation",
        "conversion ratio\n(% of prompts that were not K)",
    )


@styled
def to_context(scores: Scores, model: str, value: str) -> Drawing:
    """Transition scores ND -> CK and PK -> CK of the entropy set and its controls (Method 8).

    Args:
        scores: One ablation value's part of scores.json.
        model: Display name.
        value: Name of the ablation value.
    """
    own, others = counts_of(scores["entropy"]["transition_counts"]), control_counts(scores)
    ck = SOURCES.index("CK")
    froms: tuple[Source, ...] = ("ND", "PK")

    def score(counts: Int[np.ndarray, "3 3"], source: Source) -> Ratio:
        row = counts[SOURCES.index(source)]
        return ratio(int(row[ck]), int(row.sum()))

    bars = [
        _bar(
            f"{source} → CK",
            source,
            score(own, source),
            [score(counts, source) for counts in others],
            f"no prompt was {source} before ablation",
        )
        for source in froms
    ]
    return _bar_chart(
        bars,
        len(others),
        f"{shown(model)}, {VALUE_LABELS[value]} ablation",
        "transition",
        "transition score\n(% of prompts of the class before)",
    )


@styled
def gts_histogram(scores: Scores, model: str, value: str) -> Drawing:
    """Global transition scores of the controls, the entropy set's as a line with its Q-value.

    Args:
        scores: One ablation value's part of scores.json.
        model: Display name.
        value: Name of the ablation value.
    """
    own = scores["entropy"]["gts"]
    controls = np.asarray(
        [entry["gts"] for entry in scores["controls"]["sets"] if entry["gts"] is not None], dtype=float
    )
    q, p = scores["entropy"]["q_value"], scores["entropy"]["permutation_p"]
    data = {"entropy": dict(own), "q_value": q, "permutation_p": p, "controls": controls}
    figure = Figure(figsize=(SINGLE, 2.9))
    axes = figure.subplots()
    title = f"{shown(model)}, {VALUE_LABELS[value]} ablation"
    axes.set_xlabel("global transition score\n(% of prompts whose source changed)")
    axes.set_ylabel("control sets (count)")
    if own["percent"] is None:
        words = "There is no prompt, so no share of prompts."
        figure.suptitle(title)
        say(axes, words)
        return Drawing(figure, data, words)
    lines = []
    if len(controls):
        low, high = float(controls.min()), float(controls.max())
        if high - low > 1e-9:
            edges = np.linspace(low, high, min(20, max(5, round(len(controls) ** 0.5) * 2)) + 1)
        else:  # all controls alike, or only one: one bar as wide as one prompt
            half = 50.0 / max(1, own["total"])
            edges = np.asarray([low - half, high + half])
            lines.append(
                "One control set." if len(controls) == 1 else f"All controls have GTS = {low:.3g} %."
            )
        counts, edges = np.histogram(controls, edges)
        data["histogram"] = {"edges": edges, "counts": counts}
        axes.bar(
            edges[:-1],
            counts,
            np.diff(edges),
            align="edge",
            color="#D9D9D9",
            edgecolor=GREY,
            label="1 control set" if len(controls) == 1 else f"{len(controls)} control sets",
        )
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    else:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no control sets", transform=axes.transAxes, ha="center")
        lines.append("No control sets were run: there is nothing to compare with.")
    axes.axvspan(own["low"], own["high"], color=RED, alpha=0.13, linewidth=0)
    words = f"entropy set {own['percent']:.1f} % ({own['count']}/{own['total']})"
    axes.axvline(own["percent"], color=RED, label=words)
    reach = max([own["high"], *controls.tolist()])
    axes.set_xlim(-0.02 * reach, 1.04 * reach)  # a line at 0 or 100 % is drawn whole
    if q is not None:
        n = len(controls)
        lines.insert(
            0, f"Q = {q:.1f} of 100; permutation p = {p:.4f} (at least 1/{n + 1} = {1 / (n + 1):.4f})."
        )
    lines.append("Band: exact 95 % interval of the entropy set.")
    titled_legend(figure, axes.get_legend_handles_labels()[0], title)
    foot(figure, lines, 68)
    said = [f"Entropy set: {share(own)}. {len(controls)} control sets"]
    said[0] += f": {extent(controls)} %." if len(controls) else "."
    return Drawing(figure, data, " ".join([*said, *lines]))


@styled
def class_sizes(runs: Sequence[tuple[str, Mapping[str, Mapping[str, Any]]]]) -> Drawing:
    """How many prompts were CK, ND and PK before ablation, by model (the paper's Figure 5).

    Args:
        runs: For each model its display name and the `sources` of its scores.json.
    """
    figure = Figure(figsize=(min(9.0, max(SINGLE, 1.35 * len(runs) + 1.0)), 2.7))
    axes = figure.subplots()
    figure.suptitle("Knowledge sources before ablation")
    data: dict[str, Any] = {"models": {model: dict(sources) for model, sources in runs}}
    most = max([s["count"] for _, sources in runs for s in sources.values()] or [0])
    for j, source in enumerate(SOURCES):
        at = np.arange(len(runs)) + 0.28 * (j - 1)
        counts = [int(sources[source]["count"]) for _, sources in runs]
        axes.bar(
            at,
            counts,
            0.26,
            color=COLOURS[source],
            edgecolor="white",
            hatch=HATCHES[source],
            label=WORDS[source],
        )
        for x, (_, sources) in zip(at, runs, strict=True):
            r = sources[source]
            percent = "no prompts" if r["percent"] is None else f"{r['percent']:.1f} %"
            text = f"{r['count']:,}\n{percent}"
            axes.text(x, r["count"] + 0.01 * most, text, ha="center", va="bottom", fontsize=6)
    names = [folded(shown(model), 18) for model, _ in runs]  # as wide as its three bars
    axes.set_xticks(range(len(runs)), names)
    axes.set_xlim(-0.6, len(runs) - 0.4)
    axes.set_ylim(0, 1.22 * max(1, most))
    axes.set_xlabel("model")
    axes.set_ylabel("probing prompts (count)")
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=1 if len(runs) < 3 else 3
    )
    said = "; ".join(
        f"{model}: " + ", ".join(f"{source} {share(sources[source])}" for source in SOURCES)
        for model, sources in runs
    )
    return Drawing(figure, data, f"{said}. {IN_BRACKETS}")
