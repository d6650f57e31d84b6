"""One run of `lowmem-npo train`, from its configuration to adapter, table and report. Reads from top to bottom."""

from __future__ import annotations

import signal
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, set_seed

from lowmem_npo.claim import claimed, gone
from lowmem_npo.commands.lasting import made_last_by, next_step
from lowmem_npo.commands.train.measuring import measure_after, measure_before, measured_rows, rows_at_once
from lowmem_npo.commands.train.own_texts import own_answers, own_texts, write_own_answers, write_own_texts
from lowmem_npo.commands.train.plan import RunPlan, is_main_process, plan_run, read_data, read_inputs
from lowmem_npo.config import REFUSING_TERMS, RunConfig
from lowmem_npo.console import Say, silent
from lowmem_npo.data import preview
from lowmem_npo.data.fit import check_fit
from lowmem_npo.endings import ended_with, handled
from lowmem_npo.errors import UserError
from lowmem_npo.estimate.automatic import as_begun
from lowmem_npo.estimate.background import Watched, record, watch
from lowmem_npo.evaluation.answers import Evaluations, in_sentences_of_its_own, summaries
from lowmem_npo.evaluation.leaks.relearning import RELEARNING
from lowmem_npo.files import PARTIAL, put_contents_in_place, write_atomically
from lowmem_npo.idle_options import idle_in
from lowmem_npo.memory.switches import apply_switches, load_base
from lowmem_npo.model import attach_lora, reference_mode
from lowmem_npo.model.layers import causal_lm
from lowmem_npo.model.loading import resolve_device
from lowmem_npo.recipes import with_recipe
from lowmem_npo.report.as_audited import check_same_rows
from lowmem_npo.report.audit import begin_audit, finish_audit
from lowmem_npo.report.files import write_report
from lowmem_npo.report.known_before import hardly_known
from lowmem_npo.run_directory import RunDirectory, RunFiles, step_of, what_is_left
from lowmem_npo.training.arguments import npo_config
from lowmem_npo.training.checkpoints import remove_damaged, resume_point
from lowmem_npo.training.divergence import Divergence
from lowmem_npo.training.early_stopping import StopOutcome, Stopping
from lowmem_npo.training.finite import NotFinite
from lowmem_npo.training.forget_level import halved, run_levels
from lowmem_npo.training.layered import LayeredBatches
from lowmem_npo.training.metrics import MetricsWriter
from lowmem_npo.training.preemption import Preemption
from lowmem_npo.training.progress import ConsoleProgress
from lowmem_npo.training.trainer import NPOTrainer
from lowmem_npo.training.training_rows import planned_rows, rows_read, used_alternatives


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
    config = with_recipe(config)  # of a script; a command line's has it
    main_process, output = is_main_process(config), config.output
    say = say if main_process else silent
    trains = output.preview is None and not output.dry_run
    left = partial(what_is_left, RunFiles(config.output_dir))
    with ended_with(left), claimed(config.output_dir, say) if main_process and trains else nullcontext():
        try:
            return _train_claimed(config, say)
        except NotFinite as error:
            raise UserError(f"{error}; {gone() or left()}.") from None


def _train_claimed(config: RunConfig, say: Say) -> RunResult | None:
    config = as_begun(config)
    inputs = read_inputs(config, say)
    if config.output.preview is not None:
        say(preview(inputs.data.forget, inputs.tokenizer, config.output.preview, title="forget"))
        if inputs.data.retain is not None:
            say(preview(inputs.data.retain, inputs.tokenizer, config.output.preview, title="retain"))
        return None
    plan = plan_run(config, inputs, say)
    if config.output.dry_run:
        idle, chosen = idle_in(plan.config), plan.directory.config.chosen()
        in_use = {name: value for name, value in chosen.items() if name not in idle}
        say(yaml.safe_dump(in_use, sort_keys=False, allow_unicode=True).rstrip())
        say("All other options have their defaults (`lowmem-npo train --help-all`); a run's run.yaml holds all.")
        say(f"Dry run: data, model and disk are fine; {plan.sentence}. Nothing was trained or written.")
        return None
    return unlearn(plan, load_base(plan.config.model, plan.config.memory, say), say)


