"""What a forget term trains on: the forgotten answers, or in their place a refusal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lowmem_npo.data.example import Example
from lowmem_npo.data.schemas import with_answer
from lowmem_npo.data.tokenized_rows import IGNORE_INDEX, TokenizedRow, TokenizedRows


def forget_targets(
    term: str, rows: TokenizedRows, refusal: str, tokenized: Callable[[Sequence[Example]], TokenizedRows]
) -> TokenizedRows:
    """The rows that the forget term `term` trains on: `rows` themselves, for `idk` the same prompts answered by
    `refusal`, and for `jensun` the answers as they are, labelled with the refusal's tokens over and over.

    tokenized: how examples become rows.

    Raises UserError for a row without a prompt where there must be a question to refuse.
    """
    if term == "idk":
        return tokenized(with_answer(rows.examples, refusal))
    if term == "jensun":
        refusing = tokenized(with_answer(rows.examples, refusal))
        labelled = [_relabelled(*one) for one in zip(rows, refusing, strict=True)]
        return TokenizedRows(labelled, rows.examples, rows.max_length, rows.repeated)
    return rows


def _relabelled(row: TokenizedRow, refusing: TokenizedRow) -> TokenizedRow:
    """`row`, each label of whose answer is the next of the refusal's tokens: what JensUn wants said after every
    beginning of the answer. The token that ends the refusal is left out, or it would be wanted every few tokens."""
    said = refusing["input_ids"][refusing["prompt_length"] :]
    said = said[:-1] or said  # of a refusal that --max-length cut, one token may be all there is
    labels, place = list(row["labels"]), 0
    for at in range(max(row["prompt_length"], 1), len(labels)):
        if labels[at] != IGNORE_INDEX:
            labels[at] = said[place % len(said)]
            place += 1
    return TokenizedRow(**{**row, "labels": labels})
