"""Greedy decoding of some prompts under all neuron sets at once: a prefix tree per prompt.

At every step the next token of *all* sets follows from the final residual and the last activations of
the node they are on (`ccm.screening`). Sets that choose the same token go on together; the transformer
runs once per distinct node.

Prompts are prefilled without a pad, and their keys and values lie in one cache in which shorter prompts
begin later: one forward a step, under an explicit mask and explicit positions, serves all lengths.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ccm.checkpoint import LoadedModel
from ccm.choosing import AtOnce, Referee, choose, read_first_tokens, slices
from ccm.completions import Shard, Tokens, Work
from ccm.forward import RowCache, run_body
from ccm.prefill import prefill
from ccm.screening import Screen, read_nodes


@dataclass
class Engine:
    """Everything that is the same for all prompts of a run."""

    model: LoadedModel
    screen: Screen
    full: Bool[Tensor, "set"]  # whether a set is decoded to the end, not only to its answer
    splits: Bool[Tensor, "d_vocab"]  # tokens that end an answer
    at_once: AtOnce
    max_new_tokens: int
    own_top: bool
    observing: bool
    # Observed rows of the part at work, shown once it is done: a part that fails is run again.
    seen: list[Float[Tensor, "row d_mlp"]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.eos = torch.zeros_like(self.splits)
        self.eos[sorted(self.model.eos)] = True
        self.free()

    def free(self) -> None:
        """Let go of the memory that parts share, and of what a failed part left."""
        self.begun, self.cache = (RowCache(self.model.spec.n_layers) for _ in range(2))
        self.seen.clear()

    def prompt_bytes(self, length: int) -> int:
        """Rough bytes a prompt takes: cache and rows of some nodes, what is observed, and its pairs."""
        spec, cfg, n_sets = self.model.spec, self.model.bridge.cfg, len(self.full)
        nodes = min(n_sets, 4)  # distinct continuations of a prompt alive at once
        size = torch.empty((), dtype=self.model.dtype).element_size()
        kv_heads: int = cfg.n_key_value_heads or cfg.n_heads
        cache: int = spec.n_layers * 2 * kv_heads * cfg.d_head * (length + self.max_new_tokens) * size
        observed = 4 * (length + self.max_new_tokens) * spec.d_mlp if self.observing else 0
        pairs = n_sets * (16 * self.screen.slots.shape[1] + 64 + 4 * self.max_new_tokens)
        return nodes * (cache + 16 * spec.d_vocab) + observed + pairs

    @torch.inference_mode()
    def run(
        self,
        prompts: Sequence[Tokens],
        shared: Sequence[int],
        indices: Sequence[int],
        targets: Int[Tensor, "prompt target"],
        work: Work,
    ) -> Shard:
        """Decode one part under every set.

        Args:
            prompts: Token ids, sorted by how many come after the shared prefix.
            shared: How many tokens of each prompt are its shared prefix.
            indices: What the shard calls the prompts.
            targets: Tokens whose first-step log-probabilities are wanted.
            work: Counts are added here.
        """
        device = self.model.device
        targets = targets.to(device)

        def forward(tokens: Tensor, cache: Any, positions: Tensor | None) -> tuple[Tensor, Tensor]:
            work.forward_tokens += tokens.numel()
            x, a = run_body(self.model, tokens, cache, positions, last_only=not self.observing)
            if self.observing:
                self.seen.append(a.reshape(-1, a.shape[-1]).float())
            return x, a

        lengths = torch.tensor([len(p) for p in prompts], device=device)
        cache = self.cache
        # Most prompts keep one continuation under all sets.
        end = max(map(len, prompts))
        cache.reserve(len(prompts) * 3 // 2, end + self.max_new_tokens)
        x, a = prefill(prompts, shared, self.begun, cache, forward, device, self.at_once.tokens)
        tree = _Tree(len(prompts), len(self.full), len(self.eos), device)
        first: dict[str, Any] = {}
        for step in range(self.max_new_tokens):
            nodes = read_nodes(self.screen, x, a)
            work.nodes += len(x)
            work.full_rows += len(x)

            def prefix(i: int) -> list[int]:
                return [*prompts[int(tree.origin[i])], *tree.paths[i].tolist()]

            referee = Referee(self.model, self.screen, prefix, work)
            if step == 0:
                first = read_first_tokens(
                    self.screen, nodes, targets, self.at_once, referee, work, own_top=self.own_top
                )
            chosen = choose(
                self.screen, nodes, tree.node, tree.sets, self.at_once, referee, work
            )  # (pair,)
            ended = self.eos[chosen] | (self.splits[chosen] & ~self.full[tree.sets])
            if step == self.max_new_tokens - 1:
                ended = torch.ones_like(ended)
            parent = tree.grow(chosen, ended)
            if not len(parent):
                break
            past = end + step  # slots of the cache in use
            tree.arrange(cache.branch(parent, past))
            positions = lengths[tree.origin] + step
            read = [
                forward(tree.paths[rows, -1:], cache.window(rows, 0, past), positions[rows])
                for rows in slices(len(parent), self.at_once.tokens)
            ]
            x, a = torch.cat([x[:, -1] for x, _ in read]), torch.cat([a[:, -1] for _, a in read])
        if device.type == "cuda":
            work.peak_bytes = torch.cuda.max_memory_allocated(device)
        leaf, leaves = tree.leaves(self.eos)
        return Shard(
            prompts=np.asarray(indices, dtype=np.int64),
            leaves=leaves,
            texts=tuple(self.model.decode(tokens) for tokens in leaves),
            leaf=leaf,
            **first,
        )


class _Tree:
    """Distinct continuations of every prompt; pairs (node, set) say which set is on which."""

    def __init__(self, n_prompts: int, n_sets: int, d_vocab: int, device: torch.device) -> None:
        self.n_sets, self.d_vocab = n_sets, d_vocab
        prompts = torch.arange(n_prompts, device=device)
        self.node = prompts.repeat_interleave(n_sets)  # (pair,)
        self.sets = torch.arange(n_sets, device=device).repeat(n_prompts)  # (pair,)
        self.pair = torch.arange(len(self.node), device=device)  # (pair,): prompt * n_sets + set
        self.paths = prompts.new_zeros((n_prompts, 0))  # (node, step): tokens since the prompt
        self.origin = prompts  # (node,): its prompt
        self.branches: list[Tensor] = []  # of each step, (branch, step + 1)
        self.leaf = torch.full_like(self.pair, -1)  # place among all branches

    def grow(self, chosen: Int[Tensor, "pair"], ended: Bool[Tensor, "pair"]) -> Int[Tensor, "branch"]:
        """Add a token to every pair; return the parents of those branches that go on, ascending.

        Everything that happens next happens once per distinct (node, token). A branch may end for some
        sets (a splitter) and go on for others.
        """
        key, branch = _distinct(self.node * self.d_vocab + chosen, len(self.paths) * self.d_vocab)
        parent, token = key // self.d_vocab, key % self.d_vocab
        grown = torch.cat([self.paths[parent], token[:, None]], dim=1)
        place = sum(map(len, self.branches)) + branch
        self.branches.append(grown)
        self.leaf[self.pair] = torch.where(ended, place, self.leaf[self.pair])
        on = torch.nonzero(~ended)[:, 0]
        self.pair, self.sets = self.pair[on], self.sets[on]
        kept, self.node = _distinct(branch[on], len(key))
        self.paths, self.origin = grown[kept], self.origin[parent[kept]]
        return parent[kept]

    def arrange(self, held: Int[Tensor, "node"]) -> None:
        """Number nodes by the cache rows that hold them: row i holds node `held[i]`."""
        row = torch.empty_like(held)
        row[held] = torch.arange(len(held), device=held.device)
        self.node, self.paths, self.origin = row[self.node], self.paths[held], self.origin[held]

    def leaves(
        self, eos: Bool[Tensor, "d_vocab"]
    ) -> tuple[Int[np.ndarray, "prompt set"], tuple[tuple[int, ...], ...]]:
        """Which continuation each set chose, and all of them, without the EOS that ended them."""
        used, leaf = _distinct(self.leaf, sum(map(len, self.branches)))
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


def _distinct(
    keys: Int[Tensor, "pair"], n_keys: int
) -> tuple[Int[Tensor, "distinct"], Int[Tensor, "pair"]]:
    """Distinct keys below `n_keys`, ascending, and each pair's place among them."""
    if n_keys > 32 * len(keys):
        return torch.unique(keys, return_inverse=True)  # type: ignore[no-any-return]
    # Counting beats sorting where the table is no larger than the pairs are many.
    there = torch.zeros(n_keys, dtype=torch.bool, device=keys.device)
    there[keys] = True
    place = there.cumsum(0) - 1
    return torch.nonzero(there)[:, 0], place[keys]
