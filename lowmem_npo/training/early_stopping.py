"""A run under `--stop-when`: measured after every epoch or every few steps, stopped in time, its best adapter kept."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from lowmem_npo.console import Say
from lowmem_npo.data import TokenizedRow
from lowmem_npo.evaluation.benchmarks.documents import membership
from lowmem_npo.evaluation.figures import finite, formatted, side_by_side
from lowmem_npo.evaluation.scoring.likelihood import Likelihood, answer_likelihoods
from lowmem_npo.files import complete, read_json_lines, write_atomically, write_json
from lowmem_npo.model import reference_mode
from lowmem_npo.run_directory import RunFiles, step_of
from lowmem_npo.stop_conditions import Condition, StopEvaluation, best, held, held_before, holds
from lowmem_npo.training.layered import LayeredBatches


@dataclass(frozen=True)
class StopOutcome:
    """What `--stop-when` did; stopping.json holds the same."""

    conditions: list[str]
    held: list[str]
    """The conditions that ended the run; none: it trained to its end."""
    last: StopEvaluation
    """The evaluation at which the run ended."""
    kept: StopEvaluation
    """The evaluation whose adapter is the run's result."""
    within_limits: bool
    """Whether the kept adapter is within every limit."""
    sentence: str
    held_before: list[str] = field(default_factory=list)
    """The goals that held before training, and therefore decided nothing."""


