"""The directory of a run: the name of every file in it, what may be written there, and where a run resumes."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, get_origin

import yaml

from lowmem_npo.claim import LOCK, check_unclaimed, make_directory
from lowmem_npo.config import KEPT_CHECKPOINTS, DataConfig, MemoryConfig, ModelConfig, OutputConfig, RunConfig
from lowmem_npo.errors import UserError
from lowmem_npo.files import (
    PARTIAL,
    expanded,
    file_in_the_way,
    is_mount_point,
    load_json,
    missing_below,
    shortage,
    write_atomically,
)
from lowmem_npo.ranges import check_values, field_types, on_or_off, shortened
from lowmem_npo.settings_file import read_settings
from lowmem_npo.sizes import first_of

SELF_WRITTEN = "self_written.jsonl"  # the texts of --retain self
STARTED_IN = "started_in"  # the directory in which relative paths of the settings beside it begin, from here
SWEEP_STATE = "sweep_state.json"  # in the --output-dir of a sweep, how its runs ended
# Options of a run that may name a place.
PLACES = ("model", "adapter", "forget", "retain", "holdout", "reference_dir", "quantized_cache")
# A resumed run may be longer, have moved, or measure more; any other change would make it a different run.
MAY_CHANGE = (
    "output_dir", "epochs", "max_steps", "eval_rows", "eval_batch_size", "max_new_tokens", "forms", "leaks",
    "report_examples", "micro_batch_size", "device", "quantized_cache", "generate_answers",
    "recipe",  # whose options are compared themselves
    *(f.name for f in fields(MemoryConfig)),
)  # fmt: skip
# Where auto is recorded as what it became, and stays so.
DECIDED = ("chat_date", "double_quant", "gradient_checkpointing", "joint_pass_tokens", "reference")
# Options that other commands read of a run, without the command line in between, which checks them.
READ_LATER = {
    name: kind
    for section in (ModelConfig, DataConfig, OutputConfig)
    for name, kind in field_types(section).items()
    if get_origin(kind) is not tuple  # which YAML has as a list
}


class AdapterFiles:
    """An adapter as PEFT saves it, in the directory of a run or of a checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.weights = path / "adapter_model.safetensors"  # written last
        self.digest = path / "checkpoint.sha256"  # of a checkpoint's files
        self.adapter_config = path / "adapter_config.json"
        self.trainer_state = path / "trainer_state.json"  # of a checkpoint
        self.micro_batch_parts = path / "micro_batch_parts.json"  # of one, if memory had run out by then
        self.adversary = path / "adversary.safetensors"  # of one, while an attacker goes on


