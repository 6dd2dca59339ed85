"""Finished run folders made of random results: no model, any size, any edge case."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ccm.experiment.files import write_statistics, write_table
from ccm.experiment.folder import (
    ACTIVATION_STATS,
    MEASURES,
    PROMPT_EFFECTS,
    PROMPTS,
    RHO_BY_LAYER,
    SET_EFFECTS,
    SINGULAR_VALUES,
    RunFolder,
)
from ccm.experiment.scoring import write_scores
from ccm.method.ablation import MATCHED, numbered
from ccm.method.sources import SOURCES
from ccm.method.statistics import ActivationStatistics
from ccm.models.specs import CHECKPOINT

RELATIONS = (("capital-of", "places"), ("born-in", "places"), ("play-the", "music"))  # name, group
NO_OBJECTS = {"count": 0, "of": 20, "names": [], "prompts": 0, "counter_begins": 0, "pairs": []}


def make_run(
    path: Path,
    *,
    model: str = "made",
    prompts: int = 60,
    before: Sequence[str] = SOURCES,
    moved: float = 0.2,  # share of prompts whose source changes
    controls: int = 5,
    d_mlp: int = 40,
    d_model: int = 12,
    k: int = 3,
    values: Sequence[str] = ("mean_ablation",),
    text: str = " Rom.",
    same_log_probs: bool = False,  # every prompt alike, before and after
    protocol: str = "corrected",
    relations: Sequence[tuple[str, str]] = RELATIONS,
    seed: int = 0,
    matched: int | None = None,  # sets of matched controls; None: as many as controls
    layers: int = 3,
) -> RunFolder:
    """Write a run folder with everything figures and tables read."""
    random = np.random.default_rng(seed)
    chosen = sorted(int(i) for i in random.choice(d_mlp, k, replace=False))
    of_both = controls if matched is None else matched
    asked_for = {
        "model": model,
        "protocol": protocol,
        "ablation_values": list(values),
        "controls": controls,
        "matched_controls": of_both,
    }
    identity = {
        **asked_for,
        "weights_sha256": "0" * 64,
        "facts": "made",
        "seed": 123,
        "device": "cpu",
        "device_name": "a machine",
        "dtype": "float32",
        "engine": "shared",
        "versions": {"python": "3.1.4"},
        "null_space_dims": 2,
        "k": k,
        "min_rho": 0.5,
        "neurons": None,
        "stats": "own",
        "shard": None,
    }
    folder = RunFolder(path, identity)
    others = [i for i in range(d_mlp) if i not in chosen]
    like = [others[-1 - i % len(others)] for i in range(of_both)]
    sets = {"entropy": chosen, **{f"control_{i:03d}": [i] * k for i in range(controls)}}
    sets |= numbered(MATCHED, [[i] * k for i in like])
    source = np.asarray([before[i % len(before)] for i in range(prompts)], dtype=object)

    def cell(share: float) -> pd.DataFrame:
        after = source.copy()
        for i in np.flatnonzero(random.random(prompts) < share):
            after[i] = random.choice([s for s in SOURCES if s != source[i]])
        log_probs = {
            f"log_prob_{s.lower()}": np.full(prompts, -1.0)
            if same_log_probs
            else random.normal(-2, 1, prompts) + 2.0 * (source == s)
            for s in SOURCES
        }
        entropy = random.random(prompts)
        return pd.DataFrame(
            {"text": [text] * prompts, "source": after, "entropy": entropy, **log_probs}
        )

    write_table(folder.cell("", "plain"), cell(0.0))
    for value in values:
        for name in sets:
            write_table(folder.cell(value, name), cell(moved if name == "entropy" else moved / 4))
    rho = random.random(d_mlp) * 0.4
    rho[chosen] = 0.9
    write_table(
        path / MEASURES,
        pd.DataFrame(
            {
                "neuron_idx": np.arange(d_mlp),
                "logitvar": random.lognormal(-7, 1, d_mlp),
                "norm": random.lognormal(0, 0.3, d_mlp),
                "rho": rho,
                "entropy_neuron": np.isin(np.arange(d_mlp), chosen),
            }
        ),
    )
    spectrum = np.sort(random.lognormal(1, 0.5, d_model))[::-1].copy()
    spectrum[-1] = 0.0  # as with LayerNorm
    write_table(path / SINGULAR_VALUES, pd.DataFrame({"singular_value": spectrum}))
    low, high = -random.random(d_mlp), 3 + random.random(d_mlp)
    statistics = ActivationStatistics(
        mean=np.full(d_mlp, 0.1),
        std=np.random.default_rng(seed).lognormal(-1, 0.3, d_mlp),
        median=low / 2,
        mode=low,
        min=low,
        max=high,
    )
    write_statistics(path / ACTIVATION_STATS, statistics, positions=1000)
    asked = [relations[i // len(SOURCES) % len(relations)] for i in range(prompts)]
    write_table(
        path / PROMPTS,
        pd.DataFrame(
            {
                "statement_subject": [f"subject {i // 3}" for i in range(prompts)],
                "rel_lemma": [name for name, _ in asked],
                "relation_group_id": [group for _, group in asked],
                "knowledge_probing_prompt": [
                    f"{i} is the capital of Italy. {i} is" for i in range(prompts)
                ],
                "counter_knowledge_object": ["Italy"] * prompts,
                "parametric_knowledge_object": ["France"] * prompts,
            }
        ),
    )
    groups = {**dict(relations), "is-subclass": "hierarchy"}  # of the last no prompt is left
    facts = {
        "facts": 20,
        "recalled": 15,
        "relation_groups": groups,
        "objects_with_splitter": NO_OBJECTS,
    }
    folder.note(
        **{"sets": sets, "entropy_neurons": chosen, "facts": facts, "nested_objects": NO_OBJECTS},
        **{"asked": asked_for, "weights": {"source": "", "revision": None}, "work": {}},
    )
    _add_beyond(folder, random, rho, layers, prompts)
    write_scores(folder, protocol == "released")
    folder.note(complete=True)
    return folder


def _add_beyond(
    folder: RunFolder, random: np.random.Generator, rho: np.ndarray, layers: int, prompts: int
) -> None:
    """Write what Method 13 adds: rho by layer, and effects on entropy."""
    d_mlp, values = len(rho), folder.manifest["identity"]["ablation_values"]
    earlier = [random.random(d_mlp) * 0.5 for _ in range(layers - 1)]
    table = pd.DataFrame(
        {
            "layer": np.repeat(np.arange(layers), d_mlp),
            "neuron_idx": np.tile(np.arange(d_mlp), layers),
            "rho": np.concatenate([*earlier, rho]),
        }
    )
    write_table(folder.path / RHO_BY_LAYER, table)
    rows = []
    for value in values:
        effects = {
            f"entropy_{name}": random.random(prompts) + shift
            for name, shift in (("plain", 1), ("total", 0.5), ("direct", 1.1), ("norm_only", 0.4))
        }
        write_table(folder.path / value / PROMPT_EFFECTS, pd.DataFrame(effects))
        for name in folder.manifest["sets"]:
            of = {"total": 0.01, "direct": -0.02, "norm_only": 0.03}
            changes = {effect: mean + 0.01 * random.normal() for effect, mean in of.items()}
            rows.append({"ablation_value": value, "set": name, **changes, "prompts": prompts})
    write_table(folder.path / SET_EFFECTS, pd.DataFrame(rows))
    folder.note(effects={"prompts": prompts}, engine="shared", layers_with_rho=list(range(layers)))


def few_facts(folder: Path, every: int) -> Path:
    """Fill a folder with one in `every` of the organism's facts, for runs of seconds."""
    header, *rows = (CHECKPOINT / "facts.csv").read_text(encoding="utf-8").splitlines()
    (folder / "facts.csv").write_text("\n".join([header, *rows[::every]]) + "\n", encoding="utf-8")
    shutil.copy(CHECKPOINT / "relations.csv", folder)
    return folder
