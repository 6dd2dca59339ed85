"""The one place that runs the transformer for the shared decode: tokens in, two tensors out."""

from dataclasses import dataclass
from functools import cache as once
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ccm.decoding.bounded import BoundedLists
from ccm.decoding.products import quick_products
from ccm.models.model import LoadedModel
from ccm.models.specs import FAMILIES


def run_body(
    model: LoadedModel,
    tokens: Int[Tensor, "node position"],
    cache: Any = None,
    positions: Int[Tensor, "node"] | None = None,
    *,
    last_only: bool = False,
) -> tuple[Float[Tensor, "node read d_model"], Float[Tensor, "node read d_mlp"]]:
    """Run the transformer without its head; return the final residual and the last activations.

    Args:
        model: The model.
        tokens: New tokens of every node, without padding.
        cache: A transformers cache, which the new tokens extend, or None.
        positions: Position of each node's first new token, if the cache is padded on the left; None if
            every cached slot holds a token.
        last_only: Read the last position only. If `model.narrow`, the last MLP runs at that position
            alone, because nothing later attends to what it writes; its output then broadcasts over the
            residual stream, of which only the last position is returned.

    Returns:
        Final residual (the final norm's input) and `hook_post` (the down-projection's input).
    """
    seen: dict[str, Tensor] = {}
    masked: dict[str, Tensor] = {}
    if positions is not None:
        past, n = cache.get_seq_length(), tokens.shape[1]
        slots = torch.arange(past + n, device=tokens.device)
        # Each row's first token lies `position` slots before its first new one.
        there = slots >= past - positions[:, None]  # (node, slot)
        if _takes_prepared_masks(model, past + n):
            causal = slots <= past + slots[:n, None]  # (position, slot)
            masked["attention_mask"] = there[:, None, None] & causal
        else:
            masked["attention_mask"] = there.long()
        masked["position_ids"] = positions[:, None] + slots[:n]
    hooks = [
        model.norm.register_forward_pre_hook(partial(_keep, seen, "x")),
        model.mlp_out.register_forward_pre_hook(partial(_keep, seen, "a")),
    ]
    if last_only and model.narrow:
        hooks.append(model.mlp.register_forward_pre_hook(lambda module, inputs: inputs[0][:, -1:]))
    try:
        with quick_products(tokens.numel() * model.spec.d_model * model.spec.d_mlp):
            model.body(input_ids=tokens, past_key_values=cache, use_cache=cache is not None, **masked)
    finally:
        for hook in hooks:
            hook.remove()
    x = seen["x"][:, -1:] if last_only else seen["x"]
    a = seen["a"].reshape(len(tokens), -1, model.spec.d_mlp)  # OPT flattens positions into rows
    a = a[:, -1:] if last_only else a
    assert a.shape[:2] == x.shape[:2], f"activations of {tuple(a.shape)} at {x.shape[1]} positions"
    # In a model that is spread over devices, they may lie on another one.
    return x.to(model.device), a.to(model.device)


def _keep(seen: dict[str, Tensor], name: str, module: Any, inputs: tuple[Tensor, ...]) -> None:
    seen[name] = inputs[0]


def _takes_prepared_masks(model: LoadedModel, slots: int) -> bool:
    """Return whether all layers take one finished mask.

    Otherwise transformers builds their masks, and the host waits while a GPU checks whether any slot is
    masked. Other architectures may read more than a mask from it, and beyond a window layers differ.
    """
    config = model.body.config
    window = getattr(config, "sliding_window", None)
    return (
        config.model_type in FAMILIES
        and config._attn_implementation == "sdpa"
        and (window is None or slots <= window)
    )


