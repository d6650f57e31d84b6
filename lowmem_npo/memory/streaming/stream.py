"""The order in which layers come and go: two slots on the device, and what is in them.

A layer's slot is always the same, that of its parity, so that a tensor which autograd has saved in the forward pass is
the right one again when the layer is back for its backward pass. While a layer computes, its neighbour is copied into
the other slot: the one that came next the last time, at first l + 1 in a forward pass and l - 1 in a backward pass.
A wrong guess costs time, never a result: `visit` brings whatever is not there.

Nothing but these rules keeps it right, whatever the order of the visits, and if a pass ends in its middle:

- a copy begins after all computation that was enqueued before it, all reads of the slot among them;
- a visit makes the computation that follows wait for its layer's copy;
- the backward pass of a layer is enqueued before the visit of the next one. Its nodes are older than those of the layer
  above and younger than those of the layer below, and all that read its weights lead to its input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowmem_npo.memory.streaming.bus import Bus
from lowmem_npo.memory.streaming.in_files import FileBlock

Visit = tuple[int, str]  # a layer, and in which pass


class WeightStream:
    """Brings layers' blocks of host memory into two slots of device memory.

    Args:
        blocks: (bytes,) uint8 of each layer, in host memory, or whatever else the bus copies.
        slots: two of them, (bytes,) uint8 on the device.
    """

    def __init__(self, blocks: Sequence[Tensor | FileBlock], slots: Sequence[Tensor], bus: Bus) -> None:
        self.blocks, self.slots, self.bus = blocks, slots, bus
        self.copied_bytes = 0
        self._there: list[int | None] = [None, None]  # the layer whose copy into the slot was enqueued last
        self._arriving: list[Any] = [None, None]  # its event in a tuple, until the computation waits for it
        self._now: Visit | None = None
        self._followed: dict[Visit, int] = {}

    def visit(self, layer: int) -> None:
        """From now on, what is enqueued finds the layer's weights in its slot; its neighbour is on its way."""
        now = layer, _pass()
        stays = now == self._now or (now[1] == "no gradient" and self._now == (layer, "forward"))  # in lock-step
        if stays and self._there[layer % 2] == layer and self._arriving[layer % 2] is None:
            return
        if self._now is not None:
            self._followed[self._now] = layer
        self._now = now
        self._bring(layer)
        if (arriving := self._arriving[layer % 2]) is not None:
            self._there[layer % 2] = self._arriving[layer % 2] = None  # of a failed copy, the error is not kept
            self.bus.wait(*arriving)
            self._there[layer % 2] = layer
        following = self._followed.get(now, self._neighbour(*now))
        if (following - layer) % 2 and 0 <= following < len(self.blocks):
            self._bring(following)

    def _bring(self, layer: int) -> None:
        """Enqueues the copy of a layer that is not in its slot yet."""
        place, block = layer % 2, self.blocks[layer]
        if self._there[place] == layer:
            return
        self._there[place] = self._arriving[place] = None  # until the copy is enqueued
        self._arriving[place] = (self.bus.copy(block, self.slots[place][: len(block)], self.bus.computed()),)
        self._there[place] = layer
        self.copied_bytes += len(block)

    def _neighbour(self, layer: int, in_pass: str) -> int:
        top = layer == len(self.blocks) - 1
        return layer - 1 if in_pass == "backward" or (top and in_pass == "forward") else layer + 1


def _pass() -> str:
    if torch._C._current_graph_task_id() != -1:
        return "backward"  # a layer that is recomputed included
    return "forward" if torch.is_grad_enabled() else "no gradient"
