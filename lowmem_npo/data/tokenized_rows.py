"""Rows as token ids and labels, their counts, and what is reported of them."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import TypedDict, overload

from lowmem_npo.data.example import Example
from lowmem_npo.data.overlap import first_alike, keys_of, sharing_text, texts_of
from lowmem_npo.sizes import counted

UNTHINKING = (
    "The model can think before it answers, and is asked without that: what it says after thinking is not measured."
)
IGNORE_INDEX = -100  # that of lowmem_kernels, which imports PyTorch


class _TokenizedRow(TypedDict):
    input_ids: list[int]  # prompt, answer and EOS
    labels: list[int]  # the same ids, -100 where not labelled
    prompt_length: int  # how many of the ids are the prompt, from which generation starts; 0 for text without one


class TokenizedRow(_TokenizedRow, total=False):
    """One row. Both lists are as long as the row."""

    cut: int  # how many ids truncation removed from the end of the answer, if it did


def num_predicted(row: TokenizedRow) -> int:
    """Labelled tokens but for the first, which nothing precedes that could predict it."""
    return sum(int(label != IGNORE_INDEX) for label in row["labels"][1:])  # of a script's arrays, NumPy's or PyTorch's


class _Rows(Sequence[TokenizedRow]):
    """Rows, and what is known of them beside."""

    rows: Sequence[TokenizedRow]

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> TokenizedRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenizedRow]: ...
    def __getitem__(self, index):  # a dataset's own slices are columns
        return [self.rows[i] for i in range(len(self))[index]] if isinstance(index, slice) else self.rows[index]


class KnownByText:
    """What is known of rows by their texts, whatever ids these become."""

    def __init__(self, examples: Sequence[Example]):
        self.examples = list(examples)

    @cached_property
    def facts(self) -> list[int]:
        """The first row that says what each does: one for rows that are the same, for the two forms of
        `--template both`, and for a passage as a completion and as a text."""
        return first_alike(
            [("row", example.where), *keys] for example, keys in zip(self.examples, keys_of(self.examples), strict=True)
        )

    @cached_property
    def near(self) -> dict[int, set[int]]:
        """Row -> the others that share text with it (`sharing_text`)."""
        return sharing_text(self.examples)


class TokenizedRows(KnownByText, _Rows):
    """All rows of one part (forget or retain), tokenised, in the order of their examples.

    max_length: the length rows were cut to.
    repeated: how many rows brought special tokens (a BOS, an EOS) that would be written anyway.
    literal: how many rows hold the text of a special token as text.
    positions: for how many tokens the model has positions, where that is known and rows were cut.
    unthinking: how many rows ask a model that can think for an answer without that.
    """

    def __init__(
        self,
        rows: list[TokenizedRow],
        examples: Sequence[Example],
        max_length: int,
        repeated: int = 0,
        literal: int = 0,
        positions: int | None = None,
        unthinking: int = 0,
    ):
        super().__init__(examples)
        self.rows, self.max_length = rows, max_length
        self.repeated, self.literal, self.positions, self.unthinking = repeated, literal, positions, unthinking

    def apart_from(self, others: Sequence[Example]) -> list[TokenizedRow]:
        """The rows that are the same as none of `others`, nor end like one."""
        held = {text for example in others for text in texts_of(example)}
        pairs = zip(self.rows, self.examples, strict=True)
        return [row for row, example in pairs if held.isdisjoint(texts_of(example))]

    @property
    def cut(self) -> list[int]:
        """How many tokens truncation removed from the end of each row."""
        return [row.get("cut", 0) for row in self.rows]

    @property
    def num_tokens(self) -> int:
        return sum(len(row["input_ids"]) for row in self.rows)

    @property
    def num_labels(self) -> int:
        return sum(label != IGNORE_INDEX for row in self.rows for label in row["labels"])

    @property
    def longest(self) -> int:
        """Tokens of the longest row, after truncation."""
        return max(len(row["input_ids"]) for row in self.rows)

    @property
    def num_truncated(self) -> int:
        return sum(cut > 0 for cut in self.cut)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all ids and labels: equal fingerprints, equal tensors. Depends on data, template and tokenizer."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(array("q", [len(row["input_ids"]), *row["input_ids"], *row["labels"]]).tobytes())
        return digest.hexdigest()

    def _advice(self) -> str:
        """What --max-length would keep of the rows that were cut: no longer one than the model has positions for."""
        whole = [len(row["input_ids"]) + cut for row, cut in zip(self.rows, self.cut, strict=True) if cut]
        if self.positions is None or max(whole) <= self.positions:
            return f"--max-length {max(whole)} would keep all"
        if self.positions <= self.max_length:
            return f"the model has positions for {self.positions} tokens, so that none is kept by a longer --max-length"
        kept = sum(length <= self.positions for length in whole)
        return (
            f"--max-length {self.positions}, the most that the model has positions for, would keep {kept} of the "
            f"{len(whole)} whole"
        )

    def report(self, part: str) -> list[str]:
        """What is called `part`, in lines for the user."""
        return [f"{part}: {line}" for line in (self.counts, *self.notes)]

    @property
    def counts(self) -> str:
        return (
            f"{counted(len(self), 'row')}, {self.num_tokens} tokens, {self.num_labels} of them labelled; the longest "
            f"row has {self.longest}"
        )

    @property
    def notes(self) -> list[str]:
        """A line each if rows were truncated, brought special tokens or hold the text of some."""
        lines = []
        if self.num_truncated:
            lines.append(
                f"{counted(self.num_truncated, 'row')} cut to {self.max_length} tokens, losing the last "
                f"{sum(self.cut)} tokens of their answers (EOS among them); {self._advice()}"
            )
        if self.repeated:
            lines.append(
                f"{counted(self.repeated, 'row')} with special tokens (BOS, EOS, end of turn) that are written "
                "anyway; each is written once"
            )
        if self.literal:
            lines.append(
                f"{counted(self.literal, 'row')} with the text of special tokens inside, such as "
                "<|endoftext|>; it is text there, not the token"
            )
        return lines


class KnownByIds(_Rows):
    """Rows of which nothing but their ids is known, such as a script's: those of the same ids say the same."""

    near: Mapping[int, set[int]] = MappingProxyType({})  # row -> the others that share text with it, as far as known

    def __init__(self, rows: Sequence[TokenizedRow]):
        self.rows = rows

    @cached_property
    def facts(self) -> list[int]:
        """The first row that says what each does, as of `TokenizedRows`."""
        return first_alike([tuple(map(int, self.rows[i]["input_ids"]))] for i in range(len(self)))
