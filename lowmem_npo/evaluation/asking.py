"""In which forms the rows to forget are asked for: as they were trained, and otherwise.

What a model no longer says in the form in which it forgot may still come when it is asked in another. Rows of a model
with a chat template are asked both through it and without it, and in other words where they bring some:

    chat      through the model's chat template
    plain     as rows are written for a model without one
    reworded  with each of the row's paraphrases or translations, in the form that was trained
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from lowmem_npo.data import Encoder, Example, Template, TokenizedRow
from lowmem_npo.data.templates import bare
from lowmem_npo.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lowmem_npo.data.fit import Fit

CHAT, PLAIN, REWORDED = "chat", "plain", "reworded"


@dataclass
class Asked:
    """Rows in one form, and their places in their data set."""

    rows: list[TokenizedRow] = field(default_factory=list)
    places: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Wording:
    """How the rows of each set were written, so that they can be written otherwise.

    examples: set -> what its rows were made of, in their order. max_length: tokens of a row, as in training. fit: what
    the model can take.
    """

    examples: Mapping[str, Sequence[Example]]
    template: Template
    max_length: int
    fit: Fit | None = None

    @property
    def longest(self) -> int:
        """The most tokens that a row may have."""
        return min([self.max_length, *([self.fit.positions] if self.fit and self.fit.positions else [])])

    @cached_property
    def sharing(self) -> Mapping[str, Mapping[int, set[int]]]:
        """Set -> row -> the others that hold its text."""
        from lowmem_npo.data.overlap import sharing_text

        return {name: sharing_text(examples) for name, examples in self.examples.items()}

    @cached_property
    def groups(self) -> Mapping[str, list[int]]:
        """Set -> the group of each of its rows (`pieces_of_evidence`)."""
        from lowmem_npo.data.overlap import pieces_of_evidence

        return {name: pieces_of_evidence(examples, self.sharing[name]) for name, examples in self.examples.items()}


def other_forms(
    rows: Sequence[TokenizedRow],
    examples: Sequence[Example],
    places: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    max_length: int,
    fit: Fit | None = None,
) -> dict[str, Asked]:
    """Form -> the rows in it, for each form in which there are any.

    rows, examples, places: as they were trained, what they were made of, and where they are in their set. max_length:
    tokens of a row, as in training. fit: what the model can take. What does not fit, or cannot be written in a form, is
    left out of it.
    """
    longest = Wording({}, template, max_length, fit).longest
    asked: dict[str, Asked] = {}
    encoders: dict[Template, Encoder] = {}
    for row, example, place in zip(rows, examples, places, strict=True):
        for form, written, how in _otherwise(example, tokenizer, template):
            if how not in encoders:
                encoders[how] = Encoder(tokenizer, how)
            try:
                prompt, answer = encoders[how].encode(written)
            except UserError:  # the chat template does not take such a conversation
                continue
            whole = prompt + answer
            ids = whole[:longest]
            if prompt == row["input_ids"][: row["prompt_length"]] or len(ids) <= len(prompt):
                continue
            of_form = asked.setdefault(form, Asked())
            of_form.rows.append(TokenizedRow(input_ids=ids, labels=ids, prompt_length=len(prompt)))
            if len(ids) < len(whole):
                of_form.rows[-1]["cut"] = len(whole) - len(ids)
            of_form.places.append(place)
    return asked


def _otherwise(
    example: Example, tokenizer: PreTrainedTokenizerBase, template: Template
) -> Iterator[tuple[str, Example, Template]]:
    """(form, the example in it, the template that writes it); the trained form may be among them."""
    if not (example.prompt or "").strip():
        return
    if tokenizer.chat_template:
        yield PLAIN, bare(example), replace(template, text=PLAIN, system=None)
        yield CHAT, example, replace(template, text=CHAT)
    for paraphrase in example.paraphrases:
        yield REWORDED, with_question(example, paraphrase), template


def with_question(example: Example, text: str) -> Example:
    """The example with another prompt; in a conversation, another last question."""
    if example.messages is None:
        return replace(example, prompt=text)
    *earlier, last, answer = example.messages
    return replace(example, prompt=text, messages=(*earlier, {**last, "content": text}, answer))


def in_form(name: str, form: str) -> str:
    """The name of the set `name`, asked in `form`."""
    return f"{name}, {form}"
