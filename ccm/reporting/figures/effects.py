"""Total, direct and norm-only effects on the first token's entropy (Method 13)."""

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from ccm.experiment.results import RunResults
from ccm.method.ablation import CONTROL, MATCHED, kind_of
from ccm.method.scores import CONFIDENCE
from ccm.reporting.figures.canvas import (
    ABOVE,
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
from ccm.reporting.figures.registry import register_figure

COLUMNS = {
    "total": "total\n(what the ablation does)",
    "direct": "direct\n(the norm's scale held)",
    "through_norm": "through the norm\n(total − direct)",
    "norm_only": "norm only\n(the scale alone)",
}
# Kind of control: place in a column, colour, marker, word for it.
KINDS = {CONTROL: (-0.24, GREY, "o", "controls"), MATCHED: (0.24, MATCHED_COLOUR, "D", "matched")}


def _reads(run: RunResults, value: str) -> tuple[Any, ...]:
    of_sets = run.set_effects[run.set_effects["ablation_value"] == value]
    return run.effects[value], of_sets, run.display_name, value


@register_figure(
    per="ablation value",
    stem="{name}/{name}_{value}_effects",
    title="Total, direct and norm-only effect",
    caption=(
        "Entropy before the ablation minus after it: in all (total), with the final norm's scale as "
        "it was before (direct), and with the new scale alone (norm-only). What is total but not "
        "direct acts through the norm."
    ),
    reads=_reads,
)
def entropy_effects(
    effects: pd.DataFrame, set_effects: pd.DataFrame, model: str, value: str
) -> Drawing:
    """Mean change of entropy of the entropy set and both kinds of controls, total and by path.

    Args:
        effects: The entropy set's entropies, nats, one row per prompt: `entropy_plain`,
            `entropy_total`, `entropy_direct`, `entropy_norm_only`.
        set_effects: Mean changes (before - after, nats) of every set under this ablation value:
            `set`, `total`, `direct`, `norm_only`, `prompts`.
        model: Display name.
        value: Name of the ablation value.
    """
    figure = Figure(figsize=(DOUBLE, 3.3))
    axes = figure.subplots()
    title = f"{ablation_title(model, value)}: what acts on entropy through the norm"
    axes.set_ylabel("mean change of entropy,\nbefore − after (nats)")
    n = len(effects)
    data: dict[str, Any] = {"prompts": n, "entropy": {}, "sets": {}}
    if not n:
        figure.suptitle(title)
        explain_empty(axes, "There is no prompt.")
        return Drawing(figure, data)
    changes = {
        name: (effects["entropy_plain"] - effects[f"entropy_{name}"]).to_numpy(float)
        for name in ("total", "direct", "norm_only")
    }
    changes["through_norm"] = changes["total"] - changes["direct"]
    table = set_effects.assign(through_norm=set_effects["total"] - set_effects["direct"])
    kinds = table["set"].map(kind_of)
    for kind in KINDS:
        data["sets"][kind] = table.loc[kinds == kind, ["set", *COLUMNS]].to_dict("list")
    sampled = int(table["prompts"].max()) if len(table) else 0
    own = table.loc[table["set"] == "entropy", list(COLUMNS)]
    axes.axhline(0, color="#222222", linewidth=0.7)
    for x, name in enumerate(COLUMNS):
        data["entropy"][name] = _draw_own(axes, x, changes[name])
        for kind, (offset, colour, marker, _) in KINDS.items():
            means = data["sets"][kind][name]
            draw_dots(axes, x + offset, 0.2, means, 6, c=colour, marker=marker)
        if len(own) and sampled < n:
            axes.plot([x + 0.06], own[name], "o", markersize=4, color="none", markeredgecolor=RED)
    axes.set_xticks(range(len(COLUMNS)), list(COLUMNS.values()))
    axes.set_xlabel("effect")
    axes.set_xlim(-0.5, len(COLUMNS) - 0.5)
    axes.margins(y=0.12)
    axes.grid(axis="y")
    handles = [legend_dot(RED, "o", f"entropy set ({n:,} prompts)")]
    if len(own) and sampled < n:
        handles.append(legend_dot("none", "o", f"the same (the dots' {sampled:,} prompts)", edge=RED))
    for kind, (_, colour, marker, word) in KINDS.items():
        handles.append(legend_dot(colour, marker, f"{word} ({len(data['sets'][kind]['set']):,})"))
    titled_legend(figure, handles, title)
    lines = [
        "Of the next token at the last prompt position. Above 0: the ablation lowers entropy.",
        "Bars: 95 % interval of the mean over prompts."
        if n > 1
        else "One prompt: its mean has no interval.",
        "Dots: one set each, mean over "
        + ("the same prompts." if sampled == n else f"{sampled:,} of the prompts, evenly spaced."),
        _norm_words(data["entropy"]),
    ]
    footnote(figure, [" ".join(lines)], 140)
    return Drawing(figure, data, lines[-1])


def _draw_own(axes: Axes, x: int, changes: Float[np.ndarray, "prompt"]) -> dict[str, float | None]:
    """Draw the entropy set's mean change with its interval (Student's t)."""
    n, mean = len(changes), float(changes.mean())
    half = None
    if n > 1:
        error = float(changes.std(ddof=1)) / n**0.5
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * error
    axes.errorbar([x], [mean], yerr=half, fmt="o", color=RED, markersize=4, capsize=2.5, elinewidth=1.1)
    words, top = f"{mean:+.3f}".replace("-", "−"), (x, mean + (half or 0.0))
    axes.annotate(words, top, (0, 4), textcoords="offset points", color=RED, **ABOVE)
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return {"mean": mean, "low": low, "high": high}


def _norm_words(own: dict[str, dict[str, float | None]]) -> str:
    """Write the entropy set's total effect as the sum of its two parts."""
    names = ("total", "direct", "through_norm")
    total, direct, norm = (f"{own[name]['mean']:+.3f}".replace("-", "−") for name in names)
    return f"Entropy set: {total} nats in total, {direct} of them directly and {norm} through the norm."
