"""Whether the method's assumptions hold for a model: measured, not looked up by its name."""

from typing import Any

import torch
from torch import Tensor

from ccm.errors import AssumptionBroken
from ccm.models.model import LoadedModel


def check_parts(model: LoadedModel) -> None:
    """Refuse a model that lacks a part that the ablation needs.

    Raises:
        AssumptionBroken: `hook_post` is missing, or the last MLP has no single output matrix.
    """
    name = model.spec.name
    if model.hook_post not in model.bridge.hook_dict:
        raise AssumptionBroken(f"{name}: refused, it has no {model.hook_post} to ablate.")
    if tuple(model.W_out.shape) != (model.spec.d_mlp, model.spec.d_model):
        raise AssumptionBroken(f"{name}: refused, its last MLP is not one d_mlp x d_model matrix.")


def check_assumptions(model: LoadedModel) -> None:
    """Refuse a model in which ablating last-layer neurons changes more than its final residual.

    LogitVar, rho and effects need this by their definition, and so does the shared engine. Hooks do
    not: they ablate whatever comes after.

    Raises:
        AssumptionBroken: `broken_assumption` found something.
    """
    if model.broken_assumption:
        raise AssumptionBroken(
            f"{model.spec.name}: refused, {model.broken_assumption}. So LogitVar, rho and the effects "
            "of a run would be meaningless. `ccm ablate` runs it, by hooks."
        )


def broken_assumption(model: LoadedModel, rtol: float = 2e-3) -> str:
    """Find what an ablation of last-layer neurons changes besides the final residual.

    Method 12 assumes that logits = norm(x) W_U + b_U, with x the final residual, and that changing
    neuron i's activation by d moves x by exactly d W_out[i]. Both are measured on two tokens, so that a
    post-norm, a soft cap, a second head, a scaled unembedding or a mixture of experts is found,
    whatever the library calls it.

    Args:
        model: The model.
        rtol: Largest relative deviation allowed in float32; lower precisions are allowed 0.1.

    Returns:
        Which of the two does not hold, and why that may be; empty if both do.

    Raises:
        AssumptionBroken: a part is missing, or the logits are not finite.
    """
    check_parts(model)
    name = model.spec.name
    seen: dict[str, Tensor] = {}
    neurons = torch.tensor([0, model.spec.d_mlp - 1], device=model.device)

    def keep(x: Tensor, hook: Any) -> None:
        seen[hook.name] = x.detach().clone()

    def push(a: Tensor, hook: Any) -> Tensor:
        a = a.clone()
        a[..., neurons] += push_by
        return a

    first = model.bos or 0
    tokens = torch.tensor([[first, min(first + 1, model.spec.d_vocab - 1)]], device=model.device)
    residual = "ln_final.hook_in"
    with torch.inference_mode():
        mask = torch.ones_like(tokens)
        with model.bridge.hooks(fwd_hooks=[(residual, keep)]):
            logits = model.bridge(tokens, attention_mask=mask, return_type="logits")[0].float()
        x = seen[residual][0].float()
        if not (torch.isfinite(logits).all() and torch.isfinite(x).all()):
            raise AssumptionBroken(f"{name}: refused, its logits are not finite. Check its weights.")
        # As large as the residual itself; a smaller change would be lost in the tolerance.
        moves = model.W_out[neurons].float().sum(0)
        push_by = _span(x) / _span(moves)
        with model.bridge.hooks(fwd_hooks=[(model.hook_post, push), (residual, keep)]):
            model.bridge(tokens, attention_mask=mask, return_type="logits")
        moved = seen[residual][0].float() - x
        expected = push_by * moves
        ours = model.logits(x)
    allowed = rtol if model.dtype == torch.float32 else 0.1
    if not torch.allclose(moved, expected.expand_as(moved), rtol=allowed, atol=allowed * _span(x) / 10):
        return (
            "a change of a last-layer activation does not move the final residual by its output weight "
            "(post-norm, experts, or a layer after it)"
        )
    if not torch.allclose(ours, logits, rtol=allowed, atol=allowed * _span(logits)):
        return "its logits are not norm(residual) W_U + b_U (a soft cap, a scale, or another norm)"
    return ""


def _span(x: Tensor) -> float:
    return float(x.abs().max())