def unlearn(plan: RunPlan, base: PreTrainedModel, say: Say) -> RunResult:
    """The run itself. `base`, as `load_model` returns it, is left with an adapter and its memory switches on
    (`lowmem_npo.commands.sweep.borrowed_base` undoes that)."""
    config, directory = plan.config, plan.directory
    main_process = is_main_process(config)
    measures = main_process and config.output.eval_rows != 0
    model = _adapted(config, base)
    if plan.data.retain_is_unwritten or plan.data.alternatives_are_unwritten:
        plan = _with_own_texts(plan, model, say)
    stopping = _stopping(plan, model, say)
    trainer = _trainer(plan, model, stopping, say)
    PartialState().wait_for_everyone()  # until every process has found the directory free
    directory.begin(main_process)
    if main_process:
        _keep_own_texts(plan)
    say(f"{plan.sentence}; {model.get_nb_trainable_parameters()[0]:,} adapter parameters.")
    if main_process:
        begin_audit(directory.path, config, plan.data, model)

    if (levels := _levels(plan, model, say)) is not None:
        trainer.push_up_to(levels)
        say(
            f"Forget rows below their level are pushed up to it, {min(levels):.2f} to {max(levels):.2f} nats per token."
        )
    before = measure_before(plan, model) if measures else {}
    if unknown := hardly_known(summaries(before), in_both_forms=plan.data.forget_in_forms is not None):
        say(unknown)
    elif config.objective.forget_term not in REFUSING_TERMS and (remark := in_sentences_of_its_own(before)):
        say(remark)  # of a refusal it does not matter how the answer was said
    PartialState().wait_for_everyone()
    preemption = Preemption()
    trainer.add_callback(preemption)
    # measured before are answers alone; with --tokens all the first logged step stands in
    known = summaries(before)["retain"].nll if "retain" in before and config.data.tokens == "answer" else None
    divergence = Divergence(known, trainer.shown, trainer.num_retain, say)
    if not any(condition.kind == "limit" for condition in config.stopping.conditions):
        trainer.add_callback(divergence)
    with handled(preemption.hear, signal.SIGINT):
        outcome, watched = _train(plan, trainer, stopping, say, preemption)
    _save_adapter(trainer, directory)
    after = measure_after(plan, model, before, say) if measures else {}

    steps = trainer.state.global_step if outcome is None else outcome.last.step
    if main_process:
        kept = steps if outcome is None else outcome.kept.step
        finish_audit(directory.path, steps, adapter_step=kept, training=record(watched, plan.predicted))
        remove_damaged(directory, say)
        _report(directory, divergence, say)
    return RunResult(directory.path, before, after, steps, outcome)


def _with_own_texts(plan: RunPlan, model: PeftModel, say: Say) -> RunPlan:
    """The plan with the texts and answers that the original model writes, unless an earlier run let it."""
    config, model_config = plan.config, causal_lm(model).config
    if is_main_process(config):
        with reference_mode(model):
            if (path := own_texts(config)) is not None and not path.exists():
                write_own_texts(path, model, plan.tokenizer, config, say)
            if plan.data.alternatives_are_unwritten:
                path = own_answers(config, plan.data.forget.examples)
                if not path.exists():
                    write_own_answers(path, model, plan.tokenizer, config, plan.data.forget, say)
    PartialState().wait_for_everyone()
    data = read_data(config, plan.tokenizer, model_config)
    unwritten = {"retain": plan.data.retain_is_unwritten, "forget, alternatives": plan.data.alternatives_are_unwritten}
    for note in data.notes:
        if unwritten.get(note.part):
            say(str(note))
    data = data if plan.data.level_rows is None else halved(data)
    check_fit(model_config, plan.tokenizer, rows_read(config, data))
    if config.output.resume:
        check_same_rows(plan.directory.path, config, data)
    return replace(plan, data=data)


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
        watched.micro_batch_parts = trainer.divided.parts
        watched.begin = step_of(checkpoint)
        watched.steps = trainer.state.global_step - watched.begin
        say(watched.line(plan.predicted))
    return stopping.finish() if stopping is not None and is_main_process(config) else None, watched


# -- the steps of a run -----------------------------------------------------------------------------------------------


def _adapted(config: RunConfig, base: PreTrainedModel) -> PeftModel:
    """The base with the adapter to train, and the memory switches on."""
    set_seed(config.training.seed)
    model = attach_lora(base, config.adapter)
    model.active_peft_config.revision = config.model.revision  # of the base: for those who load the adapter later
    cast(Any, model).create_or_update_model_card = lambda folder: None  # PEFT's, to be filled in; the report writes one
    apply_switches(model, config.memory, resolve_device(config.model.device))
    return model


