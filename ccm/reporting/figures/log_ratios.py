"""Log-ratios between the CK, PK and ND answers, before and after ablation (Method 9)."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ccm.method.sources import RATIOS, SOURCES, Source, log_ratios
from ccm.reporting.figures.canvas import (
    COLOURS,
    DOUBLE,
    SINGLE,
    Drawing,
    ablation_title,
    draw_density,
    explain_empty,
    grid_for,
    styled,
)
from ccm.reporting.figures.registry import FIGURES, RegisteredFigure, register_figure

LINES: dict[Source, str] = {"CK": "-", "ND": "-.", "PK": "--"}
Values = Float[np.ndarray, "prompt"]


def ratios_of(cell: pd.DataFrame) -> dict[str, Values]:
    """Return the three log-ratios of a cell, nats, keyed `CK/PK`, `ND/CK`, `ND/PK`."""
    return log_ratios({s: cell[f"log_prob_{s.lower()}"].to_numpy(float) for s in SOURCES})


def _by_class(values: Values, source: np.ndarray) -> dict[Source, np.ndarray]:
    return {s: values[source == s] for s in SOURCES}


def _formula(over: str, under: str) -> str:
    return rf"$\log(P_{{{over}}}\,/\,P_{{{under}}})$"


def _draw_classes(
    axes: Axes, groups: Mapping[Source, np.ndarray], grid: Float[np.ndarray, "point"]
) -> dict[str, Any]:
    """Draw a density for every class; a class without one is described in words."""
    found: dict[str, Any] = {}
    words = []
    for source, values in groups.items():
        finite = values[np.isfinite(values)]
        curve = None
        if len(finite):
            curve = draw_density(
                axes, finite, grid, COLOURS[source], f"{source} (n = {len(finite):,})", LINES[source]
            )
            if curve is None:
                one = len(np.unique(finite)) == 1
                words.append(
                    f"{source}: all {len(finite)} at {finite[0]:.3g}" if one else f"{source}: no spread"
                )
        elif len(values):
            words.append(f"{source}: no finite value")
        else:
            words.append(f"no prompt was {source}")
        found[source] = {
            "n": len(values),
            "finite": len(finite),
            "mean": float(finite.mean()) if len(finite) else None,
            "values": finite,
            "density": curve,
        }
    if not any(len(v[np.isfinite(v)]) for v in groups.values()):
        explain_empty(axes, "No prompt has a log-ratio that could be drawn.")
    elif words:
        look: dict[str, Any] = {"transform": axes.transAxes, "va": "top", "fontsize": 6.5}
        look["bbox"] = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1}
        axes.text(0.02, 0.97, "\n".join(words), **look)
    axes.axvline(0.0, color="#222222", linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    return found


def _set_height(axes: Axes, *drawn: Mapping[str, Any]) -> None:
    """Make room for the highest of the densities in one or several panels."""
    curves = [d["density"] for panel in drawn for d in panel.values() if d["density"] is not None]
    peak = max((float(curve.max()) for curve in curves), default=0.0)
    if peak > 0:
        axes.set_ylim(0, 1.08 * peak)
    else:
        axes.set_yticks([])  # lines only: their height means nothing


def _legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """Name every class that one of the panels shows."""
    handles: dict[str, Any] = {}
    for axes in panels:
        drawn, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, drawn, strict=True))
    if handles:
        look: dict[str, Any] = {"ncols": 3, "title": "source before ablation"}
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", **look)


def _means(*drawn: Mapping[str, Any]) -> str:
    """Write the mean of every class in one or several panels: `CK (n = 3) 0.12 and 0.34; ...`."""
    said = []
    for source in SOURCES:
        means = ["none" if d[source]["mean"] is None else f"{d[source]['mean']:.2f}" for d in drawn]
        said.append(f"{source} (n = {drawn[0][source]['n']:,}) {' and '.join(means)}")
    return "; ".join(said) + "."


def _once_per_ratio(draw: Callable[..., Drawing]) -> Callable[..., Drawing]:
    """Register a drawing function for each of `RATIOS`."""
    draw = styled(draw)
    for over, under in RATIOS:
        figure = RegisteredFigure(
            per="ablation value",
            stem=f"{{name}}/{{name}}_{{value}}_ablation_log_{over.lower()}_{under.lower()}",
            title=f"Log-ratio of {over} to {under}",
            caption=(
                f"How much likelier the first token of the {over} answer is than that of the {under} "
                "answer, before (top) and after the ablation (bottom), by the source before it."
            ),
            reads=lambda run, value, ratio=(over, under): (
                run.plain,
                run.ablated[value],
                ratio,
                run.display_name,
                value,
            ),
            draw=draw,
        )
        FIGURES.append(figure)
    return draw


@_once_per_ratio
def log_ratio(
    plain: pd.DataFrame, ablated: pd.DataFrame, names: tuple[str, str], model: str, value: str
) -> Drawing:
    """One log-ratio by class, before (top) and after ablation (bottom), with a line at 0.

    In both panels a prompt belongs to its class before ablation.

    Args:
        plain: The plain run's cell.
        ablated: The entropy set's cell.
        names: One of `RATIOS`, such as ("CK", "PK").
        model: Display name.
        value: Name of the ablation value.
    """
    over, under = names
    key = f"{over}/{under}"
    source = plain["source"].to_numpy(object)
    before, after = ratios_of(plain)[key], ratios_of(ablated)[key]
    grid = grid_for(before, after)
    figure = Figure(figsize=(SINGLE, 3.8))
    panels = figure.subplots(2, 1, sharex=True, sharey=True)
    figure.suptitle(ablation_title(model, value))
    data: dict[str, Any] = {"ratio": key, "grid": grid}
    for axes, when, values in zip(panels, ("before", "after"), (before, after), strict=True):
        axes.set_title(f"{when} ablation", loc="left")
        data[when] = _draw_classes(axes, _by_class(values, source), grid)
        axes.set_ylabel("density (per nat)")
        axes.set_xlim(grid[0], grid[-1])
    panels[0].tick_params(labelbottom=False)
    panels[1].set_xlabel(
        f"{_formula(over, under)} at the first answer token (nats)\n"
        f"below 0: {under} is likelier; above 0: {over}"
    )
    _set_height(panels[0], data["before"], data["after"])
    _legend(figure, panels[:1])
    said = f"Mean of log {key} in nats, before and after: " + _means(data["before"], data["after"])
    return Drawing(figure, data, said)


@register_figure(
    per="ablation value",
    stem="{name}/{name}_{value}_ablation_empirical_noises",
    title="Change of the log-ratios",
    caption=(
        "The three log-ratios before the ablation minus after it, by the source before it. At 0 "
        "nothing has changed."
    ),
    reads=lambda run, value: (run.plain, run.ablated[value], run.display_name, value),
)
def log_ratio_differences(
    plain: pd.DataFrame, ablated: pd.DataFrame, model: str, value: str
) -> Drawing:
    """The three log-ratios' differences before - after, by class ("empirical noises", Method 9).

    Args:
        plain: The plain run's cell.
        ablated: The entropy set's cell.
        model: Display name.
        value: Name of the ablation value.
    """
    source = plain["source"].to_numpy(object)
    before, after = ratios_of(plain), ratios_of(ablated)
    figure = Figure(figsize=(DOUBLE, 2.5))
    panels = figure.subplots(1, 3)
    figure.suptitle(f"{ablation_title(model, value)}: log-ratios, before − after")
    data: dict[str, Any] = {}
    for axes, (over, under) in zip(panels, RATIOS, strict=True):
        key = f"{over}/{under}"
        change = before[key] - after[key]
        grid = grid_for(change)
        found = _draw_classes(axes, _by_class(change, source), grid)
        _set_height(axes, found)
        data[key] = {"grid": grid, **found}
        axes.set_xlim(grid[0], grid[-1])
        axes.set_xlabel(f"Δ {_formula(over, under)} (nats)")
        if not np.any(change):
            axes.set_title("no difference at all", loc="left")
        axes.set_ylabel("density (per nat)")
    _legend(figure, panels)
    said = [f"log {key} {_means(data[key])}" for key in before]
    return Drawing(figure, data, "Mean change in nats: " + " ".join(said))
