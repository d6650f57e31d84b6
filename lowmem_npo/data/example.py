"""One row, whatever the columns that it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PARAPHRASED = "paraphrased_"  # before the name of the prompt's column: the prompt in other words
PASSAGE = "passage"  # the schema of a passage of a document, whose first half is the prompt
JOINED = (PASSAGE, "prompt/completion")  # schemas whose prompt and answer are joined as they are, without a template


@dataclass(frozen=True)
class Example:
    """One row, canonical.

    prompt: what the model is given, as it is in the data (no template); None where there is nothing but text.
        For a conversation, the last turn before the answer.
    answer: what it must (un)learn to say.
    where: file and line, or source and row, for messages.
    schema: the columns it came from, such as "question/answer"; decides the default template.
    id: the row's `id` column, where it has one.
    messages: the whole conversation, answer included, where the row is one: dictionaries with `role`, `content` (text)
        and whatever else a turn has, such as `tool_calls` or `reasoning_content`.
    options: what the chat template gets beside the conversation: `tools`, and the row's `chat_template_kwargs`.
    paraphrases: the prompt in other words or another language, with which evaluation asks as well (the column
        `paraphrased_question`, or `--paraphrase-column`).
    alternatives: other answers, to be preferred to this one (`--alternative-column`).
    group: what the row is about, such as a person, where a column says so (`--group-column`): rows of one are about the
        same, whatever they say. None: only rows of the same text are.
    plain: whether it is written without a chat template, whatever others are.
    continues: whether the text goes on after the answer, which then has no EOS: most passages of a document do.
    """

    prompt: str | None
    answer: str
    where: str
    schema: str
    id: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    paraphrases: tuple[str, ...] = ()
    continues: bool = False
    alternatives: tuple[str, ...] = ()
    group: str | None = None
    plain: bool = False

    @property
    def is_passage(self) -> bool:
        """Whether it is a text, or a part of one, that the model goes on with, and asks for nothing."""
        return self.prompt is None or self.schema == PASSAGE

    @property
    def columns(self) -> set[str]:
        """The columns that are read."""
        beside = {"id", *(("system", "history", "tools", "chat_template_kwargs") if self.messages else ())}
        own = self.schema.split("/")
        return beside | set(own) | ({PARAPHRASED + own[0]} if self.paraphrases else set())