class Stopping(TrainerCallback):
    """Measures `sets` with `model`, ends training when a condition holds, and keeps the best adapter.

    sets: the rows to measure: "forget" and, where there are such rows, "retain" and "holdout".
    directory: gets evaluations.jsonl, a line per evaluation, and best/, the best adapter so far.
    every: optimiser steps between evaluations; None: one after each epoch. The last step is always followed by one.
    patience: how many evaluations in a row a condition must hold at.
    folds: under layered unlearning, the rows of each fold that are measured in its stage; a goal that they reach ends
        the stage. All else is decided in the last stage, on `sets`. The caller gives the trainer's rows to `stages`.

    The main process measures, and decides for all.
    """

    def __init__(
        self,
        conditions: Sequence[Condition],
        model: PeftModel,
        sets: Mapping[str, Sequence[TokenizedRow]],
        directory: Path,
        *,
        every: int | None = None,
        patience: int = 1,
        batch_size: int = 8,
        folds: Sequence[Sequence[TokenizedRow]] = (),
        say: Say = print,
    ) -> None:
        self.folds = folds
        self.stages: LayeredBatches | None = None
        self.conditions, self.model, self.sets, self.files = conditions, model, sets, RunFiles(directory)
        self.every, self.patience, self.batch_size, self.say = every, patience, batch_size, say
        self.evaluations: list[StopEvaluation] = []
        self.begun: dict[int, StopEvaluation] = {}
        """Stage -> its fold before training; of the last stage, and where there is no goal, it is not measured."""

    # -- before training ----------------------------------------------------------------------------------------------

    def resume(self, step: int) -> bool:
        """Prepares a run that continues from `step`, 0 if it begins. Returns whether it had already stopped there."""
        self.evaluations = self._until(step) if step > 0 else []
        if not self.evaluations:
            return False
        for last in range(2, len(self.evaluations) + 1):
            self._end_stage(self._stage_ended(self.evaluations[:last]), self.evaluations[last - 1].step)
        return bool(self._held())

    def damage(self, step: int) -> str | None:
        """Why the run cannot continue from `step`: the best adapter until then is missing or damaged. None: it can."""
        try:
            evaluations = self._until(step)
        except ValueError:
            return f"{self.files.stop_evaluations.name} is damaged"
        if not evaluations or evaluations[0].step > 0:
            return f"{self.files.stop_evaluations.name} lacks what was measured before training"
        if (kept := self._best(evaluations)) is None:
            return None
        try:
            whole = load_file(self._file(kept)).keys() >= self._trained().keys()
        except (OSError, SafetensorError):
            whole = False
        return None if whole else f"{self._file(kept).name}, the best adapter until then, is missing or damaged"

    def _until(self, step: int) -> list[StopEvaluation]:
        read = [e for e in read_evaluations(self.files.stop_evaluations) if e.step <= step]
        self.begun = {e.stage: e for e in read if e.step == 0 and e.stage is not None}
        return [e for e in read if e.step > 0 or e.stage is None]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if PartialState().is_main_process:
            if not self.evaluations:
                with reference_mode(self.model):
                    self._add(measure(self.model, self.sets, 0, 0.0, self.batch_size))
                    if any(condition.kind == "goal" for condition in self.conditions):
                        for stage, fold in enumerate(self.folds[:-1], 1):
                            sets = {**self.sets, "forget": fold}
                            self.begun[stage] = measure(self.model, sets, 0, 0.0, self.batch_size, stage)
                self._say_what_held()
            self._write()
        PartialState().wait_for_everyone()

    def _say_what_held(self) -> None:
        start, last = self.evaluations[0], len(self.folds)
        parts = [(f"stage {stage} of {last}", begun) for stage, begun in self.begun.items()]
        for part, begun in [*parts, (f"stage {last} of {last}" if last else "", start)]:
            for condition in held_before(self.conditions, begun, start):
                words, figures = condition.describe(begun, start)
                goes_on = "the stage goes on for its whole length" if part else "the run goes on to its end"
                self.say(
                    f"--stop-when {condition.text}{part and f', {part}'}: the goal holds before training "
                    f"({words.format(*side_by_side(figures))}), so it cannot tell when enough is forgotten: without it "
                    f"{goes_on}, if nothing else ends it. Does the model know the rows to forget, and is the holdout "
                    "like them?"
                )

    # -- while training -----------------------------------------------------------------------------------------------

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Not when transformers ends an epoch: that is after the step is saved, and comes in the middle of one, too,
        # when a signal ends the run. So whatever is resumed has been measured, and nothing else has.
        at_end = state.global_step == state.max_steps
        due = float(state.epoch).is_integer() if self.every is None else state.global_step % self.every == 0
        if due or at_end:
            self._evaluate(args, state, control)

    def _evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        decision: list[Any] = [False, None]
        if state.is_world_process_zero:
            stage, sets = None, dict(self.sets)
            if self.stages is not None:
                stage = self.stages.stage(state.global_step - 1) + 1
                sets |= {} if stage == len(self.folds) else {"forget": self.folds[stage - 1]}
            now = measure(self.model, sets, state.global_step, state.epoch, self.batch_size, stage)
            self._add(now)
            if self._best(self.evaluations) is now:
                self._save(now)
            self._write()
            decision = [bool(self._held()), self._stage_ended(self.evaluations)]
        stop, ended = broadcast_object_list(decision)
        self._end_stage(ended, state.global_step)
        if stop:
            control.should_training_stop = True
            control.should_save |= args.save_strategy != SaveStrategy.NO  # or it could not be resumed

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A killed run continues from a checkpoint, and needs no adapter but the best one until then."""
        if state.is_world_process_zero:
            self._prune()

    # -- after training -----------------------------------------------------------------------------------------------

    def finish(self) -> StopOutcome | None:
        """Loads the best adapter into the model, writes stopping.json, and reports. For the main process."""
        kept, last, ended_by = self._best(self.evaluations), self.evaluations[-1], self._held()
        if kept is None:
            return None
        self._restore(kept)
        self._prune()
        start = self.evaluations[0]
        limits = [condition for condition in self.conditions if condition.kind == "limit"]
        within = not any(holds(limit, kept, start) for limit in limits)
        outcome = StopOutcome(
            conditions=[condition.text for condition in self.conditions],
            held=[condition.text for condition in ended_by],
            last=last,
            kept=kept,
            within_limits=within,
            sentence=self._sentence(kept, last, ended_by, within),
            held_before=[condition.text for condition in held_before(self.conditions, start, start)],
        )
        content = {**asdict(outcome), "last": _line(last), "kept": _line(kept), "before": _line(start)}
        write_json(self.files.stopping, content)
        self.say(outcome.sentence)
        return outcome

    def _sentence(self, kept: StopEvaluation, last: StopEvaluation, ended_by: Sequence[Condition], within: bool) -> str:
        start = self.evaluations[0]
        times = f" {self.patience} times in a row" if self.patience > 1 else ""
        if ended_by:
            known = [(condition.text, *condition.describe(last, start)) for condition in ended_by]
            why = " and ".join(f"{text} ({words.format(*side_by_side(of))})" for text, words, of in known)
            sentence = f"Stopped at step {last.step}: {why}{times and ',' + times}."
        else:
            conditions = " and ".join(condition.text for condition in self._telling(start))
            sentence = f"Trained to its end, step {last.step}{conditions and f': {conditions} did not hold{times}'}."
        if void := " and ".join(condition.text for condition in held_before(self.conditions, start, start)):
            sentence += f" {void} held before training already, and decided nothing."
        sentence += f" The adapter of step {kept.step} is kept."
        if not within:
            sentence += " None was within the limit, this one lost least: try a lower --lr or --eval-every."
        return sentence

    # -- evaluations and adapters, in memory and on disk --------------------------------------------------------------

    def _held(self) -> list[Condition]:
        return held(self._counting(self.evaluations), self._telling(self.evaluations[0]), self.patience)

    def _best(self, evaluations: Sequence[StopEvaluation]) -> StopEvaluation | None:
        return best(self._counting(evaluations), self._telling(evaluations[0]))

    def _telling(self, start: StopEvaluation, begun: StopEvaluation | None = None) -> list[Condition]:
        """The conditions without goals that held before training, in the run or for what a stage has `begun` with."""
        void = held_before(self.conditions, begun or start, start)
        return [condition for condition in self.conditions if condition not in void]

    def _counting(self, evaluations: Sequence[StopEvaluation]) -> list[StopEvaluation]:
        """The first one, and those by which the run is judged: all, or the last stage's."""
        last = len(self.folds) or None
        return [evaluations[0], *(e for e in evaluations[1:] if e.stage == last)]

    def _stage_ended(self, evaluations: Sequence[StopEvaluation]) -> int | None:
        """The stage, from 0, that the last of the evaluations ends; None: none, or the last stage."""
        stage = evaluations[-1].stage
        if stage is None or stage == len(self.folds):
            return None
        of_stage = [evaluations[0], *(e for e in evaluations[1:] if e.stage == stage)]
        telling = self._telling(evaluations[0], self.begun.get(stage))
        goals = [condition for condition in telling if condition.kind == "goal"]
        return stage - 1 if held(of_stage, goals, self.patience) else None

    def _end_stage(self, ended: int | None, step: int) -> None:
        if ended is not None and self.stages is not None:
            self.stages.end_stage(ended, step)

    def _add(self, now: StopEvaluation) -> None:
        self.evaluations.append(now)
        figures = {
            "forget NLL": now.forget_nll,
            "holdout NLL": now.holdout_nll,
            "retain NLL": now.retain_nll,
            "membership AUC": now.membership_auc,
        }
        line = ", ".join(f"{name} {formatted(value)}" for name, value in figures.items() if value is not None)
        stage = f", stage {now.stage} of {len(self.folds)}" if now.stage else ""
        self.say(f"{f'step {now.step}{stage}' if now.step else 'before'}: {line}")

    def _write(self) -> None:
        start, *trained = self.evaluations
        lines = "".join(json.dumps(_line(one)) + "\n" for one in (start, *self.begun.values(), *trained))
        write_atomically(self.files.stop_evaluations, lines)

    def _file(self, evaluation: StopEvaluation) -> Path:
        return self.files.best / f"step-{evaluation.step}.safetensors"

    def _trained(self) -> dict[str, Any]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def _save(self, evaluation: StopEvaluation) -> None:
        file = self._file(evaluation)
        file.parent.mkdir(exist_ok=True)
        with complete(file) as partial:
            save_file({name: weight.detach().cpu().contiguous() for name, weight in self._trained().items()}, partial)

    def _restore(self, evaluation: StopEvaluation) -> None:
        weights = load_file(self._file(evaluation))
        for name, parameter in self._trained().items():
            parameter.data.copy_(weights[name])

    def _prune(self) -> None:
        """Removes the adapters that are the best neither now nor at any checkpoint."""
        kept = [self._best(self.evaluations)]
        for step in map(step_of, self.files.checkpoints()):
            if until := [evaluation for evaluation in self.evaluations if evaluation.step <= step]:
                kept.append(self._best(until))
        files = {self._file(evaluation) for evaluation in kept if evaluation is not None}
        for file in self.files.best.glob("step-*"):
            if file not in files:
                file.unlink()


