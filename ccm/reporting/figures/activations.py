"""Activations of the entropy neurons, from stored statistics (Method 6)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ccm.method.ablation import ABLATION_VALUES, STATISTICS, ActivationStatistics
from ccm.reporting.figures.canvas import DOUBLE, GREY, VALUE_LABELS, Drawing, foot, say, shown, styled
from ccm.reporting.text import extent

MOST_ROWS = 30  # neurons of one panel that stay legible
MARKS = {
    "mean_ablation": ("o", "#000000"),
    "median_ablation": ("s", "#56B4E9"),
    "mode_ablation": ("D", "#CC79A7"),
    "mean_minus_sigma_ablation": ("<", "#D55E00"),
    "mean_plus_sigma_ablation": (">", "#D55E00"),
}


@styled
def activation_ranges(
    runs: Sequence[tuple[str, ActivationStatistics, Sequence[int]]],
) -> Drawing:
    """Activations of the entropy neurons with the five ablation values (the paper's Figure 9).

    Only moments and extremes are stored, so a bar stands for a distribution: thin from min to max,
    thick for mean +- standard deviation.

    Args:
        runs: For each model its display name, statistics, and entropy neurons.
    """
    rows = [min(len(neurons), MOST_ROWS) for *_, neurons in runs]
    figure = Figure(figsize=(DOUBLE, 1.3 + sum(0.27 * n + 0.62 for n in rows)))
    panels = figure.subplots(len(runs), 1, squeeze=False, height_ratios=[n + 2 for n in rows])[:, 0]
    data: dict[str, Any] = {"models": {}}
    small = []
    for axes, (model, statistics, neurons) in zip(panels, runs, strict=True):
        kept = list(neurons)[:MOST_ROWS]
        axes.set_title(f"{shown(model)}: activations of the entropy neurons", loc="left")
        axes.set_xlabel("activation after the nonlinearity (hook_post, no unit)")
        axes.set_ylabel("neuron (no.)")
        data["models"][model] = _activation_rows(axes, statistics, kept)
        if len(kept) < len(neurons):
            small.append(f"{shown(model)}: the first {len(kept)} of {len(neurons)} neurons.")
        if not all(np.isfinite(v) for row in data["models"][model] for v in row.values()):
            small.append(f"{shown(model)}: statistics that are not finite are not drawn.")
    handles = [
        Line2D([], [], color=GREY, linewidth=1, label="min to max"),
        Line2D([], [], color="#DDDDDD", linewidth=8, label="mean ± standard deviation"),
        *(
            Line2D(
                [], [], color=colour, marker=mark, linestyle="", markersize=4.5, label=VALUE_LABELS[v]
            )
            for v, (mark, colour) in MARKS.items()
        ),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4)
    small.append(
        "Drawn from stored statistics (min, max, mean, standard deviation, median, mode), not from "
        "single activations. μ ± 3σ are clipped to min and max, as the ablation clips them."
    )
    foot(figure, small, 125)
    said = [
        f"{model}, {len(found)} entropy neurons: least activation {extent([r['min'] for r in found])}, "
        f"mean {extent([r['mean'] for r in found])}, greatest {extent([r['max'] for r in found])}."
        for model, found in data["models"].items()
    ]
    return Drawing(figure, data, " ".join(said))


def _activation_rows(
    axes: Axes, statistics: ActivationStatistics, neurons: Sequence[int]
) -> list[dict[str, Any]]:
    if not neurons:
        say(axes, "The entropy set is empty.")
        return []
    replaced = {name: value.of(statistics) for name, value in ABLATION_VALUES.items()}
    found = []
    for row, i in enumerate(neurons):
        of = {name: float(getattr(statistics, name)[i]) for name in STATISTICS}
        axes.plot([of["min"], of["max"]], [row, row], color=GREY, linewidth=1, marker="|", markersize=4)
        axes.plot(
            [max(of["min"], of["mean"] - of["std"]), min(of["max"], of["mean"] + of["std"])],
            [row, row],
            color="#DDDDDD",
            linewidth=11,
            solid_capstyle="butt",
        )
        for place, (name, (mark, colour)) in enumerate(MARKS.items()):
            axes.plot(
                [float(replaced[name][i])],
                [row + 0.15 * (place - 2)],  # side by side: values of one neuron may be equal
                mark,
                color=colour,
                markersize=4.5,
                markeredgecolor="white",
                markeredgewidth=0.3,
            )
        found.append({"neuron": i, **of, **{n: float(v[i]) for n, v in replaced.items()}})
    axes.set_yticks(range(len(neurons)), [str(i) for i in neurons])
    axes.set_ylim(len(neurons) - 0.4, -0.6)
    axes.grid(axis="x")
    return found
