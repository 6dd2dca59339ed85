"""Named, two-sided comparators: how far a quantity may lie from its expected value, and why.

Type and shape are checked before values; a failure names the quantity, both numbers and the margin.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

GPU_WIDENING = 10.0


@dataclass(frozen=True)
class Tolerance:
    """A margin of `atol + rtol * |scale|`, where scale is the expected value unless given."""

    name: str
    rtol: float
    atol: float
    reason: str

    def of(self, name: str) -> "Tolerance":
        """The same tolerance under the name of one quantity: `MEASURE.of("rho")`."""
        return replace(self, name=name)

    def margin(self, scale: npt.NDArray[np.float64], device: Any = "cpu") -> npt.NDArray[np.float64]:
        """The allowed distance on either side; the one place where a GPU case differs.

        A GPU sums in another order, and in blocks whose number depends on the card.
        """
        widening = 1.0 if torch.device(device).type == "cpu" else GPU_WIDENING
        relative = self.rtol * np.abs(scale) if self.rtol else np.zeros_like(scale)  # not 0 * inf
        return np.asarray(widening * (self.atol + relative))

    def assert_close(
        self,
        actual: Any,
        expected: Any,
        *,
        what: str = "",
        scale: Any = None,
        equal_nan: bool = False,
        device: Any = "cpu",
    ) -> None:
        """Check that every actual value lies within the margin around its expected value.

        Arguments are floats, lists, arrays or tensors. `actual` must be of a floating type and of
        the shape of `expected`; `scale` (broadcast to that shape) replaces the expected value in
        the relative part of the margin. Infinities are close to themselves only, and so are NaN
        with `equal_nan`. Raises AssertionError; `what` says in it whose value failed.
        """
        __tracebackhide__ = True  # pytest then points at the caller's line
        where = f" [{what}]" if what else ""
        found, wanted = _array(actual), _array(expected)
        if found.dtype.kind != "f":
            raise AssertionError(f"{self.name} has type {found.dtype}, expected a float{where}")
        if wanted.dtype.kind not in "fiu":
            raise AssertionError(f"{self.name}: expected has type {wanted.dtype}{where}")
        if found.shape != wanted.shape:
            shapes = f"{found.shape}, expected {wanted.shape}"
            raise AssertionError(f"{self.name} has shape {shapes}{where}")

        found, wanted = found.astype(np.float64), wanted.astype(np.float64)
        around = wanted if scale is None else _array(scale).astype(np.float64)
        margin = np.broadcast_to(self.margin(around, device), wanted.shape)
        with np.errstate(invalid="ignore"):  # inf - inf
            # Infinities and NaN compare false here, whatever the margin: an infinite expected
            # value has an infinite margin, and "inf <= inf" would accept everything.
            close = (np.abs(found - wanted) <= margin) & np.isfinite(margin)
        close |= found == wanted
        if equal_nan:
            close |= np.isnan(found) & np.isnan(wanted)
        if not close.all():
            raise AssertionError(self._complaint(found, wanted, margin, close) + where)

    def _complaint(
        self,
        found: npt.NDArray[np.float64],
        wanted: npt.NDArray[np.float64],
        margin: npt.NDArray[np.float64],
        close: npt.NDArray[np.bool_],
    ) -> str:
        """The worst value first, NaN before all others, then how many there are."""
        with np.errstate(invalid="ignore", divide="ignore"):
            excess = np.where(close, -1.0, np.abs(found - wanted) / margin)
        worst = np.unravel_index(np.argmax(np.nan_to_num(excess, nan=np.inf)), excess.shape)
        at = f" at [{', '.join(str(int(i)) for i in worst)}]" if worst else ""
        others = int((~close).sum())
        more = f" (and {others - 1} more of {close.size})" if others > 1 else ""
        allowed = float(margin[worst])
        value, target = _digits(found[worst], allowed), _digits(wanted[worst], allowed)
        return f"{self.name}={value}{at}, expected {target} +- {allowed:.3g}{more}"


def _array(value: Any) -> npt.NDArray[Any]:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.float() if value.dtype == torch.bfloat16 else value  # numpy has no bfloat16
    return np.asarray(value)


def _digits(value: float, margin: float) -> str:
    """The value to one digit below its margin, so that a near miss does not print as a hit."""
    if not (math.isfinite(value) and math.isfinite(margin) and value and margin):
        return repr(float(value))
    digits = math.floor(math.log10(abs(value))) - math.floor(math.log10(margin)) + 3
    return f"{value:.{min(max(digits, 3), 17)}g}"


TIMES = 8.0
FLOOR = 16.0  # units of float32's eps
NO_ROUNDING = 1e4  # units of the computation's own eps


def of_rounding(
    name: str,
    seen: Any,
    exact: Any,
    *,
    times: float = TIMES,
    dtype: torch.dtype = torch.float32,
) -> Tolerance:
    """The margin for computations of some numbers, from what one of them did on this machine.

    Kernels, threads and batches sum in other orders, so two right computations differ by about as much
    as each does from the exact numbers, and how much that is depends on the machine. Nothing is assumed
    of it: the margin is some times the largest error of one computation, plus `FLOOR` roundings of the
    largest number, for it may have been lucky.

    Args:
        name: What the numbers are called.
        seen: What one computation gave, one that is not under test.
        exact: The same numbers, computed in float64.
        times: How many times its largest error is allowed.
        dtype: What it was computed in.

    Raises:
        AssertionError: it is off by more than any rounding, so it says nothing about other ones.
    """
    found, wanted = _array(seen).astype(np.float64), _array(exact)
    if wanted.dtype != np.float64:
        raise AssertionError(f"{name}: the exact numbers have type {wanted.dtype}, expected float64")
    if found.shape != wanted.shape or not wanted.size:
        raise AssertionError(f"{name} has shape {found.shape}, expected {wanted.shape}")
    size, error = float(np.abs(wanted).max()), float(np.abs(found - wanted).max())
    if not error <= NO_ROUNDING * torch.finfo(dtype).eps * size:
        raise AssertionError(f"{name}: off by {error:.3g} of {size:.3g}, which is no rounding")
    return Tolerance(
        name,
        rtol=0.0,
        atol=times * error + FLOOR * torch.finfo(torch.float32).eps * size,
        reason=f"{times:g} times the {error:.1e} by which a computation of such numbers is off here, "
        f"and {FLOOR:g} roundings of {size:.3g}",
    )


MEASURE = Tolerance(
    "measure",
    rtol=1e-4,
    atol=0.0,
    reason="LogitVar, norm, rho and singular values are float32 sums over d_model and the "
    "vocabulary, taken in another order here than there; they span decades, so relative",
)
ENTROPY = Tolerance(
    "entropy",
    rtol=0.0,
    atol=1e-4,
    reason="nats; float32 logits move by 1e-6 to 1e-5 with the batch and the order of summation, "
    "and the entropy by that times a few; effects of interest start at 1e-2",
)
LOG_PROBABILITY = Tolerance(
    "log-probability",
    rtol=0.0,
    atol=1e-4,
    reason="nats; the error of a float32 logit, which does not shrink with the probability",
)
PERCENT = Tolerance(
    "percent",
    rtol=0.0,
    atol=1e-9,
    reason="a score is a ratio of the same integer counts: only the last bits may differ",
)
STATISTIC = Tolerance(
    "statistic",
    rtol=1e-6,
    atol=0.0,
    reason="float64 accumulation against numpy's; relative to the neuron's range (pass it as "
    "scale), since a mean near zero keeps the error of the values it was summed from",
)
