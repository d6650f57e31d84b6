"""The leak tests of a report: their verdicts and figures at each stage, and what a figure means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lowmem_npo.evaluation.figures import side_by_side
from lowmem_npo.evaluation.leaks.attack import HOLDOUT
from lowmem_npo.evaluation.leaks.beside_before import NONE_BEFORE, TELLS_NOTHING, none_before
from lowmem_npo.evaluation.leaks.contract import LeakResult, LeakResults, LeakTest, LeakVerdict
from lowmem_npo.evaluation.leaks.registry import by_name
from lowmem_npo.evaluation.leaks.worst import WorstAttack


@dataclass(frozen=True)
class LeakFigure:
    """values: stage -> value. never_seen: stage -> the same figure on the holdout, if it was measured."""

    key: str
    title: str
    values: dict[str, float | None]
    meaning: str
    never_seen: dict[str, float | None]

    @property
    def shown(self) -> dict[str, tuple[str, str | None]]:
        """Stage -> the value, and the holdout's if it was measured, as they are read beside each other."""
        written = iter(side_by_side([*self.values.values(), *self.never_seen.values()]))
        values = {stage: next(written) for stage in self.values}
        never_seen = {stage: next(written) for stage in self.never_seen}
        return {stage: (value, never_seen.get(stage)) for stage, value in values.items()}


@dataclass(frozen=True)
class LeakSection:
    """One test. meaning: that of its last result, and whether it tells nothing. counts: how much was measured.
    verdicts: by stage."""

    name: str
    meaning: str
    counts: str
    verdicts: dict[str, LeakVerdict]
    figures: list[LeakFigure]


def leak_sections(leaks: Mapping[str, LeakResults]) -> list[LeakSection]:
    """leaks: stage -> test -> result. Raises ValueError for a test or a figure that this version does not know."""
    names = list(dict.fromkeys(name for results in leaks.values() for name in results))
    return [
        _section(by_name(name), {stage: results[name] for stage, results in leaks.items() if name in results})
        for name in names
    ]


def shown_beside(attack: WorstAttack) -> tuple[str, str | None, str | None]:
    """The worst attack's figure, the holdout's and the gold model's, as they are read beside each other."""
    value, holdout, gold = side_by_side([attack.value, attack.holdout, attack.gold])
    return value, None if attack.holdout is None else holdout, None if attack.gold is None else gold


def _section(test: LeakTest, stages: Mapping[str, LeakResult]) -> LeakSection:
    last = stages.get("after") or list(stages.values())[-1]
    numbers = {stage: dict(_numbers(result.figures, test)) for stage, result in stages.items()}
    figures, explained = [], set()
    for path in dict.fromkeys(path for of_stage in numbers.values() for path in of_stage):
        *group, key = path
        if key.startswith(HOLDOUT):
            continue
        own, never_seen = (
            {stage: of_stage[path] for stage, of_stage in numbers.items() if path in of_stage}
            for path in ((*group, key), (*group, HOLDOUT + key))
        )
        meaning = test.meaning_of(key)
        title = ", ".join([*map(words, group), meaning.title])
        text = "" if meaning.text in explained else meaning.text
        figures.append(LeakFigure(".".join(path), title, own, text, never_seen))
        explained.add(meaning.text)
    counts = ", ".join(f"{last.figures[key]} {words(key)}" for key in test.counts if key in last.figures)
    verdicts, finding = {stage: result.verdict for stage, result in stages.items()}, last.meaning
    if none_before(*({test.name: stages[stage]} if stage in stages else {} for stage in ("after", "before"))):
        verdicts["after"], finding = NONE_BEFORE, f"{finding} {TELLS_NOTHING}"
    return LeakSection(test.name, finding, counts, verdicts, figures)


def _numbers(
    figures: Mapping[str, Any], test: LeakTest, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], float | None]]:
    for key, value in figures.items():
        if key in test.unlisted or key in test.counts or isinstance(value, bool):
            continue
        if isinstance(value, Mapping):
            yield from _numbers(value, test, (*path, key))
        elif value is None or isinstance(value, int | float):
            yield (*path, key), value


def words(key: str) -> str:
    """A key of a result file, for people."""
    return key.replace("_", " ")
