"""Leak tests, run on a model and its rows; and the file that holds their results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowmem_npo.config import OutputConfig
from lowmem_npo.data import TokenizedRow
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.asking import Wording
from lowmem_npo.evaluation.leaks.contract import LeakResults, LeakTest, Subject, leak_results
from lowmem_npo.evaluation.leaks.extraction import EXTRACTION
from lowmem_npo.evaluation.leaks.fine_tuning import seconds_per_step
from lowmem_npo.evaluation.leaks.registry import WHILE_TRAINING, LeakOptions, leak_tests
from lowmem_npo.evaluation.leaks.worst import WORST_ATTACK, worst_attacks
from lowmem_npo.evaluation.scoring.batching import BATCH_SIZE
from lowmem_npo.evaluation.scoring.journal import Journal
from lowmem_npo.evaluation.scoring.scorer import Scorer
from lowmem_npo.files import load_json, write_json
from lowmem_npo.memory.exhausted import if_fits
from lowmem_npo.records import check_value

FEW_STEPS = 20


def measure_leaks(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    forget_rows: Sequence[TokenizedRow],
    *,
    holdout_rows: Sequence[TokenizedRow] | None = None,
    retain_rows: Sequence[TokenizedRow] | None = None,
    general_rows: Sequence[TokenizedRow] | None = None,
    wording: Wording | None = None,
    tests: Sequence[str] = OutputConfig.leaks,
    options: Any = None,
    seed: int = 0,
    max_new_tokens: int | None = None,
    earlier: LeakResults | None = None,
    unlearned: bool = True,
    batch_size: int = BATCH_SIZE,
    generate: bool = True,
    progress: bool = True,
) -> LeakResults:
    """The results of `tests`, by their names, on a model in memory, which is returned as it came.

    forget_rows, holdout_rows: rows that were to be forgotten, and rows like them that the model was never taught.
    retain_rows, general_rows: rows to keep, and general ones, which `retuning` teaches. wording: how forget and holdout
    rows were written, for tests that write them otherwise. tests: some of `WHILE_TRAINING`; the `meaning` of one that
    could not be run says why. options: `LeakOptions`, if not its defaults. seed: of all that is random.
    max_new_tokens: of a generated answer; None: `answer_length`. earlier: results of the model before it forgot, which
    are compared with where there is no holdout; a model with an adapter is asked for what else is needed, without it.
    unlearned: False for that model itself. generate: False leaves out the tests that let the model write.

    Raises UserError for a test that there is not, for no rows, and for a model that gives no finite numbers.
    """
    scorer = Scorer(model, tokenizer, Journal(None, progress=progress), batch_size, generate)
    subject = Subject(
        scorer,
        forget_rows,
        holdout_rows,
        options or LeakOptions(),
        seed,
        max_new_tokens=max_new_tokens,
        earlier=earlier or {},
        unlearned=unlearned,
        retain=retain_rows,
        general=general_rows,
        wording=wording,
    )
    return run_leak_tests(leak_tests(tests, WHILE_TRAINING), subject)


def run_leak_tests(tests: Iterable[LeakTest], subject: Subject) -> LeakResults:
    """Raises UserError for no rows, and for a model that gives no finite numbers."""
    if not subject.forget or (subject.holdout is not None and not subject.holdout):
        raise UserError(f"There are no {'holdout' if subject.forget else 'forget'} rows to test for leaks.")
    return {test.name: test.measure(subject) for test in tests}


def repeated(tests: Iterable[LeakTest]) -> list[LeakTest]:
    """Those of `tests` that are made again on each form in which the model is stored: all that bring answers back, but
    for `extraction`, which is made there anyhow."""
    attacks = (test for test in tests if type(test).attacks is not LeakTest.attacks)
    return [test for test in attacks if not test.loads_models and test is not EXTRACTION]


def steps_of_tuning(tests: Iterable[LeakTest], subject: Subject) -> int:
    """How many steps of fine-tuning the tests have still to take, on every form of the model; none is loaded."""
    possible = [test for test in tests if test.hindrance(subject) is None]
    subjects = [replace(subject, form=form) for form in ("", *(form for test in possible for form in test.forms))]
    return sum(test.tuning_steps(of_form, subject.options) for of_form in subjects for test in possible)


def time_of_tuning(tests: Iterable[LeakTest], subject: Subject) -> list[str]:
    """How many steps of fine-tuning the tests have still to take, and how long here, in a line; none where there are
    only a few. What a step takes is measured, on an adapter that is thrown away."""
    if (steps := steps_of_tuning(tests, subject)) < FEW_STEPS:
        return []
    seconds = if_fits(lambda: seconds_per_step(subject.scorer.loaded_model, subject.forget))
    if seconds is None:
        return [f"Leak tests: {steps} steps of fine-tuning, for which memory does not suffice here."]
    took = steps * seconds
    time = f"{took / 3600:.1f} hours" if took >= 5400 else f"{took / 60:.0f} minutes" if took >= 90 else f"{took:.0f} s"
    return [f"Leak tests: {steps} steps of fine-tuning, about {time} here, besides asking after each attack."]


def write_leaks(path: Path, stages: dict[str, LeakResults]) -> None:
    """leaks.json: stage ("before", "after", "gold") -> test -> result; "worst_attack" -> stage -> the worst attack."""
    content = {stage: {name: result.to_json() for name, result in tests.items()} for stage, tests in stages.items()}
    worst = {stage: attack.to_json() for stage, attack in worst_attacks(stages).items()}
    write_json(path, {**content, **({WORST_ATTACK: worst} if worst else {})})


def read_leaks(path: Path) -> dict[str, LeakResults]:
    """The inverse of `write_leaks`; empty where there is no such file. Raises ValueError where it is damaged."""
    if not path.exists():
        return {}
    content = load_json(path)
    check_value(content, dict[str, Any])
    stages = {stage: tests for stage, tests in content.items() if stage != WORST_ATTACK}  # which follows from them
    return {stage: leak_results(tests) for stage, tests in stages.items()}
