"""Sentences on a mistyped option or value, with what was meant."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from lowmem_npo.ranges import shortened

LISTED = 16  # choices that a sentence names


def no_such_option(flag: str, known: Sequence[str], listing: str) -> str:
    """listing: the command that prints what there is."""
    near = difflib.get_close_matches(flag, known, n=1, cutoff=0.75)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"There is no option {shortened(flag)}: {hint}`lowmem-npo {listing}` lists them."


def one_of(flag: str, value: str, choices: Sequence[str]) -> str:
    """The value of `flag` is none of its choices: which they are, or where there are many, which are near."""
    near = difflib.get_close_matches(value, choices, n=3, cutoff=0.6)
    meant = f"; did you mean {' or '.join(near[: 1 if len(choices) <= LISTED else 3])}?" if near else "."
    if len(choices) <= LISTED:
        return f"{flag} must be one of {', '.join(choices)}, not '{shortened(value)}'{meant}"
    some = "" if near else f"; there are {', '.join(choices[:LISTED])} and others"
    return f"{flag} has no such value as '{shortened(value)}'{some}{meant}"
