"""Options that several commands share, and how their values are read."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from ccm.errors import BadInput
from ccm.method.ablation_values import ALL

PROGRAM = "ccm"


def rehearse_options(command: argparse.ArgumentParser) -> None:
    """What to rehearse, and on what."""
    command.add_argument("--model", required=True, help="one of the five published models")
    command.add_argument("--prompts", type=int, default=256, help="probing prompts (default: 256)")
    command.add_argument("--controls", type=int, default=100, help="random sets (default: 100)")
    command.add_argument(
        "--ablation-value", default=ALL, help="as for `ccm run` (default: all, in one decode)"
    )
    command.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, auto (default: auto)")
    command.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    command.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FOLDER",
        help="with tokenizer.json (default: a stand-in whose prompts are about as long)",
    )
    command.add_argument(
        "--seed", type=int, default=123, help="of weights, prompts and controls (default: 123)"
    )
    command.add_argument(
        "--hooked", action="store_true", help="time a plain pass with TransformerLens hooks, too"
    )
    command.add_argument("--out", type=Path, help="JSON file to write")
    command.add_argument(
        "--keep", type=Path, metavar="DIR", help="keep what such a run leaves behind (random results)"
    )


def path_option(command: argparse.ArgumentParser) -> None:
    """Where a named model's weights are."""
    command.add_argument(
        "--model-path",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="checkpoint folder of a named model; may be repeated",
    )


def model_options(command: argparse.ArgumentParser) -> None:
    """Which model, where it runs, and under which protocol."""
    command.add_argument("--model", required=True, help="a name of `ccm models`, or a folder")
    path_option(command)
    command.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N, auto (default: cpu)")
    command.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    command.add_argument(
        "--protocol",
        default="corrected",
        help="corrected (default), or released: with the released code's behaviours",
    )


def bos_option(command: argparse.ArgumentParser) -> None:
    """What stands before every prompt."""
    command.add_argument(
        "--bos",
        default="own",
        metavar="none|ID",
        help="token before every prompt: none, or an id (default: the tokenizer's own BOS)",
    )


def engine_option(command: argparse.ArgumentParser) -> None:
    """Which way to decode."""
    command.add_argument(
        "--engine",
        default="shared",
        help="shared (default): one decode for all sets; hooked: the slow reference, a pass a set",
    )


def engine_options(command: argparse.ArgumentParser) -> None:
    """How to decode."""
    engine_option(command)
    command.add_argument(
        "--memory-budget",
        type=size_in_bytes,
        metavar="SIZE",
        help="what a shard may use, like 500M or 8G (default: half of what is free)",
    )


def size_in_bytes(text: str) -> int:
    """Parse a size: `500M`, `8G` or plain bytes."""
    units = {"M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1)
    try:
        size = float(number) * unit
    except ValueError:
        size = math.nan
    if not (1 << 20) <= size < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no size. Give 1M or more, like 500M or 8G.")
    return int(size)


def share(text: str) -> tuple[int, int]:
    """Parse `2/8`."""
    i, slash, n = text.partition("/")
    if not (slash and i.isascii() and i.isdecimal() and n.isascii() and n.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no share. Give I/N, like 2/8.")
    return int(i), int(n)


def facts_options(command: argparse.ArgumentParser) -> None:
    """Which facts, and how they are asked."""
    command.add_argument(
        "--facts", help="pararel, or a folder with facts.csv and relations.csv (default: its own)"
    )
    command.add_argument("--template", help="bare, instruction or chat (default: the model's)")


def measure_options(command: argparse.ArgumentParser) -> None:
    """How entropy neurons are selected."""
    command.add_argument("-k", type=int, help="entropy neurons to select (default: the model's)")
    command.add_argument("--min-rho", type=float, help="least rho to select (default: the model's)")
    command.add_argument("--null-space-dims", type=int, help="directions of V0 (default: its own)")


def parse_model_paths(entries: Sequence[str]) -> dict[str, Path]:
    """Parse `NAME=DIR` entries.

    Raises:
        BadInput: an entry without `=`, or a folder that is not there.
    """
    paths = {}
    for entry in entries:
        name, equals, folder = entry.partition("=")
        if not (name and equals and folder):
            raise BadInput(f"--model-path {entry!r}: not NAME=DIR. Give gpt2-small=/path/to/folder.")
        if not Path(folder).is_dir():
            raise BadInput(f"--model-path {entry!r}: no such folder {folder!r}.")
        paths[name] = Path(folder)
    return paths
