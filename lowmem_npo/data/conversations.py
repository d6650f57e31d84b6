"""What conversations have beside the answers that are forgotten, and what is to be said of it: earlier answers, and
system prompts by which the rows to forget could be told from those to keep."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from lowmem_npo.data.chat import MARK, ChatTemplate
from lowmem_npo.data.templates import Template
from lowmem_npo.data.turns import SYSTEM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lowmem_npo.data.example import Example

Turns = Sequence[Mapping[str, Any]]


def earlier_answers(examples: Sequence[Example]) -> Iterator[str]:
    """A remark if assistants say more in rows to forget than their last turns, which alone are forgotten; but for what
    is the last turn of another row."""
    conversations = [one.messages for one in examples if one.messages]
    whole = {_key(turns) for turns in conversations}
    more = sum(any(_key(turns[:end]) not in whole for end in _earlier(turns)) for turns in conversations)
    if more:
        have, which = ("have", "each") if more > 1 else ("has", "it")
        yield (
            f"{more} of {len(conversations)} conversations {have} earlier answers of the assistant, which are read and "
            f"not forgotten, since only the last turn is: to forget them, make of {which} a row for every answer, that "
            "ends with it"
        )


def _earlier(turns: Turns) -> Iterator[int]:
    """The end of each turn but the last in which an assistant says something."""
    for place, turn in enumerate(turns[:-1]):
        if turn["role"] == "assistant" and turn["content"].strip():
            yield place + 1


def _key(turns: Turns) -> str:
    return json.dumps([(turn["role"], turn["content"]) for turn in turns if turn["role"] not in SYSTEM])


def differing_prompts(
    forget: Sequence[Example], retain: Sequence[Example], template: Template, tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[str]:
    """Remarks on rows to forget whose system prompt, or that they have none, no row to keep shares: forgetting could
    hang on that alone. tokenizer: that of the model; without it, only what the rows bring themselves is known."""
    to_forget, to_keep = ([_system(one, template, tokenizer) for one in rows] for rows in (forget, retain))
    kept = {prompt for prompt in to_keep if prompt is not None}
    if "" in kept and tokenizer is not None:  # what the template writes where rows have none
        kept |= {prompt for prompt in to_forget if prompt and _is_default(prompt, template, tokenizer)}
    prompts = [prompt for prompt in to_forget if prompt is not None and prompt not in kept]
    own, bare = sum(map(bool, prompts)), sum(not prompt for prompt in prompts)
    if own:
        have = "have a system prompt" if own > 1 else "has a system prompt"
        yield (
            f"{own} of {len(forget)} rows {have} that no row to keep has: what is learnt may be to forget under that "
            "alone; --system gives one to rows that have none"
        )
    if kept and bare:
        have = "have no system prompt" if bare > 1 else "has no system prompt"
        yield (
            f"{bare} of {len(forget)} rows {have}, and all to keep have one: what is learnt may be to forget under "
            "that alone; --system gives one to rows that have none"
        )


def system_prompts(examples: Sequence[Example]) -> set[str]:
    """The different system prompts that rows bring."""
    return {one.messages[0]["content"] for one in examples if one.messages and one.messages[0]["role"] in SYSTEM}


def _system(example: Example, template: Template, tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """The system prompt that a row is written with, "" for none; None where it is no conversation, or that is not
    known."""
    turns: Turns | None = example.messages if tokenizer is None else template.messages(example, tokenizer)
    if not turns:
        return None
    return turns[0]["content"] if turns[0]["role"] in SYSTEM else (template.system or "")


def _is_default(prompt: str, template: Template, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template writes this system prompt where a conversation has none."""
    chat, asked = ChatTemplate(tokenizer, template.date), [{"role": "user", "content": MARK}]
    with suppress(Exception):  # whatever the template raises
        return chat.write([{"role": "system", "content": prompt}, *asked]) == chat.write(asked)
    return False
