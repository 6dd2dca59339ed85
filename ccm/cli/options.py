"""Options of the commands: those of a run are derived from `RunConfig`, the rest stands here."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from ccm.experiment import config
from ccm.experiment.config import Option, option_of
from ccm.method.ablation_values import ALL

PROGRAM = "ccm"


def add_options(command: argparse.ArgumentParser, *names: str) -> None:
    """Add options of a run by their names in `RunConfig`, or all of them.

    What is not given is not in the namespace, so that every default stands in one place.
    """
    known = {f.name: option_of(f) for f in fields(config.RunConfig)}
    for name in names or known:
        _add(command, name, known[name])
    command.set_defaults(run_options=names or tuple(known))


def _add(command: argparse.ArgumentParser, name: str, option: Option) -> None:
    more: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": option.help}
    if option.switch:
        command.add_argument(option.flag, action="store_true", **more)
        return
    if option.metavar is not None:
        more["metavar"] = option.metavar
    more["action"] = "append" if option.repeated else "store"
    # A model is always named: the one that comes with the package is for the first look.
    command.add_argument(option.flag, required=name == "model", **more)


def given_options(options: argparse.Namespace) -> dict[str, Any]:
    """What was given of a run's options, for `RunConfig`."""
    return {name: getattr(options, name) for name in options.run_options if hasattr(options, name)}


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
