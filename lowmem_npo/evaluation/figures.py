"""A figure of an evaluation, with what it means and what is wished of it: as tables and reports show it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    """`value` if it is a number that JSON can hold, else None."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def formatted(value: float | None, missing: str = "–") -> str:
    """A figure for people: three decimals, or two digits and a power of ten where those would show nothing."""
    if value is None:
        return missing
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.001 else f"{value:.1e}"


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
        cells = [formatted(value, "missing") for value in values]
        wish = figure.needs if figure.value is None and figure.needs else figure.wish
        lines.append([*([figure.set or ""] if has_sets else []), figure.title, *cells, wish])
    return aligned([*(["set"] if has_sets else []), "figure", *stages, "wished"], lines, stages)
