"""Numbers as text, for the terminal, figures and reports."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

PAIRS = 3  # most pairs of nested objects that are named in a sentence
IN_BRACKETS = "In brackets: count/denominator; exact 95 % interval in percent."


def proportion(r: Mapping[str, Any]) -> str:
    """Write a ratio with count, denominator and 95 % interval: `12.3 % (37/300; 8.8-16.6)`."""
    if r["percent"] is None:
        return "- (0/0)"
    return f"{r['percent']:.1f} % ({r['count']}/{r['total']}; {r['low']:.1f}-{r['high']:.1f})"


def digits(value: float | None, places: int) -> str:
    """Write a number with a number of decimal places; a dash if there is none."""
    return "-" if value is None else f"{value:.{places}f}"


def number_in_words(n: int) -> str:
    """Write a small number in words, as running text has it.

    >>> number_in_words(5), number_in_words(13)
    ('five', '13')
    """
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    return words[n] if n < len(words) else str(n)


def extent(values: Sequence[float] | np.ndarray) -> str:
    """Write the smallest and the greatest number, three digits each; one number if they are alike.

    >>> extent([3.25, 1.0])
    '1 to 3.25'
    """
    finite = np.asarray(values, dtype=float)
    finite = finite[np.isfinite(finite)]
    if not len(finite):
        return "no number"
    low, high = f"{finite.min():.3g}", f"{finite.max():.3g}"
    return low if low == high else f"{low} to {high}"


def both_named(found: Mapping[str, Any], prompts: int, *, counter_first: bool) -> str:
    """Say at which prompts one object begins the other, so that an answer names both, and what counts.

    Args:
        found: `ccm.method.sources.NestedObjects`.
        prompts: How many prompts there are in all.
        counter_first: Whether, by the protocol, the counter-object counts where both are named.
    """
    pairs = [" / ".join(map(repr, pair)) for pair in found["pairs"]]
    examples = "; ".join(pairs[:PAIRS]) + ("; and others" if len(pairs) > PAIRS else "")
    counts = "the counter-object (CK)" if counter_first else "the longer object"
    matters = (
        f" That matters in the {found['counter_begins']:,} whose counter-object is the shorter: there "
        "the published rule never gives PK."
        if found["counter_begins"]
        else ""  # the longer object is CK, by either rule
    )
    return (
        f"In {found['prompts']:,} of {prompts:,} prompts one object begins the other (CK / PK: "
        f"{examples}). Where an answer names both, {counts} counts.{matters}"
    )


def mean_and_most(controls: Mapping[str, Any]) -> str:
    """Write the mean of the controls and the highest of them: `1.43 % (2.93 %)`."""
    mean, high = controls["mean"], controls["high"]
    return "-" if mean is None else f"{mean:.2f} % ({high:.2f} %)"
