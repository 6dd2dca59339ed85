"""The hot path: one greedy decode serves many prompts x many neuron sets.

Ablating last-layer neurons changes no key and no value at any layer (Method 12). So each prompt is
prefilled once; at every step the next token of *all* sets follows from the final residual and the last
activations (`ccm.screening`); sets that choose the same token share a node of a prefix tree; and the
transformer runs once per distinct node, on cache rows gathered from its parent.

Results do not depend on batches. Prompts share a batch only with prompts of their own length, so there
are no pads. Rounding still differs between batch shapes, and could settle a near tie either way: every
choice whose lead is below the slack of `ccm.screening` is made again by a referee, which runs that one
prefix alone. A choice above the slack is the same under any rounding, so tokens are the same alone, in
any batch, in any order and at any memory budget. (float32; in lower precision rounding moves x itself
by more than a referee could repair, and near ties stand as they fall.)
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ccm.ablation import PLAIN, Ablation
from ccm.completions import (
    Completions,
    FirstToken,
    Observer,
    Tokens,
    equal_length_batches,
    no_targets,
    read_first_token,
)
from ccm.errors import CcmError
from ccm.models import MAX_NEW_TOKENS, LoadedModel
from ccm.prompts import SPLITTER
from ccm.screening import (
    Nodes,
    Screen,
    ablated_scale,
    build_screen,
    certified,
    changes,
    low_rank_rows,
    read_nodes,
    shortlisted,
)

MAX_BATCH = 512  # prompts; larger batches gain nothing on any device measured
ROW_BYTES = 2 << 20  # logit rows held at once on a CPU: what its caches can still serve


@dataclass
class Work:
    """What a decode cost, counted exactly."""

    prompts: int = 0
    forward_tokens: int = 0  # positions run through the transformer
    nodes: int = 0  # distinct prefixes, prompts included
    certified: int = 0  # (node, set) pairs whose argmax provably stayed
    shortlisted: int = 0  # pairs settled among a few likely tokens
    low_rank: int = 0  # pairs that needed their whole row, by its low-rank form
    first_rows: int = 0  # rows for first-token entropies and log-probabilities, low-rank too
    full_rows: int = 0  # d_model x d_vocab products: one per node, one per refereed pair
    refereed: int = 0  # near ties settled alone
    halved: int = 0  # chunks that ran out of memory
    peak_bytes: int = 0  # CUDA only: the allocator's peak

    def add(self, other: "Work") -> None:
        """Add another decode's counts."""
        for f in fields(self):
            mine, its = getattr(self, f.name), getattr(other, f.name)
            setattr(self, f.name, max(mine, its) if f.name == "peak_bytes" else mine + its)

    def as_dict(self) -> dict[str, int]:
        """For manifests."""
        return asdict(self)


@dataclass(frozen=True)
class Shard:
    """Results of a few prompts under all sets; set 0 is the plain run."""

    prompts: Int[np.ndarray, "prompt"]  # which prompts
    leaves: tuple[tuple[int, ...], ...]  # distinct continuations of any of them
    leaf: Int[np.ndarray, "prompt set"]  # which one each set chose
    entropy: Float[np.ndarray, "prompt set"]  # nats; of the next token at the last prompt position
    asked: Int[np.ndarray, "prompt target"]  # tokens asked for, then the plain run's top ones
    log_probs: Float[np.ndarray, "prompt set target"]
    top_tokens: Int[np.ndarray, "prompt set top"]  # sets after the first only where asked for
    top_log_probs: Float[np.ndarray, "prompt set top"]


def decode(
    model: LoadedModel,
    prompts: Sequence[Tokens],
    ablation: Ablation = PLAIN,
    *,
    targets: Int[Tensor, "prompt target"] | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    memory_budget: int | None = None,
    observe: Observer | None = None,
) -> Completions:
    """Decode under one neuron set, like `ccm.hooked.decode`; arguments and result are its."""
    sets = [ablation] if ablation.neurons else []
    shards = list(
        decode_sets(
            model,
            prompts,
            sets,
            targets=targets,
            max_new_tokens=max_new_tokens,
            memory_budget=memory_budget,
            observe=observe,
            own_top=True,
        )
    )
    return completions_of(model, shards, len(sets), 0 if targets is None else targets.shape[1])


