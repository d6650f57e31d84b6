"""The leak tests of a model in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowmem_npo.data import TokenizedRow
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.answers import MAX_NEW_TOKENS, question
from lowmem_npo.evaluation.leaks.extraction import exact_memorization, extraction, extraction_strength
from lowmem_npo.evaluation.leaks.membership import ATTACKS, membership_attacks
from lowmem_npo.evaluation.leaks.relearning import Relearning, relearning
from lowmem_npo.evaluation.leaks.sampling import SAMPLES, TEMPERATURE, best_recalls, sampling
from lowmem_npo.evaluation.scoring.batching import BATCH_SIZE
from lowmem_npo.evaluation.scoring.journal import Journal
from lowmem_npo.evaluation.scoring.scorer import Measuring

TESTS = ("extraction", "sampling", "membership", "relearning", "quantization")
IN_MEMORY = TESTS[:-1]
TOKENS = {"forget": "leaks: forget answers", "holdout": "leaks: holdout answers"}
NO_HOLDOUT = "it compares with rows that the model never saw, and there are none (--holdout names some)"


@dataclass(frozen=True)
class LeakSettings:
    """What the tests leave to choose. seed: of all that is random."""

    seed: int = 0
    samples: int = SAMPLES
    temperature: float = TEMPERATURE
    relearning: Relearning = field(default_factory=Relearning)


@dataclass
class LeakFindings:
    """tests: name -> figures, `meaning` and `leaks`. rows: set -> row -> its scores (and its best sample)."""

    tests: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)

    def add_rows(self, part: str, scores: Sequence[dict[str, Any]]) -> None:
        known = self.rows.setdefault(part, {})
        for row, more in enumerate(scores):
            known.setdefault(row, {}).update(more)


def measure_leaks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    forget_rows: Sequence[TokenizedRow],
    *,
    holdout_rows: Sequence[TokenizedRow] | None = None,
    tests: Sequence[str] = ("extraction", "membership"),
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Test -> its figures, with `meaning` (a sentence) and `leaks` (True, False, None: cannot be told).

    forget_rows, holdout_rows: rows that were to be forgotten, and rows like them that the model was never taught.
    tests: some of `IN_MEMORY`; what cannot be measured is told in its `meaning`. seed: of all that is random.
    The model is returned as it came.

    Raises UserError for a test that there is not, for no rows, and for a model that gives no finite numbers.
    """
    measuring = Measuring(model, tokenizer, Journal(None, progress=progress), batch_size)
    return run_tests(measuring, forget_rows, holdout_rows, tests, LeakSettings(seed)).tests


def run_tests(
    measuring: Measuring,
    forget: Sequence[TokenizedRow],
    holdout: Sequence[TokenizedRow] | None,
    tests: Sequence[str],
    settings: LeakSettings,
) -> LeakFindings:
    """`measure_leaks` on a model under evaluation, whose journal may know some of the answers."""
    check_tests(tests, IN_MEMORY)
    if not forget or (holdout is not None and not holdout):
        raise UserError(f"There are no {'holdout' if forget else 'forget'} rows to test for leaks.")
    found = LeakFindings()
    if {"extraction", "membership"} & set(tests):
        _score_tokens(measuring, forget, holdout, tests, found)
    if "sampling" in tests:
        _sample(measuring, forget, holdout, settings, found)
    if "relearning" in tests:
        found.tests["relearning"] = _relearn(measuring, forget, holdout, settings)
    found.tests = {test: found.tests[test] for test in IN_MEMORY if test in found.tests}
    return found


def check_tests(tests: Sequence[str], known: Sequence[str] = TESTS) -> None:
    """Raises UserError for a test that there is not."""
    if unknown := [test for test in tests if test not in known]:
        raise UserError(f"There is no leak test '{unknown[0]}' here; there are {', '.join(known)}.")


def skipped(why: str) -> dict[str, Any]:
    """The result of a test that could not be run."""
    return {"meaning": f"Not measured: {why}.", "leaks": None}


def _score_tokens(
    measuring: Measuring,
    forget: Sequence[TokenizedRow],
    holdout: Sequence[TokenizedRow] | None,
    tests: Sequence[str],
    found: LeakFindings,
) -> None:
    scores = {"forget": measuring.token_scores(TOKENS["forget"], forget)}
    if holdout:
        scores["holdout"] = measuring.token_scores(TOKENS["holdout"], holdout)
    for part, rows in scores.items():
        if "extraction" in tests:
            found.add_rows(part, [
                {"exact_memorization": exact_memorization(row), "extraction_strength": extraction_strength(row)}
                for row in rows
            ])  # fmt: skip
        if "membership" in tests:
            found.add_rows(part, [{name: attack(row) for name, attack in ATTACKS.items()} for row in rows])
    if "extraction" in tests:
        found.tests["extraction"] = extraction(scores["forget"], scores.get("holdout"))
    if "membership" in tests:
        found.tests["membership"] = (
            membership_attacks(scores["forget"], scores["holdout"]) if holdout else skipped(NO_HOLDOUT)
        )


def _sample(
    measuring: Measuring,
    forget: Sequence[TokenizedRow],
    holdout: Sequence[TokenizedRow] | None,
    settings: LeakSettings,
    found: LeakFindings,
) -> None:
    recalls: dict[str, list[float]] = {}
    for part, rows in {"forget": forget, "holdout": holdout or ()}.items():
        if rows:
            drawn = {"samples": settings.samples, "temperature": settings.temperature, "seed": settings.seed}
            samples = measuring.samples(f"leaks: {part} samples", rows, **drawn)
            decode = measuring.tokenizer.decode
            answers = [decode(question(row)[1][:MAX_NEW_TOKENS], skip_special_tokens=True).strip() for row in rows]
            each = best_recalls(answers, samples)
            recalls[part] = [recall for recall, _ in each]
            found.add_rows(part, [{"best_rouge_l_recall": recall, "best_sample": text} for recall, text in each])
    found.tests["sampling"] = sampling(
        recalls["forget"], recalls.get("holdout"), settings.samples, settings.temperature
    )


def _relearn(
    measuring: Measuring,
    forget: Sequence[TokenizedRow],
    holdout: Sequence[TokenizedRow] | None,
    settings: LeakSettings,
) -> dict[str, Any]:
    if len(forget) < 2:
        return skipped("one part of the forget rows is taught again and the rest asked for, and there is only one row")
    part = "leaks: relearning, with a holdout" if holdout else "leaks: relearning"
    if 0 not in measuring.journal.known(part):
        found = relearning(
            measuring.model,
            forget,
            holdout,
            settings.relearning,
            seed=settings.seed,
            batch_size=measuring.batch_size,
            progress=measuring.journal.progress,
        )
        measuring.journal.write(part, [0], [found])
    return measuring.journal.known(part)[0]
