"""The runs of a sweep, one after another, on one loaded base model and one cached reference."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel

from lowmem_npo.claim import claimed, make_directory
from lowmem_npo.commands.evaluate.run import measure
from lowmem_npo.commands.sweep.borrowed_base import borrowed
from lowmem_npo.commands.sweep.evaluation import SweepEvaluation
from lowmem_npo.commands.sweep.figures import BEFORE, GOLD, SweepResult, baseline, before_of, collect, write_results
from lowmem_npo.commands.sweep.finished import check_same, is_complete, is_finished
from lowmem_npo.commands.sweep.grid import GridPoint, SweepRun, named
from lowmem_npo.commands.sweep.options import TeachingOptions
from lowmem_npo.commands.sweep.picture import draw_sweep
from lowmem_npo.commands.sweep.taught_models import TAUGHT, check_teaching, teach_models
from lowmem_npo.commands.train.measuring import measure_answers
from lowmem_npo.commands.train.plan import Inputs, RunPlan, fitted, plan_run, read_inputs
from lowmem_npo.commands.train.run import unlearn
from lowmem_npo.config import REFUSING_TERMS, DataConfig, ModelConfig, RunConfig, may_prefer
from lowmem_npo.console import Say, silent
from lowmem_npo.data.chat import TODAY, today
from lowmem_npo.endings import ended_with, going_on
from lowmem_npo.errors import UserError, Vanished
from lowmem_npo.evaluation.answers import read_answers, save_answers, summaries
from lowmem_npo.evaluation.leaks.registry import leak_tests
from lowmem_npo.evaluation.settings import EvaluationConfig
from lowmem_npo.files import load_json, write_atomically, write_json
from lowmem_npo.memory.release import release_memory
from lowmem_npo.model import load_model
from lowmem_npo.model.saved_adapter import settings_of_run
from lowmem_npo.report.files import write_report
from lowmem_npo.run_directory import SWEEP_STATE, EvaluationFiles, RunDirectory, RunFiles, check_empty
from lowmem_npo.sizes import first_of

STREAMED = "--stream-weights is an option of single runs: use it with `lowmem-npo train`."
NOT_TAUGHT: dict[str, Any] = {
    "refusal": DataConfig.refusal,
    "alternative_column": None,
    "alternatives": None,
    "group_column": None,
    "paraphrase_column": None,
    "holdout": None,
}


def sweep(
    runs: Sequence[SweepRun],
    root: Path,
    *,
    resume: bool,
    say: Say = print,
    teaching: TeachingOptions | None = None,
    evaluation: SweepEvaluation | None = None,
) -> SweepResult:
    """Makes every run that is not finished, and writes sweep.csv, sweep.json, sweep.md and sweep.png into `root`.

    Each run is the one that `lowmem-npo train` makes with the same settings, in `root`/configuration/seed-N. If one
    fails, the reason is recorded and the next one begins. With `teaching` the runs begin with a model that is taught
    first; with `evaluation` they are evaluated, and so are the models that they are compared with, once.

    Raises:
        UserError: `root` holds other files, or runs with other settings; or no run succeeded.
    """
    with ended_with(going_on(root / SWEEP_STATE, resume)), claimed(root, say):
        return _sweep_claimed(runs, root, resume, say, teaching, evaluation)


def _sweep_claimed(
    runs: Sequence[SweepRun],
    root: Path,
    resume: bool,
    say: Say,
    teaching: TeachingOptions | None,
    evaluation: SweepEvaluation | None,
) -> SweepResult:
    runs = untaught = _of_one_date(runs)
    if teaching is not None:
        runs = [_of_model(run, root / TAUGHT) for run in runs]
    _check(runs, root, resume)
    inputs: dict[str, Inputs] = {}
    for line in check_more(untaught, root, teaching, evaluation, inputs):
        say(line)
    state = Ledger(root / SWEEP_STATE)
    bases = Bases()
    gold = None
    if teaching is not None:
        config = untaught[0].config
        teach_models(config, teaching, _read_inputs(config, inputs, silent), root, say)
        gold = _measure_gold(runs[0], root, bases, evaluation, state, say)
    measured = set[Path]()  # baselines
    for number, run in enumerate(runs, 1):
        title = f"[{number}/{len(runs)}] {run.point.name}, seed {run.seed}"
        finished = is_complete(run) and is_finished(run, _read_inputs(run.config, inputs, silent).data)
        say(f"{title}: done before" if finished else title)
        begin = time.monotonic()
        try:
            if not finished:
                with claimed(run.directory, say):
                    _make(run, bases, inputs, say)
                state.record(run, seconds=time.monotonic() - begin)
            if evaluation is not None:
                before = _before(run, root)
                if before.path not in measured:
                    _evaluate(evaluation, evaluation.of_before(run.config, before, gold), run, bases, state, say)
                    measured.add(before.path)
                result_before = before.evaluation.result
                _evaluate(evaluation, evaluation.of_run(run.config, result_before, gold), run, bases, state, say)
            _report_again(run, root)
            state.clear_error(run)
        except Exception as error:  # no error of one run must end the others
            reason = str(error) if isinstance(error, UserError | Vanished) else f"{type(error).__name__}: {error}"
            reason = " ".join(reason.split())
            state.record(run, error=reason)
            say(f"    failed: {reason}")
        release_memory()  # of a run that failed: until here its error held it
    result = collect(runs, state.entries, root, *([evaluation.figures] if evaluation else []))
    if not result.configurations:
        raise UserError(f"No run of the sweep succeeded. {result.failed[0]['directory']}: {result.failed[0]['error']}")
    write_results(result, root)
    draw_sweep(root / "sweep.png", result)
    return result


def _of_one_date(runs: Sequence[SweepRun]) -> list[SweepRun]:
    """The runs, with the date for their chat templates with which the first of them began."""
    recorded = (settings_of_run(str(run.directory)).get("chat_date") for run in runs)
    date = next(filter(None, recorded), today())
    return [
        replace(run, config=replace(run.config, data=replace(run.config.data, chat_date=date)))
        if run.config.data.chat_date == TODAY
        else run
        for run in runs
    ]


def _rows_and_steps(runs: Sequence[SweepRun], inputs: dict[str, Inputs]) -> list[str]:
    """What `train` says of the rows and the steps of the runs that are left to be made, each line once: with the names
    of the configurations where it is not said of all.

    Raises UserError for rows that cannot be read, or divided, as one of these runs asks.
    """
    of_point: dict[GridPoint, list[str]] = {}
    for run in runs:
        if is_complete(run):
            continue
        point, divided = run.point.start, list[str]()  # which decides what is read
        try:
            known = _read_inputs(run.config, inputs, silent)
            point = run.point
            config, data = fitted(run.config, known.data, divided.append)
        except UserError as error:
            raise named(point, error) from error
        if run.point not in of_point:  # seeds change none of it
            lines = of_point[run.point] = list[str]()
            read_inputs(run.config, lines.append, known)
            plan = RunPlan(config, RunDirectory(config), known.tokenizer, data)
            lines += [*divided, f"A run takes {plan.sentence}."]
    names: dict[str, list[str]] = {}
    for point, lines in of_point.items():
        for line in dict.fromkeys(lines):
            names.setdefault(line, []).append(point.name)
    return [
        line if len(of) == len(of_point) else f"{first_of(of, separator=', ')}: {line}" for line, of in names.items()
    ]


def _read_inputs(config: RunConfig, inputs: dict[str, Inputs], say: Say) -> Inputs:
    """Those of a run; from `inputs`, if an earlier one had the same."""
    term = config.objective.forget_term
    key = repr((config.model, config.data, term if term in REFUSING_TERMS else None, may_prefer(term)))
    inputs[key] = read_inputs(config, say, inputs.get(key))
    return inputs[key]


def check_more(
    runs: Sequence[SweepRun],
    root: Path,
    teaching: TeachingOptions | None,
    evaluation: SweepEvaluation | None,
    inputs: dict[str, Inputs],
) -> list[str]:
    """What will be read, taught and evaluated, in lines; `runs` are those of the model that is yet to be taught.

    inputs: what runs with the same model and data read, once; it is added to.

    Raises:
        UserError: what can be known to be wrong with it.
    """
    lines = []
    if teaching is not None:
        config = runs[0].config
        if any(run.config.adapter.adapter for run in runs):
            raise UserError("--teach makes the model that the runs begin with: --adapter goes on from another.")
        if len({repr((run.config.model, replace(run.config.data, **NOT_TAUGHT))) for run in runs}) > 1:
            raise UserError(
                "--teach makes one model for the sweep: --grid cannot vary options of the model or the data."
            )
        lines.append("Teach: " + check_teaching(config, teaching, _read_inputs(config, inputs, silent), root))
    if evaluation is not None:
        for name, run in {before_of(run): run for run in reversed(runs)}.items():
            rows = evaluation.check(run.config, baseline(root, name))
            lines += [f"Evaluate{name.removeprefix(BEFORE)}: {'; '.join(rows)}."]
    lines = [*_rows_and_steps(runs, inputs), *lines]
    _check_complete(runs, root / TAUGHT if teaching is not None else None, inputs)
    return [*lines, f"What else `train` would print of a run goes into {RunFiles(root).log.name} in its directory."]


def _check_complete(runs: Sequence[SweepRun], taught: Path | None, inputs: dict[str, Inputs]) -> None:
    """Raises UserError for a run that is done, and is another than what is asked for now. taught: the model that the
    runs begin with, if they do not begin with their own; while it is not there, no run is done."""
    if taught is not None and not taught.is_dir():
        return
    for run in filter(is_complete, runs):
        begun = run if taught is None else _of_model(run, taught)
        check_same(begun, _read_inputs(begun.config, inputs, silent).data)


def _make(run: SweepRun, bases: Bases, inputs: dict[str, Inputs], say: Say) -> None:
    """One run. What `train` would print goes to log.txt in its directory."""
    files = RunFiles(run.directory)
    # A run that was killed before its first checkpoint, or before it wrote anything, starts from the beginning.
    config = replace(run.config, output=replace(run.config.output, resume=files.run_yaml.exists()))
    lines: list[str] = []
    plan = plan_run(config, _read_inputs(config, inputs, lines.append), lines.append)
    if plan.config.memory.stream_weights:  # which a budget can ask for, too
        raise UserError(STREAMED)
    try:
        with borrowed(bases.loaded(plan.config.model)) as base:
            result = unlearn(plan, base, lines.append)
            del base
    finally:
        if files.run_yaml.exists():  # a directory with a log alone could not be begun again
            files.log.write_text("\n".join(lines) + "\n", encoding="utf-8")
    after = summaries(result.after)
    say("    " + "; ".join(f"{name} NLL {s.nll:.3f}, exact match {s.exact_match:.3f}" for name, s in after.items()))
    if result.stopping is not None:
        say("    " + result.stopping.sentence)


def _of_model(run: SweepRun, model: Path) -> SweepRun:
    """The run, beginning with another model."""
    return replace(run, config=replace(run.config, model=replace(run.config.model, model=str(model), revision=None)))


def _measure_gold(
    run: SweepRun, root: Path, bases: Bases, evaluation: SweepEvaluation | None, state: Ledger, say: Say
) -> Path | None:
    """Measures the gold model as the runs are, once; its evaluation.json, if there is an evaluation."""
    files, of_gold = baseline(root, GOLD), _of_model(run, root / GOLD)
    if not read_answers(files.answers(GOLD), run.config.output):
        inputs = read_inputs(of_gold.config, silent)
        plan = RunPlan(of_gold.config, RunDirectory(of_gold.config), inputs.tokenizer, inputs.data)
        make_directory(files.path)
        with borrowed(bases.loaded(of_gold.config.model)) as model:
            save_answers(files.answers(GOLD), measure_answers(plan, model, GOLD))
    if evaluation is None:
        return None
    config = evaluation.of_gold(of_gold.config, files)
    _evaluate(evaluation, config, of_gold, bases, state, say)
    return files.evaluation.result


def _report_again(run: SweepRun, root: Path) -> None:
    """The run's report once more, with what was measured of it since, and the gold model beside it, if there is one."""
    measured, own = baseline(root, GOLD).answers(GOLD), RunFiles(run.directory)
    if measured.exists():
        write_atomically(own.answers(GOLD), measured.read_text(encoding="utf-8"), private=True)
    if measured.exists() or own.evaluation.result.exists():
        write_report(run.directory)


