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
        """Rough bytes a prompt takes: cache and rows of some nodes, prefill, and its pairs."""
        spec, cfg, n_sets = self.model.spec, self.model.bridge.cfg, len(self.full)
        nodes = 1 + min(n_sets - 1, 7)  # distinct continuations of a prompt alive at once
        size = torch.empty((), dtype=self.model.dtype).element_size()
        kv_heads: int = cfg.n_key_value_heads or cfg.n_heads
        cache: int = spec.n_layers * 2 * kv_heads * cfg.d_head * (length + self.max_new_tokens) * size
        prefill = length * (3 * spec.d_mlp + 12 * spec.d_model) * size
        pairs = n_sets * (16 * self.screen.slots.shape[1] + 64 + 4 * self.max_new_tokens)
        return 2 * nodes * cache + prefill + nodes * 16 * spec.d_vocab + pairs

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
            prompts: Token ids, sorted by length and then by `shared`.
            shared: How many tokens of each prompt are its shared prefix.
            indices: What the shard calls the prompts.
            targets: Tokens whose first-step log-probabilities are wanted.
            work: Counts are added here.
        """
        with torch.inference_mode():
            return self._run(prompts, shared, indices, targets.to(self.model.device), work)

    def _run(
        self,
        prompts: Sequence[Tokens],
        shared: Sequence[int],
        indices: Sequence[int],
        targets: Int[Tensor, "prompt target"],
        work: Work,
    ) -> Shard:
        device, n_sets, d_vocab = self.model.device, len(self.full), len(self.eos)

        def forward(
            tokens: Tensor, cache: Any, positions: Tensor | None = None
        ) -> tuple[Tensor, Tensor]:
            work.forward_tokens += tokens.numel()
            x, a = run_body(self.model, tokens, cache, positions, last_only=not self.observing)
            if self.observing:
                self.seen.append(a.reshape(-1, a.shape[-1]).float())
            return x, a

        lengths = torch.tensor([len(p) for p in prompts], device=device)
        cache = self.cache
        # Most prompts keep one continuation under all sets.
        cache.reserve(len(prompts) * 3 // 2, len(prompts[-1]) + self.max_new_tokens)
        x, a = prefill(prompts, shared, self.begun, cache, forward, device, self.at_once.tokens)
        # Pairs still decoding: which set, on which node. Nodes: their tokens since the prompt.
        node = torch.arange(len(prompts), device=device).repeat_interleave(n_sets)  # (pair,)
        sets = torch.arange(n_sets, device=device).repeat(len(prompts))  # (pair,)
        pair = torch.arange(len(node), device=device)  # (pair,): prompt * n_sets + set
        paths = torch.zeros((len(prompts), 0), dtype=torch.long, device=device)  # (node, step)
        origin = torch.arange(len(prompts), device=device)  # (node,): its prompt
        leaf = torch.full((len(node),), -1, dtype=torch.long, device=device)
        leaves: list[tuple[int, ...]] = []
        first: dict[str, np.ndarray] = {}
        for step in range(self.max_new_tokens):
            nodes = read_nodes(self.screen, x, a)
            work.nodes += len(x)
            work.full_rows += len(x)

            def prefix(i: int, paths: Tensor = paths, origin: Tensor = origin) -> list[int]:
                return [*prompts[int(origin[i])], *paths[i].tolist()]

            referee = Referee(self.model, self.screen, prefix, work)
            if step == 0:
                first = read_first_tokens(
                    self.screen, nodes, targets, self.at_once, referee, work, own_top=self.own_top
                )
            chosen = choose(self.screen, nodes, node, sets, self.at_once, referee, work)  # (pair,)
            ended = self.eos[chosen]
            ended |= self.splits[chosen] & ~self.full[sets]
            last = step == self.max_new_tokens - 1
            ended = torch.ones_like(ended) if last else ended
            # Everything that happens next happens once per distinct (node, token).
            key, branch = _distinct(node * d_vocab + chosen, len(x) * d_vocab)
            parent, token = key // d_vocab, key % d_vocab
            grown = torch.cat([paths[parent], token[:, None]], dim=1)  # (branch, step + 1)
            # A branch may end for some sets (a splitter) and go on for others.
            ends = torch.zeros(len(key), dtype=torch.bool, device=device)
            ends[branch[ended]] = True
            number = len(leaves) + ends.cumsum(0) - 1
            leaf[pair[ended]] = number[branch[ended]]
            is_eos = self.eos[token[ends]].tolist()
            leaves += [
                tuple(path[:-1] if stop else path)
                for path, stop in zip(grown[ends].tolist(), is_eos, strict=True)
            ]
            on = ~ended
            pair, sets, branch = pair[on], sets[on], branch[on]
            if not len(pair):
                break
            kept, node = _distinct(branch, len(key))
            past = len(prompts[-1]) + step  # slots of the cache in use
            held = cache.branch(parent[kept], past)  # (node,): which kept branch a row is now
            node = torch.empty_like(held).scatter_(0, held, torch.arange(len(held), device=device))[
                node
            ]
            kept = kept[held]
            paths, origin = grown[kept], origin[parent[kept]]
            positions = lengths[origin] + step
            read = [
                forward(paths[rows, -1:], cache.window(rows, 0, past), positions[rows])
                for rows in slices(len(kept), self.at_once.nodes)
            ]
            x, a = torch.cat([x[:, -1] for x, _ in read]), torch.cat([a[:, -1] for _, a in read])
        if device.type == "cuda":
            work.peak_bytes = torch.cuda.max_memory_allocated(device)
        return Shard(
            prompts=np.asarray(indices, dtype=np.int64),
            leaves=tuple(leaves),
            leaf=leaf.view(len(prompts), n_sets).cpu().numpy().astype(np.int32),
            **first,
        )


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
