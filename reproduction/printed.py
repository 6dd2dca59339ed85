"""What the paper printed, as typed into `golden/paper/`; no command ever updates these files."""

import json
from typing import Any

from reproduction.goldens import GOLDEN


def printed(name: str) -> dict[str, Any]:
    """Numbers of one table or figure, by model."""
    text = (GOLDEN / "paper" / f"{name}.json").read_text(encoding="utf-8")
    models: dict[str, Any] = json.loads(text)["models"]
    return models
