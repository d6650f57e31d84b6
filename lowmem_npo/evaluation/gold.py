"""What is known of a model that never saw the forget rows, by the evaluation.json that --retained-log names.

Only what was measured alike is compared: a gold model's figure of other rows, or of another attack, says nothing. Where
there are no settings beside that file, as beside one of open-unlearning's, it is taken at its word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lowmem_npo.config import ModelOptions
from lowmem_npo.evaluation.comparing import ANOTHER_TOKENIZER, another_tokenizer, other_options, other_sets
from lowmem_npo.evaluation.directory import settings_of
from lowmem_npo.evaluation.leaks.contract import LeakResults
from lowmem_npo.evaluation.leaks.registry import LEAK_TESTS
from lowmem_npo.evaluation.leaks.worst import retained_leaks
from lowmem_npo.evaluation.open_unlearning import retained_min_k
from lowmem_npo.evaluation.other_models import another_size
from lowmem_npo.files import expanded, read_json_lines
from lowmem_npo.run_directory import EvaluationFiles


@dataclass(frozen=True)
class Gold:
    """log: its evaluation.json, None where nothing in it can be compared. leaks: what its leak tests gave. min_k: its
    mia_min_k. same_rows: the sets whose rows, and the way in which they are asked for, were the same ones, though not
    all of them need have been measured; empty where that is not known. notes: what is not compared, and why."""

    log: str | None = None
    leaks: LeakResults = field(default_factory=dict)
    min_k: float | None = None
    same_rows: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Gold:
        """As far as it can be compared with the evaluation that has these settings, those of its settings.json."""
        if (log := settings.get("retained_log")) is None:
            return cls()
        leaks, min_k = retained_leaks(log), retained_min_k(log)
        if (earlier := settings_of(log)) is None:
            return cls(log, leaks, min_k)
        if not another_tokenizer(earlier, settings) and (models := another_size(earlier, settings)):
            return cls(notes=(f"--retained-log is of another model, {models}, so nothing is compared with it.",))
        others = other_sets(earlier, settings, but=[f.name for f in fields(ModelOptions)])  # how gold is stored
        if "forget" in others:
            of_rows = "other forget rows, or asked for them otherwise"
            had = ANOTHER_TOKENIZER if another_tokenizer(earlier, settings) else of_rows
            return cls(notes=(f"--retained-log: its evaluation had {had}, so nothing is compared with it.",))
        notes = []
        if "holdout" in others and min_k is not None:
            min_k = None
            notes.append("privleak is compared with 0.5: the evaluation of --retained-log had another holdout.")
        elif settings.get("leaks") and "holdout" in settings.get("digests", {}) and "holdout" not in earlier["digests"]:
            notes.append("privleak is compared with 0.5: the evaluation of --retained-log had no holdout.")
        for test in LEAK_TESTS:
            another = other_options(earlier, settings, test, others, by_attack=True)
            if another and test.name in leaks:
                del leaks[test.name]
                notes.append(f"{test.name}: not compared with --retained-log, which had another {', '.join(another)}.")
        same = earlier["digests"].items() & settings.get("digests", {}).items()
        return cls(log, leaks, min_k, frozenset(name for name, _ in same), tuple(notes))

    def losses(self) -> dict[str, dict[int, float]]:
        """Of the sets with the same rows: set -> row -> mean NLL per answer token, as rows.jsonl beside the file has
        it; empty where none can be read."""
        by_set: dict[str, dict[int, float]] = {}
        try:
            for row in read_json_lines(EvaluationFiles(expanded(self.log or "").parent).rows):
                if row["set"] in self.same_rows and (loss := row.get("leaks", {}).get("loss")) is not None:
                    by_set.setdefault(row["set"], {})[row["row"]] = -loss  # a likelihood: the larger, the likelier
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return {}
        return by_set
