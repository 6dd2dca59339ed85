"""Tables as LaTeX that compiles by itself and as Markdown, and numbers as texts."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from ccm.experiment.writing import write_formats
from ccm.method.scores import Ratio
from ccm.paper.markdown import escape_markdown, markdown_table
from ccm.reporting.markup import T1_ONLY, escape_latex

WRAPPED = 6.0  # cm, width of a column of running text
DASH = "–"  # where there is no number
LINE = 0.41  # cm, height of a line of a table in 9 pt
LINES = 400  # at most on a page: TeX knows no length above 575 cm


@dataclass(frozen=True)
class Table:
    """One table: texts for people, and the numbers behind them."""

    stem: str
    caption: str
    texts: pd.DataFrame  # for LaTeX, Markdown and HTML
    data: pd.DataFrame  # numbers in full, for CSV
    wide: tuple[str, ...] = ()  # columns of running text, which must wrap


def latex(table: Table) -> str:
    """Return a whole LaTeX document whose page is as large as the table; a long one takes several.

    It needs nothing but base LaTeX and booktabs. T1 fonts are used only where a letter needs them,
    because some installations have them only as bitmaps.
    """
    columns = [str(c) for c in table.texts.columns]
    widths = {c: max([len(c), *(len(str(v)) for v in table.texts[c])]) for c in columns}
    spec = "".join(
        rf">{{\raggedright\arraybackslash}}p{{{WRAPPED}cm}}"
        if c in table.wide
        else "l"
        if i < 2
        else "r"
        for i, c in enumerate(columns)
    )
    # In cm, a little too large: at 9 pt a letter is 0.16 wide, an escaped one more; a line is 0.4 high.
    wide = max(
        12.0, 2.5 + sum(WRAPPED + 0.5 if c in table.wide else 0.18 * widths[c] + 0.45 for c in columns)
    )
    lines_of = [
        max([1, *(1 + len(escape_latex(str(row[columns.index(c)]))) // 30 for c in table.wide)])
        for row in table.texts.itertuples(index=False)
    ]
    pages: list[list[int]] = [[]]
    for i, n in enumerate(lines_of):
        if pages[-1] and sum(lines_of[j] for j in pages[-1]) + n > LINES:
            pages.append([])
        pages[-1].append(i)
    most = max(sum(lines_of[i] for i in page) for page in pages)
    high = 3.5 + LINE * (most + 0.18 * len(table.caption) / wide)
    head = " & ".join(escape_latex(c) for c in columns) + r" \\"
    body = [
        " & ".join(escape_latex(str(v)) for v in row) + r" \\"
        for row in table.texts.itertuples(index=False)
    ]
    caption = escape_latex(table.caption)
    needs_t1 = any(letter in line for line in [caption, head, *body] for letter in T1_ONLY)
    lines = [
        r"\documentclass{article}",
        *([r"\usepackage[T1]{fontenc}"] if needs_t1 else []),
        r"\usepackage{array,booktabs}",
        rf"\usepackage[paperwidth={wide:.1f}cm,paperheight={high:.1f}cm,margin=1cm]{{geometry}}",
        r"\pagestyle{empty}",
        r"\begin{document}",
        r"\small",
    ]
    for page in pages:
        lines += [
            rf"\noindent {caption}\par\medskip",
            rf"\noindent\begin{{tabular}}{{@{{}}{spec}@{{}}}}",
            r"\toprule",
            head,
            r"\midrule",
            *(body[i] for i in page),
            r"\bottomrule",
            r"\end{tabular}",
            r"\newpage" if page is not pages[-1] else r"\end{document}",
        ]
    return "\n".join(lines) + "\n"


def markdown(table: Table) -> str:
    """Return the caption and a table in GitHub's Markdown."""
    texts = markdown_table([str(c) for c in table.texts.columns], table.texts.itertuples(index=False))
    return f"{escape_markdown(table.caption)}\n\n{texts}\n"


def save_table(table: Table, stem: Path) -> list[Path]:
    """Write a table as .tex, .csv and .md, at a path without its suffix; returns the three paths."""
    texts = {
        "tex": latex(table),
        "csv": table.data.to_csv(index=False, lineterminator="\n"),
        "md": markdown(table),
    }
    # As bytes: no system translates the ends of lines.
    writers = {kind: partial(Path.write_bytes, data=text.encode()) for kind, text in texts.items()}
    return write_formats(stem, writers)


def percent_of(r: Mapping[str, Any]) -> str:
    """Write a ratio of scores.json with its interval; a dash if its denominator is 0."""
    if r["percent"] is None:
        return DASH
    return f"{r['percent']:.1f} [{r['low']:.1f}, {r['high']:.1f}]"


def with_count(own: Ratio) -> str:
    """Write a ratio with its count and interval; a dash if its denominator is 0."""
    if own.percent is None:
        return DASH
    return f"{own.percent:.1f} ({own.count}/{own.total}) [{own.low:.1f}, {own.high:.1f}]"


def mean_of(control: Mapping[str, Any]) -> str:
    """Write the controls' mean, with 3 standard errors if there are at least two controls."""
    mean, error = control["mean"], control["three_standard_errors"]
    if mean is None:
        return DASH
    return f"{mean:.1f}" if error is None else f"{mean:.1f} ± {error:.1f}"


def nats(value: float | None) -> str:
    """Write an entropy in nats with three decimal places.

    >>> nats(-0.25), nats(-0.0001), nats(None)
    ('−0.250', '0.000', '–')
    """
    return DASH if value is None else f"{round(value, 3) + 0.0:.3f}".replace("-", "−")


def between(low: str, high: str) -> str:
    """Write a range; a dash if either end is missing."""
    return DASH if DASH in (low, high) else f"{low} to {high}"
