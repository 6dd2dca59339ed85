"""The command line: thin, every subcommand a few calls into the package.

Exit codes: 0 done, 2 input that cannot be used (one line on stderr, no traceback), 130 interrupted.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ccm import subcommands
from ccm.arguments import (
    PROGRAM,
    bos_option,
    engine_option,
    engine_options,
    facts_options,
    measure_options,
    model_options,
    path_option,
    rehearse_options,
    share,
)
from ccm.errors import BadInput, CcmError


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like every other error here."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{PROGRAM}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(given)
    notes = logging.StreamHandler()
    notes.setFormatter(logging.Formatter(f"{PROGRAM}: %(message)s"))
    logging.getLogger("ccm").addHandler(notes)
    try:
        _check_not_empty(given)
        options.run(options)
    except CcmError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        from ccm.memory import out_of_memory

        if not out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        print(
            f"\n{PROGRAM}: out of memory ({reason}); {_resumes(options)}. {_less_memory(options)}.",
            file=sys.stderr,
        )
        return 2
    except OSError as error:  # a full disk, a folder that went away
        print(f"{PROGRAM}: {error}. Nothing half-written is left.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        # Below a progress bar.
        print(f"\n{PROGRAM}: interrupted; {_resumes(options)}.", file=sys.stderr)
        return 130
    finally:
        logging.getLogger("ccm").removeHandler(notes)
    return 0


def _resumes(options: argparse.Namespace) -> str:
    """Say what is left of a command that did not end."""
    if options.run is subcommands.run and options.out is not None:
        return f"the same command with --out {options.out} goes on from here"
    return "no result"


def _less_memory(options: argparse.Namespace) -> str:
    """Say what takes less memory, of what the command has."""
    ways = ["a lower --memory-budget"] if hasattr(options, "memory_budget") else []
    if getattr(options, "dtype", None) == "float32":
        ways.append("--dtype bfloat16")
    return "Free some first" + (f", or start anew with {' or '.join(ways)}" if ways else "")


def _check_not_empty(arguments: Sequence[str]) -> None:
    """Refuse `--out ""`, most often a shell variable that is not set: no option means that."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if argument == "" or (argument.startswith("--") and argument.endswith("=")):
            name = argument.rstrip("=") or before
            raise BadInput(f"{name}: empty. Give a value, or leave the option out.")


def parser() -> argparse.ArgumentParser:
    """Build the argument parser."""
    top = _Parser(
        prog=PROGRAM, description="Entropy neurons and context copying, from facts to scores."
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="the whole experiment, into a run folder")
    model_options(run)
    bos_option(run)
    facts_options(run)
    run.add_argument(
        "--ablation-value",
        default="mean_ablation",
        help="mean_ablation, median_ablation, mode_ablation, mean_minus_sigma_ablation, "
        "mean_plus_sigma_ablation, several with commas, or all (default: %(default)s)",
    )
    run.add_argument("--controls", type=int, default=100, help="random sets (default: 100)")
    run.add_argument(
        "--matched-controls",
        type=int,
        metavar="N",
        help="sets of neurons near the entropy neurons in weight norm and spread (default: as many as "
        "--controls)",
    )
    run.add_argument("--seed", type=int, default=123, help="of the controls (default: 123)")
    measure_options(run)
    run.add_argument("--neurons", help="fix the entropy set: 1,2,3, or published")
    engine_options(run)
    run.add_argument(
        "--device-map", help="auto: lay the layers over all GPUs, for a model that fits no single one"
    )
    run.add_argument(
        "--full-texts", action="store_true", help="decode controls to 10 tokens, not to their answer"
    )
    run.add_argument(
        "--stats",
        default="own",
        help="activation statistics: own (default), or released, those of the paper's authors",
    )
    run.add_argument("--max-prompts", type=int, help="use only so many, evenly chosen")
    run.add_argument(
        "--shard",
        type=share,
        metavar="I/N",
        help="decode only the I-th of N shares of the prompts; `ccm merge` joins them",
    )
    run.add_argument("--out", type=Path, help="run folder (default: runs/MODEL-VALUE-TIME)")
    run.add_argument(
        "--report", action="store_true", help="at the end, draw everything and write the report"
    )
    run.set_defaults(run=subcommands.run)

    merge = commands.add_parser("merge", help="join the shares of a run into one run folder")
    merge.add_argument("shares", type=Path, nargs="+", metavar="FOLDER", help="of run --shard I/N")
    merge.add_argument("--out", type=Path, required=True, help="run folder to write")
    merge.set_defaults(run=subcommands.merge)

    figures = commands.add_parser("figures", help="figures and tables of finished runs")
    figures.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder, one a model")
    figures.add_argument("--out", type=Path, help="folder to write (default, of one run: RUN/figures)")
    figures.set_defaults(run=subcommands.figures)

    report = commands.add_parser("report", help="one page of finished runs: figures, tables, numbers")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder, one a model")
    report.add_argument("--out", type=Path, help="folder to write (default, of one run: RUN)")
    report.add_argument(
        "--tolerance",
        type=Path,
        metavar="FILE",
        help="tolerance_report.json of a reproduction (default: the run's own beside its folder)",
    )
    report.set_defaults(run=subcommands.report)

    models = commands.add_parser("models", help="known models, and whether their weights are here")
    path_option(models)
    models.set_defaults(run=subcommands.models)

    prompts = commands.add_parser("prompts", help="probing prompts of a model, as CSV")
    model_options(prompts)
    bos_option(prompts)
    facts_options(prompts)
    engine_option(prompts)
    prompts.add_argument("--out", type=Path, required=True, help="CSV file to write")
    prompts.set_defaults(run=subcommands.prompts)

    measure = commands.add_parser("measure", help="LogitVar, norm and rho of last-layer neurons")
    model_options(measure)
    measure_options(measure)
    measure.add_argument("--out", type=Path, help="CSV file to write")
    measure.set_defaults(run=subcommands.measure)

    ablate = commands.add_parser("ablate", help="ablate neuron sets on prompts from elsewhere")
    model_options(ablate)
    bos_option(ablate)
    ablate.add_argument("--prompts", type=Path, required=True, help="CSV of probing prompts")
    ablate.add_argument("--stats", type=Path, required=True, help="NPZ of activation statistics")
    sets = ablate.add_mutually_exclusive_group(required=True)
    sets.add_argument("--neurons", help="one set: 1,2,3")
    sets.add_argument("--sets", type=Path, help="JSON: a list of sets, or an object of named ones")
    ablate.add_argument("--ablation-value", default="mean_ablation", help="one of the five")
    engine_options(ablate)
    ablate.add_argument("--out", type=Path, required=True, help="JSON file to write")
    ablate.set_defaults(run=subcommands.ablate)

    rehearse = commands.add_parser(
        "rehearse", help="time and memory of a published model's run, on random weights"
    )
    rehearse_options(rehearse)
    rehearse.set_defaults(run=subcommands.rehearse)
    return top
