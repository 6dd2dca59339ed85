"""Numbers in words: the same forms on the terminal, under figures and in reports."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

IN_BRACKETS = "In brackets: count/denominator; exact 95 % interval in percent."


def share(r: Mapping[str, Any]) -> str:
    """`12.3 % (37/300; 8.8-16.6)`: percent, count, denominator and 95 % interval."""
    if r["percent"] is None:
        return "- (0/0)"
    return f"{r['percent']:.1f} % ({r['count']}/{r['total']}; {r['low']:.1f}-{r['high']:.1f})"


def digits(value: float | None, places: int) -> str:
    """A number with so many decimal places; a dash where there is none."""
    return "-" if value is None else f"{value:.{places}f}"


def extent(values: Sequence[float] | np.ndarray) -> str:
    """`1.2 to 3.4`, three digits each; the one number where all are alike.

    >>> extent([3.25, 1.0])
    '1 to 3.25'
    """
    finite = np.asarray(values, dtype=float)
    finite = finite[np.isfinite(finite)]
    if not len(finite):
        return "no number"
    low, high = f"{finite.min():.3g}", f"{finite.max():.3g}"
    return low if low == high else f"{low} to {high}"


def listed(words: Sequence[str]) -> str:
    """Join words as people do.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def mean_and_most(controls: Mapping[str, Any]) -> str:
    """`1.43 % (2.93 %)`: the mean of the controls and the highest of them."""
    mean, high = controls["mean"], controls["high"]
    return "-" if mean is None else f"{mean:.2f} % ({high:.2f} %)"
