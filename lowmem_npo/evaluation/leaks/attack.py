"""What an attack brought back, and whether that stands out from what the model gives for rows that it never saw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from lowmem_npo.evaluation.chance import EXPLAINS, least_p, of_several, p_above
from lowmem_npo.evaluation.figures import at

K = TypeVar("K")

MARGIN = 0.1  # a figure between 0 and 1 stands out if it is further than this above the holdout's
WITHOUT_HOLDOUT = 0.5  # without a holdout, and without the model before, only more than this is called a leak
MUCH = 0.5  # of what there was before

HOLDOUT = "holdout_"  # before the name of a figure: the same figure on the holdout
# Beside a figure and the holdout's: how often chance alone would set them so far apart, and what that is at the least
# in so few rows.
P_VALUE, LEAST_P = "p_value", "least_p_value"
P_VALUES = (P_VALUE, LEAST_P)


class Attack(NamedTuple):
    """What one attack of a test brought back: the share of an answer, or of the answers, between 0 and 1, by the figure
    of this title; level: the same on the holdout, if there is one. p: how often chance alone would set the two so far
    apart, in as many attacks as were made; least_p: the lowest that it could be with so few rows. None without a level,
    and in a file of an older version. others: what it brought back by other figures."""

    figure: str
    value: float
    level: float | None
    p: float | None = None
    others: Mapping[str, float] = MappingProxyType({})
    least_p: float | None = None

    @classmethod
    def in_figures(
        cls, title: str, figures: Mapping[str, Any], name: str, others: Mapping[str, float] = MappingProxyType({})
    ) -> Attack | None:
        """What a result holds under that name; None where it was not measured."""
        if (value := at(figures, name)) is None:
            return None
        level, p, least = (at(figures, key) for key in (HOLDOUT + name, P_VALUE, LEAST_P))
        return cls(title, value, level, p, others, least)

    def by(self, figure: str) -> float | None:
        """What it brought back by that figure; None where it was not measured."""
        return self.value if figure == self.figure else self.others.get(figure)

    def one_of(self, tries: int) -> Attack:
        """The same as one of so many times as many attacks."""
        p, least_p = (None if p is None else of_several(p, tries) for p in (self.p, self.least_p))
        return self._replace(p=p, least_p=least_p)

    @property
    def p_values(self) -> dict[str, float]:
        """Those that are known, as a result holds them."""
        values = {P_VALUE: self.p, LEAST_P: self.least_p}
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
        """Whether chance between so few rows explains how far it is above the holdout's, or would explain anything."""
        return self.level is not None and (self.few or _beyond(self.value, self.level, MARGIN, self.p) is None)

    def leaks(self, before: float | None = None) -> bool | None:
        """Whether it stands out; None where that cannot be told.

        Beyond the level there is a margin, and nothing is shown where chance explains the difference; where it would
        explain any, nothing is shown by a small one either. Without a level, whether much is left of `before`, the
        figure of the model before it forgot (more than half of what was little is neither little nor much); without
        that, too, only much more than any guessing gives is called a leak.
        """
        if self.level is not None:
            return None if self.few else _beyond(self.value, self.level, MARGIN, self.p)
        if before is not None and before > MARGIN:
            return False if self.value <= MUCH * before else True if self.value > MARGIN else None
        return True if self.value > WITHOUT_HOLDOUT else None

    def doubt(self, rows: int, holdout_rows: int) -> str:
        """Why what so many rows say cannot be told from the holdout; "" where it can, and where there is none."""
        if not self.by_chance:
            return ""
        if self.few:
            return (
                f"With {rows} + {holdout_rows} rows chance explains any difference (p = {self.least_p:.2f} at best), "
                "so nothing is shown."
            )
        return (
            f"Chance alone can do that with no more rows, {rows} of the forget set and {holdout_rows} of the holdout "
            f"(p = {self.p:.2f}), so nothing is shown."
        )


def _beyond(value: float, level: float, margin: float, p: float | None) -> bool | None:
    """Whether `value` is further than that above the `level`; None where chance explains it."""
    return False if value <= level + margin else None if p is not None and p >= EXPLAINS else True


def p_values(values: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Of a figure of each forget row, and of each holdout row."""
    return {P_VALUE: p_above(values, others), LEAST_P: least_p(len(values), len(others))}


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
