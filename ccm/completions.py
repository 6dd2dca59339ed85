"""What any way of decoding gives back, and how prompts are put in batches without a single pad."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ccm.models import LoadedModel

N_TOP = 3  # enough to name the best token that is neither of two others

Tokens = Sequence[int]
# Called with the last layer's `hook_post` of live positions, shape (rows, d_mlp), before ablation.
Observer = Callable[[Float[Tensor, "rows d_mlp"]], None]


@dataclass(frozen=True)
class FirstToken:
    """What is read off the next-token distribution at each prompt's last position, nats, float64."""

    entropy: Float[np.ndarray, "prompt"]
    asked: Int[np.ndarray, "prompt target"]  # the tokens asked for
    log_probs: Float[np.ndarray, "prompt target"]  # of those
    top_tokens: Int[np.ndarray, "prompt top"]  # most likely first, ties to the lowest id
    top_log_probs: Float[np.ndarray, "prompt top"]


@dataclass(frozen=True)
class Completions:
    """Greedy continuations of all prompts under one ablation."""

    tokens: tuple[tuple[int, ...], ...]  # generated, without the EOS that ended them
    texts: tuple[str, ...]
    first: FirstToken


def read_first_token(
    logits: Float[Tensor, "prompt d_vocab"], targets: Int[Tensor, "prompt target"]
) -> FirstToken:
    """Reduce first-position logits to entropy, asked-for log-probabilities and the top tokens."""
    # float64: the sum over 128k tokens keeps 1e-4 nats however it is ordered.
    log_probs = logits.double().log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    # argmax again and again, because topk does not say which of two equal logits comes first.
    rest, chosen = log_probs.clone(), []
    for _ in range(min(N_TOP, log_probs.shape[1])):
        chosen.append(rest.argmax(-1, keepdim=True))
        rest.scatter_(1, chosen[-1], -torch.inf)
    top = torch.cat(chosen, dim=1)
    return FirstToken(
        entropy=entropy.cpu().numpy(),
        asked=targets.cpu().numpy(),
        log_probs=log_probs.gather(1, targets).cpu().numpy(),
        top_tokens=top.cpu().numpy(),
        top_log_probs=log_probs.gather(1, top).cpu().numpy(),
    )


def greedy(logits: Float[Tensor, "prompt d_vocab"]) -> Int[Tensor, "prompt"]:
    """Most likely token of each row, ties to the lowest id, as argmax gives it."""
    return logits.argmax(-1)


def equal_length_batches(prompts: Sequence[Tokens], batch_size: int) -> Iterator[list[int]]:
    """Yield prompt indices in batches whose prompts have one length, so that nothing is padded.

    Pads are the commonest silent error of this field; without them no mask can be wrong.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, tokens in enumerate(prompts):
        by_length[len(tokens)].append(i)
    for length in sorted(by_length):
        indices = by_length[length]
        for start in range(0, len(indices), batch_size):
            yield indices[start : start + batch_size]


def completions(
    model: LoadedModel,
    tokens: Sequence[Sequence[int]],
    parts: Sequence[tuple[list[int], FirstToken]],
) -> Completions:
    """Put per-batch results back into prompt order."""
    order = np.argsort(np.concatenate([np.asarray(indices, dtype=np.int64) for indices, _ in parts]))

    def joined(name: str) -> np.ndarray:
        return np.asarray(np.concatenate([getattr(first, name) for _, first in parts])[order])

    return Completions(
        tokens=tuple(tuple(t) for t in tokens),
        texts=tuple(model.decode(t) for t in tokens),
        first=FirstToken(
            entropy=joined("entropy"),
            asked=joined("asked"),
            log_probs=joined("log_probs"),
            top_tokens=joined("top_tokens"),
            top_log_probs=joined("top_log_probs"),
        ),
    )


def no_targets(n: int) -> Int[Tensor, "prompt target"]:
    """Targets for a caller who asks for no log-probabilities."""
    return torch.zeros((n, 0), dtype=torch.long)
