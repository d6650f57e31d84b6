"""What stays together where rows are divided: the folds of `--layered`, the halves of `--forget-level holdout`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from lowmem_npo.data import TokenizedRow, TokenizedRows
from lowmem_npo.data.tokenized_rows import KnownByIds, KnownByText
from lowmem_npo.errors import UserError
from lowmem_npo.training.layered import divide


def divided(rows: int, folds: int, seed: int, groups: Callable[[int], Sequence[Hashable]]) -> list[list[int]]:
    """As `divide`, by `groups` where no document is larger than one of so many parts of all rows: documents are cut in
    more places where the folds would not be even else, and where that makes them more even.

    Raises UserError as `divide` does.
    """
    results: list[list[list[int]]] = []
    for parts in (folds, 2 * folds, 4 * folds):
        try:
            results.append(divide(rows, folds, seed, groups(parts)))
        except UserError:  # there may be fewer parts than folds
            if parts == 4 * folds and not results:
                raise
            continue
        if _uneven(results[-1]) <= max(1, rows // (8 * folds)):
            break
    return min(results, key=_uneven)  # the first of equals, which is cut in the fewest places


def _uneven(folds: Sequence[Sequence[int]]) -> int:
    """How many rows the largest fold has more than the smallest."""
    sizes = [*map(len, folds)]
    return max(sizes) - min(sizes)


def groups_of(rows: Sequence[TokenizedRow], known: TokenizedRows | KnownByIds, parts: int) -> list[Hashable]:
    """What each row stays together with, or half of it would be forgotten while the other half is held: rows that say
    the same, with the true answers of `known`, then those about one subject, where a column names it, and consecutive
    passages of a document, which overlap, up to one of so many parts of all rows. Where no text is known, rows of
    the same ids say the same.
    """
    if isinstance(known, KnownByIds):
        if not isinstance(rows, TokenizedRows):
            return [("ids", fact) for fact in known.facts]
        known = rows
    examples = rows.examples if isinstance(rows, TokenizedRows) else known.examples
    subjects: dict[int, str] = {}
    for fact, example in zip(known.facts, examples, strict=True):
        if example.group is not None:
            subjects.setdefault(fact, example.group)
    runs = runs_of(known, parts)
    return [
        ("group", subjects[fact]) if fact in subjects else ("run", run)
        for fact, run in zip(known.facts, runs, strict=True)
    ]


def runs_of(rows: KnownByText, parts: int) -> list[int]:
    """The run of each row, which its first row names: of all rows that share text, or pieces of these, such as long
    documents, that are no larger than one of so many parts of all rows; rows that say the same are in one."""
    from scipy.sparse import coo_array  # late: most runs do without
    from scipy.sparse.csgraph import connected_components

    number = len(rows.facts)
    near = [(row, other) for row, others in rows.near.items() for other in others]
    links = coo_array((np.ones(len(near)), tuple(np.array(near).reshape(-1, 2).T)), shape=(number, number))
    _, document = connected_components(links, directed=False)
    facts: dict[int, list[int]] = {}
    for place in dict.fromkeys(rows.facts):
        facts.setdefault(document[place], []).append(place)
    sizes, runs = Counter(document), dict[int, int]()
    for of, its_facts in facts.items():
        pieces = min(len(its_facts), math.ceil(sizes[of] * parts / number))
        for piece in np.array_split(its_facts, pieces):
            runs |= dict.fromkeys(piece.tolist(), int(piece[0]))
    return [runs[fact] for fact in rows.facts]


def split_texts(rows: TokenizedRows, folds: Sequence[Sequence[int]]) -> int:
    """How many rows share text with one of another fold."""
    fold_of = {row: number for number, fold in enumerate(folds) for row in fold}
    return sum(any(fold_of[row] != fold_of[other] for other in others) for row, others in rows.near.items())
