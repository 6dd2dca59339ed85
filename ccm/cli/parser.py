"""The command line: thin, every subcommand a few calls into the package.

Exit codes: 0 done; 1 a fault of ccm itself (one line on stderr says where its traceback is); 2 input
that cannot be used, or work that cannot be done here (one line, no traceback); 129, 130 and 143 stopped
by SIGHUP, SIGINT and SIGTERM; 141 the reader of the output is gone, as with `| head`. `--debug` shows
any traceback.
"""

import argparse
import logging
import os
import select
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import NoReturn

from ccm.cli import commands as subcommands
from ccm.cli import finished
from ccm.cli.faults import fault
from ccm.cli.options import PROGRAM, add_options, rehearse_options
from ccm.errors import BadInput, CcmError
from ccm.experiment.stopping import Stopping
from ccm.method.ablation_values import ABLATION_VALUES

MODEL = ("model", "model_paths", "revision", "device", "dtype")  # which model, and where it runs


class _Parser(argparse.ArgumentParser):
    """Reports errors in one line, like every other error here."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{PROGRAM}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: The arguments; None takes those of this process, which then must do nothing else.
    """
    alone = arguments is None
    given = sys.argv[1:] if arguments is None else arguments
    if alone and isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # any name can be printed
    options = argparse.Namespace()
    with Stopping(lambda: _say(_interrupted(options), below_bar=True)) as stopping:
        try:
            _do(given, options)
        except SystemExit:
            raise
        except BaseException as error:
            if _debug(options):
                _write("".join(traceback.format_exception(error)))
            # A step that was interrupted may have turned the signal into another error.
            return _end(stopping.stopped or error, options, given)
        finally:
            if alone:
                stopping.finish()
                _let_go_of_output()
    return 0


def _do(given: Sequence[str], options: argparse.Namespace) -> None:
    """Parse the arguments and run the subcommand."""
    parser().parse_args(given, options)
    _check_not_empty(given)
    notes = _Notes()
    logging.getLogger(PROGRAM).addHandler(notes)
    try:
        options.run(options)
    finally:
        logging.getLogger(PROGRAM).removeHandler(notes)
    if sys.stdout is not None:
        sys.stdout.flush()  # a reader that is gone is noticed here, not when the process ends


class _Notes(logging.Handler):
    """Prints the warnings of the package."""

    def emit(self, record: logging.LogRecord) -> None:
        _say(record.getMessage())


def _end(error: BaseException, options: argparse.Namespace, given: Sequence[str]) -> int:
    """Say in one line how a command ended, and return its exit code."""
    if isinstance(error, KeyboardInterrupt):
        _say(_interrupted(options), below_bar=True)
        return getattr(error, "code", 130)
    if isinstance(error, CcmError):
        _say(str(error))
        return 2
    if isinstance(error, BrokenPipeError) and _is_output_gone():
        return 141
    if _is_out_of_memory(error):
        reason = str(error).partition("\n")[0] or type(error).__name__
        ways = _less_memory(options)
        _say(f"out of memory ({reason}); {_resumes(options)}. {ways}.", below_bar=True)
        return 2
    if isinstance(error, OSError):  # a full disk, a folder that was removed
        _say(f"{error}. Nothing half-written is left.")
        return 2
    if isinstance(error, ImportError) and not str(error.name).startswith("ccm"):
        _say(f"{error}. Install what is missing; --debug shows what needs it.")
        return 2
    _say(fault(error, [PROGRAM, *given], shown=_debug(options)))
    return 1


def _debug(options: argparse.Namespace) -> bool:
    return getattr(options, "debug", False)


def _interrupted(options: argparse.Namespace) -> str:
    return f"interrupted; {_resumes(options)}."


def _is_out_of_memory(error: BaseException) -> bool:
    """Ask `ccm.models.memory.out_of_memory`, but without importing torch if nothing has yet."""
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from ccm.models.memory import out_of_memory

    return out_of_memory(error)


def _is_output_gone() -> bool:
    """Return whether the reader of our output, like `head`, has gone; another pipe may have broken."""
    if not hasattr(select, "poll"):  # Windows
        return True
    ends = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, or never there
            ends.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in ends.poll(0))


