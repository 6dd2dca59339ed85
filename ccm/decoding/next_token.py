"""The next token of every neuron set at a node, and its first-token readings.

A choice whose lead is below the tolerance of `ccm.decoding.certificate` is left to a referee, which
makes it in float64, so that none depends on batch, kernel or device. This holds in float32; in lower
precision rounding moves x itself too far for a referee, and near ties are left as computed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ccm.decoding.bounded import BoundedLists
from ccm.decoding.certificate import (
    Nodes,
    Screen,
    certified,
    read_pairs,
    shortlisted,
)
from ccm.decoding.exact import exact_last_positions, exact_logits
from ccm.decoding.low_rank import (
    NATS,
    Room,
    best_and_lead,
    guessed_best_and_lead,
    log_z_and_entropy,
    low_rank_rows,
    low_rank_terms,
    pair_rows,
    read_dense,
    tolerances,
)
from ccm.decoding.results import N_TOP, Work, most_likely
from ccm.method.neurons import VOCAB_COLUMNS
from ccm.models.model import LoadedModel

TOGETHER = 8  # nodes, or sets where more than that fit, whose rows are one product
# Initial room of a GPU's lists of pairs that are not certified, and of pairs that need a whole row.
UNSURE, WHOLE = 1 << 12, 1 << 6
COPIES = 5  # of float64 rows that are held at once while their most likely tokens are found


@dataclass(frozen=True)
class AtOnce:
    """How much is computed at once: what fits a CPU's caches, or keeps a GPU busy."""

    tokens: int  # of one forward pass
    pairs: int  # (node, set) pairs
    row_bytes: int  # of logit rows
    d_vocab: int

    def block(self, n: int) -> tuple[int, int]:
        """Return at how many of n nodes, and under how many sets, logit rows are worked on at once.

        There is room for two vectors over the vocabulary per row. Nodes come first: the rows of a set
        are one matrix product, which at a single node would take twice the time.
        """
        fit = self.rows(2)
        width = max(1, min(n, fit, max(TOGETHER, fit // TOGETHER)))
        return width, self.rows(2 * width)

    def rows(self, per_row: int) -> int:
        """Return how many logit rows fit, at `per_row` vectors over the vocabulary for each."""
        return max(1, self.row_bytes // (4 * self.d_vocab * per_row))


def at_once(model: LoadedModel) -> AtOnce:
    """Return the sizes for a model's device; they change no result."""
    d_vocab = model.spec.d_vocab
    if model.device.type == "cuda":
        return AtOnce(1 << 12, pairs=1 << 20, row_bytes=1 << 28, d_vocab=d_vocab)
    return AtOnce(1 << 11, pairs=1 << 13, row_bytes=6 << 20, d_vocab=d_vocab)


def slices(stop: int, size: int, start: int = 0) -> Iterator[slice]:
    """Cut a range into slices of at most `size`."""
    return (slice(i, min(i + size, stop)) for i in range(start, stop, size))


@dataclass(frozen=True)
class Tie:
    """A near tie, and what float32 made of it."""

    prompt: int  # index in the batch
    prefix: tuple[int, ...]  # the node's tokens, the prompt's included
    set: int
    chosen: tuple[int, ...]  # most likely tokens, as many as are wanted


@dataclass
class Referee:
    """Settles near ties in float64 (`ccm.decoding.exact`).

    A float64 pass casts all weights, however few its prefixes. So a batch is first decoded by float32's
    choices, and near ties are noted; one pass then settles them all. The few prompts for which float32
    chose otherwise are decoded again, and what comes up there is settled at once.
    """

    model: LoadedModel
    screen: Screen
    lists: BoundedLists
    work: Work
    sizes: AtOnce
    later: bool  # whether to settle ties after the batch, not at once
    exact: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)  # x and a
    noted: list[Tie] = field(default_factory=list)
    of_step: dict[str, list[Tie]] = field(default_factory=dict)  # by the name of their list

    def start(self, prefix: Callable[[int], tuple[int, tuple[int, ...]]]) -> None:
        """Start a step.

        Args:
            prefix: Returns a node's prompt and its tokens.
        """
        self.prefix = prefix
        self.of_step = {}

    def finish(self) -> None:
        """Keep what the step noted; until then, a list that is read again replaces its ties."""
        self.noted += [tie for ties in self.of_step.values() for tie in ties]

    def settle(
        self,
        name: str,
        node: Int[Tensor, "pair"],
        sets: Int[Tensor, "pair"],
        doubtful: Bool[Tensor, "pair"],
        chosen: Int[Tensor, "pair n"],
    ) -> None:
        """Settle the doubtful pairs whose prefix float64 has seen, in place, and note the others.

        Args:
            name: Name of their list in `lists`.
            node: Node of each pair.
            sets: Set of each pair.
            doubtful: Which pairs to settle; few, and at most steps none.
            chosen: Most likely tokens of each pair, as float32 has them.
        """
        if self.model.dtype != torch.float32:
            return
        self.of_step.pop(name, None)
        near = self.lists.places(name, doubtful, least=0)
        if not len(near):
            return
        near = near[near < len(node)]
        nodes = node[near].tolist()
        known = {i: self.prefix(i) for i in set(nodes)}
        rows = zip(nodes, sets[near].tolist(), chosen[near].tolist(), strict=True)
        ties = [Tie(*known[i], of, tuple(tokens)) for i, of, tokens in rows]
        if not self.later:
            self._run(ties)
        seen = torch.tensor([tie.prefix in self.exact for tie in ties], dtype=torch.bool)
        settled = self._likely([tie for tie in ties if tie.prefix in self.exact], chosen.shape[1])
        chosen[near[seen.to(near.device)]] = settled
        self.of_step[name] = [tie for tie in ties if tie.prefix not in self.exact]

    def wrong(self) -> list[int]:
        """Settle all ties that were noted; return the prompts of which float32 chose otherwise."""
        ties, self.noted = self.noted, []
        self._run(ties)
        wanted = self._likely(ties, max((len(tie.chosen) for tie in ties), default=1)).tolist()
        pairs = zip(ties, wanted, strict=True)
        return sorted({t.prompt for t, row in pairs if tuple(row[: len(t.chosen)]) != t.chosen})

    def _run(self, ties: Sequence[Tie]) -> None:
        """Run the ties' prefixes that were not run before."""
        new = sorted({tie.prefix for tie in ties} - set(self.exact))
        if not new:
            return
        x, a = exact_last_positions(self.model, new, self.sizes.tokens)
        self.exact.update((prefix, (x[i], a[i])) for i, prefix in enumerate(new))
        self.work.forward_tokens += sum(map(len, new))

    def _likely(self, ties: Sequence[Tie], n: int) -> Int[Tensor, "tie n"]:
        """Find the n most likely tokens of each tie in float64."""
        model, screen = self.model, self.screen
        found = [torch.empty((0, n), dtype=torch.long, device=model.device)]
        # With their copies, rows take no more than a part of the unembedding in float64 does.
        size = max(1, model.spec.d_model * VOCAB_COLUMNS // (COPIES * model.spec.d_vocab))
        for part in slices(len(ties), size):
            of = torch.tensor([tie.set for tie in ties[part]], device=model.device)
            read = [self.exact[tie.prefix] for tie in ties[part]]
            x, a = (torch.stack(values) for values in zip(*read, strict=True))
            neurons = screen.selected[screen.slots[of]]  # (tie, k)
            c = (screen.values[of].double() - a.gather(1, neurons)) * screen.present[of]
            moved = torch.bmm(c[:, None], model.W_out[neurons].double())[:, 0]
            found.append(most_likely(exact_logits(model, x + moved), n))
        return torch.cat(found)


def choose(
    screen: Screen,
    nodes: Nodes,
    node: Int[Tensor, "pair"],
    sets: Int[Tensor, "pair"],
    sizes: AtOnce,
    referee: Referee,
) -> Int[Tensor, "pair"]:
    """Next token of every (node, set) pair: certified, shortlisted, by its whole row, or refereed.

    The bounded lists are "unsure", the pairs that were not certified; "whole", those of them that the
    shortlist did not settle; and "near", the near ties among the latter.
    """
    lists, sure = referee.lists, certified(screen, nodes)
    unsure = lists.places("unsure", ~sure.reshape(-1)[node * sure.shape[1] + sets], least=UNSURE)
    # One place more than there are pairs, for the fillers of lists.
    chosen = nodes.likely[:, 0][_with_spare(node)]
    at, of = _with_spare(node)[unsure], _with_spare(sets)[unsure]
    proved, taus = list[Tensor](), list[Tensor]()
    for part in slices(len(unsure), sizes.pairs):
        pairs = read_pairs(screen, nodes, at[part], of[part])
        settled, token = shortlisted(pairs)
        chosen[unsure[part]] = token
        proved.append(settled)
        taus.append(pairs.tau)
    if not proved:
        return chosen[:-1]
    whole = lists.places("whole", ~torch.cat(proved) & (unsure < len(node)), least=WHOLE)
    pair = torch.cat([unsure, torch.full_like(unsure[:1], len(node))])[whole]
    at, of, tau = (_with_spare(values)[whole] for values in (at, of, torch.cat(taus)))
    close = list[Tensor]()
    for part in slices(len(whole), sizes.rows(3)):
        rows = pair_rows(read_pairs(screen, nodes, at[part], of[part]))
        best, lead = best_and_lead(rows)
        chosen[pair[part]] = best
        close.append(lead <= tau[part])
    if close:
        best = chosen[pair][:, None]
        referee.settle("near", at, of, torch.cat(close) & (pair < len(node)), best)
        chosen[pair] = best[:, 0]
    return chosen[:-1]


def _with_spare(values: Tensor) -> Tensor:
    """Append a spare value, for the fillers of lists."""
    return torch.cat([values, values[:1]])


def read_first_tokens(
    screen: Screen,
    nodes: Nodes,
    targets: Int[Tensor, "node target"],
    sizes: AtOnce,
    referee: Referee,
    *,
    own_top: bool,
) -> tuple[dict[str, Tensor], Int[Tensor, "node set"]]:
    """Read first-token entropies, log-probabilities and top tokens of every set, and its first token.

    Every set's whole row is computed here, in low-rank form, a few sets of a few nodes at a time. Its
    argmax is the first token, so no certificate is needed. The names of the bounded lists contain
    "first", those of near ties also "near".

    Returns:
        The readings, named as in `Batch`, and the first tokens.
    """
    n, n_sets, device = len(targets), len(screen.slots), targets.device
    everyone = torch.arange(n, device=device)
    plain = nodes.sz / nodes.scale[:, None] + screen.beta
    # Set 0 is the plain run.
    zeros = torch.zeros_like(everyone)
    plain_tops = _tops("near, first", plain, everyone, zeros, nodes.tolerance, referee)
    asked = torch.cat([targets, plain_tops], dim=1)
    n_top = plain_tops.shape[1]
    entropy = torch.empty((n, n_sets), device=device)
    log_probs = torch.empty((n, n_sets, asked.shape[1]), device=device)
    tops = plain_tops[:, None].repeat(1, n_sets if own_top else 1, 1)
    top_log_probs = torch.empty(tops.shape, device=device)
    chosen = torch.empty((n, n_sets), dtype=torch.long, device=device)
    close = torch.empty((n, n_sets), dtype=torch.bool, device=device)
    width, height = sizes.block(n)
    room = Room(width * height, screen.P.shape[1], device)
    for exact_shift in (False, True):
        for of, at, rows, spare, tau in _all_rows(screen, nodes, width, height, room):
            if referee.lists.exact:
                best, lead = guessed_best_and_lead(rows, nodes.likely[at, 0])
            else:
                best, lead = best_and_lead(rows)
            chosen[at, of], close[at, of] = best.T, (lead <= tau).T
            if exact_shift:
                rows -= rows.amax(-1, keepdim=True)
            log_z, bits = log_z_and_entropy(rows, spare)  # (set, node)
            entropy[at, of] = bits.T
            wanted = asked[at].expand(len(rows), -1, -1)
            log_probs[at, of] = (rows.gather(-1, wanted) - log_z[..., None]).transpose(0, 1)
            if own_top:
                node = everyone[at].repeat(len(rows))
                sets = torch.arange(of.start, of.stop, device=device).repeat_interleave(rows.shape[1])
                name = f"near, first, {of.start}, {at.start}, {exact_shift}"
                top = _tops(name, rows.flatten(0, 1), node, sets, tau.reshape(-1), referee)
                top = top.view(*rows.shape[:2], -1)
                tops[at, of] = top.transpose(0, 1)
                found = rows.gather(-1, top) - log_z[..., None]
                top_log_probs[at, of] = found.transpose(0, 1)
        if exact_shift or not len(
            referee.lists.places("first, beyond exp2", ~entropy.isfinite().all()[None], least=0)
        ):
            break
    for values in (entropy, log_probs, top_log_probs):
        values *= NATS
    if not own_top:
        top_log_probs[:, 0] = log_probs[:, 0, -n_top:]
    node, sets = everyone.repeat_interleave(n_sets), torch.arange(n_sets, device=device).repeat(n)
    referee.settle("near, first, argmax", node, sets, close.view(-1), chosen.view(-1, 1))
    read = {
        "entropy": entropy,
        "asked": asked,
        "log_probs": log_probs,
        "top_tokens": tops,
        "top_log_probs": top_log_probs,
    }
    return read, chosen


def _all_rows(
    screen: Screen, nodes: Nodes, width: int, height: int, room: Room
) -> Iterator[tuple[slice, slice, Tensor, Tensor, Float[Tensor, "set node"]]]:
    """Yield sets, nodes, their logit rows less a constant each, as much room, and tau; all in bits.

    The constant is the ablated logit of the plain argmax: with it, no row's largest exp2 can vanish,
    and only an ablation that lifts another token 128 bits above it overflows.
    """
    top = nodes.likely[:, 0]
    sz_top, P_top, beta_top = nodes.sz.gather(1, top[:, None])[:, 0], screen.P[:, top], screen.beta[top]
    for group in screen.groups:
        for of in slices(group.sets.stop, height, group.sets.start):
            dense = read_dense(screen, nodes, group, of)
            tau = tolerances(dense) / NATS  # (set, node)
            lead = sz_top + (dense.c * P_top[screen.slots[of]]).sum(1) + beta_top * dense.scale
            weights, directions = low_rank_terms(dense, lead)
            for at in slices(len(top), width):
                rows, spare = room.block(*dense.scale[:, at].shape)
                low_rank_rows(nodes.sz[at], weights[:, at], dense.scale[:, at], directions, rows)
                yield of, at, rows, spare, tau[:, at]


def _tops(
    name: str,
    rows: Float[Tensor, "pair d_vocab"],
    node: Int[Tensor, "pair"],
    sets: Int[Tensor, "pair"],
    tau: Float[Tensor, "pair"],
    referee: Referee,
) -> Int[Tensor, "pair top"]:
    """Find the most likely tokens of each row, near ties settled by the referee."""
    n = min(N_TOP + 1, rows.shape[1])
    tops = most_likely(rows, n)
    values = rows.gather(1, tops)
    close = (values[:, :-1] - values[:, 1:] <= tau[:, None]).any(1)
    referee.settle(name, node, sets, close, tops[:, :N_TOP])
    return tops[:, :N_TOP]
