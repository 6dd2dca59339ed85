"""Steps of a run that go beyond the paper (Method 13): rho by layer, matched controls, effects."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ccm.decoding.next_token import at_once
from ccm.decoding.results import Batch
from ccm.experiment.effects import EFFECTS, Effects, EffectsReader, join_effects
from ccm.experiment.files import read_statistics, read_table, write_table
from ccm.experiment.folder import ACTIVATION_STATS, MEASURES, PROMPT_EFFECTS, SET_EFFECTS, RunFolder
from ccm.method.ablation import MATCHED, Ablation, numbered
from ccm.method.neurons import NeuronMeasures, matched_controls, rho
from ccm.models.model import LoadedModel


def rho_by_layer(model: LoadedModel, measures: NeuronMeasures) -> pd.DataFrame:
    """Compute rho of every layer's MLP neurons, with respect to the unembedding's null space.

    A layer whose MLP has no single output matrix is left out.

    Args:
        model: The model.
        measures: Measures of its last layer, with the null space.

    Returns:
        A row per neuron: `layer` (from 0), `neuron_idx`, `rho` (NaN without output weight).
    """
    assert measures.null_space is not None
    last, tables = model.spec.n_layers - 1, []
    for layer in range(model.spec.n_layers):
        found = measures.rho
        if layer < last:
            try:
                weights = model.output_weights(layer)
            except AttributeError:
                continue
            found = rho(weights, model.final_norm, measures.null_space)
        tables.append(pd.DataFrame({"layer": layer, "neuron_idx": np.arange(len(found)), "rho": found}))
    return pd.concat(tables, ignore_index=True)


def draw_matched(
    folder: RunFolder, n: int, entropy_neurons: Sequence[int], seed: int
) -> dict[str, tuple[int, ...]]:
    """Draw and name the matched controls of a run whose measures and statistics are written already.

    Sigma is taken as it was measured, not as the protocol changes it (defect 3), because the controls
    should match what the neurons do. An infinite sigma of released statistics counts as the largest.

    Args:
        folder: The run.
        n: How many sets.
        entropy_neurons: The set to match.
        seed: Seed of the draws.

    Returns:
        Neurons of each set, by its name.
    """
    norm = read_table(folder.path / MEASURES)["norm"].to_numpy(float)
    statistics, _ = read_statistics(folder.path / ACTIVATION_STATS)
    return numbered(MATCHED, matched_controls(n, norm, statistics.std, entropy_neurons, seed))


def effect_tables(folder: RunFolder) -> list[Path]:
    """List the tables of effects: one for each ablation value's entropy set, and one for all sets."""
    values = folder.manifest["identity"]["ablation_values"]
    return [*(folder.path / value / PROMPT_EFFECTS for value in values), folder.path / SET_EFFECTS]


def effects_reader(
    model: LoadedModel, n_prompts: int, planned: Mapping[str, Sequence[Ablation]]
) -> EffectsReader:
    """Make the reader of every ablation's effect on first-token entropy, for a run's decode.

    Args:
        model: The model.
        n_prompts: Number of prompts of the run.
        planned: For each ablation value its sets, the entropy set first.
    """
    return EffectsReader(at_once(model), n_prompts, *entropy_sets(planned))


def entropy_sets(planned: Mapping[str, Sequence[object]]) -> tuple[list[int], int]:
    """Number all sets of a decode, set 0 being the plain run; return the entropy sets, and how many.

    >>> entropy_sets({"mean_ablation": ["entropy", "control_000"], "mode_ablation": ["entropy"]})
    ([1, 3], 4)
    """
    *starts, stop = np.cumsum([1, *map(len, planned.values())]).tolist()
    return starts, stop


def write_effects(folder: RunFolder, batches: Sequence[Batch]) -> None:
    """Write the tables of effects on first-token entropy; tables that exist are left as they are.

    Args:
        folder: The run.
        batches: All batches of its decode.
    """
    *tables, of_sets = effect_tables(folder)
    names = {path.parent.name: list(folder.manifest["sets"]) for path in tables}
    own, _ = entropy_sets(names)
    found = join_effects(batches, own)
    for i, path in enumerate(tables):
        if not path.is_file():
            entropies = {f"entropy_{name}": found.own[:, i, e] for e, name in enumerate(EFFECTS)}
            write_table(path, pd.DataFrame({"entropy_plain": found.plain, **entropies}))
    folder.note(effects={"prompts": len(found.plain), "prompts_of_all_sets": len(found.sampled)})
    if not of_sets.is_file():
        write_table(of_sets, set_effects(found, names))


def set_effects(found: Effects, sets: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Average each set's change of entropy, before - after as in Method 8, over the sampled prompts.

    Args:
        found: Entropies.
        sets: For each ablation value its sets' names, the entropy set first.

    Returns:
        A row per ablation value and set: `ablation_value`, `set`, `total`, `direct`, `norm_only` (mean
        changes, nats; above 0 where the ablation lowers entropy), `prompts` (how many).
    """
    before = found.plain[found.sampled, None, None]
    own = (before - found.own[found.sampled]).mean(0)  # (value, effect)
    others = (before - found.others).mean(0)  # (other set, effect)
    rows, start = list[dict[str, object]](), 0
    for (value, names), mine in zip(sets.items(), own, strict=True):
        stop = start + len(names) - 1
        for name, change in zip(names, [mine, *others[start:stop]], strict=True):
            changes = dict(zip(EFFECTS, change.tolist(), strict=True))
            rows.append({"ablation_value": value, "set": name, **changes})
        start = stop
    return pd.DataFrame(rows).assign(prompts=len(found.sampled))
