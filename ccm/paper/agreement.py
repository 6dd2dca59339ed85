"""Does a run agree with what was printed? Every quantity with its margin, interval and verdict; pure.

How two shares are compared. A run of ours and the run behind the paper are two samples of prompts: the
kept facts, and so the prompts, follow from what the model answers, and that moves with the library, the
device and the wording of the instruction. So counts are compared as two binomial samples, by Newcombe's
hybrid score interval of a difference of proportions (Newcombe 1998, method 10), made of the two Wilson
intervals. Why this one: the counts are small (0 to 37 of 32 to 10,000), where the Wald interval has no
width at 0 and Agresti and Caffo's four added prompts are a third of what is counted; it takes the half
ranks of Q-values; and it needs nothing that scipy does not have, which offers exact *tests* of two
proportions but no interval of their difference.

What the paper's rounding leaves open widens the interval: a run agrees if it does so with any value
that would be printed the same. Prompts of one fact resemble each other, which makes the interval too
narrow; both runs ask about the same facts, which makes it too wide. Neither is corrected for.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any, Literal

import pandas as pd
from scipy import stats

from ccm.method.sources import SOURCES, Source
from ccm.paper.printed import Printed
from ccm.paper.values import NEURON_MEASURES, CountRange, PrintedModel

Verdict = Literal["agrees", "differs", "differs, as expected", "agrees, though an artefact", "not run"]
# Of one comparison. Some 30 are made of a model, so one model in three will show a miss by chance.
CONFIDENCE = 0.99


@dataclass(frozen=True)
class Rule:
    """How one kind of quantity is compared, and why so."""

    name: str
    tolerance: float | None  # None: the interval of two proportions
    relative: bool
    reason: str


SHARE = Rule(
    "share",
    None,
    False,
    f"{CONFIDENCE:.0%} Newcombe interval of the difference of two shares, plus the printed rounding: "
    "both runs are samples of prompts",
)
RANK = Rule(
    "Q-value",
    None,
    False,
    f"{CONFIDENCE:.0%} Newcombe interval, Q percent of the controls on either side: Q estimates the "
    "share of random sets that change fewer prompts, and each run draws 100 of them; where the seed "
    "gives both the same sets, the margin is for ties, which a prompt more or less breaks",
)
LOGIT_VAR = Rule(
    "LogitVar",
    0.01,
    True,
    "1 % of the released value: a variance of float32 cosines over the vocabulary, of weights that "
    "another library folded and centred; another null space or another centring moves it by more",
)
NORM = Rule(
    "norm",
    0.001,
    True,
    "0.1 % of the released value: a norm takes one sum over d_model of the stored weights",
)
RHO = Rule(
    "rho",
    0.005,
    False,
    "0.005: where two singular values at the edge of the null space are close, another "
    "decomposition may swap their directions, and a neuron's rho moves in its third digit",
)
SELECTION = Rule(
    "selection",
    1 / 3,
    True,
    "two thirds of the released neurons: they were picked by eye from a scatter plot, and a threshold "
    "with a count redraws its edge, not its core",
)
RULES = (SHARE, RANK, LOGIT_VAR, NORM, RHO, SELECTION)
_MEASURE_RULES = dict(zip(NEURON_MEASURES, (LOGIT_VAR, NORM, RHO), strict=True))


@dataclass(frozen=True)
class Row:
    """One quantity: what was printed, what was found, and the verdict.

    `interval` holds the differences (ours - paper) that the tolerance leaves open: a row agrees if it
    holds 0.
    """

    model: str
    ablation_value: str | None  # None: before any ablation
    quantity: str
    source: str  # of the printed number
    rule: str  # name of the `Rule`
    unit: str  # "%", or "" for what has none
    paper: float
    paper_text: str
    ours: float | None
    ours_text: str
    margin: float | None  # ours - paper
    interval: tuple[float, float] | None
    verdict: Verdict
    defect: int | None = None
    # An artefact that no right run can show: the only ones that are held to differ.
    must_differ: bool = False
    reason: str = ""  # what made the artefact, or why there is nothing to compare

    def __str__(self) -> str:
        where = f"{self.model}, {self.ablation_value}" if self.ablation_value else self.model
        if self.interval is None:
            return f"{self.quantity}: {self.verdict}, {self.reason} [{where}]"
        low, high = self.interval
        return (
            f"{self.quantity}={self.ours_text}, printed {self.paper_text} ({self.source}); difference "
            f"{self.margin:+.4g} ({low:.4g} to {high:.4g}): {self.verdict} [{where}]"
        )


@dataclass(frozen=True)
class Found:
    """What a run measured of the quantities that the paper prints."""

    sources: Mapping[Source, int]  # prompts before ablation
    transition_counts: Mapping[str, Mapping[Source, Mapping[Source, int]]]  # by ablation value
    q_values: Mapping[str, float | None]  # by ablation value
    n_controls: int
    measures: pd.DataFrame | None = None  # by neuron: `NEURON_MEASURES`; None: not these weights
    selected: tuple[int, ...] | None = None  # by the selection rule; None: not these weights
    no_weights: str = "the published weights are not measured"

    @classmethod
    def of(cls, scores: Mapping[str, Any], **weights: Any) -> "Found":
        """Take what is compared from a run's scores; `weights` are the fields that they lack."""
        values = scores["ablations"]
        return cls(
            sources={s: scores["sources"][s]["count"] for s in SOURCES},
            transition_counts={v: r["entropy"]["transition_counts"] for v, r in values.items()},
            q_values={v: r["entropy"]["q_value"] for v, r in values.items()},
            n_controls=next(iter(values.values()))["controls"]["n"],
            **weights,
        )


