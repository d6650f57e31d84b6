"""The leak tests of a model in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowmem_npo.data import TokenizedRow
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.batching import BATCH_SIZE
from lowmem_npo.evaluation.journal import Journal
from lowmem_npo.evaluation.leaks.extraction import extraction
from lowmem_npo.evaluation.leaks.membership import membership_attacks
from lowmem_npo.evaluation.measuring import Measuring

TESTS = ("extraction", "membership")
NO_HOLDOUT = (
    "not measured: membership is told by comparison with rows that the model never saw; name some with --holdout"
)


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
    tests: some of `TESTS`. seed: of all that is random. The model is returned as it came.

    Raises UserError for a test that there is not, for no rows, and for a model that gives no finite numbers.
    """
    return run_tests(
        Measuring(model, tokenizer, Journal(None, progress=progress), batch_size),
        forget_rows,
        holdout_rows,
        tests,
        seed,
    )


def run_tests(
    measuring: Measuring,
    forget_rows: Sequence[TokenizedRow],
    holdout_rows: Sequence[TokenizedRow] | None,
    tests: Sequence[str],
    seed: int,
) -> dict[str, dict[str, Any]]:
    """`measure_leaks` on a model under evaluation, whose journal may know some of the answers."""
    check_tests(tests)
    if not forget_rows or (holdout_rows is not None and not holdout_rows):
        raise UserError(f"There are no {'holdout' if forget_rows else 'forget'} rows to test for leaks.")
    found: dict[str, dict[str, Any]] = {}
    if {"extraction", "membership"} & set(tests):
        forget = measuring.token_scores("leaks: forget answers", forget_rows)
        holdout = measuring.token_scores("leaks: holdout answers", holdout_rows) if holdout_rows else None
        if "extraction" in tests:
            found["extraction"] = extraction(forget, holdout)
        if "membership" in tests:
            found["membership"] = membership_attacks(forget, holdout) if holdout else skipped(NO_HOLDOUT)
    return found


def check_tests(tests: Sequence[str]) -> None:
    """Raises UserError for a test that there is not."""
    if unknown := [test for test in tests if test not in TESTS]:
        raise UserError(f"There is no leak test '{unknown[0]}'; there are {', '.join(TESTS)} (and all).")


def skipped(why: str) -> dict[str, Any]:
    """The result of a test that could not be run."""
    return {"meaning": why[:1].upper() + why[1:] + ".", "leaks": None}
