"""Which runs of a sweep are done, and whether they may stand beside those that are made now."""

from __future__ import annotations

from lowmem_npo.commands.sweep.grid import SweepRun
from lowmem_npo.commands.train.plan import fitted, steps_of
from lowmem_npo.console import silent
from lowmem_npo.data import PreparedData
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.answers import read_answers
from lowmem_npo.report.as_audited import check_same_adapter, check_same_model, check_same_rows
from lowmem_npo.run_directory import RunDirectory
from lowmem_npo.training.step_rows import num_steps


def is_complete(run: SweepRun) -> bool:
    """Whether the run is finished, and its directory holds the measurements that are asked for now."""
    files, output = RunDirectory(run.config), run.config.output
    return files.is_finished and all(read_answers(files.answers(stage), output) for stage in ("before", "after"))


def is_finished(run: SweepRun, data: PreparedData) -> bool:
    """Whether the run is complete, and as long as is asked for now. data: its rows."""
    return _steps_made(run, data) == steps_of(run.config, data)


def check_same(run: SweepRun, data: PreparedData) -> None:
    """Raises UserError for a complete run that is longer than is asked for now, or that was made of other rows, or of
    another adapter or model: a mean over it and those that are made now is none of one configuration."""
    _check_length(run, data)
    config, data = fitted(run.config, data, silent)
    check_same_rows(run.directory, config, data)
    check_same_adapter(run.directory, config)
    check_same_model(run.directory, config)


def _check_length(run: SweepRun, data: PreparedData) -> None:
    made, asked = _steps_made(run, data), steps_of(run.config, data)
    if made <= asked:
        return
    began, training = RunDirectory(run.config).began(), run.config.training
    then, now = _length(began["epochs"], began.get("max_steps")), _length(training.epochs, training.max_steps)
    alone = " without --max-steps" if training.max_steps is not None and began.get("max_steps") is None else ""
    raise UserError(
        f"--resume: the run in '{run.directory}' was made with {then}, {made} steps, and {now} would be {asked}: give "
        f"{then}{alone}, or another --output-dir."
    )


def _steps_made(run: SweepRun, data: PreparedData) -> int:
    began = RunDirectory(run.config).began()
    rows, batch_size = len(data.forget_trained), run.config.training.batch_size
    return num_steps(rows, batch_size, began["epochs"], began.get("max_steps"))


def _length(epochs: float, max_steps: int | None) -> str:
    return f"--epochs {epochs:g}" if max_steps is None else f"--max-steps {max_steps}"
