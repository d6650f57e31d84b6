"""Which rows an optimiser step trains on, and their split over micro-batches and ranks.

A step's rows are a pure function of the seed and the step, so a resumed run needs no saved sampler state, and the union
over micro-batches and ranks is the same however a step is split.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from torch.utils.data import Sampler

from lowmem_npo.data.batching import Pick

FORGET, RETAIN = 0, 1  # streams of random numbers


def num_steps(num_forget: int, batch_size: int, epochs: float, max_steps: int | None = None) -> int:
    """Optimiser steps of a run, as the Trainer counts them. max_steps: None or less than 1 if `epochs` decides."""
    if max_steps is not None and max_steps > 0:
        return max_steps
    return math.ceil(epochs * math.ceil(num_forget / batch_size))


class StepBatches(Sampler[list[Pick]]):
    """One epoch of micro-batches for one rank; a `batch_sampler` for `torch.utils.data.DataLoader`.

    The forget set defines the epoch: ceil(num_forget / batch_size) optimiser steps, the last one perhaps short,
    reshuffled each epoch. Every step also draws `retain_batch_size` retain rows, without replacement until all
    are used, then reshuffled, across epochs. Each step has exactly `micro_batches` micro-batches on every rank,
    whose sizes differ by one row at most; at a short last step some may be empty.

    num_forget, num_retain: rows of each part. No retain rows are drawn where num_retain or retain_batch_size is 0.
    batch_size, retain_batch_size: rows per optimiser step, over all micro-batches and ranks.
    alternatives: how many other answers each forget row has; they are the forget rows from num_forget on, first one of
        every row, then the next of every row. A micro-batch has each of its rows followed by one of them, another one
        in every epoch. Rows and sizes above are without them.
    seed: a non-negative integer; the only source of randomness.
    rank, world_size: which data-parallel process this is, and of how many.
    """

    def __init__(
        self,
        num_forget: int,
        num_retain: int,
        batch_size: int,
        retain_batch_size: int,
        micro_batches: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        alternatives: int = 0,
    ):
        for name, value, least in (
            ("num_forget", num_forget, 1),
            ("num_retain", num_retain, 0),
            ("batch_size", batch_size, 1),
            ("retain_batch_size", retain_batch_size, 0),
            ("micro_batches", micro_batches, 1),
            ("seed", seed, 0),
            ("world_size", world_size, 1),
            ("rank", rank, 0),
            ("alternatives", alternatives, 0),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        if rank >= world_size:
            raise ValueError(f"rank is {rank}; it must be less than world_size, which is {world_size}")
        self.num_forget, self.num_retain = num_forget, num_retain
        self.batch_size, self.retain_batch_size = batch_size, retain_batch_size
        self.micro_batches, self.seed = micro_batches, seed
        self.rank, self.world_size = rank, world_size
        self.alternatives = alternatives
        self.epoch = 0

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_forget / self.batch_size)

    def __len__(self) -> int:
        """Micro-batches per epoch on this rank."""
        return self.steps_per_epoch * self.micro_batches

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, from 0, that the next iteration yields."""
        self.epoch = epoch

    def forgotten(self, step: int) -> Sequence[int]:
        """The forget rows that are being forgotten at global step `step`: all of them."""
        return range(self.num_forget)

    def attack_began(self, step: int) -> int:
        """The global step before which the attacker began that is at work at global step `step`: each has its own."""
        return step

    def spared(self, step: int) -> Sequence[int]:
        """The forget rows that the attacker at work at global step `step` is never taught: those of the step."""
        return self.step_rows(step)[0]

    def step_rows(self, step: int) -> tuple[list[int], list[int]]:
        """The forget and the retain rows of global step `step` (from 0), over all micro-batches and ranks."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        order = order_of(self.num_forget, self.seed, FORGET, epoch)
        forget = order[step_in_epoch * self.batch_size : (step_in_epoch + 1) * self.batch_size]
        retain = []
        if self.num_retain:
            for draw in range(step * self.retain_batch_size, (step + 1) * self.retain_batch_size):
                turn, index = divmod(draw, self.num_retain)
                retain.append(int(order_of(self.num_retain, self.seed, RETAIN, turn)[index]))
        return forget.tolist(), retain

    def micro_batch(self, step: int, index: int) -> list[Pick]:
        """This rank's micro-batch `index` of global step `step`."""
        share, shares = index * self.world_size + self.rank, self.micro_batches * self.world_size
        forget, retain = (np.array_split(rows, shares)[share].tolist() for rows in self.step_rows(step))
        if self.alternatives:
            answers = self.num_forget * (1 + step // self.steps_per_epoch % self.alternatives)
            forget = [row for one in forget for row in (one, answers + one)]
        return [Pick("forget", int(row)) for row in forget] + [Pick("retain", int(row)) for row in retain]

    def __iter__(self) -> Iterator[list[Pick]]:
        first = self.epoch * self.steps_per_epoch
        for step in range(first, first + self.steps_per_epoch):
            for index in range(self.micro_batches):
                yield self.micro_batch(step, index)


@lru_cache(maxsize=64)
def order_of(rows: int, *stream: int) -> np.ndarray:
    """(rows,) int64: the order of rows that belongs to a seed, a stream, and a time."""
    return np.random.default_rng(stream).permutation(rows)
