"""The hooked engine, the reference: TransformerLens hooks, one neuron set at a time; slow but simple.

The shared engine is tested and benchmarked against this one. In float32, near ties are run again in
float64, as the definition of a choice requires (`ccm.decoding.exact`).
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from ccm.decoding.certificate import build_screen, read_nodes
from ccm.decoding.exact import float64
from ccm.decoding.results import (
    N_TOP,
    AtLast,
    Batch,
    Completions,
    Decided,
    FirstToken,
    Observer,
    Work,
    batch_of,
    completions,
    most_likely,
    no_targets,
    read_first_token,
)
from ccm.method.ablation import PLAIN, Ablation
from ccm.models.bridge import FINAL_RESIDUAL, Tokens, equal_length_batches, new_cache, next_logits
from ccm.models.model import LoadedModel
from ccm.models.specs import MAX_NEW_TOKENS

BATCH_SIZE = 256
# A lead that float32 rounding may have made, relative to the largest logit: hundreds of roundings.
NEAR = 1e-4
TAKES = ("shard",)
_Result = TypeVar("_Result")


def decode(
    model: LoadedModel,
    prompts: Sequence[Tokens],
    ablation: Ablation = PLAIN,
    *,
    targets: Int[Tensor, "prompt target"] | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    keep_residual: bool = False,
    memory_budget: int | None = None,
    batch_size: int = BATCH_SIZE,
    observe: Observer | None = None,
    text_only: bool = False,
) -> Completions:
    """Decode greedily with a neuron set held at its replacement values at every position and step.

    Args:
        model: The model.
        prompts: Token ids, BOS included, ragged; each at least one token.
        ablation: The neuron set; the empty one is the plain run.
        targets: Tokens whose first-step log-probabilities are wanted, per prompt.
        max_new_tokens: At least 1; a prompt stops early at EOS.
        keep_residual: Also return final residuals at last prompt positions.
        memory_budget: Ignored; batches do not adapt to the memory.
        batch_size: Prompts of equal length that run together; never changes a result.
        observe: Called with `hook_post` of the last layer, before ablation, at every prompt position
            and every fed-back token of prompts that have not ended.
        text_only: Hide BOS from `observe`.

    Returns:
        Tokens, texts and first-token readings in prompt order.
    """
    if not prompts:
        raise ValueError("no prompts to decode")
    targets = no_targets(len(prompts)) if targets is None else targets
    generated: list[list[int]] = [[] for _ in prompts]
    parts: list[tuple[list[int], FirstToken]] = []
    with torch.inference_mode():
        for indices in equal_length_batches(prompts, batch_size):
            tokens = torch.tensor([list(prompts[i]) for i in indices], device=model.device)
            first = _decode_batch(
                model,
                tokens,
                indices,
                ablation,
                targets[indices],
                max_new_tokens,
                observe,
                generated,
                text_only=text_only and model.bos is not None,
                keep_residual=keep_residual,
            )
            parts.append((indices, first))
    return completions(model, generated, parts)


def decode_sets(
    model: LoadedModel,
    prompts: Sequence[Tokens],
    ablations: Sequence[Ablation] = (),
    *,
    targets: Int[Tensor, "prompt target"] | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    full: Sequence[bool] | None = None,
    decided: Decided | None = None,
    own_top: bool = False,
    keep_residual: bool = False,
    at_last: AtLast | None = None,
    memory_budget: int | None = None,
    work: Work | None = None,
    done: Collection[int] = (),
    shard: tuple[int, int] = (1, 1),
) -> Iterator[Batch]:
    """Decode prompts under the plain run and every ablation, one pass each.

    Arguments as for `ccm.decoding.shared.decode_sets`, but `full`, `decided` and `memory_budget` are
    ignored: every continuation is decoded to its end, and batches do not adapt to the memory.
    """
    given = no_targets(len(prompts)) if targets is None else targets
    batches = list(equal_length_batches(prompts, BATCH_SIZE))
    # No token is chosen with it, so no tolerance is needed.
    screen = build_screen(model.last_layer, [PLAIN, *ablations], u=0.0) if at_last else None
    for indices in batches[shard[0] - 1 :: shard[1]]:
        if set(indices) <= set(done):
            continue
        chosen = [prompts[i] for i in indices]
        plain = decode(
            model,
            chosen,
            targets=given[indices],
            max_new_tokens=max_new_tokens,
            keep_residual=keep_residual,
        )
        # The answer tokens of the plain run are among the targets and its top tokens.
        asked = torch.from_numpy(np.concatenate([plain.first.asked, plain.first.top_tokens], axis=1))
        sets = tqdm(ablations, desc="sets", unit="set", leave=False, disable=not ablations)
        runs = [
            decode(model, chosen, ablation, targets=asked, max_new_tokens=max_new_tokens)
            for ablation in sets
        ]
        noted: Mapping[str, np.ndarray] = {}
        if screen is not None and at_last is not None:
            ((x, a),) = read_last_positions(model, chosen, lambda _, x, a: (x, a))
            noted = at_last(indices, screen, read_nodes(screen, x, a))
        if work is not None:
            work.prompts += len(indices)
        yield batch_of(indices, plain, runs, noted, own_top=own_top)


def check(model: LoadedModel) -> None:
    """Do nothing: the hooks were checked when the model was loaded (`ccm.models.trial`)."""


@torch.inference_mode()
def read_last_positions(
    model: LoadedModel,
    prompts: Sequence[Tokens],
    read: Callable[
        [list[int], Float[Tensor, "prompt d_model"], Float[Tensor, "prompt d_mlp"]], _Result
    ],
    *,
    memory_budget: int | None = None,
) -> Iterator[_Result]:
    """Run prompts up to their last positions, as `ccm.decoding.shared.read_last_positions` does.

    The budget is ignored: batches do not adapt to the memory.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(x: Tensor, hook: Any) -> None:
            seen[name] = x[:, -1].clone()

        return hook

    hooks = [(FINAL_RESIDUAL, keep("x")), (model.hook_post, keep("a"))]
    for indices in equal_length_batches(prompts, BATCH_SIZE):
        tokens = torch.tensor([list(prompts[i]) for i in indices], device=model.device)
        with model.bridge.hooks(fwd_hooks=hooks):
            next_logits(model, tokens, new_cache(model))
        yield read(indices, seen["x"], seen["a"])


