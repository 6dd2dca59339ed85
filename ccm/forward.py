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


def join_caches(caches: Sequence[Any], room: int) -> Any:
    """Join caches of several lengths into one with room to grow, shorter ones filled up on the left.

    transformers' own dynamic cache is copied whole for every token it grows by.

    Args:
        caches: transformers caches of the same layers; emptied.
        room: Tokens that may be added.
    """
    from transformers.cache_utils import Cache, DynamicLayer

    class RoomyLayer(DynamicLayer):  # type: ignore[misc]
        """Keys and values (prompt, head, position, d_head) at the front of larger buffers."""

        def __init__(self, parts: Sequence[Any]) -> None:
            super().__init__()
            self.length: int = max(part.get_seq_length() for part in parts)
            self.is_initialized = True
            self.dtype, self.device = parts[0].keys.dtype, parts[0].keys.device
            self.keys = self._filled([part.keys for part in parts])
            self.values = self._filled([part.values for part in parts])
            for part in parts:  # both copies of a layer, never of the whole cache
                part.keys = part.values = None

        def _filled(self, parts: Sequence[Tensor]) -> Tensor:
            rows, first = sum(len(part) for part in parts), parts[0]
            heads, d_head = first.shape[1], first.shape[3]
            buffer = first.new_zeros((rows, heads, self.length + room, d_head))
            row = 0
            for part in parts:
                start = self.length - part.shape[2]
                buffer[row : row + len(part), :, start : self.length] = part
                row += len(part)
            return buffer

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            new = slice(self.length, self.length + key_states.shape[2])
            self.keys[:, :, new], self.values[:, :, new] = key_states, value_states
            self.length = new.stop
            return self.keys[:, :, : self.length], self.values[:, :, : self.length]

        def get_seq_length(self) -> int:
            return self.length

    layers = [RoomyLayer(parts) for parts in zip(*(c.layers for c in caches), strict=True)]
    return Cache(layers=layers)
