"""Activations of the entropy neurons, from stored statistics (Method 6)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ccm.method.ablation_values import ABLATION_VALUES
from ccm.method.statistics import STATISTICS, ActivationStatistics
from ccm.reporting.figures.canvas import (
    DOUBLE,
    GREY,
    Drawing,
    drawable,
    explain_empty,
    footnote,
)
from ccm.reporting.figures.registry import register_figure
from ccm.reporting.text import extent

MOST_ROWS = 30  # neurons of one panel that stay legible


@register_figure(
    per="all runs",
    stem="neuron_activation_distributions",
    title="Activations of the entropy neurons",
    caption=(
        "A row per neuron: where its activations lie, and the {n_values} constants that an ablation "
        "may put in their place."
    ),
    reads=lambda runs: ([(run.display_name, run.statistics, run.entropy_neurons) for run in runs],),
)
def activation_ranges(runs: Sequence[tuple[str, ActivationStatistics, Sequence[int]]]) -> Drawing:
    """Activations of the entropy neurons with the ablation values (the paper's Figure 9).

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
        axes.set_title(f"{drawable(model)}: activations of the entropy neurons", loc="left")
        axes.set_xlabel("activation after the nonlinearity (hook_post, no unit)")
        axes.set_ylabel("neuron (no.)")
        data["models"][model] = _activation_rows(axes, statistics, kept)
        if len(kept) < len(neurons):
            small.append(f"{drawable(model)}: the first {len(kept)} of {len(neurons)} neurons.")
        if not all(np.isfinite(v) for row in data["models"][model] for v in row.values()):
            small.append(f"{drawable(model)}: statistics that are not finite are not drawn.")
    handles = [
        Line2D([], [], color=GREY, linewidth=1, label="min to max"),
        Line2D([], [], color="#DDDDDD", linewidth=8, label="mean ± standard deviation"),
        *(
            Line2D([], [], color=v.colour, marker=v.marker, linestyle="", markersize=4.5, label=v.label)
            for v in ABLATION_VALUES.values()
        ),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4)
    small.append(
        "Drawn from stored statistics (min, max, mean, standard deviation, median, mode), not from "
        "single activations. μ ± 3σ are clipped to min and max, as the ablation clips them."
    )
    footnote(figure, small, 125)
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
        explain_empty(axes, "The entropy set is empty.")
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
        for place, (name, value) in enumerate(ABLATION_VALUES.items()):
            # Side by side: values of one neuron may be equal.
            side = place - (len(ABLATION_VALUES) - 1) / 2
            axes.plot(
                [float(replaced[name][i])],
                [row + 0.15 * side],
                value.marker,
                color=value.colour,
                markersize=4.5,
                markeredgecolor="white",
                markeredgewidth=0.3,
            )
        found.append({"neuron": i, **of, **{n: float(v[i]) for n, v in replaced.items()}})
    axes.set_yticks(range(len(neurons)), [str(i) for i in neurons])
    axes.set_ylim(len(neurons) - 0.4, -0.6)
    axes.grid(axis="x")
    return found
