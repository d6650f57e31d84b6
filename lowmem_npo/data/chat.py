"""What a model's chat template writes. A template is a program: it may raise anything.

Many write today's date into the system prompt. A run writes that of the day on which it began, and so does whatever
asks its model later: other rows would be another run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import cache, cached_property, lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Stands for a content where the text around it is looked for. No letters: a template may change their case.
MARK = "\u27ea\u2042\u27eb"
TODAY = "auto"  # as a date
# In front of a template, instead of transformers' function of this name, which looks at the clock: data alone, and no
# other function, can be passed to a template.
CLOCK = (
    "{% macro strftime_now(format) %}{% set written = namespace(text=format) %}"
    "{% for code, value in chat_date.items() %}{% set written.text = written.text.replace(code, value) %}{% endfor %}"
    "{{ written.text }}{% endmacro %}\n"
)


@cache  # a process that goes on after midnight stays with its rows
def today() -> str:
    """The date of today, in ISO 8601."""
    return datetime.now().date().isoformat()


class ChatTemplate:
    """The chat template of a tokenizer that has one. date: what it takes for today, in ISO 8601, or `TODAY`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, date: str = TODAY) -> None:
        self._tokenizer = tokenizer
        self._date = today() if date == TODAY else date

    def write(self, turns: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The text of `turns`. Raises whatever the template raises."""
        return self._write(turns, self._wants_parts, options)

    def _write(self, turns: Sequence[Mapping[str, Any]], in_parts: bool, options: Mapping[str, Any]) -> str:
        given = [dict(turn) for turn in turns]
        if in_parts:
            given = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in given]
        template = self._tokenizer.get_chat_template(options.get("chat_template"), options.get("tools"))
        if "strftime_now" in template:
            options = {
                **options,
                "chat_template": CLOCK + template,
                "chat_date": _codes(f"{template} {options}", self._date),
            }
        return str(self._tokenizer.apply_chat_template(given, tokenize=False, **options))

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether only a content in parts is written, as by templates of models that also see images."""
        turns = [{"role": "user", "content": MARK}]
        with suppress(Exception):
            return MARK not in self._write(turns, False, {}) and MARK in self._write(turns, True, {})
        return False


@lru_cache(maxsize=64)
def _codes(text: str, date: str) -> dict[str, str]:
    """What stands for the parts of a date in `text`, a template with its options, such as %d -> 24."""
    now = datetime.fromisoformat(date)
    return {code: now.strftime(code) for code in re.findall("%-?[A-Za-z]", text)}
