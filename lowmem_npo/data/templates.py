"""How prompt and answer are joined into the text that the model sees.

A model is asked as it was taught. One with a chat template is asked through it, except for rows that are passages cut
in two, as many of LUME's input/output rows are, or completions (prompt/completion). Otherwise the plain form belongs to
the schema, because the rows of a schema were made for it:

- `question/answer` (TOFU and the bundled biographies): "Question: {prompt}\\nAnswer:", as TOFU's authors wrote the rows
  for the base model they fine-tuned (Phi-1.5).
- everything else: the bare prompt, as LUME's official evaluation feeds the raw `input`.

A model fine-tuned in another form needs that form: `--template "[INST] {prompt} [/INST]"`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import TYPE_CHECKING, Any

from lowmem_npo.config import DataOptions
from lowmem_npo.data.chat import MARK, TODAY, ChatTemplate
from lowmem_npo.data.documents import UNSPACED
from lowmem_npo.data.example import JOINED, PASSAGE, Example
from lowmem_npo.data.special_texts import check_marks
from lowmem_npo.data.turns import SYSTEM
from lowmem_npo.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BARE = "{prompt}"
DEFAULTS = {"question/answer": "Question: {prompt}\nAnswer:"}
RAW = ("input/output", "prompt/completion")  # passages and completions: no questions to a chat model
BOTH = "both"  # as auto, and a second time plain (`in_both_forms`)
FORMS = ("auto", "chat", "plain", BOTH)


@dataclass(frozen=True)
class Template:
    r"""How examples are written.

    text: a text that holds {prompt} once, or one of `FORMS`. The two characters \n mean a line break and \t a tab, so
        that a shell can pass them.
    system: the system prompt of conversations that have none.
    stops: further ids at which generation stops, as the model's own configuration has them.
    date: what a chat template takes for today, in ISO 8601, or `TODAY`.
    """

    text: str = "auto"
    system: str | None = None
    stops: frozenset[int] = frozenset()
    date: str = TODAY

    def __post_init__(self) -> None:
        if self.text not in FORMS and self.text.count("{prompt}") != 1:
            raise UserError(
                f"The template {self.text!r} must be {', '.join(FORMS)} or hold {{prompt}} exactly once, "
                'as in "Question: {prompt}\\nAnswer:"; the answer is appended to it.'
            )
        check_marks("The template", self.text)
        check_marks("The system prompt", self.system or "")
        if self.date != TODAY:
            try:
                date.fromisoformat(self.date)
            except ValueError as error:
                raise UserError(f"--chat-date must be auto or a date such as 2026-11-24, not {self.date!r}.") from error

    @classmethod
    def of(cls, options: DataOptions, stops: frozenset[int] = frozenset()) -> Template:
        """The template that the options name."""
        return cls(options.template or "auto", options.system, stops, options.chat_date)

    def messages(self, example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[Mapping[str, Any], ...] | None:
        """The conversation that the tokenizer's chat template is to write; None for an example in a plain form."""
        turns = example.messages
        if example.plain:
            return None
        if turns is None:
            if example.prompt is None or example.schema == PASSAGE:
                return None
            has_template = bool(tokenizer.chat_template)
            if self.text in ("chat", BOTH) and not has_template:
                raise UserError(
                    f"--template {self.text}: this model's tokenizer has no chat template; give --template plain, or "
                    "use an instruction-tuned model."
                )
            if self.text != "chat" and not (self.text in ("auto", BOTH) and has_template and example.schema not in RAW):
                if self.system is not None:
                    raise UserError(
                        f"{example.where}: --system is for rows that a chat template writes, and this one is written "
                        "plain; give --template chat, or leave out --system."
                    )
                return None
            turns = ({"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.answer})
        if self.system is not None and turns[0]["role"] not in SYSTEM:
            return ({"role": "system", "content": self.system}, *turns)
        return turns

    def in_both_forms(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
        """The examples, and under `BOTH` those of them that the chat template writes once more, plain."""
        if self.text != BOTH:
            return list(examples)
        chat = [one for one in examples if self.messages(one, tokenizer) is not None]
        return [*examples, *(replace(bare(one), plain=True) for one in chat if (one.prompt or "").strip())]

    def describe(self, example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
        """The form of an example, for the user."""
        if self.messages(example, tokenizer) is not None:
            return "written with the model's chat template"
        if example.schema == PASSAGE and example.prompt is not None:
            return "the beginning of a passage and what follows it, as they stand"
        return "whole texts" if example.prompt is None else f"written as {self.for_schema(example.schema)!r}"

    def for_schema(self, schema: str) -> str:
        """The plain form that examples of `schema` are written in, line breaks resolved."""
        if self.text in FORMS or schema == PASSAGE:
            return DEFAULTS.get(schema, BARE)
        return self.text.replace("\\n", "\n").replace("\\t", "\t")

    def render(self, example: Example) -> tuple[str, str]:
        """(prompt text, answer text) of an example with a prompt; their concatenation is the text the model sees.

        The space between the two belongs to the answer, since byte-pair tokenisers write " Paris" as one token: a
        prompt never ends in spaces. Where neither side brings whitespace one space is inserted, except after a line
        break and between Chinese or Japanese characters; where both do, the answer's is kept. `prompt/completion`
        without a template is joined exactly as it is, as TRL does; so are the halves of a passage.
        """
        assert example.prompt is not None
        prompt = self.for_schema(example.schema).replace("{prompt}", example.prompt)
        bare = prompt.rstrip(" \t")
        brought = prompt[len(bare) :]
        if example.schema in JOINED and (example.schema == PASSAGE or self.text in FORMS):
            return bare, brought + example.answer
        if example.answer[0].isspace():
            return bare, example.answer
        if brought or bare.endswith("\n") or (UNSPACED.match(bare[-1]) and UNSPACED.match(example.answer[0])):
            return bare, brought + example.answer
        return bare, " " + example.answer


def form_of(template: str | None, system: str | None, run: Mapping[str, Any]) -> tuple[str, str | None]:
    """The template and the system prompt that are given or, without a template, those with which `run` (a run.yaml, or
    nothing) wrote its rows."""
    if template is not None:
        return template, system
    return run.get("template", "auto"), run.get("system") if system is None else system


def bare(example: Example) -> Example:
    """Of a conversation the last question alone, with the space before the answer that pairs of texts get."""
    return replace(example, messages=None, schema="messages", options={}) if example.messages else example


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Id -> text of every token that the tokenizer holds to be special, also where only tokenizer.json says so."""
    return {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template writes after an assistant's turn; None where it writes none.

    Where it is neither the tokenizer's EOS nor in generation_config.json, a model that was taught with the template
    ends its answers with it all the same.
    """
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
    try:
        ending = ChatTemplate(tokenizer).write(turns).rpartition(MARK)[2]
    except Exception:
        return None
    written = [(ending.find(text), -len(text), i) for i, text in special_tokens(tokenizer).items() if text in ending]
    return min(written)[2] if written else None
