"""Forget and retain rows in one micro-batch: the dataset that holds both, and the collator that pads them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from lowmem_kernels import IGNORE_INDEX
from torch.utils.data import Dataset

from lowmem_npo.data.tokenizing import TokenizedRow

Batch = dict[str, dict[str, torch.Tensor] | None]


class Pick(NamedTuple):
    """One row of one part: what `StepBatches` yields and `ForgetRetain` is indexed by."""

    part: str  # "forget" or "retain"
    row: int


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
    """A function that pads each part of a micro-batch on the right, to the part's longest row.

    It takes what `ForgetRetain` gives and returns {"forget": part, "retain": part}, or None for "retain" where
    with_retain is False. A part is a dictionary of int64 tensors, with 0 rows where the micro-batch has none:

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
    labels = torch.full_like(ids, IGNORE_INDEX)
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[index, :length] = torch.tensor(row["input_ids"])
        mask[index, :length] = 1
        labels[index, :length] = torch.tensor(row["labels"])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
