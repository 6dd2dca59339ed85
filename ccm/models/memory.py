"""Memory of a device: how much is free, how much to plan with, and how much a model needs."""

import gc

import torch

from ccm.errors import NotAvailable
from ccm.method.neurons import VOCAB_COLUMNS
from ccm.models import limits
from ccm.models.specs import FAMILIES, ModelSpec

GIB = 1 << 30
MOST_TO_PLAN_WITH = 4 * GIB  # keeps any processor busy; more would make no step faster


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device, bytes.

    On a GPU, memory that torch holds ready for reuse counts as free. On the CPU, it is no more than
    what the limit of a container or batch job leaves (see `ccm.models.limits`).
    """
    if device.type == "cuda":
        ready = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + ready
    left, free = limits.memory_left(), _machine_bytes()
    return free if left is None else min(free, left)


def _machine_bytes() -> int:
    """Return the free memory of the machine, whether this process may use it or not."""
    import psutil

    return int(psutil.virtual_memory().available)


def default_budget(device: torch.device) -> int:
    """Return how many bytes to plan a decode with: half of the free memory, at most 4 GiB."""
    return min(free_bytes(device) // 2, MOST_TO_PLAN_WITH)


def bytes_by_device() -> dict[int | str, int]:
    """Return how many bytes of weights fit on each GPU, by its number, and on the CPU.

    That is the free memory; on a GPU less a quarter of it, 8 GiB at most, which is left for KV caches,
    logit rows and the measures.
    """
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    found: dict[int | str, int] = {"cpu": free_bytes(torch.device("cpu"))}
    for gpu in gpus:
        free = free_bytes(gpu)
        found[gpu.index] = free - min(free // 4, 2 * MOST_TO_PLAN_WITH)
    return found


def weight_bytes(spec: ModelSpec, parameters: int, dtype: torch.dtype) -> int:
    """Return the bytes that a loaded model takes.

    The bridge splits the joint query-key-value matrix of GPT-2 and NeoX, which makes copies.

    Args:
        spec: The model.
        parameters: Their number, tied ones counted once.
        dtype: Of its weights.
    """
    split = 3 * spec.d_model * (spec.d_model + 1) * spec.n_layers
    family = FAMILIES.get(spec.architecture)
    copied = split if family is not None and family.joint_qkv else 0
    return (parameters + copied) * dtype.itemsize


def needed_bytes(spec: ModelSpec, parameters: int, dtype: torch.dtype) -> int:
    """Return the least bytes that a run takes: the weights, and what the measures need beside them.

    The measures need a processed float32 copy of the unembedding, and for LogitVar three float64 arrays
    of neurons x a chunk of the vocabulary. Decoding adapts to the memory that is left.

    Args:
        spec: The model.
        parameters: Their number, tied ones counted once.
        dtype: Of its weights.
    """
    unembedding = 4 * spec.d_vocab * spec.d_model
    chunk = 3 * 8 * spec.d_mlp * min(VOCAB_COLUMNS, spec.d_vocab)
    return weight_bytes(spec, parameters, dtype) + unembedding + chunk


def check_memory(name: str, needed: int, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a model that cannot fit, before any work.

    Args:
        name: Of the model, for the message.
        needed: Bytes, as `needed_bytes` counts them.
        device: Where it is to run.
        dtype: Of its weights.

    Raises:
        NotAvailable: more bytes are needed than are free.
    """
    if needed > free_bytes(device):
        gc.collect()  # an earlier model may be held by reference cycles only
    free = free_bytes(device)
    if needed > free:
        ways = ["--dtype bfloat16"] if dtype == torch.float32 else []
        if device.type == "cuda" and torch.cuda.device_count() > 1:
            ways.append("ccm run --device-map auto")
        if device.type != "cpu":
            ways.append("another device")
        elif (limits.memory_left() or needed) < needed <= _machine_bytes():
            ways.append("a higher memory limit for this container or job: the machine has enough")
        else:
            ways.append("a machine with more memory")
        raise NotAvailable(
            f"{name} in {str(dtype).removeprefix('torch.')}: needs {needed / GIB:.3g} GiB on {device}, "
            f"free {free / GIB:.3g} GiB. Use {' or '.join(ways)}."
        )


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a device has no more memory."""
    said = ("allocate memory", "out of memory", "ALLOC_FAILED")  # by the CPU, CUDA, its libraries
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in said)
    )
