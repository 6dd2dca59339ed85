"""The effect of an ablation on the next token, computed from the final residual alone.

Notation. x is the final residual at a position, x^ = x, less its mean for LayerNorm, s its
scale, a the last MLP's activations there, v the replacement values of set S, c_i = v_i - a_i. w_i is
neuron i's output weight (centred for LayerNorm), P_i = (w_i * gain) W_U its logit direction, beta the
part of the logits that no scale touches (norm bias through W_U, plus b_U). Primes mean: ablated.

    plain     l  = z + beta,                      z = (x^ * gain) W_U / s
    ablated   l' = (s z + sum_i c_i P_i) / s' + beta,     s' = scale(x^ + sum_i c_i w_i)

1. Exactness of l'. The last MLP writes only into x, and only the final norm and W_U read x, so the
   line above is the ablated model's own logit row, rearranged: one |S|-term sum in place of a
   d_model x d_vocab product.
2. The certificate. Let top be the plain argmax, gap its lead over the runner-up, R = max beta - min
   beta, and h_i half the range of P_i over the vocabulary. For any other token t

       s' (l'_top - l'_t) = s (z_top - z_t) + sum_i c_i (P_i,top - P_i,t) + s' (beta_top - beta_t)

   Writing z_top - z_t = (l_top - l_t) - (beta_top - beta_t) turns the right-hand side into
   s (l_top - l_t) + (s' - s)(beta_top - beta_t) + sum_i c_i (P_i,top - P_i,t). With mid_i the centre of
   P_i's range, c_i P_i,t <= c_i mid_i + |c_i| h_i, so this is at least

       s gap - |s' - s| R - sum_i (c_i (mid_i - P_i,top) + |c_i| h_i)

   The simpler bound 2 |c_i| h_i is no less; this one proves more for one more product.
3. |s' - s| needs no s'. s is the Euclidean norm of the vector (x^, sqrt(d eps)) / sqrt(d), so by the
   triangle inequality |s' - s| <= |sum_i c_i w_i| / sqrt(d) <= sum_i |c_i| |w_i| / sqrt(d).
4. We want the lead to exceed the rounding of this arithmetic, tau. Rounding moves each side of the line
   in paragraph 2 by a small multiple u of the vectors multiplied, so with B = max |beta| and M the
   longest column of gain * W_U

       s' tau = u (M (|x^| + sum_i |c_i| |w_i|) + s' B)

   so where c all but cancels the residual, s' is small and tau is large. With paragraph 3 for s' on the
   right, the plain argmax stays, by more than tau, when

       sum_i (c_i (mid_i - P_i,top) + |c_i| q_i)  <  s (gap - tau_0),
       q_i = h_i + (R + u B) |w_i| / sqrt(d) + u M |w_i|

   and tau_0 = u (M |x^| / s + B): a test of 2 |S| multiplications with mid_i and q_i known beforehand.
   It holds with and without norm bias, b_U and centring; RMSNorm without b_U has R = B = 0.
5. The shortlist, for pairs that fail the certificate. l' is computed exactly for the m most likely
   plain tokens. Any other t has l_t <= l_(m+1), and with c_i P_i,t <= c_i mid_i + |c_i| h_i

       s' l'_t <= s l_(m+1) + sum_i (c_i mid_i + |c_i| h_i) + max over t of (s' - s) beta_t

   If the best of the m exceeds that bound by more than tau, it is the argmax; that settles flips too.
   Only what is left needs a row over the whole vocabulary.
6. u is ten times the largest error of a logit difference that float32 was seen to make on prompts of
   the run, on the device at hand, relative to M |x^| / s + B, and at least 2^-23
   (`ccm.decoding.tolerance`). A lead of less than tau is called a near tie; it is never certified nor
   taken from a shortlist, but settled in float64 (`ccm.decoding.exact`). A tie even there goes to the
   lowest token id, as with argmax.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ccm.decoding.products import unembed
from ccm.method.ablation import Ablation
from ccm.method.neurons import VOCAB_COLUMNS
from ccm.models.model import LastLayer

SHORTLIST = 7  # m of paragraph 5; it needs the top 8, and topk is fast up to 8


@dataclass(frozen=True)
class Group:
    """Consecutive sets that agree on each neuron's replacement value: those of one ablation value."""

    sets: slice
    values: Float[Tensor, "selected"]  # v_i; any number where no set of the group holds i
    member: Float[Tensor, "selected set"]  # 1 where the set holds the neuron


