"""The runs of a sweep, one after another, on one loaded base model and one cached reference."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel

from lowmem_npo.claim import claimed
from lowmem_npo.commands.sweep.borrowed_base import borrowed
from lowmem_npo.commands.sweep.figures import SweepResult, collect, write_results
from lowmem_npo.commands.sweep.grid import SweepRun
from lowmem_npo.commands.sweep.picture import draw_sweep
from lowmem_npo.commands.train.run import Inputs, plan_run, read_inputs, unlearn
from lowmem_npo.config import REFUSING_TERMS, ModelConfig
from lowmem_npo.console import Say
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.answers import read_answers, summaries
from lowmem_npo.files import write_atomically
from lowmem_npo.model import load_model
from lowmem_npo.run_directory import RunDirectory, RunFiles, check_empty

STATE = "sweep_state.json"


def sweep(runs: Sequence[SweepRun], root: Path, *, resume: bool, say: Say = print) -> SweepResult:
    """Makes every run that is not finished, and writes sweep.csv, sweep.json, sweep.md and sweep.png into `root`.

    Each run is the one that `lowmem-npo train` makes with the same settings, in `root`/configuration/seed-N. If one
    fails, the reason is recorded and the next one begins.

    Raises:
        UserError: `root` holds other files, or runs with other settings; or no run succeeded.
    """
    with claimed(root, say):
        return _sweep_claimed(runs, root, resume, say)


def _sweep_claimed(runs: Sequence[SweepRun], root: Path, resume: bool, say: Say) -> SweepResult:
    _check(runs, root, resume)
    state = Ledger(root / STATE)
    bases = Bases()
    inputs: dict[str, Inputs] = {}
    for number, run in enumerate(runs, 1):
        title = f"[{number}/{len(runs)}] {run.point.name}, seed {run.seed}"
        if is_finished(run):
            say(f"{title}: done before")
            continue
        say(title)
        begin = time.monotonic()
        try:
            with claimed(run.directory, say):
                _make(run, bases, inputs, say)
        except Exception as error:  # no error of one run must end the others
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            reason = " ".join(reason.split())
            state.record(run, error=reason)
            say(f"    failed: {reason}")
        else:
            state.record(run, seconds=time.monotonic() - begin)
    result = collect(runs, state.entries)
    if not result.configurations:
        raise UserError(f"No run of the sweep succeeded. {result.failed[0]['directory']}: {result.failed[0]['error']}")
    write_results(result, root)
    draw_sweep(root / "sweep.png", result)
    return result


def is_finished(run: SweepRun) -> bool:
    """Whether the run's directory holds its adapter, its measurements and its report, which is written last; a run that
    needs more steps now is not finished."""
    files, output = RunDirectory(run.config), run.config.output
    measured = all(read_answers(files.answers(stage), output) for stage in ("before", "after"))
    complete = files.is_trained and measured and files.report_json.is_file()
    return complete and files.run_yaml.is_file() and not files.needs_more_steps


def _make(run: SweepRun, bases: Bases, inputs: dict[str, Inputs], say: Say) -> None:
    """One run. What `train` would print goes to log.txt in its directory."""
    files = RunFiles(run.directory)
    # A run that was killed before its first checkpoint, or before it wrote anything, starts from the beginning.
    config = replace(run.config, output=replace(run.config.output, resume=files.run_yaml.exists()))
    lines: list[str] = []
    taught = config.objective.forget_term if config.objective.forget_term in REFUSING_TERMS else None
    key = repr((config.model, config.data, taught))
    inputs[key] = read_inputs(config, lines.append, inputs.get(key))
    plan = plan_run(config, inputs[key], lines.append)
    files.report_json.unlink(missing_ok=True)  # that of a shorter run would mark this one as finished
    try:
        with borrowed(bases.loaded(config.model)) as base:
            result = unlearn(plan, base, lines.append)
            del base
    finally:
        if run.directory.is_dir():
            files.log.write_text("\n".join(lines) + "\n", encoding="utf-8")
    after = summaries(result.after)
    say("    " + "; ".join(f"{name} NLL {s.nll:.3f}, exact match {s.exact_match:.3f}" for name, s in after.items()))
    if result.stopping is not None:
        say("    " + result.stopping.sentence)


class Bases:
    """The base model in use, loaded once for consecutive runs with the same model options."""

    def __init__(self) -> None:
        self._config: ModelConfig | None = None
        self._model: PreTrainedModel | None = None

    def loaded(self, config: ModelConfig) -> PreTrainedModel:
        if self._model is None or config != self._config:
            self._model = None  # freed before the next one is loaded
            self._model, self._config = load_model(config), config
        return self._model


class Ledger:
    """How each run ended, as {directory: {"seconds": ...} or {"error": ...}}; saved after every run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
        self._write()

    def record(self, run: SweepRun, **entry: Any) -> None:
        self.entries[str(run.directory.relative_to(self.path.parent))] = entry
        self._write()

    def _write(self) -> None:
        write_atomically(self.path, json.dumps(self.entries, indent=1) + "\n")


def _check(runs: Sequence[SweepRun], root: Path, resume: bool) -> None:
    """Raises UserError, before the first run, for what a later run would refuse or would destroy."""
    if PartialState().num_processes > 1:
        raise UserError("A sweep runs in one process: start one per GPU, with CUDA_VISIBLE_DEVICES and its own grid.")
    for run in runs:
        if run.config.output.eval_rows < 1:
            raise UserError("A sweep compares what its runs measure: --eval-rows must be at least 1.")
        if run.config.output.preview is not None:
            raise UserError("--preview shows the rows of one run: use it with `lowmem-npo train`.")
    if resume and not (root / STATE).exists():
        raise UserError(f"--resume: there is no sweep in '{root}' (no {STATE}); start it without --resume.")
    if not resume and (root / STATE).exists():
        raise UserError(
            f"--output-dir '{root}' holds a sweep: choose another directory, continue it with --resume, or remove it."
        )
    if not resume:
        check_empty(root, STATE)
    for run in runs:
        if RunFiles(run.directory).run_yaml.exists():
            RunDirectory(replace(run.config, output=replace(run.config.output, resume=True))).check()
