"""One run of `lowmem-npo train`, from configuration to adapter and before/after table. Reads top to bottom."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, set_seed

from lowmem_npo.config import RunConfig
from lowmem_npo.console import Say, silent
from lowmem_npo.data import PreparedData, TokenizedRow, TokenizedRows, prepare, preview
from lowmem_npo.errors import UserError
from lowmem_npo.estimate.background import keep_budget, watch_memory
from lowmem_npo.evaluation.answer_table import save_table, text_table
from lowmem_npo.evaluation.answers import (
    Evaluations,
    choose_rows,
    evaluate_answers,
    read_answers,
    save_answers,
    summaries,
)
from lowmem_npo.evaluation.leaks.contract import LeakResult, LeakResults
from lowmem_npo.evaluation.leaks.measure import measure_leaks, read_leaks, write_leaks
from lowmem_npo.evaluation.leaks.registry import WHILE_TRAINING, leak_tests
from lowmem_npo.memory.switches import apply_switches
from lowmem_npo.model import attach_lora, load_model, load_tokenizer, reference_mode, resolve_name
from lowmem_npo.model.loading import DTYPES, load_config, resolve_device
from lowmem_npo.report.audit import begin_audit, check_same_rows, finish_audit
from lowmem_npo.report.evaluation_text import leaks_text
from lowmem_npo.report.files import write_report
from lowmem_npo.run_directory import RunDirectory, check_disk, step_of
from lowmem_npo.training.arguments import npo_config
from lowmem_npo.training.early_stopping import StopOutcome, Stopping
from lowmem_npo.training.metrics import MetricsWriter
from lowmem_npo.training.progress import ConsoleProgress
from lowmem_npo.training.reference import check_cache_space
from lowmem_npo.training.trainer import NPOTrainer

EVAL_SEED = 0  # the same rows are measured whatever --seed is, so that runs with several seeds can be compared
Inputs = tuple[PreTrainedTokenizerBase, PreparedData]


@dataclass
class RunResult:
    """What a run leaves in memory; the same stands in its directory."""

    directory: Path
    before: Evaluations
    after: Evaluations
    optimizer_steps: int
    stopping: StopOutcome | None = None


@dataclass
class RunPlan:
    """A validated run. `config` has its memory budget resolved."""

    config: RunConfig
    directory: RunDirectory
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData

    @property
    def steps(self) -> int:
        """Optimiser steps, as the Trainer counts them."""
        training = self.config.training
        per_epoch = math.ceil(len(self.data.forget) / training.batch_size)
        return training.max_steps or math.ceil(training.epochs * per_epoch)

    @property
    def sentence(self) -> str:
        """How many steps of how many rows."""
        training, data = self.config.training, self.data
        retain = f" and {training.retain_rows} of {len(data.retain)} retain rows" if data.retain is not None else ""
        return (
            f"{self.steps} steps of {min(training.batch_size, len(data.forget))} of {len(data.forget)} forget{retain}"
        )


def train(config: RunConfig, say: Say = print) -> RunResult | None:
    """Makes the model forget. Returns None after --preview and --dry-run, which train nothing.

    Raises:
        UserError: something the user can fix, said in one sentence.
    """
    say = say if is_main_process(config) else silent
    plan = plan_run(config, say)
    if plan is None:
        return None
    return unlearn(plan, load_model(plan.config.model), say)


def is_main_process(config: RunConfig) -> bool:
    """Whether this process is the one that measures, writes and talks."""
    return PartialState(cpu=resolve_device(config.model.device).type == "cpu").is_main_process


def plan_run(config: RunConfig, say: Say, inputs: Inputs | None = None) -> RunPlan | None:
    """Everything that can be wrong with data, options, model name and directory is found here, before the first byte is
    written and before the weights are loaded. Returns None after --preview and --dry-run.

    inputs: tokenizer and data of an earlier plan of the same model and data, which are then not read again.

    Raises:
        UserError: as for `train`.
    """
    if line := resolve_name(config.model.model)[1]:
        say(line)
    leak_tests(config.output.leaks, WHILE_TRAINING)
    model_config = load_config(config.model)
    if inputs is None:
        tokenizer = load_tokenizer(config.model)
        inputs = tokenizer, prepare(tokenizer, config.data, config.objective.forget_term)
    tokenizer, data = inputs
    for line in data.report:
        say(line)
    if config.output.preview is not None:
        say(preview(data.forget, tokenizer, config.output.preview, title="forget"))
        if data.retain is not None:
            say(preview(data.retain, tokenizer, config.output.preview, title="retain"))
        return None
    directory = RunDirectory(config)
    directory.check()
    if config.output.resume:
        check_same_rows(directory.path, data)
    check_disk(config, model_config)
    if directory.reference_dir is not None:
        dtype = DTYPES[config.model.dtype]
        say(check_cache_space(config.objective, data.forget, data.retain, model_config, dtype, directory.reference_dir))
    directory.config = config = keep_budget(config, data, say)
    plan = RunPlan(config, directory, tokenizer, data)
    if config.output.dry_run:
        say(config.to_yaml().rstrip())
        say(f"Dry run: data, model and disk are fine; {plan.sentence}. Nothing was trained or written.")
        return None
    return plan


def unlearn(plan: RunPlan, base: PreTrainedModel, say: Say) -> RunResult:
    """The run itself. `base`, as `load_model` gives it, is left with its adapter and its memory switches thrown
    (`lowmem_npo.commands.sweep.borrowed_base` undoes that)."""
    config, directory, data, tokenizer = plan.config, plan.directory, plan.data, plan.tokenizer
    main_process = is_main_process(config)
    set_seed(config.training.seed)
    model = attach_lora(base, config.adapter)
    model.active_peft_config.revision = config.model.revision  # of the base: for those who load the adapter later
    apply_switches(model, config.memory)
    trainer = NPOTrainer(
        model,
        npo_config(config),
        data.forget_targets,
        data.retain,
        processing_class=tokenizer,
        callbacks=[MetricsWriter(directory.metrics), ConsoleProgress()],
    )
    for default in (ProgressCallback, PrinterCallback):  # ours takes their place
        trainer.remove_callback(default)
    stopping = _stopping(plan, model, say)
    if stopping is not None:
        trainer.add_callback(stopping)
    directory.begin(main_process)
    say(f"{plan.sentence}; {model.get_nb_trainable_parameters()[0]:,} adapter parameters.")
    if main_process:
        begin_audit(directory.path, config, data, model)

    before: Evaluations = {}
    if config.output.eval_rows and main_process:
        before = read_answers(directory.answers("before"), config.output.eval_rows)  # of a killed run
        fresh = not before
        if fresh:
            with reference_mode(model):
                before = _evaluate(plan, model, "before")
            save_answers(directory.answers("before"), before)
        wanted = set(_leak_tests(config, "before"))
        if (fresh and wanted) or set(read_leaks(directory.leaks).get("before", {})) != wanted:
            with reference_mode(model):
                write_leaks(directory.leaks, {"before": _leaks(plan, model, "before")})
    PartialState().wait_for_everyone()

    checkpoint = directory.last_checkpoint() if config.output.resume else None
    stopped = stopping is not None and stopping.resume(step_of(checkpoint))
    if step_of(checkpoint) >= plan.steps:
        trainer.restore(checkpoint)
    elif not stopped:
        with watch_memory(config, data, trainer.args.device, say):
            trainer.train(resume_from_checkpoint=checkpoint)
    outcome = stopping.finish() if stopping is not None and main_process else None
    trainer.save_model(str(directory.path))

    after: Evaluations = {}
    if config.output.eval_rows and main_process:
        after = _evaluate(plan, model, "after")
        save_answers(directory.answers("after"), after)
        stages = {stage: summaries(sets) for stage, sets in {"before": before, "after": after}.items()}
        save_table(stages, directory.path)
        say("\n" + text_table(stages))
        if config.output.leaks:
            leaks_before = read_leaks(directory.leaks).get("before", {})
            leaks_after = _leaks(plan, model, "after")
            write_leaks(directory.leaks, {"before": leaks_before, "after": leaks_after})
            say("\nWhat still leaks\n" + leaks_text(leaks_after, leaks_before))
    steps = trainer.state.global_step if outcome is None else outcome.last.step
    if main_process:
        finish_audit(directory.path, steps, adapter_step=steps if outcome is None else outcome.kept.step)
        write_report(directory.path)
    say(f"\nThe adapter and the measurements are in {directory.path}; what they mean is in its report.html.")
    return RunResult(directory.path, before, after, steps, outcome)


def _stopping(plan: RunPlan, model: PeftModel, say: Say) -> Stopping | None:
    """What --stop-when asks for; None if nothing. It measures the rows that are measured before and after, too."""
    config, data = plan.config, plan.data
    if not config.stopping.stop_when:
        return None
    sets = {"forget": data.forget, "retain": data.retain, "holdout": data.holdout}
    chosen = {name: _measured_rows(config, rows) for name, rows in sets.items() if rows is not None}
    return Stopping(
        config.stopping.conditions,
        model,
        chosen,
        plan.directory.path,
        every=config.stopping.eval_every,
        patience=config.stopping.stop_patience,
        batch_size=config.output.eval_batch_size,
        say=say,
    )


def _evaluate(plan: RunPlan, model: PeftModel, stage: str) -> Evaluations:
    output, sets = plan.config.output, {"forget": plan.data.forget, "retain": plan.data.retain}
    return {
        name: evaluate_answers(
            model,
            plan.tokenizer,
            rows,
            name=f"{stage}, {name}",
            limit=output.eval_rows,
            seed=EVAL_SEED,
            batch_size=output.eval_batch_size,
        )
        for name, rows in sets.items()
        if rows is not None
    }


def _leaks(plan: RunPlan, model: PeftModel, stage: str) -> LeakResults:
    """The leak tests on the rows that are measured before and after, compared with as many of the holdout."""
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
            batch_size=config.output.eval_batch_size,
        )
    except UserError as error:  # a diverged adapter gives no numbers: the report must say so all the same
        return {test: LeakResult.not_measured(str(error).rstrip(".")) for test in tests}


def _leak_tests(config: RunConfig, stage: str) -> list[str]:
    tests = leak_tests(config.output.leaks, WHILE_TRAINING)
    return [test.name for test in tests if stage == "after" or not test.after_only]


def _measured_rows(config: RunConfig, rows: TokenizedRows) -> list[TokenizedRow]:
    return [rows[i] for i in choose_rows(len(rows), config.output.eval_rows, EVAL_SEED)]
