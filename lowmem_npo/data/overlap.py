"""Rows that are in both parts: the run would have to forget and to keep the same thing."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from lowmem_npo.data.schemas import Example
from lowmem_npo.errors import UserError

MAX_LISTED = 5


def find_overlap(forget: Sequence[Example], retain: Sequence[Example]) -> list[tuple[Example, Example]]:
    """Each forget example that is also in retain, with the first retain example that is the same.

    The same means the same text, whatever its case, whitespace, Unicode form and division into prompt and answer.
    """
    kept: dict[str, Example] = {}
    for example in retain:
        kept.setdefault(_normalised(example), example)
    return [(example, kept[key]) for example in forget if (key := _normalised(example)) in kept]


def refuse_overlap(
    forget: Sequence[Example], retain: Sequence[Example], *, of: str = "forget", part: str = "retain"
) -> None:
    """Raises UserError, naming the rows, if any is in both parts. `of` and `part` are the names of the parts."""
    pairs = find_overlap(forget, retain)
    if not pairs:
        return
    listed = "; ".join(f"{one.where} is {other.where}" for one, other in pairs[:MAX_LISTED])
    more = f" and {len(pairs) - MAX_LISTED} more" if len(pairs) > MAX_LISTED else ""
    rows = f"1 row to {of} is" if len(pairs) == 1 else f"{len(pairs)} rows to {of} are"
    where = "the holdout" if part == "holdout" else f"the rows to {part}"
    raise UserError(f"{rows} also in {where}: {listed}{more}; remove them from either, or give --allow-overlap.")


def _normalised(example: Example) -> str:
    if example.messages is not None:
        parts = [turn["content"] for turn in example.messages]
    else:
        parts = [example.prompt or "", example.answer]
    return " ".join(unicodedata.normalize("NFKC", " ".join(parts)).casefold().split())
