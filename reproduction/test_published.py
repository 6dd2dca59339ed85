"""The five published models against the printed numbers, under the released protocol.

Each test takes its rows of the comparison (`ccm.paper.comparison`); the report at the end of the
session holds all of them. An artefact (the list of defects in the README) need not agree.
"""

from collections.abc import Iterable

import pytest

from ccm.method.sources import SOURCES
from ccm.paper.claims import claims
from ccm.paper.comparison import Comparison
from ccm.paper.values import MEAN, NEURON_MEASURES, printed
from ccm.paper.verdicts import RULES, Row
from reproduction.complaints import complaints
from reproduction.pairs import Pair
from reproduction.runs import Run

pytestmark = pytest.mark.whole_runs


def rows_of(comparison: Comparison, value: str | None, *names: str) -> list[Row]:
    """The rows of one ablation value (None: before ablation) whose quantity starts with a name."""
    return [
        row for row in comparison.rows if row.ablation_value == value and row.quantity.startswith(names)
    ]


def check(rows: list[Row], expected: int) -> None:
    """Hold rows to their verdicts: how many, that they are sound, and that none is out."""
    # 2: shapes and types
    assert len(rows) == expected
    # 3: invariants
    for row in rows:
        assert row.rule in {rule.name for rule in RULES}
        if row.verdict != "not run":
            assert row.interval is not None
            assert row.margin is not None
            low, high = row.interval
            assert low <= row.margin <= high, f"margin outside its own interval: {row}"
            inside = low <= 0 <= high
            assert inside == row.verdict.startswith("agrees"), row
            assert (row.defect is not None) == (row.verdict not in ("agrees", "differs")), row
    # 4: values
    wrong = complaints(rows)
    assert not wrong, "\n".join(wrong)
    skip_unless_run(rows)


def skip_unless_run(rows: Iterable[Row]) -> None:
    """Skip where nothing could be compared."""
    reasons = [row.reason if row.verdict == "not run" else None for row in rows]
    if reasons and None not in reasons:
        pytest.skip(f"not run: {reasons[0]}")


printed_for_the_mean_only = pytest.mark.only(ablation_value=MEAN)


def test_neuron_measures(pair: Pair, comparison: Comparison) -> None:
    """LogitVar, norm and rho of the published neurons: a check of the weights alone."""
    rows = rows_of(comparison, None, "LogitVar", "norm", "rho")
    check(rows, len(NEURON_MEASURES) * len(printed(pair.model).neurons))


def test_selection_rule(pair: Pair, comparison: Comparison) -> None:
    """The rule finds the neurons that the authors picked by eye, most of them at least."""
    check(rows_of(comparison, None, "selected neurons"), 1)


def test_knowledge_sources(pair: Pair, comparison: Comparison) -> None:
    """Figure 5: how the prompts divide before ablation."""
    check(rows_of(comparison, None, "proportion of"), len(SOURCES))


@printed_for_the_mean_only
def test_transition_scores(pair: Pair, comparison: Comparison) -> None:
    """Table 5, and the counts behind it."""
    check(rows_of(comparison, pair.ablation_value, "TS", "count of"), 9 + 6)


@printed_for_the_mean_only
def test_conversion_ratios(pair: Pair, comparison: Comparison) -> None:
    """Figures 4b and 8: CR(CK), CR(PK), the true CR(ND), and the bar that was drawn for it."""
    check(rows_of(comparison, pair.ablation_value, "CR"), 4)


def test_global_transition_score(pair: Pair, comparison: Comparison) -> None:
    """Table 6."""
    check(rows_of(comparison, pair.ablation_value, "GTS"), 1)


def test_q_value(pair: Pair, comparison: Comparison) -> None:
    """Table 6: where the entropy set stands among 100 controls."""
    check(rows_of(comparison, pair.ablation_value, "Q"), 1)


@printed_for_the_mean_only
def test_claims_can_be_told(pair: Pair, run: Run, comparison: Comparison) -> None:
    """Whether a claim holds is a finding, for the report; that it is a yes or a no is tested."""
    told = claims(printed(pair.model), run.scores)
    assert tuple(told) == comparison.claims
    assert [c.name for c in told] == ["copying", "change", "ND to CK", "PK to CK"]
    before = {s: run.scores["sources"][s]["count"] for s in SOURCES}
    for claim in told:
        source = claim.name.removesuffix(" to CK")
        empty = source in before and before[source] == 0
        all_ck = claim.name == "copying" and before["CK"] == run.scores["n_prompts"]
        assert (claim.holds is None) == (empty or all_ck), f"{claim} [{pair.id}]"
