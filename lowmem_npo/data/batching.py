"""One optimiser step's forget and retain rows, and their split over micro-batches and ranks.

Which rows a step trains on is a pure function of the seed and the step, so a resumed run needs no saved sampler
state, and the union over micro-batches and ranks is the same however a step is split.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from lowmem_npo.data.tokenizing import IGNORED, TokenizedRow

FORGET, RETAIN = 0, 1  # streams of random numbers

Batch = dict[str, dict[str, torch.Tensor] | None]


class Pick(NamedTuple):
    """One row of one part: what the sampler yields and `ForgetRetain` is indexed by."""

    part: str  # "forget" or "retain"
    row: int


class StepBatches(Sampler[list[Pick]]):
    """One epoch of micro-batches for one rank; a `batch_sampler` for `torch.utils.data.DataLoader`.

    The forget set defines the epoch: ceil(num_forget / batch_size) optimiser steps, the last one perhaps short,
    shuffled anew each epoch. Every step also draws `retain_batch_size` retain rows, without replacement until all
    are used, then shuffled anew, across epochs. Each step gives exactly `micro_batches` micro-batches on every rank,
    sizes differing by one row at most; at a short last step some may be empty.

    num_forget, num_retain: rows of each part. No retain rows are drawn where num_retain or retain_batch_size is 0.
    batch_size, retain_batch_size: rows per optimiser step, over all micro-batches and ranks.
    seed: a non-negative integer; the only source of randomness.
    rank, world_size: which data-parallel process this is, of how many.
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
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        if rank >= world_size:
            raise ValueError(f"rank is {rank}; it must be less than world_size, which is {world_size}")
        self.num_forget, self.num_retain = num_forget, num_retain
        self.batch_size, self.retain_batch_size = batch_size, retain_batch_size
        self.micro_batches, self.seed = micro_batches, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_forget / self.batch_size)

    def __len__(self) -> int:
        """Micro-batches per epoch on this rank."""
        return self.steps_per_epoch * self.micro_batches

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration gives, from 0."""
        self.epoch = epoch

    def step_rows(self, step: int) -> tuple[list[int], list[int]]:
        """The forget and the retain rows of global step `step` (from 0), over all micro-batches and ranks."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        order = _order(self.seed, FORGET, epoch, self.num_forget)
        forget = order[step_in_epoch * self.batch_size : (step_in_epoch + 1) * self.batch_size]
        retain = []
        if self.num_retain:
            for draw in range(step * self.retain_batch_size, (step + 1) * self.retain_batch_size):
                turn, place = divmod(draw, self.num_retain)
                retain.append(int(_order(self.seed, RETAIN, turn, self.num_retain)[place]))
        return forget.tolist(), retain

    def micro_batch(self, step: int, index: int) -> list[Pick]:
        """This rank's micro-batch `index` of global step `step`."""
        share, shares = index * self.world_size + self.rank, self.micro_batches * self.world_size
        forget, retain = (np.array_split(rows, shares)[share].tolist() for rows in self.step_rows(step))
        return [Pick("forget", int(row)) for row in forget] + [Pick("retain", int(row)) for row in retain]

    def __iter__(self) -> Iterator[list[Pick]]:
        first = self.epoch * self.steps_per_epoch
        for step in range(first, first + self.steps_per_epoch):
            for index in range(self.micro_batches):
                yield self.micro_batch(step, index)


@lru_cache(maxsize=8)
def _order(seed: int, stream: int, turn: int, rows: int) -> np.ndarray:
    """(rows,) int64: the order of a part's rows in its `turn`-th pass."""
    return np.random.default_rng([seed, stream, turn]).permutation(rows)


class ForgetRetain(Dataset):
    """Both parts as one map-style dataset, indexed by `Pick`. `retain` is None where there is nothing to keep."""

    def __init__(self, forget: Sequence[TokenizedRow], retain: Sequence[TokenizedRow] | None = None):
        self.forget, self.retain = forget, retain

    def __len__(self) -> int:
        """Forget rows: they define the epoch."""
        return len(self.forget)

    def __getitem__(self, pick: Pick) -> tuple[Pick, TokenizedRow]:
        return pick, getattr(self, pick.part)[pick.row]


def collator(
    pad_token_id: int | None, *, with_retain: bool = True, pad_to_multiple_of: int = 1
) -> Callable[[list[tuple[Pick, TokenizedRow]]], Batch]:
    """A function that pads a micro-batch to its longest row, on the right, each part by itself.

    It takes what `ForgetRetain` gives and returns {"forget": part, "retain": part}, or None for "retain" where
    with_retain is False. A part is a dictionary of int64 tensors, of 0 rows where the micro-batch has none:

        input_ids       (B, S)  padded with pad_token_id (0 for a tokenizer without one: padding is masked anyway)
        attention_mask  (B, S)  1 for tokens, 0 for padding
        labels          (B, S)  not shifted; -100 where not labelled
        row             (B,)    the row's index in its part, from 0
    """
    # A partial, not a closure: worker processes must be able to unpickle it.
    return partial(_collate, pad_token_id or 0, with_retain, pad_to_multiple_of)


def _collate(
    pad_token_id: int, with_retain: bool, pad_to_multiple_of: int, items: list[tuple[Pick, TokenizedRow]]
) -> Batch:
    batch: Batch = {"forget": None, "retain": None}
    for part in ("forget", "retain") if with_retain else ("forget",):
        rows = [row for pick, row in items if pick.part == part]
        batch[part] = {
            **_pad(rows, pad_token_id, pad_to_multiple_of),
            "row": torch.tensor([pick.row for pick, _ in items if pick.part == part], dtype=torch.int64),
        }
    return batch


def _pad(rows: list[TokenizedRow], pad_token_id: int, multiple: int) -> dict[str, torch.Tensor]:
    width = math.ceil(max((len(row["input_ids"]) for row in rows), default=0) / multiple) * multiple
    ids = torch.full((len(rows), width), pad_token_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for place, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[place, :length] = torch.tensor(row["input_ids"])
        mask[place, :length] = 1
        labels[place, :length] = torch.tensor(row["labels"])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
