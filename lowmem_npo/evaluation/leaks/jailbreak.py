"""Whether an answer comes when the model is talked into it: by a system prompt, by words before the question, or by the
beginning of an answer that is put into its mouth.

Training that only shapes how a model answers gives way to such prompts (Wei et al. 2023, "Jailbroken"; Andriushchenko
et al. 2024; Lynch et al. 2024 try them on models that were to forget). The prompts are a small list of our own,
data/bundled/jailbreaks.jsonl. Where there is no chat template, and so no system prompt, it stands before the question.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, NamedTuple

from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.leaks.contract import Subject
from lowmem_npo.evaluation.leaks.prompting import Prompting

if TYPE_CHECKING:
    from lowmem_npo.data import Encoder, Example, TokenizedRow
    from lowmem_npo.evaluation.asking import Asked

SYSTEM, BEFORE, ANSWER = "system", "before", "answer"


class Trick(NamedTuple):
    """name: for people. place: where `text` stands: as the system prompt, before the question, or as the beginning of
    the answer."""

    name: str
    place: str
    text: str


@cache
def tricks() -> tuple[Trick, ...]:
    """The list."""
    lines = files("lowmem_npo.data.bundled").joinpath("jailbreaks.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(Trick(**json.loads(line)) for line in lines)


class Jailbreak(Prompting):
    name = "jailbreak"
    summary = "ROUGE-L recall of greedy answers after system prompts and other words meant to bring them out"
    in_words = "talking the model into answering, with instructions and beginnings of answers"
    none = "the rows leave the model no room for words before the question"

    def ways(self, subject: Subject, name: str) -> Mapping[str, Asked]:
        from lowmem_npo.data import Encoder
        from lowmem_npo.evaluation.asking import Asked

        assert subject.wording is not None
        wording, ways = subject.wording, dict[str, Asked]()
        room = wording.fit.positions if wording.fit else None  # --max-length is one of training
        for trick in tricks():
            for place, (row, example) in enumerate(zip(subject.sets[name], wording.examples[name], strict=True)):
                if not (example.prompt or "").strip():
                    continue
                try:
                    written = tricked(trick, row, example, Encoder(subject.scorer.tokenizer, wording.template))
                except UserError:  # the chat template does not take such a conversation
                    continue
                if room is None or len(written["input_ids"]) <= room:
                    asked = ways.setdefault(trick.name, Asked())
                    asked.rows.append(written)
                    asked.places.append(place)
        return ways


JAILBREAK = Jailbreak()


def tricked(trick: Trick, row: TokenizedRow, example: Example, encoder: Encoder) -> TokenizedRow:
    """The row, asked with `trick`. row: as it was trained. encoder: wrote it."""
    from lowmem_npo.data import TokenizedRow
    from lowmem_npo.evaluation.scoring.generation import text_of

    if trick.place == ANSWER:
        prompt, answer = row["input_ids"][: row["prompt_length"]], row["input_ids"][row["prompt_length"] :]
        chat = encoder.template.messages(example, encoder.tokenizer) is not None
        apart = "" if chat or text_of(encoder.tokenizer, prompt)[-1:].isspace() else " "
        begun = f"{apart}{trick.text}"
        prompt = [*prompt, *encoder.tokenizer(begun, add_special_tokens=False, verbose=False).input_ids]
    else:
        prompt, answer = _with_text_before(trick, example, encoder)
    ids = [*prompt, *answer]
    return TokenizedRow(input_ids=ids, labels=ids, prompt_length=len(prompt))


def _with_text_before(trick: Trick, example: Example, encoder: Encoder) -> tuple[list[int], list[int]]:
    from lowmem_npo.data import Encoder, Template
    from lowmem_npo.data.example import PASSAGE
    from lowmem_npo.data.turns import SYSTEM as SYSTEM_ROLES
    from lowmem_npo.evaluation.asking import with_question

    template = encoder.template
    turns = template.messages(example, encoder.tokenizer)
    if turns is None:
        if example.schema == PASSAGE:  # which no template is written around
            return encoder.encode(with_question(example, f"{trick.text}\n\n{example.prompt}"))
        around = Template(f"{trick.text}\n\n{template.for_schema(example.schema)}", stops=template.stops)
        return Encoder(encoder.tokenizer, around).encode(example)
    whole = replace(example, messages=tuple(dict(turn) for turn in turns))
    if trick.place == SYSTEM:
        others = tuple(turn for turn in whole.messages or () if turn["role"] not in SYSTEM_ROLES)
        try:
            return encoder.encode(replace(whole, messages=({"role": "system", "content": trick.text}, *others)))
        except UserError:  # the chat template takes no system prompt
            pass
    return encoder.encode(with_question(whole, f"{trick.text}\n\n{example.prompt}"))
