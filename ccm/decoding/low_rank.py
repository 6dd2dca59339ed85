"""Ablated rows of logits by their low-rank form (paragraph 1 of `ccm.decoding.certificate`)."""

import torch
from jaxtyping import Float
from torch import Tensor

from ccm.decoding.certificate import Group, Nodes, Screen


def dense_changes(
    screen: Screen, nodes: Nodes, group: Group, part: slice
) -> tuple[Float[Tensor, "part k node"], Float[Tensor, "part node"]]:
    """c_i and s' of some sets of a group at all nodes, as `changes` and `ablated_scale` of pairs.

    Args:
        screen: The plan.
        nodes: Plain readings.
        group: The group.
        part: Which sets, counted over all groups.
    """
    d = nodes.x.shape[1]
    slots, present = screen.slots[part], screen.present[part, :, None]
    c = (group.values[:, None] - nodes.a.T)[slots] * present
    wide = c.double()
    linear = (wide * nodes.dots.T[slots]).sum(1)
    square = (torch.bmm(screen.gram[part], wide) * wide).sum(1)
    before = nodes.x.double().pow(2).sum(-1)
    scale = ((before + 2 * linear + square).clamp_min(0) / d + screen.eps).sqrt().float()
    return c, scale


def low_rank_rows(
    beta: Float[Tensor, "d_vocab"],
    sz: Float[Tensor, "#group node d_vocab"],
    c: Float[Tensor, "group node k"],
    scale: Float[Tensor, "group node"],
    P: Float[Tensor, "group k d_vocab"],
) -> Float[Tensor, "group node d_vocab"]:
    """Ablated logit rows (paragraph 1), for groups of nodes that share a neuron set.

    Args:
        beta: From the plan.
        sz: Plain rows times their scale, once for all groups or per group.
        c: Activation changes.
        scale: s' of each.
        P: Logit directions of each group's neurons.
    """
    rows = torch.baddbmm(sz, c, P)
    return torch.addcmul(beta, rows, 1 / scale[..., None], out=rows)
