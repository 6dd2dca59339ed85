"""A run folder of a published model that found what was printed, as far as files tell; no model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ccm.experiment.files import read_json, write_json, write_table
from ccm.experiment.folder import MANIFEST, MEASURES, SCORES
from ccm.method.sources import SOURCES, Source
from ccm.models.specs import MODELS
from ccm.paper.agreement import Found
from ccm.paper.values import MEAN, NEURON_MEASURES, PrintedModel, printed
from tests.made_runs import make_run

Counts = dict[Source, dict[Source, int]]


def spread(paper: PrintedModel, changed: int) -> Counts:
    """Transition counts with so many changes, taken from CK first, then ND, then PK."""
    counts: Counts = {k: dict.fromkeys(SOURCES, 0) for k in SOURCES}
    after: dict[Source, Source] = {"CK": "PK", "ND": "PK", "PK": "ND"}
    for k in SOURCES:
        size = int(paper.sources[k].value)
        moved = min(size, changed)
        counts[k][k], counts[k][after[k]] = size - moved, moved
        changed -= moved
    return counts


def printed_counts(paper: PrintedModel, end: str = "low") -> Counts:
    """The reconstructed counts, at one end of their range."""
    counts: Counts = {k: dict.fromkeys(SOURCES, 0) for k in SOURCES}
    for k, row in paper.transition_counts.items():
        counts[k] |= {j: getattr(c, end) for j, c in row.items()}
        counts[k][k] = int(paper.sources[k].value) - sum(counts[k].values())
    return counts


def measures(model: str, **changed: float) -> pd.DataFrame:
    """The released measures as a table; those of a kind multiplied, or for rho increased."""
    table = pd.DataFrame(
        {m: {n.neuron: getattr(n, m).value for n in printed(model).neurons} for m in NEURON_MEASURES}
    )
    for name, change in changed.items():
        table[name] = table[name] + change if name == "rho" else table[name] * change
    return table


def found(model: str, **changed: Any) -> Found:
    """A run that measured what the paper printed, except that GPT-2's mode is a finite one."""
    paper = printed(model)
    gts = {v: p.value if p.defect != 4 else 0.2 for v, p in paper.gts.items()}
    counts = {v: spread(paper, round(g / 100 * paper.n_prompts)) for v, g in gts.items()}
    result = Found(
        sources={s: int(paper.sources[s].value) for s in SOURCES},
        transition_counts=counts | {MEAN: printed_counts(paper)},
        q_values={v: q.value for v, q in paper.q_values.items()},
        n_controls=100,
        measures=measures(model),
        selected=tuple(n.neuron for n in paper.neurons),
    )
    return replace(result, **changed)


def published_run(path: Path, model: str = "gpt2-small", **identity: Any) -> Path:
    """Write a finished run folder of a published model, run as the paper ran it.

    Args:
        path: The folder.
        model: Its name.
        identity: Entries of the run's identity that are other ones.
    """
    spec, paper = MODELS[model], printed(model)
    sizes = {"d_mlp": spec.d_mlp, "d_model": spec.d_model, "layers": spec.n_layers}
    folder = make_run(path, model=model, prompts=3, controls=1, values=tuple(paper.gts), **sizes)
    table = pd.DataFrame(
        {"neuron_idx": np.arange(spec.d_mlp), "logitvar": 1.0, "norm": 1.0, "rho": 0.5}
    )
    columns = ["logitvar", "norm", "rho"]
    for neuron in paper.neurons:
        table.loc[neuron.neuron, columns] = [getattr(neuron, m).value for m in NEURON_MEASURES]
    table["entropy_neuron"] = table["neuron_idx"].isin(spec.published_neurons)
    write_table(path / MEASURES, table)
    manifest = read_json(path / MANIFEST)
    manifest["identity"] |= {
        "device": "cuda",
        "device_name": "a GPU",
        "dtype": "float32",
        "protocol": "released",
        "facts": "pararel",
        "facts_sha256": "1" * 64,
        "weights_sha256": "0" * 64,
        "template": spec.template,
        "bos": "own",
        "null_space_dims": spec.null_space_dims,
        "max_prompts": None,
        "versions": {"torch": "2.13"},
        **identity,
    }
    manifest |= {
        "prompts": 7,
        "prompts_sha256": "2" * 64,
        "weights": {"source": "", "revision": "abc123"},
    }
    write_json(folder.path / MANIFEST, manifest)
    write_json(folder.path / SCORES, scores_of(found(model)))
    return path


def scores_of(wanted: Found) -> dict[str, Any]:
    """Scores from which just this is taken; its shares beside them are no ones of these counts."""
    none = {"mean": None, "three_standard_errors": None}
    controls = {"n": 100, "sets": [], "transition_scores": {"ND": {"CK": none}, "PK": {"CK": none}}}
    share = {"CK": {"percent": 1.0}}

    def entropy(value: str) -> dict[str, Any]:
        return {
            "transition_counts": wanted.transition_counts[value],
            "q_value": wanted.q_values[value],
            "conversion_ratios": share,
            "transition_scores": {"ND": share, "PK": share},
        }

    return {
        "n_prompts": sum(wanted.sources.values()),
        "sources": {s: {"count": n} for s, n in wanted.sources.items()},
        "ablations": {
            v: {"entropy": entropy(v), "controls": controls} for v in wanted.transition_counts
        },
    }
