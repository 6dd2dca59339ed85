"""The shared engine: one greedy decode serves many prompts x many neuron sets.

Ablating last-layer neurons changes no key and no value at any layer (Method 12). So each prompt is
prefilled once, and a prefix that several prompts share once for all of them (`prefill`); at every step
the next token of *all* sets follows from the final residual and the last activations (`certificate`,
`next_token`); sets that choose the same token share a node of a prefix tree; and the transformer runs
once per distinct node, on cache rows that stay in place or are copied from the parent's (`engine`,
`forward`). The prompts are cut into batches that fit the memory (`batching`).

Results do not depend on batches, kernels or devices. Rounding does, and could settle a near tie either
way; so every choice whose lead is below the tolerance of `certificate` is made again in float64
(`exact`). A choice above the tolerance is the same under any rounding, so tokens are the same alone, in
any batch, in any order, at any memory budget and on any machine. This holds in float32; in lower
precision rounding moves x itself too far to be repaired, and near ties are left as computed.
"""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ccm.decoding.batching import in_batches
from ccm.decoding.bounded import BoundedLists
from ccm.decoding.certificate import Screen, build_screen
from ccm.decoding.engine import Asked, Engine
from ccm.decoding.next_token import at_once
from ccm.decoding.results import AtLast, Batch, Completions, Decided, Observer, Work, merge, no_targets
from ccm.decoding.tolerance import tolerance
from ccm.decoding.trial import check_shared
from ccm.method.ablation import PLAIN, Ablation
from ccm.method.prompts import SPLITTER
from ccm.models.bridge import Tokens
from ccm.models.memory import default_budget
from ccm.models.model import LoadedModel
from ccm.models.specs import MAX_NEW_TOKENS

BYTE_FALLBACK = re.compile(r"<0x[0-9A-F]{2}>")
_Result = TypeVar("_Result")
TAKES = ("shard", "device_map")


def answered(prompt: int, text: str) -> bool:
    """Return whether an answer has ended, that is, whether its text holds a splitter (Method 4)."""
    return SPLITTER.search(text) is not None


def decode(
    model: LoadedModel, prompts: Sequence[Tokens], ablation: Ablation = PLAIN, **options: Any
) -> Completions:
    """Decode under one neuron set, as `ccm.decoding.hooked.decode`; options as for `decode_sets`."""
    sets = [ablation] if ablation.neurons else []
    shards = decode_sets(model, prompts, sets, own_top=True, **options)
    return merge(list(shards)).completions(len(sets))


def decode_sets(
    model: LoadedModel,
    prompts: Sequence[Tokens],
    ablations: Sequence[Ablation] = (),
    *,
    targets: Int[Tensor, "prompt target"] | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    full: Sequence[bool] | None = None,
    decided: Decided = answered,
    own_top: bool = False,
    keep_residual: bool = False,
    at_last: AtLast | None = None,
    memory_budget: int | None = None,
    observe: Observer | None = None,
    text_only: bool = False,
    work: Work | None = None,
    done: Collection[int] = (),
    shard: tuple[int, int] = (1, 1),
) -> Iterator[Batch]:
    """Decode prompts under the plain run and every ablation, one batch at a time.

    Args:
        model: The model.
        prompts: Token ids, BOS included, ragged.
        ablations: Neuron sets with their replacement values.
        targets: Tokens whose first-step log-probabilities are wanted, per prompt.
        max_new_tokens: At least 1; a continuation ends early at EOS.
        full: For the plain run and each ablation, whether to decode to the end. Where False, decoding
            stops as soon as the text is decided.
        decided: Whether a continuation's text so far settles all that the caller wants to know; by
            default, whether the answer has ended.
        own_top: Also read the most likely first tokens of every set, not only of the plain run.
        keep_residual: Also return the plain run's final residuals at last prompt positions.
        at_last: Reads more at last prompt positions; called again with fewer prompts if memory runs
            out.
        memory_budget: Bytes a batch may use; by default a part of what is free. Never changes a
            result.
        observe: Called with `hook_post` of the last layer at all positions of the plain run; needs
            `ablations` to be empty.
        text_only: Hide BOS from `observe`.
        work: Counts are added here.
        done: Prompts that are decoded already. Batches are cut as if none were, so that the others are
            computed bit for bit as without an interruption.
        shard: (i, n): decode every n-th batch, from the i-th on. Batches are cut as for the whole run.

    Yields:
        Batches that together hold every prompt of the shard once: shorter prompts first, with prompts
        that share a prefix kept together.

    Raises:
        CcmError: a single prompt does not fit the memory.
    """
    if observe is not None and ablations:
        raise ValueError("activations are observed in the plain run only")
    sets = [PLAIN, *ablations]
    if not prompts:
        raise ValueError("no prompts to decode")
    check_shared(model)
    engine = _engine(
        model,
        build_screen(model.last_layer, sets, tolerance(model, prompts)),
        memory_budget,
        full=full,
        decided=decided,
        max_new_tokens=max_new_tokens,
        own_top=own_top,
        keep_residual=keep_residual,
        at_last=at_last,
        observing=observe is not None,
        skipped=int(text_only and model.bos is not None),
    )
    given = no_targets(len(prompts)) if targets is None else targets

    def run(indices: list[int], shared: list[int]) -> tuple[Batch, Work]:
        counted = Work(prompts=len(indices))
        asked = Asked([prompts[i] for i in indices], shared, indices, given[indices])
        return engine.run(asked, counted), counted

    for batch, counted in in_batches(engine, prompts, run, done, shard, work):
        for rows in engine.seen:
            assert observe is not None
            observe(rows)
        engine.seen.clear()
        if work is not None:
            work.add(counted)
        yield batch


