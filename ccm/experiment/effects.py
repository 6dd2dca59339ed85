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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ccm.decoding.certificate import Nodes, Screen, build_screen, read_nodes
from ccm.decoding.engines import ENGINES, Engine
from ccm.decoding.low_rank import dense_changes
from ccm.decoding.next_token import AtOnce, at_once, slices
from ccm.method.ablation import PLAIN, Ablation
from ccm.method.neurons import to_float64
from ccm.models.bridge import Tokens
from ccm.models.model import LoadedModel

EFFECTS = ("total", "direct", "norm_only")  # the order of every `effect` axis
SAMPLED = 256  # prompts at which all sets are read; the entropy sets are read at every one


@dataclass(frozen=True)
class Effects:
    """First-token entropies, nats: of the entropy sets at every prompt, of all others at some."""

    plain: Float[np.ndarray, "prompt"]
    own: Float[np.ndarray, "prompt own effect"]
    sampled: Int[np.ndarray, "sampled"]  # which prompts, ascending
    others: Float[np.ndarray, "sampled other effect"]


def row_entropies(rows: Float[Tensor, "*row d_vocab"]) -> Float[Tensor, "*row"]:
    """Compute the entropy of each row of logits, nats; `rows` are overwritten."""
    rows -= rows.amax(-1, keepdim=True)
    weights = rows.exp()
    z = weights.sum(-1)
    entropies: Tensor = z.log() - torch.linalg.vecdot(weights, rows) / z
    return entropies


def plain_entropies(screen: Screen, nodes: Nodes, sizes: AtOnce) -> Float[Tensor, "node"]:
    """Compute the entropy of every node without ablation, nats."""
    parts = [
        row_entropies(torch.addcmul(screen.beta, nodes.sz[at], 1 / nodes.scale[at, None]))
        for at in slices(len(nodes.scale), sizes.rows(3))
    ]
    return torch.cat(parts)


def ablated_entropies(
    screen: Screen, nodes: Nodes, sizes: AtOnce, sets: slice
) -> Float[Tensor, "set node effect"]:
    """Compute entropies of some sets at every node, nats: total, direct, norm only (Method 13).

    Args:
        screen: The screen of all sets.
        nodes: Last prompt positions.
        sizes: How many logit rows to hold at once; changes results by rounding only.
        sets: Which sets of the screen.
    """
    n = len(nodes.scale)
    found = torch.empty((sets.stop - sets.start, n, len(EFFECTS)), device=nodes.sz.device)
    # A few sets at a few nodes: three rows and a sum for each pair, and the directions of each set.
    width, k = max(1, min(n, sizes.rows(4) // 8)), screen.slots.shape[1]
    for group in screen.groups:
        start, stop = max(group.sets.start, sets.start), min(group.sets.stop, sets.stop)
        for of in slices(stop, sizes.rows(4 * width + k), start):
            c, after = dense_changes(screen, nodes, group, of)  # (set, k, node), (set, node)
            P = screen.P[screen.slots[of]]  # (set, k, d_vocab)
            place = slice(of.start - sets.start, of.stop - sets.start)
            for at in slices(n, width):
                plain, scale = nodes.sz[at], nodes.scale[at, None]  # (node, d_vocab), (node, 1)
                # (set, node, d_vocab)
                moved = torch.baddbmm(plain[None], c[:, :, at].transpose(1, 2), P)
                s = after[:, at, None]  # (set, node, 1)
                for i, rows in enumerate(
                    (
                        torch.addcmul(screen.beta, moved, 1 / s),
                        torch.addcmul(screen.beta, moved, 1 / scale),
                        torch.addcmul(screen.beta, plain, 1 / s),
                    )
                ):
                    found[place, at, i] = row_entropies(rows)
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
    """Reads all sets' entropies at last prompt positions while prompts are decoded (Method 13)."""

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
            "prompts": prompts,
            "plain": to_float64(plain_entropies(screen, nodes, self.sizes)),
            "own": self._of(screen, nodes, self.own),
            "sampled": prompts[at],
            "others": self._of(screen, nodes.some(at), self.others),
        }

    def _of(
        self, screen: Screen, nodes: Nodes, parts: Sequence[slice]
    ) -> Float[np.ndarray, "node set effect"]:
        none = torch.empty((0, len(nodes.scale), len(EFFECTS)), device=nodes.scale.device)
        found = torch.cat([none, *(ablated_entropies(screen, nodes, self.sizes, s) for s in parts)])
        return np.ascontiguousarray(to_float64(found.transpose(0, 1)))


def join_effects(parts: Sequence[Mapping[str, np.ndarray]]) -> Effects:
    """Join what an `EffectsReader` read, in the order of prompts and of sets."""

    def joined(name: str, prompts: str) -> np.ndarray:
        order = np.argsort(np.concatenate([part[prompts] for part in parts]))
        return np.asarray(np.concatenate([part[name] for part in parts])[order])

    return Effects(
        plain=joined("plain", "prompts"),
        own=joined("own", "prompts"),
        sampled=joined("sampled", "sampled"),
        others=joined("others", "sampled"),
    )


def measure_effects(
    model: LoadedModel,
    prompts: Sequence[Tokens],
    own: Sequence[Ablation],
    others: Sequence[Ablation],
    *,
    memory_budget: int | None = None,
    engine: Engine = ENGINES["shared"],
) -> Effects:
    """Run every prompt once, and compute all sets' entropies at its last position (Method 13).

    A run needs no such pass: it reads them while it decodes.

    Args:
        model: The model.
        prompts: Token ids, BOS included.
        own: Sets to read at every prompt.
        others: Sets to read at no more than `SAMPLED` prompts, evenly spaced.
        memory_budget: As for `ccm.decoding.shared.decode_sets`.
        engine: The engine that runs the prompts.

    Returns:
        Entropies in the order of prompts and of sets.
    """
    sets = [*own, *others]
    reader = EffectsReader(at_once(model), len(prompts), range(1, 1 + len(own)), 1 + len(sets))
    # No token is chosen, so no tolerance is needed.
    screen = build_screen(model.last_layer, [PLAIN, *sets], u=0.0)

    def read(indices: list[int], x: Tensor, a: Tensor) -> dict[str, np.ndarray]:
        return reader(indices, screen, read_nodes(screen, x, a))

    return join_effects(
        list(engine.read_last_positions(model, prompts, read, memory_budget=memory_budget))
    )
