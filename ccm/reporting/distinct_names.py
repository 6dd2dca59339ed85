"""Names for runs of one model: each says what sets its run apart, in as few words as possible."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Any

from ccm.errors import BadInput
from ccm.experiment.results import RunResults
from ccm.models.specs import MODELS

LONGEST_VALUE = 40  # characters; a longer setting names no run, and the run's folder is used instead
LONGEST_NAME = 100  # bytes that a run's name may take in the name of a file
# How to write a setting in words, best first. Others follow as they are: `seed 7`.
_IN_WORDS: dict[str, Callable[[Any], str]] = {
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
_LEFT_OUT = ("model", "versions", "shard")


def distinct_names(runs: Sequence[RunResults]) -> list[RunResults]:
    """Give each run a name of its own, for people and for file names.

    The only run of a model is named after the model. Several runs of one model are named after what
    differs: where their weights came from (`a/final` and `b/final`, or a revision), else their
    settings (`Organism (float32)`), else their run folders.

    Args:
        runs: Finished runs.

    Returns:
        The same runs in the same order.

    Raises:
        BadInput: two of them are the same run.
    """
    groups = defaultdict[str, list[int]](list)
    for i, run in enumerate(runs):
        groups[run.display_name.casefold()].append(i)
    named = list(runs)
    single = [i for group in groups.values() for i in group if len(group) == 1]
    names = {runs[i].name.casefold() for i in single}
    taken = {runs[i].display_name for i in single}
    for group in groups.values():
        if len(group) == 1:
            continue
        labels = _labels([runs[i] for i in group])
        for i, (label, file_label) in zip(group, labels, strict=True):
            named[i] = replace(
                runs[i],
                display_name=_numbered_if_taken(label, taken),
                name=_numbered_if_taken(_safe_in_file_names(file_label), names),
            )
            taken.add(named[i].display_name)
            names.add(named[i].name.casefold())
    return named


def _labels(runs: Sequence[RunResults]) -> list[tuple[str, str]]:
    """Name runs of one model: for each, a name for people and one for files."""
    _check_distinct(runs)
    distinctions = _distinctions(runs)
    chosen = _needed(distinctions)
    labels = [_label(run, i, distinctions[0], chosen) for i, run in enumerate(runs)]
    if len({label for label, _ in labels}) < len(runs):  # a folder may have a known model's name
        chosen.append(distinctions[-1])
        labels = [_label(run, i, distinctions[0], chosen) for i, run in enumerate(runs)]
    return labels


def _label(
    run: RunResults, i: int, sources: Sequence[str], chosen: Sequence[Sequence[str]]
) -> tuple[str, str]:
    """Put the i-th run's name together from the i-th text of each chosen difference."""
    words, base, file = [texts[i] for texts in chosen if texts[i]], run.display_name, run.model
    if run.model not in MODELS and words[:1] == [sources[i]] and PurePath(words[0]).name == run.model:
        base = file = words.pop(0)  # the model has its name from the folder
    return f"{base} ({', '.join(words)})" if words else base, "-".join([file, *words])


def _distinctions(runs: Sequence[RunResults]) -> list[list[str]]:
    """List what runs may differ in, the best first: one text per run for each."""
    revisions = [_revision(run) for run in runs]
    tails = _tails([_source(run) for run in runs])
    found = [[revision or tail for revision, tail in zip(revisions, tails, strict=True)]]
    for key in dict.fromkeys([*_IN_WORDS, *(key for run in runs for key in run.identity)]):
        texts = [_setting(key, run.identity.get(key)) for run in runs]
        if all(0 < len(text) <= LONGEST_VALUE for text in texts):
            found.append(texts)
    return [*found, _tails([run.path.resolve() for run in runs])]


def _needed(distinctions: Iterable[list[str]]) -> list[list[str]]:
    """Keep the differences that distinguish runs which are still alike in the earlier ones."""
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
    """Return where the weights came from: the folder that was loaded."""
    return PurePath(run.manifest["weights"]["source"])


def _revision(run: RunResults) -> str:
    revision = run.manifest["weights"]["revision"]
    return f"revision {str(revision)[:8]}" if revision else ""


def _setting(key: str, value: object) -> str:
    """Write a setting in words; an empty text for one that says nothing to people, like a hash."""
    if key in _LEFT_OUT or key.endswith("sha256") or isinstance(value, dict):
        return ""
    if key in _IN_WORDS:
        return _IN_WORDS[key](value)
    return f"{key.replace('_', ' ')} {value}"


def _tails(paths: Sequence[PurePath]) -> list[str]:
    """Shorten paths to their last few parts, as few as keep different paths different."""
    most = max(len(path.parts) for path in paths)
    for n in range(1, most + 1):
        tails = ["/".join(path.parts[-n:]) for path in paths]
        if len(set(tails)) == len(set(paths)):
            return tails
    return [path.as_posix() for path in paths]


def _safe_in_file_names(text: str) -> str:
    """Turn any text into one that can begin the name of a file or name a folder."""
    safe = re.sub(r"[^\w.+=-]+", "-", text).strip("-.")
    return safe.encode()[-LONGEST_NAME:].decode(errors="ignore").strip("-.") or "run"


def _numbered_if_taken(text: str, taken: Iterable[str]) -> str:
    """Add a number to a name that another run has already."""
    found, n = text, 1
    while found in taken or found.casefold() in taken:
        n += 1
        found = f"{text}-{n}"
    return found
