"""How a layer's weights get from host memory into a slot: streams and events behind one small interface."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Bus(Protocol):
    """Two queues of work: computation, and copies. An event marks a place in one of them."""

    def computed(self) -> Any:
        """An event: all computation that was enqueued so far is done."""

    def copy(self, host: Tensor, slot: Tensor, after: Any) -> Any:
        """Enqueues a copy of `host` into `slot` that begins after the event `after`; returns the event of its end."""

    def wait(self, copied: Any) -> None:
        """Computation that is enqueued from now on begins after the event `copied`."""


class CudaBus:
    """Copies on a stream of their own, beside the computation of whatever stream is current."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def computed(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self.device).record_event()

    def copy(self, host: Tensor, slot: Tensor, after: torch.cuda.Event) -> torch.cuda.Event:
        self.stream.wait_event(after)
        with torch.cuda.stream(self.stream):
            slot.copy_(host, non_blocking=True)
        return self.stream.record_event()

    def wait(self, copied: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(copied)


class SynchronousBus:
    """Everything at once, in the order of the calls: on a CPU, and for a simulated GPU, which counts it."""

    def computed(self) -> None:
        return None

    def copy(self, host: Tensor, slot: Tensor, after: None) -> None:
        slot.copy_(host, non_blocking=True)  # which only a simulated GPU can tell

    def wait(self, copied: None) -> None:
        return None


def bus_to(device: torch.device, simulated: bool) -> Bus:
    """The bus between the host and `device`."""
    return CudaBus(device) if device.type == "cuda" and not simulated else SynchronousBus()
