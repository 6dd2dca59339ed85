"""The hot path: one greedy decode serves many prompts x many neuron sets.

Ablating last-layer neurons changes no key and no value at any layer (Method 12). So each prompt is
prefilled once; at every step the next token of *all* sets follows from the final residual and the last
activations (`ccm.screening`); sets that choose the same token share a node of a prefix tree; and the
transformer runs once per distinct node, on cache rows gathered from its parent.

Prompts of one length are prefilled together, so no pad ever enters the transformer. Their caches are
then joined, shorter ones filled up on the left, under an explicit mask and explicit positions: one
forward a step for all lengths.

Results do not depend on batches. Rounding differs between batch shapes and could settle a near tie
either way; so every choice whose lead is below the slack of `ccm.screening` is made again by a referee,
which runs that one prefix alone. A choice above the slack is the same under any rounding, so tokens are
the same alone, in any batch, in any order and at any memory budget. (float32; in lower precision
rounding moves x itself by more than a referee could repair, and near ties stand as they fall.)
"""

import gc
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ccm.ablation import PLAIN, Ablation
from ccm.checkpoint import LoadedModel
from ccm.completions import (
    Completions,
    Observer,
    Shard,
    Tokens,
    Work,
    equal_length_batches,
    merge,
    no_targets,
    read_first_token,
)
from ccm.errors import CcmError
from ccm.forward import join_caches, run_body
from ccm.models import MAX_NEW_TOKENS
from ccm.prompts import SPLITTER
from ccm.screening import (
    Nodes,
    Screen,
    ablated_scale,
    build_screen,
    certified,
    changes,
    dense_changes,
    low_rank_rows,
    pair_slack,
    read_nodes,
    shortlisted,
)

BYTE_FALLBACK = re.compile(r"<0x[0-9A-F]{2}>")
MAX_BATCH = 700  # prompts a part: coarser would only make progress and resuming coarser


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
    shards = decode_sets(
        model,
        prompts,
        sets,
        targets=targets,
        max_new_tokens=max_new_tokens,
        memory_budget=memory_budget,
        observe=observe,
        own_top=True,
    )
    return merge(list(shards), model).completions(len(sets))


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
    done: Collection[int] = (),
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
        done: Prompts whose shards are there already. Parts are cut as without them, so that what is
            left is computed to the last bit as it would have been.

    Yields:
        Shards; together they cover every prompt once, shorter prompts first.

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
        at_once=at_once(model),
        max_new_tokens=max_new_tokens,
        own_top=own_top,
        observing=observe is not None,
    )
    if not prompts:
        raise ValueError("no prompts to decode")
    targets = no_targets(len(prompts)) if targets is None else targets
    budget = memory_budget or default_budget(model.device)
    by_length = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    pending = [
        [i for i in part if i not in done]
        for part in _parts(by_length, [len(p) for p in prompts], engine.prompt_bytes, budget)
    ][::-1]
    while pending:
        indices = pending.pop()
        if not indices:
            continue
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
            engine.seen.clear()
            _free(model.device)
            half = len(indices) // 2
            pending += [indices[half:], indices[:half]]
            if work is not None:
                work.halved += 1
            continue
        for rows in engine.seen:
            assert observe is not None
            observe(rows)
        engine.seen.clear()
        if work is not None:
            work.add(counted)
        yield shard


