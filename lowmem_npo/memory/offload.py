"""Checkpoints offloaded to host memory: the layers' inputs, which are all that a checkpointed pass keeps.

Each is copied to pinned memory on a side stream while the next layers compute, and fetched back, one layer ahead, while
the layer above is recomputed and differentiated. At any time the GPU holds at most `IN_FLIGHT` that are leaving, or one
in use and one arriving.

Why not an existing implementation: `save_on_cpu` of PyTorch and `activation_checkpointing_enable(offload=True)` of
transformers, which uses it, copy on the compute stream, so that every copy delays the pass. `OffloadActivations` of TRL
(from torchtune) has a side stream, but takes every tensor that any part of the graph saves, keeps five of them, and
fetches each only when it is needed, while the GPU waits. Unsloth's copies on the compute stream and needs reentrant
checkpointing, which passes no gradient to the adapters of a layer whose input needs none (the lowest adapted layer).
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
    """Checkpoints layers as `torch.utils.checkpoint` does, non-reentrant, with their inputs in host memory.

    On the CPU, and for simulated tensors, the allocations are the same and the copies synchronous.
    """

    def __init__(self) -> None:
        self._leaving: deque[HostCopy] = deque()
        self._newest: Callable[[], HostCopy | None] = lambda: None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def checkpoint(self, function: Callable[..., Any], hidden: Tensor, *others: Any, preserve_rng_state: bool) -> Any:
        """Runs `function(hidden, *others)` and keeps `hidden` on the host to run it again; `others`, which the layers
        share, stay where they are."""
        # Only the checkpoint's own arguments are saved under these hooks: inside, its own hooks take their place.
        with saved_tensors_hooks(self._pack, self._unpack):
            return checkpoint(
                lambda x: function(x, *others), hidden, use_reentrant=False, preserve_rng_state=preserve_rng_state
            )

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
        self._leaving.clear()  # the backward pass has begun: the topmost inputs are still on the device and may stay
        return packed.take()

    def _copying(self, tensor: Tensor) -> Copying:
        if not (tensor.is_cuda and has_values(tensor)):
            return Copying()
        if tensor.device not in self._streams:
            self._streams[tensor.device] = torch.cuda.Stream(tensor.device)
        return Copying(self._streams[tensor.device])


class Copying:
    """Copies that overlap with computation; without a stream, synchronous ones."""

    def __init__(self, stream: torch.cuda.Stream | None = None) -> None:
        self.stream = stream

    @property
    def pinned(self) -> bool:
        return self.stream is not None

    def start(self, source: Tensor, target: Tensor) -> torch.cuda.Event | None:
        """Copies after all work enqueued so far; the event marks the end of the copy."""
        if self.stream is None:
            target.copy_(source, non_blocking=True)  # which only a simulated GPU can tell
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
        return self.stream.record_event()

    def wait(self, event: torch.cuda.Event | None) -> None:
        """Makes all work enqueued from now on wait for the copy."""
        if self.stream is not None and event is not None:
            torch.cuda.current_stream(self.stream.device).wait_event(event)


class HostCopy:
    """One layer's input on its way to the host and back."""

    def __init__(self, tensor: Tensor, copying: Copying, below: Callable[[], HostCopy | None]) -> None:
        self._copying, self._below, self._device = copying, below, tensor.device
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=copying.pinned)
        self._on_device: Tensor | None = tensor
        self._copied = copying.start(tensor, self._host)

    def leave(self) -> None:
        """Frees the device memory, for work that comes after the copy."""
        self._copying.wait(self._copied)
        self._on_device = None

    def fetch(self) -> Tensor:
        if self._on_device is None:
            # Allocated on the compute stream, which also uses and frees it.
            self._on_device = torch.empty(self._host.shape, dtype=self._host.dtype, device=self._device)
            self._copied = self._copying.start(self._host, self._on_device)
        return self._on_device

    def take(self) -> Tensor:
        """The tensor, back on its device; starts to fetch that of the layer below."""
        tensor, self._on_device = self.fetch(), None
        self._copying.wait(self._copied)
        below = self._below()
        if below is not None:
            below.fetch()
        return tensor

    def __del__(self) -> None:
        self._copying.wait(self._copied)  # a graph that is dropped without backward may have a copy under way
