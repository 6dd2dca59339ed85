"""The one place that runs the transformer for the shared decode: tokens in, two tensors out."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ccm.checkpoint import LoadedModel


def run_body(
    model: LoadedModel,
    tokens: Int[Tensor, "node position"],
    cache: Any = None,
    positions: Int[Tensor, "node"] | None = None,
    *,
    last_only: bool = False,
) -> tuple[Float[Tensor, "node read d_model"], Float[Tensor, "node read d_mlp"]]:
    """Run the transformer without its head and read the two tensors that matter off it.

    Args:
        model: The model.
        tokens: New tokens of every node; none is a pad.
        cache: A transformers cache that grows by them, or None.
        positions: Position of each node's one new token, where the cache is filled up on the left;
            None where every cached position is a token.
        last_only: Read the last position only, and spare the last MLP the others: nothing later
            attends to what it writes. Its one output then broadcasts over the residual stream, of
            which only the last position is returned.

    Returns:
        Final residual (the final norm's input) and `hook_post` (the down-projection's input).
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            seen[name] = inputs[0]

        return hook

    masked: dict[str, Tensor] = {}
    if positions is not None:
        slots = torch.arange(cache.get_seq_length() + 1, device=tokens.device)
        # The new token is the last slot, and its row's first token lies `position` slots before it.
        masked["attention_mask"] = (slots >= slots[-1] - positions[:, None]).long()
        masked["position_ids"] = positions[:, None]
    hooks = [
        model.norm.register_forward_pre_hook(keep("x")),
        model.mlp_out.register_forward_pre_hook(keep("a")),
    ]
    if last_only:
        hooks.append(model.mlp.register_forward_pre_hook(lambda module, inputs: inputs[0][:, -1:]))
    try:
        model.body(input_ids=tokens, past_key_values=cache, use_cache=cache is not None, **masked)
    finally:
        for hook in hooks:
            hook.remove()
    x = seen["x"][:, -1:] if last_only else seen["x"]
    assert seen["a"].shape == (*x.shape[:2], model.spec.d_mlp), seen["a"].shape
    return x, seen["a"]


def join_caches(caches: Sequence[Any]) -> Any:
    """Join caches of several lengths into one, shorter ones filled up on the left with zeros."""
    from transformers.cache_utils import DynamicCache

    if len(caches) == 1:
        return caches[0]
    longest = max(cache.get_seq_length() for cache in caches)

    def filled(part: Tensor) -> Tensor:  # (prompt, head, position, d_head)
        return torch.nn.functional.pad(part, (0, 0, longest - part.shape[2], 0))

    joined = DynamicCache()
    for layer in range(len(caches[0].layers)):
        keys = torch.cat([filled(cache.layers[layer].keys) for cache in caches])
        values = torch.cat([filled(cache.layers[layer].values) for cache in caches])
        joined.update(keys, values, layer)
        for cache in caches:  # both copies of a layer, never of the whole cache
            cache.layers[layer].keys = cache.layers[layer].values = None
    return joined
