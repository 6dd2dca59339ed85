"""Tables read back into cells, from each form they are shown in, and shown numbers in words."""

import re
from dataclasses import dataclass
from html.parser import HTMLParser

from tests.counted import Others, Part

LABELS = {
    "mean_ablation": "mean (μ)",
    "median_ablation": "median",
    "mode_ablation": "mode",
    "mean_minus_sigma_ablation": "μ − 3σ",
    "mean_plus_sigma_ablation": "μ + 3σ",
}
Rows = list[dict[str, str]]  # column -> text

# What LaTeX has for a letter, longest first where one begins with another.
_LATEX = {
    r"\textbackslash{}": "\\",
    r"\textasciitilde{}": "~",
    r"\textasciicircum{}": "^",
    r"\textless{}": "<",
    r"\textgreater{}": ">",
    r"\textbar{}": "|",
    r"\char36{}": "$",
    r"$\pm$": "±",
    r"$\rightarrow$": "→",
    r"$\mu$": "μ",
    r"$\sigma$": "σ",
    r"$\rho$": "ρ",
    "$-$": "−",
    "{-}": "-",
    "{[}": "[",
    "{]}": "]",
    "{*}": "*",
    "{`}": "`",
    "''": '"',
    "--": "–",
    "\\": "",
}


def _unlatex(text: str) -> str:
    pattern = "|".join(re.escape(command) for command in _LATEX)
    return re.sub(pattern, lambda match: _LATEX[match[0]], text.strip())


def from_latex(text: str) -> Rows:
    """Rows of all pages of a document's table."""
    found: Rows = []
    for page in text.split(r"\toprule")[1:]:
        head, _, rest = page.partition(r"\midrule")
        columns, *rows = (
            [_unlatex(cell) for cell in re.split(r"(?<!\\)&", line.strip().removesuffix(r"\\"))]
            for line in [head, *rest.partition(r"\bottomrule")[0].strip().splitlines()]
        )
        found += [dict(zip(columns, row, strict=True)) for row in rows]
    return found


def from_markdown(text: str) -> list[Rows]:
    """Rows of every table of a text, in their order."""
    found: list[Rows] = []
    for block in re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE):
        columns, rule, *rows = ([_cell(c) for c in _cells(line)] for line in block.splitlines())
        assert set(rule) == {"---"}, block
        found.append([dict(zip(columns, row, strict=True)) for row in rows])
    return found


def _cells(line: str) -> list[str]:
    return re.split(r"(?<!\\)\|", line)[1:-1]


def _cell(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text.strip())


@dataclass
class HtmlTable:
    """One table of a page."""

    caption: str
    rows: Rows


class _Tables(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[tuple[list[str], list[list[str]]]] = []  # captions, lines
        self.place: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "table":
            self.tables.append(([], []))
        elif tag == "tr":
            self.tables[-1][1].append([])
        elif tag in ("caption", "th", "td"):
            captions, lines = self.tables[-1]
            self.place = captions if tag == "caption" else lines[-1]
            self.place.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("caption", "th", "td"):
            self.place = None

    def handle_data(self, data: str) -> None:
        if self.place is not None:
            self.place[-1] += data


def from_html(text: str) -> list[HtmlTable]:
    """Every table of a page, in their order."""
    return [
        HtmlTable(
            " ".join(" ".join(captions).split()),
            [dict(zip(columns, row, strict=True)) for row in rows],
        )
        for captions, (columns, *rows) in _Tables(text).tables
    ]


def in_words(r: Part) -> str:
    """A proportion with its count and interval."""
    if r.percent is None:
        return "- (0/0)"
    return f"{r.percent:.1f} % ({r.count}/{r.total}; {r.low:.1f}-{r.high:.1f})"


def mean_and_highest(c: Others) -> str:
    """What controls come to."""
    return "-" if c.mean is None else f"{c.mean:.2f} % ({c.high:.2f} %)"
