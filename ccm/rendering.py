"""One table as people read it: LaTeX that compiles alone, or Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from ccm.markup import T1_ONLY, escape_latex, escape_markdown

WRAPPED = 6.0  # cm, of a column of running text


@dataclass(frozen=True)
class Table:
    """One table: what people read, and the numbers behind it."""

    stem: str
    caption: str
    shown: pd.DataFrame  # texts, for LaTeX and Markdown
    data: pd.DataFrame  # numbers in full, for CSV
    wide: tuple[str, ...] = ()  # columns of running text, which must wrap


def latex(table: Table) -> str:
    """Return a document of its own: booktabs, a page as large as the table.

    Nothing beyond LaTeX's base and booktabs is asked for. T1 fonts, of which some installations have
    only bitmaps, are used where a letter needs them.
    """
    columns = [str(c) for c in table.shown.columns]
    widths = {c: max([len(c), *(len(str(v)) for v in table.shown[c])]) for c in columns}
    spec = "".join(
        rf">{{\raggedright\arraybackslash}}p{{{WRAPPED}cm}}"
        if c in table.wide
        else "l"
        if i < 2
        else "r"
        for i, c in enumerate(columns)
    )
    # In cm, on the safe side: at 9 pt a letter is 0.16 wide, an escaped one more, and a line 0.4 high.
    wide = max(
        12.0, 2.5 + sum(WRAPPED + 0.5 if c in table.wide else 0.18 * widths[c] + 0.45 for c in columns)
    )
    lines_of = [
        max([1, *(1 + len(escape_latex(str(row[columns.index(c)]))) // 30 for c in table.wide)])
        for row in table.shown.itertuples(index=False)
    ]
    high = 3.5 + 0.41 * (sum(lines_of) + 0.18 * len(table.caption) / wide)
    head = " & ".join(escape_latex(c) for c in columns) + r" \\"
    body = [
        " & ".join(escape_latex(str(v)) for v in row) + r" \\"
        for row in table.shown.itertuples(index=False)
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
        rf"\noindent {caption}\par\medskip",
        rf"\noindent\begin{{tabular}}{{@{{}}{spec}@{{}}}}",
        r"\toprule",
        head,
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{document}",
    ]
    return "\n".join(lines) + "\n"


def markdown(table: Table) -> str:
    """Return the caption and a table in GitHub's Markdown."""

    def row(cells: Sequence[object]) -> str:
        return "| " + " | ".join(escape_markdown(str(c)) for c in cells) + " |"

    columns = [str(c) for c in table.shown.columns]
    body = [row(list(cells)) for cells in table.shown.itertuples(index=False)]
    head = [row(columns), "|" + "|".join([" --- "] * len(columns)) + "|"]
    return "\n".join([escape_markdown(table.caption), "", *head, *body]) + "\n"
