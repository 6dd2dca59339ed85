"""Prompts cut into batches that fit the memory and take seconds; one that does not fit is halved."""

import gc
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TypeVar

import torch

from ccm.decoding.engine import Engine
from ccm.decoding.prefill import shared_prefixes
from ccm.decoding.results import Work
from ccm.errors import CcmError
from ccm.models.bridge import Tokens
from ccm.models.memory import out_of_memory

MAX_BATCH = 448  # prompts: larger ones would only make progress, resuming and shards coarser
# Multiplications of a batch, about ten seconds on a CPU, because progress is shown and results are kept
# after each batch; and what an entry of a set's logit row costs, in multiplications.
MAX_WORK, PER_ENTRY = 5e11, 100
FEW = 8  # prompts: smaller batches are mostly overhead
_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


def in_batches(
    engine: Engine,
    prompts: Sequence[Tokens],
    run: Callable[[list[int], list[int]], _Result],
    done: Collection[int] = (),
    shard: tuple[int, int] = (1, 1),
    work: Work | None = None,
) -> Iterator[_Result]:
    """Run prompts one batch at a time; a batch that runs out of memory is halved.

    `run` takes the prompts' indices, sorted by how many tokens follow their shared prefix, and the
    lengths of these prefixes.
    """
    device = engine.model.device
    shared, order = [0] * len(prompts), list[int]()
    # Prompts that share a prefix stay together.
    groups = shared_prefixes(prompts)
    run_once = sum(map(len, prompts)) - sum(length * (len(members) - 1) for members, length in groups)
    for members, length in sorted(groups, key=lambda g: (max(len(prompts[i]) for i in g[0]), g[0])):
        order += members
        for i in members:
            shared[i] = length
    lengths = [len(p) for p in prompts]
    most = _most(engine, run_once / len(prompts))
    _warn_of_small(engine, max(lengths), len(prompts))
    batches = list(_batches(order, lengths, engine.prompt_bytes, engine.budget, most))
    mine = batches[shard[0] - 1 :: shard[1]]
    pending = [[i for i in batch if i not in done] for batch in mine][::-1]
    while pending:
        indices = sorted(pending.pop(), key=lambda i: (len(prompts[i]) - shared[i], shared[i], i))
        if not indices:
            continue
        try:
            result = run(indices, [shared[i] for i in indices])
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            if len(indices) == 1:
                raise CcmError(
                    f"prompt {indices[0]} under {len(engine.full)} sets does not fit the memory of "
                    f"{device}. Lower --controls or run one ablation value at a time."
                ) from error
            engine.free()
            _free(device)
            half = len(indices) // 2
            pending += [indices[half:], indices[:half]]
            if work is not None:
                work.halved += 1
            continue
        yield result


def _warn_of_small(engine: Engine, longest: int, n_prompts: int) -> None:
    """Say if the budget makes batches so small that most of the time goes by without computing."""
    size = engine.prompt_bytes(longest)
    if engine.budget < min(FEW, n_prompts) * size:
        _log.warning(
            f"memory budget of {engine.budget >> 20} MiB: room for {max(1, engine.budget // size)} "
            f"prompts at a time under {len(engine.full)} sets, which is slow. Give --memory-budget "
            f"{-(-FEW * size >> 20)}M or more, or fewer --controls."
        )


def _batches(
    order: Sequence[int],
    lengths: Sequence[int],
    prompt_bytes: Callable[[int], int],
    budget: int,
    most: int,
) -> Iterator[list[int]]:
    """Cut prompts, in order, into batches of 1 to `most` prompts that fit the budget."""
    batch: list[int] = []
    used = 0
    for i in order:
        size = prompt_bytes(lengths[i])
        if batch and (used + size > budget or len(batch) == most):
            yield batch
            batch, used = [], 0
        batch.append(i)
        used += size
    if batch:
        yield batch


def _most(engine: Engine, prefilled: float) -> int:
    """Limit the prompts of a batch so that it takes seconds; a GPU is fast enough for any number.

    Args:
        engine: The engine that runs them.
        prefilled: Tokens prefilled per prompt on average, shared prefixes counted once.
    """
    if engine.model.device.type == "cuda":
        return MAX_BATCH
    tokens = prefilled + engine.max_new_tokens
    parameters = sum(p.numel() for p in engine.model.body.parameters())
    entries = len(engine.full) * engine.model.spec.d_vocab
    work = parameters * tokens + PER_ENTRY * entries
    return max(1, min(MAX_BATCH, int(MAX_WORK / work)))


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