# --- intervals --------------------------------------------------------------------------------------


def wilson(share: float, n: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval of a share (0 to 1) of n.

    In closed form and not scipy's, because half ranks and the ends of a rounded percentage are no whole
    counts; it gives scipy's numbers where they are.

    >>> [round(end, 4) for end in wilson(2 / 32, 32, 0.95)]
    [0.0173, 0.2015]
    """
    z2 = stats.norm.ppf((1 + confidence) / 2) ** 2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return float(max(0.0, centre - half)), float(min(1.0, centre + half))


def newcombe(
    share: float, n: float, other: float, m: float, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Newcombe's hybrid score interval of the difference share - other of two independent samples.

    Args:
        share: 0 to 1, of n.
        n: Size of the first sample.
        other: 0 to 1, of m.
        m: Size of the second sample.
        confidence: Of the interval.
    """
    low, high = wilson(share, n, confidence)
    other_low, other_high = wilson(other, m, confidence)
    difference = share - other
    return (
        difference - sqrt((share - low) ** 2 + (other_high - other) ** 2),
        difference + sqrt((high - share) ** 2 + (other - other_low) ** 2),
    )


def difference(share: float, n: float, paper: tuple[float, float], m: float) -> tuple[float, float]:
    """Differences share - paper that the samples leave open, for all shares the print may stand for.

    The interval's ends fall as the paper's share rises, so its two ends are enough.
    """
    low, high = (min(1.0, max(0.0, p)) for p in paper)
    return newcombe(share, n, high, m)[0], newcombe(share, n, low, m)[1]


def verdict(interval: tuple[float, float], defect: int | None) -> Verdict:
    """Name the outcome: does the interval hold 0, and was an artefact printed?"""
    agrees = interval[0] <= 0 <= interval[1]
    if defect is None:
        return "agrees" if agrees else "differs"
    return "agrees, though an artefact" if agrees else "differs, as expected"


# --- rows -------------------------------------------------------------------------------------------


def _not_run(
    model: str, value: str | None, quantity: str, rule: Rule, paper: Printed, text: str, reason: str
) -> Row:
    return Row(
        model, value, quantity, paper.source, rule.name, "", paper.value, text,
        None, "-", None, None, "not run", paper.defect, False, reason,
    )  # fmt: skip


def share_row(
    paper: PrintedModel,
    value: str | None,
    quantity: str,
    printed: Printed,
    of: float,
    ours: tuple[int, int] | None,
    *,
    paper_text: str = "",
    absent: str = "",
    must_differ: bool = False,
) -> Row:
    """Compare a share in percent.

    Args:
        paper: The model's printed numbers.
        value: Ablation value; None before ablation.
        quantity: Name of the row.
        printed: The share, percent.
        of: Its denominator in the paper.
        ours: Count and total; None where the run did not measure it.
        paper_text: Printed form; the percentage if not given.
        absent: Why `ours` is None.
        must_differ: Whether the print is an artefact that no right run shows.
    """
    text = paper_text or f"{printed.value:g} % of {of:g}"
    if ours is None or ours[1] == 0:
        reason = absent or "no prompt to take a share of"
        return _not_run(paper.model, value, quantity, SHARE, printed, text, reason)
    count, total = ours
    low, high = difference(count / total, total, (printed.low / 100, printed.high / 100), of)
    interval = (100 * low, 100 * high)
    percent = 100 * count / total
    return Row(
        model=paper.model,
        ablation_value=value,
        quantity=quantity,
        source=printed.source,
        rule=SHARE.name,
        unit="%",
        paper=printed.value,
        paper_text=text,
        ours=percent,
        ours_text=f"{percent:.3g} % ({count}/{total})",
        margin=percent - printed.value,
        interval=interval,
        verdict=verdict(interval, printed.defect),
        defect=printed.defect,
        must_differ=must_differ,
        reason=printed.reason or "",
    )


def source_rows(paper: PrintedModel, found: Found) -> list[Row]:
    """Shares of CK, ND and PK before ablation (Figure 5)."""
    total, n = paper.n_prompts, sum(found.sources.values())
    rows = []
    for s in SOURCES:
        count = paper.sources[s]
        # The drawing gives prompts; a share makes runs of different sizes comparable.
        share = _percent(CountRange(int(count.low), int(count.high), count.source), total)
        text = f"{share.value:.3g} % ({count.value:g}/{total:g})"
        ours = (found.sources[s], n)
        rows.append(share_row(paper, None, f"share of {s}", share, total, ours, paper_text=text))
    return rows


def _percent(count: CountRange, of: float) -> Printed:
    """Turn a range of counts into a percentage that may lie anywhere between its ends."""
    low, high = 100 * count.low / of, 100 * count.high / of
    return Printed((low + high) / 2, count.source, high - low)


def _count_text(count: CountRange, of: float) -> str:
    low, high = count.low, count.high
    return f"{low}/{of:g}" if low == high else f"{low} to {high}/{of:g}"


MEAN = "mean_ablation"  # the only ablation value with printed transition scores and conversion ratios


def transition_rows(paper: PrintedModel, found: Found, value: str = MEAN) -> list[Row]:
    """TS as printed (Table 5), and the counts reconstructed behind them; none but for the mean."""
    if value != MEAN:
        return []
    counts, absent = found.transition_counts.get(value), f"{value} is not in the run"
    rows = []
    for k in SOURCES:
        size = paper.sources[k].value
        for j in SOURCES:
            ours = None if counts is None else (counts[k][j], sum(counts[k].values()))
            why = absent if counts is None else f"no prompt was {k} before ablation"
            ts = paper.transition_scores["entropy"][k][j]
            rows.append(share_row(paper, value, f"TS({k}, {j})", ts, size, ours, absent=why))
            if j == k:
                continue
            count = paper.transition_counts[k][j]
            name, text = f"count of {k} to {j}", _count_text(count, size)
            share = _percent(count, size)
            rows.append(share_row(paper, value, name, share, size, ours, paper_text=text, absent=why))
    return rows


def conversion_rows(paper: PrintedModel, found: Found, value: str = MEAN) -> list[Row]:
    """CR(CK), CR(PK), CR(ND) as it must have been, and CR(ND) as printed; none but for the mean.

    Ours are taken from the transition counts, so that a run under the released protocol, which repeats
    defect 1 in its own CR(ND), is compared by what its prompts did.
    """
    if value != MEAN:
        return []
    counts = found.transition_counts.get(value)

    def ours(k: Source) -> tuple[int, int] | None:
        if counts is None:
            return None
        others = [counts[j] for j in SOURCES if j != k]
        return sum(row[k] for row in others), sum(sum(row.values()) for row in others)

    def row(k: Source, name: str, printed: Printed, **more: Any) -> Row:
        why = (
            f"{value} is not in the run" if counts is None else f"every prompt was {k} before ablation"
        )
        return share_row(paper, value, name, printed, paper.others(k), ours(k), absent=why, **more)

    ratios, true = paper.conversion_ratios["entropy"], paper.converted("ND")
    of, text = paper.others("ND"), _count_text(true, paper.others("ND"))
    return [
        row("CK", "CR(CK)", ratios["CK"]),
        row("PK", "CR(PK)", ratios["PK"]),
        row("ND", "CR(ND)", _percent(true, of), paper_text=text),
        row("ND", "CR(ND) as printed", ratios["ND"], must_differ=nd_bar_must_differ(paper)),
    ]


def nd_bar_must_differ(paper: PrintedModel) -> bool:
    """Whether a run with the paper's own conversions to ND is told apart from the printed ND bar.

    The bar is wrong for all five models: the reconstructed counts exclude it. But where both are a
    handful of prompts (2 for 3 to 6 of 10,000) two samples cannot show it, and a right run may well
    agree with the wrong bar. So a run is only held to differ where one with the paper's own counts
    would, at either end of their range: Phi-1.5 (7 to 9 prompts, printed 28) and Llama-3 (6 to 13,
    printed 37). Even there a wholly independent sample would agree by chance once in 5 to 10 times
    at the upper end; runs on the same facts are far from independent.
    """
    of, bar = paper.others("ND"), paper.conversion_ratios["entropy"]["ND"]
    true = paper.converted("ND")
    return all(
        verdict(difference(n / of, of, (bar.low / 100, bar.high / 100), of), bar.defect)
        == "differs, as expected"
        for n in (true.low, true.high)
    )


def gts_rows(paper: PrintedModel, found: Found, value: str) -> list[Row]:
    """GTS of one ablation value (Table 6).

    The rows of mu +- 3 sigma are reported and never held to differ: sigma or no sigma, the values are
    clipped to the least and the greatest activation seen, which is where the right one may end, too.
    And the released protocol follows that defect on purpose. GPT-2's mode row (defect 4) is held to
    differ: with finite modes no logit is NaN.
    """
    printed, counts = paper.gts[value], found.transition_counts.get(value)
    ours = None
    if counts is not None:
        total = sum(sum(row.values()) for row in counts.values())
        ours = (total - sum(counts[k][k] for k in SOURCES), total)
    return [
        share_row(
            paper,
            value,
            "GTS",
            printed,
            paper.n_prompts,
            ours,
            absent=f"{value} is not in the run",
            must_differ=printed.defect == 4,
        )
    ]


CONTROLS = 100  # of the paper's Q-values


def q_rows(paper: PrintedModel, found: Found, value: str) -> list[Row]:
    """Q-value of the entropy set among its controls, under one ablation value (Table 6)."""
    printed, q = paper.q_values[value], found.q_values.get(value)
    text = f"{printed.value:g}"
    if q is None:
        absent = value in found.q_values
        reason = "no controls were run" if absent else f"{value} is not in the run"
        return [_not_run(paper.model, value, "Q", RANK, printed, text, reason)]
    low, high = difference(q / 100, found.n_controls, (printed.low / 100, printed.high / 100), CONTROLS)
    interval = (100 * low, 100 * high)
    return [
        Row(
            paper.model, value, "Q", printed.source, RANK.name, "%", printed.value, text, q, f"{q:g}",
            q - printed.value, interval, verdict(interval, printed.defect), printed.defect,
            reason=printed.reason or "",
        )
    ]  # fmt: skip


def measure_row(paper: PrintedModel, neuron: int, name: str, printed: Printed, ours: float) -> Row:
    """Compare one measure of one published neuron with the released list."""
    rule = _MEASURE_RULES[name]
    assert rule.tolerance is not None
    slack = rule.tolerance * (abs(printed.value) if rule.relative else 1.0) + printed.resolution / 2
    margin = ours - printed.value
    interval = (margin - slack, margin + slack)
    return Row(
        paper.model, None, f"{rule.name}({neuron})", printed.source, rule.name, "", printed.value,
        f"{printed.value:.5g}", ours, f"{ours:.5g}", margin, interval,
        verdict(interval, printed.defect), printed.defect,
    )  # fmt: skip


def measure_rows(paper: PrintedModel, found: Found) -> list[Row]:
    """LogitVar, norm and rho of the published neurons, which need nothing but the weights."""
    rows = []
    for neuron in paper.neurons:
        for name in NEURON_MEASURES:
            printed: Printed = getattr(neuron, name)
            if found.measures is None:
                rule, text = _MEASURE_RULES[name], f"{printed.value:.5g}"
                quantity = f"{rule.name}({neuron.neuron})"
                row = _not_run(paper.model, None, quantity, rule, printed, text, found.no_weights)
            else:
                ours = float(found.measures.loc[neuron.neuron, name])
                row = measure_row(paper, neuron.neuron, name, printed, ours)
            rows.append(row)
    return rows


def selection_rows(paper: PrintedModel, found: Found) -> list[Row]:
    """How many of the published neurons the selection rule finds."""
    theirs = {n.neuron for n in paper.neurons}
    k = len(theirs)
    printed = Printed(k, paper.neurons[0].rho.source, 0)
    name, text = "selected neurons", f"{k} of {k}"
    if found.selected is None:
        return [_not_run(paper.model, None, name, SELECTION, printed, text, found.no_weights)]
    common = len(theirs & set(found.selected))
    assert SELECTION.tolerance is not None
    slack = SELECTION.tolerance * k
    interval = (common - k - slack, common - k + slack)
    return [
        Row(
            paper.model, None, name, printed.source, SELECTION.name, "", k, text, common,
            f"{common} of {k}", common - k, interval, verdict(interval, None),
        )
    ]  # fmt: skip


def compare(paper: PrintedModel, found: Found) -> list[Row]:
    """Every row of a model, in the order of the method."""
    rows = [*measure_rows(paper, found), *selection_rows(paper, found), *source_rows(paper, found)]
    rows += [*transition_rows(paper, found), *conversion_rows(paper, found)]
    for value in paper.gts:
        rows += [*gts_rows(paper, found, value), *q_rows(paper, found, value)]
    return rows


def complaints(rows: Iterable[Row]) -> list[str]:
    """What of a comparison is wrong: values that differ, and artefacts that ought to and do not."""
    return [
        str(row) + (f"; but it is an artefact (defect {row.defect})" if row.must_differ else "")
        for row in rows
        if row.verdict == "differs" or (row.must_differ and row.verdict == "agrees, though an artefact")
    ]