def _trainer(plan: RunPlan, model: PeftModel, stopping: Stopping | None, say: Say) -> NPOTrainer:
    args, data = npo_config(plan.config), plan.data
    progress = ConsoleProgress(refuses=plan.config.objective.forget_term in REFUSING_TERMS)
    ours = [MetricsWriter(plan.directory.metrics, say), progress, *([stopping] if stopping else [])]
    trainer = NPOTrainer(
        model,
        args,
        data.forget_targets,
        data.retain,
        processing_class=plan.tokenizer,
        alternative_dataset=used_alternatives(plan.config, data),
        true_dataset=data.forget_trained,
        callbacks=ours,
        say=say,
    )

    is_layered = plan.config.training.layered is not None
    if stopping is not None and is_layered and isinstance(trainer.step_batches, LayeredBatches):
        stopping.stages = trainer.step_batches
    for default in (ProgressCallback, PrinterCallback):  # replaced by ours
        trainer.remove_callback(default)
    return trainer


def _levels(plan: RunPlan, model: PeftModel, say: Say) -> list[float] | None:
    """How far each forget row is pushed, if --forget-level says so; the main process measures for all."""
    config, directory = plan.config, plan.directory
    if plan.data.level_rows is None:
        return None
    levels: list[Any] = [None]
    if is_main_process(config):
        fresh, size = not config.output.resume, rows_at_once(config)
        levels = [run_levels(directory.forget_levels, model, plan.data, size, fresh=fresh, say=say)]
    return broadcast_object_list(levels)[0]


def _save_adapter(trainer: NPOTrainer, directory: RunDirectory) -> None:
    """Writes the adapter and its tokenizer file by file, the weights last: they say that the run is trained."""
    staging = directory.path / f"adapter{PARTIAL}"
    trainer.save_model(str(staging))
    if trainer.args.should_save:
        put_contents_in_place(staging, directory.path, last=directory.weights.name)


def _stopping(plan: RunPlan, model: PeftModel, say: Say) -> Stopping | None:
    """What --stop-when asks for, if anything; it measures the same rows as before and after training."""
    config, data = plan.config, plan.data
    if not config.stopping.stop_when:
        return None
    sets = {"forget": data.forget, "retain": data.retain, "holdout": data.holdout}
    chosen = {name: measured_rows(config, rows) for name, rows in sets.items() if rows is not None}
    # As the other sets are measured: folds have both forms of `--template both`, the second one after all of the first.
    folds = [[data.forget[i] for i in fold if i < len(data.forget)] for fold in planned_rows(config, data).folds or ()]
    return Stopping(
        config.stopping.conditions,
        model,
        chosen,
        plan.directory.path,
        every=config.stopping.eval_every,
        patience=config.stopping.stop_patience,
        batch_size=rows_at_once(config),
        folds=[measured_rows(config, rows) for rows in folds],
        say=say,
    )


def _keep_own_texts(plan: RunPlan) -> None:
    """Has the run's directory hold what the original model wrote, wherever it wrote that."""
    config, directory = plan.config, plan.directory
    if (texts := own_texts(config)) not in (None, directory.self_written):
        write_atomically(directory.self_written, texts.read_text(encoding="utf-8"), private=True)
    if config.data.alternatives is not None and plan.data.alternatives is not None:
        answers = own_answers(config, plan.data.forget.examples)
        if answers != directory.alternatives:
            write_atomically(directory.alternatives, answers.read_text(encoding="utf-8"), private=True)


def _report(directory: RunDirectory, divergence: Divergence, say: Say) -> None:
    """Writes the report, and says what is in it."""
    report = write_report(directory.path)
    say(f"\nThe adapter and the measurements are in {directory.path}; what they mean is in its report.html.")
    if (worst := report.worst_attacks.get("after")) is not None:
        say(worst.sentence)
    say(report.verdict.headline)
    if divergence.sentence is not None:
        say(divergence.sentence)
    relearnt = report.leaks.get("after", {}).get(RELEARNING.name)
    if made_last_by(report.settings) and not (relearnt and relearnt.figures):
        say(next_step(str(directory.path)))
