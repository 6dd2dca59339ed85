"""Hook of mkdocs: `Method 8` in a docstring becomes a link to section 8 of the method page."""

import re
from typing import Any

REFERENCE = re.compile(r"\bMethod (1[0-3]|[1-9])\b")


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Link the references of the pages that mkdocstrings made."""
    if page.file.src_uri != "api.md":
        return html
    return REFERENCE.sub(r'<a href="method.html#section-\1">Method \1</a>', html)
