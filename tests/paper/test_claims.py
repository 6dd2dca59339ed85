"""The paper's claims about a run, just true and just not, and the report they end up in."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ccm.models.specs import PUBLISHED
from ccm.paper.claims import Claim, claims
from ccm.paper.comparison import ROW_HEADER, Comparison
from ccm.paper.report import claims_line, markdown, one_line, verdict_counts, write
from ccm.paper.values import MEAN, printed
from ccm.paper.verdicts import RULES, Row


def scores(
    *,
    ck: float | None = 5.0,
    below: int = 100,
    q: float | None = 98.0,
    nd: float | None = 3.0,
    pk: float | None = 1.0,
    n: int = 100,
) -> dict[str, Any]:
    """Scores of a run: the entropy set's CR(CK) is above that of `below` of n controls."""
    controls = [{"conversion_ratios": {"CK": 1.0 if i < below else 5.0}} for i in range(n)]
    mean = {"mean": 1.5 if n else None, "three_standard_errors": 0.5 if n else None}
    own = {"ND": {"CK": {"percent": nd}}, "PK": {"CK": {"percent": pk}}}
    return {
        "ablations": {
            MEAN: {
                "entropy": {
                    "conversion_ratios": {"CK": {"percent": ck}},
                    "q_value": q,
                    "transition_scores": own,
                },
                "controls": {
                    "sets": controls,
                    "transition_scores": {"ND": {"CK": mean}, "PK": {"CK": mean}},
                },
            }
        }
    }


def told(model: str = "gpt2-small", **changed: Any) -> dict[str, bool | None]:
    return {c.name: c.holds for c in claims(printed(model), scores(**changed))}


@pytest.mark.parametrize(
    ("changed", "claim", "holds"),
    [
        ({"below": 95}, "copying", True),
        ({"below": 94}, "copying", False),  # the other six are as high: above means above
        ({"ck": None}, "copying", None),
        ({"q": 95.0}, "change", True),
        ({"q": 94.5}, "change", False),
        ({"q": None}, "change", None),
        ({"nd": 2.001}, "ND to CK", True),
        ({"nd": 2.0}, "ND to CK", False),
        ({"nd": None}, "ND to CK", None),
        ({"pk": 2.001}, "PK to CK", True),
        ({"pk": 2.0}, "PK to CK", False),
        ({"n": 0, "below": 0}, "copying", None),
        ({"n": 0, "below": 0}, "PK to CK", None),
    ],
)
def test_claims_at_their_edges(changed: dict[str, Any], claim: str, holds: bool | None) -> None:
    assert told(**changed)[claim] is holds


def test_what_the_paper_itself_prints_bears_out() -> None:
    held = {
        model: [c.name for c in claims(printed(model), scores()) if c.as_printed] for model in PUBLISHED
    }
    assert held == {
        "gpt2-small": ["change", "ND to CK"],
        "EleutherAI_pythia-1.4b": ["ND to CK"],
        "Phi-1_5": ["change", "ND to CK", "PK to CK"],
        "Mistral-7B-v0.1": ["PK to CK"],
        "Meta-Llama-3-8B": ["change", "ND to CK"],
    }


def test_the_numbers_behind_a_claim() -> None:
    copying, change, shift, _ = claims(printed("gpt2-small"), scores(below=96))
    assert copying.detail == "CR(CK) 5 %, above 96 of 100 controls (highest 5 %)"
    assert copying.as_printed is None
    assert change.detail == "Q 98"
    assert shift.detail == "TS 3 %, controls 1.5 + 0.5 %"
    assert claims(printed("gpt2-small"), {"ablations": {}}) == []


# --- the report ---------------------------------------------------------------------------------------

AGREES = Row(
    "gpt2-small", MEAN, "GTS", "Table 6", "proportion", "%", 0.3, "0.3 % of 10684", 0.29,
    "0.29 % (31/10684)", -0.01, (-0.25, 0.21), "agrees",
)  # fmt: skip
BAR = replace(
    AGREES,
    quantity="CR(ND) as printed",
    verdict="differs, as expected",
    defect=1,
    reason="drawn | twice",
)
ABSENT = replace(
    AGREES, ours=None, ours_text="-", margin=None, interval=None, verdict="not run", reason="no run"
)


def comparison(**changed: Any) -> Comparison:
    found = tuple(claims(printed("gpt2-small"), scores(q=90.0, pk=None)))
    given = Comparison(
        "gpt2-small", "GPT2-small", "60 prompts, cpu", {"seed": 123}, (AGREES, BAR, ABSENT), found
    )
    return replace(given, **changed)


def test_one_line_per_model() -> None:
    assert one_line(comparison()) == (
        "gpt2-small (60 prompts, cpu): 1 x agrees; 1 x differs, as expected; 1 x not run. "
        "Claims: copying yes, change no, ND to CK yes, PK to CK cannot be told."
    )
    assert verdict_counts([AGREES, replace(AGREES, verdict="differs"), AGREES]) == (
        "2 x agrees; 1 x differs"
    )
    assert claims_line([]) == "cannot be told without mean ablation"
    assert claims_line([Claim("change", "", True, "", None)]) == "change yes"


def test_markdown() -> None:
    lines = markdown([comparison(), comparison(model="Phi-1_5", display_name="Phi-1.5")]).splitlines()
    assert lines[2].startswith("- gpt2-small (60 prompts, cpu): ")
    assert lines[3].startswith(r"- Phi-1\_5 ")
    headings = [line for line in lines if line.startswith("## ")]
    assert headings == ["## GPT2-small", "## Phi-1.5", "## Tolerances"]
    tables = [line for line in lines if line.startswith("|")]
    assert "| " + " | ".join(ROW_HEADER) + " |" in tables
    cells = (r"mean\_ablation", "GTS", "0.3 % of 10684", "0.29 % (31/10684)", "-0.01", "-0.25 to 0.21")
    assert "| " + " | ".join([*cells, "agrees"]) + " |" in tables
    (bar,) = {line for line in tables if "as printed |" in line and "CR(ND)" in line}
    assert bar.endswith("differs, as expected (defect 1: drawn \\| twice) |")
    (absent,) = {line for line in tables if "no run" in line}
    assert absent.endswith("| - | - | - | not run (no run) |")
    assert lines[-len(RULES) :] == [f"- **{rule.name}**: {rule.reason}." for rule in RULES]


def test_both_forms_are_written_and_written_over(tmp_path: Path) -> None:
    (tmp_path / "tolerance_report.md").write_text("old")
    text, data = write([comparison()], tmp_path)
    assert text.read_text(encoding="utf-8") == markdown([comparison()])
    held = json.loads(data.read_text(encoding="utf-8"))
    (model,) = held["models"]
    assert [row["verdict"] for row in model["rows"]] == ["agrees", "differs, as expected", "not run"]
    assert model["rows"][0]["interval"] == [-0.25, 0.21]
    assert [c["holds"] for c in model["claims"]] == [True, False, True, None]
    assert model["provenance"] == {"seed": 123}
    assert [rule["name"] for rule in held["tolerances"]] == [rule.name for rule in RULES]
