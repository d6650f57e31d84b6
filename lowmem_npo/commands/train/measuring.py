"""What a run measures before and after it trains: answers of each set, and leaks. What an interrupted run has stays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from peft import PeftModel
from transformers import PreTrainedModel

from lowmem_npo.commands.train.plan import RunPlan
from lowmem_npo.config import RunConfig
from lowmem_npo.console import Say
from lowmem_npo.data import Example, Template, TokenizedRows
from lowmem_npo.data.fit import Fit
from lowmem_npo.data.general_rows import bundled_general
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.answer_table import save_table, text_table
from lowmem_npo.evaluation.answers import (
    Evaluations,
    answer_length,
    choose_rows,
    evaluate_answers,
    part_of,
    read_answers,
    save_answers,
    summaries,
)
from lowmem_npo.evaluation.asking import Asked, Wording, in_form, other_forms
from lowmem_npo.evaluation.leaks.contract import LeakResult, LeakResults
from lowmem_npo.evaluation.leaks.measure import measure_leaks, read_leaks, write_leaks
from lowmem_npo.evaluation.leaks.registry import WHILE_TRAINING, leak_tests
from lowmem_npo.evaluation.leaks.retuning import RETUNING
from lowmem_npo.evaluation.scoring.batching import at_once
from lowmem_npo.model import reference_mode
from lowmem_npo.model.layers import causal_lm
from lowmem_npo.report.evaluation_text import leaks_text

T = TypeVar("T")
EVAL_SEED = 0  # the measured rows do not depend on --seed, so that runs with several seeds can be compared


def measure_before(plan: RunPlan, model: PeftModel) -> Evaluations:
    """The original model's answers and leaks, measured unless an interrupted run has done so."""
    files, tests = plan.directory, set(_leak_tests(plan.config, "before"))
    before = _unless_damaged(read_answers, files.answers("before"))
    fresh = not _measured_as_asked(before, _asked(plan, model), plan)
    with reference_mode(model):
        if fresh:
            before = measure_answers(plan, model, "before")
            save_answers(files.answers("before"), before)
        if (fresh and tests) or set(_unless_damaged(read_leaks, files.leaks).get("before", {})) != tests:
            write_leaks(files.leaks, {"before": _leaks(plan, model, "before")})
    return before


def measure_after(plan: RunPlan, model: PeftModel, before: Evaluations, say: Say) -> Evaluations:
    """The same of the trained model; both are saved and printed side by side."""
    files = plan.directory
    after = measure_answers(plan, model, "after")
    save_answers(files.answers("after"), after)
    stages = {"before": summaries(before), "after": summaries(after)}
    save_table(stages, files.path)
    say("\n" + text_table(stages))
    if plan.config.output.leaks:
        leaks = {"before": read_leaks(files.leaks).get("before", {}), "after": _leaks(plan, model, "after")}
        write_leaks(files.leaks, leaks)
        say("\nWhat still leaks\n" + leaks_text(leaks["after"], leaks["before"]))
    return after


def rows_at_once(config: RunConfig) -> int:
    """Rows per batch when measuring."""
    return at_once(config.output.eval_batch_size, config.output.eval_rows, config.memory.stream_weights)


def measure_answers(plan: RunPlan, model: PreTrainedModel | PeftModel, stage: str) -> Evaluations:
    """The model's answers to rows of each set; stage: what progress bars call it."""
    asked = _asked(plan, model)
    return {
        name: evaluate_answers(
            model,
            plan.tokenizer,
            of_set.rows,
            name=f"{stage}, {name}",
            max_new_tokens=_answer_length(plan, asked, name),
            batch_size=rows_at_once(plan.config),
            generate=plan.config.output.lets_write,
            passages=sum(getattr(plan.data, part_of(name)).examples[place].is_passage for place in of_set.places),
        ).placed(of_set.places, len(getattr(plan.data, part_of(name))))
        for name, of_set in asked.items()
    }


