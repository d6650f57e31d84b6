"""Forget and retain rows in one micro-batch: the dataset of both, and the collator that makes passes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
from lowmem_kernels import IGNORE_INDEX
from torch import Tensor
from torch.utils.data import Dataset

from lowmem_npo.data.tokenized_rows import TokenizedRow


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


@dataclass(frozen=True)
class RowBatch:
    """Rows that go through a model in one pass, and where their answers are.

    Packed, the rows stand one after the other in (1, T) ids, T being their tokens; otherwise below each other in (B, S)
    ids, padded on the right. Rows of one length are never packed: a rectangle holds them without padding. With R = 1,
    C = T or R = B, C = S, and N answer tokens that are predicted, all int64 on one device:

        input_ids     (R, C)
        position_ids  (1, T)    of a token in its row, from 0; None unless packed
        boundaries    (B + 1,)  where rows begin and the last one ends; None unless packed
        answer_index  (N,)      of the hidden state that predicts a token, among the R C of the pass
        targets       (N,)      the tokens
        sequence      (N,)      their rows in the batch, ascending
    """

    data: Tensor  # all of the above, one after the other: one copy takes a batch to a device
    packed: bool
    lengths: tuple[int, ...]  # (B,) tokens of each row
    answers: tuple[int, ...]  # (B,) answer tokens of each row that are predicted
    rows: tuple[int, ...] = ()  # (B,) each row's index in its dataset, if it comes from one

    @classmethod
    def of(
        cls, rows: Sequence[TokenizedRow], *, pack: bool, pad_token_id: int = 0, indices: Sequence[int] = ()
    ) -> RowBatch:
        """A batch of `rows`, on the host; packed if `pack` and their lengths differ.

        A token counts if it is labelled and not the first of its row: position t is predicted from position t - 1.
        """
        lengths = tuple(len(row["input_ids"]) for row in rows)
        packed, width = pack and len(set(lengths)) > 1, max(lengths, default=0)
        starts = [0, *accumulate(lengths if packed else [width] * len(rows))]
        ids, positions, answers = list[int](), list[int](), list[int]()
        answer_index, targets, sequence = list[int](), list[int](), list[int]()
        for i, (row, start) in enumerate(zip(rows, starts, strict=False)):
            ids.extend(row["input_ids"])  # which += would add to an array of numbers, as a script may have
            if packed:
                positions += range(lengths[i])
            else:
                ids += [pad_token_id] * (width - lengths[i])
            labelled = [t for t, label in enumerate(row["labels"]) if t > 0 and label != IGNORE_INDEX]
            answer_index += [start + t - 1 for t in labelled]
            targets += [row["labels"][t] for t in labelled]
            sequence += [i] * len(labelled)
            answers.append(len(labelled))
        boundaries = starts if packed else []
        data = torch.tensor([*ids, *positions, *boundaries, *answer_index, *targets, *sequence], dtype=torch.int64)
        return cls(data, packed, lengths, tuple(answers), tuple(indices))

    @classmethod
    def whole(cls, ids: Tensor) -> RowBatch:
        """(B, S) int64 ids as rows without padding, of which every token but the first counts."""
        rows, width = ids.shape
        place = torch.arange(rows * width, device=ids.device).view(rows, width)
        parts = [ids, place[:, :-1], ids[:, 1:], place[:, :-1] // max(width, 1)]
        data = torch.cat([part.flatten() for part in parts])
        return cls(data, False, (width,) * rows, (width - 1,) * rows)

    def __len__(self) -> int:
        """B, rows."""
        return len(self.lengths)

    @property
    def num_answers(self) -> int:
        """N."""
        return sum(self.answers)

    @property
    def input_ids(self) -> Tensor:
        shape = (1, -1) if self.packed else (len(self), max(self.lengths, default=0))
        return self._part(0).view(shape)

    @property
    def position_ids(self) -> Tensor | None:
        return self._part(1)[None] if self.packed else None

    @property
    def boundaries(self) -> Tensor | None:
        return self._part(2) if self.packed else None

    @property
    def answer_index(self) -> Tensor:
        return self._part(-3)

    @property
    def targets(self) -> Tensor:
        return self._part(-2)

    @property
    def sequence(self) -> Tensor:
        return self._part(-1)

    def to(self, device: torch.device) -> RowBatch:
        """A copy on `device`; from pinned memory, the host goes on meanwhile."""
        return replace(self, data=self.data.to(device, non_blocking=True))

    def pin_memory(self) -> RowBatch:
        return replace(self, data=self.data.pin_memory())

    def _part(self, which: int) -> Tensor:
        tokens = sum(self.lengths) if self.packed else len(self) * max(self.lengths, default=0)
        beside = [tokens, len(self) + 1] if self.packed else []
        return self.data.split([tokens, *beside, *[self.num_answers] * 3])[which]


Batch = dict[str, RowBatch | None]


def collator(
    pad_token_id: int | None, *, with_retain: bool = True, pack: bool = False, joint_tokens: int = 0
) -> Callable[[list[tuple[Pick, TokenizedRow]]], Batch]:
    """A function that makes a `RowBatch` of each part of a micro-batch.

    It takes what `ForgetRetain` gives and returns {"forget": RowBatch, "retain": RowBatch, "both": RowBatch}, the first
    two without rows where the micro-batch has none. None for "retain" where with_retain is False; None for "both",
    which holds the rows of the former and then those of the latter, unless they are to go through the model together.

    Args:
        pad_token_id: fills short rows that are not packed; None: 0 does, since no token of a row sees what follows it.
        pack: whether the model can take rows packed (`lowmem_npo.model.packs_rows`).
        joint_tokens: the parts go through the model together if they have no more tokens than that.
    """
    # A partial, not a closure: worker processes must be able to unpickle it.
    return partial(_collate, pad_token_id or 0, with_retain, pack, joint_tokens)


def _collate(
    pad_token_id: int, with_retain: bool, pack: bool, joint_tokens: int, items: list[tuple[Pick, TokenizedRow]]
) -> Batch:
    def batch_of(*parts: str) -> RowBatch:
        own = [(pick.row, row) for part in parts for pick, row in items if pick.part == part]
        indices, rows = [index for index, _ in own], [row for _, row in own]
        return RowBatch.of(rows, pack=pack, pad_token_id=pad_token_id, indices=indices)

    batch: Batch = {"forget": batch_of("forget"), "retain": batch_of("retain") if with_retain else None, "both": None}
    if batch["forget"] and batch["retain"]:
        both = batch_of("forget", "retain")
        batch["both"] = both if both.input_ids.numel() <= joint_tokens else None
    return batch