def completions_of(
    model: LoadedModel, shards: Sequence[Shard], set_index: int, n_targets: int
) -> Completions:
    """Collect one set's results from all shards, in prompt order."""
    order = np.argsort(np.concatenate([s.prompts for s in shards]))
    tokens = [s.leaves[i] for s in shards for i in s.leaf[:, set_index]]

    def joined(part: Callable[[Shard], np.ndarray]) -> np.ndarray:
        return np.concatenate([part(s) for s in shards])[order]

    return Completions(
        tokens=tuple(tokens[i] for i in order),
        texts=tuple(model.decode(tokens[i]) for i in order),
        first=FirstToken(
            entropy=joined(lambda s: s.entropy[:, set_index]).astype(np.float64),
            asked=joined(lambda s: s.asked[:, :n_targets]),
            log_probs=joined(lambda s: s.log_probs[:, set_index, :n_targets]).astype(np.float64),
            top_tokens=joined(lambda s: s.top_tokens[:, set_index]),
            top_log_probs=joined(lambda s: s.top_log_probs[:, set_index]).astype(np.float64),
        ),
    )


def decode_sets(
    model: LoadedModel,
    prompts: Sequence[Tokens],
    ablations: Sequence[Ablation] = (),
    *,
    targets: Int[Tensor, "prompt target"] | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    full: Sequence[bool] | None = None,
    own_top: bool = False,
    memory_budget: int | None = None,
    observe: Observer | None = None,
    work: Work | None = None,
) -> Iterator[Shard]:
    """Decode prompts under the plain run and every ablation, a shard at a time.

    Args:
        model: The model.
        prompts: Token ids, BOS included, ragged.
        ablations: Neuron sets with their replacement values.
        targets: Tokens whose first-step log-probabilities are wanted, per prompt.
        max_new_tokens: At least 1; a continuation ends early at EOS.
        full: For the plain run and each ablation, whether to decode all tokens. Where False, it
            ends with the first token that holds a splitter: the source needs no more (Method 8).
        own_top: Also read the most likely first tokens of every set, not only of the plain run.
        memory_budget: Bytes a shard may use; by default a share of what is free. Never changes a
            result.
        observe: Sees `hook_post` of the last layer at all positions of the plain run; needs
            `ablations` to be empty.
        work: Counts are added here.

    Yields:
        Shards, each of prompts of one length; together they cover every prompt once.

    Raises:
        CcmError: a single prompt does not fit the memory there is.
    """
    if observe is not None and ablations:
        raise ValueError("activations are observed in the plain run only")
    sets = [PLAIN, *ablations]
    engine = _Engine(
        model=model,
        screen=build_screen(model, sets),
        full=torch.tensor([True] * len(sets) if full is None else list(full), device=model.device),
        splits=_splitting_tokens(model),
        max_new_tokens=max_new_tokens,
        own_top=own_top,
        observe=observe,
    )
    targets = no_targets(len(prompts)) if targets is None else targets
    budget = memory_budget or default_budget(model.device)
    pending = [
        part
        for batch in equal_length_batches(prompts, MAX_BATCH)
        for part in _fit(batch, engine.prompt_bytes(len(prompts[batch[0]])), budget)
    ][::-1]
    while pending:
        indices = pending.pop()
        counted = Work(prompts=len(indices))
        try:
            shard = engine.run([prompts[i] for i in indices], indices, targets[indices], counted)
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            if len(indices) == 1:
                raise CcmError(
                    f"prompt {indices[0]} under {len(sets)} sets does not fit the memory of "
                    f"{model.device}. Lower --controls or run one ablation value at a time."
                ) from error
            _free(model.device)
            half = len(indices) // 2
            pending += [indices[half:], indices[:half]]
            if work is not None:
                work.halved += 1
            continue
        if work is not None:
            work.add(counted)
        yield shard


