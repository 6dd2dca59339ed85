"""The entropy set beside plain and matched controls, and how well the latter match (Method 13)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from ccm.experiment.results import RunResults
from ccm.method.neurons import match_plane
from ccm.method.scores import conversion_ratio, permutation_p
from ccm.method.sources import SOURCES
from ccm.reporting.figures.canvas import (
    DOUBLE,
    GREY,
    MATCHED_COLOUR,
    RED,
    Drawing,
    ablation_title,
    draw_dots,
    explain_empty,
    footnote,
    legend_dot,
    titled_legend,
)
from ccm.reporting.figures.neurons import MANY_POINTS
from ccm.reporting.figures.proportions import Scores, control_counts, counts_of
from ccm.reporting.figures.registry import register_figure
from ccm.reporting.text import digits, mean_and_most, proportion

KINDS = {"controls": "controls", "matched_controls": "matched"}  # keys of scores.json, words for them
LOOKS = {"controls": (GREY, "o"), "matched_controls": (MATCHED_COLOUR, "D")}


def _reads(run: RunResults, value: str) -> tuple[Any, ...] | None:
    scores, norm = run.scores["ablations"][value], run.measures["norm"].to_numpy(float)
    if "matched_controls" not in scores:
        return None
    return scores, norm, run.sigma, run.display_name, value


@register_figure(
    per="ablation value",
    stem="{name}/{name}_{value}_matched_controls",
    title="Matched controls",
    caption=(
        "Part of any contrast is size: beside the plain controls, sets drawn to be like the entropy "
        "neurons in weight norm and in the spread of their activations. Right: how alike."
    ),
    reads=_reads,
)
def matched_controls(
    scores: Scores,
    norm: Float[np.ndarray, "d_mlp"],
    sigma: Float[np.ndarray, "d_mlp"],
    model: str,
    value: str,
) -> Drawing:
    """GTS and CR(CK) of the entropy set and both kinds of controls; norm and sigma of all neurons.

    Args:
        scores: One ablation value's part of scores.json, with `matched_controls`.
        norm: Of each neuron's processed output weight, weight units.
        sigma: Standard deviation of each neuron's activation, as measured.
        model: Display name.
        value: Name of the ablation value.
    """
    figure = Figure(figsize=(DOUBLE, 3.4))
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.25))
    own = scores["entropy"]
    data: dict[str, Any] = {
        "gts": _gts(scores),
        "conversion_to_ck": _to_ck(scores),
        "neurons": _neurons(scores, norm, sigma),
    }
    left.set_ylabel("global transition score\n(% of prompts whose source changed)")
    middle.set_ylabel("CR(CK), conversion to CK\n(% of prompts that were not CK)")
    _strip(left, own["gts"], data["gts"], "There is no prompt.")
    _strip(
        middle,
        own["conversion_ratios"]["CK"],
        data["conversion_to_ck"],
        "Every prompt was CK before ablation." if own["gts"]["total"] else "There is no prompt.",
    )
    handles = _plane(right, norm, sigma, data["neurons"])
    title = f"{ablation_title(model, value)}: controls of like norm and spread"
    titled_legend(figure, handles, title)
    lines = [
        "Red line: entropy set; band: its exact 95 % interval. Dots: one control set "
        "each; black: their mean. Q: quantile of the entropy set among them (0 to 100); p: one-sided "
        "permutation test, at least 1 / (sets + 1).",
        _match_words(data["neurons"]),
    ]
    footnote(figure, lines, 140)
    gts, to_ck = proportion(own["gts"]), proportion(own["conversion_ratios"]["CK"])
    said = [f"Entropy set: GTS {gts}, CR(CK) {to_ck}"]
    for kind, word in KINDS.items():
        rank = digits(data["gts"][kind]["quantile"], 1)
        said.append(f"GTS of {word}, mean and greatest: {mean_and_most(scores[kind]['gts'])}; Q {rank}")
    return Drawing(figure, data, "; ".join(said) + ". " + lines[-1])


def _gts(scores: Scores) -> dict[str, Any]:
    """Collect the GTS of every control, and the entropy set's Q and p among each kind."""
    ranks = {"controls": scores["entropy"], "matched_controls": scores["matched_controls"]}
    return {
        kind: {
            "percent": [s["gts"] for s in scores[kind]["sets"] if s["gts"] is not None],
            "quantile": ranks[kind]["q_value"],
            "permutation_p": ranks[kind]["permutation_p"],
        }
        for kind in KINDS
    }


def _to_ck(scores: Scores) -> dict[str, Any]:
    """Collect the same for CR(CK); no ablation changes its denominator, so p comes from counts."""
    own = conversion_ratio(counts_of(scores["entropy"]["transition_counts"]), SOURCES[0])
    found = {}
    for kind in KINDS:
        sets = [conversion_ratio(counts, SOURCES[0]) for counts in control_counts(scores, kind)]
        has_rank = bool(sets) and own.total > 0
        found[kind] = {
            "percent": [r.percent for r in sets if r.percent is not None],
            "quantile": scores[kind]["conversion_ratios"]["CK"]["entropy_quantile"],
            "permutation_p": permutation_p(own.count, [r.count for r in sets]) if has_rank else None,
        }
    return found