def _decode_batch(
    model: LoadedModel,
    tokens: Int[Tensor, "prompt position"],
    indices: list[int],
    ablation: Ablation,
    targets: Int[Tensor, "prompt target"],
    max_new_tokens: int,
    observe: Observer | None,
    generated: list[list[int]],
    *,
    text_only: bool = False,
    keep_residual: bool = False,
) -> FirstToken:
    """Decode prompts of one length; append to `generated`, return the first-token readings."""
    cache = new_cache(model)
    live = torch.ones(len(indices), dtype=torch.bool, device=model.device)
    first: FirstToken | None = None
    residuals, new = list[Tensor](), tokens

    def keep(x: Tensor, hook: Any) -> None:
        residuals.append(x[:, -1].clone())

    for step in range(max_new_tokens):
        with ExitStack() as hooks:
            if keep_residual and step == 0:
                hooks.enter_context(model.bridge.hooks(fwd_hooks=[(FINAL_RESIDUAL, keep)]))
            logits = _forward(
                model, new, cache, ablation, observe, live, unseen=int(text_only and step == 0)
            )
        # The list of likely first tokens is a choice, too.
        n = 1 if step else min(N_TOP + 1, logits.shape[1] - 1)
        logits = _settled(model, logits, n, tokens, ablation)
        if step == 0:
            first = read_first_token(logits, targets.to(model.device), *residuals)
        next_tokens = most_likely(logits)[:, 0]
        for row, token in enumerate(next_tokens.tolist()):
            if live[row]:
                if token in model.eos:
                    live[row] = False
                else:
                    generated[indices[row]].append(token)
        if not live.any():
            break
        new = next_tokens[:, None]
        tokens = torch.cat([tokens, new], dim=1)
    assert first is not None
    return first


def _forward(
    model: LoadedModel,
    tokens: Int[Tensor, "prompt position"],
    cache: Any,
    ablation: Ablation,
    observe: Observer | None,
    live: Bool[Tensor, "prompt"],
    unseen: int = 0,
) -> Float[Tensor, "prompt d_vocab"]:
    """Run new tokens with the hook in place; return the logits after the last one."""
    hook = _hook(model, ablation, observe, live, unseen)
    with ExitStack() as hooks:
        if hook is not None:
            hooks.enter_context(model.bridge.hooks(fwd_hooks=[(model.hook_post, hook)]))
        return next_logits(model, tokens, cache)


def _settled(
    model: LoadedModel,
    logits: Float[Tensor, "prompt d_vocab"],
    n: int,
    tokens: Int[Tensor, "prompt position"],
    ablation: Ablation,
) -> Float[Tensor, "prompt d_vocab"]:
    """Cast logits to float64; recompute rows in float64 where the n + 1 top tokens nearly tie.

    Args:
        model: The model.
        logits: In the model's dtype.
        n: How many most likely tokens are wanted.
        tokens: Each prompt and its continuation so far.
        ablation: The neuron set.
    """
    if model.dtype != torch.float32:
        return logits.double()
    best = logits.topk(min(n + 1, logits.shape[1])).values
    near = (best[:, :-1] - best[:, 1:] <= NEAR * logits.abs().amax(1, keepdim=True)).any(1)
    rows = torch.nonzero(near)[:, 0]
    settled = logits.double()
    if len(rows):
        with float64():
            run = partial(_forward, model, tokens[rows], new_cache(model), ablation)
            settled[rows] = run(None, torch.ones_like(rows, dtype=torch.bool))
    return settled


def _hook(
    model: LoadedModel, ablation: Ablation, observe: Observer | None, live: Tensor, unseen: int = 0
) -> Any:
    """Return the hook function for one batch, or None if there is nothing to do.

    The first `unseen` positions are not observed.
    """
    if not ablation.neurons and observe is None:
        return None
    neurons = torch.tensor(ablation.neurons, dtype=torch.long, device=model.device)
    values = torch.tensor(ablation.values, dtype=model.dtype, device=model.device)

    return partial(_replace, model.spec.d_mlp, neurons, values, observe, live, unseen)


def _replace(
    d_mlp: int,
    neurons: Int[Tensor, "neuron"],
    values: Float[Tensor, "neuron"],
    observe: Observer | None,
    live: Bool[Tensor, "prompt"],
    unseen: int,
    activations: Tensor,
    hook: Any,
) -> Tensor:
    """Show activations to the observer, and hold the neurons at their values."""
    # A wrong shape would be broadcast silently.
    assert activations.shape[0] == len(live), activations.shape
    assert activations.shape[-1] == d_mlp, activations.shape
    if observe is not None:
        observe(activations[live, unseen:].reshape(-1, d_mlp).float())
    if not len(neurons):
        return activations
    activations = activations.clone()
    activations[..., neurons] = values
    return activations
