"""The flags that a leak test or a benchmark adds to `lowmem-npo evaluate`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, make_dataclass
from typing import Any

SET, FREE, BESIDE = "set", "free", "beside"  # metadata of a field


@dataclass
class Options:
    """Fields with defaults; a field's docstring is its help text."""

    def check(self) -> None:
        """Raises UserError for a value that does not fit."""


def check_declared(contract: type, kind: type) -> None:
    """Raises TypeError for a subclass of `contract` that leaves one of its attributes open: one that is annotated there
    and has no value."""
    if missing := [name for name in contract.__annotations__ if not hasattr(kind, name)]:
        raise TypeError(f"{kind.__name__} has no {' and no '.join(missing)}, which {contract.__name__} requires")


def data_set(name: str) -> Any:
    """An option that names a file of rows, which are measured as the set `name`; a resumed evaluation may add it."""
    return field(default=None, metadata={SET: name})


def read_beside() -> Any:
    """An option that names a file which is read beside the rows of a set, and is part of that set's digest."""
    return field(default=None, metadata={BESIDE: True})


def free(default: Any) -> Any:
    """An option that a resumed evaluation may change, since what was measured with it is not measured again."""
    return field(default=default, metadata={FREE: True})


def combined(name: str, parts: Iterable[type[Options]]) -> type[Options]:
    """One dataclass with the fields of all `parts`, in their order."""
    bases = tuple(part for part in dict.fromkeys(reversed(list(parts))) if part is not Options)
    return make_dataclass(name, [], bases=(*bases, Options))
