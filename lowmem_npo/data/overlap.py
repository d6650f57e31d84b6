"""Rows that are in both parts: the run would have to forget and to keep the same thing."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lowmem_npo.data.cells import folded
from lowmem_npo.data.example import Example
from lowmem_npo.data.passages import document_of
from lowmem_npo.data.turns import SYSTEM, calls_of
from lowmem_npo.data.words import FUNCTION_WORDS
from lowmem_npo.errors import UserError
from lowmem_npo.sizes import first_of

SHINGLE, NEAR = 5, 0.7  # characters of a shingle; the similarity from which two texts are near-duplicates
RUN, PART = 20, 0.25  # characters of a run; the part of the shorter of two passages whose runs both hold
MULTIPLIER = 0x9E3779B97F4A7C15  # of the polynomial, modulo 2^64, by which runs are known
CHUNK = 256  # texts that are compared with all others at once
PREFIX = 0.15  # the part of the runs that similar texts share by which such pairs are looked for
DENSE = 0.02  # the part of the pairs from which comparing all of them is faster
SHORT_ANSWER = 4  # content words of an answer that a general row must not have all of
MIN_SHARED, RELATED = 2, 0.6  # content words that rows share, at least, and as a part of the shorter one
CJK = r"\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
UNSPACED = rf"[{CJK}\u3000-\u303f\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]"  # with Thai, Lao, Burmese and Khmer


def find_overlap(forget: Sequence[Example], retain: Sequence[Example]) -> list[tuple[Example, Example]]:
    """Each forget example that is also in retain, with the first retain example that is the same.

    The same means the same text and calls of tools, whatever its case, whitespace, Unicode form, division into prompt
    and answer, and system prompt; and a question and answer without a history are the same as a conversation that ends
    with them. Two conversations of other histories are not, whatever they end with: "You are welcome." says nothing.
    """
    kept: dict[str, Example] = {}
    ends: dict[str, Example] = {}
    for example in retain:
        texts = texts_of(example)
        ends.setdefault(texts.end, example)
        for text in (texts.whole, texts.bare):
            kept.setdefault(text, example)
    pairs = []
    for example in forget:
        texts = texts_of(example)
        found = (kept.get(texts.whole), kept.get(texts.bare), kept.get(texts.end), ends.get(texts.bare))
        if other := next(filter(None, found), None):
            pairs.append((example, other))
    return pairs


class Texts(NamedTuple):
    """What an example says, comparably: all of it; all but system prompts; and its end, the last question with what
    answers it."""

    whole: str
    bare: str
    end: str


def texts_of(example: Example) -> Texts:
    # In a script without spaces prompt and answer may be joined without one; elsewhere "1 12" is not "11 2".
    return Texts(*(re.sub(rf"(?<={UNSPACED}) | (?={UNSPACED})", "", text) for text in _texts(example)))


def keys_of(examples: Sequence[Example]) -> list[tuple[str, ...]]:
    """Of each example the texts of which one in common makes two of them the same, as in `find_overlap`: the end of a
    conversation, where an example is that and no more."""
    texts = [texts_of(example) for example in examples]
    bare = {of.bare for of in texts}
    return [tuple(of) if of.end in bare else (of.whole, of.bare) for of in texts]


def first_alike(keys: Iterable[Iterable[Hashable]]) -> list[int]:
    """The keys of some rows -> the first row that each is the same as: both have a key in common, or each has one with
    a third row, and so on."""
    places: list[int] = []
    rows: dict[Hashable, int] = {}

    def first(row: int) -> int:
        while places[row] != row:
            places[row] = row = places[places[row]]
        return row

    for row, of_row in enumerate(keys):
        places.append(row)
        for key in of_row:
            one, other = sorted((first(row), first(rows.setdefault(key, row))))
            places[other] = one
    return [first(row) for row in range(len(places))]


def near_duplicates(examples: Sequence[Example], *, at_least: float = NEAR) -> Iterator[tuple[Any, Any, Any]]:
    """Pairs of examples whose texts have a Jaccard similarity of at least `at_least`, many at a time, as arrays: the
    place of either, the earlier first, and the similarity. Exact copies, but for case, whitespace and Unicode form,
    have 1, and so have texts that repeat the same runs.

    The similarity of two texts is that of their sets of shingles, here runs of `SHINGLE` characters (Broder 1997;
    Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3). It is exact, and no pair is missed.
    """
    import numpy as np

    runs = _runs([_texts(example).whole for example in examples], SHINGLE)
    sizes, columns = runs.getnnz(axis=1), runs.T.tocsc()
    for begin, i, j in _possible(runs, at_least):
        earlier = i < j
        i, j = i[earlier], j[earlier]
        if len(i) > DENSE * CHUNK * len(examples):
            shared = (runs[begin : begin + CHUNK] @ columns).toarray()[i - begin, j]
        else:
            shared = runs[i].multiply(runs[j]).sum(axis=1)
        shared = np.asarray(shared).ravel()
        similarity = shared / (sizes[i] + sizes[j] - shared)
        alike = similarity >= at_least
        yield i[alike], j[alike], similarity[alike]


def _possible(runs: Any, at_least: float) -> Iterator[tuple[int, Any, Any]]:
    """Pairs of rows of `runs`, made by `_runs`, that may have this similarity, of CHUNK rows at a time: the first of
    these, and the places of either.

    Similar texts share that part of either's runs, so of the runs in a fixed order, so many of the first ones (prefix
    filters: Chaudhuri, Ganti and Kaushik 2006; Wang, Li and Feng 2012). In the order from the rarest on, few others do,
    and they are found fast: most of the work of comparing all with all is in runs that many texts have.
    """
    import numpy as np

    sizes = np.diff(runs.indptr)
    needed = np.ceil(at_least * sizes - 1e-6).clip(min=1)
    least = np.ceil(PREFIX * needed)  # of the first runs of a text, how many similar texts share
    place = np.arange(runs.nnz) - np.repeat(runs.indptr[:-1], sizes)
    first = runs.copy()
    first.data = (place < np.repeat(sizes - needed + least, sizes)).astype(runs.dtype)
    first.eliminate_zeros()
    columns = first.T.tocsr()
    for begin in range(0, first.shape[0], CHUNK):
        both = (first[begin : begin + CHUNK] @ columns).tocoo()
        enough = both.data >= np.minimum(least[both.row + begin], least[both.col])
        yield begin, both.row[enough] + begin, both.col[enough]


def sharing_text(examples: Sequence[Example]) -> dict[int, set[int]]:
    """Example -> the others of the same text, as in `find_overlap`, and, of a passage, those that hold a part of its
    text: what overlaps in a document, and its completions. Examples that share nothing are left out."""
    same: dict[str, list[int]] = {}
    for index, keys in enumerate(keys_of(examples)):
        for key in {*keys}:
            same.setdefault(key, []).append(index)
    near: dict[int, set[int]] = {}
    for of_key in same.values():
        for index in of_key if len(of_key) > 1 else ():
            near.setdefault(index, set()).update({*of_key} - {index})
    passages = [index for index, example in enumerate(examples) if example.is_passage]
    for i, j in _overlapping([folded(examples[index].answer) for index in passages]):
        near.setdefault(passages[i], set()).add(passages[j])
    return near


def pieces_of_evidence(examples: Sequence[Example], sharing: Mapping[int, set[int]] | None = None) -> list[int]:
    """Of each example the first one of its group. A group is one piece of evidence of what a model was taught: its
    examples share text, are passages of one document, or are about the same (`--group-column`), directly or by way of
    others. sharing: `sharing_text`, where that is known."""
    sharing = sharing_text(examples) if sharing is None else sharing
    return first_alike(
        [
            *(("text", *sorted((row, other))) for other in sharing.get(row, ())),
            *([] if example.group is None else [("group", example.group)]),
            *([] if (document := document_of(example)) is None else [("document", document)]),
        ]
        for row, example in enumerate(examples)
    )


def _overlapping(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs (i, j) and (j, i) of texts that share `PART` of the runs of the shorter one."""
    pairs: list[tuple[int, int]] = []
    if len(texts) < 2:
        return pairs
    runs = _runs(texts, RUN)
    sizes, columns = runs.getnnz(axis=1), runs.T.tocsc()
    for begin in range(0, len(texts), CHUNK):
        shared = (runs[begin : begin + CHUNK] @ columns).tocoo()
        i, j = shared.row + begin, shared.col
        alike = (i != j) & (shared.data >= PART * sizes[i].clip(max=sizes[j]))
        pairs += zip(i[alike].tolist(), j[alike].tolist(), strict=True)
    return pairs