def _before(run: SweepRun, root: Path) -> RunFiles:
    """Where the run's model is measured as it was before; with the texts that it wrote itself to be kept, if it did."""
    files, texts = baseline(root, before_of(run)), RunFiles(run.directory).self_written
    if texts.exists() and not files.self_written.exists():
        make_directory(files.path)
        write_atomically(files.self_written, texts.read_text(encoding="utf-8"), private=True)
    return files


def _evaluate(
    evaluation: SweepEvaluation, config: EvaluationConfig, run: SweepRun, bases: Bases, state: Ledger, say: Say
) -> None:
    """One evaluation, of the run's model or adapter, unless it was made before."""
    files, begin = EvaluationFiles(config.path), time.monotonic()
    lines: list[str] = []
    plan = evaluation.plan(config, run.config, lines.append)
    if evaluation.is_outdated(plan):
        shutil.rmtree(files.path)
        lines.clear()
        plan = evaluation.plan(replace(config, resume=False), run.config, lines.append)
    key = evaluation.key(plan)
    if files.result.exists() and state.is_evaluated(files.path, key):
        return
    with claimed(files.path, say):
        if any(test.loads_models for test in leak_tests(config.leaks)):
            bases.free()  # makes room for theirs
            measure(plan, lines.append)
        else:
            with borrowed(bases.loaded(run.config.model)) as base:
                measure(plan, lines.append, lambda config, say: base)
    (files.path / "log.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    state.record_evaluation(files.path, key)
    what = "the run" if files.path.parent == run.directory else files.path.parent.name
    say(f"    evaluated: {what}, in {time.monotonic() - begin:.0f} s")


class Bases:
    """The base model in use, loaded once for consecutive runs with the same model options."""

    def __init__(self) -> None:
        self._config: ModelConfig | None = None
        self._model: PreTrainedModel | None = None

    def loaded(self, config: ModelConfig) -> PreTrainedModel:
        if self._model is None or config != self._config:
            self.free()  # before the next one is loaded
            self._model, self._config = load_model(config), config
        return self._model

    def free(self) -> None:
        self._model = None
        release_memory()


class Ledger:
    """How each run ended, as {directory: {"seconds": ...} or {"error": ...}}, and what was evaluated; saved after every
    change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, dict[str, Any]] = _read(path) if path.exists() else {}
        self._write()

    def record(self, run: SweepRun, **entry: Any) -> None:
        self.entries[self._place(run.directory)] = entry
        self._write()

    def clear_error(self, run: SweepRun) -> None:
        """After a run that is trained has been evaluated in a second try."""
        if self.entries.get(self._place(run.directory), {}).pop("error", None):
            self._write()

    def is_evaluated(self, directory: Path, key: str) -> bool:
        """Whether the evaluation in `directory` is the one that `key` stands for."""
        return self.entries.get(self._place(directory), {}).get("evaluated") == key

    def record_evaluation(self, directory: Path, key: str) -> None:
        self.entries[self._place(directory)] = {"evaluated": key}
        self._write()

    def _place(self, directory: Path) -> str:
        return str(directory.relative_to(self.path.parent))

    def _write(self) -> None:
        write_json(self.path, self.entries)


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        entries = load_json(path)
        if not all(isinstance(entry, dict) for entry in entries.values()):
            raise ValueError("a run is no object")
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"--resume: '{path}' is damaged: write {{}} into it, and finished runs stay finished; their durations are "
            "lost, and evaluations are made again."
        ) from error
    return entries


def _check(runs: Sequence[SweepRun], root: Path, resume: bool) -> None:
    """Raises UserError, before the first run, for what a later run would refuse or would destroy."""
    if PartialState().num_processes > 1:
        raise UserError("A sweep runs in one process: start one per GPU, with CUDA_VISIBLE_DEVICES and its own grid.")
    for run in runs:
        if run.config.output.eval_rows < 1:
            raise UserError("A sweep compares what its runs measure: --eval-rows must be at least 1.")
        if run.config.output.preview is not None:
            raise UserError("--preview shows the rows of one run: use it with `lowmem-npo train`.")
        if run.config.memory.stream_weights:  # the base is lent to evaluations, which do not stream it
            raise UserError(STREAMED)
    if resume and not (root / SWEEP_STATE).exists():
        raise UserError(f"--resume: there is no sweep in '{root}' (no {SWEEP_STATE}); start it without --resume.")
    if not resume and (root / SWEEP_STATE).exists():
        raise UserError(
            f"--output-dir '{root}' holds a sweep: choose another directory, continue it with --resume, or remove it."
        )
    if not resume:
        check_empty(root, SWEEP_STATE)
    for run in runs:
        if RunFiles(run.directory).run_yaml.exists():
            RunDirectory(replace(run.config, output=replace(run.config.output, resume=True))).check()
