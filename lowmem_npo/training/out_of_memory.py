"""A GPU that runs out of memory in a step: the micro-batches are halved, and the step is repeated.

Losses are shares of the whole step (`lowmem_npo.training.objective`), so that its rows' gradients add up to the same in
however many passes. Later steps keep to the smaller ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import reduce
from operator import add

import numpy as np
import torch
from torch import Tensor

from lowmem_npo.console import Say
from lowmem_npo.data.batching import Batch, Pick
from lowmem_npo.endings import is_out_of_memory
from lowmem_npo.files import load_json, write_atomically
from lowmem_npo.memory.exhausted import RandomState
from lowmem_npo.memory.release import release_memory
from lowmem_npo.run_directory import AdapterFiles


class DividedSteps:
    """Runs an optimiser step's micro-batches, in parts once memory has run out.

    Every process divides for itself: before its last micro-batch is done none waits for another.

    collated: makes a micro-batch of rows.
    together: how many forget rows are never parted: a row and its other answer, if it has any.
    size: rows of a micro-batch.
    """

    def __init__(self, collated: Callable[[list[Pick]], Batch], together: int, size: int, say: Say) -> None:
        self._collated, self._size, self._say = collated, size, say
        self._together = {"forget": together, "retain": 1}
        self.parts = 1  # of each micro-batch; a power of two
        self._step: list[Batch] = []  # its micro-batches so far
        self._begun = RandomState.now()  # as it was before them

    def begin(self) -> None:
        """A step begins."""
        self._step = []

    def run(self, batch: Batch, passes: Callable[[Batch], Tensor], restart: Callable[[], None], step: int) -> Tensor:
        """Runs the step's next micro-batch; returns its loss, detached.

        passes: adds the gradients of a micro-batch, or of a part of one, to the weights'; returns its loss, detached.
        restart: drops the gradients and figures of the step.
        step: its number, from 1, for the message.

        Raises:
            torch.OutOfMemoryError: a single row is too much.
        """
        if not self._step:
            self._begun = RandomState.now()
        self._step.append(batch)
        again = [batch]
        while True:
            try:
                return [reduce(add, map(passes, self.divided(one))) for one in again][-1]
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if not self._can_divide():
                    raise torch.OutOfMemoryError(str(error)) from error
            self.parts *= 2
            restart()
            self._begun.restore()
            release_memory()
            again = self._step
            rows = max(len(self._units(part, "forget")) for one in self._step for part in self.divided(one))
            self._say(
                f"The GPU ran out of memory in step {step}: the step is repeated, to the same gradient, with each "
                f"micro-batch in {self.parts} parts, and later steps stay so; --micro-batch-size {rows} begins so."
            )

    def divided(self, batch: Batch) -> list[Batch]:
        """The parts of a micro-batch, as even as can be; forget and retain rows no longer share a pass."""
        if self.parts == 1:
            return [batch]
        rows = [np.array_split(self._units(batch, part), self.parts) for part in self._together]
        picks = [
            [Pick(part, int(row)) for part, units in zip(self._together, own, strict=True) for row in units.flat]
            for own in zip(*rows, strict=True)
        ]
        return [{**self._collated(own), "both": None} for own in picks]

    def _units(self, batch: Batch, part: str) -> np.ndarray:
        """(U, together) rows of a part."""
        rows = batch[part]
        return np.array(rows.rows if rows else (), dtype=np.int64).reshape(-1, self._together[part])

    def _can_divide(self) -> bool:
        if self.parts == 1 and any(batch["both"] for batch in self._step):
            return True
        return max(len(self._units(batch, part)) for batch in self._step for part in self._together) > self.parts

    def save(self, files: AdapterFiles, parts: Sequence[int]) -> None:
        """Notes in a checkpoint how the processes divide micro-batches; nothing if none does. parts: of each."""
        files.micro_batch_parts.unlink(missing_ok=True)  # of an earlier time
        if max(parts) > 1:
            write_atomically(files.micro_batch_parts, json.dumps({"micro_batch": self._size, "parts": list(parts)}))

    def resume(self, files: AdapterFiles, rank: int, processes: int) -> None:
        """Goes on as in a checkpoint, unless the micro-batches or the processes are others now."""
        if not files.micro_batch_parts.exists():
            return
        saved = load_json(files.micro_batch_parts)
        if saved["micro_batch"] == self._size and len(saved["parts"]) == processes:
            self.parts = saved["parts"][rank]
