"""Choices of exact arithmetic on the stored weights: in float64, whatever a model's code says.

Every kernel, thread count and device sums float32 differently, and a near tie may fall either way. So a
choice is *defined* as that of exact arithmetic on the float32 weights and replacement values. Near ties
are computed again in float64, whose rounding is nine orders of magnitude smaller; what even that cannot
tell apart is a tie, which goes to the lowest token id (`ccm.decoding.results.most_likely`).

No second copy of the model is made: `float64` casts every weight when an operation reads it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ccm.decoding.forward import run_body
from ccm.method.neurons import VOCAB_COLUMNS
from ccm.models.bridge import Tokens
from ccm.models.model import LoadedModel

_COPIES = (torch.ops.aten._to_copy, torch.ops.aten.to, torch.ops.aten.clone)


class _Float64(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Turns every float32 number that an operation reads, or is asked to make, into float64.

    Models hold float32 islands (norms, rotary angles, softmax) and casts back; all of them are
    operations with a float32 argument, so none needs to be known by name.
    """

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.embedding.default:  # spares a float64 copy of the whole table
            return func(*args, **kwargs).double()
        if func.overloadpacket in _COPIES and args[0].dtype is torch.float32:
            return func(*args, **kwargs)  # a copied weight is widened when it is read
        views, reads = _does(func)
        # A view is widened when it is read.
        widened = torch.dtype if views else (torch.dtype, Tensor)
        args = tuple(
            tree_map_only(widened, _double, value) if read else value
            for read, value in zip(reads.values(), args, strict=False)
        )
        kwargs = {
            name: tree_map_only(widened, _double, value) if reads[name] else value
            for name, value in kwargs.items()
        }
        made = func(*args, **kwargs)
        # A new tensor is float32, too, where no dtype is asked for.
        return made if views or not all(reads.values()) else tree_map_only(Tensor, _double, made)


@cache
def _does(func: Any) -> tuple[bool, dict[str, bool]]:
    """Return whether an operation returns a view, and which arguments it only reads."""
    schema = func._schema
    views = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    reads = {a.name: a.alias_info is None or not a.alias_info.is_write for a in schema.arguments}
    return views, reads


def _double(value: Tensor | torch.dtype) -> Tensor | torch.dtype:
    if isinstance(value, torch.dtype):
        return torch.float64 if value is torch.float32 else value
    return value.double() if value.dtype is torch.float32 else value


@contextmanager
def float64() -> Iterator[None]:
    """Run code that is written for float32 in float64."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # in which XGLM makes its mask value
    try:
        with _Float64():  # type: ignore[no-untyped-call]
            yield
    finally:
        torch.set_default_dtype(default)


def exact_last_positions(
    model: LoadedModel, prefixes: Sequence[Tokens], tokens_at_once: int
) -> tuple[Float[Tensor, "prefix d_model"], Float[Tensor, "prefix d_mlp"]]:
    """Compute final residual and last-layer activations at each prefix's last position, float64.

    All weights are cast once per forward pass, so prefixes of any lengths share one: they are padded on
    the right, which no causal model's earlier positions see.

    Args:
        model: The model, in float32.
        prefixes: Token ids.
        tokens_at_once: Most tokens of one forward pass, padding included.
    """
    spec, device = model.spec, model.device
    x = torch.empty((len(prefixes), spec.d_model), dtype=torch.float64, device=device)
    a = torch.empty((len(prefixes), spec.d_mlp), dtype=torch.float64, device=device)
    order = sorted(range(len(prefixes)), key=lambda i: len(prefixes[i]))
    size = max(1, tokens_at_once // max(map(len, prefixes), default=1))
    for start in range(0, len(order), size):
        indices = order[start : start + size]
        ragged = [torch.tensor(list(prefixes[i]), device=device) for i in indices]
        with float64():
            found = run_body(model, pad_sequence(ragged, batch_first=True))
        rows, last = range(len(indices)), [len(tokens) - 1 for tokens in ragged]
        x[indices], a[indices] = (values[rows, last] for values in found)
    return x, a


def exact_logits(model: LoadedModel, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_vocab"]:
    """Compute logits of final residuals, float64; the unembedding is cast one part at a time."""
    with float64():
        normed = model.final_norm(x)
        parts = [normed @ part for part in torch.split(model.W_U, VOCAB_COLUMNS, dim=1)]
        logits: Tensor = torch.cat(parts, dim=1) + model.b_U
    return logits