def _unless_damaged(read: Callable[..., dict[str, Any]], *where: Any) -> dict[str, Any]:
    """What an interrupted run measured; nothing if its file is damaged, and it is measured again."""
    try:
        return read(*where)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def _asked(plan: RunPlan, model: PreTrainedModel | PeftModel) -> dict[str, Asked]:
    """The rows of each set whose answers are measured; those to forget in every form."""
    output, options, asked = plan.config.output, plan.config.data, dict[str, Asked]()
    fit = Fit.of(causal_lm(model))
    for name in ("forget", "retain", "general"):
        rows: TokenizedRows | None = getattr(plan.data, name)
        if rows is None:
            continue
        places = choose_rows(len(rows), output.eval_rows, EVAL_SEED)
        if name == "general" and fit.positions:  # of no other set is a row too long by now
            places = [i for i in places if len(rows[i]["input_ids"]) <= fit.positions]
            if not places:
                continue
        asked[name] = Asked([rows[i] for i in places], places)
        if name == "forget" and output.forms == "all":
            examples, how = [rows.examples[i] for i in places], (plan.tokenizer, Template.of(options))
            forms = other_forms(asked[name].rows, examples, places, *how, options.max_length, fit)
            asked |= {in_form(name, form): of_form for form, of_form in forms.items()}
    return asked


def _answer_length(plan: RunPlan, asked: dict[str, Asked], name: str) -> int:
    """How many tokens an answer may have, the same in every form."""
    return answer_length(asked[part_of(name)].rows, plan.config.output.max_new_tokens)


def _measured_as_asked(evaluations: Evaluations, asked: dict[str, Asked], plan: RunPlan) -> bool:
    """Whether an interrupted run measured the same: these rows in these forms, with answers as long."""
    return evaluations.keys() == asked.keys() and all(
        [record.row for record in of_set.records] == asked[name].places
        and of_set.summary.max_new_tokens == _answer_length(plan, asked, name)
        and of_set.summary.generated == plan.config.output.lets_write
        for name, of_set in evaluations.items()
    )


def _leaks(plan: RunPlan, model: PeftModel, stage: str) -> LeakResults:
    """The leak tests on the rows whose answers are measured, compared with as many of the holdout."""
    config, data = plan.config, plan.data
    tests = _leak_tests(config, stage)
    if not tests:
        return {}
    wording = _wording(plan, Fit.of(causal_lm(model)))
    try:
        return measure_leaks(
            model,
            plan.tokenizer,
            measured_rows(config, data.forget),
            holdout_rows=None if data.holdout is None else measured_rows(config, data.holdout),
            retain_rows=data.retain and data.retain.apart_from(data.forget.examples),
            general_rows=_general(plan, wording.longest) if RETUNING.name in tests else None,
            wording=wording,
            tests=tests,
            seed=config.training.seed,
            max_new_tokens=config.output.max_new_tokens,
            earlier=read_leaks(plan.directory.leaks).get("before", {}) if stage == "after" else {},
            unlearned=stage == "after",
            batch_size=rows_at_once(config),
            generate=config.output.lets_write,
        )
    except UserError as error:  # of a diverged adapter, which is reported all the same
        return {test: LeakResult.not_measured(str(error).rstrip(".")) for test in tests}


def _general(plan: RunPlan, longest: int) -> TokenizedRows | None:
    """General rows of at most so many tokens, without those that may say what is to be forgotten."""
    template, forget = Template.of(plan.config.data), plan.data.forget.examples
    return bundled_general("general", forget, plan.tokenizer, template, longest)


def _wording(plan: RunPlan, fit: Fit) -> Wording:
    """How the measured forget and holdout rows were written."""
    options, examples = plan.config.data, dict[str, list[Example]]()
    for name, rows in (("forget", plan.data.forget), ("holdout", plan.data.holdout)):
        if rows is not None:
            examples[name] = measured_rows(plan.config, rows.examples)
    return Wording(examples, Template.of(options), options.max_length, fit)


def _leak_tests(config: RunConfig, stage: str) -> list[str]:
    tests = leak_tests(config.output.leaks, WHILE_TRAINING)
    return [test.name for test in tests if stage == "after" or not test.after_only]


def measured_rows(config: RunConfig, rows: Sequence[T]) -> list[T]:
    """Those of a set that are measured."""
    return [rows[i] for i in choose_rows(len(rows), config.output.eval_rows, EVAL_SEED)]
