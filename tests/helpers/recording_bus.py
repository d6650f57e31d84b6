"""A bus that runs the real copies on the CPU at the worst moments that its events allow, and checks every access."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

NAN = 0xFF  # this byte, repeated, is NaN in every floating-point type


class RecordingBus(TorchDispatchMode):
    """Computation happens when it is called; its clock counts the operators that read a slot. A slot is NaN from the
    moment its copy may begin. The copy happens then (`late` false) or when the computation waits for it, as late as it
    can. Whatever is not ordered by events is listed in `violations`. Inside `with`, every operator is seen."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        self.late = late
        self.violations: list[str] = []
        self.reads = {"forward": 0, "backward": 0}
        self.copies = 0
        self._clock = 0
        self._last_read: dict[int, int] = {}  # memory of a slot -> clock
        self._under_way: list[tuple[int, Tensor, Tensor]] = []  # number of the copy, host, slot: in order
        self._sources: dict[int, tuple[int, Tensor]] = {}  # where copies began -> number of the last, its content
        self._finished = 0  # number of the last copy that the host has waited for
        self._arrives: dict[int, int] = {}  # memory of a slot -> number of the copy that computation must wait for

    # -- the bus ----------------------------------------------------------------------------------------------------

    def computed(self) -> int:
        return self._clock

    def copy(self, host: Tensor, slot: Tensor, after: int) -> int:
        memory = _memory(slot)
        if self._last_read.get(memory, 0) > after:
            self.violations.append("a slot is copied into while it is read")
        self.copies += 1
        with _disable_current_modes():
            self._check_source(host)
            self._finish(memory)
            slot.fill_(NAN)
            if self.late:
                self._under_way.append((self.copies, host, slot))
            else:
                slot.copy_(host)
        self._arrives[memory] = self.copies
        return self.copies

    def wait(self, copied: int) -> None:
        self._until(copied)
        self._arrives = {memory: number for memory, number in self._arrives.items() if number > copied}

    def finish(self, copied: int) -> None:
        """Unlike `wait`, it holds up the host: only now is it known that the copy has read what it copies."""
        self._until(copied)
        self._finished = max(self._finished, copied)

    def _until(self, copied: int) -> None:
        with _disable_current_modes():
            while self._under_way and self._under_way[0][0] <= copied:  # one stream: in order
                _, host, slot = self._under_way.pop(0)
                slot.copy_(host)

    def _check_source(self, host: Tensor) -> None:
        """What was copied from the same place before must have been read when it was overwritten."""
        number, content = self._sources.get(host.data_ptr(), (0, host))
        if number > self._finished and not torch.equal(content[: len(host)], host[: len(content)]):
            self.violations.append("what is copied is overwritten before")
        self._sources[host.data_ptr()] = self.copies, host.clone()

    def _finish(self, memory: int) -> None:
        """Of two copies into one slot, the first never shows."""
        self._under_way = [part for part in self._under_way if _memory(part[2]) != memory]

    # -- the computation --------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if not func.is_view:
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, Tensor) and _memory(tensor) in self.slots:
                    self._read(_memory(tensor))
        return func(*args, **(kwargs or {}))

    def _read(self, memory: int) -> None:
        self._clock += 1
        self._last_read[memory] = self._clock
        self.reads["backward" if torch._C._current_graph_task_id() != -1 else "forward"] += 1
        if memory in self._arrives:
            self.violations.append("a slot is read before its copy has arrived")

    slots: frozenset[int] = frozenset()

    @contextmanager
    def watching(self, slots: list[Tensor]) -> Iterator[None]:
        self.slots = frozenset(map(_memory, slots))
        with self:
            yield


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
