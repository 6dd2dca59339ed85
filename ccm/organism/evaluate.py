"""The figures that say whether a trained organism is fit for use, from a run of the experiment."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ccm.experiment.config import RunConfig
from ccm.experiment.files import read_json, read_statistics, read_table
from ccm.experiment.folder import ACTIVATION_STATS, MANIFEST, MEASURES, PROMPTS
from ccm.experiment.run import run
from ccm.method.neurons import NeuronMeasures, measure
from ccm.method.sources import SOURCES
from ccm.models.load import load
from ccm.models.specs import MODELS
from ccm.organism.world import World

__all__ = ["MIN_RHO", "Figures", "Outcome", "evaluate", "measures_of"]

MIN_RHO = MODELS["organism"].min_rho


@dataclass(frozen=True)
class Outcome:
    """What one ablation value does, in percent."""

    gts: float  # prompts whose knowledge source changes
    q_value: float
    control_gts: tuple[float, float]  # mean and maximum over the controls
    cr_ck: float  # prompts that were not CK and are afterwards
    control_cr_ck: tuple[float, float]
    transitions: list[list[int]]  # [from, to], in the order of `SOURCES`


@dataclass(frozen=True)
class Figures:
    """What was measured on one checkpoint; proportions in percent."""

    facts: int
    recall: float  # parametric object is the true object, of all facts
    kept: dict[str, int]  # facts left after each filter
    prompts: int
    held_out: float  # prompts whose counter-object no training text put beside the subject
    sources: dict[str, float]  # prompts by knowledge source, before any ablation
    selected: tuple[int, ...]
    lowest_planted_rho: float
    highest_other_rho: float
    activation_std: list[float]  # of the planted neurons
    outcomes: dict[str, Outcome]  # by ablation value


def measures_of(folder: Path, null_dims: int) -> NeuronMeasures:
    """Measure the last layer of a saved organism; `null_dims` includes the all-ones direction."""
    model = load(replace(MODELS["organism"], folder=folder))
    return measure(model.W_U, model.W_out, model.final_norm, null_dims)


def evaluate(folder: Path, world: World, planted: Sequence[int], null_dims: int) -> Figures:
    """Measure a saved organism by running the whole experiment on it.

    Args:
        folder: The checkpoint, with its tables.
        world: The world it was trained on, for the counter-objects held out of training.
        planted: The planted neurons of the last layer, ascending.
        null_dims: Null-space dimensions, the all-ones direction included.
    """
    config = RunConfig(
        ablation_values=("all",), null_space_dims=null_dims, model_paths={"organism": folder}
    )
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "run"
        scores = run(config, out)
        counts = read_json(out / MANIFEST)["facts"]
        measures = read_table(out / MEASURES)
        prompts = read_table(out / PROMPTS)
        statistics, _ = read_statistics(out / ACTIVATION_STATS)
    held_out = {(fact.query, name) for fact in world.facts for name in fact.held_out}
    pairs = zip(prompts["statement_query"], prompts["counter_knowledge_object"], strict=True)
    is_planted = measures["neuron_idx"].isin(planted)
    selected = measures.loc[measures["entropy_neuron"], "neuron_idx"]
    return Figures(
        facts=counts["facts"],
        recall=scores["parametric_recall"]["percent"],
        kept={name: count for name, count in counts.items() if name.startswith("after")},
        prompts=len(prompts),
        held_out=100.0 * float(np.mean([pair in held_out for pair in pairs])),
        sources={source: scores["sources"][source]["percent"] for source in SOURCES},
        selected=tuple(sorted(int(i) for i in selected)),
        lowest_planted_rho=float(measures.loc[is_planted, "rho"].min()),
        highest_other_rho=float(measures.loc[~is_planted, "rho"].max()),
        activation_std=statistics.std[list(planted)].tolist(),
        outcomes={name: _outcome(value) for name, value in scores["ablations"].items()},
    )


def _outcome(value: Mapping[str, Any]) -> Outcome:
    """Pick what the card shows from the scores of one ablation value."""
    own, controls = value["entropy"], value["controls"]
    others = controls["conversion_ratios"]["CK"]
    return Outcome(
        gts=own["gts"]["percent"],
        q_value=own["q_value"],
        control_gts=(controls["gts"]["mean"], controls["gts"]["high"]),
        cr_ck=own["conversion_ratios"]["CK"]["percent"],
        control_cr_ck=(others["mean"], others["high"]),
        transitions=[[own["transition_counts"][k][j] for j in SOURCES] for k in SOURCES],
    )
