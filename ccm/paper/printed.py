"""What the paper printed about its five models, as far as figures lay it beside a run.

`printed.json` is taken from `golden/paper/`, which holds everything that was printed but does not come
with an installation; a test holds the two together.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FILE = Path(__file__).parent / "printed.json"


@dataclass(frozen=True)
class Printed:
    """One number of the paper, with where it stands and how finely it can be read there."""

    value: float | int  # as typed into the file
    source: str  # table, figure or released file
    resolution: float | int  # step between two values that can be told apart; 0: exact
    defect: int | None = None  # number in the list of defects: the value is an artefact, no result
    reason: str | None = None  # what made the artefact

    @property
    def low(self) -> float:
        """The least value that would be printed like this."""
        return self.value - self.resolution / 2

    @property
    def high(self) -> float:
        """The greatest value that would be printed like this."""
        return self.value + self.resolution / 2


@cache
def _shares() -> Mapping[str, Mapping[str, Mapping[str, Printed]]]:
    """Read the file: model, quantity, ablation value."""
    return {
        model: {
            quantity: {value: Printed(**entry) for value, entry in entries.items()}
            for quantity, entries in quantities.items()
        }
        for model, quantities in json.loads(FILE.read_text(encoding="utf-8")).items()
    }


def printed_share(model: str, value: str, quantity: str) -> Printed | None:
    """Look up a share of prompts that was printed for the entropy set, percent.

    Args:
        model: Name of the model.
        value: Name of the ablation value.
        quantity: GTS, CR(CK), CR(ND) or CR(PK).

    Returns:
        The number; None where the paper has none: conversion ratios are printed for mean ablation only.

    >>> printed_share("gpt2-small", "mode_ablation", "GTS").defect
    4
    """
    return _shares().get(model, {}).get(quantity, {}).get(value)
