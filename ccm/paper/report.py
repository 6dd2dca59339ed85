"""The tolerance report: every comparison of a session with the paper, as Markdown and as JSON."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from ccm.experiment.folder import to_json, write_atomically, write_json
from ccm.paper.agreement import RULES, Row, Verdict
from ccm.paper.claims import Claim
from ccm.paper.held import CLAIM_HEADER, HOW_TO_READ, JSON, ROW_HEADER, claim_cells, row_cells

MARKDOWN = "tolerance_report.md"


@dataclass(frozen=True)
class Comparison:
    """One model's run held against the paper."""

    model: str
    display_name: str
    what_ran: str  # prompts, device, dtype; a rehearsal says so
    provenance: dict[str, Any]
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...]


def to_text(comparison: Comparison) -> str:
    """Serialise a comparison, to send it from one process to another."""
    return to_json(comparison)


def from_text(text: str) -> Comparison:
    """Read back what `to_text` wrote."""
    held = json.loads(text)
    for row in held["rows"]:
        row["interval"] = None if row["interval"] is None else tuple(row["interval"])
    rows, told = (Row(**r) for r in held.pop("rows")), (Claim(**c) for c in held.pop("claims"))
    return Comparison(**held, rows=tuple(rows), claims=tuple(told))


def verdict_counts(rows: Sequence[Row]) -> str:
    """Count the verdicts: `31 x agrees; 2 x differs`."""
    counts = Counter(r.verdict for r in rows)
    return "; ".join(f"{counts[v]} x {v}" for v in get_args(Verdict) if counts[v])


def claims_line(claims: Sequence[Claim]) -> str:
    """Say of each claim whether it holds: `copying no, change yes, PK to CK cannot be told`."""
    words = {True: "yes", False: "no", None: "cannot be told"}
    said = [f"{claim.name} {words[claim.holds]}" for claim in claims]
    return ", ".join(said) or "cannot be told without mean ablation"


def one_line(comparison: Comparison) -> str:
    """Sum up a model in a line, for the terminal and the head of the report."""
    what = f"{comparison.model} ({comparison.what_ran}): {verdict_counts(comparison.rows)}."
    return f"{what} Claims: {claims_line(comparison.claims)}."


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines]


def markdown(comparisons: Sequence[Comparison]) -> str:
    """Write the report: a line a model, then per model its claims and every row, then the rules."""
    lines = ["# Held against the paper", ""]
    lines += [f"- {one_line(c)}" for c in comparisons]
    lines += [
        "",
        HOW_TO_READ,
    ]
    for c in comparisons:
        told = [claim_cells(asdict(k)) for k in c.claims]
        lines += ["", f"## {c.display_name}", "", *_table(CLAIM_HEADER, told), ""]
        lines += _table(ROW_HEADER, [row_cells(asdict(r)) for r in c.rows])
    lines += ["", "## Tolerances", ""]
    lines += [f"- **{rule.name}**: {rule.reason}." for rule in RULES]
    return "\n".join(lines) + "\n"


def write(comparisons: Sequence[Comparison], folder: Path) -> list[Path]:
    """Write the report in both forms.

    Returns:
        Their paths.
    """
    paths = [folder / MARKDOWN, folder / JSON]
    write_atomically(paths[0], lambda p: p.write_text(markdown(comparisons), encoding="utf-8"))
    write_json(paths[1], {"models": list(comparisons), "tolerances": list(RULES)})
    return paths
