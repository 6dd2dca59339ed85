"""Greedy decoding of one batch under all neuron sets at once: a prefix tree per prompt.

At every step the next token of *all* sets follows from the final residual and the last activations of
the node they are on (`ccm.decoding.certificate`). Sets that choose the same token go on together; the
transformer runs once per distinct node.

Prompts are prefilled without padding, into one KV cache in which shorter prompts begin later: one
forward pass per step, with an explicit mask and explicit positions, serves all lengths.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ccm.decoding.bounded import BoundedLists, distinct
from ccm.decoding.certificate import Screen, read_nodes
from ccm.decoding.forward import RowCache, Rows, plan_rows, run_body
from ccm.decoding.next_token import AtOnce, Referee, choose, read_first_tokens, slices
from ccm.decoding.prefill import prefill
from ccm.decoding.results import AtLast, Batch, Decided, Work
from ccm.models.bridge import Tokens
from ccm.models.model import LoadedModel

NODES = 4  # distinct continuations expected of a prompt; with more, its batch may have to be cut


@dataclass(frozen=True)
class Asked:
    """The prompts of one batch, and what is wanted of each."""

    prompts: Sequence[Tokens]  # token ids, sorted by how many come after the shared prefix
    shared: Sequence[int]  # how many tokens of each prompt are its shared prefix
    indices: Sequence[int]  # numbers of the prompts in their run, kept in the batch's result
    targets: Int[Tensor, "prompt target"]  # tokens whose first-step log-probabilities are wanted

    def only(self, places: Sequence[int]) -> "Asked":
        """Return the prompts at these places in the batch."""
        return Asked(
            prompts=[self.prompts[i] for i in places],
            shared=[self.shared[i] for i in places],
            indices=[self.indices[i] for i in places],
            targets=self.targets[places],
        )


@dataclass
class Engine:
    """Everything that is the same for all prompts of a run."""

    model: LoadedModel
    screen: Screen
    full: Bool[Tensor, "set"]  # whether a set is decoded to the end, not only until it is decided
    cuts: bool  # whether any set may stop once it is decided
    decided: Decided
    provisional: Bool[Tensor, "d_vocab"]  # tokens after which a text may still change
    at_once: AtOnce
    max_new_tokens: int
    budget: int  # bytes that a batch may take
    own_top: bool
    keep_residual: bool
    at_last: AtLast | None
    observing: bool
    skipped: int  # positions at the start of a prompt that are not observed
    lists: BoundedLists
    # Observed rows of the current batch, passed on once it is done: a batch that fails is rerun.
    seen: list[Float[Tensor, "row d_mlp"]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.eos = torch.zeros_like(self.provisional)
        self.eos[sorted(self.model.eos)] = True
        self.free()

    def free(self) -> None:
        """Start over with empty caches, and drop the rows that a failed batch left."""
        self.begun, self.cache = (RowCache(self.model.spec.n_layers) for _ in range(2))
        self.seen.clear()

    def node_bytes(self, length: int) -> int:
        """Count the bytes of one node: its cache row, and its rows over the vocabulary."""
        spec, cfg = self.model.spec, self.model.bridge.cfg
        size = torch.empty((), dtype=self.model.dtype).element_size()
        kv_heads: int = cfg.n_key_value_heads or cfg.n_heads
        cache: int = spec.n_layers * 2 * kv_heads * cfg.d_head * (length + self.max_new_tokens) * size
        return cache + 16 * spec.d_vocab

    def prompt_bytes(self, length: int) -> int:
        """Estimate the bytes of a prompt: its nodes, observed activations and (node, set) pairs."""
        spec, n_sets = self.model.spec, len(self.full)
        nodes = min(n_sets, NODES)
        observed = 4 * (length + self.max_new_tokens) * spec.d_mlp if self.observing else 0
        # About thirty 8-byte numbers per pair, in lists over all pairs, and the pair's tokens.
        pairs = n_sets * (16 * self.screen.slots.shape[1] + 240 + 8 * self.max_new_tokens)
        return nodes * self.node_bytes(length) + observed + pairs

    def _check_budget(self, prompts: Sequence[Tokens], nodes: int) -> None:
        """Check, before memory is allocated, that this many nodes fit the budget.

        Raises:
            MemoryError: they do not, and the batch can be cut.
        """
        needed = nodes * self.node_bytes(max(map(len, prompts)))
        if needed > self.budget and len(prompts) > 1:
            raise MemoryError(f"{nodes} continuations at once take {needed / 2**20:.0f} MiB")

    def _forward(
        self,
        work: Work,
        tokens: Tensor,
        cache: Any,
        positions: Tensor | None,
        times: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        work.forward_tokens += tokens.numel()
        x, a = run_body(self.model, tokens, cache, positions, last_only=not self.observing)
        if self.observing:
            rows = a if times is None else a.repeat_interleave(times, dim=0)
            if self.skipped and cache.get_seq_length() == tokens.shape[1]:  # all prompts begin here
                rows = rows[:, self.skipped :]
            elif self.skipped and positions is not None:  # some prompts may begin here
                at = positions[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
                rows = rows[at >= self.skipped]
            self.seen.append(rows.reshape(-1, a.shape[-1]).float())
        return x, a

    @torch.inference_mode()
    def read_last(
        self, prompts: Sequence[Tokens], shared: Sequence[int], work: Work
    ) -> tuple[Float[Tensor, "prompt d_model"], Float[Tensor, "prompt d_mlp"]]:
        """Prefill a batch; return final residuals and last-layer activations at last positions.

        Args:
            prompts: Token ids, as for `Asked`.
            shared: How many tokens of each prompt are its shared prefix.
            work: Counts are added here.
        """
        self.cache.reserve(len(prompts), max(map(len, prompts)))
        forward = partial(self._forward, work)
        device, at_once = self.model.device, self.at_once.tokens
        return prefill(prompts, shared, self.begun, self.cache, forward, device, at_once)

    @torch.inference_mode()
    def run(self, asked: Asked, work: Work) -> Batch:
        """Decode one batch under every set, and add its counts to `work`."""
        # Observed activations cannot be taken back, so then no choice is left for later.
        referee = Referee(
            self.model, self.screen, self.lists, work, self.at_once, later=not self.observing
        )
        batch = self._decode(asked, work, referee, self.at_last)
        wrong = referee.wrong()
        if not wrong:
            return batch
        work.repeated += len(wrong)
        referee.later = False
        return batch.replaced(wrong, self._decode(asked.only(wrong), work, referee, None))

    def _decode(self, asked: Asked, work: Work, referee: Referee, at_last: AtLast | None) -> Batch:
        prompts, indices, device = asked.prompts, asked.indices, self.model.device
        targets = asked.targets.to(device)
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        cache, end = self.cache, max(map(len, prompts))
        # Most prompts keep one continuation under all sets.
        cache.reserve(len(prompts) * 3 // 2, end + self.max_new_tokens)
        x, a = self.read_last(prompts, asked.shared, work)
        residual = x.float() if self.keep_residual else x[:, :0].float()
        tree = _Tree(len(prompts), len(self.full), len(self.eos), device)
        first: dict[str, Tensor] = {}
        noted: Mapping[str, np.ndarray] = {}
        for step in range(self.max_new_tokens):
            nodes = read_nodes(self.screen, x, a)
            if step == 0 and at_last is not None:
                noted = at_last(indices, self.screen, nodes)
            referee.start(partial(tree.prefix, prompts))
            self.lists.start()
            while True:
                if step > 0:
                    chosen = choose(self.screen, nodes, tree.node, tree.sets, self.at_once, referee)
                elif not first or self.lists.was_short("first"):
                    first, of_sets = read_first_tokens(
                        self.screen, nodes, targets, self.at_once, referee, own_top=self.own_top
                    )
                    chosen = of_sets.view(-1)
                branches = tree.branch(chosen, self.lists)
                ended = self.eos[chosen]
                if step == self.max_new_tokens - 1:
                    ended = torch.ones_like(ended)
                elif self.cuts:
                    ended |= self._cut(tree, branches, indices, ended)
                growth = tree.plan(branches, ended, self.lists)
                if self.lists.holds():
                    break
            referee.finish()
            self._count(work, len(x), len(tree.node), step == 0)
            past = end + step  # slots of the cache in use
            self._check_budget(prompts, self.lists.count("kept"))
            if not tree.grow(growth, self.lists):
                break
            moved = slice(self.lists.count("moved"))
            cache.move(growth.rows.moved[moved], growth.rows.source[moved], past, len(tree.paths))
            positions = lengths[tree.origin] + step
            read = [
                self._forward(work, tree.paths[rows, -1:], cache.window(rows, 0, past), positions[rows])
                for rows in slices(len(tree.paths), self.at_once.tokens)
            ]
            x, a = torch.cat([x[:, -1] for x, _ in read]), torch.cat([a[:, -1] for _, a in read])
        if device.type == "cuda":
            work.peak_bytes = torch.cuda.max_memory_allocated(device)
        leaf, leaves = tree.leaves(self.eos)
        return Batch(
            prompts=np.asarray(indices, dtype=np.int64),
            leaves=leaves,
            texts=tuple(self.model.decode(tokens) for tokens in leaves),
            leaf=leaf,
            residual=residual.cpu().numpy(),
            at_last=noted,
            **{name: values.cpu().numpy() for name, values in first.items()},
        )

    def _cut(
        self,
        tree: "_Tree",
        branches: "_Branches",
        indices: Sequence[int],
        ended: Bool[Tensor, "pair"],
    ) -> Bool[Tensor, "pair"]:
        """Mark pairs that stop here: their set needs no full text, and the text so far decides."""
        may_stop = ~self.full[tree.sets] & ~ended
        branch = branches.branch
        asked = torch.zeros_like(branches.origin).index_add_(0, branch, may_stop.long()) > 0
        asked &= ~self.provisional[branches.grown[:, -1]]
        # One transfer each way, because each makes the host wait for the GPU.
        read = torch.cat([asked[:, None], branches.origin[:, None], branches.grown], dim=1).tolist()
        places = [place for place, (is_asked, *_) in enumerate(read) if is_asked]
        texts = self.model.decode_all([read[place][2:] for place in places])
        over = torch.zeros(len(read), dtype=torch.bool)
        for place, text in zip(places, texts, strict=True):
            over[place] = self.decided(indices[read[place][1]], text)
        return may_stop & over.to(branch.device)[branch]

    def _count(self, work: Work, nodes: int, pairs: int, first: bool) -> None:
        """Add up what a step cost, once its lists are settled."""
        lists = self.lists
        work.nodes += nodes
        work.first_rows += nodes * len(self.full) if first else 0
        work.certified += 0 if first else pairs - lists.count("unsure")
        work.shortlisted += lists.count("unsure") - lists.count("whole")
        work.low_rank += lists.count("whole")
        work.refereed += lists.total("near")
        work.full_rows += nodes + lists.total("near")


@dataclass(frozen=True)
class _Branches:
    """The distinct (node, token) of a step, in lists of `BoundedLists`, which may hold fillers."""

    branch: Int[Tensor, "pair"]  # index of each pair's branch
    parent: Int[Tensor, "branch"]  # node that each grows from
    grown: Int[Tensor, "branch step"]  # tokens since the prompt
    origin: Int[Tensor, "branch"]  # prompt


@dataclass(frozen=True)
class _Growth:
    """What a step adds to a tree, in lists of `BoundedLists`, which may hold fillers."""

    branches: _Branches
    ended: Bool[Tensor, "pair"]
    on: Int[Tensor, "on"]  # pairs that go on
    kept: Int[Tensor, "kept"]  # branches that go on
    node: Int[Tensor, "on"]  # index in `kept` of each pair's branch
    rows: Rows


class _Tree:
    """Distinct continuations of every prompt, and (node, set) pairs: which set is on which node."""

    def __init__(self, n_prompts: int, n_sets: int, d_vocab: int, device: torch.device) -> None:
        self.n_sets, self.d_vocab = n_sets, d_vocab
        prompts = torch.arange(n_prompts, device=device)
        self.node = prompts.repeat_interleave(n_sets)  # (pair,)
        self.sets = torch.arange(n_sets, device=device).repeat(n_prompts)  # (pair,)
        self.pair = torch.arange(len(self.node), device=device)  # (pair,): prompt * n_sets + set
        self.paths = prompts.new_zeros((n_prompts, 0))  # (node, step): tokens since the prompt
        self.origin = prompts  # (node,): its prompt
        self.branches: list[Tensor] = []  # of each step, (branch, step + 1)
        self.leaf = torch.full_like(self.pair, -1)  # where each ended, among the branches of all steps

    def prefix(self, prompts: Sequence[Tokens], node: int) -> tuple[int, tuple[int, ...]]:
        """Return a node's prompt, and all its tokens, starting with the prompt's."""
        origin = int(self.origin[node])
        return origin, (*prompts[origin], *self.paths[node].tolist())

    def branch(self, chosen: Int[Tensor, "pair"], lists: BoundedLists) -> _Branches:
        """Append a token to every pair; the bounded list is "branches".

        All further work is done once per distinct (node, token).
        """
        keys = self.node * self.d_vocab + chosen
        key, branch = lists.distinct("branches", keys, len(self.paths) * self.d_vocab)
        parent = key // self.d_vocab
        return _Branches(
            branch=branch,
            parent=parent,
            grown=torch.cat([self.paths[parent], (key % self.d_vocab)[:, None]], dim=1),
            origin=self.origin[parent],
        )

    def plan(self, branches: _Branches, ended: Bool[Tensor, "pair"], lists: BoundedLists) -> _Growth:
        """Find the pairs and branches that go on; the bounded lists are "on", "kept" and "moved".

        A branch may end for some sets, which are decided, and go on for others.
        """
        on, n = lists.places("on", ~ended), len(branches.parent)
        # A filler in the list of pairs is on no branch.
        of_pairs = torch.cat([branches.branch, torch.full_like(branches.branch[:1], n)])[on]
        kept, node = lists.distinct("kept", of_pairs, n)
        return _Growth(
            branches=branches,
            ended=ended,
            on=on,
            kept=kept,
            node=node,
            rows=plan_rows(branches.parent[kept], lists, lists.so_far("kept")),
        )

    def grow(self, growth: _Growth, lists: BoundedLists) -> int:
        """Carry out a plan; nodes are numbered by the cache rows that hold them.

        Returns:
            The new number of nodes.
        """
        n_on, n = lists.count("on"), lists.count("kept")
        place = sum(map(len, self.branches)) + growth.branches.branch
        self.leaf[self.pair] = torch.where(growth.ended, place, self.leaf[self.pair])
        self.branches.append(growth.branches.grown[: lists.count("branches")])
        on, held = growth.on[:n_on], growth.rows.branch[:n]
        self.pair, self.sets = self.pair[on], self.sets[on]
        row = torch.empty_like(held)
        row[held] = torch.arange(n, device=held.device)
        self.node = row[growth.node[:n_on]]
        branch = growth.kept[:n][held]
        self.paths, self.origin = growth.branches.grown[branch], growth.branches.origin[branch]
        return n

    def leaves(
        self, eos: Bool[Tensor, "d_vocab"]
    ) -> tuple[Int[np.ndarray, "prompt set"], tuple[tuple[int, ...], ...]]:
        """Return which continuation each set chose, and all continuations, without a final EOS."""
        used, leaf = distinct(self.leaf, sum(map(len, self.branches)))
        places, found, start = used.cpu(), list[tuple[int, ...]](), 0
        for grown in self.branches:
            mine = places[(places >= start) & (places < start + len(grown))] - start
            paths = grown[mine.to(grown.device)]
            stopped = eos[paths[:, -1]].tolist()
            found += [
                tuple(path[:-1] if stop else path)
                for path, stop in zip(paths.tolist(), stopped, strict=True)
            ]
            start += len(grown)
        return leaf.view(-1, self.n_sets).cpu().numpy().astype(np.int32), tuple(found)
