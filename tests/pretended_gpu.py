"""GPUs where there are none: tensors that say they are on one, and whose numbers lie on the CPU.

What a GPU forbids is forbidden here: mixing devices, handing its memory to numpy. What makes the host
wait for it is counted, with the function that asked. So code for GPUs can be run from end to end on any
machine, and gives the CPU's numbers; what a GPU's kernels compute, how long they take and what their
allocator wastes is not to be learned here.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

import ccm

CORE = str(Path(ccm.__file__).parent)
CPU = torch.device("cpu")
GET_DEVICE, SET_DATA = Tensor.device.__get__, Tensor.data.__set__  # type: ignore[attr-defined]
# Functions whose result, or its size, the host must have before it can go on.
READING = {
    *(Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__),
    *(Tensor.__contains__, Tensor.__repr__, Tensor.__format__, Tensor.equal, torch.equal),
    *(Tensor.nonzero, torch.nonzero, Tensor.masked_select, torch.masked_select, torch.allclose),
    *(Tensor.unique, torch.unique, torch.unique_consecutive, Tensor.bincount, torch.bincount),
    *(torch.linalg.eigh, torch.linalg.svd),
}
# Functions that read only what kind of tensors they are given, or copy from one device to another.
MIXING = {torch._has_compatible_shallow_copy_type, Tensor.copy_, Tensor.type_as}
# Of a kernel with one tensor more on the CPU, which may hold one number: these take none.
STRICT = ("cat", "stack", "mm", "matmul", "linear", "embedding", "gather", "scatter", "index_", "take")


class OnGpu(Tensor):
    """A tensor on a pretended GPU."""

    gpu: int

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> Tensor:  # type: ignore[misc]
        """Make a parameter, as accelerate does with the class of one that it moves."""
        return torch.nn.Parameter(data, requires_grad)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _call(func, args, dict(kwargs or {}), None)


class _Parameter(OnGpu, torch.nn.Parameter):
    """A parameter of a module that was moved to a pretended GPU."""


class Waits(Counter[str]):
    """How often the host waited for a GPU, by the function of the core that asked."""

    def note(self) -> None:
        """Count a wait."""
        frame: Any = sys._getframe(1)
        while frame is not None and not frame.f_code.co_filename.startswith(CORE):
            frame = frame.f_back
        if frame is None:
            self["elsewhere"] += 1
            return
        module = Path(frame.f_code.co_filename).stem
        while frame.f_code.co_name.startswith("<"):  # a comprehension
            frame = frame.f_back
        self[f"{module}.{frame.f_code.co_name}"] += 1


@contextmanager
def pretended_gpus(n: int = 1, memory: int = 8 << 30) -> Iterator[Waits]:
    """Pretend that there are `n` GPUs with so many bytes free on each; count waits for them."""
    waits = Waits()

    class Pretend(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            return _call(func, args, dict(kwargs or {}), waits)

    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: n,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: "a pretended GPU",
        "mem_get_info": lambda device=None: (memory, memory),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 1,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: waits.note(),
        "get_rng_state": lambda device=None: torch.zeros(0, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
    }
    with mock.patch.multiple(torch.cuda, **answers), Pretend():
        yield waits


def _place(tensor: Tensor) -> torch.device:
    if isinstance(tensor, OnGpu):
        return torch.device("cuda", tensor.gpu)
    return GET_DEVICE(tensor)  # type: ignore[no-any-return]


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Tensors among arguments, and in lists of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _real(device: torch.device) -> torch.device:
    return CPU if device.type == "cuda" else device


def _named(name: Any) -> torch.device:
    """Device of a name, a number or a device; "cuda" is the first."""
    device = torch.device("cuda", name) if isinstance(name, int) else torch.device(name)
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def _put(out: Any, device: torch.device) -> Any:
    """Let tensors say that they are on a device; those that say so stay what they are."""

    def one(tensor: Tensor) -> Tensor:
        if _place(tensor) == device:
            return tensor
        if device.type != "cuda":
            return tensor.as_subclass(Tensor)
        moved = tensor.as_subclass(OnGpu)
        moved.gpu = device.index
        return moved

    if isinstance(out, (tuple, list)):
        return tree_map_only(Tensor, one, out)
    return one(out) if isinstance(out, Tensor) else out


def _call(func: Any, args: Sequence[Any], kwargs: dict[str, Any], waits: Waits | None) -> Any:
    """Run a function of torch as if its tensors were where they say they are."""
    waits = Waits() if waits is None else waits
    name = getattr(func, "__name__", str(func))
    if func in (torch.device, torch._C._nn._parse_to) and args and isinstance(args[0], int):
        args = [_named(args[0]), *args[1:]]  # a number is a GPU's
        if func is torch.device:
            return args[0]
    with torch._C.DisableTorchFunctionSubclass():
        if func == GET_DEVICE:
            return _place(args[0])
        tensors = [*_tensors(args), *_tensors(kwargs.values())]
        places = {_place(tensor) for tensor in tensors}
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return _move(func, list(args), kwargs, waits)
        if func == SET_DATA:
            func(*args)
            if _place(args[0]) != _place(args[1]):
                args[0].__class__, args[0].gpu = _Parameter, args[1].gpu
            return None
        on = sorted((place for place in places if place.type == "cuda"), key=str)
        if on and func in (Tensor.numpy, Tensor.__array__):
            raise TypeError(f"{name}: can't convert a tensor on {on[0]} to numpy")
        if on and len(places) > 1 and func not in MIXING:
            _refuse_mixing(func, name, args, tensors, waits)
        given = kwargs.get("device")
        if given is None and not on:
            return func(*args, **kwargs)
        device = on[0] if given is None else _named(given)
        if given is not None:
            kwargs["device"] = _real(device)
        if func is torch.tensor and device.type == "cuda":
            waits.note()  # a list of numbers is made on the CPU and copied
        elif on and (func in READING or _of_unknown_size(func, args, kwargs)):
            waits.note()
        return _put(func(*args, **kwargs), device)


def _move(func: Any, args: list[Any], kwargs: dict[str, Any], waits: Waits) -> Any:
    """`Tensor.to`, `Tensor.cpu`, `Tensor.cuda`."""
    source = args[0]
    target = CPU if func is Tensor.cpu else _place(source)
    if func is Tensor.cuda:
        target = _named("cuda")
    for i, value in enumerate(args[1:], 1):
        if isinstance(value, Tensor):
            target = _place(value)
        elif isinstance(value, (torch.device, str, int)) and not isinstance(value, bool):
            target = _named(value)
            args[i] = _real(target)
    if kwargs.get("device") is not None:
        target = _named(kwargs["device"])
        kwargs["device"] = _real(target)
    moved = Tensor.to(*args, **kwargs) if func is Tensor.to else source
    if target == _place(source):
        return source if moved is source else _put(moved, target)
    if {target.type, _place(source).type} == {"cpu", "cuda"}:
        waits.note()  # from one GPU to another, nobody waits
    return _put(source.detach().clone() if moved is source else moved, target)


def _refuse_mixing(
    func: Any, name: str, args: Sequence[Any], tensors: list[Tensor], waits: Waits
) -> None:
    """Raise what torch raises for tensors on different devices, but for what it lets pass."""
    device = next(_place(tensor) for tensor in tensors if isinstance(tensor, OnGpu))
    for tensor in tensors:
        if _place(tensor) == device:
            continue
        if _place(tensor) == CPU and func in (Tensor.__getitem__, Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            indices = [i for i in index if isinstance(i, Tensor)]
            # Indices may lie on the CPU, and what is written to a slice, or one number anywhere.
            if tensor is not args[0] and (
                any(tensor is i for i in indices) or not indices or tensor.dim() == 0
            ):
                waits.note()
                continue
        elif _place(tensor) == CPU and tensor.dim() == 0 and not any(word in name for word in STRICT):
            continue
        shapes = ", ".join(f"{tuple(t.shape)} on {_place(t)}" for t in tensors)
        raise RuntimeError(f"{name}: Expected all tensors to be on the same device, got {shapes}")


def _of_unknown_size(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the shape of what comes out depends on numbers in a tensor."""
    if func in (Tensor.__getitem__, Tensor.__setitem__):
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        masks = [i for i in index if isinstance(i, Tensor) and i.dtype == torch.bool]
        return bool(masks) or any(isinstance(i, list) for i in index)
    if func in (torch.repeat_interleave, Tensor.repeat_interleave):
        return any(isinstance(a, Tensor) for a in args[1:]) and "output_size" not in kwargs
    return func is torch.where and len(args) == 1