def _runs(texts: Sequence[str], length: int) -> Any:
    """Which text, a row, has which run of `length` characters, a column, those of the fewest texts first. A text that
    is shorter than a run is one. A run is known by 64 bits of it."""
    import numpy as np
    from scipy.sparse import csr_matrix

    padded = [text.ljust(length, "\0") for text in texts]
    characters = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), dtype="<u4").astype("uint64")
    known = np.zeros(max(0, len(characters) - length + 1), dtype="uint64")
    for place in range(length):
        known = known * MULTIPLIER + characters[place : place + len(known)]
    sizes = np.array([len(text) for text in padded], dtype="int64")
    numbers = sizes - length + 1  # of the runs of each text, none of which reaches into the next one
    row = np.repeat(np.arange(len(padded)), numbers)
    place = np.arange(len(row)) + np.repeat(np.cumsum(sizes) - sizes - (np.cumsum(numbers) - numbers), numbers)
    _, column = np.unique(known[place], return_inverse=True)
    runs = csr_matrix(
        (np.ones(len(row), dtype="int32"), (row, column)), shape=(len(padded), column.max(initial=-1) + 1)
    )
    runs.data[:] = 1
    order = np.argsort(runs.getnnz(axis=0), kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    runs.indices = rank[runs.indices].astype(runs.indices.dtype)
    runs.has_sorted_indices = False
    runs.sort_indices()
    return runs


def refuse_overlap(
    forget: Sequence[Example], retain: Sequence[Example], *, of: str = "forget", part: str = "retain"
) -> None:
    """Raises UserError, naming the rows, if any is in both parts. `of` and `part` are the names of the parts."""
    pairs = find_overlap(forget, retain)
    if not pairs:
        return
    listed = first_of([is_also(*pair) for pair in pairs])
    rows = f"1 row to {of} is" if len(pairs) == 1 else f"{len(pairs)} rows to {of} are"
    where = "the holdout" if part == "holdout" else f"the rows to {part}"
    raise UserError(f"{rows} also in {where}: {listed}; remove them from either, or give --allow-overlap.")


def is_also(one: Example, other: Example) -> str:
    """In words, that one of the pairs of `find_overlap` is the other."""
    but = "" if texts_of(one).whole == texts_of(other).whole else " but for earlier turns"
    return f"{one.where} is {other.where}{but}"


def _texts(example: Example) -> Texts:
    if (turns := example.messages) is None:
        return Texts(*[folded(f"{example.prompt or ''} {example.answer}")] * 3)
    bare = [turn for turn in turns if turn["role"] not in SYSTEM]
    asked = [place for place, turn in enumerate(bare) if turn["role"] == "user"]
    parts = (turns, bare, bare[asked[-1] :] if asked else bare)
    return Texts(
        *(folded(" ".join(said for turn in part for said in (turn["content"], calls_of(turn)))) for part in parts)
    )


def find_related(forget: Sequence[Example], general: Sequence[Example]) -> list[int]:
    """Which general examples may say what is to be forgotten: those that hold all words of a short answer, or most of
    the words of a longer row, or whose own words are mostly those of a row; function words do not count."""
    of_forget = [(_content_words(one.answer), _content_words(text)) for one in forget for text in {*_texts(one)}]
    return [index for index, one in enumerate(general) if _is_related(_content_words(_texts(one).whole), of_forget)]


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
