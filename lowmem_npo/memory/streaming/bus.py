"""How a layer's weights get from host memory into a slot: streams and events behind one small interface."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from lowmem_npo.memory.streaming.in_files import FileBlock


class Bus(Protocol):
    """Two queues of work: computation, and copies. An event marks a place in one of them."""

    def computed(self) -> Any:
        """An event: all computation that was enqueued so far is done."""

    def copy(self, host: Any, slot: Tensor, after: Any) -> Any:
        """Enqueues a copy of `host` into `slot` that begins after the event `after`; returns the event of its end."""

    def wait(self, copied: Any) -> None:
        """Computation that is enqueued from now on begins after the event `copied`."""

    def finish(self, copied: Any) -> None:
        """Returns once the event `copied` has come: what was copied may be overwritten on the host."""


class CudaBus:
    """Copies on a stream of their own, beside the computation of whatever stream is current."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def computed(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self.device).record_event()

    def copy(self, host: Tensor, slot: Tensor, after: torch.cuda.Event) -> torch.cuda.Event:
        self.stream.wait_event(after)
        slot.record_stream(self.stream)  # a slot that is freed is not given to another tensor while it is copied into
        with torch.cuda.stream(self.stream):
            slot.copy_(host, non_blocking=True)
        return self.stream.record_event()

    def wait(self, copied: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(copied)

    def finish(self, copied: torch.cuda.Event) -> None:
        copied.synchronize()


class SynchronousBus:
    """Everything at once, in the order of the calls: on a CPU, and for a simulated GPU, which counts it."""

    def computed(self) -> None:
        return None

    def copy(self, host: Tensor, slot: Tensor, after: None) -> None:
        slot.copy_(host, non_blocking=True)  # which only a simulated GPU can tell

    def wait(self, copied: None) -> None:
        return None

    def finish(self, copied: None) -> None:
        return None


class StagedBus:
    """Copies of what lies in a file. A thread of its own reads a block into one of two (bytes,) uint8 buffers in pinned
    memory, from which `bus` copies it, while the other buffer is being copied and the GPU computes."""

    def __init__(self, bus: Bus, buffers: tuple[Tensor, Tensor]) -> None:
        self.bus, self.buffers = bus, buffers
        self._left: list[Any] = [None, None]  # of each buffer, the event of its last copy's end, in a tuple
        self._turn = 0
        self._reader = ThreadPoolExecutor(1, "streamed-weights")

    def computed(self) -> Any:
        return self.bus.computed()

    def copy(self, host: FileBlock, slot: Tensor, after: Any) -> Future:
        return self._reader.submit(self._copy, host, slot, after)

    def _copy(self, block: FileBlock, slot: Tensor, after: Any) -> Any:
        turn, self._turn = self._turn, 1 - self._turn
        if self._left[turn] is not None:
            self.bus.finish(*self._left[turn])
        staged = self.buffers[turn][: len(block)]
        block.read(staged)
        self._left[turn] = (self.bus.copy(staged, slot, after),)
        return self._left[turn][0]

    def wait(self, copied: Future) -> None:
        self.bus.wait(copied.result())

    def finish(self, copied: Future) -> None:
        self.bus.finish(copied.result())


def bus_to(device: torch.device, simulated: bool) -> Bus:
    """The bus between the host and `device`."""
    return CudaBus(device) if device.type == "cuda" and not simulated else SynchronousBus()