@dataclass(frozen=True)
class Screen:
    """Everything that depends only on the model and the neuron sets, built once."""

    selected: Int[Tensor, "selected"]  # neurons of any set, ascending
    groups: tuple[Group, ...]  # all sets, in order
    slots: Int[Tensor, "set k"]  # each set's neurons as positions in `selected`
    values: Float[Tensor, "set k"]  # v_i
    present: Float[Tensor, "set k"]  # 1, or 0 for the padding of a set of fewer than k neurons
    W: Float[Tensor, "selected d_model"]  # w_i, float64
    gram: Float[Tensor, "set k k"]  # w_i . w_j within each set, float64
    directions: Float[Tensor, "ranks d_vocab"]  # P_i, then a row of ones, then beta
    mid: Float[Tensor, "selected"]  # centre of P_i's range
    half: Float[Tensor, "selected"]  # h_i
    q: Float[Tensor, "selected"]  # of paragraph 4
    reach: Float[Tensor, "selected"]  # |w_i| / sqrt(d)
    W_U: Float[Tensor, "d_model d_vocab"]  # as stored, float32: a folded copy would take gigabytes
    gain: Float[Tensor, "d_model"]
    centred: bool
    eps: float
    noise: float  # u M
    offset_noise: float  # u B

    @property
    def P(self) -> Float[Tensor, "selected d_vocab"]:
        """Logit directions P_i."""
        return self.directions[:-2]

    @property
    def beta(self) -> Float[Tensor, "d_vocab"]:
        """The part of the logits that no scale touches."""
        return self.directions[-1]


@dataclass(frozen=True)
class Nodes:
    """Positions whose next token is wanted, with what the plain run gives there."""

    x: Float[Tensor, "node d_model"]  # x^
    scale: Float[Tensor, "node"]  # s
    a: Float[Tensor, "node selected"]
    dots: Float[Tensor, "node selected"]  # x^ . w_i, float64
    sz: Float[Tensor, "node d_vocab"]  # s z = (x^ * gain) W_U, all that rows need
    likely: Int[Tensor, "node m"]  # most likely plain tokens, in descending order
    gap: Float[Tensor, "node"]  # lead of the first over the second
    beyond: Float[Tensor, "node"]  # l_(m+1), or -inf where the vocabulary ends before it
    tolerance: Float[Tensor, "node"]  # tau_0

    def some(self, rows: Int[np.ndarray, "chosen"]) -> "Nodes":
        """Select some of the nodes."""
        at = torch.from_numpy(rows).to(self.x.device)
        return Nodes(**{f.name: getattr(self, f.name)[at] for f in fields(self)})


@dataclass(frozen=True)
class Pairs:
    """(node, set) pairs, and what each set does to its node."""

    screen: Screen
    nodes: Nodes
    node: Int[Tensor, "pair"]
    sets: Int[Tensor, "pair"]
    c: Float[Tensor, "pair k"]  # activation changes
    scale: Float[Tensor, "pair"]  # s'
    tau: Float[Tensor, "pair"]  # of paragraph 4: a lead that is smaller is a near tie


