"""What is taught and made to forget: the demo's model on its invented people, or a real one on TOFU or LUME."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.quality_parts.methods import Method
from benchmarks.quality_parts.real_rows import REFUSAL, SIZES, UTILITY, Kind, write_rows
from benchmarks.quality_parts.two_models import forget_with_two_models
from lowmem_npo.cli import main as lowmem_npo
from lowmem_npo.commands.arguments import parse_run
from lowmem_npo.commands.demo.recipe import Recipe
from lowmem_npo.commands.demo.teaching import make_tokenizer, taught_model
from lowmem_npo.commands.sweep.options import TeachingOptions
from lowmem_npo.commands.sweep.taught_models import teach_models
from lowmem_npo.commands.train.plan import read_inputs
from lowmem_npo.config import RunConfig
from lowmem_npo.data import PreparedData, Template, bundled_rows, prepare, to_examples
from lowmem_npo.errors import UserError
from lowmem_npo.model import load_model
from lowmem_npo.model.saved_adapter import load_adapter
from lowmem_npo.run_directory import RunFiles
from lowmem_npo.training.forget_level import halved

TAUGHT, GOLD = "taught", "gold"
Model = PreTrainedModel | PeftModel


@dataclass(frozen=True)
class Subject:
    """A taught model and a gold one, in `directory`, and the rows that they differ by. runs: where adapters are made.

    flags: of `lowmem-npo train`, which all methods share. teach: makes both models, once for each seed if `reseeded`,
    else once. eval_batch_size: rows that are measured together. further: sets that the benchmark's own scores need;
    scored_rows: rows of each set that these are of, None: all.
    """

    directory: Path
    runs: Path
    files: dict[str, Path]
    flags: tuple[str, ...]
    teach: Callable[[Path, int], None]
    reseeded: bool
    eval_batch_size: int
    further: dict[str, Path]
    scored_rows: int | None = None

    def models(self, seed: int) -> Path:
        """The folder of both models, which are made unless they are there."""
        folder = self.directory / (f"seed-{seed}" if self.reseeded else "models")
        self.teach(folder, seed)
        return folder

    def config(self, method: Method, seed: int, output: Path) -> RunConfig:
        """The run of `lowmem-npo train` that makes the taught model forget."""
        return parse_run(self._arguments(method, seed, output), "train")

    def load(self, name: str, method: Method | None, seed: int) -> Model:
        """The taught or the gold model; with a `method`, the one that it made of the former, which is made now unless
        it is there."""
        models = self.models(seed)
        config = self.config(method or Method(name), seed, self.runs / name / f"seed-{seed}")
        if method is None:
            return load_model(replace(config.model, model=str(models / name)))
        run = RunFiles(config.output_dir)
        if method.two_models:
            if not run.weights.exists():
                forget_with_two_models(config, self.inputs(seed)[1])
        elif not run.is_finished:
            self._forget(method, seed, config.output_dir)
        return load_adapter(load_model(config.model), str(config.output_dir))

    def inputs(self, seed: int) -> tuple[PreTrainedTokenizerBase, PreparedData]:
        """The rows, tokenised. The holdout is the half of it that no level is fitted to."""
        inputs = read_inputs(self.config(Method(TAUGHT), seed, self.directory), lambda line: None)
        return inputs.tokenizer, halved(inputs.data)

    def _arguments(self, method: Method, seed: int, output: Path) -> list[str]:
        folder = self.directory / (f"seed-{seed}" if self.reseeded else "models")
        own = ["--model", str(folder / TAUGHT), *flags_of_sets(self.files)]
        own += ["--output-dir", str(output), "--seed", str(seed)]
        return [*own, "--eval-rows", "0", "--leaks", "none", *self.flags, *method.flags]

    def _forget(self, method: Method, seed: int, output: Path) -> None:
        """`lowmem-npo train`, from where it was interrupted."""
        arguments = self._arguments(method, seed, output)
        resume = ["--resume"] if RunFiles(output).run_yaml.exists() else []
        run_command(["train", *arguments, *resume], RunFiles(output).log)


# -- the demo's model -------------------------------------------------------------------------------------------------


def demo_subject(directory: Path, recipe: Recipe, epochs: float) -> Subject:
    """The model of `lowmem-npo demo`, taught anew for every seed; it forgets with the demo's settings but for `epochs`.

    The rows are the bundled ones, from files, since these have a column that names the person and one with a refusal.
    """
    files = {name: directory / "rows" / f"{name}.jsonl" for name in ("forget", "retain", "holdout")}
    for name, path in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = bundled_rows(name, limit=recipe.limit).rows
        path.write_text("".join(json.dumps({**row, "refusal": REFUSAL}) + "\n" for row in rows), encoding="utf-8")
    config = recipe.run(directory, directory, 0, "auto")
    training = config.training
    flags = f"""
        --dtype float32 --beta {config.objective.beta} --gamma {config.objective.gamma}
        --lora-r 16 --lora-alpha 16 --lora-targets all-linear
        --gradient-checkpointing off --reference live --batch-size {training.batch_size}
        --retain-batch-size {training.retain_batch_size} --lr {training.lr} --epochs {epochs} --save-strategy no
    """

    @cache
    def tokenizer() -> PreTrainedTokenizerBase:
        parts = [to_examples(bundled_rows(part, limit=recipe.limit)) for part in ("forget", "retain")]
        texts = ["".join(Template().render(example)) for part in parts for example in part]
        return make_tokenizer(texts, recipe.teaching.vocabulary)

    def teach(folder: Path, seed: int) -> None:
        data = prepare(tokenizer(), config.data)
        assert data.retain is not None
        lessons = {TAUGHT: [*data.forget, *data.retain], GOLD: [*data.retain]}
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in lessons.items():
            taught_model(folder / name, tokenizer(), rows, recipe.teaching, seed=seed, device=device, description=name)

    runs = directory / f"{epochs:g}-epochs"
    return Subject(directory, runs, files, tuple(flags.split()), teach, True, 64, {})


# -- a real model -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RealSetting:
    """How a real model is taught, and the flags of `lowmem-npo train` that all methods share.

    Batches are small and rates high, so that a model of 135 million parameters recites after minutes of one core.
    """

    sizes: tuple[tuple[str, int], ...] = tuple(SIZES.items())
    scored_rows: int | None = None  # of each set, for the benchmark's own scores; None: all
    teach_epochs: int = 10
    teach_lr: float = 1e-4
    teach_batch_size: int = 8
    flags: str = (
        "--template plain --max-length 512 --lora-r 16 --lora-alpha 16 --lora-targets all-linear --beta 0.2 --lr 5e-4 "
        "--batch-size 4 --retain-batch-size 4 --epochs 9 --gradient-checkpointing off --save-total-limit 1"
    )


def real_subject(kind: Kind, model: Path, data: Path, directory: Path, setting: RealSetting) -> Subject:
    """`model`, taught rows of TOFU or LUME by full fine-tuning; all seeds begin with the same taught model."""
    files = write_rows(kind, data, directory / "rows", dict(setting.sizes))
    own = setting.flags.split()
    shared = (*own, "--reference-dir", str(directory / "reference"))
    further = {name: data / place for name, place in UTILITY.items()}
    if kind == "lume":  # its membership is that of documents
        further = {"members": files["forget"], "nonmembers": files["holdout"]}

    def teach(folder: Path, seed: int) -> None:
        config = parse_run(["--model", str(model), *flags_of_sets(files), *own], "train")
        config.training = replace(config.training, micro_batch_size=None, batch_size=setting.teach_batch_size)
        how = TeachingOptions("full", setting.teach_epochs, setting.teach_lr, setting.teach_batch_size)
        teach_models(config, how, read_inputs(config, lambda line: None), folder, lambda line: None)

    return Subject(directory, directory / "runs", files, shared, teach, False, 16, further, setting.scored_rows)


def flags_of_sets(files: dict[str, Path]) -> list[str]:
    return [word for name, path in files.items() for word in (f"--{name.replace('_', '-')}", str(path))]


def run_command(arguments: list[str], log: Path) -> None:
    """Runs a command of `lowmem-npo`; what it says goes to `log`. Raises UserError if it fails."""
    said = io.StringIO()
    with redirect_stdout(said):
        failed = lowmem_npo(arguments)
    if failed:
        raise UserError(f"lowmem-npo {arguments[0]} failed; its message is above.")
    log.write_text(said.getvalue(), encoding="utf-8")