def _strip(
    axes: Axes, own: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]], empty: str
) -> None:
    """Draw every control as a dot in its kind's column, the entropy set across both."""
    if own["percent"] is None:
        explain_empty(axes, empty)
        return
    axes.axhspan(own["low"], own["high"], color=RED, alpha=0.13, linewidth=0)
    axes.axhline(own["percent"], color=RED)
    axes.set_title(
        f"entropy set {own['percent']:.1f} % ({own['count']}/{own['total']})", color=RED, fontsize=7
    )
    labels = []
    for x, (kind, word) in enumerate(KINDS.items()):
        values = np.asarray(found[kind]["percent"], dtype=float)
        colour, marker = LOOKS[kind]
        if len(values):
            draw_dots(axes, x, 0.6, values, 7, c=colour, marker=marker)
            axes.hlines(values.mean(), x - 0.36, x + 0.36, color="#222222", linewidth=1.2)
            q, p = found[kind]["quantile"], found[kind]["permutation_p"]
            labels.append(f"{word} ({len(values)})\nQ = {q:.1f}\np = {p:.4f}")
        else:
            axes.text(x, own["percent"] / 2, "no sets", ha="center", va="center", fontsize=6.5)
            labels.append(f"{word} (0)\n\n")
    axes.set_xticks(range(len(KINDS)), labels)
    axes.set_xlabel("control sets (count)")
    axes.set_xlim(-0.55, len(KINDS) - 0.45)
    top = max([own["high"], *(v for kind in KINDS for v in found[kind]["percent"])])
    axes.set_ylim(-0.03 * top, 1.05 * top if top > 0 else 1.0)


def _neurons(
    scores: Scores, norm: Float[np.ndarray, "d_mlp"], sigma: Float[np.ndarray, "d_mlp"]
) -> dict[str, Any]:
    """Collect the neurons of each group, and how far apart matched ones lie (standard deviations)."""
    own = sorted(scores["entropy"]["neurons"])
    sets = [s["neurons"] for s in scores["matched_controls"]["sets"]]
    places, others = match_plane(norm, sigma, own)
    with np.errstate(invalid="ignore"):
        pairs = [np.abs(places[own] - places[of]) for of in sets if len(of) == len(own)]
        apart = [np.abs(places[i] - places[others]) for i in own]
    return {
        "entropy": own,
        "matched": sorted({i for s in sets for i in s}),
        "distance_of_matched": _means(pairs),
        "distance_of_others": _means(apart),
    }


def _means(distances: Sequence[Float[np.ndarray, "pair 2"]]) -> list[float | None]:
    """Average distances in log norm and log sigma; None if no pair has a finite one."""
    rows = np.concatenate([np.zeros((0, 2)), *distances])
    rows = rows[np.isfinite(rows).all(1)]
    return [float(v) for v in rows.mean(0)] if len(rows) else [None, None]


def _match_words(neurons: Mapping[str, Any]) -> str:
    of_matched, of_others = neurons["distance_of_matched"], neurons["distance_of_others"]
    if None in (*of_matched, *of_others):
        return "No distance between entropy neurons and others is finite."
    return (
        "Mean distance from an entropy neuron, in standard deviations of the other neurons: to its "
        f"matched neurons {of_matched[0]:.2f} in log norm and {of_matched[1]:.2f} in log σ; to any "
        f"other neuron {of_others[0]:.2f} and {of_others[1]:.2f}."
    )


def _plane(
    axes: Axes,
    norm: Float[np.ndarray, "d_mlp"],
    sigma: Float[np.ndarray, "d_mlp"],
    neurons: Mapping[str, Any],
) -> list[Line2D]:
    """Draw sigma against norm of all neurons; return legend entries for the dots of all panels."""
    axes.set_xlabel("norm of the output weight\n(weight units)")
    axes.set_ylabel("σ of the activation (no unit)")
    group = np.zeros(len(norm), dtype=int)
    for i, chosen in enumerate((neurons["matched"], neurons["entropy"]), 1):
        group[chosen] = i
    looks = (
        (GREY, "o", "plain controls; other neurons"),
        (MATCHED_COLOUR, "D", "matched controls; their neurons"),
        (RED, "o", "entropy set; its neurons"),
    )
    there = (norm > 0) & (sigma > 0) & np.isfinite(norm) & np.isfinite(sigma)
    if there.any():
        many = len(norm) > MANY_POINTS
        for i, (colour, marker, _) in enumerate(looks):
            of = there & (group == i)
            axes.scatter(
                norm[of],
                sigma[of],
                s=(3 if many else 5, 9, 16)[i],
                c=colour,
                marker=marker,
                alpha=1.0 if i else max(0.05, min(0.6, 1500 / max(1, int(of.sum())))),
                edgecolors="white" if i else "none",
                linewidths=0.3,
                rasterized=many,
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.set_minor_locator(NullLocator())
        if not there.all():
            words = f"{int((~there).sum()):,} neurons not drawn\n(norm or σ is 0 or not finite)"
            at = axes.transAxes
            axes.text(0.98, 0.02, words, transform=at, ha="right", va="bottom", fontsize=6.5)
    else:
        explain_empty(axes, "No neuron has a norm and a σ above 0.")
    return [
        legend_dot(colour, marker, f"{word} ({int((group == i).sum()):,})")
        for i, (colour, marker, word) in enumerate(looks)
    ]