def _let_go_of_output() -> None:
    """Drop output that nobody can read: Python would complain about it when the process ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except (ValueError, AttributeError):  # closed, or never there
            continue


def _say(line: str, *, below_bar: bool = False) -> None:
    """Print one line on stderr."""
    _write("\n" * below_bar + f"{PROGRAM}: {' '.join(line.splitlines())}\n")


def _write(text: str) -> None:
    """Write to stderr, and never fail: the terminal may be gone."""
    with suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(text)
        sys.stderr.flush()


def _resumes(options: argparse.Namespace) -> str:
    """Say what an interrupted command has left behind."""
    resumable = getattr(options, "run", None) in (subcommands.run, subcommands.sweep)
    if resumable and options.out is not None:
        return f"the same command with --out {options.out} goes on from here"
    return "no result"


def _less_memory(options: argparse.Namespace) -> str:
    """Say which options of the command lower its use of memory."""
    ways = ["a lower --memory-budget"] if hasattr(options, "memory_budget") else []
    if getattr(options, "dtype", None) == "float32":
        ways.append("--dtype bfloat16")
    return "Free some first" + (f", or start anew with {' or '.join(ways)}" if ways else "")


def _check_not_empty(arguments: Sequence[str]) -> None:
    """Refuse empty values like `--out ""`, most often from a shell variable that is not set."""
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
    add_options(run)
    run.add_argument("--out", type=Path, help="run folder (default: runs/MODEL-VALUE-TIME)")
    run.add_argument(
        "--report", action="store_true", help="at the end, draw everything and write the report"
    )
    run.set_defaults(run=subcommands.run)

    sweep = commands.add_parser("sweep", help="the experiment with other choices, one at a time")
    add_options(sweep)
    sweep.add_argument(
        "--vary",
        action="append",
        required=True,
        metavar="OPTION=V,V",
        help="an option of a run and its other values, like k=4,9; may be repeated",
    )
    sweep.add_argument("--out", type=Path, required=True, help="folder of the run folders")
    sweep.set_defaults(run=subcommands.sweep)

    merge = commands.add_parser("merge", help="join the shards of a run into one run folder")
    merge.add_argument("shards", type=Path, nargs="+", metavar="FOLDER", help="of run --shard I/N")
    merge.add_argument("--out", type=Path, required=True, help="run folder to write")
    merge.set_defaults(run=subcommands.merge)

    figures = commands.add_parser("figures", help="figures and tables of finished runs")
    figures.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder")
    figures.add_argument("--out", type=Path, help="folder to write (default, of one run: RUN/figures)")
    figures.set_defaults(run=finished.figures)

    report = commands.add_parser("report", help="one page of finished runs: figures, tables, numbers")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder")
    report.add_argument("--out", type=Path, help="folder to write (default, of one run: RUN)")
    report.add_argument(
        "--tolerance",
        type=Path,
        metavar="FILE",
        help="tolerance_report.json of `ccm compare` (default: the run's own, in or beside its folder)",
    )
    report.set_defaults(run=finished.report)

    compare = commands.add_parser(
        "compare", help="runs of published models against the printed numbers, or two runs"
    )
    compare.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder")
    compare.add_argument(
        "--to",
        choices=("paper", "run"),
        help="what to compare with (default: the paper if it printed numbers of every model and each "
        "is given once, else two runs with each other)",
    )
    compare.add_argument("--out", type=Path, help="folder to write (default, of one run: RUN)")
    compare.set_defaults(run=finished.compare)

    models = commands.add_parser("models", help="known models, and whether their weights are here")
    add_options(models, "model_paths")
    models.set_defaults(run=subcommands.models)

    fetch = commands.add_parser("fetch", help="download a model's weights before they are needed")
    fetch.add_argument("model", metavar="MODEL", help="as --model of the other commands")
    add_options(fetch, "model_paths", "revision")
    fetch.set_defaults(run=subcommands.fetch)

    tokens = commands.add_parser("tokens", help="the tokens of a text, as a run encodes it")
    tokens.add_argument("text", metavar="TEXT", help="a prompt")
    tokens.add_argument("--answer", default="", help="what may follow it, after a space")
    add_options(tokens, "model", "model_paths", "revision", "bos")
    tokens.set_defaults(run=subcommands.tokens)

    prompts = commands.add_parser("prompts", help="probing prompts of a model, as CSV")
    add_options(prompts, *MODEL, "protocol", "bos", "facts", "template", "engine")
    prompts.add_argument("--out", type=Path, required=True, help="CSV file to write")
    prompts.set_defaults(run=subcommands.prompts)

    measure = commands.add_parser("measure", help="LogitVar, norm and rho of last-layer neurons")
    add_options(measure, *MODEL, "k", "min_rho", "null_space_dims")
    measure.add_argument("--out", type=Path, help="CSV file to write")
    measure.set_defaults(run=subcommands.measure)

    ablate = commands.add_parser("ablate", help="ablate neuron sets on prompts of your own")
    add_options(ablate, *MODEL, "protocol", "bos", "engine", "memory_budget")
    ablate.add_argument("--prompts", type=Path, required=True, help="CSV of probing prompts")
    ablate.add_argument("--stats", type=Path, required=True, help="NPZ of activation statistics")
    sets = ablate.add_mutually_exclusive_group(required=True)
    sets.add_argument("--neurons", help="one set: 1,2,3")
    sets.add_argument("--sets", type=Path, help="JSON: a list of sets, or an object of named ones")
    ablate.add_argument(
        "--ablation-value",
        default="mean_ablation",
        help=f"one of {', '.join(ABLATION_VALUES)} (default: %(default)s)",
    )
    ablate.add_argument("--out", type=Path, required=True, help="JSON file to write")
    ablate.set_defaults(run=subcommands.ablate)

    rehearse = commands.add_parser(
        "rehearse", help="time and memory of a published model's run, on random weights"
    )
    rehearse_options(rehearse)
    rehearse.set_defaults(run=subcommands.rehearse)
    for command in (top, *commands.choices.values()):
        # No default: a subcommand's would undo a --debug before it.
        command.add_argument(
            "--debug",
            action="store_true",
            default=argparse.SUPPRESS,
            help="show the traceback of an error",
        )
    return top
