"""Leak tests, run on a model and its rows; and the file that holds their results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowmem_npo.config import OutputConfig
from lowmem_npo.data import TokenizedRow
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.leaks.contract import LeakResult, LeakResults, LeakTest, Subject
from lowmem_npo.evaluation.leaks.registry import WHILE_TRAINING, LeakOptions, leak_tests
from lowmem_npo.evaluation.scoring.batching import BATCH_SIZE
from lowmem_npo.evaluation.scoring.journal import Journal
from lowmem_npo.evaluation.scoring.scorer import Scorer
from lowmem_npo.files import write_atomically


def measure_leaks(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    forget_rows: Sequence[TokenizedRow],
    *,
    holdout_rows: Sequence[TokenizedRow] | None = None,
    tests: Sequence[str] = OutputConfig.leaks,
    seed: int = 0,
    max_new_tokens: int | None = None,
    earlier: LeakResults | None = None,
    unlearned: bool = True,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
) -> LeakResults:
    """The results of `tests`, by their names, on a model in memory, which is returned as it came.

    forget_rows, holdout_rows: rows that were to be forgotten, and rows like them that the model was never taught.
    tests: some of `WHILE_TRAINING`; the `meaning` of one that could not be run says why. seed: of all that is random.
    max_new_tokens: of a sampled answer; None: `answer_length`. earlier: results of the model before it forgot, which
    are compared with where there is no holdout; a model with an adapter is asked for what else is needed, without it.
    unlearned: False for that model itself.

    Raises UserError for a test that there is not, for no rows, and for a model that gives no finite numbers.
    """
    scorer = Scorer(model, tokenizer, Journal(None, progress=progress), batch_size)
    subject = Subject(
        scorer,
        forget_rows,
        holdout_rows,
        LeakOptions(),
        seed,
        max_new_tokens=max_new_tokens,
        earlier=earlier or {},
        unlearned=unlearned,
    )
    return run_leak_tests(leak_tests(tests, WHILE_TRAINING), subject)


def run_leak_tests(tests: Iterable[LeakTest], subject: Subject) -> LeakResults:
    """Raises UserError for no rows, and for a model that gives no finite numbers."""
    if not subject.forget or (subject.holdout is not None and not subject.holdout):
        raise UserError(f"There are no {'holdout' if subject.forget else 'forget'} rows to test for leaks.")
    return {test.name: test.measure(subject) for test in tests}


def write_leaks(path: Path, stages: dict[str, LeakResults]) -> None:
    """leaks.json: stage ("before", "after", "gold") -> test -> result."""
    content = {stage: {name: result.to_json() for name, result in tests.items()} for stage, tests in stages.items()}
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def read_leaks(path: Path) -> dict[str, LeakResults]:
    """The inverse of `write_leaks`; empty where there is no such file."""
    if not path.exists():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return {stage: {n: LeakResult.from_json(r) for n, r in tests.items()} for stage, tests in content.items()}
