"""The released code's numbers, read once per process; see README.md here for what they are."""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ccm.experiment.ablate_io import read_statistics_npz
from ccm.experiment.fact_files import read_facts
from ccm.experiment.probing import PROMPT_COLUMNS
from ccm.method.facts import FactSet, Relation, fact_set
from ccm.method.prompts import ProbingPrompt
from ccm.method.statistics import ActivationStatistics
from ccm.models.load import load
from ccm.models.model import LoadedModel
from ccm.models.specs import spec_for

HERE = Path(__file__).parent
NAMES = ("gpt2-style", "planted-style")
N_GROUPS = 4


@dataclass(frozen=True)
class Released:
    """One folder of released numbers with its model loaded; read-only."""

    name: str
    model: LoadedModel
    facts: FactSet
    prompts: tuple[ProbingPrompt, ...]
    tokens: tuple[tuple[int, ...], ...]  # of the prompts, BOS first
    statistics: ActivationStatistics
    outputs: dict[str, Any]  # released_outputs.json

    @property
    def folder(self) -> Path:
        return HERE / self.name

    @property
    def entropy_neurons(self) -> tuple[int, ...]:
        return tuple(self.outputs["entropy_neurons"])

    @property
    def random_sets(self) -> list[tuple[int, ...]]:
        return [tuple(neurons) for neurons in self.outputs["random_sets"]]

    def run(self, name: str) -> dict[str, Any]:
        """What the released code gave in one run: `pre`, an ablation value, or `random_<i>`."""
        results: dict[str, Any] = self.outputs["results"]
        return results[name]

    def table(self, name: str) -> pd.DataFrame:
        return pd.read_csv(self.folder / name, keep_default_na=False)  # "None" may be a name


@functools.cache
def released(name: str) -> Released:
    """Read a folder and load its model; a second call returns the same object."""
    folder = HERE / name
    model = load(spec_for(str(folder / "model")))
    prompts = _prompts(folder / "probing_prompts.csv")
    return Released(
        name=name,
        model=model,
        facts=_facts(name, folder / "model"),
        prompts=tuple(prompts),
        tokens=tuple(tuple(model.encode(prompt.text)) for prompt in prompts),
        statistics=read_statistics_npz(folder / "activation_stats.npz"),
        outputs=json.loads((folder / "released_outputs.json").read_text(encoding="utf-8")),
    )


def _facts(name: str, folder: Path) -> FactSet:
    facts = read_facts(folder / "facts.csv")
    lemmas = sorted({fact.relation for fact in facts})
    relations = {
        lemma: Relation(lemma, f"g{i % N_GROUPS}", "", "", "", "") for i, lemma in enumerate(lemmas)
    }
    return fact_set(name, facts, relations)


def _prompts(path: Path) -> Sequence[ProbingPrompt]:
    table = pd.read_csv(path, keep_default_na=False)
    fields = {attribute: column for column, attribute in PROMPT_COLUMNS.items() if column in table}
    return [
        ProbingPrompt(**{attribute: row[column] for attribute, column in fields.items()})
        for row in table.to_dict("records")
    ]
