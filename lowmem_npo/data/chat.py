"""What a model's chat template writes. A template is a program: it may raise anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Stands for a content where the text around it is looked for. No letters: a template may change their case.
MARK = "\u27ea\u2042\u27eb"


class ChatTemplate:
    """The chat template of a tokenizer that has one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def write(self, turns: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The text of `turns`. Raises whatever the template raises."""
        return self._write(turns, self._wants_parts, options)

    def _write(self, turns: Sequence[Mapping[str, Any]], in_parts: bool, options: Mapping[str, Any]) -> str:
        given = [dict(turn) for turn in turns]
        if in_parts:
            given = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in given]
        return str(self._tokenizer.apply_chat_template(given, tokenize=False, **options))

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether only a content in parts is written, as by templates of models that also see images."""
        turns = [{"role": "user", "content": MARK}]
        with suppress(Exception):
            return MARK not in self._write(turns, False, {}) and MARK in self._write(turns, True, {})
        return False
