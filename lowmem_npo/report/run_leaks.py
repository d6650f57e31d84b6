"""What leak tests have found of the adapter of a run: by the run itself, and by every evaluation of it since.

One result of a test counts, for the report and for `lowmem-npo merge` alike. Of results that were measured alike it is
the later one, unless that says less; of others the one that finds more: an attack that does not find traces takes back
only what the same attack, with the same options, has found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

from lowmem_npo.evaluation.comparing import (
    changed_options,
    loaded_otherwise,
    measured_otherwise,
    of_measured_rows,
    other_options,
)
from lowmem_npo.evaluation.figures import at
from lowmem_npo.evaluation.leaks.contract import LeakResult, LeakResults
from lowmem_npo.evaluation.leaks.registry import LEAK_TESTS

AFTER = "after"


class Tested(NamedTuple):
    """Leak tests of an adapter, as its run or one evaluation made them.

    settings: what run.yaml or settings.json holds. stages: stage -> test -> result. evaluation: the name of its
    directory; None of the run itself.
    """

    settings: Mapping[str, Any]
    stages: Mapping[str, LeakResults]
    evaluation: str | None = None

    @property
    def after(self) -> LeakResults:
        return self.stages.get(AFTER, {})

    @property
    def name(self) -> str:
        return "the run" if self.evaluation is None else f"'{self.evaluation}'"


def standing(test: str, tested: Sequence[Tested]) -> Tested:
    """Whose result of `test` counts, of those that have one. tested: in the order in which they were made."""
    return _worst(test, _not_replaced(test, tested))


def merged_leaks(tested: Sequence[Tested]) -> tuple[dict[str, LeakResults], list[str]]:
    """Stage -> test -> the result that counts, with those of other stages that can stand beside it; and notes on what
    was measured otherwise, and is left out."""
    merged: dict[str, LeakResults] = {"before": {}, AFTER: {}, "gold": {}}
    for one in tested:
        merged |= {stage: {} for stage in one.stages if stage not in merged}
    notes: list[str] = []
    for test in dict.fromkeys(test for one in tested for results in one.stages.values() for test in results):
        known = [one for one in tested if any(test in results for results in one.stages.values())]
        counts = known[-1]
        if any(test in one.after for one in tested):
            counts = standing(test, tested)
            notes += _notes(test, known, counts)
        beside = [one for one in known if _stands_beside(test, one, counts)]
        for stage, results in merged.items():
            for one in [counts, *reversed(beside)]:
                if test in one.stages.get(stage, {}):
                    results[test] = one.stages[stage][test]
                    break
    return {stage: results for stage, results in merged.items() if results}, notes


def measured_with_other(test: str, earlier: Tested, later: Tested) -> list[str]:
    """The flags because of which two results of a test cannot take each other's place, as far as is known."""
    of_test = next((one for one in LEAK_TESTS if one.name == test), None)
    if later.evaluation is None or of_test is None:
        return []
    if earlier.evaluation is None:
        return measured_otherwise(earlier.settings, later.settings).get(test, [])
    then, now = (one.settings.get("digests", {}) for one in (earlier, later))
    same_holdout = then.get("holdout") == now.get("holdout")  # of which either may have measured a half
    then, now = of_measured_rows(then), of_measured_rows(now)
    others = [part for part in ("retain", "holdout") if part in then and then[part] != now.get(part)]
    flags = loaded_otherwise(earlier.settings, later.settings)
    flags += ["--forget-level" if same_holdout else "--holdout"] if "holdout" in others else []
    flags += [f"--{name}" for name in changed_options(earlier.settings, later.settings, ["seed"])]
    return flags + other_options(earlier.settings, later.settings, of_test, others)


def _not_replaced(test: str, tested: Sequence[Tested]) -> list[Tested]:
    """Those with a result that no other one, measured alike, has replaced."""
    kept: list[Tested] = []
    for later in (one for one in tested if test in one.after):
        alike = [own for own in kept if not measured_with_other(test, own, later)]
        if not any(_still_counts(own.after[test], later.after[test]) for own in alike):
            kept = [own for own in kept if all(own is not one for one in alike)] + [later]
    return kept


def _still_counts(own: LeakResult, later: LeakResult) -> bool:
    """Whether a result counts, and not the later one, which was measured alike: it tells something where that one
    cannot, or that one is of far fewer rows and finds no more."""
    if own.leaks is None and own.figures:  # it could not tell from what it measured
        return not later.figures if later.leaks is None else later.leaks is False and _far_fewer(later, own)
    if own.leaks is None or later.leaks is None:
        return own.leaks is not None
    if (later.leaks and not own.leaks) or (own.against_before and not later.against_before):
        return False
    return _far_fewer(later, own)


def _worst(test: str, measured: Sequence[Tested]) -> Tested:
    """The one that finds most, of results that were measured otherwise than each other; of equal ones the later."""
    return reduce(lambda one, later: later if _outweighs(later.after[test], one.after[test]) else one, measured)


def _outweighs(later: LeakResult, own: LeakResult) -> bool:
    """Whether the later result counts, of two that were measured otherwise than each other."""
    now, was = _finds(later), _finds(own)
    if (now, was) == (0, 1):  # few rows cannot tell what many can
        return _far_fewer(own, later)
    return not _far_fewer(later, own) if now == was or (now, was) == (1, 0) else now > was


def _finds(result: LeakResult) -> int:
    """How much: 2 traces, 1 what may be traces, 0 none, -1 nothing was measured."""
    if result.leaks is None:
        return 1 if result.figures else -1
    return 2 if result.leaks else 0


def _far_fewer(result: LeakResult, other: LeakResult) -> bool:
    """Whether it is of less than half as many rows."""
    rows, of_other = (at(of.figures, "rows") or 0 for of in (result, other))
    return 2 * rows < of_other


def _stands_beside(test: str, one: Tested, counts: Tested) -> bool:
    """Whether what `one` has of other stages can be read beside the result that counts: it was made before that, alike,
    and, of two evaluations, of the same rows."""
    if one is counts or counts.evaluation is None or measured_with_other(test, one, counts):
        return False
    then, now = (of.settings.get("digests", {}).get("forget") for of in (one, counts))
    return one.evaluation is None or (then is not None and then == now)


def _notes(test: str, known: Sequence[Tested], counts: Tested) -> Iterator[str]:
    """known: all that have a result of the test, at any stage."""
    place = next(i for i, one in enumerate(known) if one is counts)
    not_replaced = _not_replaced(test, known)
    for i, one in enumerate(known):
        is_run = one.evaluation is None
        if one is counts or not (is_run or any(one is kept for kept in not_replaced)):
            continue
        if not is_run and _finds(one.after[test]) < 0:
            continue
        earlier, later = (one, counts) if i < place else (counts, one)
        if not (flags := measured_with_other(test, earlier, later)):
            continue
        than = "" if earlier.evaluation is None else f" than {earlier.name}"
        otherwise = f"{test}: {later.name} measured it with another {', '.join(flags)}{than}"
        if is_run:
            yield f"{otherwise}: its result counts, and those of the run before that are left out."
        elif later is counts:
            yield f"{otherwise}: its result counts."
        elif (found := _finds(counts.after[test])) == _finds(one.after[test]):
            yield f"{otherwise}: of fewer rows, its result is left out."
        else:
            did = "find the traces that {} found" if found == 2 else "find what {} could not tell from traces"
            yield f"{otherwise}, and did not {did.format(earlier.name)}, whose result counts."
