"""Intervals of proportions, and of the difference of two; pure.

A run of ours and the run behind the paper are two samples of prompts: the kept facts, and so the
prompts, follow from what the model answers, and that changes with the library, the device and the
wording of the instruction. So counts are compared as two binomial samples, by Newcombe's hybrid score
interval of a difference of proportions (Newcombe 1998, method 10), made of the two Wilson intervals.
Why this one: the counts are small (0 to 37 of 32 to 10,000), where the Wald interval has no width at 0
and Agresti and Caffo's four added prompts are a third of what is counted; it takes the half ranks of
Q-values; and it needs nothing beyond scipy, which offers exact *tests* of two proportions but no
interval of their difference.

What the paper's rounding leaves open widens the interval: a run agrees if it agrees with any value that
would be printed the same. Prompts of one fact resemble each other, which makes the interval too narrow;
both runs ask about the same facts, which makes it too wide. Neither is corrected for.
"""

from math import sqrt

from scipy import stats

from ccm.paper.values import Number

# Of one comparison. Each model takes some 30 of them, so one model in three will show a miss by chance.
CONFIDENCE = 0.99


def wilson(p: float, n: Number, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Compute Wilson's score interval of a proportion p (0 to 1) of n.

    In closed form and not scipy's, because half ranks and the ends of a rounded percentage are not
    whole counts; for whole counts the two agree.

    >>> tuple(round(end, 4) for end in wilson(2 / 32, 32, 0.95))
    (0.0173, 0.2015)
    """
    z2 = stats.norm.ppf((1 + confidence) / 2) ** 2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return float(max(0.0, centre - half)), float(min(1.0, centre + half))


def newcombe(
    p: float, n: Number, other: float, m: Number, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Compute Newcombe's hybrid score interval of the difference p - other of two samples.

    Args:
        p: Proportion of the first sample, 0 to 1.
        n: Size of the first sample.
        other: Proportion of the second, independent sample, 0 to 1.
        m: Size of the second sample.
        confidence: Confidence of the interval, 0 to 1.
    """
    low, high = wilson(p, n, confidence)
    other_low, other_high = wilson(other, m, confidence)
    difference = p - other
    return (
        difference - sqrt((p - low) ** 2 + (other_high - other) ** 2),
        difference + sqrt((high - p) ** 2 + (other - other_low) ** 2),
    )


def difference(p: float, n: Number, paper: tuple[float, float], m: Number) -> tuple[float, float]:
    """Compute the interval of p - paper, over all proportions that round to the printed one.

    The interval's ends fall as the paper's proportion rises, so the two extreme ones are enough.
    """
    low, high = (min(1.0, max(0.0, end)) for end in paper)
    return newcombe(p, n, high, m)[0], newcombe(p, n, low, m)[1]
