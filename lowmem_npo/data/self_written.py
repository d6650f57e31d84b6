"""`--retain self`: texts that the original model writes itself, which hold it where it was.

A model with a chat template answers bundled questions, a base model goes on from bundled first words; both draw from
their own distribution at temperature 1, in which the cross-entropy of what they write has no slope: only forgetting
moves the model, and these rows pull it back. Here the rows are named and, before they are written, stood in for by rows
of the greatest length; `lowmem_npo.commands.train.own_texts` lets the model write them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lowmem_npo.data.example import Example
from lowmem_npo.data.reading import bundled_rows
from lowmem_npo.data.schemas import to_examples
from lowmem_npo.data.templates import FORMS, Template
from lowmem_npo.data.tokenized_rows import IGNORE_INDEX, TokenizedRow, TokenizedRows
from lowmem_npo.data.tokenizing import Encoder
from lowmem_npo.errors import UserError
from lowmem_npo.sources import SELF

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS, MOST_ROWS = 64, 10_000
TOKENS = 96  # that a text may have beside its question or first words


def self_rows(source: str | None) -> int | None:
    """How many texts the model is to write, if `source` is self or self:N."""
    match = SELF.fullmatch(source or "")
    if match is None:
        return None
    rows = int(match["rows"] or ROWS)
    if not 1 <= rows <= MOST_ROWS:
        raise UserError(f"--retain {source}: give at least 1 text and at most {MOST_ROWS:,}, as in self:64.")
    return rows


def beginnings(rows: int, tokenizer: PreTrainedTokenizerBase, template: Template) -> list[Example]:
    """What each of `rows` texts begins with: a question where the model has been taught to answer, else first words,
    as the prompt of an example without an answer. Each is used as often as `rows` requires."""
    answers = template.text != "plain" and bool(tokenizer.chat_template or template.text not in FORMS)
    if answers:
        seeds = [example for example in to_examples(bundled_rows("general")) if example.prompt is not None]
    else:
        seeds = [replace(one, prompt=one.answer) for one in to_examples(bundled_rows("openings"))]
    return [replace(seeds[index % len(seeds)], answer=" ", continues=True) for index in range(rows)]


def beginning_ids(begun: Example, encoder: Encoder) -> list[int]:
    """The ids from which the model goes on."""
    if begun.schema == "text":
        return encoder.text_ids(begun.prompt or "", whole=False)
    return encoder.encode(replace(begun, answer="."))[0]


def stand_in(begun: list[Example], tokenizer: PreTrainedTokenizerBase, template: Template, limit: int) -> TokenizedRows:
    """Rows as long as the longest that can be written, at most `limit` tokens: for estimates, and for what is decided
    before the model is loaded."""
    encoder, rows = Encoder(tokenizer, template), []
    filler = encoder.text_ids(".")[-1]
    for example in begun:
        prompt = beginning_ids(example, encoder)
        ids = [*prompt, *[filler] * (TOKENS + 1)][:limit]
        start = 1 if example.schema == "text" else len(prompt)
        labels = [IGNORE_INDEX] * start + ids[start:]
        rows.append(TokenizedRow(input_ids=ids, labels=labels, prompt_length=0 if example.schema == "text" else start))
    return TokenizedRows(rows, begun, limit)
