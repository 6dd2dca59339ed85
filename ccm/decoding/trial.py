"""Trial of the shared engine on a model, once, before it is first used.

It is held to the same reference, within the same tolerances, as the hooks (`ccm.models.trial`).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ccm.decoding.forward import RowCache, run_body
from ccm.decoding.prefill import prefill
from ccm.errors import AssumptionBroken, reason_of
from ccm.models.memory import out_of_memory
from ccm.models.model import LoadedModel
from ccm.models.trial import ACTIVATIONS, FINAL, LOG_PROBS, Found, Trial, wrong


def check_shared(model: LoadedModel) -> None:
    """Compare the shared engine with transformers, once per model.

    Raises:
        AssumptionBroken: the engine cannot run the model, or differs by more than rounding explains.
    """
    trial = model.trial
    if trial is None:
        return
    if trial.shared is None:
        trial.shared = model.broken_assumption or _tried(model, trial)
    if trial.shared:
        raise AssumptionBroken(
            f"{model.spec.name}: the shared engine cannot run it ({trial.shared}). Use --engine hooked."
        )


def _tried(model: LoadedModel, trial: Trial) -> str:
    """Try the last MLP at last positions, then at all; return why it fails, or "" if it works."""
    for model.narrow in (True, False):
        why = _why_not(model, trial)
        if not why:
            break
    return why


def _why_not(model: LoadedModel, trial: Trial) -> str:
    try:
        return next(filter(None, (wrong(trial, found) for found in _by_body(model, trial))), "")
    except Exception as error:  # modules that need more than their input may raise anything
        if out_of_memory(error):
            raise
        return reason_of(error)


@torch.inference_mode()
def _by_body(model: LoadedModel, trial: Trial) -> Iterator[Found]:
    """Run the trial prompts in one cache, with shared prefixes, then reading all positions."""
    device, n = model.device, len(trial.prompts)
    lengths = [len(prompt) - 1 for prompt in trial.prompts]
    half = lengths[0] // 2
    for last_only, shared in ((True, [half, half, 0]), (False, [0, 0, 0])):
        # Sorted by length after the prefix, as `prefill` needs them.
        order = sorted(range(n), key=lambda i: lengths[i] - shared[i])
        begun, cache = (RowCache(model.spec.n_layers) for _ in range(2))
        cache.reserve(n, max(lengths) + 1)

        def forward(
            tokens: Tensor, cache: Any, positions: Tensor | None, times: Any, last: bool = last_only
        ) -> tuple[Tensor, Tensor]:
            return run_body(model, tokens, cache, positions, last_only=last)

        begins = [trial.prompts[i][:-1] for i in order]
        prefixes = [shared[i] for i in order]
        x, a = prefill(begins, prefixes, begun, cache, forward, device, n * max(lengths))
        rows = torch.tensor([trial.first_row(i) + lengths[i] - 1 for i in order], device=device)
        yield _read(model, rows, x, a)
        tokens = torch.tensor([trial.prompts[i][-1:] for i in order], device=device)
        positions = torch.tensor([lengths[i] for i in order], device=device)
        x, a = forward(tokens, cache.window(slice(0, n), 0, max(lengths)), positions, None)
        yield _read(model, rows + 1, x[:, -1], a[:, -1])
    x, a = run_body(model, torch.tensor([trial.prompts[0]], device=device))
    yield _read(model, torch.arange(len(trial.prompts[0]), device=device), x[0], a[0])


def _read(model: LoadedModel, rows: Tensor, x: Tensor, a: Tensor) -> Found:
    return {
        LOG_PROBS: (rows, model.logits(x).log_softmax(-1)),
        FINAL: (rows, x.float()),
        ACTIVATIONS: (rows, a.float()),
    }
