"""Attacks beside each other, of one leak test or of several: how they are called, and which is the worst."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

from lowmem_npo.evaluation.leaks.contract import Attack, above_holdout

K = TypeVar("K")


def attack_name(test: str, attack: str) -> str:
    """Of an attack beside those of other tests; `attack` is "" where the test has only one."""
    return f"{test}: {attack}" if attack else test


def split_name(name: str) -> tuple[str, str]:
    """The inverse of `attack_name`."""
    test, _, attack = name.partition(": ")
    return test, attack


def standing(value: float, level: float | None, usual: float, p: float | None = None) -> tuple[bool, float]:
    """Orders what several attacks brought back: first whether it stands out, then how far it is above the level.

    usual: stands for the level of an attack that has none. It then still comes before all that do not stand out if it
    is more than any guessing gives, and last if it brought nothing back.
    """
    if level is None and value == 0:
        return False, -math.inf
    return above_holdout(value, level, p=p) is True, value - (usual if level is None else level)


def furthest(attacks: Mapping[K, Attack]) -> K:
    """The worst of them, by `standing`. Where one has no level, the highest of the others' by the same figure stands
    for it, 0 if they have none either."""
    usual: dict[str, float] = {}
    for one in attacks.values():
        if one.level is not None:
            usual[one.figure] = max(one.level, usual.get(one.figure, 0.0))

    def stands(key: K) -> tuple[bool, float]:
        one = attacks[key]
        return standing(one.value, one.level, usual.get(one.figure, 0.0), one.p)

    return max(attacks, key=stands)
