"""Change of entropy for each transition, prompt by prompt (Method 8)."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cbook import boxplot_stats
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ccm.reporting.breakdowns import EntropyChange, entropy_changes
from ccm.reporting.figures.canvas import (
    ABOVE,
    COLOURS,
    DOUBLE,
    FEW,
    GREY,
    RED,
    Drawing,
    ablation_title,
    draw_box,
    draw_dots,
    footnote,
)
from ccm.reporting.figures.registry import register_figure
from ccm.reporting.text import digits

WHISKERS = (5, 95)  # percentiles
MANY_POINTS = 500  # more are drawn as pixels inside the PDF


@register_figure(
    per="ablation value",
    stem="{name}/{name}_{value}_entropy_by_transition",
    title="Entropy by transition",
    caption=(
        "Entropy of the next token before the ablation minus after it, prompt by prompt, for each "
        "pair of sources before and after; the controls' means beside. Above 0 the ablation made the "
        "model surer."
    ),
    reads=lambda run, value: (partial(entropy_changes, run, value), run.display_name, value),
)
def entropy_by_transition(
    change_of_each: Callable[[], Sequence[EntropyChange]], model: str, value: str
) -> Drawing:
    """Entropy before - after for each of the nine transitions, beside the controls' means.

    Args:
        change_of_each: Computes the change of each transition, once the figure is drawn.
        model: Display name.
        value: Name of the ablation value.
    """
    changes = change_of_each()
    figure = Figure(figsize=(DOUBLE, 3.4))
    axes = figure.subplots()
    axes.set_title(f"{ablation_title(model, value)}: entropy by transition", loc="left", fontsize=9)
    axes.axhline(0.0, color="#222222", linewidth=0.8)
    found = [_draw_transition(axes, x, change) for x, change in enumerate(changes)]
    axes.set_xticks(
        range(len(changes)), [f"{c.before} → {c.after}\nn = {len(c.values):,}" for c in changes]
    )
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.6, len(changes) - 0.3)
    for x in range(1, len(changes)):
        if changes[x].before != changes[x - 1].before:
            axes.axvline(x - 0.45, color="#DDDDDD", linewidth=0.8)
    axes.set_xlabel("source before → after")
    axes.set_ylabel("entropy H, before − after (nats)\nabove 0: surer after ablation")
    axes.margins(y=0.08)
    handles: list[Any] = [
        Patch(facecolor="#DDDDDD", edgecolor="#555555", label="prompts: quartiles, 5 to 95 %"),
        Line2D([], [], color=RED, marker="o", linestyle="", markersize=4, label="entropy set's mean"),
    ]
    if any(change.controls.mean is not None for change in changes):
        label = "controls' means: mean, full range"
        handles.append(Line2D([], [], color=GREY, marker="D", markersize=3.4, label=label))
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    small = [
        "H: entropy of the next token at the last position of the prompt. Fewer than "
        f"{FEW} prompts, and prompts beyond the whiskers, are drawn one by one. A control's mean is "
        "over the prompts that make the transition under it."
    ]
    if all(change.controls.mean is None for change in changes):
        small.append("No control sets were run.")
    footnote(figure, small, 125)
    said = [
        f"{c.before} to {c.after}: {digits(entry['mean'], 3)} nats on average of {len(c.values)}"
        + ("" if c.controls.mean is None else f", controls {c.controls.mean:.3f}")
        for c, entry in zip(changes, found, strict=True)
    ]
    return Drawing(figure, {"transitions": found}, "; ".join(said) + ".")


def _draw_transition(axes: Axes, x: int, change: EntropyChange) -> dict[str, Any]:
    """Draw one column: prompts on the left, controls on the right."""
    values = change.values[np.isfinite(change.values)]
    box = boxplot_stats(values, whis=WHISKERS)[0] if len(values) >= FEW else None
    colour = COLOURS[change.before]
    if box is not None:
        draw_box(axes, box, x - 0.08, 0.42, colour, 0.45, showfliers=False)
    apart = values if box is None else box["fliers"]
    many = len(apart) > MANY_POINTS
    draw_dots(axes, x - 0.08, 0.3, apart, 5, c=colour, alpha=0.7, rasterized=many)
    if len(values):
        axes.plot(x + 0.2, values.mean(), "o", color=RED, markersize=4)
    else:
        words = "no finite\nvalue" if len(change.values) else "no\nprompt"
        at = axes.get_xaxis_transform()
        axes.text(x - 0.08, 0.02, words, transform=at, color="#444444", **ABOVE)
    controls = change.controls
    if controls.mean is not None and controls.low is not None and controls.high is not None:
        axes.vlines(x + 0.34, controls.low, controls.high, color=GREY, linewidth=1.6, alpha=0.5)
        axes.plot(x + 0.34, controls.mean, "D", color=GREY, markersize=3.4)
    return {
        "before": change.before,
        "after": change.after,
        "n": len(change.values),
        "finite": len(values),
        "mean": float(values.mean()) if len(values) else None,
        "box": None if box is None else {k: box[k] for k in ("whislo", "q1", "med", "q3", "whishi")},
        "values": values,
        "control_sets": change.control_sets,
        "controls": asdict(controls),
    }
