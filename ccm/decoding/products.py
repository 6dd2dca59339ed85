"""Matrix products by oneDNN, on CPUs for which MKL has only its slower kernels.

PyTorch multiplies float32 matrices by MKL, which keeps its AVX-512 kernels for Intel's CPUs. On AMD's
oneDNN, which comes with PyTorch, takes less than half of the time. It rounds two to three times as
much; the tolerance is measured with what is used here, so no choice hangs on it.
"""

import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter, functional
from torch.overrides import TorchFunctionMode

from ccm.method.neurons import VOCAB_COLUMNS

X86 = ("x86_64", "amd64")
LEAST = 1 << 22  # multiplications: for fewer, what oneDNN generates for a new shape takes too long


@cache
def mkl_is_slow() -> bool:
    """Return whether this is AMD's CPU; elsewhere PyTorch's own choice is left as it is."""
    if platform.machine().lower() not in X86:
        return False
    info = Path("/proc/cpuinfo")  # Linux leaves `platform.processor()` empty
    return "AuthenticAMD" in (info.read_text() if info.exists() else platform.processor())


def by_onednn() -> bool:
    """Return whether products on this machine's CPU go to oneDNN."""
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return mkl_is_slow() and available and _operator() is not None


def quick_products(most: int) -> AbstractContextManager[object]:
    """Send the linear layers of code that runs within to oneDNN, where that is faster.

    Args:
        most: Multiplications of the largest product within; looking at each call takes time, too.
    """
    return _QuickProducts() if most >= LEAST and by_onednn() else nullcontext()


def unembed(
    x: Float[Tensor, "row d_model"], W_U: Float[Tensor, "d_model d_vocab"]
) -> Float[Tensor, "row d_vocab"]:
    """Multiply final residuals, times the norm's gain, by the unembedding."""
    if not (by_onednn() and _fits(x, W_U)):
        return x @ W_U
    rows = x.new_empty((len(x), W_U.shape[1]))
    # Some columns at a time: oneDNN copies the weights into an order of its own.
    for part, columns in zip(
        torch.split(rows, VOCAB_COLUMNS, dim=1), torch.split(W_U, VOCAB_COLUMNS, dim=1), strict=True
    ):
        part.copy_(_linear(x, columns.T))
    return rows


class _QuickProducts(TorchFunctionMode):
    """Computes linear layers by oneDNN, be they `Linear` or transformers' `Conv1D`."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if not kwargs:
            if func is functional.linear and _fits(*args[:2]):
                return _linear(*args)
            if func is torch.addmm and len(args) == 3 and args[0].ndim == 1 and _fits(*args[1:]):
                bias, x, weight = args
                return _linear(x, weight.T, bias)
        return func(*args, **(kwargs or {}))


def _fits(x: Tensor, weight: Tensor) -> bool:
    """Return whether the operator takes these, float32 without gradients, and it pays."""
    return (
        x.numel() // max(1, x.shape[-1]) * weight.numel() >= LEAST
        and {type(x), type(weight)} <= {Tensor, Parameter}  # no quantized weights in disguise
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and not torch.is_grad_enabled()
        and torch.get_default_dtype() is torch.float32  # not within `ccm.decoding.exact.float64`
    )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    operator = _operator()
    assert operator is not None
    product: Tensor = operator(x, weight, bias, "none", [], "")
    return product


@cache
def _operator() -> Callable[..., Tensor] | None:
    """Return PyTorch's own way to oneDNN, or None where it is gone: it is no promised interface."""
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)
