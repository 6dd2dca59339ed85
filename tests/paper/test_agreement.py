"""When a run agrees with the print: the interval, every tolerance on both sides, every verdict."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ccm.method.sources import SOURCES
from ccm.models.specs import PUBLISHED
from ccm.paper.agreement import (
    Found,
    compare,
    conversion_rows,
    gts_rows,
    measure_rows,
    nd_bar_must_differ,
    proportion_row,
    q_rows,
    selection_rows,
    source_rows,
    transition_rows,
)
from ccm.paper.intervals import CONFIDENCE, difference, newcombe, wilson
from ccm.paper.values import MEAN, NEURON_MEASURES, Printed, printed
from ccm.paper.verdicts import RULES, Row, verdict
from reproduction.complaints import complaints
from tests.published_run import Counts, found, measures, printed_counts, spread

GPT2 = "gpt2-small"

# --- intervals ----------------------------------------------------------------------------------------


@given(data=st.data(), n=st.integers(1, 20_000))
def test_wilson_is_scipys_where_counts_are_whole(data: st.DataObject, n: int) -> None:
    count = data.draw(st.integers(0, n), label="count")
    theirs = stats.binomtest(count, n).proportion_ci(CONFIDENCE, method="wilson")
    assert wilson(count / n, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


# Newcombe (1998), Statistics in Medicine 17, 873-890, Table II, method 10, 95 %.
@pytest.mark.parametrize(
    ("count", "n", "other", "m", "low", "high"),
    [
        (56, 70, 48, 80, 0.0524, 0.3339),
        (9, 10, 3, 10, 0.1705, 0.8090),
        (6, 7, 2, 7, 0.0582, 0.8062),
        (5, 56, 0, 29, -0.0381, 0.1926),
    ],
)
def test_newcombe_is_as_published(
    count: int, n: int, other: int, m: int, low: float, high: float
) -> None:
    assert newcombe(count / n, n, other / m, m, 0.95) == pytest.approx((low, high), abs=5e-5)


@given(a=st.floats(0, 1), n=st.integers(1, 10_000), b=st.floats(0, 1), m=st.integers(1, 10_000))
def test_newcombe_is_around_the_difference_and_turns_round(a: float, n: int, b: float, m: int) -> None:
    low, high = newcombe(a, n, b, m)
    assert -1 - 1e-9 <= low <= a - b <= high <= 1 + 1e-9
    assert newcombe(b, m, a, n) == pytest.approx((-high, -low), abs=1e-12)
    assert low < high, "no width, even where nothing was counted"


@pytest.mark.parametrize(
    ("p", "n", "m"), [(2 / 32, 32, 32), (0.3, 32, 60), (0.02, 101, 101), (0.033, 666, 500)]
)
def test_the_interval_covers_as_often_as_it_says(p: float, n: int, m: int) -> None:
    """Summed over every outcome of two equal proportions of the size the paper counts."""
    ours, theirs = (stats.binom.pmf(np.arange(k + 1), k, p) for k in (n, m))
    covered = 0.0
    for i in np.flatnonzero(ours > 1e-6):
        for j in np.flatnonzero(theirs > 1e-6):
            low, high = newcombe(i / n, n, j / m, m)
            covered += ours[i] * theirs[j] * (low <= 0 <= high)
    assert 0.985 <= covered <= 1.0, f"covers {covered:.4f}"


def test_rounding_widens_the_interval_at_both_ends() -> None:
    sharp, rounded = (
        difference(0.03, 600, (0.033, 0.033), 666),
        difference(0.03, 600, (0.0325, 0.0335), 666),
    )
    assert rounded[0] < sharp[0] < sharp[1] < rounded[1]
    # Nothing below 0 or above 1 can have been meant.
    assert difference(0.0, 600, (-0.0005, 0.0005), 666)[1] == newcombe(0.0, 600, 0.0, 666)[1]
    assert difference(1.0, 600, (0.9995, 1.0005), 666)[0] == newcombe(1.0, 600, 1.0, 666)[0]


@given(a=st.floats(0, 1), b=st.floats(0, 1), step=st.floats(0, 0.01))
def test_a_rounded_print_leaves_open_all_that_it_may_mean(a: float, b: float, step: float) -> None:
    low, high = difference(a, 500, (b, b + step), 666)
    for paper in (b, b + step / 3, b + step):
        one = newcombe(a, 500, min(1.0, paper), 666)
        assert low <= one[0] + 1e-12
        assert one[1] - 1e-12 <= high


@pytest.mark.parametrize(
    ("interval", "plain", "artefact"),
    [
        ((-1.0, 1.0), "agrees", "agrees, though an artefact"),
        ((0.0, 1.0), "agrees", "agrees, though an artefact"),
        ((-1.0, 0.0), "agrees", "agrees, though an artefact"),
        ((1e-9, 1.0), "differs", "differs, as expected"),
        ((-1.0, -1e-9), "differs", "differs, as expected"),
    ],
)
def test_verdicts(interval: tuple[float, float], plain: str, artefact: str) -> None:
    assert verdict(interval, None) == plain
    assert verdict(interval, 3) == artefact


# --- just inside, just outside ------------------------------------------------------------------------


def of_proportion(printed_proportion: Printed, of: float, count: int, total: int) -> str:
    row = proportion_row(printed(GPT2), None, "proportion", printed_proportion, of, (count, total))
    return row.verdict


# The count of the print, and the least and the greatest that agree with it, out of as many prompts.
@pytest.mark.parametrize(
    ("proportion", "of", "there", "least", "most"),
    [
        (printed(GPT2).gts[MEAN], 10684, 32, 11, 63),
        (printed(GPT2).transition_scores["entropy"]["ND"]["CK"], 666, 22, 8, 42),
        (printed(GPT2).conversion_ratios["entropy"]["CK"], 698, 22, 8, 42),
        (printed(GPT2).transition_scores["entropy"]["PK"]["ND"], 32, 2, 0, 10),
    ],
    ids=["GTS", "TS", "CR", "TS of few"],
)
def test_proportions(proportion: Printed, of: int, there: int, least: int, most: int) -> None:
    assert [of_proportion(proportion, of, n, of) for n in (there, least, most)] == ["agrees"] * 3
    assert of_proportion(proportion, of, most + 1, of) == "differs"
    if least:
        assert of_proportion(proportion, of, least - 1, of) == "differs"


@pytest.mark.parametrize(("q", "expected"), [(88.5, "agrees"), (88.0, "differs"), (100.0, "agrees")])
def test_q_of_98(q: float, expected: str) -> None:
    (row,) = q_rows(printed(GPT2), Found({}, {}, {MEAN: q}, 100), MEAN)
    assert (row.paper, row.ours, row.verdict) == (98.0, q, expected)


def test_q_of_half_ranks_on_both_sides() -> None:
    paper = printed("EleutherAI_pythia-1.4b")
    assert paper.q_values["mode_ablation"].value == 68.5
    verdicts = {}
    for q in (50.5, 51.0, 84.0, 84.5):
        (row,) = q_rows(paper, Found({}, {}, {"mode_ablation": q}, 100), "mode_ablation")
        verdicts[q] = row.verdict
    assert verdicts == {50.5: "differs", 51.0: "agrees", 84.0: "agrees", 84.5: "differs"}


@pytest.mark.parametrize("model", PUBLISHED)
@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("logit_var", (0.9901, 1.0099), (0.9899, 1.0101)),
        ("norm", (0.99901, 1.00099), (0.9989, 1.0011)),
        ("rho", (-0.00499, 0.00499), (-0.00501, 0.00501)),
    ],
)
def test_measures_of_the_published_neurons(
    model: str, name: str, inside: tuple[float, ...], outside: tuple[float, ...]
) -> None:
    paper = printed(model)
    for changes, expected in ((inside, "agrees"), (outside, "differs")):
        for change in changes:
            rows = measure_rows(paper, found(model, measures=measures(model, **{name: change})))
            assert len(rows) == 3 * len(paper.neurons)
            for row in rows:
                kind = dict(zip(("LogitVar", "norm", "rho"), NEURON_MEASURES, strict=True))[row.rule]
                assert row.verdict == (expected if kind == name else "agrees"), f"{change}: {row}"


@pytest.mark.parametrize(
    ("model", "enough"),
    [
        ("gpt2-small", 4),
        ("EleutherAI_pythia-1.4b", 6),
        ("Phi-1_5", 8),
        ("Mistral-7B-v0.1", 10),
        ("Meta-Llama-3-8B", 7),
    ],
)
def test_two_thirds_of_the_published_neurons_are_to_be_found(model: str, enough: int) -> None:
    neurons = [n.neuron for n in printed(model).neurons]
    others = [i for i in range(100) if i not in neurons]
    for common, expected in ((len(neurons), "agrees"), (enough, "agrees"), (enough - 1, "differs")):
        chosen = (*neurons[:common], *others[: len(neurons) - common])
        (row,) = selection_rows(printed(model), found(model, selected=chosen))
        assert (row.ours, row.verdict) == (common, expected)
        assert row.ours_text == f"{common} of {len(neurons)}"


# --- whole runs ---------------------------------------------------------------------------------------


def by_quantity(rows: list[Row]) -> dict[tuple[str | None, str], Row]:
    return {(row.ablation_value, row.quantity): row for row in rows}


@pytest.mark.parametrize("end", ["low", "high"])
@pytest.mark.parametrize("model", PUBLISHED)
def test_the_papers_own_run_agrees_with_the_paper(model: str, end: str) -> None:
    run = found(model)
    counts = {**run.transition_counts, MEAN: printed_counts(printed(model), end)}
    rows = compare(printed(model), replace(run, transition_counts=counts))
    assert complaints(rows) == []
    assert {r.verdict for r in rows if r.defect is None} == {"agrees"}
    assert {r.rule for r in rows} == {rule.name for rule in RULES}
    assert len(by_quantity(rows)) == len(rows) == 3 * len(printed(model).neurons) + 1 + 3 + 15 + 4 + 10
    for row in rows:
        assert row.interval is not None
        assert row.margin is not None
        assert row.interval[0] <= row.margin <= row.interval[1]


def test_artefacts_of_the_papers_own_run() -> None:
    """The bar that repeats PK differs where two samples can show it; the mode row always does."""
    bar = (MEAN, "CR(ND) as printed")
    for model in PUBLISHED:
        row = by_quantity(compare(printed(model), found(model)))[bar]
        must = model in ("Phi-1_5", "Meta-Llama-3-8B")
        assert row.must_differ == nd_bar_must_differ(printed(model)) == must, model
        expected = "differs, as expected" if must else "agrees, though an artefact"
        assert (row.defect, row.verdict) == (1, expected), model
    rows = by_quantity(compare(printed(GPT2), found(GPT2)))
    mode = rows[("mode_ablation", "GTS")]
    assert (mode.defect, mode.must_differ, mode.verdict) == (4, True, "differs, as expected")
    assert [r.quantity for r in rows.values() if r.must_differ] == ["GTS"]


def test_an_artefact_that_must_differ_and_does_not_is_a_complaint() -> None:
    paper = printed(GPT2)
    run = found(GPT2, transition_counts={"mode_ablation": spread(paper, round(0.938 * 10684))})
    (row,) = gts_rows(paper, run, "mode_ablation")
    assert row.verdict == "agrees, though an artefact"
    (complaint,) = complaints([row])
    assert complaint.endswith("; but it is an artefact (defect 4)")

    phi = printed("Phi-1_5")
    repeated = printed_counts(phi)
    repeated["CK"] |= {"ND": 20, "CK": 3768}  # 28 of 5,379, as the bar says
    repeated["PK"] |= {"ND": 8, "PK": 1564}
    rows = conversion_rows(phi, found("Phi-1_5", transition_counts={MEAN: repeated}))
    assert [r.verdict for r in rows[2:]] == ["differs", "agrees, though an artefact"]
    assert len(complaints(rows)) == 2


@pytest.mark.parametrize("value", ["mean_minus_sigma_ablation", "mean_plus_sigma_ablation"])
@pytest.mark.parametrize("changed", [0, 90, 9000])
def test_the_sigma_rows_are_never_held_to_anything(value: str, changed: int) -> None:
    paper = printed("Meta-Llama-3-8B")
    run = found(paper.model, transition_counts={value: spread(paper, changed)})
    (row,) = gts_rows(paper, run, value)
    assert (row.defect, row.must_differ) == (3, False)
    assert complaints([row]) == []
    expected = {"mean_minus_sigma_ablation": 90, "mean_plus_sigma_ablation": None}[value]
    agrees = changed == expected
    assert row.verdict == ("agrees, though an artefact" if agrees else "differs, as expected")


def test_a_run_that_differs_says_in_what() -> None:
    paper = printed(GPT2)
    wrong = printed_counts(paper)
    wrong["ND"] |= {"CK": 222, "ND": 442}
    rows = compare(paper, found(GPT2, transition_counts={MEAN: wrong}))
    out = {row.quantity for row in rows if row.verdict == "differs"}
    assert out == {"TS(ND, CK)", "TS(ND, ND)", "count of ND to CK", "CR(CK)", "GTS"}
    text = next(c for c in complaints(rows) if c.startswith("CR(CK)"))
    assert text.startswith("CR(CK)=31.8 % (222/698), printed 3.1519 % of 698 (Figures 4b and 8")
    assert text.endswith(": differs [gpt2-small, mean_ablation]")


def test_cr_nd_is_taken_from_what_prompts_did() -> None:
    """The released scoring would repeat CR(PK); the comparison counts conversions to ND itself."""
    rows = conversion_rows(printed("Phi-1_5"), found("Phi-1_5"))
    assert [row.quantity for row in rows] == ["CR(CK)", "CR(PK)", "CR(ND)", "CR(ND) as printed"]
    assert rows[2].ours == rows[3].ours == pytest.approx(100 * 7 / 5379)
    assert rows[1].ours == pytest.approx(100 * 26 / 4932)
    assert rows[2].paper_text == "7 to 9/5379"


# --- what did not run ---------------------------------------------------------------------------------


def test_other_weights_are_not_measured_against_the_published_ones() -> None:
    run = found(GPT2, measures=None, selected=None, no_weights="a stand-in")
    rows = [*measure_rows(printed(GPT2), run), *selection_rows(printed(GPT2), run)]
    assert {(r.verdict, r.reason, r.ours) for r in rows} == {("not run", "a stand-in", None)}
    assert len(rows) == 3 * 6 + 1
    assert complaints(rows) == []


def test_an_ablation_value_that_did_not_run() -> None:
    paper, run = printed(GPT2), found(GPT2, transition_counts={}, q_values={})
    rows = [*transition_rows(paper, run), *conversion_rows(paper, run)]
    for value in paper.gts:
        rows += [*gts_rows(paper, run, value), *q_rows(paper, run, value)]
    assert {row.verdict for row in rows} == {"not run"}
    assert {r.reason for r in rows} == {f"{value} is not in the run" for value in paper.gts}
    assert str(rows[0]) == (
        "TS(CK, CK): not run, mean_ablation is not in the run [gpt2-small, mean_ablation]"
    )


def test_no_prompt_to_take_a_proportion_of() -> None:
    paper = printed(GPT2)
    empty: Counts = {k: dict.fromkeys(SOURCES, 0) for k in SOURCES}
    empty["CK"]["CK"] = 60
    run = found(GPT2, transition_counts={MEAN: empty}, q_values={MEAN: None})
    reasons = {r.quantity: r.reason for r in transition_rows(paper, run) if r.verdict == "not run"}
    assert reasons["TS(PK, CK)"] == "no prompt was PK before ablation"
    assert "TS(CK, CK)" not in reasons
    (ck, *others) = conversion_rows(paper, run)
    assert (ck.verdict, ck.reason) == ("not run", "every prompt was CK before ablation")
    assert all(row.verdict != "not run" for row in others)
    (q,) = q_rows(paper, run, MEAN)
    assert (q.verdict, q.reason) == ("not run", "no controls were run")


def test_proportions_before_ablation_compare_runs_of_different_sizes() -> None:
    paper = printed("Mistral-7B-v0.1")
    half = {s: round(paper.sources[s].value / 2) for s in SOURCES}
    assert [r.verdict for r in source_rows(paper, found(paper.model, sources=half))] == ["agrees"] * 3
    swapped = {"CK": half["PK"], "PK": half["CK"], "ND": half["ND"]}
    rows = source_rows(paper, found(paper.model, sources=swapped))
    assert [r.verdict for r in rows] == ["differs", "agrees", "differs"]


def test_what_is_taken_of_a_runs_scores() -> None:
    table = printed_counts(printed(GPT2))
    scores = {
        "sources": {s: {"count": i} for i, s in enumerate(SOURCES)},
        "ablations": {
            MEAN: {"entropy": {"transition_counts": table, "q_value": 98.0}, "controls": {"n": 100}}
        },
    }
    run = Found.of(scores, no_weights="none")
    assert run == Found(
        dict(zip(SOURCES, (0, 1, 2), strict=True)), {MEAN: table}, {MEAN: 98.0}, 100, no_weights="none"
    )
