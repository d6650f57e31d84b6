"""What leak tests found, in a sentence of the report."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from lowmem_npo.evaluation.leaks.beside_before import conclusive, none_before
from lowmem_npo.evaluation.leaks.contract import LeakResult, LeakResults


def leaking_tests(results: LeakResults) -> list[str]:
    """The tests that found traces, or, without a holdout, that much is left."""
    return [name for name, result in results.items() if result.leaks is True]


def was_run(result: LeakResult) -> bool:
    """Whether it is one of a test that could be run."""
    return bool(result.figures) or result.leaks is not None


class OnGold(NamedTuple):
    """What is known of some tests on a model that never saw the rows, judged by a holdout there, too: those that find
    traces on it, those that find none or could not tell, and those that were not run on it."""

    leaking: list[str]
    clean: list[str]
    undecided: list[str]
    not_run: list[str]

    @classmethod
    def of(cls, tests: Iterable[str], gold: LeakResults) -> OnGold:
        known = cls([], [], [], [])
        for name in tests:
            result = gold.get(name)
            if result is None or not was_run(result):
                known.not_run.append(name)
            elif result.leaks is None or result.against_before:
                known.undecided.append(name)
            else:
                (known.leaking if result.leaks else known.clean).append(name)
        return known

    @property
    def sentences(self) -> list[str]:
        """In the words of a report."""
        said = []
        if self.leaking or self.clean:
            said.append(f"In a model that never saw the rows: {', '.join(self.leaking) or 'none'}.")
        for tests, what in ((self.not_run, "not run on"), (self.undecided, "not conclusive on")):
            if tests:
                model = "that model" if said else "a model that never saw the rows"
                said.append(f"{what.capitalize()} {model}: {', '.join(tests)}.")
        return said


def leak_sentence(
    results: LeakResults, gold: LeakResults | None, has_attack: bool, before: LeakResults | None = None
) -> str:
    """results: of the model; gold: of one that never saw the rows, where there is one; before: of the model before it
    forgot, as far as they are known. has_attack: whether a sentence on the worst attack follows."""
    telling = conclusive(results, before or {})
    against_holdout = {name: r for name, r in telling.items() if not r.against_before}
    against_before = {name: r for name, r in telling.items() if r.against_before}
    undecided = [name for name, r in results.items() if r.leaks is None and r.figures]
    passed_before = none_before(results, before or {})
    if not against_holdout and not against_before:
        unknown = "what can still be extracted is not known"
        inconclusive = [name for name in results if name in {*undecided, *passed_before}]
        if not inconclusive:
            return " ".join([f"No leak test was run: {unknown}.", *_too_large(results)])
        none = f"None of the {len(inconclusive)} leak tests that were run was conclusive ({', '.join(inconclusive)})"
        only = f"The one leak test that was run, {inconclusive[0]}, was not conclusive"
        beyond = ", but for what the worst attack brought back" if has_attack else ""
        sentence = f"{only if len(inconclusive) == 1 else none}: {unknown}{beyond}."
        return " ".join([sentence, *_tell_nothing(passed_before), *_too_large(results)])
    sentences = []
    if against_holdout:
        if found := leaking_tests(against_holdout):
            count = f"{len(found)} of {len(against_holdout)}"
            sentences.append(f"Traces in {count} conclusive leak tests: {', '.join(found)}.")
        else:
            sentences.append(f"No traces in any conclusive leak test: {', '.join(against_holdout)}.")
        if found and gold is not None:
            sentences += OnGold.of(found, gold).sentences
    if against_before:
        left = leaking_tests(against_before)
        less = [name for name in against_before if name not in left]
        said = [*([f"much is left by {', '.join(left)}"] if left else []),
                *([f"much less by {', '.join(less)}"] if less else [])]  # fmt: skip
        sentences.append(
            f"Compared with the model before, {'; '.join(said)}; without a holdout it is not known whether that is "
            "more than a model gives that never saw the rows."
        )
    if undecided:
        sentences.append(f"Could not tell: {', '.join(undecided)}.")
    return " ".join([*sentences, *_tell_nothing(passed_before), *_too_large(results)])


def _too_large(results: LeakResults) -> list[str]:
    """A sentence on those for which memory ran out, or for a part of which, if there are any."""
    tests = [
        name if not result.figures else f"{name} (in part)" for name, result in results.items() if result.too_large
    ]
    return [f"Not measured, since memory ran out: {', '.join(tests)}."] if tests else []


def _tell_nothing(tests: list[str]) -> list[str]:
    """A sentence on those that found no traces before either, if there are any."""
    if not tests:
        return []
    which = "it tells" if len(tests) == 1 else "they tell"
    return [f"No traces now, and none before the model forgot, so {which} nothing of that: {', '.join(tests)}."]