def measure(
    model: PreTrainedModel | PeftModel,
    sets: Mapping[str, Sequence[TokenizedRow]],
    step: int,
    epoch: float,
    batch_size: int,
    stage: int | None = None,
) -> StopEvaluation:
    """The likelihood of every set's answers; nothing is generated."""
    scores = {
        name: answer_likelihoods(model, rows, batch_size=batch_size, description=f"step {step}, {name}")
        for name, rows in sets.items()
    }
    levels: dict[str, Any] = {f"{name}_nll": _nll(likelihoods) for name, likelihoods in scores.items()}
    if "holdout" in scores:
        rows = [[likelihood.nll for likelihood in scores[name]] for name in ("forget", "holdout")]
        finite = all(map(math.isfinite, [*rows[0], *rows[1]]))
        levels["membership_auc"] = membership(*rows).auc if finite else math.nan
    return StopEvaluation(step, epoch, **levels, stage=stage)


def read_evaluations(path: Path) -> list[StopEvaluation]:
    """The evaluations in evaluations.jsonl, in order; none if it does not exist. Raises ValueError if it is damaged."""
    if not path.exists():
        return []
    try:
        lines = read_json_lines(path)
        evaluations = [StopEvaluation(**line | {k: math.nan for k, v in line.items() if v is None}) for line in lines]
        float(sum(value for one in evaluations for value in astuple(one) if value is not None))  # all are numbers
    except (TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"'{path}' is damaged") from error
    return evaluations


def _nll(likelihoods: Sequence[Likelihood]) -> float:
    return sum(one.nll_sum for one in likelihoods) / sum(one.tokens for one in likelihoods)


def _line(evaluation: StopEvaluation) -> dict[str, float | None]:
    """For JSON: what was not measured is absent, a figure that is not finite is null."""
    return {name: finite(value) for name, value in asdict(evaluation).items() if value is not None}
