"""One run of `lowmem-npo train`, from its configuration to adapter, table and report. Reads from top to bottom."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    set_seed,
)

from lowmem_npo.claim import claimed
from lowmem_npo.commands.train.own_texts import own_texts, write_own_texts
from lowmem_npo.config import RunConfig
from lowmem_npo.console import Say, silent
from lowmem_npo.data import PreparedData, Template, TokenizedRow, TokenizedRows, prepare, preview
from lowmem_npo.data.fit import Fit, check_fit
from lowmem_npo.endings import Interrupted, failure, handled
from lowmem_npo.errors import UserError
from lowmem_npo.estimate.automatic import as_begun, decide
from lowmem_npo.estimate.background import Watched, record, watch
from lowmem_npo.estimate.report import Report
from lowmem_npo.evaluation.answer_table import save_table, text_table
from lowmem_npo.evaluation.answers import (
    Evaluations,
    answer_length,
    choose_rows,
    evaluate_answers,
    in_sentences_of_its_own,
    part_of,
    read_answers,
    save_answers,
    summaries,
)
from lowmem_npo.evaluation.asking import Asked, in_form, other_forms
from lowmem_npo.evaluation.leaks.contract import LeakResult, LeakResults
from lowmem_npo.evaluation.leaks.measure import measure_leaks, read_leaks, write_leaks
from lowmem_npo.evaluation.leaks.registry import WHILE_TRAINING, leak_tests
from lowmem_npo.files import PARTIAL, put_in_place, write_atomically
from lowmem_npo.memory.switches import apply_switches
from lowmem_npo.model import attach_lora, load_model, load_tokenizer, reference_mode, resolve_name
from lowmem_npo.model.adapters import adapter_size, check_lora, shared_layers
from lowmem_npo.model.layers import causal_lm
from lowmem_npo.model.loading import DTYPES, load_config, resolve_device
from lowmem_npo.model.notes import model_notes
from lowmem_npo.model.quantization import quantization_of
from lowmem_npo.model.saved_adapter import check_base, check_finite, settings_of_run
from lowmem_npo.model.stop_tokens import stop_tokens
from lowmem_npo.model.weights import check_has_weights
from lowmem_npo.report.audit import begin_audit, check_same_adapter, check_same_rows, finish_audit
from lowmem_npo.report.evaluation_text import leaks_text
from lowmem_npo.report.files import write_report
from lowmem_npo.run_directory import RunDirectory, RunFiles, check_disk, step_of, what_is_left
from lowmem_npo.training.arguments import check_trainer_args, npo_config
from lowmem_npo.training.checkpoints import resume_point
from lowmem_npo.training.divergence import Divergence
from lowmem_npo.training.early_stopping import StopOutcome, Stopping
from lowmem_npo.training.finite import NotFinite
from lowmem_npo.training.forget_level import halved, run_levels
from lowmem_npo.training.layered import LayeredBatches, check_folds
from lowmem_npo.training.metrics import MetricsWriter
from lowmem_npo.training.preemption import Preemption
from lowmem_npo.training.progress import ConsoleProgress
from lowmem_npo.training.trainer import NPOTrainer
from lowmem_npo.training.training_rows import planned_rows, used_alternatives

EVAL_SEED = 0  # the measured rows do not depend on --seed, so that runs with several seeds can be compared


class Inputs(NamedTuple):
    """What a run reads before its weights."""

    model_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData


@dataclass
class RunPlan:
    """A validated run. `config` has its memory budget, and what `auto` left open, resolved."""

    config: RunConfig
    directory: RunDirectory
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData
    predicted: Report | None = None  # on a GPU, or with a budget

    @property
    def steps(self) -> int:
        """Optimiser steps, as the Trainer counts them."""
        training = self.config.training
        per_epoch = math.ceil(len(self.data.forget) / training.batch_size)
        return training.max_steps or math.ceil(training.epochs * per_epoch)

    @property
    def sentence(self) -> str:
        """The number of steps, and of rows in each."""
        training, data = self.config.training, self.data
        retain = ""
        if data.retain is not None:
            drawn, rows = training.retain_rows, len(data.retain)
            retain = f" and {drawn} of {rows} retain rows"
            if drawn > rows:
                retain = f" and {drawn} retain rows (the {rows} there are, repeatedly)"
        return (
            f"{self.steps} steps of {min(training.batch_size, len(data.forget))} of {len(data.forget)} forget{retain}"
            f"{f', in {training.layered} stages' if training.layered else ''}"
        )


@dataclass
class RunResult:
    """A finished run; its directory holds the same."""

    directory: Path
    before: Evaluations
    after: Evaluations
    optimizer_steps: int
    stopping: StopOutcome | None = None


def train(config: RunConfig, say: Say = print) -> RunResult | None:
    """Makes the model forget. Returns None after --preview and --dry-run, which train nothing.

    Raises:
        UserError: something the user can fix, in one sentence.
    """
    main_process, output = is_main_process(config), config.output
    say = say if main_process else silent
    trains = output.preview is None and not output.dry_run
    with claimed(config.output_dir, say) if main_process and trains else nullcontext():
        try:
            return _train_claimed(config, say)
        except (KeyboardInterrupt, Interrupted) as error:
            number = error.number if isinstance(error, Interrupted) else signal.SIGINT
            raise Interrupted(number, what_is_left(RunFiles(config.output_dir))) from None
        except NotFinite as error:
            raise UserError(f"{error}; {what_is_left(RunFiles(config.output_dir))}.") from None
        except Exception as error:
            if (what := failure(error)) is None:
                raise
            raise UserError(f"{what}; {what_is_left(RunFiles(config.output_dir))}.") from error


def _train_claimed(config: RunConfig, say: Say) -> RunResult | None:
    inputs = read_inputs(config, say)
    if config.output.preview is not None:
        say(preview(inputs.data.forget, inputs.tokenizer, config.output.preview, title="forget"))
        if inputs.data.retain is not None:
            say(preview(inputs.data.retain, inputs.tokenizer, config.output.preview, title="retain"))
        return None
    plan = plan_run(config, inputs, say)
    if config.output.dry_run:
        say(plan.config.to_yaml().rstrip())
        say(f"Dry run: data, model and disk are fine; {plan.sentence}. Nothing was trained or written.")
        return None
    return unlearn(plan, load_model(plan.config.model, say), say)


def is_main_process(config: RunConfig) -> bool:
    """Whether this process is the one that measures, writes and prints."""
    return PartialState(cpu=resolve_device(config.model.device).type == "cpu").is_main_process


def read_inputs(config: RunConfig, say: Say, known: Inputs | None = None) -> Inputs:
    """Reads and checks all that a run reads before its weights, and reports on the data.

    known: inputs that a run with the same model and data has read; they are reported, but not read again.

    Raises:
        UserError: as for `train`.
    """
    if line := resolve_name(config.model.model, config.model.revision)[1]:
        say(line)
    leak_tests(config.output.leaks, WHILE_TRAINING)
    if known is None:
        unused = say if config.output.dry_run else silent  # a run says so when it loads the weights
        model_config, tokenizer = load_config(config.model, unused), load_tokenizer(config.model)
        data = _prepare(config, tokenizer, model_config)
        known = Inputs(model_config, tokenizer, data)
    for line in [*model_notes(known.model_config, config.model), *known.data.report]:
        say(line)
    return known


def _prepare(config: RunConfig, tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig) -> PreparedData:
    stops, texts = stop_tokens(config.model, model_config), own_texts(config, model_config)
    return prepare(tokenizer, config.data, config.objective.forget_term, stops, texts)


def plan_run(config: RunConfig, inputs: Inputs, say: Say) -> RunPlan:
    """Checks all that could fail after the weights are loaded, and finds the memory switches; writes nothing.

    Raises:
        UserError: as for `train`.
    """
    model_config, tokenizer, data = inputs
    if config.objective.forget_level == "holdout":
        data = halved(data)
    config = as_begun(config)
    check_has_weights(resolve_name(config.model.model, config.model.revision)[0])
    check_fit(model_config, tokenizer, [data.forget, data.forget_targets, data.retain, data.holdout])
    directory = RunDirectory(config)
    directory.check()
    check_trainer_args(config)
    if config.output.resume:
        check_same_rows(directory.path, data)
        check_same_adapter(directory.path, config)
    if config.adapter.adapter is not None:
        if not config.adapter.any_base:
            check_base(config.adapter.adapter, config.model.model)
        if settings_of_run(config.adapter.adapter).get("qlora") and not config.model.qlora:
            say("The adapter was trained on the 4-bit base, and goes on on the unquantised one (no --qlora).")
    quantized = quantization_of(model_config, config.model.qlora, DTYPES[config.model.dtype]) is not None
    adapted = check_lora(model_config, config.adapter, quantized)
    if config.adapter.adapter is not None:
        check_finite(config.adapter.adapter)
    check_disk(config, *adapter_size(adapted))
    if shared := shared_layers(adapted):
        say(f"The base shares {shared[0]} with another layer: the adapter works beside its base, but cannot be merged.")
    apply_switches(adapted, config.memory)  # raises if one does not fit
    rows = planned_rows(config, data)
    config, predicted = decide(config, data, model_config, say)
    directory.config = config
    plan = RunPlan(config, directory, tokenizer, data, predicted)
    if rows.folds is not None:
        check_folds(rows.folds, config.training.batch_size, plan.steps)
    trained = step_of(next(iter(directory.checkpoints()), None)) if config.output.resume else 0
    if trained > plan.steps:
        raise UserError(
            f"--resume: the run in '{directory.path}' has trained {trained} steps, and these settings ask for "
            f"{plan.steps}: give --max-steps {trained} or more, or start anew."
        )
    return plan


def unlearn(plan: RunPlan, base: PreTrainedModel, say: Say) -> RunResult:
    """The run itself. `base`, as `load_model` returns it, is left with an adapter and its memory switches on
    (`lowmem_npo.commands.sweep.borrowed_base` undoes that)."""
    config, directory = plan.config, plan.directory
    main_process = is_main_process(config)
    measures = main_process and config.output.eval_rows != 0
    set_seed(config.training.seed)
    model = attach_lora(base, config.adapter)
    model.active_peft_config.revision = config.model.revision  # of the base: for those who load the adapter later
    apply_switches(model, config.memory)
    if plan.data.retain_is_unwritten:
        plan = _with_own_texts(plan, model, say)
    stopping = _stopping(plan, model, say)
    trainer = _trainer(plan, model, stopping, say)
    PartialState().wait_for_everyone()  # until every process has found the directory free
    directory.begin(main_process)
    if main_process and (texts := own_texts(config, causal_lm(model).config)) not in (None, directory.self_written):
        write_atomically(directory.self_written, texts.read_text(encoding="utf-8"))
    say(f"{plan.sentence}; {model.get_nb_trainable_parameters()[0]:,} adapter parameters.")
    if main_process:
        begin_audit(directory.path, config, plan.data, model)

    if (levels := _levels(plan, model)) is not None:
        trainer.push_up_to(levels)
        say(f"Each forget row is pushed up to its level, {min(levels):.2f} to {max(levels):.2f} nats per token.")
    before = _measure_before(plan, model) if measures else {}
    if plan.data.forget_targets is plan.data.forget and (remark := in_sentences_of_its_own(before)):
        say(remark)  # of a refusal it does not matter how the answer was said
    PartialState().wait_for_everyone()
    preemption = Preemption()
    trainer.add_callback(preemption)
    divergence = Divergence(summaries(before)["retain"].nll if "retain" in before else None, say)
    if not any(condition.kind == "limit" for condition in config.stopping.conditions):
        trainer.add_callback(divergence)
    with handled(preemption.hear):
        outcome, watched = _train(plan, trainer, stopping, say, preemption)
    _save_adapter(trainer, directory)
    after = _measure_after(plan, model, before, say) if measures else {}

    steps = trainer.state.global_step if outcome is None else outcome.last.step
    if main_process:
        kept = steps if outcome is None else outcome.kept.step
        finish_audit(directory.path, steps, adapter_step=kept, training=record(watched, plan.predicted))
        report = write_report(directory.path)
        say(f"\nThe adapter and the measurements are in {directory.path}; what they mean is in its report.html.")
        say(report.verdict.headline)
        if divergence.sentence is not None:
            say(divergence.sentence)
    return RunResult(directory.path, before, after, steps, outcome)


def _with_own_texts(plan: RunPlan, model: PeftModel, say: Say) -> RunPlan:
    """The plan with the texts that the original model writes, unless an earlier run let it."""
    config, model_config = plan.config, causal_lm(model).config
    path = own_texts(config, model_config)
    assert path is not None
    if is_main_process(config) and not path.exists():
        with reference_mode(model):
            write_own_texts(path, model, plan.tokenizer, config, say)
    PartialState().wait_for_everyone()
    data = _prepare(config, plan.tokenizer, model_config)
    for line in data.report:
        if line.startswith("retain"):
            say(line)
    check_fit(model_config, plan.tokenizer, [data.retain])
    return replace(plan, data=data if plan.data.level_rows is None else halved(data))


# -- the steps of a run -----------------------------------------------------------------------------------------------


def _trainer(plan: RunPlan, model: PeftModel, stopping: Stopping | None, say: Say) -> NPOTrainer:
    args, data = npo_config(plan.config), plan.data
    ours = [MetricsWriter(plan.directory.metrics, say), ConsoleProgress(), *([stopping] if stopping else [])]
    trainer = NPOTrainer(
        model,
        args,
        data.forget_targets,
        data.retain,
        processing_class=plan.tokenizer,
        alternative_dataset=used_alternatives(plan.config, data),
        true_dataset=data.forget,
        callbacks=ours,
        say=say,
    )

    if stopping is not None and isinstance(trainer.step_batches, LayeredBatches):
        stopping.stages = trainer.step_batches
    for default in (ProgressCallback, PrinterCallback):  # replaced by ours
        trainer.remove_callback(default)
    return trainer


def _levels(plan: RunPlan, model: PeftModel) -> list[float] | None:
    """How far each forget row is pushed, if --forget-level says so; the main process measures for all."""
    config, directory = plan.config, plan.directory
    if plan.data.level_rows is None:
        return None
    levels: list[Any] = [None]
    if is_main_process(config):
        fresh, size = not config.output.resume, config.output.eval_batch_size
        levels = [run_levels(directory.forget_levels, model, plan.data, size, fresh=fresh)]
    return broadcast_object_list(levels)[0]


def _measure_before(plan: RunPlan, model: PeftModel) -> Evaluations:
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


def _unless_damaged(read: Callable[..., dict[str, Any]], *where: Any) -> dict[str, Any]:
    """What an interrupted run measured; nothing if its file is damaged, and it is measured again."""
    try:
        return read(*where)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def _train(
    plan: RunPlan, trainer: NPOTrainer, stopping: Stopping | None, say: Say, preemption: Preemption
) -> tuple[StopOutcome | None, Watched]:
    """Trains from the last checkpoint or from the beginning. Under --stop-when the model is left with the best adapter
    (in the main process, which saves it)."""
    config, directory = plan.config, plan.directory
    checkpoint, watched = None, Watched()
    if config.output.resume:
        also = {} if stopping is None else {"also": stopping.damage}
        main_process = is_main_process(config)
        point = resume_point(directory, trainer, plan.steps, say, **also) if main_process else None
        (checkpoint,) = broadcast_object_list([point])
    stopped = stopping is not None and stopping.resume(step_of(checkpoint))
    if checkpoint is not None and step_of(checkpoint) >= plan.steps:
        trainer.restore(checkpoint)
    elif not stopped:
        with watch(config, plan.data, trainer.args.device, plan.predicted, say) as watched:
            trainer.train(resume_from_checkpoint=checkpoint)
        preemption.check()
        watched.steps = trainer.state.global_step - step_of(checkpoint)
        say(watched.line(plan.predicted))
    return stopping.finish() if stopping is not None and is_main_process(config) else None, watched


def _save_adapter(trainer: NPOTrainer, directory: RunDirectory) -> None:
    """Writes the adapter and its tokenizer file by file, the weights last: they say that the run is trained."""
    staging = directory.path / f"adapter{PARTIAL}"
    trainer.save_model(str(staging))
    if trainer.args.should_save:
        for file in sorted(staging.iterdir(), key=lambda file: file.name == directory.weights.name):
            put_in_place(file, directory.path / file.name)
        staging.rmdir()


def _measure_after(plan: RunPlan, model: PeftModel, before: Evaluations, say: Say) -> Evaluations:
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


def _stopping(plan: RunPlan, model: PeftModel, say: Say) -> Stopping | None:
    """What --stop-when asks for, if anything; it measures the same rows as before and after training."""
    config, data = plan.config, plan.data
    if not config.stopping.stop_when:
        return None
    sets = {"forget": data.forget, "retain": data.retain, "holdout": data.holdout}
    chosen = {name: _measured_rows(config, rows) for name, rows in sets.items() if rows is not None}
    folds = [[data.forget[i] for i in fold] for fold in planned_rows(config, data).folds or ()]
    return Stopping(
        config.stopping.conditions,
        model,
        chosen,
        plan.directory.path,
        every=config.stopping.eval_every,
        patience=config.stopping.stop_patience,
        batch_size=config.output.eval_batch_size,
        folds=[_measured_rows(config, rows) for rows in folds],
        say=say,
    )


def measure_answers(plan: RunPlan, model: PreTrainedModel | PeftModel, stage: str) -> Evaluations:
    """The model's answers to rows of each set; stage: what progress bars call it."""
    asked = _asked(plan, model)
    return {
        name: evaluate_answers(
            model,
            plan.tokenizer,
            of_set.rows,
            name=f"{stage}, {name}",
            limit=None,
            max_new_tokens=_answer_length(plan, asked, name),
            batch_size=plan.config.output.eval_batch_size,
        ).placed(of_set.places, len(getattr(plan.data, part_of(name))))
        for name, of_set in asked.items()
    }


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
        for name, of_set in evaluations.items()
    )


