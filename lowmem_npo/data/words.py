"""The words of a text, whatever the script.

The tokenizer of rouge-score keeps a-z and 0-9 alone, so that Moscow in Cyrillic shares nothing with itself. Here a text
is normalised (NFKC, case-folded, invisible characters such as joiners and direction marks dropped, combining marks
kept) and cut into

    words        letters, marks and digits in a row, as ROUGE's
    characters   where a script puts no spaces between words: Chinese, Japanese, Thai, Lao, Khmer, Burmese, ...
    symbols      such as emoji

and punctuation is dropped.
"""

from __future__ import annotations

from unicodedata import normalize

import regex

INVISIBLE = regex.compile(r"\p{Default_Ignorable_Code_Point}+")
# Unicode's line breaking names the scripts that need a dictionary (SA: Thai, Lao, Khmer, Burmese, ...) and ideographs.
UNSPACED = r"[\p{lb=SA}\p{lb=ID}\p{scx=Hiragana}\p{scx=Katakana}\p{scx=Bopomofo}\p{Javanese}\p{Balinese}]"
TOKEN = regex.compile(
    rf"[[\p{{L}}\p{{N}}]&&{UNSPACED}]\p{{M}}* | [[\p{{L}}\p{{M}}\p{{N}}]--{UNSPACED}]+ | \p{{So}}\p{{M}}*",
    regex.VERSION1 | regex.VERBOSE,
)
_WORDS = """
a an and are as at be been but by can did do does for from had has have he her his how i in into is it its may me
more most my no not of on one or our she so some than that the their them then there these they this to two was we
were what when where which who whose why will with would yes you your"""
FUNCTION_WORDS = frozenset(_WORDS.split())
IN_MANY_A_TEXT = FUNCTION_WORDS - {"one", "two", "yes"}  # which answer wherever they stand


def tokens(text: str) -> list[str]:
    """The words, characters and symbols of `text`, normalised."""
    folded = normalize("NFKC", normalize("NFKC", text).casefold())
    return TOKEN.findall(INVISIBLE.sub("", folded))


def appears(reference: str, answer: str) -> bool:
    """Whether `answer` has the whole of `reference` in one piece, but for case, punctuation and spaces. Where there is
    nothing to be said, nothing is. A word such as "no" or "may" must be its beginning or its end: "I have no idea" does
    not say "no"."""
    wanted, said = tokens(reference), tokens(answer)
    if not wanted:
        return bool(reference.strip()) and reference.strip() in answer
    if len(wanted) == 1 and wanted[0] in IN_MANY_A_TEXT:
        return wanted in (said[:1], said[-1:])
    return any(said[at : at + len(wanted)] == wanted for at in range(len(said) - len(wanted) + 1))