class EvaluationFiles:
    """The files that `lowmem-npo evaluate` writes into its directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings = path / "settings.json"
        self.started_in = path / STARTED_IN
        self.journal = path / "measured.jsonl"  # every measurement, written as soon as it is made
        self.result = path / "evaluation.json"
        self.rows = path / "rows.jsonl"
        self.official = path / "evaluation_results.jsonl"  # LUME's scores under the challenge's own keys
        self.merged = path / "merged"  # the merged model, while a leak test evaluates it


class RunFiles(AdapterFiles):
    """The files that `lowmem-npo train` writes into its --output-dir."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.run_yaml = path / "run.yaml"
        self.started_in = path / STARTED_IN
        self.metrics = path / "metrics.jsonl"
        self.audit = path / "audit.json"
        self.leaks = path / "leaks.json"
        self.stop_evaluations = path / "evaluations.jsonl"
        self.stopping = path / "stopping.json"
        self.forget_levels = path / "forget_levels.json"  # of --forget-level, one for each forget row
        self.best = path / "best"  # the best adapter so far, under --stop-when
        self.self_written = path / SELF_WRITTEN  # the retain texts of --retain self
        self.alternatives = path / "alternatives.jsonl"  # the other answers of --alternatives self
        self.reference = path / "reference"  # the cached reference, unless --reference-dir names another place
        self.report_html = path / "report.html"
        self.report_json = path / "report.json"
        self.model_card = path / "README.md"
        self.log = path / "log.txt"  # what a run of a sweep would print
        self.evaluation = EvaluationFiles(path / "evaluation")

    def answers(self, stage: str) -> Path:
        """Every measured row's answer: before or after training, or of the gold standard."""
        return self.path / f"{stage}.json"

    def table(self, suffix: str, stages: str = "before_after") -> Path:
        """The table of `stages`, as .json or .md."""
        return self.path / f"{stages}.{suffix}"

    def evaluations(self) -> list[EvaluationFiles]:
        """The evaluations beside the adapter, in the order in which they were made: `evaluation`, whose figures the
        report includes, evaluation-2, and so on."""
        further = sorted((number, place) for place in self.path.glob("evaluation-*") if (number := _number(place)))
        first = [self.evaluation.path] if os.path.lexists(self.evaluation.path) else []
        return [EvaluationFiles(place) for place in [*first, *(place for _, place in further)]]

    def next_evaluation(self) -> EvaluationFiles:
        """Where the next evaluation goes: after all others, also where one of them has been removed."""
        if not (taken := self.evaluations()):
            return self.evaluation
        return EvaluationFiles(self.path / f"evaluation-{(_number(taken[-1].path) or 1) + 1}")

    def checkpoints(self) -> list[Path]:
        """checkpoint-N directories, the newest first."""
        numbered = [p for p in self.path.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
        return sorted(numbered, key=step_of, reverse=True)

    @property
    def is_finished(self) -> bool:
        """Whether a run of the length that run.yaml says has trained, measured and reported: its audit record names the
        adapter only then. `lowmem-npo report` writes a report of an unfinished run as well."""
        try:
            audit, began = load_json(self.audit), self.began()
            ended = audit["adapter"] is not None
            as_long = all(audit["configuration"].get(name) == began.get(name) for name in ("epochs", "max_steps"))
        except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError):
            return False
        return ended and as_long and self.weights.exists() and self.report_json.exists()

    def settings(self) -> dict[str, Any]:
        """What run.yaml holds. Raises UserError where it is damaged, or has a value that its option cannot have."""
        try:
            settings = read_settings(self.run_yaml)
        except (OSError, ValueError) as error:
            why = shortened(str(error))
            raise UserError(
                f"'{self.run_yaml}' is damaged ({why}): restore it, or write the run's options into it."
            ) from error
        values = {name: on_or_off(value) if name in DECIDED else value for name, value in settings.items()}
        check_values(values, READ_LATER, lambda name: f"'{self.run_yaml}': {name}")
        return settings

    def began(self) -> dict[str, Any]:
        """The configuration that the run in the directory began with. Raises UserError where it is damaged."""
        try:
            began = read_settings(self.run_yaml)
        except (OSError, ValueError):
            began = {}
        if not {"model", "epochs"} <= began.keys():
            raise UserError(f"'{self.run_yaml}' is damaged: write the run's options into it, or start a new run.")
        return began


def _number(evaluation: Path) -> int | None:
    """N of evaluation-N, from 2 on."""
    matched = re.fullmatch(r"evaluation-([2-9]|[1-9]\d+)", evaluation.name)
    return int(matched[1]) if matched else None


def sweep_instead(folder: Path) -> UserError | None:
    """What is said of the directory of a sweep that was given as a run's; None where it is none."""
    if RunFiles(folder).run_yaml.exists() or not (folder / SWEEP_STATE).is_file():
        return None
    runs = [file.parent for file in folder.glob(f"*/seed-*/{RunFiles(folder).run_yaml.name}")]
    names = [str(run) for run in sorted(runs, key=lambda run: (run.parent.name, len(run.name), run.name))]
    if not names:
        return UserError(f"'{folder}' is a sweep, and none of its runs has begun.")
    return UserError(f"'{folder}' is a sweep; its runs are {first_of(names, separator=', ')}: name one of them.")


def check_is_run(directory: Path) -> None:
    """Raises UserError for what is no --output-dir of a run."""
    if error := sweep_instead(directory):
        raise error
    if not RunFiles(directory).run_yaml.is_file():
        raise UserError(f"There is no run in '{directory}' (no run.yaml): give the --output-dir of `lowmem-npo train`.")


def run_of_adapter(adapter: str | Path) -> RunFiles:
    """The run that wrote the adapter in a directory, its own or one of its checkpoints, wherever links lead."""
    return run_around(expanded(adapter).resolve())


def run_around(folder: Path) -> RunFiles:
    """The same, under the name that `folder` has, which links do not change."""
    return RunFiles(folder.parent if folder.name.startswith("checkpoint-") else folder)


def remember_start(files: RunFiles | EvaluationFiles) -> None:
    """Writes down where this process was started, for `from_here`."""
    files.started_in.unlink(missing_ok=True)
    with suppress(ValueError):  # on another drive than this directory, or of a name that is not UTF-8
        write_atomically(files.started_in, os.path.relpath(os.path.realpath("."), os.path.realpath(files.path)))


