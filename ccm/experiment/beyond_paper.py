"""Steps of a run that go beyond the paper (Method 13): rho by layer, matched controls, effects."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from ccm.decoding.engines import ENGINES, Engine
from ccm.experiment.batches import ArrayStore
from ccm.experiment.effects import EFFECTS, Effects, measure_effects
from ccm.experiment.files import read_statistics, read_table, write_table
from ccm.experiment.folder import ACTIVATION_STATS, MEASURES, PROMPT_EFFECTS, SET_EFFECTS, RunFolder
from ccm.method.ablation import MATCHED, Ablation, numbered
from ccm.method.neurons import NeuronMeasures, matched_controls, rho
from ccm.models.model import LoadedModel


def rho_by_layer(model: LoadedModel, measures: NeuronMeasures) -> pd.DataFrame:
    """Compute rho of every layer's MLP neurons, against the one null space of the unembedding.

    A layer whose MLP has no single output matrix is left out.

    Args:
        model: The model.
        measures: Of its last layer, with the null space.

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
        seed: Of the draws.

    Returns:
        Neurons of each set, by its name.
    """
    norm = read_table(folder.path / MEASURES)["norm"].to_numpy(float)
    statistics, _ = read_statistics(folder.path / ACTIVATION_STATS)
    return numbered(MATCHED, matched_controls(n, norm, statistics.std, entropy_neurons, seed))


def effects_step(
    folder: RunFolder,
    model: LoadedModel,
    tokens: Sequence[Sequence[int]],
    planned: Mapping[str, Sequence[Ablation]],
    engine: Engine = ENGINES["shared"],
) -> None:
    """Split every ablation's effect on the first token's entropy, unless the tables are there already.

    The engine only runs the prompts without ablation; the rest is the same for every engine.

    Args:
        folder: The run.
        model: The model.
        tokens: Of every probing prompt.
        planned: For each ablation value its sets, the entropy set first.
        engine: What runs the prompts.
    """
    tables = [folder.path / value / PROMPT_EFFECTS for value in planned]
    store = ArrayStore(folder.path, "effects")
    if all(path.is_file() for path in [*tables, folder.path / SET_EFFECTS]):
        store.clear()
        return
    found = measure_effects(
        model,
        tokens,
        [sets[0] for sets in planned.values()],
        [ablation for sets in planned.values() for ablation in sets[1:]],
        store=store,
        memory_budget=folder.manifest["memory_budget"],
        engine=engine,
    )
    for i, path in enumerate(tables):
        if not path.is_file():
            entropies = {f"entropy_{name}": found.own[:, i, e] for e, name in enumerate(EFFECTS)}
            write_table(path, pd.DataFrame({"entropy_plain": found.plain, **entropies}))
    folder.note(effects={"prompts": len(tokens), "prompts_of_all_sets": len(found.sampled)})
    write_table(folder.path / SET_EFFECTS, set_effects(found, planned))
    store.clear()


def set_effects(found: Effects, planned: Mapping[str, Sequence[Ablation]]) -> pd.DataFrame:
    """Average each set's change of entropy, before - after as in Method 8, over the sampled prompts.

    Args:
        found: Entropies.
        planned: For each ablation value its sets, the entropy set first.

    Returns:
        A row per ablation value and set: `ablation_value`, `set`, `total`, `direct`, `norm_only` (mean
        changes, nats; above 0 where the ablation lowers entropy), `prompts` (how many).
    """
    before = found.plain[found.sampled, None, None]
    own = (before - found.own[found.sampled]).mean(0)  # (value, effect)
    others = (before - found.others).mean(0)  # (other set, effect)
    rows, start = list[dict[str, object]](), 0
    for (value, sets), mine in zip(planned.items(), own, strict=True):
        stop = start + len(sets) - 1
        for ablation, change in zip(sets, [mine, *others[start:stop]], strict=True):
            changes = dict(zip(EFFECTS, change.tolist(), strict=True))
            rows.append({"ablation_value": value, "set": ablation.name, **changes})
        start = stop
    return pd.DataFrame(rows).assign(prompts=len(found.sampled))
