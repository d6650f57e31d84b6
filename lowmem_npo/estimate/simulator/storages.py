"""Counts the device memory in use while code runs: every tensor storage once, rounded as CUDA's allocator does."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BLOCK = 512  # bytes: the CUDA caching allocator gives every request a multiple of this
Event = tuple[int, int | None]  # a storage, and the bytes that are allocated for it; None: it is freed


class Storage(NamedTuple):
    """One live storage."""

    bytes: int
    kind: str
    device: str
    reference: weakref.ref


class _Reference(weakref.ref):
    """Remembers which storage it referred to, for when that is gone: cheaper than a closure for each of them."""

    __slots__ = ("key",)
    key: int


class StorageCounter(TorchDispatchMode):
    """Sees every operator below autograd and tracks the storages of its results until they are freed.

    A new storage is of the current `kind`; `mark` gives it another. `live` and `peak` are bytes on the counted device
    type, `at_peak` the bytes of each kind at the peak; `off_device_peak` is the peak on all other devices (pinned host
    memory, when tensors are offloaded). `trace` is every allocation and free on the counted device type, in order.
    """

    def __init__(self, device_type: str = "cuda", kind: str = "other") -> None:
        super().__init__()
        self.device_type, self.kind = device_type, kind
        self.live = self.peak = self.off_device = self.off_device_peak = 0
        self.by_kind: Counter[str] = Counter()
        self.at_peak: dict[str, int] = {}
        self.trace: list[Event] = []
        self._storages: dict[int, Storage] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here; a wrapper to keep the compiler out would cost time at every operator

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = self.run(func, args, kwargs or {})
        for leaf in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Runs the operator; a subclass adds what a device does beyond the operator's signature."""
        return func(*args, **kwargs)

    def mark(self, tensors: Any, kind: str) -> None:
        """From now on the storages of `tensors` (any nesting) are of `kind`, also those seen for the first time."""
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, Tensor):
                continue
            self._see(tensor)
            key = tensor.untyped_storage()._cdata
            storage = self._storages.get(key)
            if storage is None or storage.kind == kind:
                continue
            if storage.device == self.device_type:
                self.by_kind[storage.kind] -= storage.bytes
                self.by_kind[kind] += storage.bytes
            self._storages[key] = storage._replace(kind=kind)

    @contextlib.contextmanager
    def allocating(self, kind: str) -> Iterator[None]:
        """Inside, new storages are of `kind`."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def transient(self, size: int) -> None:
        """Counts a workspace that an operator allocates and frees before it returns."""
        self.trace += [(0, size), (0, None)]
        self._grow(up(size, BLOCK), self.kind)
        self._shrink(up(size, BLOCK), self.kind)

    def restart_peak(self) -> None:
        """Resets the peak to what is in use now."""
        self.peak, self.off_device_peak = self.live, self.off_device
        self.at_peak = dict(self.by_kind)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        device = tensor.device.type
        size = up(storage.nbytes(), BLOCK)
        reference = _Reference(storage, self._freed)
        reference.key = key
        self._storages[key] = Storage(size, self.kind, device, reference)
        if device == self.device_type:
            if size:
                self.trace.append((key, size))
            self._grow(size, self.kind)
        else:
            self.off_device += size
            self.off_device_peak = max(self.off_device_peak, self.off_device)

    def _freed(self, reference: _Reference) -> None:
        storage = self._storages.pop(reference.key)
        if storage.device == self.device_type:
            if storage.bytes:
                self.trace.append((reference.key, None))
            self._shrink(storage.bytes, storage.kind)
        else:
            self.off_device -= storage.bytes

    def _grow(self, size: int, kind: str) -> None:
        self.live += size
        self.by_kind[kind] += size
        if self.live > self.peak:
            self.peak, self.at_peak = self.live, dict(self.by_kind)

    def _shrink(self, size: int, kind: str) -> None:
        self.live -= size
        self.by_kind[kind] -= size


def up(number: int, multiple: int) -> int:
    """`number`, rounded up to a multiple."""
    return -(-number // multiple) * multiple
