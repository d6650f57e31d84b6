"""From examples to token ids and labels, with the boundary where generation will have it.

A row is `prompt ids + answer ids + EOS`. The prompt ids are what the tokenizer gives for the prompt alone, special
tokens (a BOS, where the tokenizer writes one) included: exactly what generation starts from. The answer ids are what
the tokenizer writes after it in the joined text. Labels are the ids themselves, -100 where nothing is learnt; they are
not shifted. Position 0 is never labelled: no context predicts the first token of a sequence.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from functools import cached_property
from typing import Any, TypedDict, cast, overload

from jinja2.exceptions import TemplateError
from lowmem_kernels import IGNORE_INDEX
from transformers import PreTrainedTokenizerBase

from lowmem_npo.config import DataConfig
from lowmem_npo.data.schemas import Example
from lowmem_npo.data.templates import Template
from lowmem_npo.errors import UserError

TOKENS = ("answer", "all")


class TokenizedRow(TypedDict):
    """One row. Both lists are as long as the row."""

    input_ids: list[int]  # prompt, answer and EOS
    labels: list[int]  # the same ids, -100 where not labelled
    prompt_length: int  # how many of the ids are the prompt, from which generation starts; 0 for text without one


class TokenizedRows(Sequence[TokenizedRow]):
    """All rows of one part (forget or retain), tokenised, in the order of their examples.

    cut: how many tokens truncation removed from the end of each row.
    max_length: the length rows were cut to.
    """

    def __init__(self, rows: list[TokenizedRow], examples: Sequence[Example], cut: list[int], max_length: int):
        self.rows, self.examples, self.cut, self.max_length = rows, list(examples), cut, max_length

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> TokenizedRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenizedRow]: ...
    def __getitem__(self, index):
        return self.rows[index]

    @property
    def num_tokens(self) -> int:
        return sum(len(row["input_ids"]) for row in self.rows)

    @property
    def num_labels(self) -> int:
        return sum(label != IGNORE_INDEX for row in self.rows for label in row["labels"])

    @property
    def longest(self) -> int:
        """Tokens of the longest row, after truncation."""
        return max(len(row["input_ids"]) for row in self.rows)

    @property
    def num_truncated(self) -> int:
        return sum(cut > 0 for cut in self.cut)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all ids and labels: equal fingerprints, equal tensors. Depends on data, template and tokenizer."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(array("q", [len(row["input_ids"]), *row["input_ids"], *row["labels"]]).tobytes())
        return digest.hexdigest()

    def report(self, part: str) -> list[str]:
        """One line of counts, and one more if rows were truncated."""
        lines = [
            f"{part}: {len(self)} rows, {self.num_tokens} tokens, {self.num_labels} of them labelled; "
            f"the longest row has {self.longest}"
        ]
        if self.num_truncated:
            whole = max(len(row["input_ids"]) + cut for row, cut in zip(self.rows, self.cut, strict=True))
            rows = "1 row" if self.num_truncated == 1 else f"{self.num_truncated} rows"
            lines.append(
                f"{part}: {rows} cut to {self.max_length} tokens, losing the last "
                f"{sum(self.cut)} tokens of their answers (EOS among them); --max-length {whole} would keep all"
            )
        return lines


def tokenize(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = DataConfig.max_length,
    template: Template | None = None,
    tokens: str = DataConfig.tokens,
) -> TokenizedRows:
    """Tokenises every example.

    max_length: the most tokens a row may have, prompt, answer and EOS together. What exceeds it is cut from the end,
        so the answer loses its tail and its EOS; the prompt is never cut, since evaluation would then ask something
        else.
    tokens: "answer" labels the answer and EOS, "all" the prompt too (padding never).

    Raises UserError when a row has no room for any of its answer, when the tokenizer has no EOS token, or for a
    conversation when the tokenizer has no chat template.
    """
    if tokens not in TOKENS:
        raise UserError(f"tokens is {tokens!r}; it must be one of {', '.join(TOKENS)}.")
    if tokenizer.eos_token_id is None:
        raise UserError("The tokenizer has no EOS token, with which every answer ends; set eos_token in its files.")
    template = template or Template()
    rows, cut, too_long = [], [], []
    for example in examples:
        prompt, answer = encode(example, tokenizer, template)
        whole = prompt + answer
        kept = whole[:max_length]
        first_label = max(len(prompt) if tokens == "answer" else 0, 1)
        # A text without prompt still needs one token that something precedes.
        if len(kept) <= max(len(prompt), 1):
            too_long.append((example, len(prompt)))
            continue
        labels = [IGNORE_INDEX] * first_label + kept[first_label:]
        rows.append(TokenizedRow(input_ids=kept, labels=labels, prompt_length=len(prompt)))
        cut.append(len(whole) - len(kept))
    if too_long:
        _refuse(too_long, max_length)
    return TokenizedRows(rows, examples, cut, max_length)


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, template: Template) -> tuple[list[int], list[int]]:
    """(prompt ids, answer ids with EOS or the end of the turn last), not truncated; text has no prompt ids."""
    if example.messages is not None:
        return _encode_conversation(example.messages, example.where, tokenizer)
    if example.prompt is None:
        return [], _ids(tokenizer, example.answer) + [tokenizer.eos_token_id]
    prompt, answer = template.render(example)
    prompt_ids = _ids(tokenizer, prompt)
    joined = _ids(tokenizer, prompt + answer)
    return prompt_ids, _continuation(tokenizer, prompt_ids, joined, answer, example.where) + [tokenizer.eos_token_id]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = True) -> list[int]:
    """Ids of `text`, with the special tokens that the tokenizer puts in front by itself, none at the end."""
    ids = list(tokenizer(text, add_special_tokens=special, verbose=False).input_ids)
    if special and ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
        ids.pop()  # a tokenizer that appends EOS by itself: it belongs after the answer, not after the prompt
    return ids


def _continuation(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], joined: list[int], answer: str, where: str
) -> list[int]:
    """The ids that follow `prompt_ids` so that both together read as `joined` does.

    Nearly always `joined` begins with `prompt_ids` and the rest is the answer. Where a token would straddle the
    boundary ("un" + "able"), generation cannot produce it, so the answer is tokenised on its own. Tokenisers of the
    SentencePiece family put a space in front of whatever they are given, but not after a line break.
    """
    if joined[: len(prompt_ids)] == prompt_ids:
        return joined[len(prompt_ids) :]
    break_ids = _ids(tokenizer, "\n", special=False)
    text = decode(tokenizer, joined)
    for candidate in (
        _ids(tokenizer, answer, special=False),
        _ids(tokenizer, "\n" + answer, special=False)[len(break_ids) :],
    ):
        if decode(tokenizer, prompt_ids + candidate) == text:
            return candidate
    raise UserError(
        f"{where}: the tokenizer cannot write this answer after this prompt without changing the text; "
        "end the prompt at a word boundary, or give --prompt-template."
    )


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The exact text of `ids`, special tokens included."""
    return cast(str, tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _encode_conversation(
    messages: Sequence[dict[str, Any]], where: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """The chat template's own text: everything up to the assistant's last turn is the prompt."""
    if tokenizer.chat_template is None:
        raise UserError(
            f"{where} is a conversation, but this model's tokenizer has no chat template; "
            "use an instruction-tuned model, or rows with a prompt and an answer column."
        )
    turns = [dict(turn) for turn in messages]
    try:
        prompt = cast(str, tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, tokenize=False))
        whole = cast(str, tokenizer.apply_chat_template(turns, tokenize=False))
    except TemplateError as error:
        raise UserError(f"{where}: the model's chat template refuses the conversation ({error}).") from error
    prompt_ids = _ids(tokenizer, prompt, special=False)  # the template writes the special tokens itself
    if not whole.startswith(prompt):  # a generation prompt that training text lacks, such as an opening <think>
        whole = prompt + turns[-1]["content"]
    answer = whole[len(prompt) :]
    answer_ids = _continuation(tokenizer, prompt_ids, _ids(tokenizer, whole, special=False), answer, where)
    # The turn ends with its first end-of-turn token; what a template writes after that belongs to the next turn.
    ends = [index for index, token in enumerate(answer_ids) if token in tokenizer.all_special_ids]
    return prompt_ids, answer_ids[: ends[-1] + 1] if ends else answer_ids + [tokenizer.eos_token_id]


def _refuse(too_long: list[tuple[Example, int]], max_length: int) -> None:
    listed = "; ".join(f"{example.where} (prompt of {length} tokens)" for example, length in too_long[:5])
    more = f" and {len(too_long) - 5} more" if len(too_long) > 5 else ""
    needed = max(length for _, length in too_long) + 2
    raise UserError(
        f"With --max-length {max_length} nothing of the answer is left in {listed}{more}; "
        f"give --max-length {needed} or more, or remove these rows."
    )