def from_here(run: RunFiles | EvaluationFiles, settings: Mapping[str, Any], name: str) -> str:
    """`name`, a model, an adapter or a file that the run or the evaluation named, as it is found from here.

    A relative path begins where that was started, which is found again when the whole tree has been moved since. What
    is no longer there has moved with the directory, where that is as deep as it was in one that held both, such as the
    models that a sweep has taught. What is nowhere, such as a name on the hub, stays as it is.
    """
    here = expanded(name)
    for place in places_of(run, settings, name):
        if os.path.exists(place):  # of many files, their names together are too long for a path
            return name if os.path.exists(here) and here.samefile(place) else str(place)
    parts = [part.strip() for part in name.split(",")]
    found = [from_here(run, settings, part) for part in parts] if len(parts) > 1 else parts
    return name if found == parts else ",".join(found)


def places_of(run: RunFiles | EvaluationFiles, settings: Mapping[str, Any], name: str) -> list[Path]:
    """Where `from_here` looks for `name`, in order."""
    folder, here = expanded(run.path).resolve(), expanded(name)
    named = settings.get("output_dir")  # None of an evaluation beside its adapter
    places = []
    if run.started_in.is_file():
        start = os.path.normpath(folder / run.started_in.read_text(encoding="utf-8", errors="replace"))
        places.append(Path(start, here))
    if named and (moved := _moved_along(folder, expanded(str(named)), here)):
        places.append(moved)
    return places


