"""Names that tell runs of one model apart: by what differs, in as few words as that takes."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Any

from ccm.errors import BadInput
from ccm.experiment.results import RunResults
from ccm.models.specs import MODELS

LONGEST_VALUE = 40  # characters of what differs, or the run's folder says it better
LONGEST_NAME = 100  # bytes of a file's name that are the run's
# How an entry of a run's identity is said, where `seed 7` would not do; the rest follows in its order.
_SAID: dict[str, Callable[[Any], str]] = {
    "dtype": str,
    "protocol": str,
    "facts": lambda value: f"facts {value}",
    "controls": lambda value: f"{value} controls",
    "matched_controls": lambda value: f"{value} matched controls",
    "ablation_values": lambda value: ", ".join(map(str, value)),
    "neurons": lambda value: f"neurons {', '.join(map(str, value))}" if value else "neurons selected",
    "max_prompts": lambda value: f"{value} prompts" if value else "all prompts",
    "engine": lambda value: f"{value} engine",
    "device": str,
    "device_name": str,
}
_NOT_SAID = ("model", "versions", "shard")


def told_apart(runs: Sequence[RunResults]) -> list[RunResults]:
    """Give runs names of their own: those people read, and those in file names.

    A run whose model is run but once keeps the model's. Others are told apart by where their weights
    came from (`a/final` and `b/final`, a revision), then by their settings (`Organism (float32)`), then
    by their run folders.

    Args:
        runs: Finished runs.

    Returns:
        The same runs in the same order.

    Raises:
        BadInput: two are the same run.
    """
    groups = defaultdict[str, list[int]](list)
    for i, run in enumerate(runs):
        groups[run.display_name.casefold()].append(i)
    named = list(runs)
    single = [i for group in groups.values() for i in group if len(group) == 1]
    names = {runs[i].name.casefold() for i in single}
    shown = {runs[i].display_name for i in single}
    for group in groups.values():
        if len(group) == 1:
            continue
        labels = _labels([runs[i] for i in group])
        for i, (label, file_label) in zip(group, labels, strict=True):
            named[i] = replace(
                runs[i], display_name=_unlike(label, shown), name=_unlike(_safe(file_label), names)
            )
            shown.add(named[i].display_name)
            names.add(named[i].name.casefold())
    return named


def _labels(runs: Sequence[RunResults]) -> list[tuple[str, str]]:
    """Say what tells runs of one model apart: for people, and for names of files."""
    _check_distinct(runs)
    distinctions = _distinctions(runs)
    chosen = _that_tell(distinctions)
    labels = [_label(run, i, distinctions[0], chosen) for i, run in enumerate(runs)]
    if len({label for label, _ in labels}) < len(runs):  # a folder may have a known model's name
        chosen.append(distinctions[-1])
        labels = [_label(run, i, distinctions[0], chosen) for i, run in enumerate(runs)]
    return labels


def _label(
    run: RunResults, i: int, sources: Sequence[str], chosen: Sequence[Sequence[str]]
) -> tuple[str, str]:
    """Put a run's name together from the texts that are its own, the i-th ones."""
    words, base, file = [texts[i] for texts in chosen if texts[i]], run.display_name, run.model
    if run.model not in MODELS and words[:1] == [sources[i]] and PurePath(words[0]).name == run.model:
        base = file = words.pop(0)  # the model has its name from the folder
    return f"{base} ({', '.join(words)})" if words else base, "-".join([file, *words])


def _distinctions(runs: Sequence[RunResults]) -> list[list[str]]:
    """What may tell runs apart, the best first: each with a text for every run."""
    revisions = [_revision(run) for run in runs]
    tails = _tails([_source(run) for run in runs])
    found = [[revision or tail for revision, tail in zip(revisions, tails, strict=True)]]
    for key in dict.fromkeys([*_SAID, *(key for run in runs for key in run.identity)]):
        texts = [_setting(key, run.identity.get(key)) for run in runs]
        if all(0 < len(text) <= LONGEST_VALUE for text in texts):
            found.append(texts)
    return [*found, _tails([run.path.resolve() for run in runs])]


def _that_tell(distinctions: Iterable[list[str]]) -> list[list[str]]:
    """Keep those that tell some runs apart which those before do not."""
    chosen, classes = list[list[str]](), 1
    for texts in distinctions:
        finer = len(set(zip(*chosen, texts, strict=True)))
        if finer > classes:
            chosen, classes = [*chosen, texts], finer
    return chosen


def _check_distinct(runs: Sequence[RunResults]) -> None:
    for i, run in enumerate(runs):
        for other in runs[:i]:
            if dict(run.identity) == dict(other.identity):
                raise BadInput(
                    f"{run.path}: the same run as {other.path}, of the same weights with the same "
                    "settings. Give one of them."
                )


def _source(run: RunResults) -> PurePath:
    """Where the weights came from: the folder that was loaded."""
    return PurePath(run.manifest["weights"]["source"])


def _revision(run: RunResults) -> str:
    revision = run.manifest["weights"]["revision"]
    return f"revision {str(revision)[:8]}" if revision else ""


def _setting(key: str, value: object) -> str:
    """Say a setting, if it says anything to people: no hashes, no lists of versions."""
    if key in _NOT_SAID or key.endswith("sha256") or isinstance(value, dict):
        return ""
    if key in _SAID:
        return _SAID[key](value)
    return f"{key.replace('_', ' ')} {value}"


def _tails(paths: Sequence[PurePath]) -> list[str]:
    """Cut paths to as few last parts as tell those apart that are not the same."""
    most = max(len(path.parts) for path in paths)
    for n in range(1, most + 1):
        tails = ["/".join(path.parts[-n:]) for path in paths]
        if len(set(tails)) == len(set(paths)):
            return tails
    return [path.as_posix() for path in paths]


def _safe(text: str) -> str:
    """Turn any text into what may begin the name of a file, or name a folder."""
    safe = re.sub(r"[^\w.+=-]+", "-", text).strip("-.")
    return safe.encode()[-LONGEST_NAME:].decode(errors="ignore").strip("-.") or "run"


def _unlike(text: str, taken: Iterable[str]) -> str:
    """Number a name that is taken."""
    found, n = text, 1
    while found in taken or found.casefold() in taken:
        n += 1
        found = f"{text}-{n}"
    return found
