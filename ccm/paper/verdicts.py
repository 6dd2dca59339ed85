"""One compared quantity: the rule it is compared by, its margin, its interval and the verdict; pure."""

from dataclasses import dataclass
from typing import Literal

from ccm.paper.intervals import CONFIDENCE
from ccm.paper.values import NEURON_MEASURES, Number, Printed

Verdict = Literal["agrees", "differs", "differs, as expected", "agrees, though an artefact", "not run"]
Interval = tuple[Number, Number]


@dataclass(frozen=True)
class Rule:
    """How one kind of quantity is compared, and why so."""

    name: str
    unit: str  # "%", or "" for what has none
    tolerance: float | None  # None: the interval of two proportions
    relative: bool
    reason: str

    def allowed(self, printed: Number) -> float:
        """Return how far a value may be from a printed one."""
        return (self.tolerance or 0.0) * (abs(printed) if self.relative else 1.0)


PROPORTION = Rule(
    "proportion",
    "%",
    None,
    False,
    f"{CONFIDENCE:.0%} Newcombe interval of the difference of two proportions, plus the printed "
    "rounding: both runs are samples of prompts",
)
RANK = Rule(
    "Q-value",
    "%",
    None,
    False,
    f"{CONFIDENCE:.0%} Newcombe interval, Q percent of the controls on either side: Q estimates the "
    "proportion of random sets that change fewer prompts, and each run draws 100 of them; where the "
    "seed gives both the same sets, the margin is for ties, which one prompt more or less breaks",
)
LOGIT_VAR = Rule(
    "LogitVar",
    "",
    0.01,
    True,
    "1 % of the released value: a variance of float32 cosines over the vocabulary, of weights that "
    "another library folded and centred; another null space or another centring moves it by more",
)
NORM = Rule(
    "norm",
    "",
    0.001,
    True,
    "0.1 % of the released value: a norm takes one sum over d_model of the stored weights",
)
RHO = Rule(
    "rho",
    "",
    0.005,
    False,
    "0.005: where two singular values at the edge of the null space are close, another "
    "decomposition may swap their directions, and the rho of a neuron moves in its third digit",
)
SELECTION = Rule(
    "selection",
    "",
    1 / 3,
    True,
    "two thirds of the released neurons: they were picked by eye from a scatter plot, and a threshold "
    "with a count redraws its edge, not its core",
)
RULES = (PROPORTION, RANK, LOGIT_VAR, NORM, RHO, SELECTION)
MEASURE_RULES = dict(zip(NEURON_MEASURES, (LOGIT_VAR, NORM, RHO), strict=True))


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
    unit: str  # of the numbers: "%", or "" for what has none
    paper: Number
    paper_text: str
    ours: Number | None
    ours_text: str
    margin: Number | None  # ours - paper
    interval: Interval | None
    verdict: Verdict
    defect: int | None = None
    # An artefact that no correct run can show: only such rows are required to differ.
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


def verdict(interval: Interval, defect: int | None) -> Verdict:
    """Name the outcome: does the interval hold 0, and was an artefact printed?"""
    agrees = interval[0] <= 0 <= interval[1]
    if defect is None:
        return "agrees" if agrees else "differs"
    return "agrees, though an artefact" if agrees else "differs, as expected"


@dataclass(frozen=True)
class Quantity:
    """One printed quantity, on its way to becoming a row."""

    model: str
    ablation_value: str | None  # None: before any ablation
    name: str
    rule: Rule
    printed: Printed
    text: str  # of the printed value

    def compared(
        self, ours: Number, text: str, interval: Interval, *, must_differ: bool = False
    ) -> Row:
        """Make the row of what a run found.

        Args:
            ours: What it found, in the unit of the rule.
            text: The same, for people.
            interval: Differences (ours - paper) that the tolerance leaves open.
            must_differ: Whether the printed value is an artefact that no correct run shows.
        """
        paper = self.printed
        return Row(
            self.model, self.ablation_value, self.name, paper.source, self.rule.name, self.rule.unit,
            paper.value, self.text, ours, text, ours - paper.value, interval,
            verdict(interval, paper.defect), paper.defect, must_differ, paper.reason or "",
        )  # fmt: skip

    def not_run(self, reason: str) -> Row:
        """Make the row of a run that did not measure it."""
        paper = self.printed
        return Row(
            self.model, self.ablation_value, self.name, paper.source, self.rule.name, self.rule.unit,
            paper.value, self.text, None, "-", None, None, "not run", paper.defect, False, reason,
        )  # fmt: skip