def places_from_here(run: RunFiles, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `run`, the places that they name as they are found from here."""
    named = {name: settings[name] for name in PLACES if isinstance(settings.get(name) or None, str)}
    return {**settings, **{name: from_here(run, settings, value) for name, value in named.items()}}


def _same_places(names: Any, others: Any) -> bool:
    """Whether two spellings of what an option names are of the same files or directories."""
    if not (isinstance(names, str) and isinstance(others, str)):
        return False
    both = [[expanded(part.strip()).resolve() for part in of.split(",")] for of in (names, others)]
    return both[0] == both[1] and all(place.exists() for place in both[0])


def _moved_along(folder: Path, output_dir: Path, here: Path) -> Path | None:
    """Where `here` is if a directory that it shared with `output_dir`, which is `folder` now, has been moved or
    renamed."""
    output_dir, here = (Path(os.path.normpath(place)) for place in (output_dir, here))
    shared = len(os.path.commonprefix([output_dir.parts, here.parts]))
    below, above = output_dir.parts[shared:], len(folder.parts) - len(output_dir.parts[shared:])
    if {*output_dir.parts[:shared]} <= {os.sep, os.pardir} or folder.parts[above:] != below:
        return None
    return Path(*folder.parts[:above], *here.parts[shared:])


def finishing(run: RunFiles) -> str:
    """What finishes an unfinished run, a clause."""
    return f"`lowmem-npo train --resume --output-dir {shlex.quote(str(run.path))}` finishes it"


def no_adapter(folder: str, missing: Path) -> UserError:
    """What is said of a directory in which a file of an adapter is missing; an unfinished run has those of its
    checkpoints."""
    run = RunFiles(expanded(folder))
    if error := sweep_instead(run.path):
        return error
    if not run.run_yaml.is_file() or run.weights.is_file():
        return UserError(f"The directory '{folder}' holds no adapter: there is no {missing.name} in it.")
    saved = (f for f in map(AdapterFiles, run.checkpoints()) if f.weights.is_file() and f.adapter_config.is_file())
    newest = next(saved, None)
    beside = f"; its last checkpoint, '{newest.path}', holds one" if newest else ""
    return UserError(f"'{folder}' holds an unfinished run and no adapter yet: {finishing(run)}{beside}.")


def what_is_left(run: RunFiles) -> str:
    """Of a run that has ended before its end: what `--resume` does."""
    if not run.run_yaml.exists():
        return "nothing was written"
    newest = next(iter(run.checkpoints()), None)
    return "the same command with --resume " + (f"goes on from '{newest}'" if newest else "starts it again")


class RunDirectory(RunFiles):
    """The directory of the run that `config` describes."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config.output_dir)
        self.config = config

    @property
    def reference_dir(self) -> Path | None:
        """Where the reference is cached; None if it is live."""
        memory = self.config.memory
        return None if memory.reference != "cached" else expanded(memory.reference_dir or self.reference)

    @property
    def is_trained(self) -> bool:
        """Whether the run has written its adapter; only the measurements after training come later."""
        return self.weights.exists()

    def check(self) -> None:
        """Raises a UserError unless this run may write here; writes nothing."""
        if self.config.output.dry_run:
            check_unclaimed(self.path)  # a run that is no dry one has claimed it
        self.check_place()
        reference = self.config.memory.reference_dir
        if reference is not None and (file := file_in_the_way(expanded(reference))):
            raise UserError(f"--reference-dir '{reference}': '{file}' is a file: choose a directory.")
        if self.config.output.resume:
            return self._check_resume()
        if self.run_yaml.exists():
            state, hint = "an unfinished run", ", continue it with --resume"
            if self.is_finished:
                state, hint = "a finished run", ""
            raise UserError(f"--output-dir '{self.path}' holds {state}: choose another directory{hint}, or remove it.")
        parent = next(p for p in [self.path.absolute(), *self.path.absolute().parents] if p.exists())
        if not os.access(parent, os.W_OK):
            raise UserError(f"--output-dir '{self.path}' cannot be written: no permission in '{parent}'.")

    def check_place(self) -> None:
        """Raises a UserError if there is no run to go on with, or something else than a run in its place."""
        if self.run_yaml.exists():
            return
        if self.config.output.resume:
            raise no_run_to_resume(self.path)
        check_empty(self.path, self.run_yaml.name)

    def _check_resume(self) -> None:
        began = places_from_here(self, self.began())
        now = yaml.safe_load(self.config.to_yaml())
        may_change = {*MAY_CHANGE, *(name for name in DECIDED if now[name] == "auto")}
        goes_on = self.config.objective.attack_steps > 1
        if self.config.training.layered is not None or goes_on:  # stages and attackers are laid out by the whole run
            may_change -= {"epochs", "max_steps"}
        changed = [name for name in {**began, **now} if began.get(name) != now.get(name) and name not in may_change]
        changed = [name for name in changed if not (name in PLACES and _same_places(began.get(name), now.get(name)))]
        if changed:
            changes = "; ".join(f"{name} was {began.get(name)!r}, is {now.get(name)!r}" for name in changed)
            raise UserError(
                f"--resume: the run in '{self.path}' began with other settings ({changes}): use those, or start anew."
            )

    def begin(self, main_process: bool) -> None:
        """Makes the directory this run's."""
        if main_process:
            make_directory(self.path)
            write_atomically(self.run_yaml, self.config.to_yaml())
            remember_start(self)


def no_run_to_resume(directory: Path) -> UserError:
    why = f"--resume: there is no run in '{directory}' (no run.yaml); start it without --resume."
    return sweep_instead(directory) or UserError(why)


def check_empty(path: Path, first: str | None = None) -> None:
    """Raises a UserError if the --output-dir `path` is a file, or below one, or a directory that is not empty.

    first: the file that is written before all others. A killed process may have left it half-written, with its lock.
    """
    if (missing := missing_below(path)) is not None:
        raise UserError(f"--output-dir '{path}' cannot be made: there is no '{missing}' to go up from.")
    if file := file_in_the_way(path):
        what = "" if file == path else f" cannot be made: '{file}'"
        raise UserError(f"--output-dir '{path}'{what} is a file: choose a directory.")
    of_disk = {"lost+found"} if is_mount_point(path) else set()
    if path.is_dir() and {file.name for file in path.iterdir()} - {LOCK, f"{first}{PARTIAL}", *of_disk}:
        raise UserError(f"--output-dir '{path}' holds other files: choose an empty or a new directory.")


def step_of(checkpoint: str | Path | None) -> int:
    """The optimiser step after which `checkpoint` was written; 0 for None."""
    return 0 if checkpoint is None else int(Path(checkpoint).name.rpartition("-")[2])


def check_disk(config: RunConfig, trained: int, saved: int, attacker: int = 0) -> None:
    """Raises a UserError if the disk of the output directory cannot hold the most that the run may write.

    That is the adapter, and for each checkpoint kept the adapter with AdamW's two moments and the attacker that goes
    on, all float32.

    Args:
        trained, saved: how many weights the adapter trains, and how many it holds (with those that it continues).
        attacker: how many a checkpoint holds of an attacker.
    """
    # One more than is kept: a checkpoint is written before the oldest is removed.
    checkpoints = (config.trainer_args.get("save_total_limit") or KEPT_CHECKPOINTS) + 1
    best = 1 + checkpoints if config.stopping.stop_when else 0  # the best adapter so far, and that at each checkpoint
    needed = 4 * (saved * (1 + checkpoints) + trained * (best + 2 * checkpoints) + attacker * checkpoints)
    needed += 64 * 2**20  # tokenizer, metrics, configuration
    if short := shortage(config.output_dir, needed):
        writes, has = short
        raise UserError(
            f"The disk of --output-dir '{config.output_dir}' has {has} free, the run writes up to {writes}: free some, "
            "or choose another --output-dir."
        )