def check(model: LoadedModel) -> None:
    """Check, once per model, that this engine computes it.

    Raises:
        AssumptionBroken: the engine cannot run the model, or differs by more than rounding explains.
    """
    check_shared(model)


def read_last_positions(
    model: LoadedModel,
    prompts: Sequence[Tokens],
    read: Callable[
        [list[int], Float[Tensor, "prompt d_model"], Float[Tensor, "prompt d_mlp"]], _Result
    ],
    *,
    memory_budget: int | None = None,
) -> Iterator[_Result]:
    """Run prompts through the plain model up to their last positions, one batch at a time.

    Args:
        model: The model.
        prompts: Token ids, BOS included, ragged.
        read: Called with a batch's prompts, their final residuals and their last-layer activations;
            called again with fewer prompts if memory runs out.
        memory_budget: As for `decode_sets`.

    Yields:
        What `read` returns.

    Raises:
        CcmError: a single prompt does not fit the memory.
    """
    check_shared(model)
    # No token is chosen, so no tolerance is needed.
    screen = build_screen(model.last_layer, [PLAIN], u=0.0)
    engine = _engine(model, screen, memory_budget, max_new_tokens=1)

    def run(indices: list[int], shared: list[int]) -> _Result:
        return read(indices, *engine.read_last([prompts[i] for i in indices], shared, Work()))

    yield from in_batches(engine, prompts, run)


def _engine(
    model: LoadedModel,
    screen: Screen,
    memory_budget: int | None,
    *,
    max_new_tokens: int,
    full: Sequence[bool] | None = None,
    decided: Decided = answered,
    own_top: bool = False,
    keep_residual: bool = False,
    at_last: AtLast | None = None,
    observing: bool = False,
    skipped: int = 0,
) -> Engine:
    n_sets = len(screen.slots)
    return Engine(
        model=model,
        screen=screen,
        full=torch.tensor([True] * n_sets if full is None else list(full), device=model.device),
        decided=decided,
        cuts=full is not None and not all(full),
        provisional=_provisional_tokens(model),
        at_once=at_once(model),
        max_new_tokens=max_new_tokens,
        budget=memory_budget or default_budget(model.device),
        own_top=own_top,
        keep_residual=keep_residual,
        at_last=at_last,
        observing=observing,
        skipped=skipped,
        lists=BoundedLists(exact=model.device.type != "cuda"),
    )


def _provisional_tokens(model: LoadedModel) -> Bool[Tensor, "d_vocab"]:
    """Mark tokens after which a text may still change.

    A byte-fallback token is decoded together with the bytes that follow it, and a token without text (a
    special one, say) may come after such a byte.
    """
    if model.provisional_tokens is None:
        pieces = model.tokenizer.convert_ids_to_tokens(list(range(model.spec.d_vocab)))
        texts = model.decode_all([[i] for i in range(model.spec.d_vocab)])
        model.provisional_tokens = torch.tensor(
            [
                not text or BYTE_FALLBACK.fullmatch(piece or "") is not None
                for text, piece in zip(texts, pieces, strict=True)
            ],
            device=model.device,
        )
    return model.provisional_tokens
