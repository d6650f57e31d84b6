"""The paper's four rows of (gamma, delta), on a small scale: every adapter measured, seed by seed.

A small OLMo is taught invented biographies until it recites them (as `lowmem-npo demo` does), and a second one, the
gold standard, the same without the rows to be forgotten. Then `lowmem-npo sweep` makes the first forget, with each row
of (gamma, delta) and every seed, twice: for 20 epochs, its adapter measured after 10 and after 20, and with
--stop-when forget-at-holdout retain-loss+0.1 --stop-patience 10. The rows are those of Bronec and Helcl (SemEval-2025
Task 4) and their code: retain cross-entropy alone (1, 0), with a KL (1, 0.5) and (1, 1), and the KL alone (0, 1).

The demo's setting is gentle; this one is harder, for all rows alike: as many retain rows as forget rows, in the data
and in a step (as in the paper; the demo has twice as many), and beta 0.1, which pushes the answers further.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lowmem_npo.commands.demo.recipe import Teaching
from lowmem_npo.commands.demo.teaching import make_tokenizer, taught_model
from lowmem_npo.commands.sweep.finished import is_complete
from lowmem_npo.commands.sweep.grid import GridPoint, SweepRun
from lowmem_npo.commands.sweep.runs import sweep
from lowmem_npo.config import (
    AdapterConfig,
    DataConfig,
    MemoryConfig,
    ModelConfig,
    ObjectiveConfig,
    OutputConfig,
    RunConfig,
    StoppingConfig,
    TrainingConfig,
)
from lowmem_npo.data import PreparedData, Template, bundled_rows, prepare, read_rows, to_examples
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.answers import evaluate_answers
from lowmem_npo.evaluation.benchmarks.documents import membership
from lowmem_npo.evaluation.scoring.likelihood import answer_likelihoods
from lowmem_npo.run_directory import RunFiles

ROWS = ((1.0, 0.0), (1.0, 0.5), (1.0, 1.0), (0.0, 1.0))  # (gamma, delta)
LUME_FILES = ("forget_validation", "retain_validation", "forget_train")  # forget, retain, holdout
STOP_WHEN, PATIENCE = ("forget-at-holdout", "retain-loss+0.1"), 10


@dataclass(frozen=True)
class Setting:
    """What is taught and how it is unlearned; the same for every row and seed."""

    teaching: Teaching
    data: DataConfig
    epochs: tuple[int, int] = (10, 20)
    batch_size: int = 6
    beta: float = 0.1
    lr: float = 1e-3
    lora_r: int = 16
    eval_batch_size: int = 36

    def config(self, model: Path, gamma: float, delta: float, seed: int, directory: Path, stops: bool) -> RunConfig:
        assert self.data.limit is not None
        steps_per_epoch = -(-self.data.limit // self.batch_size)
        return RunConfig(
            model=ModelConfig(model=str(model), dtype="float32"),
            data=self.data,
            objective=ObjectiveConfig(beta=self.beta, gamma=gamma, delta=delta),
            adapter=AdapterConfig(lora_r=self.lora_r, lora_alpha=self.lora_r, lora_targets=("all-linear",)),
            memory=MemoryConfig(
                gradient_checkpointing="off", reference="cached", reference_dir=str(directory / "reference")
            ),
            training=TrainingConfig(batch_size=self.batch_size, epochs=self.epochs[1], lr=self.lr, seed=seed),
            stopping=StoppingConfig(STOP_WHEN, PATIENCE) if stops else StoppingConfig(),
            output=OutputConfig(
                output_dir=str(directory / _name(gamma, delta, stops) / f"seed-{seed}"),
                eval_rows=self.data.limit if stops else 1,  # every adapter is measured here, all alike
                eval_batch_size=self.eval_batch_size,
                leaks=(),
            ),
            trainer_args={"save_steps": self.epochs[0] * steps_per_epoch, "save_only_model": True}
            if not stops
            else {"save_strategy": "no"},
        )


BUNDLED = Setting(Teaching(), DataConfig(limit=36))
QUICK = Setting(
    Teaching(vocabulary=384, layers=2, width=64, heads=2, epochs=40, batch_size=8, lr=4e-3),
    DataConfig(limit=24),
    epochs=(5, 10),
    lr=3e-3,
)


def lume(folder: Path, quick: bool) -> Setting:
    """LUME's validation rows, taught to a model of 30 million parameters; its training rows, never taught, are the
    holdout. With `quick` a small model and few rows, only to check that it runs."""
    forget, retain, holdout = (str(folder / "lume" / f"{name}.jsonl") for name in LUME_FILES)
    if missing := [file for file in (forget, retain, holdout) if not Path(file).is_file()]:
        raise UserError(f"--lume: there is no {missing[0]}.")
    data = DataConfig(forget=forget, retain=retain, holdout=holdout, max_length=512)
    if quick:
        teaching = Teaching(vocabulary=4096, layers=2, width=48, heads=2, epochs=10, batch_size=2)
        return Setting(teaching, replace(data, limit=6), epochs=(1, 2))
    return Setting(
        Teaching(vocabulary=8192, layers=8, width=512, heads=8, epochs=60, batch_size=32, lr=1e-3),
        replace(data, limit=240),
        batch_size=24,
        lr=5e-4,
        eval_batch_size=48,
    )


def measure_rows(setting: Setting, work: Path, seeds: int, goes_on: Callable[[int], bool]) -> list[dict[str, Any]]:
    """The figures of both models and of every adapter. goes_on: whether seed N is begun."""
    models = Models.taught(setting, work)
    measured = [models.figures("before", models.base), models.figures("gold", models.gold)]
    for seed in range(seeds):
        if not goes_on(seed):
            break
        measured += measure_seed(setting, models, seed, work / "runs")
    return measured


# -- the models -------------------------------------------------------------------------------------------------------


@dataclass
class Models:
    """The model that recites, the one that never saw the forget rows, and how they and every adapter are measured."""

    setting: Setting
    directory: Path
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData
    base: PreTrainedModel
    gold: PreTrainedModel

    @classmethod
    def taught(cls, setting: Setting, work: Path) -> Models:
        data, device = setting.data, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        sources = [getattr(data, part) for part in ("forget", "retain")]
        rows = [
            bundled_rows(part, limit=data.limit) if source is None else read_rows(source, limit=data.limit)
            for part, source in zip(("forget", "retain"), sources, strict=True)
        ]
        texts = ["".join(Template().render(example)) for part in rows for example in to_examples(part)]
        tokenizer = make_tokenizer(texts, setting.teaching.vocabulary)
        prepared = prepare(tokenizer, data)
        assert prepared.retain is not None
        (work / "models").mkdir(parents=True, exist_ok=True)

        def teach(name: str, rows: list) -> PreTrainedModel:
            print(f"teaching the {name} model {len(rows)} rows", flush=True)
            model, _ = taught_model(
                work / "models" / name, tokenizer, rows, setting.teaching, seed=0, device=device, description=name
            )
            return model

        base = teach("base", [*prepared.forget, *prepared.retain])
        gold = teach("gold", [*prepared.retain])
        return cls(setting, work / "models" / "base", tokenizer, prepared, base, gold)

    def adapted(self, folder: Path) -> PreTrainedModel:
        base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self.directory, dtype=torch.float32)
        return cast(PreTrainedModel, PeftModel.from_pretrained(base, str(folder)).to(self.base.device).eval())

    def figures(self, when: str, model: PreTrainedModel, **more: Any) -> dict[str, Any]:
        """All forget and retain rows are answered and scored, the holdout rows only scored."""
        assert self.data.holdout is not None
        figures: dict[str, Any] = {"when": when, **more}
        size, nlls = self.setting.eval_batch_size, {}
        for part in ("forget", "retain"):
            rows = getattr(self.data, part)
            answers = evaluate_answers(model, self.tokenizer, rows, batch_size=size, max_new_tokens=64, progress=False)
            nlls[part] = [answer.nll for answer in answers.records]
            figures |= {f"{part}_nll": answers.summary.nll, f"{part}_exact_match": answers.summary.exact_match}
        holdout = answer_likelihoods(model, self.data.holdout, batch_size=size, progress=False)
        figures["holdout_nll"] = sum(row.nll_sum for row in holdout) / sum(row.tokens for row in holdout)
        figures["membership_auc"] = membership(nlls["forget"], [row.nll for row in holdout]).auc
        return figures


# -- the runs ---------------------------------------------------------------------------------------------------------


def measure_seed(setting: Setting, models: Models, seed: int, root: Path) -> list[dict[str, Any]]:
    """The figures of one seed: per row of (gamma, delta) after the shorter and the longer training, and stopped."""
    runs = {
        (gamma, delta, stops): SweepRun(
            GridPoint((("gamma", f"{gamma:g}"), ("delta", f"{delta:g}"), ("stop-when", " ".join(STOP_WHEN) * stops))),
            seed,
            setting.config(models.directory, gamma, delta, seed, root, stops),
        )
        for gamma, delta in ROWS
        for stops in (False, True)
    }
    sweep(list(runs.values()), root, resume=root.exists(), say=_flushed)
    measured, steps_per_epoch = [], -(-len(models.data.forget) // setting.batch_size)
    for (gamma, delta, stops), run in runs.items():
        if not is_complete(run):
            raise UserError(f"The run in {run.directory} failed: its log.txt and sweep.json say why.")
        row: dict[str, Any] = {"gamma": gamma, "delta": delta, "seed": seed}
        if stops:
            outcome = json.loads(RunFiles(run.directory).stopping.read_text())
            row |= {"epochs": outcome["kept"]["step"] / steps_per_epoch, "stopped": bool(outcome["held"])}
            measured.append(models.figures("stopped", models.adapted(run.directory), **row))
            continue
        short, long = setting.epochs
        checkpoint = run.directory / f"checkpoint-{short * steps_per_epoch}"
        for epochs, folder in ((short, checkpoint), (long, run.directory)):
            measured.append(models.figures(f"{epochs} epochs", models.adapted(folder), **row, epochs=epochs))
    return measured


def _name(gamma: float, delta: float, stops: bool) -> str:
    return f"gamma={gamma:g}_delta={delta:g}" + ("_stopped" if stops else "")


def _flushed(line: str) -> None:
    print(line, flush=True)
