"""How far its batch moves what the transformer computes, measured on the device that runs it.

A sum is rounded otherwise in another batch, where another kernel takes it, and what a kernel does is
known only once it has run. The shared decode must know by how much, because a choice that leads by less
is made again alone (`ccm.decoding.certificate`, paragraph 6).
"""

import math

import numpy as np
import torch

from ccm.decoding.forward import RowCache, run_body
from ccm.errors import AssumptionBroken
from ccm.models.model import LoadedModel
from ccm.models.trial import ordinary_tokens

# u of `ccm.decoding.certificate`: at least this. Lower precisions round the final residual itself.
LEAST = {torch.float32: 4e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
# A lead is a difference of two logits, and either takes the residual's noise; once more for the rest.
ROOM = 3
MOST = 1e-4  # a hundred times what float32 was seen to do
LENGTHS, ROWS, ALONE = (6, 15), 32, 4


def tolerance(model: LoadedModel) -> float:
    """Relative rounding of logits to reckon with; measured once for a model in float32.

    Raises:
        AssumptionBroken: this device rounds too coarsely for float32, or to no number at all.
    """
    if model.dtype != torch.float32:
        return LEAST[model.dtype]
    if model.noise is None:
        model.noise = batch_noise(model)
    if not math.isfinite(model.noise):
        raise AssumptionBroken(
            f"{model.spec.name}: refused, of some random prompts the shared engine's final residuals "
            f"are no numbers on {model.device}. Check its weights, or use --engine hooked."
        )
    if not model.noise <= MOST:
        raise AssumptionBroken(
            f"{model.spec.name}: refused, the batch changes its final residual by {model.noise:.1e} of "
            f"its length on {model.device}. Allowed: {MOST:.0e}. Unset what lowers the precision of "
            "products, or use another device."
        )
    return max(LEAST[model.dtype], ROOM * model.noise)


@torch.inference_mode()
def batch_noise(model: LoadedModel) -> float:
    """Largest |dx| / |x| of final residuals x that batch mates, and a cache, made to random prompts."""
    draw, noise = np.random.default_rng(0), list[torch.Tensor]()
    ids = ordinary_tokens(model.tokenizer, model.spec.d_vocab)
    for length in LENGTHS:
        prompts = draw.choice(ids, (ROWS, min(length, model.n_ctx)))
        if model.bos is not None:
            prompts[:, 0] = model.bos
        tokens = torch.from_numpy(prompts).to(model.device)
        alone = torch.cat([_last(model, tokens[i : i + 1]) for i in range(ALONE)])
        cache, before = RowCache(model.spec.n_layers), tokens.shape[1] - 1
        cache.reserve(ROWS, before + 1)
        _last(model, tokens[:, :-1], cache.window(slice(0, ROWS), 0, 0))
        step = _last(model, tokens[:, -1:], cache.window(slice(0, ROWS), 0, before))
        for found in (_last(model, tokens), step):
            noise.append((found[:ALONE] - alone).norm(dim=1) / alone.norm(dim=1).clamp_min(1e-30))
    return float(torch.cat(noise).max())  # NaN where any is


def _last(model: LoadedModel, tokens: torch.Tensor, cache: object = None) -> torch.Tensor:
    return run_body(model, tokens, cache, last_only=True)[0][:, -1].float()
