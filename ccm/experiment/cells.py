"""From finished batches to cells: one table per ablation value and neuron set."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int
from tqdm import tqdm

from ccm.decoding.answer_tokens import answer_log_probs, answer_tokens
from ccm.decoding.engines import Engine
from ccm.decoding.results import Batch, Completions, Decided, merge
from ccm.experiment.batches import BatchStore
from ccm.experiment.beyond_paper import effect_tables, write_effects
from ccm.experiment.files import write_table
from ccm.experiment.folder import RunFolder
from ccm.method.ablation import Ablation
from ccm.method.prompts import ProbingPrompt
from ccm.method.protocol import Protocol
from ccm.method.sources import SOURCES, Source, is_decided, knowledge_sources
from ccm.models.bridge import Tokens
from ccm.models.model import LoadedModel


class CellReader:
    """Makes a table of texts, sources and first-token numbers from a neuron set's completions."""

    def __init__(
        self,
        prompts: Sequence[ProbingPrompt],
        objects: Int[np.ndarray, "prompt 2"],
        plain: Completions,
        protocol: Protocol,
    ) -> None:
        """Choose the tokens whose log-probabilities are read.

        Args:
            prompts: The probing prompts.
            objects: First tokens of their counter- and parametric objects.
            plain: Completions of the plain run.
            protocol: Decides how sources are told; and whether answer tokens are taken from each set's
                own sources and most likely tokens, as released. Otherwise they are the plain run's, so
                that before and after are compared at the same token.
        """
        self.prompts, self.objects, self.protocol = prompts, objects, protocol
        self.plain_tokens = answer_tokens(self.sources(plain), objects, plain.first)

    def sources(self, done: Completions) -> list[Source]:
        """Classify every continuation."""
        first = self.protocol.counter_first
        return knowledge_sources(done.texts, self.prompts, counter_first=first)

    def table(self, done: Completions) -> pd.DataFrame:
        """Make one cell, a row per prompt in prompt order.

        Args:
            done: Completions of a neuron set.

        Returns:
            Columns `text`, `source`, `tokens`, `entropy` (nats), `log_prob_ck`, `log_prob_nd` and
            `log_prob_pk` (nats).
        """
        sources = self.sources(done)
        at = self.plain_tokens
        if self.protocol.released_tokens:
            at = answer_tokens(sources, self.objects, done.first)
        log_probs = answer_log_probs(at, done.first)
        return pd.DataFrame(
            {
                "text": done.texts,
                "source": sources,
                "tokens": done.tokens,
                "entropy": done.first.entropy,
                **{f"log_prob_{s.lower()}": log_probs[s] for s in SOURCES},
            }
        )


def decided_sources(prompts: Sequence[ProbingPrompt], protocol: Protocol) -> Decided:
    """Make the function that tells whether a continuation's source is decided (`Decided`)."""

    def decided(prompt: int, text: str) -> bool:
        of = prompts[prompt]
        return is_decided(
            text, of.counter_object, of.parametric_object, counter_first=protocol.counter_first
        )

    return decided


def decode_stored(
    engine: Engine,
    model: LoadedModel,
    tokens: Sequence[Tokens],
    ablations: Sequence[Ablation] = (),
    *,
    store: BatchStore | None = None,
    label: str = "ablations",
    on_batch: Callable[[], None] = lambda: None,
    **options: Any,
) -> list[Batch]:
    """Decode with a progress bar and keep every finished batch; batches kept earlier are read back.

    Args:
        engine: The engine.
        model: The model.
        tokens: Prompts.
        ablations: Neuron sets with their values.
        store: Where finished batches are kept; None keeps none.
        label: Label of the progress bar.
        on_batch: Called after each batch.
        options: For the engine's `decode_sets`.
    """
    batches = [] if store is None else store.read()
    done = {int(i) for batch in batches for i in batch.prompts}
    with tqdm(total=len(tokens), initial=len(done), desc=label, unit="prompt") as bar:
        for batch in engine.decode_sets(model, tokens, ablations, done=done, **options):
            if store is not None:
                store.write(batch)
            batches.append(batch)
            on_batch()
            bar.update(len(batch.prompts))
    return batches


def cells_step(folder: RunFolder, protocol: Protocol, prompts: Sequence[ProbingPrompt]) -> None:
    """Make the cells of a run, and the tables of effects, from its batches."""
    store = BatchStore(folder.path)
    paths = [folder.cell("", "plain")]
    for value in folder.manifest["identity"]["ablation_values"]:
        paths += [folder.cell(value, name) for name in folder.manifest["sets"]]
    # Not read if all tables exist: an earlier start may have removed some batches.
    if not all(path.is_file() for path in [*paths, *effect_tables(folder)]):
        batches = store.read()
        write_effects(folder, batches)
        decoded = merge(batches)
        runs = (decoded.completions(i) for i in range(len(paths)))
        # The targets begin with the first tokens of both objects.
        write_cells(runs, paths, prompts, decoded.asked[:, :2], protocol)
    store.clear()


def write_cells(
    runs: Iterable[Completions],
    paths: Sequence[Path],
    prompts: Sequence[ProbingPrompt],
    objects: Int[np.ndarray, "prompt 2"],
    protocol: Protocol,
) -> None:
    """Write the table of every set that has no table yet.

    Args:
        runs: Completions of each set, the plain run first.
        paths: Where each is written.
        prompts: The probing prompts.
        objects: First tokens of their counter- and parametric objects.
        protocol: Decides how sources and answer tokens are determined.
    """
    reader: CellReader | None = None
    for path, done in zip(paths, runs, strict=True):
        reader = reader or CellReader(prompts, objects, done, protocol)
        if not path.is_file():
            write_table(path, reader.table(done))
