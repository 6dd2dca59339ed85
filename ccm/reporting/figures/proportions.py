"""Proportions of prompts: conversion ratios, transition scores, GTS among controls, class sizes.

Every bar of a single set carries its count and its exact 95 % interval (Method 8).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ccm.method.scores import Ratio, conversion_ratio, ratio
from ccm.method.sources import SOURCES, Source
from ccm.paper.values import printed_proportion
from ccm.reporting.figures.bars import bar_chart, bar_of
from ccm.reporting.figures.canvas import (
    COLOURS,
    GREY,
    HATCHES,
    RED,
    SINGLE,
    Drawing,
    ablation_title,
    drawable,
    explain_empty,
    folded,
    footnote,
    titled_legend,
)
from ccm.reporting.figures.registry import register_figure
from ccm.reporting.text import IN_BRACKETS, extent, proportion

Scores = Mapping[str, Any]  # one ablation value's part of scores.json
WORDS = {"CK": "contextual knowledge (CK)", "ND": "not defined (ND)", "PK": "parametric knowledge (PK)"}


def counts_of(table: Mapping[str, Mapping[str, int]]) -> Int[np.ndarray, "from=3 to=3"]:
    """Turn the from -> to table of scores.json into an array in the order of `SOURCES`."""
    return np.asarray([[table[k][k2] for k2 in SOURCES] for k in SOURCES], dtype=np.int64)


def control_counts(scores: Scores, kind: str = "controls") -> list[Int[np.ndarray, "from=3 to=3"]]:
    """Return the transition counts of every control set, of plain controls or of another kind."""
    return [counts_of(entry["transition_counts"]) for entry in scores[kind]["sets"]]


@register_figure(
    per="ablation value",
    stem="{name}/{name}_{value}-conversion_ratios",
    title="Conversion ratios",
    caption=(
        "Of the prompts that were not answered from a source, the proportion that is after the "
        "ablation. Coloured: the entropy set; grey: the control sets."
    ),
    reads=lambda run, value: (run.scores["ablations"][value], run.display_name, value, run.model),
)
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
        bar_of(
            f"to {source}",
            source,
            conversion_ratio(own, source),
            [conversion_ratio(counts, source) for counts in others],
            f"every prompt was {source} before ablation" if own.sum() else "there is no prompt at all",
            printed_proportion(name, value, f"CR({source})"),
        )
        for source in SOURCES
    ]
    return bar_chart(
        bars,
        len(others),
        ablation_title(model, value),
        "source K after ablation",
        "conversion ratio\n(% of prompts that were not K)",
    )


@register_figure(
    per="ablation value",
    stem="{name}/{name}_{value}_transition_score",
    title="Global transition score",
    caption=(
        "How many control sets changed what proportion of the answers' sources. Red line: the entropy "
        "set. The further right of all controls it lies, the less chance explains it."
    ),
    reads=lambda run, value: (run.scores["ablations"][value], run.display_name, value),
)
def gts_histogram(scores: Scores, model: str, value: str) -> Drawing:
    """Histogram of the controls' global transition scores; the entropy set's is a line with its Q.

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
    title = ablation_title(model, value)
    axes.set_xlabel("global transition score\n(% of prompts whose source changed)")
    axes.set_ylabel("control sets (count)")
    if own["percent"] is None:
        words = "There is no prompt, so no proportion of prompts."
        figure.suptitle(title)
        explain_empty(axes, words)
        return Drawing(figure, data, words)
    lines = []
    if len(controls):
        low, high = float(controls.min()), float(controls.max())
        if high - low > 1e-9:
            edges = np.linspace(low, high, min(20, max(5, round(len(controls) ** 0.5) * 2)) + 1)
        else:  # all controls alike, or only one: one bar, as wide as one prompt
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
    footnote(figure, lines, 68)
    said = [f"Entropy set: {proportion(own)}. {len(controls)} control sets"]
    said[0] += f": {extent(controls)} %." if len(controls) else "."
    return Drawing(figure, data, " ".join([*said, *lines]))


@register_figure(
    per="ablation value",
    stem="{name}/{name}_{value}-ndck_pkck_conversion_ratios",
    title="Turning to the context",
    caption=(
        "Of the prompts answered with neither object (ND), and of those answered from the weights "
        "(PK), the proportion that is answered from the context (CK) after the ablation."
    ),
    reads=lambda run, value: (run.scores["ablations"][value], run.display_name, value),
)
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
        bar_of(
            f"{source} → CK",
            source,
            score(own, source),
            [score(counts, source) for counts in others],
            f"no prompt was {source} before ablation",
        )
        for source in froms
    ]
    return bar_chart(
        bars,
        len(others),
        ablation_title(model, value),
        "transition",
        "transition score\n(% of prompts of the class before)",
    )


@register_figure(
    per="all runs",
    stem="knowledge_source_sizes",
    title="Knowledge sources before ablation",
    caption=(
        "How many prompts were answered from the context (CK), with neither object (ND), and from the "
        "weights (PK)."
    ),
    reads=lambda runs: ([(run.display_name, run.scores["sources"]) for run in runs],),
)
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
    names = [folded(drawable(model), 18) for model, _ in runs]  # as wide as its three bars
    axes.set_xticks(range(len(runs)), names)
    axes.set_xlim(-0.6, len(runs) - 0.4)
    axes.set_ylim(0, 1.22 * max(1, most))
    axes.set_xlabel("model")
    axes.set_ylabel("probing prompts (count)")
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=1 if len(runs) < 3 else 3
    )
    said = "; ".join(
        f"{model}: " + ", ".join(f"{source} {proportion(sources[source])}" for source in SOURCES)
        for model, sources in runs
    )
    return Drawing(figure, data, f"{said}. {IN_BRACKETS}")
