"""Memory of a device: what is free, how much to plan with, and what a model takes at least."""

import gc

import torch

from ccm.errors import NotAvailable
from ccm.method.neurons import VOCAB_COLUMNS
from ccm.models import limits
from ccm.models.specs import FAMILIES, ModelSpec

GIB = 1 << 30
MOST_TO_PLAN_WITH = 4 * GIB  # more would make no step faster: that much keeps any processor busy


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device, bytes.

    On a GPU also what torch holds ready for reuse; on the CPU no more than a container's or a batch
    job's limit leaves (see `ccm.models.limits`).
    """
    if device.type == "cuda":
        ready = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + ready
    left, free = limits.memory_left(), _machine_bytes()
    return free if left is None else min(free, left)


def _machine_bytes() -> int:
    """What is free of the machine's memory, whatever of it this process may use."""
    import psutil

    return int(psutil.virtual_memory().available)


def default_budget(device: torch.device) -> int:
    """Bytes to plan a decode with: half of what is free, and no more than 4 GiB."""
    return min(free_bytes(device) // 2, MOST_TO_PLAN_WITH)


def shares_of_devices() -> dict[int | str, int]:
    """Bytes of weights to lay on every GPU, and on the CPU: what is free, less room to work in.

    A quarter of a GPU, 8 GiB at most, is left for caches, rows of logits and the measures.
    """
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    shares: dict[int | str, int] = {"cpu": free_bytes(torch.device("cpu"))}
    for gpu in gpus:
        free = free_bytes(gpu)
        shares[gpu.index] = free - min(free // 4, 2 * MOST_TO_PLAN_WITH)
    return shares


def weight_bytes(spec: ModelSpec, parameters: int, dtype: torch.dtype) -> int:
    """Bytes that a loaded model takes; the bridge splits a joint matrix of GPT-2 and NeoX in copies."""
    split = 3 * spec.d_model * (spec.d_model + 1) * spec.n_layers
    family = FAMILIES.get(spec.architecture)
    copied = split if family is not None and family.joint_qkv else 0
    return (parameters + copied) * dtype.itemsize


def needed_bytes(spec: ModelSpec, parameters: int, dtype: torch.dtype) -> int:
    """Least bytes that a run takes: the weights, and what measures hold beside them.

    That is a processed float32 copy of the unembedding, and LogitVar's three float64 arrays of neurons
    x a chunk of the vocabulary. Decoding adapts to what is left.
    """
    unembedding = 4 * spec.d_vocab * spec.d_model
    chunk = 3 * 8 * spec.d_mlp * min(VOCAB_COLUMNS, spec.d_vocab)
    return weight_bytes(spec, parameters, dtype) + unembedding + chunk


def check_memory(name: str, needed: int, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a model that cannot fit, before any work.

    Raises:
        NotAvailable: with what is needed and what is free.
    """
    if needed > free_bytes(device):
        gc.collect()  # a model before this one may be held by cycles only
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
    """Whether this is how a device says that it has no more memory."""
    said = ("allocate memory", "out of memory", "ALLOC_FAILED")  # by the CPU, CUDA, its libraries
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in said)
    )
