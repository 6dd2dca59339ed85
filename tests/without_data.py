"""Running code on tensors that have shapes and nothing in them.

Whatever reads a value from such a tensor fails, so what runs through has not read any. And what is held
at once can be counted for a model far larger than the machine.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ccm.decoding.bounded import BoundedLists


@contextmanager
def no_data() -> Iterator[None]:
    """Within it, no tensor holds data, and those from outside hold none for what is done here."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        yield


class Finished(Exception):
    """Enough was seen."""


class InventedLengths(BoundedLists):
    """Invents the lengths of its lists, for so many steps."""

    def __init__(self, steps: int, **lengths: int) -> None:
        """Give some lists lengths; others are as long as there is room, near ties there are none."""
        super().__init__(exact=False)
        self.left, self.lengths = steps, lengths

    def give(self, **room: int) -> None:
        """Let lists begin with more room than they would be given at first."""
        self._guess |= room

    def holds(self) -> bool:
        self.left -= 1
        if self.left < 0:
            raise Finished
        self._count = {
            name: min(given, self.lengths.get(name, given)) for name, given in self._given.items()
        }
        return True


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, and the most there ever were.

    Numbers that are read from tensors without data are 1: only what a length depends on may not be.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone() -> None:
            self._alive.discard(key)
            self.now -= size

        weakref.finalize(storage, gone)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default):
            return 1.0
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, FakeTensor):
                self._see(tensor)
        return out
