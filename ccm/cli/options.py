"""Options of the commands: those of a run are derived from `RunConfig`, others are written here."""

import argparse
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ccm.experiment import config
from ccm.experiment.options import Option, option_of

PROGRAM = "ccm"


def add_options(
    command: argparse.ArgumentParser,
    *names: str,
    changed: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Add options of a run to a command.

    An option that is not given is not in the namespace, so that only `RunConfig` holds defaults.

    Args:
        command: Its parser.
        names: Which fields of `RunConfig`; none means all.
        changed: By option, fields of `Option` that differ for this command: `default`, `told`.
    """
    known = {f.name: option_of(f) for f in fields(config.RunConfig)}
    for name in names or known:
        own = (changed or {}).get(name, {})
        _add(command, name, replace(known[name], **own))
        if "default" in own:
            command.set_defaults(**{name: own["default"]})
    command.set_defaults(run_options=names or tuple(known))


def _add(command: argparse.ArgumentParser, name: str, option: Option) -> None:
    more: dict[str, Any] = {
        "dest": name,
        "default": argparse.SUPPRESS,
        "help": option.told if name == "model" else option.help,
    }
    if option.switch:
        command.add_argument(option.flag, action="store_true", **more)
        return
    if option.metavar is not None:
        more["metavar"] = option.metavar
    more["action"] = "append" if option.repeated else "store"
    # A model must be named: the one that comes with the package is for a first look only.
    command.add_argument(option.flag, required=name == "model", **more)


def given_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of a run that were given, for `RunConfig.read`."""
    return {name: getattr(options, name) for name in options.run_options if hasattr(options, name)}


def rehearse_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `ccm rehearse`."""
    add_options(
        command,
        *config.REHEARSED,
        changed={
            "model": {"told": "one of the five published models"},
            "ablation_values": {"default": ("all",)},
            "seed": {"told": "seed of weights and controls"},
            "device": {"default": "auto"},
        },
    )
    command.add_argument("--prompts", type=int, default=256, help="probing prompts (default: 256)")
    command.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FOLDER",
        help="folder with tokenizer.json (default: a stand-in whose prompts are about as long)",
    )
    command.add_argument(
        "--hooked", action="store_true", help="time a plain pass with TransformerLens hooks, too"
    )
    command.add_argument("--out", type=Path, help="JSON file to write")
    command.add_argument(
        "--keep", type=Path, metavar="DIR", help="keep the run folder here (its results are random)"
    )
