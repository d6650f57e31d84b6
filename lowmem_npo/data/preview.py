"""Tokenised examples for human eyes: what the model is given, and which tokens count in the loss."""

from __future__ import annotations

import sys
from itertools import groupby
from typing import TYPE_CHECKING

from lowmem_npo.data.tokenized_rows import IGNORE_INDEX, TokenizedRows
from lowmem_npo.data.tokenizing import decode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPEN, CLOSE = "⟦", "⟧"
GREEN, DIM, RESET = "\033[32m", "\033[2m", "\033[0m"


def preview(
    rows: TokenizedRows, tokenizer: PreTrainedTokenizerBase, n: int, *, title: str = "rows", color: bool | None = None
) -> str:
    """The first `n` rows as text, labelled tokens between ⟦ and ⟧, then the counts of the whole part.

    color: labelled text green, the rest dim; None decides by whether standard output is a terminal.
    """
    color = sys.stdout.isatty() if color is None else color
    blocks = [_row(rows, index, tokenizer, title, color) for index in range(min(n, len(rows)))]
    return "\n\n".join([*blocks, "\n".join(rows.report(title))])


def _row(rows: TokenizedRows, index: int, tokenizer: PreTrainedTokenizerBase, title: str, color: bool) -> str:
    row, cut = rows[index], rows.cut[index]
    total, labelled = len(row["input_ids"]), sum(label != IGNORE_INDEX for label in row["labels"])
    facts = [f"{total} tokens", f"{row['prompt_length']} of them prompt", f"{labelled} labelled"]
    facts += [f"{cut} cut off the end"] if cut else []
    facts += ["the first is not labelled: nothing precedes it"] if row["prompt_length"] == 0 else []
    heading = f"{title} {index + 1} of {len(rows)} ({rows.examples[index].where}): {', '.join(facts)}"
    return f"{heading}\n{_marked(row['input_ids'], row['labels'], tokenizer, color)}"


def _marked(ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase, color: bool) -> str:
    """The decoded ids, each run of labelled ones marked."""
    text, done, pieces = "", 0, []
    for labelled, run in groupby(labels, key=lambda label: label != IGNORE_INDEX):
        done += len(list(run))
        # Decoded from the start each time: many tokenizers drop a leading space when they decode a part by itself.
        so_far = decode(tokenizer, ids[:done])
        piece, text = so_far[len(text) :], so_far
        mark = f"{OPEN}{piece}{CLOSE}" if labelled else piece
        pieces.append(f"{GREEN if labelled else DIM}{mark}{RESET}" if color else mark)
    return "".join(pieces)
