"""Results of decoding, the same for every engine, and how batches are joined."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ccm.decoding.certificate import Nodes, Screen
from ccm.models.model import LoadedModel

N_TOP = 3  # enough to name the best token that is neither of two others
TIE = 1e-9  # of logits: float64 errs by less

# Called with the last layer's `hook_post` of live positions, shape (rows, d_mlp), before ablation.
Observer = Callable[[Float[Tensor, "rows d_mlp"]], None]

# Reads more in the plain run at last prompt positions. Called with the prompts' indices, the screen of
# all sets, and the positions as nodes; the arrays that it returns are kept with the batch.
AtLast = Callable[[Sequence[int], Screen, Nodes], Mapping[str, np.ndarray]]

# Called with a prompt's index and its continuation's text so far: whether that text settles all that
# the caller wants to know, whatever follows.
Decided = Callable[[int, str], bool]


@dataclass(frozen=True)
class FirstToken:
    """Readings of the next-token distribution at each prompt's last position, in nats, float64."""

    entropy: Float[np.ndarray, "prompt"]
    asked: Int[np.ndarray, "prompt target"]  # the tokens asked for
    log_probs: Float[np.ndarray, "prompt target"]  # of those
    top_tokens: Int[np.ndarray, "prompt top"]  # most likely first, ties to the lowest id
    top_log_probs: Float[np.ndarray, "prompt top"]
    residual: Float[np.ndarray, "prompt kept"]  # final residual, float32; no column unless asked for


@dataclass(frozen=True)
class Completions:
    """Greedy continuations of all prompts under one ablation."""

    tokens: tuple[tuple[int, ...], ...]  # generated, without the EOS that ended them
    texts: tuple[str, ...]
    first: FirstToken


def read_first_token(
    logits: Float[Tensor, "prompt d_vocab"],
    targets: Int[Tensor, "prompt target"],
    residual: Float[Tensor, "prompt d_model"] | None = None,
) -> FirstToken:
    """Reduce logits at last prompt positions to entropy, targets' log-probabilities and top tokens."""
    # float64: the sum over 128k tokens is good to 1e-4 nats in any order.
    log_probs = logits.double().log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    top = most_likely(log_probs, min(N_TOP, log_probs.shape[1]))
    return FirstToken(
        entropy=entropy.cpu().numpy(),
        asked=targets.cpu().numpy(),
        log_probs=log_probs.gather(1, targets).cpu().numpy(),
        top_tokens=top.cpu().numpy(),
        top_log_probs=log_probs.gather(1, top).cpu().numpy(),
        residual=no_residuals(len(logits)) if residual is None else residual.float().cpu().numpy(),
    )


def most_likely(logits: Float[Tensor, "row d_vocab"], n: int = 1) -> Int[Tensor, "row n"]:
    """Find the n most likely tokens of each row; logits within `TIE` tie, and the lowest id wins."""
    # One at a time, because topk does not say which of two equal logits comes first.
    rest, found = logits.clone(), list[Tensor]()
    for _ in range(n):
        tied = rest >= rest.amax(-1, keepdim=True) - TIE
        found.append(tied.int().argmax(-1, keepdim=True))  # the first of them
        rest.scatter_(-1, found[-1], -torch.inf)
    return torch.cat(found, dim=-1)


def completions(
    model: LoadedModel, tokens: Sequence[Sequence[int]], parts: Sequence[tuple[list[int], FirstToken]]
) -> Completions:
    """Put per-batch results back into prompt order."""
    order = np.argsort(np.concatenate([np.asarray(indices, dtype=np.int64) for indices, _ in parts]))

    def joined(name: str) -> np.ndarray:
        return np.asarray(np.concatenate([getattr(first, name) for _, first in parts])[order])

    return Completions(
        tokens=tuple(tuple(t) for t in tokens),
        texts=tuple(model.decode(t) for t in tokens),
        first=FirstToken(**{f.name: joined(f.name) for f in fields(FirstToken)}),
    )


def no_residuals(n: int) -> Float[np.ndarray, "prompt kept"]:
    """Return residuals without columns, for a caller that keeps none."""
    return np.zeros((n, 0), dtype=np.float32)


def no_targets(n: int) -> Int[Tensor, "prompt target"]:
    """Return targets without columns, for a caller that wants no log-probabilities."""
    return torch.zeros((n, 0), dtype=torch.long)


@dataclass
class Work:
    """What a decode cost, counted exactly."""

    prompts: int = 0
    forward_tokens: int = 0  # positions run through the transformer
    nodes: int = 0  # distinct prefixes, prompts included
    certified: int = 0  # (node, set) pairs after the first token whose argmax provably stayed
    shortlisted: int = 0  # such pairs settled among a few likely tokens
    low_rank: int = 0  # such pairs that needed their whole row, by its low-rank form
    first_rows: int = 0  # rows for first tokens, their entropies and log-probabilities; low-rank, too
    full_rows: int = 0  # d_model x d_vocab products: one per node, one per refereed pair
    refereed: int = 0  # near ties settled in float64
    repeated: int = 0  # prompts decoded again because float64 chose otherwise
    halved: int = 0  # batches that ran out of memory
    peak_bytes: int = 0  # CUDA only: the allocator's peak

    def add(self, other: "Work") -> None:
        """Add another decode's counts."""
        for f in fields(self):
            mine, its = getattr(self, f.name), getattr(other, f.name)
            setattr(self, f.name, max(mine, its) if f.name == "peak_bytes" else mine + its)

    def as_dict(self) -> dict[str, int]:
        """Return the counts by name, for manifests."""
        return asdict(self)


