"""Rows that stand in both parts: the run would be told to forget and to keep the same thing."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from lowmem_npo.data.schemas import Example
from lowmem_npo.errors import UserError

NAMED = 5


def find_overlap(forget: Sequence[Example], retain: Sequence[Example]) -> list[tuple[Example, Example]]:
    """Each forget example that also stands in retain, with the first retain example that is the same.

    The same is the same text, whatever its case, white space, Unicode form and division into prompt and answer.
    """
    kept: dict[str, Example] = {}
    for example in retain:
        kept.setdefault(_normalised(example), example)
    return [(example, kept[key]) for example in forget if (key := _normalised(example)) in kept]


def refuse_overlap(
    forget: Sequence[Example], retain: Sequence[Example], *, of: str = "forget", part: str = "retain"
) -> None:
    """Raises UserError, naming the rows, if any stands in both parts. `of` and `part` are what the parts are called."""
    pairs = find_overlap(forget, retain)
    if not pairs:
        return
    named = "; ".join(f"{one.where} is {other.where}" for one, other in pairs[:NAMED])
    more = f" and {len(pairs) - NAMED} more" if len(pairs) > NAMED else ""
    rows = f"1 row to {of} also stands" if len(pairs) == 1 else f"{len(pairs)} rows to {of} also stand"
    where = "the holdout" if part == "holdout" else f"the rows to {part}"
    raise UserError(f"{rows} in {where}: {named}{more}; remove them from one of the two, or give --allow-overlap.")


def _normalised(example: Example) -> str:
    if example.messages is not None:
        parts = [turn["content"] for turn in example.messages]
    else:
        parts = [example.prompt or "", example.answer]
    return " ".join(unicodedata.normalize("NFKC", " ".join(parts)).casefold().split())
