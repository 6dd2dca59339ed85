"""A tolerance report, read back: what a run's numbers were when held against the paper's.

`pytest -m gpu` writes it, `ccm report` shows it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ccm.errors import BadInput, allowed
from ccm.experiment.folder import read_json

JSON = "tolerance_report.json"
CLAIM_HEADER = ("claim (mean ablation)", "here", "as printed", "numbers")
ROW_HEADER = ("ablation value", "quantity", "paper", "ours", "margin", "interval", "verdict")
HOW_TO_READ = (
    "Margin: ours - printed. Interval: the differences that the tolerance leaves open; a row "
    "agrees if it holds 0. Percentages and their differences in percent and percentage points."
)


@dataclass(frozen=True)
class Held:
    """One model's part of a tolerance report, as texts."""

    what_ran: str
    identity: Mapping[str, Any]  # of the run that was held against the paper
    claims: tuple[tuple[str, ...], ...]  # rows under `CLAIM_HEADER`
    rows: tuple[tuple[str, ...], ...]  # rows under `ROW_HEADER`


def row_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """One compared quantity as texts, in the order of `ROW_HEADER`."""
    numbers = ("-", "-")
    if row["interval"] is not None and row["margin"] is not None:
        low, high = row["interval"]
        numbers = (f"{row['margin']:+.3g}", f"{low:.3g} to {high:.3g}")
    note = str(row["verdict"])
    if row["defect"] is not None:
        note += f" (defect {row['defect']}: {row['reason']})"
    elif row["reason"]:
        note += f" ({row['reason']})"
    value = row["ablation_value"] or "-"
    return (value, row["quantity"], row["paper_text"], row["ours_text"], *numbers, note)


def claim_cells(claim: Mapping[str, Any]) -> tuple[str, ...]:
    """One claim as texts, in the order of `CLAIM_HEADER`."""
    yes = {True: "yes", False: "no", None: "-"}
    statement = f"{claim['name']}: {claim['statement']}"
    return (statement, yes[claim["holds"]], yes[claim["as_printed"]], claim["detail"])


def read_held(path: Path) -> dict[str, Held]:
    """Read a tolerance report in JSON, by model.

    Raises:
        BadInput: no such file, or not a tolerance report.
    """
    if not path.is_file():
        raise BadInput(f"{path}: no such file. Give the {JSON} of a reproduction.")
    found = read_json(path)
    try:
        return {
            str(model["model"]): Held(
                what_ran=str(model["what_ran"]),
                identity=dict(model["provenance"]),
                claims=tuple(claim_cells(claim) for claim in model["claims"]),
                rows=tuple(row_cells(row) for row in model["rows"]),
            )
            for model in found["models"]
        }
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(
            f"{path}: not a tolerance report ({error!r}). Give the {JSON} of a reproduction."
        ) from error


def held_of(path: Path, models: list[str]) -> dict[str, Held]:
    """Read a tolerance report of at least one of some models.

    Raises:
        BadInput: as `read_held`, or it is of other models.
    """
    held = read_held(path)
    if not set(models) & held.keys():
        raise BadInput(
            f"{path}: holds no row of {', '.join(models)}. {allowed(held)}; give one of their runs."
        )
    return held
