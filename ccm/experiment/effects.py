"""Which part of an ablation's effect on entropy acts through the final norm (Method 13).

An ablation moves the final residual x to x', and with it the norm's scale s to s'. In the notation of
`ccm.decoding.certificate`, the logits at the last prompt position are

    plain      (x^ * gain) W_U / s   + beta
    total      (x'^ * gain) W_U / s' + beta    what the ablation does
    direct     (x'^ * gain) W_U / s  + beta    the scale held: what the neurons write into logit space
    norm only  (x^ * gain) W_U / s'  + beta    the scale alone

with (x'^ * gain) W_U = s z + sum_i c_i P_i, and beta the part that no scale touches (the norm's bias
through W_U, and b_U). The split is that of Stolfo et al., *Confidence Regulation Neurons*
(arXiv 2406.16254), section 3. With decoding it holds at the first token, which is where it is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from ccm.decoding.certificate import Nodes, Screen, build_screen, read_nodes
from ccm.decoding.engines import ENGINES, Engine
from ccm.decoding.low_rank import dense_changes
from ccm.decoding.next_token import AtOnce, at_once, slices
from ccm.experiment.batches import ArrayStore
from ccm.method.ablation import Ablation
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
        screen: The plan of all sets.
        nodes: Plain readings at last prompt positions.
        sizes: How many rows of logits to hold at once; changes results by rounding only.
        sets: Which sets of the plan.
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
    """At most `most` of the numbers 0..n-1, evenly spaced, first and last among them.

    >>> evenly_spaced(9, 3).tolist(), evenly_spaced(2, 3).tolist()
    ([0, 4, 8], [0, 1])
    """
    if most >= n:
        return np.arange(n)
    return np.asarray(np.linspace(0, n - 1, most).round().astype(np.int64))


@torch.inference_mode()
def measure_effects(
    model: LoadedModel,
    prompts: Sequence[Tokens],
    own: Sequence[Ablation],
    others: Sequence[Ablation],
    *,
    store: ArrayStore | None = None,
    memory_budget: int | None = None,
    engine: Engine = ENGINES["shared"],
) -> Effects:
    """Run every prompt once, and compute all sets' entropies at its last position (Method 13).

    Args:
        model: The model.
        prompts: Token ids, BOS included.
        own: Sets to read at every prompt.
        others: Sets to read at no more than `SAMPLED` prompts, evenly spaced.
        store: Where finished batches are kept; those there already are not computed again.
        memory_budget: As for `ccm.decoding.shared.decode_sets`.
        engine: What runs the prompts.

    Returns:
        Entropies in the order of prompts and of sets.
    """
    sampled = evenly_spaced(len(prompts), SAMPLED)
    # Nothing is chosen here, so no rounding is reckoned with.
    screen, sizes = build_screen(model.last_layer, [*own, *others], u=0.0), at_once(model)
    batches = [] if store is None else list(store.read_arrays())
    done = {int(i) for batch in batches for i in batch["prompts"]}

    def read(indices: list[int], x: Tensor, a: Tensor) -> dict[str, np.ndarray]:
        nodes, at = read_nodes(screen, x, a), np.flatnonzero(np.isin(indices, sampled))
        few = read_nodes(screen, x[at], a[at])
        mine, rest = slice(0, len(own)), slice(len(own), len(own) + len(others))
        return {
            "prompts": np.asarray(indices, dtype=np.int64),
            "plain": _numpy(plain_entropies(screen, nodes, sizes)),
            "own": _by_node(ablated_entropies(screen, nodes, sizes, mine)),
            "sampled": np.asarray(indices, dtype=np.int64)[at],
            "others": _by_node(ablated_entropies(screen, few, sizes, rest)),
        }

    found = engine.read_last_positions(model, prompts, read, memory_budget=memory_budget, done=done)
    with tqdm(total=len(prompts), initial=len(done), desc="effects", unit="prompt") as bar:
        for batch in found:
            if store is not None:
                store.write_arrays(int(batch["prompts"][0]), batch)
            batches.append(batch)
            bar.update(len(batch["prompts"]))

    def joined(name: str, prompts: str) -> np.ndarray:
        order = np.argsort(np.concatenate([batch[prompts] for batch in batches]))
        return np.asarray(np.concatenate([batch[name] for batch in batches])[order])

    return Effects(
        plain=joined("plain", "prompts"),
        own=joined("own", "prompts"),
        sampled=joined("sampled", "sampled"),
        others=joined("others", "sampled"),
    )


def _by_node(entropies: Float[Tensor, "set node effect"]) -> Float[np.ndarray, "node set effect"]:
    return np.ascontiguousarray(_numpy(entropies.transpose(0, 1)))


def _numpy(x: Tensor) -> np.ndarray:
    return np.asarray(x.cpu().numpy(), dtype=np.float64)
