"""How a prompt ends that already opens its answer: with a header, a channel, or a block of reasoning."""

from __future__ import annotations

import re

from lowmem_npo.data.chat import MARK

# How a prompt ends after which a model that can think is to answer without that: with an empty block (Qwen 3), the
# channel of answers (gpt-oss), or a block that is opened, for a row that says its answer there (DeepSeek R1).
NO_THOUGHT = re.compile(r"(?i)(?:([<\[])(think\w*)[>\]]\s*(\1/\2[>\]])?|<\|channel\|>final<\|message\|>)\s*$")
MAX_OPENING = 200  # characters at the end of a prompt that may already open its answer


def opened(prompt: str, whole: str, plain: str) -> str:
    """The prompt with what the template itself writes before an answer's content and not for generation: an empty block
    of reasoning (Qwen 3), a channel (gpt-oss), a header. It is nothing that a row says, or that could be forgotten.

    whole, plain: the conversation, and the same with MARK for the last turn's content."""
    lead, found, _ = plain.removeprefix(prompt).partition(MARK)
    longer = prompt + lead.rstrip(" ")
    return longer if found and lead.strip() and plain.startswith(prompt) and whole.startswith(longer) else prompt


def is_unthinking(prompt: str, answer: str) -> bool:
    """Whether a model that can think is asked for an answer without that."""
    end = NO_THOUGHT.search(prompt)
    return end is not None and not (end[2] and not end[3] and f"/{end[2]}" in answer)


def without_opening(content: str, prompt: str) -> str:
    """`content` without the tags, such as <think>, that it begins with and that the prompt ends with."""
    tag = re.match(r"\s*([<\[][^<>\[\]\s]+[>\]])", content)
    at = prompt.rfind(tag[1], max(0, len(prompt) - MAX_OPENING)) if tag else -1
    opening = r"\s*".join(map(re.escape, squeezed(prompt[at:])))
    written = re.match(rf"\s*{opening}", content) if at >= 0 else None
    if written is None:
        return content
    rest = content[written.end() :]
    return rest.lstrip() if prompt[-1].isspace() else rest


def already_written(prompt: str, rendered: str, question: str) -> str | None:
    """`prompt` of a row that was written with the chat template, as is seen from its end. rendered: what the template
    makes of `question`, up to the answer."""
    opening = rendered.rpartition(question)[2] if question else rendered  # of the answer's turn
    mark = opening.strip()
    if len(mark) < 4 or not prompt.rstrip().endswith(mark):
        return None
    return prompt.rstrip() + opening[len(opening.rstrip()) :]


def squeezed(text: str) -> str:
    """Without spaces and line breaks, which templates add and remove."""
    return "".join(text.split())
