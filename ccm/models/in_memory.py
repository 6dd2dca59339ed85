"""Models that are in memory already: a transformers model, or a TransformerLens bridge around one.

A bridge replaces modules of the model that it is given, and gradients must be off. So not the caller's
model is run but a second one around the same tensors: no weight is copied, and nothing that the caller
holds is changed.
"""

import copy
from typing import Any

import torch

from ccm.errors import AssumptionBroken, BadInput
from ccm.models.load import assemble, check_precision
from ccm.models.model import LoadedModel
from ccm.models.specs import spec_of_config
from ccm.models.tokenizer import Bos
from ccm.models.trial import plain_log_probs, trial_prompts

WRAPPED = "._original_component"  # how a bridge names the module that it wraps
MOST = 1e-2  # nats; rounding gives far less, and folded or edited weights far more


def adopt(model: Any, tokenizer: Any = None, *, bos: Bos = "own") -> LoadedModel:
    """Make a `LoadedModel` of a model in memory, which is not changed.

    Args:
        model: A causal language model of transformers, or a TransformerBridge around one.
        tokenizer: Its fast tokenizer; by default the one of the bridge.
        bos: As for `ccm.models.load.load`.

    Raises:
        BadInput: not a model, no tokenizer, or weights on several devices or of several dtypes.
        AssumptionBroken: the bridge does not compute the model that it wraps, or the model is not what
            the method assumes.
    """
    bridge = model if hasattr(model, "original_model") else None
    tokenizer = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
    if tokenizer is None:
        raise BadInput(f"{type(model).__name__}: no tokenizer. Give ccm.load(model, tokenizer=...).")
    if bridge is None and not (hasattr(model, "get_output_embeddings") and hasattr(model, "config")):
        raise BadInput(
            f"{type(model).__name__}: not a model. Allowed: a name, a folder, a transformers model, "
            "or a TransformerBridge."
        )
    plain = _shared_copy(model) if bridge is None else _unwrapped(bridge)
    kinds = {(p.device, p.dtype) for p in plain.parameters()}
    if len(kinds) != 1:
        raise BadInput(f"weights of several devices or dtypes: {sorted(map(str, kinds))}. Use one.")
    ((device, dtype),) = kinds
    check_precision(device, dtype)
    if bridge is not None:
        _check_bridge(bridge, plain, tokenizer, device)
    spec = spec_of_config(str(plain.config.name_or_path) or type(plain).__name__, plain.config)
    return assemble(spec, plain, tokenizer, device, dtype, source=spec.name, bos=bos)


def _shared_copy(model: Any) -> Any:
    """Make new modules around the same tensors, without gradients."""
    shared: dict[int, Any] = {}
    for tensor in model.parameters():
        shared[id(tensor)] = torch.nn.Parameter(tensor.detach(), requires_grad=False)
    shared |= {id(tensor): tensor for tensor in model.buffers()}
    return copy.deepcopy(model, shared).eval()


def _unwrapped(bridge: Any) -> Any:
    """Rebuild the plain model that a bridge was made of, around the same tensors."""
    from accelerate import init_empty_weights

    original = bridge.original_model
    with init_empty_weights(include_buffers=False):
        plain = type(original)(copy.deepcopy(original.config))
    wrapped = {name.replace(WRAPPED, ""): t for name, t in original.state_dict().items()}
    state = {
        name: torch.nn.Parameter(wrapped[name], requires_grad=False)
        for name in plain.state_dict()
        if name in wrapped
    }
    lacking = plain.load_state_dict(state, strict=False, assign=True).missing_keys
    plain.tie_weights()
    if any(t.is_meta for t in plain.parameters()):
        raise BadInput(
            f"the bridge does not hold {lacking[0]} of its model. Give the transformers model instead."
        )
    return plain.to(next(original.parameters()).device).eval()


def _check_bridge(bridge: Any, plain: Any, tokenizer: Any, device: torch.device) -> None:
    """Check that a bridge still computes the model it wraps: its weights may be folded or edited.

    Raises:
        AssumptionBroken: its log-probabilities differ.
    """
    d_vocab = int(plain.get_input_embeddings().weight.shape[0])
    (prompt, *_) = trial_prompts(tokenizer, plain.config, d_vocab)
    with torch.inference_mode():
        own = bridge(torch.tensor([prompt], device=device), return_type="logits")[0]
        own = own.float().log_softmax(-1)
    distance = float((own - plain_log_probs(plain, [prompt], device)).abs().max())
    if not distance <= MOST:
        raise AssumptionBroken(
            f"the bridge gives other numbers than the model that it wraps (by {distance:.2g} nats): "
            "its weights were processed or edited, or a hook was left on it. Give the transformers "
            "model, or a bridge as boot_transformers makes it."
        )
