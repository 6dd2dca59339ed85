"""Ablate neuron sets on prompts: what `ccm.ablate` and `ccm ablate` do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int

from ccm.decoding.activations import collect
from ccm.decoding.answer_tokens import object_tokens
from ccm.decoding.engines import AUTO, engine_for, name_of
from ccm.decoding.results import Completions, Work, merge
from ccm.errors import BadInput
from ccm.experiment.cells import CellReader, decode_stored
from ccm.method.ablation import PLAIN, check_neurons, plan_sets
from ccm.method.ablation_values import AblationValue
from ccm.method.prompts import ProbingPrompt
from ccm.method.protocol import PROTOCOLS, Protocol
from ccm.method.statistics import ActivationStatistics, check_statistics
from ccm.models.model import LoadedModel


@dataclass(frozen=True)
class Ablated:
    """What prompts gave under each neuron set."""

    tables: Mapping[str, pd.DataFrame]  # by set, the plain run first; a row per prompt, in their order
    sets: Mapping[str, tuple[int, ...]]
    statistics: ActivationStatistics  # that the replacement values were taken from
    tokens: Sequence[Sequence[int]]  # of every prompt, BOS included
    engine: str  # that decoded them
    work: Work

    def table(self) -> pd.DataFrame:
        """One tidy table: a row per set and prompt, with `set` and `prompt` in front."""
        tables = [table.rename_axis("prompt").reset_index() for table in self.tables.values()]
        joined = pd.concat(tables, keys=list(self.tables), names=["set"])
        return joined.reset_index(level="set").reset_index(drop=True)


def ablate(
    model: LoadedModel,
    prompts: Sequence[ProbingPrompt] | Sequence[str],
    sets: Mapping[str, Sequence[int]],
    value: AblationValue,
    *,
    statistics: ActivationStatistics | None = None,
    protocol: Protocol = PROTOCOLS["corrected"],
    engine: str = AUTO,
    memory_budget: int | None = None,
) -> Ablated:
    """Decode prompts as they are, and with each neuron set held at its replacement values (Method 7).

    Args:
        model: The model.
        prompts: Probing prompts; or bare texts, which have no sources.
        sets: Numbers of last-layer neurons by the name of their set.
        value: What replaces their activations.
        statistics: What the value is taken from; by default, of these prompts (Method 6).
        protocol: Decides how sources and answer tokens are determined.
        engine: As for `ccm.decoding.engines.engine_for`.
        memory_budget: Bytes that a batch may use.

    Raises:
        BadInput: no prompt, a set with the name of the plain run, or neurons or statistics that do not
            fit the model.
        AssumptionBroken: the engine cannot compute this model.
    """
    if not prompts:
        raise BadInput("no prompts. Give at least one.")
    if PLAIN.name in sets:
        raise BadInput(f"a set is named {PLAIN.name!r}, as the plain run is. Rename it.")
    d_mlp = model.spec.d_mlp
    chosen = {name: check_neurons(tuple(n), d_mlp, f"set {name!r}") for name, n in sets.items()}
    chosen_engine = engine_for(engine, model)
    known = [prompt for prompt in prompts if isinstance(prompt, ProbingPrompt)]
    texts = [p.text if isinstance(p, ProbingPrompt) else p for p in prompts]
    tokens = [model.encode(text) for text in texts]
    if statistics is None:
        statistics, _ = collect(model, tokens, chosen_engine.decode)
    check_statistics(statistics, d_mlp)
    (ablations,) = plan_sets([value], chosen, statistics, protocol).values()
    objects = np.zeros((len(texts), 0), dtype=np.int64)
    if known:
        objects = object_tokens(model, known, released=protocol.released_tokens)
    work = Work()
    decoded = merge(
        decode_stored(
            chosen_engine,
            model,
            tokens,
            ablations,
            targets=torch.from_numpy(objects),
            own_top=protocol.released_tokens,
            memory_budget=memory_budget,
            work=work,
        )
    )
    runs = [decoded.completions(i) for i in range(1 + len(ablations))]
    tables = _tables(runs, known, objects, protocol)
    names = [PLAIN.name, *chosen]
    return Ablated(
        dict(zip(names, tables, strict=True)), chosen, statistics, tokens, name_of(chosen_engine), work
    )


def _tables(
    runs: Sequence[Completions],
    prompts: Sequence[ProbingPrompt],
    objects: Int[np.ndarray, "prompt object"],
    protocol: Protocol,
) -> list[pd.DataFrame]:
    """Make one table per run, without sources if the prompts are bare texts."""
    if prompts:
        reader = CellReader(prompts, objects, runs[0], protocol)
        return [reader.table(run) for run in runs]
    return [
        pd.DataFrame(
            {
                "text": run.texts,
                "tokens": [list(tokens) for tokens in run.tokens],
                "entropy": run.first.entropy,
            }
        )
        for run in runs
    ]