def build_screen(last: LastLayer, ablations: Sequence[Ablation], u: float) -> Screen:
    """Build the screen of some neuron sets; smaller sets are padded with absent neurons.

    Args:
        last: The weights between the last MLP's activations and the logits.
        ablations: Neuron sets with their values.
        u: u of paragraph 6, as `ccm.decoding.tolerance.tolerance` measures it; 0 if no token is to be
            chosen.
    """
    device = last.W_out.device
    neurons = sorted({i for ablation in ablations for i in ablation.neurons}) or [0]
    slot = {neuron: i for i, neuron in enumerate(neurons)}
    k = max([1, *(len(a.neurons) for a in ablations)])
    slots = torch.zeros((len(ablations), k), dtype=torch.long)
    values, present = torch.zeros((len(ablations), k)), torch.zeros((len(ablations), k))
    for row, ablation in enumerate(ablations):
        n = len(ablation.neurons)
        slots[row, :n] = torch.tensor([slot[i] for i in ablation.neurons], dtype=torch.long)
        # In the model's dtype first: that is the constant a hook would write.
        values[row, :n] = torch.tensor(ablation.values, dtype=last.W_out.dtype).float()
        present[row, :n] = 1.0
    norm = last.norm
    selected = torch.tensor(neurons, device=device)
    W = last.W_out[selected].float()
    W = W - W.mean(1, keepdim=True) if norm.centred else W
    W_U = last.W_U.float()
    beta = norm.bias @ W_U + last.b_U
    directions = torch.empty((len(neurons) + 2, W_U.shape[1]), device=device)
    P = torch.matmul(W * norm.gain, W_U, out=directions[:-2])
    directions[-2], directions[-1] = 1.0, beta
    longest = max(
        float((chunk * norm.gain[:, None]).norm(dim=0).max())
        for chunk in torch.split(W_U, VOCAB_COLUMNS, dim=1)
    )
    norms = W.norm(dim=1)
    reach = norms / W.shape[1] ** 0.5
    noise, offset_noise = u * longest, u * float(beta.abs().max())
    half = (P.amax(1) - P.amin(1)) / 2
    slots, W = slots.to(device), W.double()
    return Screen(
        selected=selected,
        groups=tuple(_groups(ablations, slot, values, device)),
        slots=slots,
        values=values.to(device),
        present=present.to(device),
        W=W,
        gram=W[slots] @ W[slots].transpose(1, 2),
        directions=directions,
        mid=(P.amax(1) + P.amin(1)) / 2,
        half=half,
        q=half + (beta.max() - beta.min() + offset_noise) * reach + noise * norms,
        reach=reach,
        W_U=W_U,
        gain=norm.gain,
        centred=norm.centred,
        eps=norm.eps,
        noise=noise,
        offset_noise=offset_noise,
    )


def _groups(
    ablations: Sequence[Ablation],
    slot: dict[int, int],
    values: Float[Tensor, "set k"],
    device: torch.device,
) -> Iterator[Group]:
    """Cut the sets where a neuron's value changes, so that sums over a set are matrix products."""
    start, held = 0, dict[int, float]()

    def group(stop: int) -> Group:
        member = torch.zeros((len(slot), stop - start))
        for j, ablation in enumerate(ablations[start:stop]):
            member[[slot[i] for i in ablation.neurons], j] = 1.0
        v = torch.zeros(len(slot))
        for i, value in held.items():
            v[slot[i]] = value
        return Group(slice(start, stop), v.to(device), member.to(device))

    for row, ablation in enumerate(ablations):
        mine = dict(zip(ablation.neurons, values[row].tolist(), strict=False))
        if any(held.get(i, value) != value for i, value in mine.items()):
            yield group(row)
            start, held = row, {}
        held |= mine
    yield group(len(ablations))


def read_nodes(
    screen: Screen, x: Float[Tensor, "node d_model"], a: Float[Tensor, "node d_mlp"]
) -> Nodes:
    """Compute the plain run's `Nodes` from final residuals and last-layer activations."""
    x = x.float()
    x = x - x.mean(-1, keepdim=True) if screen.centred else x
    s = (x.pow(2).mean(-1) + screen.eps).sqrt()
    sz = unembed(x * screen.gain, screen.W_U)
    logits = torch.addcmul(screen.beta, sz, 1 / s[:, None])
    best = logits.topk(min(SHORTLIST + 1, logits.shape[1]))
    m = min(SHORTLIST, logits.shape[1])
    beyond = best.values[:, m] if best.values.shape[1] > m else torch.full_like(s, -torch.inf)
    return Nodes(
        x=x,
        scale=s,
        a=a[:, screen.selected].float(),
        dots=x.double() @ screen.W.T,
        sz=sz,
        likely=best.indices[:, :m],
        gap=best.values[:, 0] - best.values[:, 1],
        beyond=beyond,
        tolerance=screen.noise * x.norm(dim=1) / s + screen.offset_noise,
    )


def changes(
    screen: Screen, nodes: Nodes, node: Int[Tensor, "pair"], sets: Int[Tensor, "pair"]
) -> Float[Tensor, "pair k"]:
    """Compute c_i = v_i - a_i of each (node, set) pair; 0 for absent neurons."""
    a = _at(nodes.a, node, screen.slots[sets])
    return (screen.values[sets] - a) * screen.present[sets]


