"""The directory of a run: who may write there, what lies where, what a resumed run finds."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import PretrainedConfig

from lowmem_npo.config import MemoryConfig, RunConfig
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.answers import AnswerEvaluation, AnswerRecord, AnswerSummary
from lowmem_npo.files import write_atomically

# A resumed run may be longer, stand elsewhere, or measure more; everything else would make it another run.
MAY_CHANGE = (
    "output_dir", "epochs", "max_steps", "eval_rows", "eval_batch_size", "leaks", "report_examples", "micro_batch_size",
    "device",
    *(f.name for f in fields(MemoryConfig)),
)  # fmt: skip


class RunDirectory:
    """`path` holds run.yaml, metrics.jsonl, checkpoint-N/, before.json, after.json, leaks.json, before_after.*, and the
    adapter."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.path = config.output_dir
        self.run_yaml = self.path / "run.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self._adapter = self.path / "adapter_model.safetensors"  # written last

    @property
    def is_trained(self) -> bool:
        """Whether the run has written its adapter, which it does last but for the measurements after it."""
        return self._adapter.exists()

    @property
    def is_to_be_longer(self) -> bool:
        """Whether the run that is there was asked for fewer steps than this one."""
        began = yaml.safe_load(self.run_yaml.read_text(encoding="utf-8"))
        training, most = self.config.training, began.get("max_steps")
        if training.max_steps is None:
            return most is not None or training.epochs > began["epochs"]
        return most is not None and training.max_steps > most

    def check(self) -> None:
        """Raises a UserError unless this run may write here; writes nothing."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--output-dir '{self.path}' is a file: choose a directory.")
        if self.config.output.resume:
            return self._check_resume()
        if self.run_yaml.exists():
            finished = self._adapter.exists()
            state, hint = (
                ("a finished run", "") if finished else ("a run that did not finish", ", continue it with --resume")
            )
            raise UserError(f"--output-dir '{self.path}' holds {state}: choose another directory{hint}, or remove it.")
        if self.path.is_dir() and any(self.path.iterdir()):
            raise UserError(f"--output-dir '{self.path}' holds other files: choose an empty or a new directory.")
        parent = next(p for p in [self.path.absolute(), *self.path.absolute().parents] if p.exists())
        if not os.access(parent, os.W_OK):
            raise UserError(f"--output-dir '{self.path}' cannot be written: no permission in '{parent}'.")

    def _check_resume(self) -> None:
        if not self.run_yaml.exists():
            raise UserError(f"--resume: there is no run in '{self.path}' (no run.yaml); start it without --resume.")
        began = yaml.safe_load(self.run_yaml.read_text(encoding="utf-8"))
        now = yaml.safe_load(self.config.to_yaml())
        changed = [name for name in {**began, **now} if began.get(name) != now.get(name) and name not in MAY_CHANGE]
        if changed:
            told = "; ".join(f"{name} was {began.get(name)!r}, is {now.get(name)!r}" for name in changed)
            raise UserError(
                f"--resume: the run in '{self.path}' began with other settings ({told}): use those, or start anew."
            )

    def begin(self, main_process: bool) -> None:
        """From here on the directory is this run's."""
        if main_process:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.run_yaml, self.config.to_yaml())

    def last_checkpoint(self) -> str | None:
        """The newest complete checkpoint, or None: then a resumed run starts from the beginning.

        The Trainer writes the state last, so a checkpoint without it was cut off while being written; it is removed.
        """
        checkpoints = sorted(self.path.glob("checkpoint-*"), key=step_of, reverse=True)
        for checkpoint in checkpoints:
            try:
                json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
                return str(checkpoint)
            except (OSError, json.JSONDecodeError):
                shutil.rmtree(checkpoint)
        return None

    def save_evaluations(self, stage: str, evaluations: dict[str, AnswerEvaluation]) -> None:
        content = {name: asdict(evaluation) for name, evaluation in evaluations.items()}
        write_atomically(self.path / f"{stage}.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def save_leaks(self, stage: str, tests: dict[str, dict[str, Any]]) -> None:
        """leaks.json: stage -> test -> figures."""
        found = {} if stage == "before" else {"before": self.leaks("before")}
        write_atomically(self.path / "leaks.json", json.dumps({**found, stage: tests}, indent=1) + "\n")

    def leaks(self, stage: str) -> dict[str, dict[str, Any]]:
        """The leak tests of a stage; empty if there are none."""
        path = self.path / "leaks.json"
        return json.loads(path.read_text(encoding="utf-8")).get(stage, {}) if path.exists() else {}

    def evaluations(self, stage: str) -> dict[str, AnswerEvaluation]:
        """What a killed run had measured already; empty if nothing, or if other rows were asked for."""
        found = read_evaluations(self.path, stage)
        wanted = self.config.output.eval_rows
        complete = all(e.summary.rows == min(wanted, e.summary.rows_in_set) for e in found.values())
        return found if complete else {}


def read_evaluations(path: Path, stage: str) -> dict[str, AnswerEvaluation]:
    """What STAGE.json in the run's directory `path` holds, set by set; empty if there is none."""
    file = path / f"{stage}.json"
    if not file.exists():
        return {}
    return {
        name: AnswerEvaluation(AnswerSummary(**e["summary"]), [AnswerRecord(**r) for r in e["records"]])
        for name, e in json.loads(file.read_text(encoding="utf-8")).items()
    }


def step_of(checkpoint: str | Path | None) -> int:
    """The optimiser step after which `checkpoint` was written; 0 for None."""
    return 0 if checkpoint is None else int(Path(checkpoint).name.rpartition("-")[2])


def check_disk(config: RunConfig, model: PretrainedConfig) -> None:
    """Raises a UserError if the output directory's disk cannot hold what the run writes at most.

    That is the adapter, and per kept checkpoint the adapter again with AdamW's two moments, all float32. The adapter's
    size is bounded from the model's configuration: every target as if it were hidden x intermediate.
    """
    text = model.get_text_config()
    wide = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    targets = 7 if config.adapter.lora_targets == ("all-linear",) else len(config.adapter.lora_targets)
    adapter = 4 * config.adapter.lora_r * (text.hidden_size + wide) * targets * text.num_hidden_layers
    checkpoints = (config.trainer_args.get("save_total_limit") or 2) + 1  # one is written before the oldest is removed
    best = 2 if config.stopping.stop_when else 0  # the best adapter so far, and the one before until a checkpoint
    needed = adapter * (1 + best + 3 * checkpoints) + 64 * 2**20  # and tokenizer, metrics, configuration
    path = config.output_dir.absolute()
    free = shutil.disk_usage(next(p for p in [path, *path.parents] if p.exists())).free
    if free < needed:
        raise UserError(
            f"The disk of --output-dir '{config.output_dir}' has {free / 2**20:.0f} MiB free, the run writes up to "
            f"{needed / 2**20:.0f} MiB: free some, or choose another --output-dir."
        )
