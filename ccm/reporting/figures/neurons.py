"""The last layer's neurons: measures, spectrum, weight norms (Method 5)."""

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.cbook import boxplot_stats
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ccm.experiment.results import RunResults
from ccm.reporting.figures.canvas import (
    ENTROPY_DOTS,
    FEW,
    GREY,
    RED,
    SINGLE,
    Drawing,
    density,
    draw_box,
    draw_density,
    drawable,
    explain_empty,
    grid_for,
)
from ccm.reporting.figures.registry import register_figure
from ccm.reporting.text import extent

MANY_POINTS = 2000  # more are drawn as pixels inside the PDF, which stays small
SMALLEST = 1e-5  # of the largest singular value; anything below is rounding error


def threshold_of(run: RunResults) -> float | None:
    """Return the least rho to be selected; None if the neurons were named by hand instead."""
    return None if run.identity.get("neurons") is not None else float(run.identity["min_rho"])


@register_figure(
    per="run",
    stem="{name}/{name}_logitvar_and_rho-nb_neurons_with_low_logitvar={k}",
    title="LogitVar against ρ",
    caption=(
        "Each point is a neuron of the last layer. Entropy neurons (red) write almost only into the "
        "null space of the unembedding (ρ near 1, right) and move all logits alike (low LogitVar, "
        "bottom)."
    ),
    reads=lambda run: (run.measures, run.display_name, threshold_of(run)),
)
def logitvar_and_rho(measures: pd.DataFrame, model: str, min_rho: float | None = None) -> Drawing:
    """LogitVar against rho with densities at the sides, the entropy set in red (Method 5).

    Args:
        measures: Columns `neuron_idx`, `logitvar` (variance of cosines, no unit), `rho` (proportion of
            the norm, 0 to 1), `entropy_neuron`.
        model: Display name.
        min_rho: The selection's threshold, drawn as a line; None if neurons were named instead.
    """
    figure = Figure(figsize=(SINGLE, 3.1))
    grid = figure.add_gridspec(2, 2, width_ratios=(4, 1), height_ratios=(1, 4))
    axes = figure.add_subplot(grid[1, 0])
    top = figure.add_subplot(grid[0, 0], sharex=axes)
    right = figure.add_subplot(grid[1, 1], sharey=axes)
    figure.suptitle(f"{drawable(model)}: last-layer neurons")
    rho, variance = measures["rho"].to_numpy(float), measures["logitvar"].to_numpy(float)
    # A logarithmic axis has no place for zero; a neuron without output weight has no rho.
    drawn = np.isfinite(rho) & np.isfinite(variance) & (variance > 0)
    chosen = measures["entropy_neuron"].to_numpy(bool)
    data: dict[str, Any] = {
        "neuron_idx": measures["neuron_idx"].to_numpy()[drawn],
        "rho": rho[drawn],
        "logitvar": variance[drawn],
        "entropy_neurons": measures["neuron_idx"].to_numpy()[chosen],
        "not_drawn": int((~drawn).sum()),
        "min_rho": min_rho,
    }
    axes.set_xlabel("ρ (proportion of the norm, 0 to 1)")
    axes.set_ylabel("LogitVar (variance of cosines)")
    for marginal in (top, right):
        marginal.tick_params(labelbottom=False, labelleft=False)
    top.set_ylabel("density\n(per unit)", fontsize=6.5)
    right.set_xlabel("density\n(per decade)", fontsize=6.5)
    top.set_yticks([])
    right.set_xticks([])
    if not drawn.any():
        words = "No neuron has a LogitVar above 0 and a ρ."
        explain_empty(axes, words)
        return Drawing(figure, data, words)
    axes.set_yscale("log")
    log_variance = np.log10(variance, where=drawn, out=np.full(len(variance), np.nan))
    others, own = drawn & ~chosen, drawn & chosen
    many = int(drawn.sum()) > MANY_POINTS
    axes.scatter(
        rho[others],
        variance[others],
        s=3 if many else 6,
        c=GREY,
        alpha=max(0.05, min(0.6, 1500 / max(1, int(others.sum())))),
        linewidths=0,
        rasterized=many,
        label=f"other neurons ({int(others.sum()):,})",
    )
    label = f"entropy neurons ({int(own.sum())})"
    axes.scatter(rho[own], variance[own], s=18, label=label, **ENTROPY_DOTS)
    if min_rho is not None:
        axes.axvline(min_rho, color="#444444", linestyle=":", linewidth=0.9, label=f"ρ ≥ {min_rho:g}")
    rho_grid = np.linspace(-0.02, 1.02, 301)
    log_grid = grid_for(log_variance[drawn])
    data["rho_density"] = {"at": rho_grid, "of": draw_density(top, rho[drawn], rho_grid, GREY, "_")}
    found = density(log_variance[drawn], log_grid)
    # The panel has the logarithmic scale of its neighbour: densities are drawn over 10**grid.
    if found is None:
        right.axhline(float(variance[drawn][0]), color=GREY)
    else:
        right.plot(found, 10**log_grid, color=GREY)
        right.fill_betweenx(10**log_grid, found, color=GREY, alpha=0.18, linewidth=0)
        right.set_xlim(left=0)
    for value in rho[own]:
        top.plot([value, value], [0, 0.15], color=RED, transform=top.get_xaxis_transform(), lw=0.9)
    for value in variance[own]:
        right.plot([0, 0.15], [value, value], color=RED, transform=right.get_yaxis_transform(), lw=0.9)
    data["logitvar_density"] = {"at_log10": log_grid, "of": found}
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(0.7 * variance[drawn].min(), 1.5 * variance[drawn].max())
    top.set_ylim(bottom=0)
    look: dict[str, Any] = {"ncols": 3, "columnspacing": 0.9, "handlelength": 1}
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", **look)
    if data["not_drawn"]:
        words = f"{data['not_drawn']} neurons not drawn\n(LogitVar 0, or no ρ)"
        look = {"transform": axes.transAxes, "ha": "right", "va": "top", "fontsize": 6.5}
        axes.text(0.98, 0.98, words, **look)
    said = (
        f"Entropy neurons ({int(own.sum())}): ρ {extent(rho[own])}, LogitVar {extent(variance[own])}. "
        f"Other neurons ({int(others.sum()):,}): ρ {extent(rho[others])}, LogitVar "
        f"{extent(variance[others])}."
    )
    return Drawing(figure, data, said)


