"""Ablated logit rows in their low-rank form (paragraph 1 of `ccm.decoding.certificate`).

Rows for entropies are in bits, that is, logits divided by ln 2. PyTorch leaves `exp` to MKL, and on a
CPU that is not Intel's, `exp2`, which it computes itself, takes a quarter of the time.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from ccm.decoding.certificate import Group, Nodes, Pairs, Screen

BLOCK = 128  # entries of a row
NATS = math.log(2)  # in a bit


@dataclass(frozen=True)
class Dense:
    """Some sets at all nodes, and what each does there: `Pairs` without any to look up."""

    screen: Screen
    nodes: Nodes
    sets: slice  # counted over all groups
    c: Float[Tensor, "set k node"]  # activation changes
    scale: Float[Tensor, "set node"]  # s'


def read_dense(screen: Screen, nodes: Nodes, group: Group, part: slice) -> Dense:
    """Compute what some sets do to all nodes, as `certificate.read_pairs` does for pairs.

    Args:
        screen: The screen.
        nodes: The nodes.
        group: The group that the sets are of.
        part: Which sets, counted over all groups.
    """
    d = nodes.x.shape[1]
    slots, present = screen.slots[part], screen.present[part, :, None]
    c = (group.values[slots][..., None] - nodes.a.T[slots]) * present
    wide = c.double()
    linear = (wide * nodes.dots.T[slots]).sum(1)
    square = (torch.bmm(screen.gram[part], wide) * wide).sum(1)
    before = nodes.x.double().pow(2).sum(-1)
    scale = ((before + 2 * linear + square).clamp_min(0) / d + screen.eps).sqrt().float()
    return Dense(screen, nodes, part, c, scale)


def tolerances(dense: Dense) -> Float[Tensor, "set node"]:
    """Compute tau of some sets at all nodes, as `certificate.pair_tolerance` does for pairs."""
    screen, x = dense.screen, dense.nodes.x
    reach = (dense.c.abs() * screen.reach[screen.slots[dense.sets]][..., None]).sum(1)
    lengths: Tensor = x.norm(dim=1) + reach * x.shape[1] ** 0.5
    return lengths * screen.noise / dense.scale + screen.offset_noise


def best_and_lead(
    rows: Float[Tensor, "*row d_vocab"],
) -> tuple[Int[Tensor, "*row"], Float[Tensor, "*row"]]:
    """Find each row's largest entry, and by how much it leads.

    The blocks' maxima come first: they are found at the speed of memory, whereas `max` and `topk` over
    whole rows take ten times as long on a CPU.

    Returns:
        Its index, and its lead over the second: 0 for a tie, infinite if there is no second.
    """
    d_vocab = rows.shape[-1]
    whole = d_vocab // BLOCK * BLOCK
    tops = [rows[..., :whole].view(*rows.shape[:-1], -1, BLOCK).amax(-1)] if whole else []
    tops += [rows[..., whole:].amax(-1, keepdim=True)] if whole < d_vocab else []
    blocks = torch.cat(tops, dim=-1)
    best = blocks.max(-1)
    others = blocks.scatter(-1, best.indices[..., None], -torch.inf).amax(-1)
    places = best.indices[..., None] * BLOCK + torch.arange(BLOCK, device=rows.device)
    inside = rows.gather(-1, places.clamp_max(d_vocab - 1))
    inside = inside.masked_fill(places >= d_vocab, -torch.inf)
    first = inside.max(-1)
    inside = inside.scatter(-1, first.indices[..., None], -torch.inf)
    second = torch.maximum(others, inside.amax(-1))
    return best.indices * BLOCK + first.indices, first.values - second


def guessed_best_and_lead(
    rows: Float[Tensor, "set node d_vocab"], guess: Int[Tensor, "node"]
) -> tuple[Int[Tensor, "set node"], Float[Tensor, "set node"]]:
    """Do what `best_and_lead` does, in half of its time for rows whose largest entry is the guess.

    Only where lists have their true lengths (`ccm.decoding.bounded`): which rows are left is read.
    """
    best = guess.expand(rows.shape[:2])[..., None].contiguous()
    value = rows.gather(-1, best)
    lead = (value - rows.scatter_(-1, best, -torch.inf).amax(-1, keepdim=True))[..., 0]
    rows.scatter_(-1, best, value)
    best, left = best[..., 0], ~(lead > 0)  # NaN is no lead
    if left.any():
        best[left], lead[left] = best_and_lead(rows[left])
    return best, lead


def pair_rows(pairs: Pairs) -> Float[Tensor, "pair d_vocab"]:
    """Compute the ablated logit row of each pair (paragraph 1).

    As a weighted sum of directions that are read in place: gathering k rows of the vocabulary for each
    pair first, as `low_rank_rows` would, takes twice the time.
    """
    screen, inverse = pairs.screen, 1 / pairs.scale[:, None]
    beta = torch.full_like(pairs.sets[:, None], len(screen.directions) - 1)
    rows = functional.embedding_bag(
        torch.cat([screen.slots[pairs.sets], beta], dim=1),
        screen.directions,
        mode="sum",
        per_sample_weights=torch.cat([pairs.c * inverse, torch.ones_like(inverse)], dim=1),
    )
    return rows.addcmul_(pairs.nodes.sz[pairs.node], inverse)


def low_rank_terms(
    dense: Dense, shift: Float[Tensor, "set node"]
) -> tuple[Float[Tensor, "set node rank"], Float[Tensor, "set rank d_vocab"]]:
    """Compute what ablations add to plain rows: k directions, the constant and beta, one rank each.

    Args:
        dense: The sets at all nodes; rows will be divided by its scale.
        shift: What to subtract from each row, nats times that scale.

    Returns:
        What each direction is multiplied by, and the directions.
    """
    slots = dense.screen.slots[dense.sets]
    last = torch.arange(-2, 0, device=slots.device).expand(len(slots), -1)  # ones and beta
    weights = torch.cat([dense.c, -shift[:, None], dense.scale[:, None]], dim=1)
    return weights.transpose(1, 2), dense.screen.directions[torch.cat([slots, last], dim=1)]


class Room:
    """Memory for blocks of logit rows, taken once: asking for more at every block takes time."""

    def __init__(self, rows: int, d_vocab: int, device: torch.device) -> None:
        """Take memory for this many rows."""
        self.space = torch.empty((2, rows, d_vocab), device=device)

    def block(self, n_sets: int, n_nodes: int) -> Float[Tensor, "2 set node d_vocab"]:
        """Return room for the rows of some sets at some nodes, and for as many numbers beside them."""
        return self.space[:, : n_sets * n_nodes].view(2, n_sets, n_nodes, -1)


def low_rank_rows(
    sz: Float[Tensor, "node d_vocab"],
    weights: Float[Tensor, "group node rank"],
    scale: Float[Tensor, "group node"],
    directions: Float[Tensor, "group rank d_vocab"],
    out: Float[Tensor, "group node d_vocab"],
) -> Float[Tensor, "group node d_vocab"]:
    """Compute ablated logit rows in bits (paragraph 1), for groups of nodes that share a neuron set.

    Args:
        sz: Plain rows times their scale.
        weights: As from `low_rank_terms`.
        scale: What each row is divided by; bits come on top.
        directions: As from `low_rank_terms`.
        out: Where the rows are written.
    """
    inverse = 1 / (NATS * scale[..., None])
    # In place: the product adds to what is there, instead of copying it first.
    return torch.mul(sz, inverse, out=out).baddbmm_(weights * inverse, directions)


def log_z_and_entropy(
    rows: Float[Tensor, "*row d_vocab"], spare: Float[Tensor, "*row d_vocab"]
) -> tuple[Float[Tensor, "*row"], Float[Tensor, "*row"]]:
    """Compute log2 of the sum of exp2, and the entropy, of each row; all in bits.

    Args:
        rows: Logits in bits, the largest not far from 0.
        spare: Is overwritten.
    """
    z = torch.exp2(rows, out=spare).sum(-1)
    log_z = z.log2()
    return log_z, log_z - spare.mul_(rows).sum(-1) / z
