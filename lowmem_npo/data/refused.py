"""Rows that cannot be written: all of a set are told at once, by what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence

from lowmem_npo.errors import UserError
from lowmem_npo.sizes import counted, first_of

MOST = 5  # things that are wrong with some rows, in a message


class RowRefused(UserError):
    """A row that cannot be written, while others may be. The message begins with the row's place, `where`, and a
    colon."""

    def __init__(self, where: str, message: str) -> None:
        super().__init__(message)
        self.where, self.why = where, message.removeprefix(f"{where}: ")


def refuse_all(refused: Sequence[RowRefused], rows: int) -> None:
    """Raises UserError for those of so many rows that were refused, if there are any."""
    if len(refused) == 1:
        raise refused[0]
    if not refused:
        return
    places = dict[str, list[str]]()
    for one in refused:
        places.setdefault(one.why, []).append(one.where)
    told = sorted(places.items(), key=lambda item: -len(item[1]))
    lines = [f"{len(where)} of {counted(rows, 'row')} ({first_of(where)}): {why}" for why, where in told[:MOST]]
    if others := sum(len(where) for _, where in told[MOST:]):
        lines.append(f"{others} more cannot be written for other reasons.")
    raise UserError(" ".join(lines))
