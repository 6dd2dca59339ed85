"""The tolerance report: finished runs compared with the paper, written and read back.

`ccm compare` writes it, as Markdown for people and as JSON for `ccm report`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from ccm.errors import BadInput, allowed
from ccm.experiment.files import read_json, write_json
from ccm.experiment.folder import locked_for
from ccm.experiment.results import RunResults
from ccm.experiment.writing import write_atomically
from ccm.paper.claims import Claim
from ccm.paper.comparison import CLAIM_HEADER, ROW_HEADER, Comparison, comparison_of
from ccm.paper.markdown import escape_markdown, markdown_table
from ccm.paper.values import printed_models
from ccm.paper.verdicts import RULES, Row, Verdict

JSON, MARKDOWN = "tolerance_report.json", "tolerance_report.md"
HOW_TO_READ = (
    "Margin: ours - printed. Interval: the differences that the tolerance leaves open; a row "
    "agrees if it holds 0. Percentages and their differences in percent and percentage points."
)


def compare_with_paper(runs: Sequence[RunResults], out: Path) -> tuple[list[Comparison], list[Path]]:
    """Compare finished runs with the paper and write the tolerance report.

    Args:
        runs: Runs of published models, one per model.
        out: The folder: `tolerance_report.md` and `tolerance_report.json` are made in it.

    Returns:
        The comparisons, in the order of the runs, and the paths written.

    Raises:
        BadInput: a model that the paper printed nothing of, or two runs of one model.
        InUse: another process is writing there.
    """
    comparisons = comparisons_of(runs)
    with locked_for(out):
        return comparisons, write(comparisons, out)


def comparisons_of(runs: Sequence[RunResults]) -> list[Comparison]:
    """Compare finished runs with the paper, one per model.

    Raises:
        BadInput: a model that the paper printed nothing of, or two runs of one model.
    """
    check_comparable(runs)
    return [comparison_of(run) for run in runs]


def is_printed(runs: Sequence[RunResults]) -> bool:
    """Return whether runs can be compared with the paper: of models that it printed, each once."""
    models = [run.model for run in runs]
    return set(models) <= set(printed_models()) and len(set(models)) == len(models)


def check_comparable(runs: Sequence[RunResults]) -> None:
    """Check that the paper printed numbers of every run's model, and that there is one run per model.

    Raises:
        BadInput: a model that the paper printed nothing of, or two runs of one model.
    """
    seen: dict[str, RunResults] = {}
    for run in runs:
        if run.model not in printed_models():
            raise BadInput(
                f"{run.path}: a run of {run.model}, of which the paper printed nothing. "
                f"{allowed(printed_models())}; give a run of one of these."
            )
        if run.model in seen:
            raise BadInput(
                f"{run.path}: a run of {run.model}, as {seen[run.model].path} is. A report holds one "
                "run per model: compare the other one into a folder of its own (--out)."
            )
        seen[run.model] = run


# --- summed up ---------------------------------------------------------------------------------------


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
    """Sum up one model in a line, for the terminal and the head of the report."""
    what = f"{comparison.model} ({comparison.what_ran}): {verdict_counts(comparison.rows)}."
    return f"{what} Claims: {claims_line(comparison.claims)}."


# --- written -----------------------------------------------------------------------------------------


def markdown(comparisons: Sequence[Comparison]) -> str:
    """Write the report: one line per model, then the claims and rows of each, then the rules."""
    lines = ["# Held against the paper", ""]
    lines += [f"- {escape_markdown(one_line(c))}" for c in comparisons]
    lines += ["", HOW_TO_READ]
    for c in comparisons:
        lines += ["", f"## {escape_markdown(c.display_name)}"]
        lines += ["", markdown_table(CLAIM_HEADER, c.claim_cells)]
        lines += ["", markdown_table(ROW_HEADER, c.row_cells)]
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


# --- read back ---------------------------------------------------------------------------------------


def read_comparison(entry: Mapping[str, Any]) -> Comparison:
    """Make a comparison of its JSON."""
    intervals = [row["interval"] for row in entry["rows"]]
    rows = (
        Row(**{**row, "interval": None if interval is None else (interval[0], interval[1])})
        for row, interval in zip(entry["rows"], intervals, strict=True)
    )
    told = (Claim(**claim) for claim in entry["claims"])
    return Comparison(**{**entry, "rows": tuple(rows), "claims": tuple(told)})


def read_report(path: Path, models: Sequence[str] | None = None) -> dict[str, Comparison]:
    """Read a tolerance report in JSON, by model.

    Args:
        path: The file.
        models: The report must hold at least one of these; None: any.

    Raises:
        BadInput: no such file, not a tolerance report, or one of other models.
    """
    give = f"Give the {JSON} that `ccm compare` writes."
    if not path.is_file():
        raise BadInput(f"{path}: no such file. {give}")
    found = read_json(path)
    try:
        comparisons = [read_comparison(entry) for entry in found["models"]]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path}: not a tolerance report ({error!r}). {give}") from error
    held = {c.model: c for c in comparisons}
    if models is not None and not set(models) & held.keys():
        raise BadInput(
            f"{path}: holds no row of {', '.join(models)}. {allowed(held)}; give one of their runs."
        )
    return held
