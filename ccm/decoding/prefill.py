"""Prefill of prompts, in which a prefix that several prompts share runs once.

The prompts of one fact begin with the same words. Those run once, and every prompt goes on from their
keys and values.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ccm.decoding.forward import RowCache
from ccm.models.bridge import Tokens

# Runs new tokens (row, position) on a cache and returns their final residual and activations. The third
# argument is each row's first new position, or None for the length of the cache; the fourth is how many
# prompts each row stands for, or None for one.
Forward = Callable[
    [Int[Tensor, "row position"], Any, Int[Tensor, "row"] | None, Int[Tensor, "row"] | None],
    tuple[Float[Tensor, "row read d_model"], Float[Tensor, "row read d_mlp"]],
]

MAX_SHARERS = 16  # most prompts that share a prefix, so that planning is linear in their number


def shared_prefixes(prompts: Sequence[Tokens]) -> list[tuple[list[int], int]]:
    """Group prompts by the prefix they share.

    Of all ways to cut the sorted prompts into runs of at most `MAX_SHARERS`, each of which shares its
    longest common prefix, this is the one that saves the most tokens. A prefix never includes a
    prompt's last token. One token (BOS) is not worth sharing.

    Returns:
        Groups: the prompts' indices and the length of their prefix, 0 if a prompt shares none.
    """
    order = sorted(range(len(prompts)), key=lambda i: (list(prompts[i]), i))
    common = [_common(prompts[i], prompts[j]) for i, j in pairwise(order)]
    spared, start = [0] * (len(order) + 1), [0] * (len(order) + 1)
    for stop in range(1, len(order) + 1):
        best, cut, length = spared[stop - 1], stop - 1, 1 << 30
        for first in range(stop - 2, max(-1, stop - 1 - MAX_SHARERS), -1):
            length = min(length, common[first])
            if length < 2:
                break
            total = spared[first] + (stop - 1 - first) * length
            if total > best:
                best, cut = total, first
        spared[stop], start[stop] = best, cut
    groups, stop = list[tuple[list[int], int]](), len(order)
    while stop:
        first = start[stop]
        length = min(common[first : stop - 1]) if stop - first > 1 else 0
        groups.append((order[first:stop], length))
        stop = first
    return groups[::-1]


def _common(a: Tokens, b: Tokens) -> int:
    """Return the length of two prompts' common prefix, without their last tokens."""
    longest = min(len(a), len(b)) - 1
    return next((i for i in range(longest) if a[i] != b[i]), longest)


def prefill(
    prompts: Sequence[Tokens],
    shared: Sequence[int],
    begun: RowCache,
    cache: RowCache,
    forward: Forward,
    device: torch.device,
    at_once: int,
) -> tuple[Float[Tensor, "prompt d_model"], Float[Tensor, "prompt d_mlp"]]:
    """Run prompts through the transformer, shared prefixes first, without padding.

    Args:
        prompts: Token ids, sorted by how many come after the prefix.
        shared: How many tokens of each prompt belong to its prefix.
        begun: Cache for the prefixes.
        cache: Cache for the prompts, all of which end where the longest ends; with room reserved.
        forward: Runs the transformer.
        device: The model's device.
        at_once: Most tokens of one forward pass.

    Returns:
        Final residual and last-layer activations at every prompt's last position.
    """
    sharers = Counter(tuple(p[:n]) for p, n in zip(prompts, shared, strict=True) if n)
    prefixes = sorted(sharers, key=lambda p: (len(p), p))
    row = {prefix: i for i, prefix in enumerate(prefixes)}
    longest = max(map(len, prefixes), default=0)
    begun.reserve(len(prefixes), longest)
    for rows in _batches(list(map(len, prefixes)), at_once):
        tokens = torch.tensor(prefixes[rows], device=device)
        first = longest - tokens.shape[1]
        times = torch.tensor([sharers[prefix] for prefix in prefixes[rows]], device=device)
        forward(tokens, begun.window(rows, first, first), None, times)
        begun.blank(rows, first)
    end = max(map(len, prompts))
    xs, activations = list[Tensor](), list[Tensor]()
    suffixes = [len(p) - n for p, n in zip(prompts, shared, strict=True)]
    for rows in _batches(suffixes, at_once):
        batch, before = prompts[rows], shared[rows]
        past, most = end - suffixes[rows.start], max(before)
        if most:
            # A prompt without a prefix gets another's, which is masked.
            of = [row.get(tuple(p[:n]), 0) for p, n in zip(batch, before, strict=True)]
            slots = slice(longest - most, longest)
            cache.copy(begun, torch.tensor(of, device=device), slots, rows, past)
        positions = None if min(before) == most else torch.tensor(before, device=device)
        tokens = torch.tensor([list(p[n:]) for p, n in zip(batch, before, strict=True)], device=device)
        x, a = forward(tokens, cache.window(rows, past - most, past), positions, None)
        xs.append(x[:, -1])
        activations.append(a[:, -1])
        cache.blank(rows, past - most)
    return torch.cat(xs), torch.cat(activations)


def _batches(lengths: Sequence[int], at_once: int) -> Iterator[slice]:
    """Yield slices of consecutive rows of equal length, as many as `at_once` tokens allow."""
    start = 0
    for length, same in groupby(lengths):
        stop = start + len(list(same))
        size = max(1, at_once // length)
        yield from (slice(i, min(i + size, stop)) for i in range(start, stop, size))
        start = stop
