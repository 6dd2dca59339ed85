"""The figures that say whether a trained organism is fit for use, by the pipeline's own steps."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from ccm.ablation import ABLATION_VALUES, PLAIN, Ablation, plan
from ccm.activations import collect
from ccm.checkpoint import LoadedModel, load
from ccm.completions import equal_length_batches
from ccm.experiment import build_prompts
from ccm.facts import read_fact_folder
from ccm.knowledge import SOURCES, knowledge_sources
from ccm.models import MAX_NEW_TOKENS, MODELS
from ccm.neurons import NeuronMeasures, controls, measure, select
from ccm.organism.world import World
from ccm.scores import conversion_ratio, invariant_share, q_value, transition_counts

__all__ = ["Figures", "Outcome", "evaluate", "measures_of"]

CONTROLS = 100
CONTROL_SEED = 123
MIN_RHO = 0.9

BATCH = 256


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
    """What was measured on one checkpoint; shares in percent."""

    facts: int
    recall: float  # parametric object is the true object, of all facts
    kept: dict[str, int]  # facts left after each filter
    prompts: int
    held_out: float  # prompts whose counter-object no training text put beside the subject
    shares: dict[str, float]  # knowledge source -> prompts
    selected: tuple[int, ...]
    lowest_planted_rho: float
    highest_other_rho: float
    activation_std: list[float]  # of the planted neurons
    outcomes: dict[str, Outcome]  # by ablation value


def measures_of(folder: Path, null_dims: int) -> NeuronMeasures:
    """Measures of the last layer of a saved organism; `null_dims` counts the all-ones direction."""
    model = load(replace(MODELS["organism"], folder=folder))
    return measure(model.W_U, model.W_out, model.final_norm, null_dims)


def _states(
    model: LoadedModel, sequences: Sequence[tuple[int, ...]]
) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, "row d_mlp"]]:
    """Final residual and last MLP activations at the last position of every sequence."""
    spec = model.spec
    residual, post = (
        torch.empty(len(sequences), spec.d_model),
        torch.empty(len(sequences), spec.d_mlp),
    )

    def keep(into: Tensor, rows: list[int]) -> Any:
        def hook(value: Tensor, hook: Any) -> Tensor:
            into[rows] = value[:, -1]
            return value

        return hook

    for rows in equal_length_batches(sequences, BATCH):
        hooks = [("ln_final.hook_in", keep(residual, rows)), (model.hook_post, keep(post, rows))]
        with torch.inference_mode(), model.bridge.hooks(fwd_hooks=hooks):
            model.bridge(torch.tensor([sequences[row] for row in rows]), logits_to_keep=1)
    return residual, post


def _decode_all(
    model: LoadedModel, prompts: Sequence[tuple[int, ...]], ablations: Sequence[Ablation]
) -> list[list[str]]:
    """Greedy texts, by ablation and prompt, of many ablations at once.

    The last layer's MLP writes only into the final residual stream, so for one token prefix all
    ablations share the transformer's work and differ in the last norm and unembedding alone
    (Method 12). This is the plain form of that, without a cache: it depends on no fast path.
    """
    norm, w_u, b_u, w_out = model.final_norm, model.W_U, model.b_U, model.W_out
    made: list[list[tuple[int, ...]]] = [[()] * len(prompts) for _ in ablations]
    for step in tqdm(range(MAX_NEW_TOKENS), desc="measuring", leave=False):
        alive = [[i for i, new in enumerate(row) if len(new) == step] for row in made]
        nodes = sorted({(i, row[i]) for row, live in zip(made, alive, strict=True) for i in live})
        if not nodes:
            break
        place = {node: k for k, node in enumerate(nodes)}
        residual, post = _states(model, [(*prompts[i], *new) for i, new in nodes])
        for ablation, row, live in zip(ablations, made, alive, strict=True):
            at = [place[i, row[i]] for i in live]
            neurons = list(ablation.neurons)
            moved = torch.tensor(ablation.values) - post[at][:, neurons]  # (node, neuron)
            logits = norm(residual[at] + moved @ w_out[neurons]) @ w_u + b_u  # (node, d_vocab)
            for i, token in zip(live, logits.argmax(dim=1).tolist(), strict=True):
                if token not in model.eos:
                    row[i] = (*row[i], token)
    return [[model.decode(new) for new in row] for row in made]


def evaluate(folder: Path, world: World, planted: Sequence[int], null_dims: int) -> Figures:
    """Measure a saved organism.

    Args:
        folder: The checkpoint, with its tables.
        world: The world it was trained on, for the counter-objects held out of training.
        planted: The planted neurons of the last layer, ascending.
        null_dims: Null-space dimensions, the all-ones direction included.
    """
    model = load(replace(MODELS["organism"], folder=folder))
    built = build_prompts(model, read_fact_folder(folder, "organism"), "bare")
    tokens = [tuple(model.encode(prompt.text)) for prompt in built.prompts]
    statistics, _ = collect(model, tokens)
    measures = measure(model.W_U, model.W_out, model.final_norm, null_dims)
    sets = [tuple(planted), *controls(CONTROLS, model.spec.d_mlp, planted, CONTROL_SEED)]
    ablations = [PLAIN] + [
        plan(f"{value.name} {i}", neurons, value, statistics)
        for value in ABLATION_VALUES.values()
        for i, neurons in enumerate(sets)
    ]
    texts = _decode_all(model, tokens, ablations)
    before, *after = (knowledge_sources(row, built.prompts) for row in texts)
    outcomes = {
        name: _outcome([transition_counts(before, new) for new in after[start : start + len(sets)]])
        for name, start in zip(ABLATION_VALUES, range(0, len(after), len(sets)), strict=True)
    }
    held_out = {(fact.query, name) for fact in world.facts for name in fact.held_out}
    barred = [(prompt.query, prompt.counter_object) in held_out for prompt in built.prompts]
    others = np.delete(measures.rho, list(planted))
    counts = built.counts
    return Figures(
        facts=counts["facts"],
        recall=100.0 * counts["recalled"] / counts["facts"],
        kept={name: count for name, count in counts.items() if name.startswith("after")},
        prompts=len(tokens),
        held_out=100.0 * float(np.mean(barred)),
        shares={source: 100.0 * before.count(source) / len(before) for source in SOURCES},
        selected=tuple(sorted(select(measures, len(planted), MIN_RHO))),
        lowest_planted_rho=float(measures.rho[list(planted)].min()),
        highest_other_rho=float(others.max()),
        activation_std=statistics.std[list(planted)].tolist(),
        outcomes=outcomes,
    )


def _outcome(counts: Sequence[np.ndarray]) -> Outcome:
    """Score the first table of transition counts against the others."""
    invariant = [invariant_share(table) for table in counts]
    gts = [100.0 * (1.0 - share) for share in invariant]
    cr_ck = [conversion_ratio(table, "CK").percent or 0.0 for table in counts]
    return Outcome(
        gts=gts[0],
        q_value=q_value(invariant[0], invariant[1:]),
        control_gts=(float(np.mean(gts[1:])), max(gts[1:])),
        cr_ck=cr_ck[0],
        control_cr_ck=(float(np.mean(cr_ck[1:])), max(cr_ck[1:])),
        transitions=counts[0].tolist(),
    )
