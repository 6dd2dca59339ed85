"""What the paper printed about each model, as typed into `golden/paper/`; no command updates these."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ccm.method.sources import SOURCES, Source
from ccm.paper.printed import Printed

GOLDEN = Path(__file__).parents[2] / "golden"

NEURON_MEASURES = ("logit_var", "norm", "rho")
SETS = ("entropy", "random_mean", "random_3se")


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
    """Everything the paper says about one model; percent unless it is a count."""

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
    def n_prompts(self) -> float:
        """Probing prompts, over all sources."""
        return sum(s.value for s in self.sources.values())

    def others(self, source: Source) -> float:
        """Prompts that were not `source` before ablation: the denominator of its CR."""
        return self.n_prompts - self.sources[source].value

    def converted(self, source: Source) -> CountRange:
        """Prompts that became `source` under mean ablation, from the reconstructed counts."""
        first, second = (self.transition_counts[k][source] for k in SOURCES if k != source)
        return first + second


def _square(entries: Mapping[str, Any], leaf: type) -> dict[Source, dict[Source, Any]]:
    """Read a [from][to] table, in the order of `SOURCES`."""
    return {k: {j: leaf(**entries[k][j]) for j in SOURCES if j in entries[k]} for k in SOURCES}


@cache
def printed(model: str) -> PrintedModel:
    """Read what was printed about a model.

    Raises:
        FileNotFoundError: nothing was.
        KeyError, TypeError: a value is missing, or has an entry that is none of `Printed`'s.
    """
    data = json.loads((GOLDEN / "paper" / f"{model}.json").read_text(encoding="utf-8"))
    if data["model"] != model:
        raise ValueError(f"golden/paper/{model}.json: holds {data['model']!r}")
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
