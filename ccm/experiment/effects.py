"""Which part of an ablation's effect on entropy acts through the final norm (Method 13).

An ablation moves the final residual x to x', and with it the norm's scale s to s'. In the notation of
`ccm.decoding.certificate`, the logits at the last prompt position are

    plain      (x^ * gain) W_U / s   + beta
    total      (x'^ * gain) W_U / s' + beta    what the ablation does
    direct     (x'^ * gain) W_U / s  + beta    the scale held: what the neurons write into logit space
    norm only  (x^ * gain) W_U / s'  + beta    the scale alone

with (x'^ * gain) W_U = s z + sum_i c_i P_i, and beta the part that no scale touches (the norm's bias
through W_U, and b_U). The split is that of Stolfo et al., *Confidence Regulation Neurons*
(arXiv 2406.16254), section 3. In decoding it holds at the first token, which is where it is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ccm.decoding.certificate import Nodes, Screen
from ccm.decoding.low_rank import (
    NATS,
    Room,
    log_z_and_entropy,
    low_rank_rows,
    low_rank_terms,
    read_dense,
)
from ccm.decoding.next_token import AtOnce, slices
from ccm.decoding.results import Batch
from ccm.method.neurons import to_float64

EFFECTS = ("total", "direct", "norm_only")  # the order of every `effect` axis
SPLIT = EFFECTS[1:]  # the order of every `split` axis; the decode itself reads the total
SAMPLED = 256  # prompts at which all sets are split; the entropy sets are split at every one


@dataclass(frozen=True)
class Effects:
    """First-token entropies, nats: of the entropy sets at every prompt, of all others at some."""

    plain: Float[np.ndarray, "prompt"]
    own: Float[np.ndarray, "prompt own effect"]
    sampled: Int[np.ndarray, "sampled"]  # which prompts, ascending
    others: Float[np.ndarray, "sampled other effect"]


def row_entropies(
    rows: Float[Tensor, "*row d_vocab"], spare: Float[Tensor, "*row d_vocab"]
) -> Float[Tensor, "*row"]:
    """Compute the entropy of each row of logits in bits, nats; both arguments are overwritten."""
    rows -= rows.amax(-1, keepdim=True)
    return log_z_and_entropy(rows, spare)[1] * NATS


def split_entropies(
    screen: Screen, nodes: Nodes, sizes: AtOnce, sets: slice
) -> Float[Tensor, "set node split"]:
    """Compute entropies of some sets at every node, nats: direct and norm only.

    Args:
        screen: The screen of all sets.
        nodes: Last prompt positions.
        sizes: How many logit rows to hold at once; changes results by rounding only.
        sets: Which sets of the screen.
    """
    n = len(nodes.scale)
    found = torch.empty((sets.stop - sets.start, n, len(SPLIT)), device=nodes.sz.device)
    width, height = sizes.block(n)
    room, beta = Room(width * height, screen.P.shape[1], nodes.sz.device), screen.beta / NATS
    for group in screen.groups:
        start, stop = max(group.sets.start, sets.start), min(group.sets.stop, sets.stop)
        for of in slices(stop, height, start):
            dense = read_dense(screen, nodes, group, of)
            after = dense.scale  # (set, node)
            held = replace(dense, scale=nodes.scale.expand_as(after))
            weights, directions = low_rank_terms(held, torch.zeros_like(after))
            place = slice(of.start - sets.start, of.stop - sets.start)
            for at in slices(n, width):
                rows, spare = room.block(*after[:, at].shape)
                low_rank_rows(nodes.sz[at], weights[:, at], held.scale[:, at], directions, rows)
                found[place, at, 0] = row_entropies(rows, spare)
                torch.addcmul(beta, nodes.sz[at], 1 / (NATS * after[:, at, None]), out=rows)
                found[place, at, 1] = row_entropies(rows, spare)
    return found


def evenly_spaced(n: int, most: int) -> Int[np.ndarray, "chosen"]:
    """Return at most `most` of the numbers 0..n-1, evenly spaced, first and last among them.

    >>> evenly_spaced(9, 3).tolist(), evenly_spaced(2, 3).tolist()
    ([0, 4, 8], [0, 1])
    """
    if most >= n:
        return np.arange(n)
    return np.asarray(np.linspace(0, n - 1, most).round().astype(np.int64))


class EffectsReader:
    """Reads the split of all sets' effects at last prompt positions while prompts are decoded."""

    def __init__(self, sizes: AtOnce, n_prompts: int, own: Sequence[int], n_sets: int) -> None:
        """Choose the prompts at which each set is read.

        Args:
            sizes: How many logit rows to hold at once; changes results by rounding only.
            n_prompts: Number of prompts; the other sets are read at no more than `SAMPLED` of them,
                evenly spaced.
            own: Sets to read at every prompt, as indices in the screen, ascending.
            n_sets: Number of sets of the screen.
        """
        self.sizes, self.sampled = sizes, evenly_spaced(n_prompts, SAMPLED)
        self.own = [slice(i, i + 1) for i in own]
        # All sets between them, except the plain run, which is set 0.
        between = zip([0, *own], [*own, n_sets], strict=True)
        self.others = [slice(i + 1, j) for i, j in between if i + 1 < j]

    def __call__(self, indices: Sequence[int], screen: Screen, nodes: Nodes) -> dict[str, np.ndarray]:
        """Read some prompts; arguments as for `ccm.decoding.results.AtLast`."""
        prompts = np.asarray(indices, dtype=np.int64)
        at = np.flatnonzero(np.isin(prompts, self.sampled))
        return {
            "own": self._of(screen, nodes, self.own),
            "sampled": prompts[at],
            "others": self._of(screen, nodes.some(at), self.others),
        }

    def _of(
        self, screen: Screen, nodes: Nodes, parts: Sequence[slice]
    ) -> Float[np.ndarray, "node set split"]:
        none = torch.empty((0, len(nodes.scale), len(SPLIT)), device=nodes.scale.device)
        found = torch.cat([none, *(split_entropies(screen, nodes, self.sizes, s) for s in parts)])
        return np.ascontiguousarray(to_float64(found.transpose(0, 1)))


def join_effects(batches: Sequence[Batch], own: Sequence[int]) -> Effects:
    """Join what the decode and an `EffectsReader` read, in the order of prompts and of sets.

    Args:
        batches: All batches of a decode whose `at_last` is an `EffectsReader`.
        own: The sets that it read at every prompt.
    """
    order = np.argsort(np.concatenate([batch.prompts for batch in batches]))
    entropy = np.concatenate([batch.entropy for batch in batches]).astype(np.float64)[order]
    sampled = np.concatenate([batch.at_last["sampled"] for batch in batches])
    others = np.setdiff1d(np.arange(1, entropy.shape[1]), own)

    def joined(name: str, order: np.ndarray, total: np.ndarray) -> np.ndarray:
        split = np.concatenate([batch.at_last[name] for batch in batches])[order]
        return np.concatenate([total[..., None], split], axis=-1)

    by_prompt = np.argsort(sampled)
    sampled = sampled[by_prompt]
    return Effects(
        plain=entropy[:, 0],
        own=joined("own", order, entropy[:, own]),
        sampled=sampled,
        others=joined("others", by_prompt, entropy[np.ix_(sampled, others)]),
    )
