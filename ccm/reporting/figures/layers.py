"""Rho of every layer's neurons, with respect to the unembedding's null space (Method 5, 13)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ccm.experiment.results import RunResults
from ccm.reporting.figures.canvas import (
    DOUBLE,
    ENTROPY_DOTS,
    GREY,
    RED,
    SINGLE,
    Drawing,
    drawable,
    explain_empty,
    footnote,
    jitter,
)
from ccm.reporting.figures.neurons import threshold_of
from ccm.reporting.figures.registry import register_figure
from ccm.reporting.text import extent

QUANTILES = (0, 5, 25, 50, 75, 95, 100)  # percent
FEW_LAYERS = 8  # most layers that fit into one column


def _reads(run: RunResults) -> tuple[Any, ...]:
    dims, d_model = int(run.identity["null_space_dims"]), len(run.singular_values)
    own = run.entropy_neurons
    return run.rho_by_layer, own, run.display_name, dims, d_model, threshold_of(run)


@register_figure(
    per="run",
    stem="{name}/{name}_rho_by_layer",
    title="ρ by layer",
    caption=(
        "The proportion of each neuron's output weight that lies in the null space of the unembedding, "
        "layer by layer. The entropy neurons are red."
    ),
    reads=_reads,
)
def rho_by_layer(
    table: pd.DataFrame,
    entropy_neurons: Sequence[int],
    model: str,
    null_space_dims: int,
    d_model: int,
    min_rho: float | None = None,
) -> Drawing:
    """Distribution of rho in each layer, the entropy neurons in the last one.

    Args:
        table: Columns `layer`, `neuron_idx`, `rho` (proportion of the norm, 0 to 1).
        entropy_neurons: Of the last layer.
        model: Display name.
        null_space_dims: Dimensions of the null space.
        d_model: All dimensions. A random direction has rho near sqrt(null_space_dims / d_model).
        min_rho: The selection's threshold; None if neurons were named instead.
    """
    last = int(table["layer"].max()) if len(table) else -1
    wide = SINGLE if last < FEW_LAYERS else DOUBLE
    figure = Figure(figsize=(wide, 3.1))
    axes = figure.subplots()
    figure.suptitle(f"{drawable(model)}: ρ of every layer's neurons")
    chance = float(np.sqrt(null_space_dims / d_model))
    data: dict[str, Any] = {"layers": [], "entropy_neurons": [], "random_direction": chance}
    axes.set_xlabel("layer (number, first is 0)")
    axes.set_ylabel("ρ (proportion of the norm, 0 to 1)")
    if not np.isfinite(table["rho"].to_numpy(float)).any():
        explain_empty(axes, "No neuron has a ρ.")
        return Drawing(figure, data)
    for layer, rho in table.groupby("layer")["rho"]:
        values = rho.to_numpy(float)
        values = values[np.isfinite(values)]
        found = np.percentile(values, QUANTILES) if len(values) else np.full(len(QUANTILES), np.nan)
        data["layers"].append(
            {"layer": layer, "neurons": len(rho), "without_rho": len(rho) - len(values)}
            | {f"percentile_{q}": v for q, v in zip(QUANTILES, found, strict=True)}
        )
    at = np.asarray([row["layer"] for row in data["layers"]])
    of = {q: np.asarray([row[f"percentile_{q}"] for row in data["layers"]]) for q in QUANTILES}
    axes.vlines(at, of[0], of[100], color=GREY, linewidth=0.7)
    axes.bar(at, of[95] - of[5], 0.62, of[5], color="#D9D9D9", linewidth=0)
    axes.bar(at, of[75] - of[25], 0.62, of[25], color="#9A9A9A", linewidth=0)
    axes.hlines(of[50], at - 0.31, at + 0.31, color="#222222", linewidth=1.2)
    axes.axhline(chance, color="#222222", linestyle="--", linewidth=0.8)
    handles = [
        Line2D([], [], color=GREY, linewidth=0.8, label="least to greatest"),
        Line2D([], [], color="#D9D9D9", linewidth=6, label="5th to 95th percentile"),
        Line2D([], [], color="#9A9A9A", linewidth=6, label="quartiles"),
        Line2D([], [], color="#222222", linewidth=1.2, label="median"),
        Line2D([], [], color="#222222", linestyle="--", linewidth=0.8, label="a random direction"),
    ]
    if min_rho is not None:
        axes.axhline(min_rho, color="#444444", linestyle=":", linewidth=0.9)
        words = f"ρ ≥ {min_rho:g} to select"
        handles.append(Line2D([], [], color="#444444", linestyle=":", linewidth=0.9, label=words))
    own = table[(table["layer"] == last) & table["neuron_idx"].isin(list(entropy_neurons))]
    own = own[np.isfinite(own["rho"])]
    data["entropy_neurons"] = own[["neuron_idx", "rho"]].to_dict("records")
    axes.scatter(last + 0.4 * jitter(len(own)), own["rho"], s=13, **ENTROPY_DOTS)
    words = f"entropy neurons ({len(own)})"
    handles.append(Line2D([], [], color=RED, marker="o", linestyle="", markersize=4, label=words))
    figure.legend(handles=handles, loc="outside lower center", ncols=2 if wide == SINGLE else 4)
    axes.set_xlim(-0.6, last + 0.6)
    axes.set_ylim(-0.02, 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
    small = []
    without = sum(row["without_rho"] for row in data["layers"])
    if without:
        small.append(f"Neurons without output weight, so without ρ: {without:,}.")
    missing = sorted(set(range(last + 1)) - set(at.tolist()))
    if missing:
        small.append(f"Layers without one output matrix: {', '.join(map(str, missing))}.")
    footnote(figure, small, 68 if wide == SINGLE else 140)
    medians = ", ".join(f"{m:.2f}" if np.isfinite(m) else "none" for m in of[50])
    says = f"Median of layers {at[0]} to {at[-1]}: {medians}; a random direction: {chance:.2f}. "
    return Drawing(figure, data, says + f"The entropy neurons: {extent(own['rho'].to_numpy(float))}.")