def default_budget(device: torch.device) -> int:
    """Bytes to plan with: half of what is free, and on a CPU no more than 4 GiB."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] // 2)
    import psutil

    return min(int(psutil.virtual_memory().available // 2), 4 << 30)


def _fit(batch: list[int], prompt_bytes: int, budget: int) -> list[list[int]]:
    """Cut a batch into parts that the budget holds."""
    n = max(1, min(len(batch), budget // prompt_bytes))
    return [batch[i : i + n] for i in range(0, len(batch), n)]


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _splitting_tokens(model: LoadedModel) -> Bool[Tensor, "d_vocab"]:
    """Mark tokens whose own text holds a splitter match: with one, the answer is complete.

    A match that only forms across two tokens (`\\` and `n`) is not seen, which costs steps, no result.
    """
    if model.splitting_tokens is None:
        ids = [[i] for i in range(model.spec.d_vocab)]
        texts = model.tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)
        marks = torch.tensor([bool(SPLITTER.search(text)) for text in texts], device=model.device)
        model.splitting_tokens = marks
    return model.splitting_tokens


@dataclass
class _Engine:
    """One plan, run over one batch of equal-length prompts at a time."""

    model: LoadedModel
    screen: Screen
    full: Bool[Tensor, "set"]
    splits: Bool[Tensor, "d_vocab"]
    max_new_tokens: int
    own_top: bool
    observe: Observer | None

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
        prompts: list[Tokens],
        indices: list[int],
        targets: Int[Tensor, "prompt target"],
        work: Work,
    ) -> Shard:
        """Decode one batch under every set."""
        with torch.inference_mode():
            return self._run(prompts, indices, targets, work)

    def _run(
        self,
        prompts: list[Tokens],
        indices: list[int],
        targets: Int[Tensor, "prompt target"],
        work: Work,
    ) -> Shard:
        from transformers.cache_utils import DynamicCache

        device, n_sets = self.model.device, len(self.full)
        tokens = torch.tensor([list(p) for p in prompts], device=device)  # (prompt, position)
        cache = DynamicCache()
        x, a = self._forward(tokens, cache, work)
        # Pairs still decoding: which set, on which node. Nodes: their tokens since the prompt.
        node = torch.arange(len(prompts), device=device).repeat_interleave(n_sets)  # (pair,)
        sets = torch.arange(n_sets, device=device).repeat(len(prompts))  # (pair,)
        pair = torch.arange(len(node), device=device)  # (pair,): prompt * n_sets + set
        paths = torch.zeros((len(prompts), 0), dtype=torch.long, device=device)  # (node, step)
        origin = torch.arange(len(prompts), device=device)  # (node,): its prompt
        leaf = torch.full((len(node),), -1, dtype=torch.long, device=device)
        leaves: list[tuple[int, ...]] = []
        first: dict[str, np.ndarray] = {}
        eos = torch.zeros(self.model.spec.d_vocab, dtype=torch.bool, device=device)
        eos[sorted(self.model.eos)] = True
        for step in range(self.max_new_tokens):
            nodes = read_nodes(self.screen, x, a)
            work.nodes += len(x)
            work.full_rows += len(x)
            if step == 0:
                first = self._first(nodes, targets.to(device), work)

            def alone(i: int, paths: Tensor = paths, origin: Tensor = origin) -> list[int]:
                return [*prompts[int(origin[i])], *paths[i].tolist()]

            chosen = self._choose(nodes, node, sets, alone, work)  # (pair,)
            ended = eos[chosen]
            ended |= self.splits[chosen] & ~self.full[sets]
            last = step == self.max_new_tokens - 1
            ended = torch.ones_like(ended) if last else ended
            # Everything that happens next happens once per distinct (node, token).
            key, branch = _distinct(node * len(eos) + chosen, len(x) * len(eos))
            parent, token = key // len(eos), key % len(eos)
            grown = torch.cat([paths[parent], token[:, None]], dim=1)  # (branch, step + 1)
            # A branch may end for some sets (a splitter) and go on for others.
            ends = torch.zeros(len(key), dtype=torch.bool, device=device)
            ends[branch[ended]] = True
            number = len(leaves) + ends.cumsum(0) - 1
            leaf[pair[ended]] = number[branch[ended]]
            is_eos = eos[token[ends]].tolist()
            leaves += [
                tuple(path[:-1] if stop else path)
                for path, stop in zip(grown[ends].tolist(), is_eos, strict=True)
            ]
            on = ~ended
            pair, sets, branch = pair[on], sets[on], branch[on]
            if not len(pair):
                break
            kept, node = _distinct(branch, len(key))
            parent, paths, origin = parent[kept], grown[kept], origin[parent[kept]]
            if len(kept) != len(x) or not bool((parent == torch.arange(len(x), device=device)).all()):
                cache.batch_select_indices(parent)
            x, a = self._forward(paths[:, -1:], cache, work)
        if device.type == "cuda":
            work.peak_bytes = torch.cuda.max_memory_allocated(device)
        return Shard(
            prompts=np.asarray(indices),
            leaves=tuple(leaves),
            leaf=leaf.view(len(prompts), n_sets).cpu().numpy().astype(np.int32),
            **first,
        )

    def _forward(
        self, tokens: Int[Tensor, "node position"], cache: Any, work: Work
    ) -> tuple[Float[Tensor, "node d_model"], Float[Tensor, "node d_mlp"]]:
        """Run the transformer; return final residual and last activations at the last position."""
        work.forward_tokens += tokens.numel()
        x, a = run_body(self.model, tokens, cache)
        if self.observe is not None:
            self.observe(a.reshape(-1, a.shape[-1]).float())
        return x[:, -1], a[:, -1]

    def _choose(
        self,
        nodes: Nodes,
        node: Int[Tensor, "pair"],
        sets: Int[Tensor, "pair"],
        alone: Callable[[int], list[int]],
        work: Work,
    ) -> Int[Tensor, "pair"]:
        """Next token of every pair: certified, shortlisted, by its whole row, or by the referee."""
        c = changes(self.screen, nodes, node, sets)
        sure = certified(self.screen, nodes, node, sets, c)
        chosen = nodes.likely[node, 0]
        rest = torch.nonzero(~sure)[:, 0]
        work.certified += len(node) - len(rest)
        c = c[rest]
        scale = ablated_scale(self.screen, nodes, node[rest], sets[rest], c)
        sure, chosen[rest] = shortlisted(self.screen, nodes, node[rest], sets[rest], c, scale)
        work.shortlisted += int(sure.sum())
        rest, c, scale = rest[~sure], c[~sure], scale[~sure]
        work.low_rank += len(rest)
        near: list[Tensor] = []
        every = torch.arange(len(rest), device=rest.device)
        for part in torch.split(every, self._rows_at_once(per_row=2 + c.shape[1])):
            at = node[rest[part]]
            rows = low_rank_rows(
                self.screen,
                nodes.sz[at][:, None],
                c[part][:, None],
                scale[part][:, None],
                self.screen.slots[sets[rest[part]]],
            )[:, 0]
            best = rows.topk(2)
            chosen[rest[part]] = best.indices[:, 0]
            near.append(rest[part[best.values[:, 0] - best.values[:, 1] <= nodes.slack[at]]])
        if near and self.model.dtype == torch.float32:
            self._referee(torch.cat(near), chosen, node, sets, alone, work)
        return chosen

    def _referee(
        self,
        near: Int[Tensor, "near"],
        chosen: Int[Tensor, "pair"],
        node: Int[Tensor, "pair"],
        sets: Int[Tensor, "pair"],
        alone: Callable[[int], list[int]],
        work: Work,
    ) -> None:
        """Settle near ties by running each prefix by itself, without cache or batch mates."""
        at = node[near]
        for i in sorted(set(at.tolist())):
            prefix = torch.tensor([alone(i)], device=self.model.device)
            x, a = run_body(self.model, prefix, None)
            work.forward_tokens += prefix.numel()
            mine = near[at == i]
            work.refereed += len(mine)
            work.full_rows += len(mine)
            neurons = self.screen.selected[self.screen.slots[sets[mine]]]  # (near, k)
            c = (self.screen.values[sets[mine]] - a[0, -1][neurons]) * self.screen.present[sets[mine]]
            for row, p in enumerate(mine.tolist()):
                moved = x[0, -1] + c[row] @ self.model.W_out[neurons[row]]
                logits = self.model.final_norm(moved[None]) @ self.model.W_U + self.model.b_U
                chosen[p] = logits[0].argmax()

    def _first(
        self, nodes: Nodes, targets: Int[Tensor, "prompt target"], work: Work
    ) -> dict[str, np.ndarray]:
        """First-token entropies, log-probabilities and top tokens of every set.

        Every set needs its whole row here: low-rank, once, a few sets at a time.
        """
        plain = read_first_token(nodes.sz / nodes.scale[:, None] + self.screen.beta, targets)
        asked = torch.cat([targets, torch.from_numpy(plain.top_tokens).to(targets.device)], dim=1)
        n, n_sets, device = len(asked), len(self.full), targets.device
        entropy = torch.empty((n_sets, n), device=device)
        log_probs = torch.empty((n_sets, n, asked.shape[1]), device=device)
        n_top = plain.top_tokens.shape[1]
        tops = torch.zeros((n_sets, n, n_top if self.own_top else 0), dtype=torch.long, device=device)
        top_log_probs = torch.empty(tops.shape, device=device)
        every = torch.arange(n_sets, device=device)
        work.first_rows += n * n_sets
        every = torch.arange(n_sets, device=device)
        for part in torch.split(every, max(1, self._rows_at_once() // n)):
            node = torch.arange(n, device=device).repeat(len(part))
            sets = part.repeat_interleave(n)
            c = changes(self.screen, nodes, node, sets)
            scale = ablated_scale(self.screen, nodes, node, sets, c)
            shape = (len(part), n)
            rows = low_rank_rows(
                self.screen,
                nodes.sz[None],
                c.view(*shape, -1),
                scale.view(shape),
                self.screen.slots[part],
            ).log_softmax(-1)  # (set, node, d_vocab)
            log_probs[part] = rows.gather(-1, asked.expand(*shape, -1))
            entropy[part] = -torch.linalg.vecdot(rows.exp(), rows)
            if self.own_top:
                tops[part] = _top(rows, n_top)
                top_log_probs[part] = rows.gather(-1, tops[part])
        if not self.own_top:
            tops = torch.from_numpy(plain.top_tokens).to(device)[None]
            top_log_probs = torch.from_numpy(plain.top_log_probs).to(device)[None]
        return {
            "entropy": entropy.T.cpu().numpy(),
            "asked": asked.cpu().numpy(),
            "log_probs": log_probs.transpose(0, 1).cpu().numpy(),
            "top_tokens": tops.transpose(0, 1).cpu().numpy(),
            "top_log_probs": top_log_probs.transpose(0, 1).cpu().numpy(),
        }

    def _rows_at_once(self, per_row: int = 2) -> int:
        """How many logit rows to hold at once, `per_row` vectors of the vocabulary for each."""
        held = ROW_BYTES if self.model.device.type == "cpu" else 32 * ROW_BYTES
        return max(1, held // (4 * self.model.spec.d_vocab * per_row))


def _distinct(
    keys: Int[Tensor, "pair"], n_keys: int
) -> tuple[Int[Tensor, "distinct"], Int[Tensor, "pair"]]:
    """Distinct keys, ascending, and each pair's place among them: `unique` by counting, not sorting."""
    there = torch.zeros(n_keys, dtype=torch.bool, device=keys.device)
    there[keys] = True
    place = there.cumsum(0) - 1
    return torch.nonzero(there)[:, 0], place[keys]


