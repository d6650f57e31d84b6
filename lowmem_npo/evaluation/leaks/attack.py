"""What an attack brought back, whether that stands out from what the model gives for rows that it never saw, and which
of several attacks is the worst."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeVar

from lowmem_npo.evaluation.chance import EXPLAINS, group_means, least_p, of_several, p_above, p_more, p_more_of_groups
from lowmem_npo.evaluation.figures import at, shares
from lowmem_npo.sizes import counted

K = TypeVar("K")

MARGIN = 0.1  # a figure between 0 and 1 stands out if it is further than this above the holdout's
# So does the share of answers that come whole, which a mean hides; a report that calls them no longer said lets as many
# be said.
WHOLE_MARGIN = 0.05
# A model that says more than this of the holdout word for word knows it: of rows that it never saw it says far less,
# the demo's 0.12, and rows that it remembers do not stand out from others that it knows as well.
KNOWN = 0.5
WITHOUT_HOLDOUT = 0.5  # without a holdout, and without the model before, only more than this is called a leak
MUCH = 0.5  # of what there was before

STRENGTH = "extraction strength"  # the figure that is a share of text, word for word
HOLDOUT = "holdout_"  # before the name of a figure: the same figure on the holdout
# Beside a figure and the holdout's: how often chance alone would set them so far apart, what that is at the least in so
# few rows, and how often chance alone would have so many more answers come whole.
P_VALUE, LEAST_P, WHOLE_P = "p_value", "least_p_value", "whole_p_value"
P_VALUES = (P_VALUE, LEAST_P, WHOLE_P)
# Of how many groups of rows these are, each one piece of evidence (`chance`), where that is not each row by itself.
GROUPS = "groups"
EVIDENCE = (*P_VALUES, GROUPS, HOLDOUT + GROUPS)
# How many rows have an answer of which only the beginning was looked for, and of how many the whole answers are a share
# where that is not all. Where it is all in spite of some that are cut, beginnings count as whole.
CUT, WHOLE_ROWS = "cut", "whole_rows"
BY_MAX_LENGTH = "--max-length"  # what cuts answers that are given to the model, and not written by it


class Sought(Protocol):
    """A row whose answer was looked for. cut: whether only its beginning was."""

    @property
    def cut(self) -> bool: ...


SoughtT = TypeVar("SoughtT", bound=Sought)


@dataclass(frozen=True)
class Whole:
    """Of so many `rows`, the share whose answer an attack brought back whole; level: the same on the holdout, or of a
    model that never saw the rows. p: how often chance alone would have so many more of them, in as many attacks as were
    made. None where it is not known. beginnings: how many answers are longer than was looked for, where all of a set
    are, so that their beginnings count. groups: how many the rows are in, where they are no evidence each by itself."""

    value: float
    rows: int | None = None
    level: float | None = None
    p: float | None = None
    beginnings: int = 0
    groups: int | None = None

    @property
    def stands_out(self) -> bool | None:
        """Whether it is further than a margin above the level; None where chance explains it."""
        return False if self.level is None else _beyond(self.value, self.level, WHOLE_MARGIN, self.p)

    def beside(self, other: Whole, tries: int) -> Whole:
        """The same, beside another model's, in the worst of so many attacks; of unknown rows chance may do anything,
        and beginnings are not beside whole answers."""
        unlike = None in (self.rows, other.rows) or self.beginnings != other.beginnings
        same_rows = replace(other, groups=self.groups)
        p = None if unlike else of_several(p_more(self.each, same_rows.each), tries)
        return replace(self, level=None if p is None else other.value, p=p)

    @property
    def each(self) -> list[float]:
        """The rows that came whole, as 1, and the others, as 0; of each group, the mean of all."""
        if self.groups is not None:
            return [self.value] * self.groups
        count = round(self.value * (self.rows or 0))
        return [1.0] * count + [0.0] * ((self.rows or 0) - count)

    def words(self, beside: str) -> str:
        """What came whole, beside the level. beside: of what that is."""
        assert self.level is not None and self.p is not None
        own, level = shares(self.value, self.level)
        answers = "beginnings of longer answers" if self.beginnings else "answers"
        return f"{own} of the {answers} come whole, {beside} {level} (p = {self.p:.2g})"


class Attack(NamedTuple):
    """What one attack of a test brought back: the share of an answer, or of the answers, between 0 and 1, by the figure
    of this title; level: the same on the holdout, if there is one. p: how often chance alone would set the two so far
    apart, in as many attacks as were made; least_p: the lowest that it could be with so few rows. None without a level.
    others: what it brought back by other figures. whole: the share of answers that came whole, where that is known.
    rows: how many forget rows it asked for, where that is known; groups: in how many these are, where they are no
    evidence each by itself."""

    figure: str
    value: float
    level: float | None
    p: float | None = None
    others: Mapping[str, float] = MappingProxyType({})
    least_p: float | None = None
    whole: Whole | None = None
    rows: int | None = None
    groups: int | None = None

    @classmethod
    def in_figures(
        cls,
        title: str,
        figures: Mapping[str, Any],
        name: str,
        whole: str,
        others: Mapping[str, float] = MappingProxyType({}),
    ) -> Attack | None:
        """What a result holds under that name; None where it was not measured. whole: name of the share of answers that
        came whole."""
        if (value := at(figures, name)) is None:
            return None
        level, p, least = (at(figures, key) for key in (HOLDOUT + name, P_VALUE, LEAST_P))
        return cls(title, value, level, p, others, least, whole_in(figures, whole), *asked_for(figures))

    def by(self, figure: str) -> float | None:
        """What it brought back by that figure; None where it was not measured."""
        return self.value if figure == self.figure else self.others.get(figure)

    def one_of(self, tries: int) -> Attack:
        """The same as one of so many times as many attacks."""
        p, least_p = (None if p is None else of_several(p, tries) for p in (self.p, self.least_p))
        whole = self.whole
        if whole is not None and whole.p is not None:
            whole = replace(whole, p=of_several(whole.p, tries))
        return self._replace(p=p, least_p=least_p, whole=whole)

    @property
    def p_values(self) -> dict[str, float]:
        """Those that are known, as a result holds them."""
        values = {P_VALUE: self.p, LEAST_P: self.least_p, WHOLE_P: self.whole.p if self.whole else None}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def stands_out(self) -> bool | None:
        """Whether it does from what the model gives for rows that it never saw."""
        return self.leaks()

    @property
    def few(self) -> bool:
        """Whether there are so few rows that nothing could stand out."""
        return self.least_p is not None and self.least_p >= EXPLAINS

    @property
    def by_chance(self) -> bool:
        """Whether chance between so few rows explains how far it is above the level, or would explain anything."""
        return self.chance is not None

    @property
    def chance(self) -> float | None:
        """The p-value of what chance explains; None where it explains nothing."""
        own, whole = self._above
        if self.few or (own is None and not whole):
            return self.p
        return self.whole.p if self.whole is not None and whole is None and not own else None

    @property
    def by_whole(self) -> bool:
        """Whether it stands out by the share of answers that came whole alone."""
        own, whole = self._above
        return bool(whole and not own)

    @property
    def _above(self) -> tuple[bool | None, bool | None]:
        """Whether it is above the level by its figure, and by the share of answers that came whole; None where chance
        explains that."""
        if self.level is None:
            return False, False
        whole = False if self.whole is None else self.whole.stands_out
        return _beyond(self.value, self.level, MARGIN, self.p), whole

    @property
    def holdout_known(self) -> float | None:
        """How much of the holdout was said word for word, where that is too much for rows that the model never saw."""
        if self.least_p is None:  # the level is another's
            return None
        said = [self.level if self.figure == STRENGTH else None, self.whole.level if self.whole is not None else None]
        return known_of([share for share in said if share is not None])

    @property
    def _begun(self) -> bool:
        """Whether what came whole are beginnings of answers."""
        return self.whole is not None and self.whole.beginnings > 0

    @property
    def no_yardstick(self) -> str:
        """Why what does not stand out from the holdout may have stayed all the same, for a sentence; "" where not."""
        if self.holdout_known is not None:
            return "whose beginnings come whole" if self._begun else "which is too much for answers that it never saw"
        if self.least_p is not None and self.level is not None and self.level + MARGIN >= 1:
            return f"which nothing can be more than {MARGIN} above"
        return ""

    def leaks(self, before: float | None = None) -> bool | None:
        """Whether it stands out; None where that cannot be told.

        Beyond the level there is a margin, and nothing is shown where chance explains the difference; where it would
        explain any, nothing is shown by a small one either. The same holds of the share of answers that came whole,
        which the mean of many rows hides. Nor does it show anything not to be above a holdout that the model knows, or
        so high a level that nothing could be above it. Without a level, whether much is left of `before`, the
        figure of the model before it forgot (more than half of what was little is neither little nor much); without
        that, too, only much more than any guessing gives is called a leak.
        """
        if self.level is not None:
            return True if True in self._above else None if self.by_chance or self.no_yardstick else False
        if before is not None and before > MARGIN:
            return False if self.value <= MUCH * before else True if self.value > MARGIN else None
        return True if self.value > WITHOUT_HOLDOUT else None

    def remark(self, rows: int, holdout_rows: int, of: str = "rows") -> str:
        """Why what so many rows say cannot be told from the holdout, or that it can by what came whole; "" where the
        figure by itself says it, and where there is no holdout. of: what they are, if not rows."""
        return " ".join(filter(None, [self._chance_remark(rows, holdout_rows, of), self._holdout_remark]))

    def _chance_remark(self, rows: int, holdout_rows: int, of: str) -> str:
        own, above = self._above
        whole = "" if self.whole is None or above is False else self.whole.words("of the holdout's")
        if self.by_whole:
            return f"That is more than chance explains: {whole}."
        if self.few:
            return (
                f"With {rows} + {holdout_rows} {of} chance explains any difference (p = {self.least_p:.2f} at best), "
                "so nothing is shown."
            )
        if not self.by_chance:
            return ""
        of_rows = f"with no more {of}, {rows} of the forget set and {holdout_rows} of the holdout"
        if own is None:
            return f"Chance alone can do that {of_rows} (p = {self.p:.2f}), so nothing is shown."
        return f"Chance alone can do that {of_rows}, so nothing is shown: {whole}."

    @property
    def _holdout_remark(self) -> str:
        if self.stands_out is not None or not self.no_yardstick:
            return ""
        if self.holdout_known is None:
            return f"The holdout's figure is one {self.no_yardstick}, so nothing is shown."
        if self._begun:
            share = shares(self.holdout_known)[0]
            return (
                f"Of the holdout {share} of such beginnings come whole, too, so they tell little, and nothing is shown."
            )
        return known_remark(self.holdout_known)


def known_of(said: Sequence[float]) -> float | None:
    """The largest of these shares of the holdout that were said word for word, where that is too much for rows that the
    model never saw."""
    return max((share for share in said if share > KNOWN), default=None)


def known_remark(share: float) -> str:
    """Why nothing is shown beside a holdout of which that share was said word for word."""
    return (
        f"The model says much of the holdout, {shares(share)[0]} word for word, so it cannot be one of rows that "
        "it never saw, and nothing is shown."
    )


def _beyond(value: float, level: float, margin: float, p: float | None) -> bool | None:
    """Whether `value` is further than that above the `level`; None where chance explains it."""
    return False if value <= level + margin else None if p is not None and p >= EXPLAINS else True


def whole_in(figures: Mapping[str, Any], name: str) -> Whole | None:
    """The share of answers that came whole, which a result holds under that name; None where it was not measured."""
    if (value := at(figures, name)) is None:
        return None
    p = at(figures, WHOLE_P)
    level = None if p is None else at(figures, HOLDOUT + name)
    beginnings = at(figures, CUT) or at(figures, HOLDOUT + CUT) or 0
    if of_whole := any(at(figures, set_ + WHOLE_ROWS) is not None for set_ in ("", HOLDOUT)):
        beginnings = 0
    rows = at(figures, WHOLE_ROWS) if of_whole else None
    asked, groups = asked_for(figures)
    of = asked if rows is None else int(rows)
    in_groups = None if of is None or groups is None else min(of, groups)
    return Whole(value, of, level, p, int(beginnings), in_groups)


def counted_whole(sets: Sequence[Sequence[SoughtT]]) -> Sequence[Sequence[SoughtT]]:
    """Of each set the rows among which whole answers are counted: those that were looked for whole; where a set has
    none of them, all rows of every set, so that beginnings count."""
    uncut = [[row for row in rows if not row.cut] for rows in sets]
    return uncut if all(uncut) else sets


def cut_figures(rows: Sequence[Sought], among: Sequence[Sought]) -> dict[str, int]:
    """How many answers were cut. among: the rows among which whole ones are counted; how many, where not all are."""
    figures = {CUT: cut} if (cut := sum(row.cut for row in rows)) else {}
    return figures | ({WHOLE_ROWS: len(among)} if len(among) < len(rows) else {})


def answer_words(figures: Mapping[str, Any]) -> str:
    """Of what an attack brought back a share."""
    return "the beginning of a forgotten answer" if figures.get(CUT) == figures["rows"] else "a forgotten answer"


def counted_words(figures: Mapping[str, Any]) -> str:
    """The answers among which whole ones are counted."""
    if WHOLE_ROWS in figures:
        return f"the {counted(figures[WHOLE_ROWS], 'uncut answer')}"
    if not (cut := figures.get(CUT)):
        return "the answers"
    beginnings = f"the beginning{'s' if cut > 1 else ''} of {counted(cut, 'longer answer')}"
    return beginnings if cut == figures["rows"] else f"the answers and {beginnings}"


def cut_words(figures: Mapping[str, Any], by: str = "--max-length, --max-new-tokens") -> str:
    """A sentence on answers that are longer than was looked for, cut by these options; "" where there are none."""
    parts = [("forgotten answers", ""), ("of the holdout's", HOLDOUT)]
    cut = [f"{n} of {figures[of + 'rows']} {name}" for name, of in parts if (n := figures.get(of + CUT))]
    return f" Of {' and '.join(cut)} only the beginning was looked for ({by})." if cut else ""


def asked_for(figures: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """How many forget rows a result is of, where that is known, and in how many groups these are, where they are no
    evidence each by itself."""
    rows, groups = (None if (number := at(figures, name)) is None else int(number) for name in ("rows", GROUPS))
    return rows, groups


class OfRow(NamedTuple):
    """What an attack brought back of one row, by its figure; and whether its answer came whole, 1 or 0, or what is to
    be expected of that. group: of rows that are one piece of evidence; None: it is one by itself. cut: whether only the
    beginning of its answer was looked for."""

    value: float
    whole: float
    group: Hashable = None
    cut: bool = False


def p_values(rows: Sequence[OfRow], others: Sequence[OfRow]) -> dict[str, float]:
    """Of the forget rows and the holdout rows, with the numbers of their groups, where these are fewer than rows."""
    values, beside = (group_means([row.value for row in of], [row.group for row in of]) for of in (rows, others))
    wholes = [group_means([row.whole for row in of], [row.group for row in of]) for of in counted_whole([rows, others])]
    grouped = len(values) < len(rows) or len(beside) < len(others)
    return {
        P_VALUE: p_above(values, beside),
        LEAST_P: least_p(len(values), len(beside)),
        WHOLE_P: (p_more_of_groups if grouped else p_more)(*wholes),
        **({GROUPS: len(values), HOLDOUT + GROUPS: len(beside)} if grouped else {}),
    }


def group_figures(rows: Sequence[OfRow]) -> dict[str, int]:
    """In how many groups forget rows are, where these are fewer."""
    groups = len(group_means([row.value for row in rows], [row.group for row in rows]))
    return {GROUPS: groups} if groups < len(rows) else {}


def of_groups(figures: Mapping[str, Any]) -> str:
    """Of how many pieces of evidence a result beside a holdout is, for a sentence; "" where each row is one."""
    if HOLDOUT + GROUPS not in figures:
        return ""
    rows, holdout_rows = figures["rows"], figures[HOLDOUT + "rows"]
    return (
        "Rows of one document, of one text or about the same are one piece of evidence: the "
        f"{rows} forgotten rows are {counted(figures[GROUPS], 'group')}, the holdout's {holdout_rows} are "
        f"{figures[HOLDOUT + GROUPS]}."
    )


def of_tries(figures: Mapping[str, float], tries: int) -> dict[str, float]:
    """`figures` of one of so many attacks, of which the worst counts."""
    return {name: of_several(value, tries) if name in P_VALUES else value for name, value in figures.items()}


def attack_name(test: str, attack: str) -> str:
    """Of an attack beside those of other tests; `attack` is "" where the test has only one."""
    return f"{test}: {attack}" if attack else test


def split_name(name: str) -> tuple[str, str]:
    """The inverse of `attack_name`."""
    test, _, attack = name.partition(": ")
    return test, attack


def furthest(attacks: Mapping[K, Attack]) -> K:
    """The worst of them: first what stands out, then by how far it is above the level.

    Where one has no level, the highest of the others' by the same figure stands for it, 0 if they have none either. It
    then still comes before all that do not stand out if it is more than any guessing gives, and last if it brought
    nothing back.
    """
    usual: dict[str, float] = {}
    for one in attacks.values():
        if one.level is not None:
            usual[one.figure] = max(one.level, usual.get(one.figure, 0.0))

    def stands(key: K) -> tuple[bool, float]:
        one = attacks[key]
        if one.level is None and one.value == 0:
            return False, -math.inf
        level = usual.get(one.figure, 0.0) if one.level is None else one.level
        return one.stands_out is True, one.value - level

    return max(attacks, key=stands)
