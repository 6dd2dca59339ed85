"""A run for each of several choices, one option changed at a time; common steps are computed once.

Prompts do not depend on how neurons are chosen, nor statistics on how many controls are drawn. So
where two runs of a sweep agree on everything that a step's output depends on, the second takes it from
the first. Options that a step does *not* depend on are listed here; all others count, new ones too.
"""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from ccm.errors import BadInput, CcmError, one_of
from ccm.experiment.config import RunConfig
from ccm.experiment.folder import ACTIVATION_STATS, MANIFEST, PROMPTS, RunFolder, read_manifest
from ccm.experiment.options import option_of
from ccm.experiment.plan import identity, make_plan
from ccm.experiment.run import hold_folder, run
from ccm.experiment.writing import write_atomically

BASE = "base"
# These cannot be varied: their text may hold commas, or they say where to run and not what.
FIXED = ("model_paths", "ablation_values", "neurons", "shard", "memory_budget", "device_map")
# Entries of a run's identity on which its prompts, and its statistics, do not depend.
NOT_OF_PROMPTS = frozenset(
    {
        *("ablation_values", "controls", "matched_controls", "seed", "k", "min_rho", "null_space_dims"),
        *("neurons", "full_texts", "stats", "stats_positions", "statistics_sha256"),
    }
)
NOT_OF_STATISTICS = NOT_OF_PROMPTS - {"stats", "stats_positions", "statistics_sha256"}
# Entries of the manifest about the prompts.
NOTES = ("facts", "prompts", "nested_objects", "prompts_sha256")


@dataclass(frozen=True)
class Choice:
    """One run of a sweep."""

    name: str  # of its folder: `base`, or the option and its value
    option: str  # empty for the base
    value: str
    config: RunConfig


def choices(base: RunConfig, varied: Mapping[str, Sequence[str]]) -> list[Choice]:
    """List the runs of a sweep: the base, then each option with each of its values.

    Args:
        base: The configuration that each run changes in one option.
        varied: Values of options, as on the command line.

    Raises:
        BadInput: an option that cannot be varied, or a value that it does not take.
    """
    known = {f.name: option_of(f) for f in fields(RunConfig) if f.name not in FIXED}
    found = [Choice(BASE, "", "", base)]
    for name, values in varied.items():
        one_of("option", name, known)
        option = known[name]
        for text in values:
            changed: dict[str, Any] = {name: True if option.switch else option.value_of(text)}
            config = replace(base, **changed)
            flag = option.flag.lstrip("-")
            safe = re.sub(r"[^\w.+=-]+", "-", text).strip("-.")
            found.append(Choice(f"{flag}-{safe}", flag, text, config))
    if len({choice.name for choice in found}) < len(found):
        raise BadInput("--vary: a value is given twice. Give each once.")
    return found


def sweep(
    base: RunConfig, varied: Mapping[str, Sequence[str]], out: Path
) -> Iterator[tuple[Choice, Path | CcmError]]:
    """Run every choice into a folder of its own below `out`; finished ones are not run again.

    A value that is the base's own is left out.

    Args:
        base: The configuration that each run changes in one option.
        varied: As for `choices`.
        out: The folder.

    Yields:
        Each choice with its folder once its run is finished; or with the error, if only the model's own
            numbers showed that it cannot be run.

    Raises:
        CcmError: a choice cannot be run, and that is known before the first run.
    """
    planned = [(choice, make_plan(choice.config)) for choice in choices(base, varied)]
    known = [identity(plan_) for _, plan_ in planned]
    if out.exists() and not out.is_dir():
        raise BadInput(f"{out}: is a file. Give a folder with --out.")
    done = list[Path]()
    for (choice, plan_), its in zip(planned, known, strict=True):
        if choice.name != BASE and its == known[0]:
            continue
        folder = out / choice.name
        if not (folder / MANIFEST).is_file():
            with hold_folder(plan_, its, folder) as held:
                for donor in done:
                    take_over(held, donor)
        try:
            run(choice.config, folder)
        except BadInput as error:
            yield choice, error
            continue
        done.append(folder)
        yield choice, folder


def take_over(folder: RunFolder, donor: Path) -> None:
    """Copy the files that a finished run made and this one would make again, unless they exist."""
    other = read_manifest(donor, "Run the sweep in a new folder.")
    mine, its = folder.manifest["identity"], other["identity"]
    differing = {key for key in mine.keys() | its.keys() if mine.get(key) != its.get(key)}
    if differing <= NOT_OF_PROMPTS and not folder.has(PROMPTS):
        folder.note(**{name: other[name] for name in NOTES})
        _copy(donor, folder, PROMPTS)
    if differing <= NOT_OF_STATISTICS and not folder.has(ACTIVATION_STATS):
        _copy(donor, folder, ACTIVATION_STATS)


def _copy(donor: Path, folder: RunFolder, name: str) -> None:
    write_atomically(folder.path / name, partial(shutil.copyfile, donor / name))


def read_varied(given: Sequence[str]) -> dict[str, list[str]]:
    """Read `k=4,6,9` and `template=bare,own` into options with their values.

    >>> read_varied(["k=4,6", "null-space-dims=7"])
    {'k': ['4', '6'], 'null_space_dims': ['7']}

    Raises:
        BadInput: an entry without an option or a value.
    """
    found = dict[str, Any]()
    for text in given:
        name, _, values = text.partition("=")
        listed = [value.strip() for value in values.split(",") if value.strip()]
        if not name or not listed:
            raise BadInput(f"--vary {text!r}: not an option with values. Give one like k=4,6,9.")
        found.setdefault(name.strip().lstrip("-").replace("-", "_"), []).extend(listed)
    return found