def _top(rows: Float[Tensor, "set node d_vocab"], n: int) -> Int[Tensor, "set node top"]:
    """The n most likely tokens, ties to the lowest id."""
    rest, found = rows.clone(), []
    for _ in range(n):
        found.append(rest.argmax(-1, keepdim=True))
        rest.scatter_(-1, found[-1], -torch.inf)
    return torch.cat(found, dim=-1)


def run_body(
    model: LoadedModel, tokens: Int[Tensor, "node position"], cache: Any
) -> tuple[Float[Tensor, "node position d_model"], Float[Tensor, "node position d_mlp"]]:
    """Run the transformer without its head and read the two tensors that matter off it.

    Args:
        model: The model.
        tokens: New tokens of every node; none is a pad.
        cache: A transformers cache that grows by them, or None.

    Returns:
        Final residual (the final norm's input) and `hook_post` (the down-projection's input).
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            seen[name] = inputs[0]

        return hook

    hooks = [
        model.norm.register_forward_pre_hook(keep("x")),
        model.mlp_out.register_forward_pre_hook(keep("a")),
    ]
    try:
        model.body(input_ids=tokens, past_key_values=cache, use_cache=cache is not None)
    finally:
        for hook in hooks:
            hook.remove()
    assert seen["a"].shape == (*tokens.shape, model.spec.d_mlp), seen["a"].shape
    return seen["x"], seen["a"]
