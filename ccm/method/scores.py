"""Transition counts, scores, conversion ratios, Q-values, with counts and intervals (Method 8)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from ccm.method.sources import SOURCES, Source

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Ratio:
    """A proportion: its count and total, and its exact (Clopper-Pearson) 95 % interval, percent.

    If `total` is 0, `percent`, `low` and `high` are None.
    """

    count: int
    total: int
    percent: float | None
    low: float | None
    high: float | None


@lru_cache(maxsize=1 << 16)  # controls repeat each other, and an exact interval takes a millisecond
def ratio(count: int, total: int) -> Ratio:
    """Return `count` of `total` in percent, with its interval.

    >>> ratio(2, 32).percent, round(ratio(2, 32).high, 1)
    (6.25, 20.8)
    """
    count, total = int(count), int(total)
    if total == 0:
        return Ratio(0, 0, None, None, None)
    interval = stats.binomtest(count, total).proportion_ci(CONFIDENCE, method="exact")
    return Ratio(count, total, 100 * count / total, 100 * interval.low, 100 * interval.high)


def transition_counts(
    before: Sequence[Source], after: Sequence[Source]
) -> Int[np.ndarray, "from=3 to=3"]:
    """Count prompts by source before (rows) and after (columns), in the order of `SOURCES`."""
    return np.bincount(_transitions(before, after), minlength=9).reshape(3, 3)


def _transitions(before: Sequence[Source], after: Sequence[Source]) -> Int[np.ndarray, "prompt"]:
    """Number each prompt's transition: 3 times its source before, plus its source after."""
    place = {source: i for i, source in enumerate(SOURCES)}
    pairs = (3 * place[b] + place[a] for b, a in zip(before, after, strict=True))
    return np.fromiter(pairs, dtype=np.int64)


def transition_scores(counts: Int[np.ndarray, "3 3"]) -> Float[np.ndarray, "3 3"]:
    """Compute TS(K, K2): counts in percent of their row's total; NaN in a row without prompts."""
    totals = counts.sum(1, keepdims=True)
    scores = np.full(counts.shape, np.nan)
    np.divide(100.0 * counts, totals, out=scores, where=totals > 0)
    return scores


def global_transition_score(counts: Int[np.ndarray, "3 3"]) -> Ratio:
    """Compute GTS, the proportion of prompts whose source changed."""
    total = int(counts.sum())
    return ratio(total - int(np.trace(counts)), total)


def conversion_ratio(
    counts: Int[np.ndarray, "3 3"], source: Source, *, released: bool = False
) -> Ratio:
    """Compute CR(K): among prompts that were not K, the proportion that is K afterwards.

    Args:
        counts: Transition counts.
        source: K.
        released: Give CR(PK) for ND, as the released scoring does (defect 1).
    """
    if released and source == "ND":
        source = "PK"
    k = SOURCES.index(source)
    others = np.delete(counts, k, axis=0)
    return ratio(int(others[:, k].sum()), int(others.sum()))


def q_value(invariant: float, control_invariants: Sequence[float]) -> float:
    """Compute Q: 100 - percentile rank of the entropy set among the controls, by unchanged sources.

    Args:
        invariant: Proportion of prompts whose source the entropy set did not change, 0 to 1.
        control_invariants: The same for each control.

    Returns:
        0 to 100; tied values have the mean of their ranks.
    """
    rank = stats.percentileofscore(np.asarray(control_invariants), invariant, kind="rank")
    return float(min(100.0, max(0.0, 100.0 - rank)))  # the rank is rounded


def quantile(value: float, control_values: Float[np.ndarray, "control"]) -> float | None:
    """Rank a value among the controls', as a percentile; None if either is undefined.

    Args:
        value: Of the entropy set.
        control_values: Of each control; NaN is left out.

    Returns:
        0 to 100; tied values have the mean of their ranks.
    """
    values = control_values[np.isfinite(control_values)]
    if not len(values) or not np.isfinite(value):
        return None
    return float(stats.percentileofscore(values, value, kind="rank"))


def permutation_p(changed: int, control_changed: Sequence[int]) -> float:
    """Compute the one-sided p = (1 + controls with GTS >= the entropy set's) / (1 + controls).

    All sets are run on the same prompts, so the counts of changed prompts compare exactly as GTS does.

    Args:
        changed: Prompts whose source the entropy set changed.
        control_changed: The same for each control.
    """
    at_least = sum(c >= changed for c in control_changed)
    return (1 + at_least) / (1 + len(control_changed))


@dataclass(frozen=True)
class ControlSummary:
    """One quantity over all controls, percent."""

    mean: float | None
    three_standard_errors: float | None
    low: float | None  # smallest and largest control
    high: float | None
    entropy_quantile: float | None  # percentile rank of the entropy set among the controls


def summarise(value: float, control_values: Sequence[float]) -> ControlSummary:
    """Compute mean, 3 x standard error and range of the controls, and the entropy set's rank.

    Args:
        value: Of the entropy set, percent.
        control_values: Of each control, percent. NaN (a row without prompts) is left out; such a
            value is NaN for every set alike.
    """
    values = np.asarray(control_values, dtype=np.float64)
    finite = values[np.isfinite(values)]
    if not len(finite):
        return ControlSummary(None, None, None, None, None)
    error = 3 * float(finite.std(ddof=1)) / np.sqrt(len(finite)) if len(finite) > 1 else None
    return ControlSummary(
        mean=float(finite.mean()),
        three_standard_errors=None if error is None else float(error),
        low=float(finite.min()),
        high=float(finite.max()),
        entropy_quantile=quantile(value, values),
    )


def mean_by_transition(
    before: Sequence[Source], after: Sequence[Source], values: Float[np.ndarray, "prompt"]
) -> dict[Source, dict[Source, float | None]]:
    """Average a per-prompt quantity over the prompts of each transition.

    Args:
        before: Source of each prompt before the ablation.
        after: Source of each prompt after it.
        values: The quantity, one number per prompt.

    Returns:
        Means by source before and source after; None if no prompt made the transition.
    """
    pairs = _transitions(before, after)

    def mean(pair: int) -> float | None:
        chosen = values[pairs == pair]
        return float(chosen.mean()) if len(chosen) else None

    return {k: {k2: mean(3 * i + j) for j, k2 in enumerate(SOURCES)} for i, k in enumerate(SOURCES)}
