"""The text of a special token inside a row is text, not the token.

A page about tokenisers that says <|endoftext|> does not end there, nor does a question that says <|im_end|>. But a
tokenizer reads such a text as the token wherever it stands. So a row's own are marked before a template writes its
special tokens around them, and a text with marks is read by a copy of the tokenizer in which special tokens are called
otherwise.

What a row may bring is left to it: a BOS at its beginning, those at its end at which generation stops, and all special
tokens of a row that was written out with them, from one at its beginning to one at its end. No other token ends an
answer: "Save it as <filename>" ends with a text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from lowmem_npo.data.chat import ChatTemplate
from lowmem_npo.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSIDE, RENAMED = "\U0010fffd", "\U0010fffc"  # the last characters of the plane for private use
BYTE = re.compile("<0x[0-9A-F]{2}>")
ROLE = r"\s*\w{0,20}\s*"  # what may follow the last special token of a row that is written out: "assistant"


def check_marks(what: str, text: str) -> None:
    """Raises UserError for a text, called `what`, that holds a mark of ours: it would be dropped."""
    if re.search(f"[{INSIDE}{RENAMED}]", text):
        raise UserError(
            f"{what} holds U+10FFFC or U+10FFFD, characters for private use that stand for something else here: remove "
            "them."
        )


def trailing(text: str, texts: Sequence[str]) -> int:
    """Where those of `texts` begin with which `text` ends, with spaces between and after them; its length if it ends
    otherwise. A regular expression would try it anew from each of them."""
    begin = at = len(text)
    while True:
        while at and text[at - 1].isspace():
            at -= 1
        if (last := next((one for one in texts if text.endswith(one, 0, at)), None)) is None:
            return begin
        begin = at = at - len(last)


class SpecialTexts:
    """special: id -> text of the tokenizer's special tokens. ends: the texts of those at which generation stops."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, special: Mapping[int, str], ends: Collection[str] = ()
    ) -> None:
        self._tokenizer = tokenizer
        # Without those that the tokenizer needs for other texts: bytes, in SentencePiece's manner.
        self._special = {
            number: text for number, text in special.items() if len(text.strip()) > 1 and not BYTE.fullmatch(text)
        }
        texts = sorted(self._special.values(), key=len, reverse=True)
        one = "|".join(map(re.escape, texts)) or r"(?!)"  # which matches nothing
        bos = re.escape(tokenizer.bos_token) if tokenizer.bos_token else r"(?!)"
        self._one, self._ends = re.compile(one), [text for text in texts if text in ends]
        self._written_out = re.compile(rf"\s*({one}).*({one}){ROLE}", re.DOTALL)
        self._bos = re.compile(rf"\s*(?:{bos})")

    def is_written_out(self, text: str, *, whole: bool) -> bool:
        """whole: not a prompt, after which an answer begins, but a text, whose last token is one that ends it."""
        written = self._written_out.fullmatch(text)
        return written is not None and written[1] in self._openings and not (whole and written[2] not in self._ends)

    @cached_property
    def _openings(self) -> set[str]:
        """With which a conversation may begin: as the chat template has it, or, without one, with any but those that
        are for something else: EOS, unknown words, padding, masks."""
        tokenizer = self._tokenizer
        if tokenizer.chat_template:
            with suppress(Exception):
                opening = self._one.search(ChatTemplate(tokenizer).write([{"role": "user", "content": "?"}]))
                return {tokenizer.bos_token, opening[0]} if opening else {tokenizer.bos_token}
        others = {tokenizer.unk_token, tokenizer.pad_token, tokenizer.mask_token} - {tokenizer.bos_token}
        return {*self._special.values()} - others - {tokenizer.eos_token}

    def marked(self, text: str, *, keep_bos: bool = False, keep_end: bool = False) -> str:
        """`text` with a mark in each text of a special token.

        keep_bos, keep_end: but for a BOS at its beginning, or those at its end at which generation stops.
        """
        if not self._one.search(text):
            return text
        first = bos.end() if keep_bos and (bos := self._bos.match(text)) else 0
        last = max(first, trailing(text, self._ends)) if keep_end else len(text)
        inside = self._one.sub(lambda match: INSIDE.join(match[0]), text[first:last])
        return text[:first] + inside + text[last:]

    def marked_all(self, value: Any) -> Any:
        """A message, or what is in one, with marks in all its texts."""
        if isinstance(value, str):
            return self.marked(value)
        if isinstance(value, Mapping):
            return {key: self.marked_all(part) for key, part in value.items()}
        return [self.marked_all(part) for part in value] if isinstance(value, list | tuple) else value

    def ids(self, text: str, special: bool) -> list[int]:
        """Ids of a text with marks. special: with what the tokenizer adds at both ends."""
        assert self._renamed is not None
        written = self._one.sub(lambda match: RENAMED + match[0], text).replace(INSIDE, "")
        return self._renamed.encode(written, add_special_tokens=special).ids

    @property
    def are_separable(self) -> bool:
        """Whether the tokenizer is of the kind that can be copied so."""
        return self._renamed is not None

    @cached_property
    def _renamed(self) -> Tokenizer | None:
        """The tokenizer, its special tokens called RENAMED and then their texts."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            return None
        state = json.loads(backend.to_str())
        names = {text: RENAMED + text for text in self._special.values()}
        for token in state["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        vocabulary = state["model"]["vocab"]
        if unknown := state["model"].get("unk_token"):
            state["model"]["unk_token"] = names.get(unknown, unknown)
        if isinstance(vocabulary, dict):
            state["model"]["vocab"] = {names.get(text, text): number for text, number in vocabulary.items()}
        else:  # Unigram's: [text, score]
            state["model"]["vocab"] = [[names.get(text, text), *score] for text, *score in vocabulary]
        renamed = Tokenizer.from_str(json.dumps(state))
        renamed.no_truncation()
        renamed.no_padding()
        same = all(renamed.token_to_id(names[text]) == number for number, text in self._special.items())
        return renamed if same else None
