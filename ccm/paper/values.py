"""What the paper printed about each of its models: read from JSON, typed in by hand, never updated.

The numbers are kept once, in `golden/paper/` of the repository, one file per model. An installation
carries that folder as `ccm/paper/printed/`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ccm.errors import BadInput, allowed
from ccm.method.sources import SOURCES, Source

MEAN = "mean_ablation"  # the only ablation value with printed transition scores and conversion ratios
NEURON_MEASURES = ("logit_var", "norm", "rho")
SETS = ("entropy", "random_mean", "random_3se")
Number = float | int  # as typed into the files


def folder_of_values(module: Path) -> Path:
    """Find the printed numbers: those installed with this module, else those of its checkout.

    Args:
        module: Path of this module.
    """
    installed = module.parent / "printed"
    return installed if installed.is_dir() else module.parents[2] / "golden" / "paper"


FOLDER = folder_of_values(Path(__file__).resolve())


@dataclass(frozen=True)
class Printed:
    """One number of the paper, with where it stands and how finely it can be read there."""

    value: Number  # as typed into the file
    source: str  # table, figure or released file
    resolution: Number  # step between two values that can be told apart; 0: exact
    defect: int | None = None  # number in the list of defects: the value is an artefact, no result
    reason: str | None = None  # what made the artefact

    @property
    def low(self) -> float:
        """The least value that would be printed like this."""
        return self.value - self.resolution / 2

    @property
    def high(self) -> float:
        """The greatest value that would be printed like this."""
        return self.value + self.resolution / 2


@dataclass(frozen=True)
class CountRange:
    """A number of prompts that the printed percentages leave between two whole numbers."""

    low: int
    high: int
    source: str

    def __add__(self, other: "CountRange") -> "CountRange":
        return CountRange(self.low + other.low, self.high + other.high, self.source)


@dataclass(frozen=True)
class PrintedNeuron:
    """The measures of an entropy neuron, from the released list."""

    neuron: int
    logit_var: Printed
    norm: Printed
    rho: Printed


Table = Mapping[Source, Mapping[Source, Printed]]  # [from][to]


@dataclass(frozen=True)
class PrintedModel:
    """Everything the paper says about one model; in percent, unless it is a count."""

    model: str
    sizes: Mapping[str, Printed]  # fields of `ModelSpec`
    neurons: tuple[PrintedNeuron, ...]
    sources: Mapping[Source, Printed]  # prompts before ablation
    transition_scores: Mapping[str, Table]  # by `SETS`, mean ablation
    transition_counts: Mapping[Source, Mapping[Source, CountRange]]  # [from][to], off the diagonal
    conversion_ratios: Mapping[str, Mapping[Source, Printed]]  # "entropy", "random_mean"
    gts: Mapping[str, Printed]  # by ablation value
    q_values: Mapping[str, Printed]

    @property
    def n_prompts(self) -> Number:
        """Probing prompts, over all sources."""
        return sum(s.value for s in self.sources.values())

    def others(self, source: Source) -> Number:
        """Prompts that were not `source` before ablation: the denominator of its CR."""
        return self.n_prompts - self.sources[source].value

    def converted(self, source: Source) -> CountRange:
        """Prompts that became `source` under mean ablation, from the reconstructed counts."""
        first, second = (self.transition_counts[k][source] for k in SOURCES if k != source)
        return first + second

    @property
    def proportions(self) -> Mapping[str, Mapping[str, Printed]]:
        """What was printed of the entropy set in percent of prompts: by quantity, by ablation value."""
        ratios = self.conversion_ratios["entropy"]
        return {"GTS": self.gts, **{f"CR({k})": {MEAN: ratio} for k, ratio in ratios.items()}}


def _square(entries: Mapping[str, Any], leaf: type) -> dict[Source, dict[Source, Any]]:
    """Read a [from][to] table, in the order of `SOURCES`."""
    return {k: {j: leaf(**entries[k][j]) for j in SOURCES if j in entries[k]} for k in SOURCES}


@cache
def printed_models() -> tuple[str, ...]:
    """List the models that the paper printed numbers of, by name."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.json")))


@cache
def printed(model: str) -> PrintedModel:
    """Read what was printed about a model.

    Raises:
        BadInput: nothing was.
        KeyError, TypeError: a value is missing, or has an entry that is none of `Printed`'s.
    """
    if model not in printed_models():
        raise BadInput(f"{model}: the paper printed no number of it. {allowed(printed_models())}.")
    data = json.loads((FOLDER / f"{model}.json").read_text(encoding="utf-8"))
    if data["model"] != model:
        raise ValueError(f"{FOLDER / model}.json: holds {data['model']!r}")
    ratios, values = data["conversion_ratios"], data["global_transition_scores"]
    return PrintedModel(
        model=model,
        sizes={name: Printed(**entry) for name, entry in data["sizes"].items()},
        neurons=tuple(
            PrintedNeuron(int(i), **{m: Printed(**entry[m]) for m in NEURON_MEASURES})
            for i, entry in data["neurons"].items()
        ),
        sources={s: Printed(**data["knowledge_sources"][s]) for s in SOURCES},
        transition_scores={s: _square(data["transition_scores"][s], Printed) for s in SETS},
        transition_counts=_square(data["transition_counts"], CountRange),
        conversion_ratios={s: {k: Printed(**ratios[s][k]) for k in SOURCES} for s in ratios},
        gts={v: Printed(**entry["gts"]) for v, entry in values.items()},
        q_values={v: Printed(**entry["q_value"]) for v, entry in values.items()},
    )


def printed_proportion(model: str, value: str, quantity: str) -> Printed | None:
    """Look up a proportion of prompts that was printed for the entropy set, in percent.

    Args:
        model: Name of the model.
        value: Name of the ablation value.
        quantity: GTS, CR(CK), CR(ND) or CR(PK).

    Returns:
        The number; None if the paper has none: conversion ratios are printed for mean ablation only.

    >>> printed_proportion("gpt2-small", "mode_ablation", "GTS").defect
    4
    """
    if model not in printed_models():
        return None
    return printed(model).proportions.get(quantity, {}).get(value)
