"""Measurements in pieces: each is written down as soon as it is made, and made only once.

The file of the results is the journal: {"pieces": {name: figures}, ...}, written whole after every piece under another
name and then renamed. A later call goes on with what is missing, on another day or machine too.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from benchmarks.shared import record
from lowmem_npo.errors import UserError

Figures = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """What is measured of one model in one go. name: method/seed-N/part. flags: of the method."""

    name: str
    flags: str
    make: Callable[[], Figures]


@dataclass(frozen=True)
class Limits:
    """Which pieces a call makes. only: patterns of names, none: all. minutes: after which no piece begins."""

    only: Sequence[str] = ()
    minutes: float | None = None


def make_pieces(
    pieces: Iterable[Piece], path: Path, benchmark: str, setting: Figures, summarise: Callable[[Figures], Figures],
    limits: Limits = Limits(),
) -> Figures:  # fmt: skip
    """Makes the pieces that `path` does not hold yet, in order, as far as `limits` go; what it then holds.

    setting: of all pieces, written beside them. summarise: what "results" becomes.

    Raises:
        UserError: `path` holds pieces of another setting, or of a method with other flags; a pattern names no piece.
    """
    known, begin, pieces = known_pieces(path, setting), time.monotonic(), list(pieces)
    for pattern in limits.only:
        if not any(fnmatch(piece.name, pattern) for piece in pieces):
            raise UserError(f"--pieces {pattern}: there is none of this name; --list names them.")
    for piece in pieces:
        if known.get(piece.name, {}).get("flags", piece.flags) != piece.flags:
            raise UserError(
                f"'{path}' holds {piece.name} of another method, {known[piece.name]['flags'] or 'without flags'}: give "
                "yours another name."
            )
        if piece.name in known or (limits.only and not any(fnmatch(piece.name, only) for only in limits.only)):
            continue
        if limits.minutes is not None and time.monotonic() - begin > 60 * limits.minutes:
            print(f"{limits.minutes:g} minutes are over; the same command goes on with {piece.name}", flush=True)
            break
        print(piece.name, end=": ", flush=True)
        started = time.process_time()
        figures = piece.make()
        seconds = round(time.process_time() - started, 1)
        known[piece.name] = {**figures, "flags": piece.flags, "cpu_seconds": seconds, "commit": record.commit()}
        print(f"{seconds} s of the processor", flush=True)
        record.write(path, benchmark, summarise(known), setting=setting, pieces=known)
    return known


def known_pieces(path: Path, setting: Figures) -> Figures:
    """Raises UserError where they were measured in another setting."""
    if not path.exists():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    then, now = content["setting"], json.loads(json.dumps(setting))
    if others := [name for name in {**then, **now} if then.get(name) != now.get(name)]:
        raise UserError(
            f"'{path}' holds pieces of another setting ({', '.join(others)}): name another file with --out, or remove "
            "it."
        )
    return content["pieces"]
