"""Spreading a model that fits no single device over several; every layer stays where it is put."""

from pathlib import Path
from typing import Any

import torch

from ccm.errors import NotAvailable
from ccm.models.memory import bytes_by_device
from ccm.models.model import LoadedModel


def spread_over_devices(
    model: LoadedModel, max_memory: dict[int | str, int] | None = None, folder: Path | None = None
) -> LoadedModel:
    """Spread a loaded model's body over several devices, layer by layer, as a copy of its weights.

    Args:
        model: On the CPU; its bridge and the matrices it caches stay there until they are used.
        max_memory: Bytes of weights allowed on each device, GPUs by number; by default
            `bytes_by_device`.
        folder: Where layers go that fit on no device; None refuses a model that has such layers.

    Returns:
        The model, whose `device` is that of its final norm: residuals and activations end there.

    Raises:
        NotAvailable: the model does not fit.
    """
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import offload_state_dict

    body = model.body
    places = infer_auto_device_map(
        body,
        max_memory=bytes_by_device() if max_memory is None else max_memory,
        no_split_module_classes=list(body._no_split_modules or []),
        dtype=model.dtype,
    )
    if folder is None and "disk" in places.values():
        size = sum(p.numel() * p.element_size() for p in body.parameters())
        raise NotAvailable(
            f"{model.spec.name}: {size / 2**30:.1f} GiB of weights fit on no combination of the "
            "devices here. Use --dtype bfloat16, or a machine with more memory."
        )
    if folder is not None:
        offload_state_dict(str(folder), body.state_dict())
    dispatch_model(body, places, offload_dir=None if folder is None else str(folder))
    # Read off the map, because a module that was moved to disk has no device of its own.
    last = places[max((name for name in places if _is_above(name, model, body)), key=len)]
    model.device = torch.device("cpu" if last == "disk" else last)
    for name in ("final_norm", "W_U", "b_U", "W_out"):
        model.__dict__.pop(name, None)  # cached on the earlier device
    model.float32_error = None
    if model.trial is not None:
        model.trial.shared = None
    return model


def _is_above(name: str, model: LoadedModel, body: Any) -> bool:
    """Return whether a module of the body is its final norm or holds it."""
    module = body.get_submodule(name)
    return any(child is model.norm for child in module.modules())
