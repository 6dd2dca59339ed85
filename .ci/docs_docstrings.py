"""Extension of griffe: docstrings, written to be read as text, become Markdown for the API page."""

import re
from typing import Any

import griffe

REFERENCE = re.compile(r"\bMethod (1[0-3]|[1-9])\b")
PARAGRAPH = re.compile(r"\d+\. ")


class Docstrings(griffe.Extension):
    """Changes every docstring before it is parsed."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Change the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """Link `Method 8` to section 8 of the method page, and let numbered paragraphs be a list.

    Under `1. ` our lines go on after three spaces. Markdown wants four there, and an empty line before.
    """
    lines, inside = list[str](), False
    for line in REFERENCE.sub(r"[Method \1](method.md#section-\1)", text).split("\n"):
        if PARAGRAPH.match(line):
            lines += ["", line]
            inside = True
            continue
        inside = inside and (not line or line.startswith("   "))
        lines.append(" " + line if inside and line else line)
    return "\n".join(lines)
