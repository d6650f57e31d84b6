"""Amounts of memory, and numbers of things, as people write and read them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lowmem_npo.errors import UserError

UNITS = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


def parse_size(text: str, option: str) -> int:
    """Bytes in "24GiB", "24 GB" or "800MiB".

    Raises:
        UserError: not a positive number with a unit; the message names `option`.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text.lower())
    if match is None or match[2] not in UNITS or not float(match[1]):
        raise UserError(f"{option} {text}: give a positive number and a unit, such as 24GiB, 24GB or 800MiB.")
    return int(float(match[1]) * UNITS[match[2]])


def amount(size: int) -> str:
    """For people, in the largest unit of which there is one: "5.4 GiB", "64.0 MiB"."""
    return _in_unit(size, _unit_of(size), 1)


def compared(*sizes: int, decimals: int = 1) -> list[str]:
    """Amounts of which one is too large for another, with as many more decimals as show it: in one unit, if they are
    near each other."""
    near = 2 * min(sizes) > max(sizes)
    units = [_unit_of(max(sizes) if near else size) for size in sizes]
    written = ([_in_unit(*of, count) for of in zip(sizes, units, strict=True)] for count in range(decimals, 11))
    return next(texts for texts in written if len(set(texts)) == len(set(sizes)))


def _unit_of(size: int) -> str:
    return next((unit for unit in ("GiB", "MiB", "KiB") if size >= UNITS[unit.lower()]), "bytes")


def _in_unit(size: int, unit: str, decimals: int) -> str:
    return f"{size} {unit}" if unit == "bytes" else f"{size / UNITS[unit.lower()]:.{decimals}f} {unit}"


def counted(number: int, what: str) -> str:
    """Such as "1 row" and "1,200 rows"."""
    return f"{number:,} {what}{'s' if number != 1 else ''}"


def first_of(items: Sequence[str], most: int = 5, separator: str = "; ") -> str:
    """Items for a line: of more than `most` the first ones, and how many more there are."""
    more = len(items) - most
    return separator.join(items[:most]) + (f" and {more:,} more" if more > 0 else "")


def gib(size: int) -> str:
    """For people, such as "5.43 GiB"."""
    return f"{size / 2**30:.2f} GiB"