@register_figure(
    per="run",
    stem="{name}/singular_values_and_null_space_nb_dims={null_space_dims}",
    title="Spectrum of the unembedding",
    caption=(
        "Singular values of the unembedding, largest first. What is written into the directions of "
        "the lowest ones (red, the null space) barely reaches the logits."
    ),
    reads=lambda run: (run.singular_values, int(run.identity["null_space_dims"]), run.display_name),
)
def singular_value_spectrum(
    singular_values: Float[np.ndarray, "d_model"], null_space_dims: int, model: str
) -> Drawing:
    """Singular values of the processed W_U, descending, the null space in red (Method 5).

    Args:
        singular_values: Of the processed unembedding, in its own unit, descending.
        null_space_dims: How many of the lowest count as null space.
        model: Display name.
    """
    figure = Figure(figsize=(SINGLE, 2.6))
    axes = figure.subplots()
    figure.suptitle(f"{drawable(model)}: spectrum of the unembedding")
    values = np.asarray(singular_values, dtype=float)
    d_model = len(values)
    index = np.arange(1, d_model + 1)
    null = index > d_model - null_space_dims
    floor = SMALLEST * float(values.max(initial=0.0))
    tiny = values <= floor
    data = {
        "singular_values": values,
        "null_space_dims": null_space_dims,
        "below_axis": int(tiny.sum()),
    }
    axes.set_xlabel("rank of the singular value (1: largest)")
    axes.set_ylabel("singular value of $W_U$ (weight units)")
    if not d_model or floor == 0.0:
        words = "No singular value is above 0."
        explain_empty(axes, words)
        return Drawing(figure, data, words)
    lowest = float(values[~tiny].min())
    axes.set_yscale("log")
    for part, colour, label in (
        (~null, "#333333", f"the other {d_model - null_space_dims}"),
        (null, RED, f"null space, the {null_space_dims} lowest"),
    ):
        axes.scatter(
            index[part & ~tiny], values[part & ~tiny], s=7, c=colour, linewidths=0, label=label
        )
        # The axis is logarithmic and has no zero: a triangle at its lower end.
        axes.scatter(
            index[part & tiny],
            np.full(int((part & tiny).sum()), lowest / 1.6),
            s=16,
            c=colour,
            marker="v",
        )
    if tiny.any():
        axes.annotate(
            f"{int(tiny.sum())} of ≈ 0 (below {floor:.1g})",
            (float(index[tiny][0]), lowest / 1.6),
            (-6, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=6.5,
            color=RED if null[tiny].any() else "#333333",
        )
    axes.set_ylim(bottom=lowest / 2.2)
    axes.legend(loc="upper right")
    said = (
        f"{d_model} singular values of {extent(values)}; the {null_space_dims} lowest, the null space, "
        f"of {extent(values[null])}."
    )
    return Drawing(figure, data, said)


@register_figure(
    per="run",
    stem="{name}/{name}_weight_norm_distro-nb_neurons_with_low_logitvar={k}",
    title="Weight norms",
    caption=(
        "Norms of the output weights of the entropy neurons (red) and of all other neurons of the "
        "last layer: density above, quartiles below."
    ),
    reads=lambda run: (run.measures, run.display_name),
)
def weight_norms(measures: pd.DataFrame, model: str) -> Drawing:
    """Distribution of output weight norms, entropy neurons against the others, with box plots.

    Args:
        measures: Columns `neuron_idx`, `norm` (of the processed output weight), `entropy_neuron`.
        model: Display name.
    """
    figure = Figure(figsize=(SINGLE, 2.8))
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 1))
    figure.suptitle(f"{drawable(model)}: output weight norms")
    chosen = measures["entropy_neuron"].to_numpy(bool)
    norms = measures["norm"].to_numpy(float)
    groups = {"entropy neurons": norms[chosen], "other neurons": norms[~chosen]}
    colours = {"entropy neurons": RED, "other neurons": GREY}
    grid = grid_for(*groups.values())
    data: dict[str, Any] = {"grid": grid, "groups": {}}
    for row, (name, values) in enumerate(groups.items()):
        values = values[np.isfinite(values)]
        label, colour = f"{name} ({len(values):,})", colours[name]
        found = None
        if name == "entropy neurons" and 0 < len(values) < FEW:
            for i, value in enumerate(values):
                top.plot(
                    [value, value],
                    [0, 0.3],
                    color=RED,
                    linewidth=0.9,
                    transform=top.get_xaxis_transform(),
                    label="_" if i else label,
                )
        elif len(values):
            found = draw_density(top, values, grid, colour, label)
        box = boxplot_stats(values)[0] if len(values) else None
        if box is not None:
            fliers = {"marker": ".", "markersize": 2, "markeredgecolor": colour}
            draw_box(bottom, box, row, 0.55, colour, 0.35, orientation="horizontal", flierprops=fliers)
        else:
            bottom.text(0.5, row, f"no {name}", transform=bottom.get_yaxis_transform(), ha="center")
        data["groups"][name] = {
            "n": len(values),
            "density": found,
            "box": None
            if box is None
            else {k: box[k] for k in ("whislo", "q1", "med", "q3", "whishi", "mean")},
        }
    # In one panel: the points of the entropy neurons, of which there are few.
    own = groups["entropy neurons"]
    bottom.scatter(own, np.zeros(len(own)), s=9, c=RED, edgecolors="white", linewidths=0.3, zorder=4)
    for line in bottom.lines:
        line.set_rasterized(len(norms) > MANY_POINTS)
    bottom.set_yticks([0, 1], ["entropy", "other"])
    bottom.set_ylim(1.6, -0.6)
    bottom.set_ylabel("neurons")
    bottom.set_xlabel("norm of the output weight $\\|w_{out}\\|$ (weight units)")
    top.set_ylabel("density (per weight unit)")
    top.set_ylim(bottom=0)
    top.set_xlim(grid[0], grid[-1])
    top.xaxis.set_major_locator(MaxNLocator(nbins=6))
    top.tick_params(labelbottom=False)
    # Not inside: with few neurons apart from the rest, the density's peak may be anywhere.
    figure.legend(*top.get_legend_handles_labels(), loc="outside lower center", ncols=2, handlelength=1)
    said = "; ".join(
        f"{name} ({group['n']:,}): "
        + (f"median norm {group['box']['med']:.3g}" if group["box"] else "none")
        for name, group in data["groups"].items()
    )
    return Drawing(figure, data, said[:1].upper() + said[1:] + ".")