@dataclass(frozen=True)
class Decoded:
    """Results of all prompts under all sets; set 0 is the plain run."""

    leaves: tuple[tuple[int, ...], ...]  # distinct continuations, without the EOS that ended them
    texts: tuple[str, ...]  # of the leaves
    leaf: Int[np.ndarray, "prompt set"]  # index of the leaf that each set chose
    entropy: Float[np.ndarray, "prompt set"]  # nats; of the next token at the last prompt position
    asked: Int[np.ndarray, "prompt target"]  # tokens asked for, then the plain run's top ones
    log_probs: Float[np.ndarray, "prompt set target"]
    top_tokens: Int[np.ndarray, "prompt topped top"]  # of the plain run, or of every set
    top_log_probs: Float[np.ndarray, "prompt topped top"]
    residual: Float[np.ndarray, "prompt kept"]  # of the plain run, as `FirstToken` has it

    @cached_property
    def _leaves(self) -> np.ndarray:
        return np.fromiter(self.leaves, dtype=object)

    @cached_property
    def _texts(self) -> np.ndarray:
        return np.fromiter(self.texts, dtype=object)

    def completions(self, index: int) -> Completions:
        """Return one set's continuations, without top tokens and residuals that were not read."""
        leaves = self.leaf[:, index]
        topped = slice(index, index + 1) if index < self.top_tokens.shape[1] else slice(0, 0)
        return Completions(
            tokens=tuple(self._leaves[leaves]),
            texts=tuple(self._texts[leaves]),
            first=FirstToken(
                entropy=self.entropy[:, index].astype(np.float64),
                asked=self.asked,
                log_probs=self.log_probs[:, index].astype(np.float64),
                top_tokens=self.top_tokens[:, topped].reshape(len(leaves), -1),
                top_log_probs=self.top_log_probs[:, topped].reshape(len(leaves), -1).astype(np.float64),
                residual=no_residuals(len(leaves)) if index else self.residual,
            ),
        )


# Arrays of `Decoded` with a row per prompt that can be taken from another batch as they are.
READINGS = ("entropy", "asked", "log_probs", "top_tokens", "top_log_probs", "residual")


@dataclass(frozen=True)
class Batch(Decoded):
    """Results of some prompts under all sets."""

    prompts: Int[np.ndarray, "prompt"]  # their indices
    at_last: Mapping[str, np.ndarray] = field(default_factory=dict)  # what `AtLast` returned

    def replaced(self, rows: Sequence[int], other: "Batch") -> "Batch":
        """Return this batch with some prompts' results taken from another, but for `at_last`."""

        readings: dict[str, Any] = {}
        for name in READINGS:
            readings[name] = getattr(self, name).copy()
            readings[name][rows] = getattr(other, name)
        leaf, leaves, texts = self.leaf.copy(), self.leaves + other.leaves, self.texts + other.texts
        leaf[rows] = other.leaf + len(self.leaves)
        used, places = np.unique(leaf, return_inverse=True)
        return replace(
            self,
            leaves=tuple(leaves[i] for i in used),
            texts=tuple(texts[i] for i in used),
            leaf=places.reshape(leaf.shape),
            **readings,
        )


def batch_of(
    indices: Sequence[int],
    plain: Completions,
    runs: Sequence[Completions],
    at_last: Mapping[str, np.ndarray],
    *,
    own_top: bool,
) -> Batch:
    """Combine the plain run and the ablated runs of some prompts into a batch.

    Args:
        indices: The prompts' indices.
        plain: Their continuations without ablation.
        runs: Ablated runs, whose targets are the plain run's and then its top tokens.
        at_last: What `AtLast` returned.
        own_top: Whether to keep the most likely tokens of every run, not only of the plain one.
    """
    numbers: dict[tuple[int, tuple[int, ...]], int] = {}
    texts: list[str] = []
    leaf = np.zeros((len(indices), 1 + len(runs)), dtype=np.int64)
    for s, run in enumerate([plain, *runs]):
        for p, tokens in enumerate(run.tokens):
            leaf[p, s] = numbers.setdefault((p, tokens), len(numbers))
            if leaf[p, s] == len(texts):
                texts.append(run.texts[p])
    topped = [plain, *runs] if own_top else [plain]
    return Batch(
        prompts=np.asarray(indices, dtype=np.int64),
        leaves=tuple(tokens for _, tokens in numbers),
        texts=tuple(texts),
        leaf=leaf,
        entropy=np.stack([run.first.entropy for run in [plain, *runs]], axis=1),
        asked=np.concatenate([plain.first.asked, plain.first.top_tokens], axis=1),
        log_probs=np.stack(
            [
                np.concatenate([plain.first.log_probs, plain.first.top_log_probs], axis=1),
                *(run.first.log_probs for run in runs),
            ],
            axis=1,
        ),
        top_tokens=np.stack([run.first.top_tokens for run in topped], axis=1),
        top_log_probs=np.stack([run.first.top_log_probs for run in topped], axis=1),
        residual=plain.first.residual,
        at_last=at_last,
    )


def merge(batches: Sequence[Batch]) -> Decoded:
    """Join batches in prompt order."""
    order = np.argsort(np.concatenate([s.prompts for s in batches]))
    starts = np.cumsum([0, *(len(s.leaves) for s in batches[:-1])])

    def joined(name: str) -> np.ndarray:
        return np.asarray(np.concatenate([getattr(s, name) for s in batches])[order])

    leaves = tuple(leaf for s in batches for leaf in s.leaves)
    numbers = [s.leaf + start for s, start in zip(batches, starts, strict=True)]
    return Decoded(
        leaves=leaves,
        texts=tuple(text for s in batches for text in s.texts),
        leaf=np.concatenate(numbers)[order],
        **{name: joined(name) for name in READINGS},
    )
