"""What is known of a model that never saw the forget rows, by the evaluation.json that --retained-log names.

Only what was measured alike is compared: a gold model's figure of other rows, or of another attack, says nothing. Where
there are no settings beside that file, as beside one of open-unlearning's, it is taken at its word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lowmem_npo.config import ModelOptions
from lowmem_npo.evaluation.directory import changed_options, other_sets, settings_of
from lowmem_npo.evaluation.leaks.contract import LeakResults, LeakTest
from lowmem_npo.evaluation.leaks.registry import LEAK_TESTS
from lowmem_npo.evaluation.leaks.retuning import RETUNING
from lowmem_npo.evaluation.leaks.worst import retained_leaks
from lowmem_npo.evaluation.open_unlearning import retained_min_k
from lowmem_npo.evaluation.options import FREE


@dataclass(frozen=True)
class Gold:
    """leaks: what its leak tests gave. min_k: its mia_min_k. same_rows: whether its forget rows were the same ones.
    notes: what is not compared, and why."""

    leaks: LeakResults = field(default_factory=dict)
    min_k: float | None = None
    same_rows: bool = True
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Gold:
        """As far as it can be compared with the evaluation that has these settings, those of its settings.json."""
        if (log := settings.get("retained_log")) is None:
            return cls()
        leaks, min_k = retained_leaks(log), retained_min_k(log)
        if (earlier := settings_of(log)) is None:
            return cls(leaks, min_k)
        others = other_sets(earlier, settings, but=[f.name for f in fields(ModelOptions)])  # how gold is stored
        if "forget" in others:
            why = "had other forget rows, or asked for them otherwise"
            return cls(
                same_rows=False, notes=(f"--retained-log: its evaluation {why}, so nothing is compared with it.",)
            )
        notes = []
        if "holdout" in others and min_k is not None:
            min_k = None
            notes.append("privleak is compared with 0.5: the evaluation of --retained-log had another holdout.")
        for test in LEAK_TESTS:
            another = [f"--{name.replace('_', '-')}" for name in changed_options(earlier, settings, _options_of(test))]
            if test is RETUNING and "retain" in others:
                another.append("--retain")
            if another and test.name in leaks:
                del leaks[test.name]
                notes.append(f"{test.name}: not compared with --retained-log, which had another {', '.join(another)}.")
        return cls(leaks, min_k, True, tuple(notes))


def _options_of(test: LeakTest) -> list[str]:
    """The options that change what the test's attacks give, and that their names do not tell."""
    repeated = LEAK_TESTS if test.loads_models else [test]
    own = [f for one in repeated if not one.named_by_options for f in fields(one.options)]
    return [f.name for f in own if FREE not in f.metadata]