def _leaks(plan: RunPlan, model: PeftModel, stage: str) -> LeakResults:
    """The leak tests on the rows whose answers are measured, compared with as many of the holdout."""
    config, data = plan.config, plan.data
    tests = _leak_tests(config, stage)
    if not tests:
        return {}
    try:
        return measure_leaks(
            model,
            plan.tokenizer,
            _measured_rows(config, data.forget),
            holdout_rows=None if data.holdout is None else _measured_rows(config, data.holdout),
            tests=tests,
            seed=config.training.seed,
            max_new_tokens=config.output.max_new_tokens,
            earlier=read_leaks(plan.directory.leaks).get("before", {}) if stage == "after" else {},
            unlearned=stage == "after",
            batch_size=config.output.eval_batch_size,
        )
    except UserError as error:  # of a diverged adapter, which is reported all the same
        return {test: LeakResult.not_measured(str(error).rstrip(".")) for test in tests}


def _leak_tests(config: RunConfig, stage: str) -> list[str]:
    tests = leak_tests(config.output.leaks, WHILE_TRAINING)
    return [test.name for test in tests if stage == "after" or not test.after_only]


def _measured_rows(config: RunConfig, rows: Sequence[TokenizedRow]) -> list[TokenizedRow]:
    return [rows[i] for i in choose_rows(len(rows), config.output.eval_rows, EVAL_SEED)]
