"""Rows that are in both parts: the run would have to forget and to keep the same thing."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

from lowmem_npo.data.schemas import Example
from lowmem_npo.errors import UserError

MAX_LISTED = 5
SHINGLE, NEAR = 5, 0.7  # characters of a shingle; the similarity from which two texts are near-duplicates
RUN, PART = 20, 0.25  # characters of a run; the part of the shorter of two passages whose runs both hold
CHUNK = 256  # texts that are compared with all others at once
SHORT_ANSWER = 4  # content words of an answer that a general row must not have all of
MIN_SHARED, RELATED = 2, 0.6  # content words that rows share, at least, and as a part of the shorter one
_WORDS = """
a an and are as at be been but by can did do does for from had has have he her his how i in into is it its may me
more most my no not of on one or our she so some than that the their them then there these they this to two was we
were what when where which who whose why will with would yes you your"""
FUNCTION_WORDS = frozenset(_WORDS.split())
CJK = r"\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
UNSPACED = rf"[{CJK}\u3000-\u303f\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]"  # with Thai, Lao, Burmese and Khmer


def find_overlap(forget: Sequence[Example], retain: Sequence[Example]) -> list[tuple[Example, Example]]:
    """Each forget example that is also in retain, with the first retain example that is the same.

    The same means the same text, whatever its case, whitespace, Unicode form and division into prompt and answer.
    """
    kept: dict[str, Example] = {}
    for example in retain:
        kept.setdefault(text_key(example), example)
    return [(example, kept[key]) for example in forget if (key := text_key(example)) in kept]


def text_key(example: Example) -> str:
    """The same for examples of the same text, as in `find_overlap`."""
    # In a script without spaces prompt and answer may be joined without one; elsewhere "1 12" is not "11 2".
    return re.sub(rf"(?<={UNSPACED}) | (?={UNSPACED})", "", _normalised(example))


def near_duplicates(
    one: Sequence[Example], other: Sequence[Example] | None = None, *, at_least: float = NEAR
) -> list[tuple[int, int, float]]:
    """Pairs (i, j, similarity) of examples of `one` and `other` whose texts have a Jaccard similarity of at least
    `at_least`, the most similar first; pairs within `one` (i < j) if there is no other. Exact copies, but for case,
    whitespace and Unicode form, have 1.

    The similarity of two texts is that of their sets of shingles, here runs of `SHINGLE` characters (Broder 1997;
    Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3). It is computed for every pair.
    """
    texts = [_normalised(example) for example in one]
    others = texts if other is None else [_normalised(example) for example in other]
    pairs: list[tuple[int, int, float]] = []
    for i, j, shared, sizes, other_sizes in _shared_runs(texts, others, SHINGLE):
        similarity = shared / (sizes + other_sizes - shared)
        alike = (similarity >= at_least) & ((i < j) | (other is not None))
        pairs += zip(i[alike].tolist(), j[alike].tolist(), similarity[alike].tolist(), strict=True)
    return sorted(pairs, key=lambda pair: (-pair[2], pair[:2]))


def sharing_text(examples: Sequence[Example]) -> dict[int, set[int]]:
    """Example -> the others of the same text, as in `find_overlap`, and, of a passage, those that hold a part of its
    text: what overlaps in a document, and its completions. Examples that share nothing are left out."""
    same: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        same.setdefault(text_key(example), []).append(index)
    near = {index: {*of_key} - {index} for of_key in same.values() if len(of_key) > 1 for index in of_key}
    passages = [index for index, example in enumerate(examples) if example.is_passage]
    for i, j in _overlapping([_key(examples[index].answer) for index in passages]):
        near.setdefault(passages[i], set()).add(passages[j])
    return near


def _overlapping(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs (i, j) and (j, i) of texts that share `PART` of the runs of the shorter one."""
    pairs: list[tuple[int, int]] = []
    if len(texts) > 1:
        for i, j, shared, sizes, other_sizes in _shared_runs(texts, texts, RUN):
            alike = (i != j) & (shared >= PART * sizes.clip(max=other_sizes))
            pairs += zip(i[alike].tolist(), j[alike].tolist(), strict=True)
    return pairs


def _shared_runs(texts: Sequence[str], others: Sequence[str], length: int) -> Iterator[tuple[Any, ...]]:
    """Of the pairs of a text and another that share a run of `length` characters, many at a time, as arrays: the place
    of either, how many runs they share, how many either has. A text that is shorter than a run is one."""
    from sklearn.feature_extraction.text import CountVectorizer  # late: takes a second

    padded = [text.ljust(length, "\0") for text in (*texts, *others)]
    vectorizer = CountVectorizer(analyzer="char", ngram_range=(length, length), binary=True, lowercase=False)
    runs = vectorizer.fit_transform(padded).astype("int32")
    left, right = runs[: len(texts)], runs[len(texts) :].T.tocsc()
    sizes = runs.getnnz(axis=1)
    for begin in range(0, len(texts), CHUNK):
        shared = (left[begin : begin + CHUNK] @ right).tocoo()
        i, j = shared.row + begin, shared.col
        yield i, j, shared.data, sizes[i], sizes[len(texts) + j]


def refuse_overlap(
    forget: Sequence[Example], retain: Sequence[Example], *, of: str = "forget", part: str = "retain"
) -> None:
    """Raises UserError, naming the rows, if any is in both parts. `of` and `part` are the names of the parts."""
    pairs = find_overlap(forget, retain)
    if not pairs:
        return
    listed = "; ".join(f"{one.where} is {other.where}" for one, other in pairs[:MAX_LISTED])
    more = f" and {len(pairs) - MAX_LISTED} more" if len(pairs) > MAX_LISTED else ""
    rows = f"1 row to {of} is" if len(pairs) == 1 else f"{len(pairs)} rows to {of} are"
    where = "the holdout" if part == "holdout" else f"the rows to {part}"
    raise UserError(f"{rows} also in {where}: {listed}{more}; remove them from either, or give --allow-overlap.")


def _normalised(example: Example) -> str:
    if example.messages is not None:
        parts = [turn["content"] for turn in example.messages]
    else:
        parts = [example.prompt or "", example.answer]
    return _key(" ".join(parts))


def _key(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def find_related(forget: Sequence[Example], general: Sequence[Example]) -> list[int]:
    """Which general examples may say what is to be forgotten: those that hold all words of a short answer, or most of
    the words of a longer row, or whose own words are mostly those of a row; function words do not count."""
    of_forget = [(_content_words(one.answer), _content_words(_normalised(one))) for one in forget]
    return [index for index, one in enumerate(general) if _is_related(_content_words(_normalised(one)), of_forget)]


def _is_related(words: frozenset[str], of_forget: Sequence[tuple[frozenset[str], frozenset[str]]]) -> bool:
    for answer, row in of_forget:
        if answer and len(answer) <= SHORT_ANSWER and answer <= words:
            return True
        if len(shared := words & row) >= MIN_SHARED and len(shared) >= RELATED * min(len(words), len(row)):
            return True
    return False


def _content_words(text: str) -> frozenset[str]:
    """The words of a text that say something, without the endings of plurals."""
    words = re.findall(rf"[{CJK}]|\w+", unicodedata.normalize("NFKC", text).casefold())
    return frozenset(re.sub(r"(?<=\w\w\w)s$", "", word) for word in words if word not in FUNCTION_WORDS)
