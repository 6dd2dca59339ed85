"""A finished run, read back for drawing and for tables; nothing here runs a model."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int8

from ccm.decoding.activations import float16_sigma
from ccm.errors import BadInput
from ccm.experiment.effects import EFFECTS
from ccm.experiment.files import read_json, read_statistics, read_table
from ccm.experiment.folder import (
    ACTIVATION_STATS,
    MEASURES,
    PROMPT_EFFECTS,
    PROMPTS,
    RHO_BY_LAYER,
    SCORES,
    SET_EFFECTS,
    SINGULAR_VALUES,
    read_manifest,
)
from ccm.method.ablation_values import ABLATION_VALUES
from ccm.method.neurons import NeuronMeasures
from ccm.method.protocol import PROTOCOLS
from ccm.method.sources import SOURCES
from ccm.method.statistics import ActivationStatistics
from ccm.models.specs import MODELS

LOG_PROBS = tuple(f"log_prob_{s.lower()}" for s in SOURCES)
CELL_COLUMNS = ("text", "source", "entropy", *LOG_PROBS)
PROMPT_COLUMNS = (
    "statement_subject",
    "rel_lemma",
    "relation_group_id",
    "knowledge_probing_prompt",
    "counter_knowledge_object",
    "parametric_knowledge_object",
)
RHO_COLUMNS = ("layer", "neuron_idx", "rho")
EFFECT_COLUMNS = ("entropy_plain", *(f"entropy_{name}" for name in EFFECTS))
SET_EFFECT_COLUMNS = ("ablation_value", "set", *EFFECTS, "prompts")
MEASURE_COLUMNS = ("neuron_idx", "logitvar", "norm", "rho", "entropy_neuron")


@dataclass(frozen=True)
class RunResults:
    """What figures and tables read of a finished run."""

    path: Path
    model: str  # the name by which it is known to the paper and to `MODELS`
    name: str  # the name used in file names and data: the model's, unless several runs share it
    display_name: str  # the name people read
    identity: Mapping[str, Any]  # what was run: dims, k, seed, protocol
    scores: Mapping[str, Any]  # scores.json
    measures: pd.DataFrame  # a row per last-layer neuron
    singular_values: Float[np.ndarray, "d_model"]  # of the processed W_U, descending
    statistics: ActivationStatistics  # from which replacement values were taken
    sigma: Float[np.ndarray, "d_mlp"]  # of the activations as measured, whatever the protocol
    prompts: pd.DataFrame  # a row per probing prompt
    plain: pd.DataFrame  # the plain run's cell
    ablated: Mapping[str, pd.DataFrame]  # the entropy set's cell by ablation value
    manifest: Mapping[str, Any]  # manifest.json: what else is known of the run
    rho_by_layer: pd.DataFrame  # a row per neuron of every layer
    effects: Mapping[str, pd.DataFrame]  # by ablation value, a row per probing prompt
    set_effects: pd.DataFrame  # a row per ablation value and set

    @property
    def values(self) -> tuple[str, ...]:
        """Names of the ablation values that were run."""
        return tuple(self.ablated)

    @property
    def neuron_measures(self) -> NeuronMeasures:
        """LogitVar, norm and rho, as `ccm.method.neurons.select` takes them."""
        logit_var, norm, rho = (self.measures[c].to_numpy(float) for c in ("logitvar", "norm", "rho"))
        return NeuronMeasures(logit_var, norm, rho, self.singular_values)

    @property
    def entropy_neurons(self) -> list[int]:
        """The entropy set, ascending."""
        chosen = self.measures.loc[self.measures["entropy_neuron"], "neuron_idx"]
        return sorted(int(i) for i in chosen)

    @cached_property
    def relation_groups(self) -> dict[str, str]:
        """Group of every relation, including those without a prompt."""
        return dict(self.manifest["facts"]["relation_groups"])

    @cached_property
    def control_sources(self) -> dict[str, Int8[np.ndarray, "control prompt"]]:
        """Sources under every control set by ablation value, as indices in `SOURCES`.

        Read on first use, and only this column, because these cells are the bulk of a run.

        Raises:
            BadInput: a cell is missing, damaged, or of other prompts.
        """
        return {
            value: np.asarray(
                [
                    _sources(self.path / value / f"{entry['name']}.parquet", len(self.plain))
                    for entry in self.scores["ablations"][value]["controls"]["sets"]
                ],
                dtype=np.int8,
            ).reshape(-1, len(self.plain))
            for value in self.values
        }


def read_results(path: Path) -> RunResults:
    """Read a finished run folder.

    Args:
        path: A folder of `ccm run` or `ccm merge`.

    Raises:
        BadInput: no folder, no run, a shard of a run, an unfinished run, a missing or damaged file,
            or a folder of another format.
    """
    if not path.is_dir():
        raise BadInput(f"{path}: no such folder. Give a run folder of `ccm run`.")
    manifest = read_manifest(path, "Give a run folder of `ccm run`.")
    identity = manifest["identity"]
    if identity.get("shard"):
        raise BadInput(
            f"{path}: shard {identity['shard']} of a run has no scores. Join all with `ccm merge`."
        )
    if not manifest["complete"]:
        raise BadInput(f"{path}: the run is not finished. Run its command again with --out {path}.")
    model = str(identity["model"])
    names = [str(value) for value in identity["ablation_values"]]
    return RunResults(
        path=path,
        model=model,
        name=model,
        display_name=MODELS[model].display_name if model in MODELS else model,
        identity=identity,
        scores=_scores(path, names),
        measures=_table(path / MEASURES, MEASURE_COLUMNS),
        singular_values=_table(path / SINGULAR_VALUES, ("singular_value",))[
            "singular_value"
        ].to_numpy(),
        statistics=_statistics(path, identity),
        sigma=read_statistics(_present(path / ACTIVATION_STATS))[0].std,
        prompts=_table(path / PROMPTS, PROMPT_COLUMNS),
        plain=_table(path / "plain.parquet", CELL_COLUMNS),
        ablated={name: _table(path / name / "entropy.parquet", CELL_COLUMNS) for name in names},
        manifest=manifest,
        rho_by_layer=_table(path / RHO_BY_LAYER, RHO_COLUMNS),
        effects={name: _table(path / name / PROMPT_EFFECTS, EFFECT_COLUMNS) for name in names},
        set_effects=_table(path / SET_EFFECTS, SET_EFFECT_COLUMNS),
    )


def _present(path: Path) -> Path:
    if not path.is_file():
        raise BadInput(f"{path}: missing from the run folder. Run its command again to make it.")
    return path


def _table(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    table = read_table(_present(path))
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise BadInput(f"{path}: not a table of a run (no column {missing[0]!r}).")
    return table


def source_codes(sources: pd.Series) -> Int8[np.ndarray, "prompt"]:
    """Turn sources into their indices in `SOURCES`; -1 for anything else."""
    return pd.Index(SOURCES).get_indexer(pd.Index(sources)).astype(np.int8)


def _sources(path: Path, prompts: int) -> Int8[np.ndarray, "prompt"]:
    codes = source_codes(read_table(_present(path), columns=["source"])["source"])
    if len(codes) != prompts or (codes < 0).any():
        raise BadInput(f"{path}: not a cell of this run. Remove it and run again.")
    return codes


def _scores(path: Path, names: list[str]) -> dict[str, Any]:
    scores = read_json(_present(path / SCORES))
    scored = scores.get("ablations") if isinstance(scores, dict) else None
    if not isinstance(scored, dict) or list(scored) != names or not set(names) <= set(ABLATION_VALUES):
        raise BadInput(f"{path / SCORES}: not the scores of this run. Remove it and run again.")
    return dict(scores)


def _statistics(path: Path, identity: Mapping[str, Any]) -> ActivationStatistics:
    """Read the statistics, with sigma as the run's protocol took it (defect 3)."""
    statistics, positions = read_statistics(_present(path / ACTIVATION_STATS))
    if PROTOCOLS[identity["protocol"]].float16_sigma and identity["stats"] != "released":
        return float16_sigma(statistics, positions)
    return statistics
