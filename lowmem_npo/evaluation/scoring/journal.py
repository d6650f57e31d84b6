"""What a long evaluation has measured so far, written down as it comes: an interrupted one goes on from there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lowmem_npo.evaluation.scoring.batching import BATCH_SIZE, MAX_BATCH_TOKENS, batches
from lowmem_npo.evaluation.scoring.eval_mode import progress_bar


class Journal:
    """A file of JSON lines, one per batch: {"part": ..., "rows": [...], "values": [...]}.

    path: the file; what it holds counts as measured. A last line that was cut off by a kill is dropped. None: what
        is measured is kept in memory only.
    progress: whether to draw a bar of the rows.
    """

    def __init__(self, path: Path | None, *, progress: bool = True) -> None:
        self.path, self.progress = path, progress
        self._known: dict[str, dict[int, Any]] = {}
        if path is not None and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        for line in content[:whole].split(b"\n")[:-1]:
            try:
                entry = json.loads(line)
                values = dict(zip(entry["rows"], entry["values"], strict=True))
                self._known.setdefault(entry["part"], {}).update(values)
            except (ValueError, TypeError, KeyError, RecursionError):
                continue  # damaged: measured again
        os.truncate(path, whole)

    def known(self, part: str) -> dict[int, Any]:
        """The values of `part` that are written down, by row."""
        return self._known.get(part, {})

    def write(self, part: str, rows: Sequence[int], values: Sequence[Any]) -> None:
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8", opener=_private) as file:
                entry = {"part": part, "rows": list(rows), "values": list(values)}
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self._known.setdefault(part, {}).update(zip(rows, values, strict=True))

    def measured(
        self,
        part: str,
        lengths: Sequence[tuple[int, int]],
        measure: Callable[[list[int]], Sequence[Any]],
        *,
        batch_size: int = BATCH_SIZE,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
    ) -> list[Any]:
        """One value per row, in order: from the journal if it holds the whole batch, else from `measure`.

        lengths: each row's (prompt tokens, further tokens), from which `batches` makes the batches.
        measure: takes the rows of one batch and gives as many values, which JSON can hold.

        Batches do not depend on what is known already, so an interrupted evaluation computes what an uninterrupted one
        does.
        """
        with progress_bar(len(lengths), part, self.progress) as bar:
            for rows in batches(lengths, batch_size, max_batch_tokens):
                if not all(row in self.known(part) for row in rows):
                    self.write(part, rows, measure(rows))
                bar.update(len(rows))
        return [self.known(part)[row] for row in range(len(lengths))]


def _private(path: str, flags: int) -> int:
    """It may hold text of rows, in answers: nobody else reads it."""
    return os.open(path, flags, 0o600)
