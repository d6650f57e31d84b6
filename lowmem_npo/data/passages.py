"""Documents as rows: passages that overlap by half.

A document is cut into pieces of half a passage, at the ends of paragraphs and sentences where there are any; passage i
is piece i and the one after it. It becomes a completion (piece i is given, the next one is the answer, as in LUME), a
text (nothing is given), or both. So every piece but the first is an answer that is to be forgotten from what precedes
it, which is how a document is extracted; as a text the passage is forgotten from nothing, its opening included.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowmem_npo.config import DataConfig, DataOptions, PassageForm
from lowmem_npo.data.example import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACE = re.compile(r", (?:whole|second half|passage \d+(?:, second half)?)$")  # of a row in its document
MIN_TOKENS = 8
SPECIAL_TOKENS = 4  # that a tokenizer may add to a passage: BOS, EOS
# Where a text may be cut, best first: each matches what stands before the cut, and the cut is before the whitespace.
ABBREVIATION = (
    r"(?<!\b[A-Z]\.)(?<!\bMr\.)(?<!\bDr\.)(?<!\bMrs\.)(?<!\bMs\.)(?<!\bSt\.)(?<!\bNo\.)(?<!\be\.g\.)(?<!\bi\.e\.)"
)
BREAKS = (
    re.compile(r"(?=\n)(?<!\n)"),
    re.compile(rf"""(?:(?<=[.!?…][\"'”’»)\]])|(?<=[.!?…])){ABBREVIATION}(?=\s)|(?<=[。！？])(?![」』”。！？])"""),
    re.compile(r"(?<=[,;:—–])(?=\s)|(?<=[，、；：])"),
    re.compile(r"(?=\s)(?<!\s)"),
)


def document_of(example: Example) -> str | None:
    """The document that it is a passage of; None where it is of none."""
    place = PLACE.search(example.where) if example.is_passage else None
    return place and example.where[: place.start()]


def _words(text: str) -> int:
    """About as many as tokens: a word is a good token, and Chinese or Japanese a token a character."""
    return len(re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|\w+|[^\w\s]", text))


@dataclass(frozen=True)
class Passages:
    """How documents become rows.

    tokens: the most that a passage has. form: completion, text, or both. count: the number of tokens of a text.
    """

    tokens: int = DataConfig.passage_tokens
    form: PassageForm = DataConfig.passages
    count: Callable[[str], int] = _words

    @classmethod
    def of(cls, options: DataOptions, tokenizer: PreTrainedTokenizerBase | None = None) -> Passages:
        """As the options say, in the tokens of `tokenizer`; None: in words."""
        tokens = DataConfig.passage_tokens if options.passage_tokens is None else options.passage_tokens
        form = options.passages or DataConfig.passages
        if tokenizer is None:
            return cls(tokens, form)
        if (most := getattr(options, "max_length", None)) is not None:
            tokens = min(tokens, max(MIN_TOKENS, most - SPECIAL_TOKENS))  # a row must hold it
        return cls(tokens, form, lambda text: len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids))

    def rows(self, document: str) -> tuple[list[dict[str, Any]], list[str]]:
        """The rows of a document, and where each is."""
        pieces = self.pieces(document)
        if len(pieces) == 1:
            whole: list[dict[str, Any]] = [{"text": document.strip()}]
            size = self.count(document)
            halves = self._cut(document, (size + 1) // 2, 1) if size >= MIN_TOKENS else []
            if self.form != "text" and len(halves) > 1:
                half = {"input": halves[0].strip(), "output": "".join(halves[1:])}
                return ([half, *whole], ["second half", "whole"]) if self.form == "both" else ([half], ["second half"])
            return whole, ["whole"]
        rows: list[dict[str, Any]] = []
        places: list[str] = []
        for number, (first, second) in enumerate(zip(pieces, pieces[1:], strict=False), 1):
            goes_on = {"continues": number + 1 < len(pieces)}
            if self.form != "text":
                rows.append({"input": first.strip(), "output": second, **goes_on})
                places.append(f"passage {number}, second half")
            if self.form != "completion":
                rows.append({"text": (first + second).strip(), **goes_on})
                places.append(f"passage {number}")
        return rows, places

    def pieces(self, document: str) -> list[str]:
        """The document, cut into pieces of at most half a passage; one piece if it is no longer than a passage."""
        document = document.strip()
        return [document] if self.count(document) <= self.tokens else self._cut(document, max(1, self.tokens // 2))

    def _cut(self, text: str, limit: int, level: int = 0) -> list[str]:
        """`text` in pieces of at most `limit` tokens, as long as the best places to cut it allow."""
        pieces: list[str] = []
        size = 0
        for unit, tokens in self._units(text, limit, level):
            new_paragraph = unit.startswith("\n") and size >= 0.75 * limit
            if not pieces or size + tokens > limit or new_paragraph:
                pieces.append(unit)
                size = tokens
            else:
                pieces[-1] += unit
                size += tokens
        return pieces

    def _units(self, text: str, limit: int, level: int) -> Iterator[tuple[str, int]]:
        """What `text` consists of, with its tokens: paragraphs, and of those that are too long the sentences, and so on
        to the characters of a word."""
        cuts = [match.start() for match in BREAKS[level].finditer(text)] if level < len(BREAKS) else range(1, len(text))
        bounds = sorted({0, *cuts, len(text)})
        for begin, end in zip(bounds, bounds[1:], strict=False):
            unit = text[begin:end]
            tokens = self.count(unit)
            if tokens > limit and level < len(BREAKS):
                yield from self._units(unit, limit, level + 1)
            else:
                yield unit, tokens
