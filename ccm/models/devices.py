"""Devices and dtypes of torch by their names."""

import torch

from ccm.errors import BadInput, NotAvailable, one_of
from ccm.models.specs import DTYPES


def device_for(name: str) -> torch.device:
    """Turn `cpu`, `cuda`, `cuda:N` or `auto` into an existing device.

    Raises:
        BadInput: not a device name.
        NotAvailable: there is no such CUDA device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BadInput(f"device {name!r}: unknown. Allowed: auto, cpu, cuda, cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise BadInput(f"device {name!r}: not supported. Allowed: auto, cpu, cuda, cuda:N.")
    if device.type == "cpu" and device.index:
        raise BadInput(f"device {name!r}: there is one CPU. Allowed: auto, cpu, cuda, cuda:N.")
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= found:
            raise NotAvailable(
                f"device {name!r}: {found} CUDA devices found. Use --device cpu, or a machine and a "
                "torch build with CUDA."
            )
    return device


def dtype_for(name: str) -> torch.dtype:
    """Turn a dtype name into a torch dtype.

    Raises:
        BadInput: not one of `DTYPES`.
    """
    dtype: torch.dtype = getattr(torch, one_of("dtype", name, DTYPES))
    return dtype
