"""Bars of proportions: the entropy set beside its controls, with exact intervals (Method 8)."""

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ccm.method.scores import ControlSummary, Ratio, summarise
from ccm.method.sources import Source
from ccm.paper.values import Printed
from ccm.reporting.figures.canvas import (
    ABOVE,
    COLOURS,
    GREY,
    HATCHES,
    SINGLE,
    Drawing,
    artefacts_in_words,
    draw_dots,
    draw_printed,
    footnote,
)
from ccm.reporting.text import IN_BRACKETS, proportion


@dataclass(frozen=True)
class Bar:
    """One quantity: the entropy set's, and that of every control set."""

    label: str
    colour_of: Source
    own: Ratio
    controls: tuple[float, ...]  # percent, one per control set; empty where `own` has no percent
    summary: ControlSummary
    empty: str  # what to say if the denominator is 0
    printed: Printed | None = None


def bar_of(
    label: str,
    colour_of: Source,
    own: Ratio,
    controls: Sequence[Ratio],
    empty: str,
    printed: Printed | None = None,
) -> Bar:
    """Make a bar.

    Args:
        label: What stands below it.
        colour_of: The source whose colour it has.
        own: The entropy set's proportion.
        controls: One for each control set.
        empty: What to say if the denominator is 0.
        printed: The paper's value.
    """
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
            axes.text(x, 0.04 * ceiling, words, **ABOVE)
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
        axes.text(at, bar.own.high + 0.015 * ceiling, words, **ABOVE)
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
        draw_dots(axes, x + 0.2, 0.26, bar.controls, 2.5, c="#555555", alpha=0.6)
        top = max(*bar.controls, bar.summary.mean + (bar.summary.three_standard_errors or 0.0), 0.0)
        words = f"{bar.summary.mean:.1f} %"
        axes.text(x + 0.2, top + 0.015 * ceiling, words, color="#444444", **ABOVE)
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
    """Describe every bar, with the mean of its controls."""
    said = []
    for bar in bars:
        if bar.own.percent is None:
            said.append(f"{bar.label}: {bar.empty}")
            continue
        mean = "" if bar.summary.mean is None else f", controls {bar.summary.mean:.1f} % on average"
        said.append(f"{bar.label}: {proportion(asdict(bar.own))}{mean}")
    return "; ".join(said) + ". " + IN_BRACKETS


def bar_chart(bars: Sequence[Bar], n_controls: int, title: str, xlabel: str, ylabel: str) -> Drawing:
    """Draw one panel of bars, with small print that explains them.

    Args:
        bars: From left to right.
        n_controls: How many control sets there are.
        title: Of the figure.
        xlabel: What the bars are.
        ylabel: What their height is, with its unit.
    """
    figure = Figure(figsize=(SINGLE, 2.9))
    axes = figure.subplots()
    figure.suptitle(title)
    _draw_bars(axes, bars)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    printed = [bar.printed for bar in bars]
    ring = "Ring: the paper's value." if any(p and p.defect is None for p in printed) else ""
    footnote(figure, [*_legend_lines(n_controls), ring, artefacts_in_words(printed)], 68)
    return Drawing(figure, {"bars": [asdict(bar) for bar in bars]}, _bars_in_words(bars))