def _at(
    table: Float[Tensor, "node column"], node: Int[Tensor, "pair"], column: Int[Tensor, "pair k"]
) -> Float[Tensor, "pair k"]:
    """Look up a table at each pair's node and columns."""
    return table.take(node[:, None] * table.shape[1] + column)


def certified(screen: Screen, nodes: Nodes) -> Bool[Tensor, "node set"]:
    """Mark the sets for which a node's plain argmax provably stays, by more than tau (paragraph 4)."""
    tilt = screen.mid - screen.P[:, nodes.likely[:, 0]].T  # (node, selected)
    moved = []
    for group in screen.groups:
        c = group.values - nodes.a  # (node, selected)
        moved.append(c.abs().mul_(screen.q).addcmul_(c, tilt) @ group.member)
    return torch.cat(moved, dim=1) < (nodes.scale * (nodes.gap - nodes.tolerance))[:, None]


def ablated_scale(
    screen: Screen,
    nodes: Nodes,
    node: Int[Tensor, "pair"],
    sets: Int[Tensor, "pair"],
    c: Float[Tensor, "pair k"],
) -> Float[Tensor, "pair"]:
    """Compute s' of each pair from dot products, in float64: a large neuron may cancel most of x."""
    d, wide = nodes.x.shape[1], c.double()
    linear = (wide * _at(nodes.dots, node, screen.slots[sets])).sum(-1)
    square = (torch.bmm(wide[:, None], screen.gram[sets])[:, 0] * wide).sum(-1)
    before = nodes.x.double().pow(2).sum(-1)[node]
    return ((before + 2 * linear + square).clamp_min(0) / d + screen.eps).sqrt().float()


def pair_tolerance(
    screen: Screen,
    nodes: Nodes,
    node: Int[Tensor, "pair"],
    sets: Int[Tensor, "pair"],
    c: Float[Tensor, "pair k"],
    scale: Float[Tensor, "pair"],
) -> Float[Tensor, "pair"]:
    """Compute tau of each pair (paragraph 4): a smaller lead is a near tie."""
    d = nodes.x.shape[1]
    reach = (c.abs() * screen.reach[screen.slots[sets]]).sum(-1)  # |w_i| is reach sqrt(d)
    lengths: Tensor = nodes.x.norm(dim=1)[node] + reach * d**0.5
    return lengths * screen.noise / scale + screen.offset_noise


def read_pairs(
    screen: Screen, nodes: Nodes, node: Int[Tensor, "pair"], sets: Int[Tensor, "pair"]
) -> Pairs:
    """Compute what each set does to its node."""
    c = changes(screen, nodes, node, sets)
    scale = ablated_scale(screen, nodes, node, sets, c)
    return Pairs(
        screen, nodes, node, sets, c, scale, pair_tolerance(screen, nodes, node, sets, c, scale)
    )


def shortlisted(pairs: Pairs) -> tuple[Bool[Tensor, "pair"], Int[Tensor, "pair"]]:
    """Find the ablated argmax among the m likely tokens, and whether it provably beats all others.

    Returns:
        For each pair, whether it is proved (paragraph 5, and no near tie within the shortlist), and the
        token.
    """
    screen, nodes, node, c, scale = pairs.screen, pairs.nodes, pairs.node, pairs.c, pairs.scale
    slots, likely = screen.slots[pairs.sets], nodes.likely[node]
    d_vocab = screen.P.shape[1]
    P = screen.P.take(slots[:, :, None] * d_vocab + likely[:, None])  # (pair, k, m)
    exact = _at(nodes.sz, node, likely) + torch.bmm(c[:, None], P)[:, 0]
    exact = exact / scale[:, None] + screen.beta[likely]
    best = exact.topk(min(2, exact.shape[1]))
    s = nodes.scale[node]
    spread = (c * screen.mid[slots] + c.abs() * screen.half[slots]).sum(-1)
    # max over t of (s' - s) beta_t is at one end of beta's range.
    tilt = torch.maximum((scale - s) * screen.beta.max(), (scale - s) * screen.beta.min())
    bound = (s * nodes.beyond[node] + spread + tilt) / scale
    lead = best.values[:, 0] - torch.maximum(best.values[:, -1], bound)
    return lead > pairs.tau, likely.gather(1, best.indices[:, :1])[:, 0]