class RowCache:
    """KV cache of many prefixes: a row each, in buffers with room to grow.

    All rows end at the same slot, so shorter ones begin later, and the slots before them are masked.
    Rows stay in place from step to step; only new and displaced rows are copied.
    """

    def __init__(self, n_layers: int) -> None:
        """Start empty; memory is allocated when a layer is first written."""
        self.n_layers = n_layers
        self.rows = self.slots = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def reserve(self, rows: int, slots: int) -> None:
        """Make room for this many rows and slots; buffers that are large enough are kept."""
        if rows > self.rows or slots > self.slots:
            self.rows, self.slots = max(rows, self.rows), max(slots, self.slots)
            self.keys, self.values = [], []

    def window(self, rows: slice, first: int, past: int) -> Any:
        """Present slots [first, past) of some rows as a transformers cache that can grow."""
        from transformers.cache_utils import Cache

        layer = _window_class()
        return Cache(layers=[layer(self, i, rows, first, past) for i in range(self.n_layers)])

    def write(
        self, layer: int, rows: slice, past: int, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values (row, head, new, d_head) at slot `past`; return whole buffers."""
        if layer == len(self.keys):
            for buffers, new in ((self.keys, keys), (self.values, values)):
                heads, width = new.shape[1], new.shape[3]
                buffers.append(new.new_empty((self.rows, heads, self.slots, width)))
        at = slice(past, past + keys.shape[2])
        self.keys[layer][rows, :, at], self.values[layer][rows, :, at] = keys, values
        return self.keys[layer], self.values[layer]

    def copy(
        self,
        source: "RowCache",
        of: Int[Tensor, "row"],
        slots: slice,
        rows: slice,
        past: int,
    ) -> None:
        """Copy slots of the source's rows `of` into these rows, so that they end at slot `past`."""
        at = slice(past - (slots.stop - slots.start), past)
        for layer in range(self.n_layers):
            keys, values = (b[layer][:, :, slots] for b in (source.keys, source.values))
            of = of.to(keys.device)
            self.write(layer, rows, at.start, keys.index_select(0, of), values.index_select(0, of))

    def blank(self, rows: slice, stop: int) -> None:
        """Zero the slots of these rows up to `stop`: even what is masked must not be NaN."""
        for buffer in (*self.keys, *self.values):
            buffer[rows, :, :stop] = 0

    def move(self, rows: Int[Tensor, "moved"], source: Int[Tensor, "moved"], past: int, n: int) -> None:
        """Copy the first `past` slots of source rows to other rows, none of which is a source.

        Args:
            rows: Rows to write.
            source: Rows to read.
            past: Slots in use.
            n: Rows in use from now on.
        """
        if n > self.rows:
            self._grow(n)
        if len(rows):
            for buffer in (*self.keys, *self.values):
                used, here = buffer[:, :, :past], buffer.device
                used.index_copy_(0, rows.to(here), used.index_select(0, source.to(here)))

    def _grow(self, rows: int) -> None:
        before, self.rows = self.rows, rows + rows // 4
        for buffers in (self.keys, self.values):
            for i, buffer in enumerate(buffers):
                buffers[i] = buffer.new_empty((self.rows, *buffer.shape[1:]))
                buffers[i][:before] = buffer


@dataclass(frozen=True)
class Rows:
    """Which row of a cache every branch takes."""

    branch: Int[Tensor, "row"]  # branch that each row holds
    moved: Int[Tensor, "moved"]  # rows that are copied from another
    source: Int[Tensor, "moved"]  # row that each of them is copied from


def plan_rows(parent: Int[Tensor, "branch"], lists: BoundedLists, n: int | Tensor) -> Rows:
    """Assign a cache row to every branch, so that as few rows as possible are copied.

    A parent's first branch stays in the parent's row if that is among the first n; the others move to
    free rows. A free row is never a source: if a branch grew from it, the first of these would hold
    it. Rows without branches are dropped.

    Args:
        parent: Row that each branch grows from, ascending.
        lists: Gets the list of moved rows, "moved".
        n: Number of branches; later entries of `parent` are fillers.
    """
    size = len(parent)
    place = torch.arange(size, device=parent.device)
    eldest = torch.ones_like(parent, dtype=torch.bool)
    eldest[1:] = parent[1:] != parent[:-1]
    there = place < n
    stays = there & eldest & (parent < n)
    branch = torch.full((size + 1,), -1, device=parent.device)
    branch[torch.where(stays, parent, size)] = place
    branch = branch[:size]
    free = there & (branch < 0)
    movers = torch.argsort(stays | ~there, stable=True)  # those that move, then all others
    branch = torch.where(free, movers[(free.cumsum(0) - 1).clamp_min(0)], branch)
    moved = lists.places("moved", free)
    return Rows(branch, moved, parent[torch.cat([branch, branch[:1]])[moved]])


@once
def _window_class() -> type:
    """Define the cache layer on first use, because importing transformers is slow."""
    from transformers.cache_utils import DynamicLayer

    class Window(DynamicLayer):  # type: ignore[misc]
        """One layer of a `RowCache`, as transformers sees it."""

        def __init__(self, owner: RowCache, layer: int, rows: slice, first: int, past: int) -> None:
            super().__init__()
            self.owner, self.layer, self.rows = owner, layer, rows
            self.first, self.past = first, past
            self.is_initialized = True

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            keys, values = self.owner.write(self.layer, self.rows, self.past, key_states, value_states)
            self.past += key_states.shape[2]
            seen = slice(self.first, self.past)
            return keys[self.rows, :, seen], values[self.rows, :, seen]

        def get_seq_length(self) -> int:
            return self.past - self.first

    return Window
