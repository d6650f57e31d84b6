"""Which results of leak tests tell nothing of the forgetting, since they were the same before it."""

from __future__ import annotations

from collections.abc import Mapping

from lowmem_npo.evaluation.leaks.contract import LeakResult, LeakResults, LeakVerdict

NONE_BEFORE = LeakVerdict("no traces found, as before", "unknown")
TELLS_NOTHING = "It found no traces before the model forgot either, so it tells nothing of that."


def none_before(results: LeakResults, before: Mapping[str, LeakResult]) -> list[str]:
    """The tests that find no traces where they found none before the model forgot either, beside a holdout both times:
    where that is known to the model, too, or the rows were never recited, every comparison passes, whatever was
    forgotten. What is found now stays found."""
    return [name for name, result in results.items() if _none(result) and name in before and _none(before[name])]


def conclusive(results: LeakResults, before: Mapping[str, LeakResult]) -> LeakResults:
    """The results that tell something of the forgetting."""
    passed_before = none_before(results, before)
    return {name: of for name, of in results.items() if of.leaks is not None and name not in passed_before}


def _none(result: LeakResult) -> bool:
    """Whether a test found no traces beside a holdout."""
    return result.leaks is False and not result.against_before
