"""Checkpoints wait in the host's memory: one layer input per layer is all that a checkpointed pass keeps, and the most.

Each goes to pinned memory on a stream of its own while the next layers compute, and is fetched back, one layer ahead,
while the layer above is recomputed and differentiated. At any time at most `IN_FLIGHT` leaving, or one in use and one
arriving, are on the GPU.

Looked at, and why this is ours. `save_on_cpu` of PyTorch and `activation_checkpointing_enable(offload=True)` of
transformers, which uses it, copy on the compute stream, so that every copy delays the pass. `OffloadActivations` of TRL
(from torchtune) has a side stream, but takes every tensor that any part of the graph saves, keeps five of them, and
fetches each at the moment it is asked for, while the GPU waits. Unsloth's copies on the compute stream and needs
reentrant checkpointing, with which inputs without gradient (below the lowest adapter) get no gradient to the adapters.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from lowmem_kernels.dispatch import has_values
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

IN_FLIGHT = 2


class CheckpointOffload:
    """Checkpoints layers as `torch.utils.checkpoint` does, non-reentrant, with their inputs on the host.

    On the CPU, and for simulated tensors, it makes the same allocations and plain copies.
    """

    def __init__(self) -> None:
        self._leaving: deque[HostCopy] = deque()
        self._newest: Callable[[], HostCopy | None] = lambda: None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def checkpoint(self, function: Callable[..., Any], hidden: Tensor, *others: Any, **_: Any) -> Any:
        """Runs `function(hidden, *others)` and keeps `hidden` on the host to run it again; `others`, which the layers
        share, stay where they are. What transformers passes on to PyTorch's checkpoint besides is fixed here."""
        if not torch.is_grad_enabled():
            return function(hidden, *others)
        # Only the checkpoint's own arguments are saved under these hooks: inside, its own hooks take their place.
        with saved_tensors_hooks(self._pack, self._unpack):
            return checkpoint(lambda x: function(x, *others), hidden, use_reentrant=False)

    def _pack(self, tensor: Tensor) -> Tensor | HostCopy:
        if tensor.numel() == 0:  # PyTorch's placeholder
            return tensor
        copy = HostCopy(tensor, self._copying(tensor), below=self._newest)
        self._newest = weakref.ref(copy)
        self._leaving.append(copy)
        if len(self._leaving) > IN_FLIGHT:
            self._leaving.popleft().leave()
        return copy

    def _unpack(self, packed: Tensor | HostCopy) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        self._leaving.clear()  # the backward pass has begun: the uppermost inputs are still here and may stay
        return packed.take()

    def _copying(self, tensor: Tensor) -> Copying:
        if not (tensor.is_cuda and has_values(tensor)):
            return Copying()
        if tensor.device not in self._streams:
            self._streams[tensor.device] = torch.cuda.Stream(tensor.device)
        return Copying(self._streams[tensor.device])


class Copying:
    """Copies beside the computation; without a stream, plain copies."""

    def __init__(self, stream: torch.cuda.Stream | None = None) -> None:
        self.stream = stream

    @property
    def pinned(self) -> bool:
        return self.stream is not None

    def start(self, source: Tensor, target: Tensor) -> torch.cuda.Event | None:
        """Copies after everything that was enqueued so far; the event is the end of the copy."""
        if self.stream is None:
            target.copy_(source)
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
        return self.stream.record_event()

    def wait(self, event: torch.cuda.Event | None) -> None:
        """What is enqueued from now on comes after the copy."""
        if event is not None:
            torch.cuda.current_stream(self.stream.device).wait_event(event)


class HostCopy:
    """One layer's input on its way to the host and back."""

    def __init__(self, tensor: Tensor, copying: Copying, below: Callable[[], HostCopy | None]) -> None:
        self._copying, self._below, self._device = copying, below, tensor.device
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=copying.pinned)
        self._on_device: Tensor | None = tensor
        self._copied = copying.start(tensor, self._host)

    def leave(self) -> None:
        """Gives the device's memory back; its next user comes after the copy."""
        self._copying.wait(self._copied)
        self._on_device = None

    def fetch(self) -> None:
        if self._on_device is None:
            # Allocated by the compute stream, which is also where it is used and freed.
            self._on_device = torch.empty(self._host.shape, dtype=self._host.dtype, device=self._device)
            self._copied = self._copying.start(self._host, self._on_device)

    def take(self) -> Tensor:
        """The tensor, on its device again; the one of the layer below is on its way then."""
        self.fetch()
        tensor, self._on_device = self._on_device, None
        self._copying.wait(self._copied)
        below = self._below()
        if below is not None:
            below.fetch()
        return tensor

    def __del__(self) -> None:
        self._copying.wait(self._copied)  # a graph that is dropped without backward may have a copy under way
