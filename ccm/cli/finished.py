"""The subcommands that read finished runs: draw, report, compare; no model is loaded."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ccm.cli.outputs import check_writing
from ccm.errors import BadInput
from ccm.experiment.locking import refuse_if_locked
from ccm.models.limits import cores


def figures(options: argparse.Namespace) -> None:
    """Draw the figures and write the tables of finished runs."""
    out = _folder_of(options, "figures")

    from ccm.experiment.folder import locked_for
    from ccm.reporting.figures.gallery import write_figures
    from ccm.reporting.tables import write_tables

    runs = _finished(options.runs, out)
    with locked_for(out):
        tables = write_tables(runs, out)
        figures = write_figures(runs, out, cores())
    print(f"{len(figures) // 3} figures (PDF, PNG, data), {len(tables) // 3} tables: {out}")


def report(options: argparse.Namespace) -> None:
    """Write the report of finished runs."""
    out = _folder_of(options, "")

    from ccm.paper.report import read_report
    from ccm.reporting.report import write_report

    runs = _finished(options.runs, out)
    if options.tolerance is not None:
        read_report(options.tolerance, [run.model for run in runs])
    html, markdown, *_ = write_report(runs, out, options.tolerance, cores())
    print(f"report: {html}\nreport: {markdown}\nfigures and tables: {out / 'figures'}")


def compare(options: argparse.Namespace) -> None:
    """Compare finished runs of published models with the paper, or two runs with each other."""
    out = _folder_of(options, "")

    from ccm.paper.report import check_comparable, compare_with_paper, is_printed, one_line
    from ccm.reporting.two_runs import check_two, compare_runs, sentences, write_comparison

    def held_to(runs: Any) -> str:
        paper = len(runs) != 2 or is_printed(runs)
        return options.to or ("paper" if paper else "run")

    checks = {"paper": check_comparable, "run": check_two}
    runs = _finished(options.runs, out, lambda runs: checks[held_to(runs)](runs))
    if held_to(runs) == "paper":
        comparisons, paths = compare_with_paper(runs, out)
        lines = [one_line(comparison) for comparison in comparisons]
    else:
        found = compare_runs(*runs)
        lines, paths = sentences(found), write_comparison(found, out)
    print(*lines, *(f"report: {path}" for path in paths), sep="\n")


def _folder_of(options: argparse.Namespace, below: str) -> Path:
    """Return the output folder for finished runs; for one run the default is in its own folder."""
    if options.out is None and len(options.runs) > 1:
        raise BadInput(f"{len(options.runs)} runs: no default folder for several. Give one with --out.")
    return Path(options.runs[0] / below if options.out is None else options.out)


def _finished(paths: Sequence[Path], out: Path, check: Callable[[Any], None] | None = None) -> Any:
    """Read finished runs, and check that the output folder can be written to.

    Args:
        paths: Run folders.
        out: The output folder, which is made.
        check: Refuses runs that the command cannot use, before the folder is made.

    Raises:
        BadInput: a folder is not a finished run, a run is given twice, or `out` cannot be written to.
        InUse: another process is writing there.
    """
    from ccm.experiment.folder import folder_to_lock
    from ccm.experiment.results import read_results
    from ccm.reporting.distinct_names import distinct_names

    if out.exists() and not out.is_dir():
        raise BadInput(f"{out}: is a file. Give a folder with --out.")
    refuse_if_locked(folder_to_lock(out))
    runs = distinct_names([read_results(path) for path in paths])
    if check is not None:
        check(runs)
    check_writing(out, f"{out}: cannot be written to", "folder with --out")
    return runs
