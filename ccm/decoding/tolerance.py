"""The tolerance: how far float32 moves logits from exact arithmetic, measured on the device at hand.

How a kernel rounds is known only once it has run. The decode must know by how much, because a choice
that leads by less is made again in float64 (`ccm.decoding.exact`, and paragraph 6 of
`ccm.decoding.certificate`). So some of the prompts to be decoded first run in both precisions.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ccm.decoding.certificate import Screen, build_screen, read_nodes
from ccm.decoding.exact import exact_logits, float64
from ccm.decoding.forward import RowCache, run_body
from ccm.errors import AssumptionBroken
from ccm.method.ablation import PLAIN
from ccm.models.bridge import Tokens
from ccm.models.model import LoadedModel

# u of `ccm.decoding.certificate`: at least this. Lower precisions round the final residual itself.
LEAST = {torch.float32: 2.0**-23, torch.bfloat16: 8e-3, torch.float16: 1e-3}
ROOM = 10  # the tolerance is this many times the largest error measured
MOST = 1e-3  # largest error allowed; beyond it, float64 would have to settle nearly everything
PROMPTS, LAST, POSITIONS = 8, 16, 64  # prompts of a measurement, positions of each; positions wanted
LIKELY = 64  # tokens compared with the most likely one: no others nearly tie with it
ROWS = 32  # logit rows at once


@dataclass(frozen=True)
class Float32Error:
    """The largest error of a logit difference, relative to M |x| / s + B."""

    largest: float  # NaN if a logit was NaN
    positions: int  # number of positions measured

    def joined(self, other: "Float32Error") -> "Float32Error":
        """Return the largest error over the positions of both."""
        largest = float(np.maximum(self.largest, other.largest))  # NaN if either is
        return Float32Error(largest, self.positions + other.positions)


def tolerance(model: LoadedModel, prompts: Sequence[Tokens]) -> float:
    """Return the relative tolerance of logit differences (u of `ccm.decoding.certificate`).

    In float32 it is `ROOM` times the largest error that the model's prompts showed so far, and at least
    `LEAST`; prompts are measured until `POSITIONS` positions are covered.

    Raises:
        AssumptionBroken: this device rounds too coarsely for float32, or logits are NaN.
    """
    if model.dtype != torch.float32:
        return LEAST[model.dtype]
    error: Float32Error | None = model.float32_error
    if error is None or error.positions < POSITIONS:
        found = measure(model, prompts)
        error = found if error is None else error.joined(found)
        model.float32_error = error
    if not math.isfinite(error.largest):
        raise AssumptionBroken(
            f"{model.spec.name}: refused, the shared engine's logits are no numbers for some prompts "
            f"on {model.device}. Check its weights, or use --engine hooked."
        )
    if error.largest > MOST:
        raise AssumptionBroken(
            f"{model.spec.name}: refused, its logits have a relative error of {error.largest:.1e} on "
            f"{model.device}. Allowed: {MOST:.0e}. Unset what lowers the precision of matrix products, "
            "or use another device."
        )
    return max(LEAST[model.dtype], ROOM * error.largest)


@torch.inference_mode()
def measure(model: LoadedModel, prompts: Sequence[Tokens]) -> Float32Error:
    """Run some prompts in float32 and in float64, and compare their logits.

    In float32 they run as one batch, and their last positions once more as a step on a KV cache, as in
    the decode.
    """
    tokens = _some(prompts).to(model.device)
    n, length = tokens.shape
    with float64():
        wanted = run_body(model, tokens)[0]
    whole = run_body(model, tokens)[0]
    cache = RowCache(model.spec.n_layers)
    cache.reserve(n, length)
    everyone = slice(0, n)
    if length > 1:
        run_body(model, tokens[:, :-1], cache.window(everyone, 0, 0), last_only=True)
    step = run_body(model, tokens[:, -1:], cache.window(everyone, 0, length - 1), last_only=True)[0]
    # First positions err more, and no prompt ends there.
    last = slice(max(length - LAST, length // 2), length)
    screen = build_screen(model.last_layer, [PLAIN], 1.0)
    errors = [
        torch.stack(list(_errors(model, screen, x.flatten(0, 1), exact.flatten(0, 1)))).max()
        for x, exact in ((whole[:, last], wanted[:, last]), (step, wanted[:, -1:]))
    ]
    return Float32Error(float(torch.stack(errors).max()), n * (last.stop - last.start))


def _some(prompts: Sequence[Tokens]) -> Int[Tensor, "prompt position"]:
    """Choose some of the longer prompts, all cut to the length of the shortest of them."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    longer = order[len(order) // 2 :]
    step = max(1, len(longer) // PROMPTS)
    some = [prompts[i] for i in longer[::step][:PROMPTS]]
    length = min(map(len, some))
    return torch.tensor([list(prompt[:length]) for prompt in some])


def _errors(
    model: LoadedModel,
    screen: Screen,
    x: Float[Tensor, "row d_model"],
    exact: Float[Tensor, "row d_model"],
) -> Iterator[Float[Tensor, ""]]:
    """Yield the largest error of a likely token's lead, in units of tau_0 / u, some rows at a time."""
    unread = torch.zeros((len(x), model.spec.d_mlp), device=x.device)
    for start in range(0, len(x), ROWS):
        rows = slice(start, start + ROWS)
        nodes = read_nodes(screen, x[rows], unread[rows])
        logits = torch.addcmul(screen.beta, nodes.sz, 1 / nodes.scale[:, None])
        wanted = exact_logits(model, exact[rows])
        likely = wanted.topk(min(LIKELY, wanted.shape[1])).indices
        off = (logits - wanted).gather(1, likely)
        yield ((off - off[:, :1]).abs().amax(1) / nodes.tolerance).max()