def default_budget(device: torch.device) -> int:
    """Bytes to plan with: half of what is free, and on a CPU no more than 4 GiB."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] // 2)
    import psutil

    return min(int(psutil.virtual_memory().available // 2), 4 << 30)


def _parts(
    order: Sequence[int], lengths: Sequence[int], prompt_bytes: Callable[[int], int], budget: int
) -> Iterator[list[int]]:
    """Cut prompts, in order, into parts that the budget holds, one prompt at least."""
    part: list[int] = []
    used = 0
    for i in order:
        size = prompt_bytes(lengths[i])
        if part and (used + size > budget or len(part) == MAX_BATCH):
            yield part
            part, used = [], 0
        part.append(i)
        used += size
    if part:
        yield part


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _splitting_tokens(model: LoadedModel) -> Bool[Tensor, "d_vocab"]:
    """Mark tokens whose text holds a splitter match wherever they stand: the answer ends there.

    Special tokens have no text, and a byte-fallback token has one only together with its neighbours. A
    match that forms across tokens (`\\` and `n`) is not seen, which costs steps and changes no result.
    """
    if model.splitting_tokens is None:
        ids = range(model.spec.d_vocab)
        pieces = model.tokenizer.convert_ids_to_tokens(list(ids))
        texts = model.tokenizer.batch_decode(
            [[i] for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        model.splitting_tokens = torch.tensor(
            [
                bool(SPLITTER.search(text)) and not BYTE_FALLBACK.fullmatch(piece or "")
                for piece, text in zip(pieces, texts, strict=True)
            ],
            device=model.device,
        )
    return model.splitting_tokens


@dataclass(frozen=True)
class AtOnce:
    """How much is worked on at once: what a CPU's caches hold, or what keeps a GPU busy."""

    pairs: int  # (node, set) pairs
    row_bytes: int  # of logit rows
    d_vocab: int

    def rows(self, per_row: int) -> int:
        """How many logit rows to hold, with `per_row` vectors of the vocabulary for each."""
        return max(1, self.row_bytes // (4 * self.d_vocab * per_row))


def at_once(model: LoadedModel) -> AtOnce:
    """Sizes for a model's device; they change no result."""
    if model.device.type == "cuda":
        return AtOnce(pairs=1 << 20, row_bytes=1 << 30, d_vocab=model.spec.d_vocab)
    return AtOnce(pairs=1 << 13, row_bytes=2 << 20, d_vocab=model.spec.d_vocab)


@dataclass
class _Engine:
    """One plan, run over one batch of equal-length prompts at a time."""

    model: LoadedModel
    screen: Screen
    full: Bool[Tensor, "set"]
    splits: Bool[Tensor, "d_vocab"]
    at_once: AtOnce
    max_new_tokens: int
    own_top: bool
    observing: bool
    # Observed rows of the part at work, shown once it is done: a part that fails is run again.
    seen: list[Float[Tensor, "row d_mlp"]] = field(default_factory=list)

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
        device, n_sets = self.model.device, len(self.full)
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        x, a, cache = self._prefill(prompts, work)
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
            x, a = self._forward(paths[:, -1:], cache, work, lengths[origin] + step)
            x, a = x[:, -1], a[:, -1]
        if device.type == "cuda":
            work.peak_bytes = torch.cuda.max_memory_allocated(device)
        return Shard(
            prompts=np.asarray(indices, dtype=np.int64),
            leaves=tuple(leaves),
            leaf=leaf.view(len(prompts), n_sets).cpu().numpy().astype(np.int32),
            **first,
        )

    def _prefill(
        self, prompts: list[Tokens], work: Work
    ) -> tuple[Float[Tensor, "prompt d_model"], Float[Tensor, "prompt d_mlp"], Any]:
        """Run prompts through the transformer, length by length, and join their caches."""
        from transformers.cache_utils import DynamicCache

        xs, activations, caches = [], [], []
        # `decode_sets` sorts prompts by length, so batches come in prompt order.
        for batch in equal_length_batches(prompts, MAX_BATCH):
            tokens = torch.tensor([list(prompts[i]) for i in batch], device=self.model.device)
            caches.append(DynamicCache())
            x, a = self._forward(tokens, caches[-1], work)
            xs.append(x[:, -1])
            activations.append(a[:, -1])
        return torch.cat(xs), torch.cat(activations), join_caches(caches, room=self.max_new_tokens)

    def _forward(
        self,
        tokens: Int[Tensor, "node position"],
        cache: Any,
        work: Work,
        positions: Int[Tensor, "node"] | None = None,
    ) -> tuple[Float[Tensor, "node read d_model"], Float[Tensor, "node read d_mlp"]]:
        """Run the transformer; count, and show what is to be observed."""
        work.forward_tokens += tokens.numel()
        x, a = run_body(self.model, tokens, cache, positions, last_only=not self.observing)
        if self.observing:
            self.seen.append(a.reshape(-1, a.shape[-1]).float())
        return x, a

    def _choose(
        self,
        nodes: Nodes,
        node: Int[Tensor, "pair"],
        sets: Int[Tensor, "pair"],
        alone: Callable[[int], list[int]],
        work: Work,
    ) -> Int[Tensor, "pair"]:
        """Next token of every pair: certified, shortlisted, by its whole row, or by the referee."""
        chosen = nodes.likely[:, 0][node]
        sure = certified(self.screen, nodes).reshape(-1)[node * len(self.full) + sets]
        unsure, near = torch.nonzero(~sure)[:, 0], list[Tensor]()
        work.certified += len(node) - len(unsure)
        for part in torch.split(unsure, self.at_once.pairs):
            at, of = node[part], sets[part]
            c = changes(self.screen, nodes, at, of)
            scale = ablated_scale(self.screen, nodes, at, of, c)
            tau = pair_slack(self.screen, nodes, at, of, c, scale)
            sure, chosen[part] = shortlisted(self.screen, nodes, at, of, c, scale, tau)
            work.shortlisted += int(sure.sum())
            rest = torch.nonzero(~sure)[:, 0]
            work.low_rank += len(rest)
            for i in torch.split(rest, self.at_once.rows(2 + c.shape[1])):
                rows = low_rank_rows(
                    self.screen.beta,
                    nodes.sz[at[i]][:, None],
                    c[i][:, None],
                    scale[i][:, None],
                    self.screen.P[self.screen.slots[of[i]]],
                )[:, 0]
                best = rows.topk(2)
                chosen[part[i]] = best.indices[:, 0]
                close = best.values[:, 0] - best.values[:, 1] <= tau[i]
                near.append(part[i[close]])
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
            x, a = run_body(self.model, prefix, last_only=True)
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
        work.first_rows += n * n_sets
        width = max(1, min(n, self.at_once.rows(2) // 8))  # nodes at once, with some sets of each
        height = self.at_once.rows(2 * width)
        for group in self.screen.groups:
            for start in range(group.sets.start, group.sets.stop, height):
                of = slice(start, min(start + height, group.sets.stop))
                c, scale = dense_changes(self.screen, nodes, group, of)
                P = self.screen.P[self.screen.slots[of]]  # (set, k, d_vocab)
                for at in (slice(i, i + width) for i in range(0, n, width)):
                    rows = low_rank_rows(
                        self.screen.beta,
                        nodes.sz[at][None],
                        c[:, :, at].transpose(1, 2),
                        scale[:, at],
                        P,
                    ).log_softmax(-1)  # (set, node, d_vocab)
                    wanted = asked[at].expand(len(rows), -1, -1)
                    log_probs[of, at] = rows.gather(-1, wanted)
                    entropy[of, at] = -torch.linalg.vecdot(rows.exp(), rows)
                    if self.own_top:
                        best = _top(rows, n_top)
                        tops[of, at], top_log_probs[of, at] = best, rows.gather(-1, best)
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


def _top(rows: Float[Tensor, "set node d_vocab"], n: int) -> Int[Tensor, "set node top"]:
    """The n most likely tokens, ties to the lowest id."""
    rest, found = rows.clone(), []
    for _ in range(n):
        found.append(rest.argmax(-1, keepdim=True))
        rest.scatter_(-1, found[-1], -torch.inf)
    return torch.cat(found, dim=-1)
