"""Differences between two runs: exact tests, and intervals that respect which prompts belong together.

The three probing prompts of a fact share its subject, its relation and the model's own answer, so they
are not three independent observations. Intervals are bootstrapped over facts (Cameron, Gelbach & Miller
2008, section 2, pairs cluster bootstrap). Exact tests take prompts as independent, as McNemar's does.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

RESAMPLES, SEED = 2000, 0
CONFIDENCE = 0.95


def mcnemar(only_first: int, only_second: int) -> float:
    """Compute McNemar's exact two-sided p from how many prompts have a property in one run only.

    >>> mcnemar(0, 0), mcnemar(0, 6)
    (1.0, 0.03125)
    """
    n = only_first + only_second
    return float(stats.binomtest(only_first, n).pvalue) if n else 1.0


def fisher(first: int, of_first: int, second: int, of_second: int) -> float:
    """Compute Fisher's exact two-sided p for two proportions of different prompts.

    >>> round(fisher(0, 10, 5, 10), 4)
    0.0325
    """
    table = [[first, of_first - first], [second, of_second - second]]
    return float(stats.fisher_exact(table).pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """Adjust p-values for multiple tests (Holm 1979), which controls the family-wise error rate.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order, adjusted, least = np.argsort(p, kind="stable"), [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = least
    return adjusted


@dataclass(frozen=True)
class Clusters:
    """The fact of every prompt, and how often each fact is drawn in each resample."""

    of: Int[np.ndarray, "prompt"]
    draws: Int[np.ndarray, "resample cluster"]

    def means(
        self, values: Float[np.ndarray, "prompt quantity"]
    ) -> Float[np.ndarray, "resample quantity"]:
        """Compute the mean of every quantity over the prompts of each resample."""
        n = self.draws.shape[1]
        sums = np.stack([np.bincount(self.of, column, n) for column in values.T], axis=1)
        sizes = np.bincount(self.of, minlength=n)
        return np.asarray((self.draws @ sums) / (self.draws @ sizes)[:, None])


def clusters(facts: Sequence[Hashable], seed: int = SEED, resamples: int = RESAMPLES) -> Clusters:
    """Draw as many facts as there are, with replacement, for every resample.

    Args:
        facts: The fact of every prompt.
        seed: Seed of the draws; independent samples need different seeds.
        resamples: Number of resamples.
    """
    places = {fact: i for i, fact in enumerate(dict.fromkeys(facts))}
    random, n = np.random.default_rng(seed), len(places)
    draws = random.multinomial(n, np.full(n, 1 / n), size=resamples)
    return Clusters(np.asarray([places[fact] for fact in facts], dtype=np.int64), draws)


def interval(
    means: Float[np.ndarray, "resample quantity"],
) -> tuple[Float[np.ndarray, "quantity"], Float[np.ndarray, "quantity"]]:
    """Compute the percentile interval (95 %) of every quantity."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    return low, high
