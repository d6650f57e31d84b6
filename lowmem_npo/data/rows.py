"""The rows of a source, each with a location for messages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any


@dataclass(frozen=True)
class Rows:
    """The rows of one source, in its order.

    name: what messages call the source (the path or hub name as the user wrote it).
    rows: one dictionary per row, column name to value.
    lines: the line (from 1) each row begins in, or None for sources without lines.
    places: where each row is, for sources whose rows have neither lines nor numbers.
    mixed: whether each row has columns of its own, among them `continues` where its text goes on after the row: so in
        what this package makes of documents, and in its general texts.
    notes: remarks on how the source was read.
    files: of several tables, the name of each and how many of the rows are its own: each has columns of its own.
    """

    name: str
    rows: list[dict[str, Any]]
    lines: list[int] | None = None
    places: list[str] | None = None
    mixed: bool = False
    notes: tuple[str, ...] = ()
    files: tuple[tuple[str, int], ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def columns(self) -> list[str]:
        """Every column that any row has, in order of appearance."""
        return list(dict.fromkeys(column for row in self.rows for column in row))

    def by_file(self) -> list[Rows]:
        """The rows of each file, in order; these themselves, where they are of one."""
        if not self.files:
            return [self]
        ends = list(accumulate(number for _, number in self.files))
        parts = [slice(end - number, end) for (_, number), end in zip(self.files, ends, strict=True)]
        return [
            replace(self, name=name, rows=self.rows[part], places=self.places and self.places[part], files=())
            for (name, _), part in zip(self.files, parts, strict=True)
        ]

    def first(self, number: int | None) -> Rows:
        """The first `number` rows of one source, all for None."""
        lines, places = self.lines and self.lines[:number], self.places and self.places[:number]
        return replace(self, rows=self.rows[:number], lines=lines, places=places)

    def where(self, index: int) -> str:
        """The location of row `index` (from 0), counted from 1: "forget.jsonl, line 3" or "forget.parquet, row 3"."""
        if self.places is not None:
            return self.places[index]
        return f"{self.name}, row {index + 1}" if self.lines is None else f"{self.name}, line {self.lines[index]}"


def joined(name: str, parts: Sequence[Rows]) -> Rows:
    """The rows of all `parts`, one after the other."""
    rows, notes = [row for part in parts for row in part.rows], tuple(note for part in parts for note in part.notes)
    places = [part.where(index) for part in parts for index in range(len(part))]
    mixed = any(part.mixed for part in parts)
    files = () if mixed else tuple((part.name, len(part)) for part in parts)
    return Rows(name, rows, places=places, mixed=mixed, notes=notes, files=files)


def is_text(value: Any) -> bool:
    """Whether all strings in `value` can be written as UTF-8, which half a surrogate pair cannot."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
