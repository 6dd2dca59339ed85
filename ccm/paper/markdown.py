"""Any text as Markdown, and rows as a table of GitHub's Markdown."""

from collections.abc import Iterable, Sequence


def escape_markdown(text: str) -> str:
    r"""Make any text safe for a cell of a Markdown table.

    >>> escape_markdown("a_b | c")
    'a\\_b \\| c'
    """
    for char in "\\|*_`<>[]$":
        text = text.replace(char, "\\" + char)
    return " ".join(text.split())


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    r"""Write a table; every cell is escaped.

    >>> print(markdown_table(["set", "GTS"], [["a_b", 1.5]]))
    | set | GTS |
    | --- | --- |
    | a\_b | 1.5 |
    """

    def line(cells: Iterable[object]) -> str:
        return "| " + " | ".join(escape_markdown(str(cell)) for cell in cells) + " |"

    return "\n".join([line(header), "|" + " --- |" * len(header), *map(line, rows)])
