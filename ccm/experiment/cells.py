"""From decoding to cells: one table per ablation value and neuron set, by either engine."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from tqdm import tqdm

from ccm.decoding import hooked
from ccm.decoding import shared as decoding
from ccm.decoding.answer_tokens import answer_log_probs, answer_tokens
from ccm.decoding.results import Completions, Shard, Work, merge
from ccm.experiment.folder import ShardStore
from ccm.method.ablation import Ablation
from ccm.method.prompts import ProbingPrompt
from ccm.method.sources import SOURCES, Source, knowledge_sources
from ccm.models.bridge import Tokens
from ccm.models.model import LoadedModel

# How to decode one set; both give the same texts, tokens and sources.
ENGINES: dict[str, Callable[..., Completions]] = {"shared": decoding.decode, "hooked": hooked.decode}


class CellReader:
    """Reads texts, sources and first-token numbers of one set off its completions."""

    def __init__(
        self,
        prompts: Sequence[ProbingPrompt],
        objects: Int[np.ndarray, "prompt 2"],
        plain: Completions,
        *,
        released: bool = False,
        counter_first: bool = False,
    ) -> None:
        """Fix the tokens that log-probabilities are read at.

        Args:
            prompts: The probing prompts.
            objects: First tokens of their counter- and parametric objects.
            plain: Completions of the plain run.
            released: Name answer tokens by each run's own sources and most likely tokens. Otherwise
                they are those of the plain run, so that a difference before - after is one of the
                same token.
            counter_first: As for `ccm.method.sources.knowledge_source`.
        """
        self.prompts, self.objects, self.released = prompts, objects, released
        self.counter_first = counter_first
        sources = self.sources(plain)
        self.plain_tokens = answer_tokens(sources, objects, plain.first)

    def sources(self, done: Completions) -> list[Source]:
        """Source of every continuation."""
        return knowledge_sources(done.texts, self.prompts, counter_first=self.counter_first)

    def table(self, done: Completions) -> pd.DataFrame:
        """One cell: a row per prompt, in prompt order."""
        sources = self.sources(done)
        at = self.plain_tokens
        if self.released:
            at = answer_tokens(sources, self.objects, done.first)
        log_probs = answer_log_probs(at, done.first)
        return pd.DataFrame(
            {
                "text": done.texts,
                "source": sources,
                "tokens": [list(t) for t in done.tokens],
                "entropy": done.first.entropy,
                **{f"log_prob_{s.lower()}": log_probs[s] for s in SOURCES},
            }
        )


def decode_hooked(
    model: LoadedModel,
    tokens: Sequence[Tokens],
    ablations: Sequence[Ablation],
    objects: Int[np.ndarray, "prompt 2"],
) -> Iterator[Completions]:
    """Decode the plain run, then each ablation when it is asked for, one pass each."""
    plain = hooked.decode(model, tokens, targets=torch.from_numpy(objects))
    yield plain
    # Any answer token of the plain run is an object's first token or one of its top tokens.
    asked = torch.from_numpy(np.concatenate([objects, plain.first.top_tokens], axis=1))
    for ablation in tqdm(ablations, desc="ablations", unit="set"):
        yield hooked.decode(model, tokens, ablation, targets=asked)


def decode_shared(
    model: LoadedModel,
    tokens: Sequence[Tokens],
    ablations: Sequence[Ablation],
    objects: Int[np.ndarray, "prompt 2"],
    *,
    full: Sequence[bool] | None = None,
    own_top: bool = False,
    memory_budget: int | None = None,
    work: Work | None = None,
) -> Iterator[Completions]:
    """Decode the plain run and all ablations in one pass, then hand them out one by one.

    Args:
        model: The model.
        tokens: Prompts.
        ablations: Neuron sets with their values.
        objects: Tokens whose log-probabilities are wanted, with the plain run's top ones.
        full: See `ccm.decoding.shared.decode_sets`.
        own_top: Likewise.
        memory_budget: Likewise.
        work: Counts are added here.
    """
    decoded = merge(
        decode_stored(
            model,
            tokens,
            ablations,
            targets=torch.from_numpy(objects),
            full=full,
            own_top=own_top,
            memory_budget=memory_budget,
            work=work,
        )
    )
    for index in range(1 + len(ablations)):
        yield decoded.completions(index)


def decode_stored(
    model: LoadedModel,
    tokens: Sequence[Tokens],
    ablations: Sequence[Ablation] = (),
    *,
    store: ShardStore | None = None,
    label: str = "ablations",
    on_shard: Callable[[], None] = lambda: None,
    **options: Any,
) -> list[Shard]:
    """Decode with a progress bar, keeping every finished shard, and go on from those that are there.

    Args:
        model: The model.
        tokens: Prompts.
        ablations: Neuron sets with their values.
        store: Where finished shards are kept; those already there are not computed again.
        label: Of the progress bar.
        on_shard: Called after each shard.
        options: For `ccm.decoding.shared.decode_sets`.
    """
    shards = [] if store is None else store.read()
    done = {int(i) for shard in shards for i in shard.prompts}
    with tqdm(total=len(tokens), initial=len(done), desc=label, unit="prompt") as bar:
        for shard in decoding.decode_sets(model, tokens, ablations, done=done, **options):
            if store is not None:
                store.write(shard)
            shards.append(shard)
            on_shard()
            bar.update(len(shard.prompts))
    return shards
