"""The paper's claims, each as a statement about one run that is true or false; pure.

All are about mean ablation. "As printed" is the same statement about the paper's own numbers, where it
prints what the statement needs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ccm.method.sources import Source
from ccm.paper.values import MEAN, PrintedModel

MOST = 95  # percent of the controls: one random set in twenty may do as much


@dataclass(frozen=True)
class Claim:
    """One claim about one model, and whether it holds."""

    name: str
    statement: str
    holds: bool | None  # None: the run cannot tell
    detail: str  # the numbers
    as_printed: bool | None  # None: the paper does not print the numbers needed


def _copying(result: Mapping[str, Any]) -> Claim:
    own = result["entropy"]["conversion_ratios"]["CK"]["percent"]
    sets = [s["conversion_ratios"]["CK"] for s in result["controls"]["sets"]]
    controls = [c for c in sets if c is not None]
    holds, detail = None, "nothing to compare"
    if own is not None and controls:
        below = sum(c < own for c in controls)
        holds = 100 * below >= MOST * len(controls)
        extent = "all" if below == len(controls) else f"{below} of {len(controls)}"
        detail = f"CR(CK) {own:.3g} %, above {extent} controls (highest {max(controls):.3g} %)"
    return Claim(
        "copying",
        f"CR(CK) of the entropy set is above that of at least {MOST} % of the controls",
        holds,
        detail,
        None,  # only the controls' mean is printed
    )


def _change(paper: PrintedModel, result: Mapping[str, Any]) -> Claim:
    q = result["entropy"]["q_value"]
    return Claim(
        "change",
        f"the entropy set's GTS has a Q-value of at least {MOST}",
        None if q is None else q >= MOST,
        "nothing to compare" if q is None else f"Q {q:g}",
        paper.q_values[MEAN].value >= MOST,
    )


def _shift(paper: PrintedModel, result: Mapping[str, Any], source: Source) -> Claim:
    own = result["entropy"]["transition_scores"][source]["CK"]["percent"]
    summary = result["controls"]["transition_scores"][source]["CK"]
    mean, error = summary["mean"], summary["three_standard_errors"]
    holds, detail = None, f"no prompt was {source} before ablation, or no controls"
    if own is not None and mean is not None and error is not None:
        holds = own > mean + error
        detail = f"TS {own:.3g} %, controls {mean:.3g} + {error:.3g} %"
    printed = {name: table[source]["CK"].value for name, table in paper.transition_scores.items()}
    return Claim(
        f"{source} to CK",
        f"TS({source}, CK) of the entropy set is above the controls' mean by more than 3 of their "
        "standard errors",
        holds,
        detail,
        printed["entropy"] > printed["random_mean"] + printed["random_3se"],
    )


def claims(paper: PrintedModel, scores: Mapping[str, Any]) -> list[Claim]:
    """Judge every claim by the scores of a run; an empty list if it has no mean ablation."""
    result = scores["ablations"].get(MEAN)
    if result is None:
        return []
    return [
        _copying(result),
        _change(paper, result),
        _shift(paper, result, "ND"),
        _shift(paper, result, "PK"),
    ]
