"""A figure of an evaluation, with what it means and what is wished of it: as tables and reports show it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any


@dataclass(frozen=True)
class Figure:
    """set: of which rows, or None. key: where it is in the file it comes from. value: None where it was not measured or
    is no finite number. wish: what it should be. meaning: a sentence or two. needs: what would measure it."""

    set: str | None
    key: str
    title: str
    value: float | None
    wish: str
    meaning: str
    needs: str = ""


def at(content: Any, *path: str) -> float | None:
    """The number at `path` in the content of a result file; None where there is none, or no finite one."""
    for key in path:
        content = content.get(key) if isinstance(content, Mapping) else None
    return finite(content)


def finite(value: Any) -> float | None:
    """`value` if it is a number that JSON can hold, and a float, else None."""
    return value if isinstance(value, int | float) and abs(value) <= sys.float_info.max else None


def formatted(value: float | None, missing: str = "–", decimals: int = 3) -> str:
    """A figure for people: with so many `decimals`, or two digits where those would show nothing."""
    if value is None:
        return missing
    if value == 0 or not abs(value) < 10**-decimals:
        return f"{value:.{decimals}f}"
    return f"{value:.2g}" if abs(value) >= 0.001 else f"{value:.1e}"


def side_by_side(values: Sequence[float | None], missing: str = "–", decimals: int = 3) -> list[str]:
    """Figures that are read beside each other: with more than `decimals` where others would print different ones alike,
    one far from what it is, or, where none is above 1, one below 1 as 1, which of a share is all.

    >>> side_by_side([0.008, 0.013], decimals=2)
    ['0.008', '0.013']
    """
    ways = [partial(formatted, missing=missing, decimals=count) for count in range(decimals, decimals + 4)]
    return _apart(ways, values)


def shares(*values: float) -> list[str]:
    """The same of numbers between 0 and 1, in per cent: 0% is none and 100% all, as far as five digits show it."""
    return _apart([f"{{:.{decimals}%}}".format for decimals in range(4)], values)


def _apart(ways: Sequence[Callable[[Any], str]], values: Sequence[float | None]) -> list[str]:
    """`values`, written in the first way that keeps them apart, and shares below 1 from 1 if one does; in the first if
    none does."""
    different = {value for value in values if value is not None and math.isfinite(value)}
    apart = [write for write in ways if _keeps_apart(write, different)]
    if max(different, default=0) <= 1:
        apart = [*(w for w in apart if not any(value < 1 <= _number(w(value)) for value in different)), *apart]
    return [[*apart, *ways][0](value) for value in values]


def _keeps_apart(write: Callable[[Any], str], different: Collection[float]) -> bool:
    texts = {value: write(value) for value in different}
    close = (math.isclose(value, _number(text), rel_tol=0.1) for value, text in texts.items())
    return len(set(texts.values())) == len(different) and all(close)


def _number(text: str) -> float:
    return float(text.rstrip("%")) / (100 if text.endswith("%") else 1)


def aligned(header: Sequence[str], lines: Sequence[Sequence[str]], numeric: Sequence[str]) -> str:
    """A plain-text table; a first cell that repeats the one above is left blank, columns titled in `numeric` are
    aligned to the right."""
    table = [list(header), *map(list, lines)]
    widths = [max(len(line[column]) for line in table) for column in range(len(header))]
    printed, previous = [], None
    for line in table:
        cells = [line[0] if line[0] != previous else "", *line[1:]]
        columns = zip(cells, widths, header, strict=True)
        padded = [cell.rjust(width) if title in numeric else cell.ljust(width) for cell, width, title in columns]
        printed.append("  ".join(padded).rstrip())
        previous = line[0]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([printed[0], rule, *printed[1:]])


def table(now: Sequence[Figure], before: Sequence[Figure] | None = None) -> str:
    """Figures for a terminal, a line each: their values (before, if given, and after), and what is wished."""
    earlier = {(figure.set, figure.key): figure.value for figure in before or ()}
    stages = ["now"] if before is None else ["before", "after"]
    has_sets = any(figure.set for figure in now)
    lines = []
    for figure in now:
        values = [figure.value] if before is None else [earlier.get((figure.set, figure.key)), figure.value]
        cells = side_by_side(values, "missing") if len(values) > 1 else [formatted(values[0], "missing")]
        wish = figure.needs if figure.value is None and figure.needs else figure.wish
        lines.append([*([figure.set or ""] if has_sets else []), figure.title, *cells, wish])
    return aligned([*(["set"] if has_sets else []), "figure", *stages, "wished"], lines, stages)
