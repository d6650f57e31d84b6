"""What `lowmem-npo evaluate` measures, on what. A field's docstring is its help text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lowmem_npo.config import DataConfig, ModelConfig
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.leaks.measure import TESTS, LeakSettings, check_tests
from lowmem_npo.evaluation.leaks.relearning import Relearning
from lowmem_npo.evaluation.leaks.sampling import SAMPLES, TEMPERATURE
from lowmem_npo.evaluation.scoring.batching import BATCH_SIZE

MAX_LENGTH = DataConfig.max_length


@dataclass
class EvaluationConfig:
    """Measure what a model (with an adapter) has forgotten and what it has kept.

    LUME rows (id, input, output, task) get the scores of SemEval-2025 Task 4; TOFU rows (question, answer,
    perturbed_answer) get TOFU's; all others the likelihood of their answers and greedy answers.
    """

    model: str | None = None
    """Hub name or local directory of the base model. Default: the model that --adapter was trained on."""
    adapter: str | None = None
    """Directory of the adapter, as `lowmem-npo train` wrote it. Without it the base model is measured."""
    any_base: bool = False
    """Accept an adapter that names another base model (the same weights in another place)."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub. Default: the one that --adapter was trained on."""
    qlora: bool = False
    """Load the base model as 4-bit NF4, as for training with --qlora."""
    attn: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"
    """Attention implementation."""
    dtype: Literal["bf16", "float32"] = "bf16"
    """Compute type, and type of the weights that are not 4-bit."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is the GPU if there is one, else the CPU."""

    forget: str | None = None
    """What should be forgotten: a .jsonl, .json, .csv or .parquet file, or a hub name. With no data and no --lm-eval
    at all: what the run of --adapter forgot and kept, else the bundled biographies."""
    retain: str | None = None
    """What should be kept."""
    members: str | None = None
    """Documents the model was taught and should have forgotten, for the membership attack (column `document`, or any
    rows that --forget takes)."""
    nonmembers: str | None = None
    """Documents like them that the model never saw."""
    leaks: tuple[str, ...] = ()
    """Tests of what the forget rows may still give away: extraction, sampling, membership, relearning, quantization, or
    all."""
    holdout: str | None = None
    """Rows like the forgotten ones that the model was never taught, with which the leak tests compare. Default: the
    bundled holdout with bundled data, else none, and much that the tests find then has no measure."""
    leak_samples: int = SAMPLES
    """Samples of each answer that --leaks sampling draws."""
    leak_temperature: float = TEMPERATURE
    """Temperature of those samples."""
    relearn_share: float = Relearning.share
    """Share of the forget rows that --leaks relearning teaches again before it asks for the others."""
    relearn_steps: int = Relearning.steps
    """Steps of that, each on four rows."""
    relearn_lr: float = Relearning.lr
    """Learning rate of that."""
    real_authors: str | None = None
    """TOFU's real_authors_perturbed rows; model utility needs them."""
    world_facts: str | None = None
    """TOFU's world_facts_perturbed rows; model utility needs them."""
    retained_log: str | None = None
    """evaluation.json of a model that was never taught the forget set (or open-unlearning's TOFU_EVAL.json); TOFU's
    forget quality needs it."""
    prompt_column: str | None = None
    """Column of the prompt, where the columns are not recognised."""
    answer_column: str | None = None
    """Column of the answer."""
    prompt_template: str | None = None
    """How a prompt is written before its answer; as for train. LUME rows are always given as they stand. Default: as
    the run of --adapter had it."""
    max_length: int | None = None
    """Tokens per row whose likelihood is measured, prompt and answer together. Default: those of the run of --adapter,
    else 1024."""
    limit: int | None = None
    """Measure so many rows of each set, drawn with the seed (LUME: equally many of every task and kind)."""
    seed: int = 42
    """Seed of that draw, of the samples and of relearning: of all that is random."""

    lm_eval: tuple[str, ...] = ()
    """Tasks of lm-eval, such as mmlu; they download their data. Needs: pip install 'lowmem-npo[eval]'"""
    lm_eval_path: str | None = None
    """Folder of further task files for lm-eval."""
    lm_eval_shots: int | None = None
    """Examples before each lm-eval question. Default: the task's own number."""
    before: str | None = None
    """evaluation.json of the model before unlearning: the tables then compare, and MMLU is checked against it."""

    output_dir: str | None = None
    """Directory of the results. Default: `evaluation` inside --adapter, else lowmem-npo-evaluation."""
    resume: bool = False
    """Continue the evaluation in --output-dir, or add to it (members, lm-eval tasks)."""
    batch_size: int = BATCH_SIZE
    """Rows that go through the model together (fewer where they are long)."""

    def __post_init__(self) -> None:
        if self.model is None and self.adapter is None:
            raise UserError("Nothing to evaluate: name a model with --model, or an adapter with --adapter.")
        if (self.members is None) != (self.nonmembers is None):
            given, missing = ("--members", "--nonmembers") if self.nonmembers is None else ("--nonmembers", "--members")
            raise UserError(f"{given} is given but {missing} is not: the membership attack compares the two.")
        if self.max_length is not None and self.max_length < 2:
            raise UserError(f"--max-length is {self.max_length}; a prompt and an answer need at least 2 tokens.")
        for name in ("limit", "batch_size", "leak_samples", "relearn_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")
        self.leaks = TESTS if "all" in self.leaks else tuple(self.leaks)
        check_tests(self.leaks)
        if self.leaks and self.forget is None and not self.bundled:
            raise UserError("--leaks looks for what is left of the forget rows: name them with --forget.")
        for name in ("leak_temperature", "relearn_share", "relearn_lr"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"--{name.replace('_', '-')} must be a positive number, not {value}.")
        if self.relearn_share >= 1:
            raise UserError(f"--relearn-share is {self.relearn_share}: below 1, so that there are rows to ask for.")

    def completed(self, run: Mapping[str, Any]) -> EvaluationConfig:
        """What was left open, as `run` had it (run.yaml of the adapter's run, or nothing)."""
        found = {
            "prompt_template": run.get("prompt_template") if self.prompt_template is None else self.prompt_template,
            "max_length": (run.get("max_length") or MAX_LENGTH) if self.max_length is None else self.max_length,
        }
        if self.bundled and run.get("forget"):
            names = ("forget", "retain", *(["holdout"] if self.leaks else []))
            found.update({name: run.get(name) for name in names})
            columns = ("prompt_column", "answer_column")
            found.update({name: getattr(self, name) or run.get(name) for name in columns})
        return replace(self, **found)

    @property
    def bundled(self) -> bool:
        """Whether no data is named, so that the bundled biographies are measured."""
        named = (self.forget, self.retain, self.members, self.holdout, self.real_authors, self.world_facts)
        return not any(named) and not self.lm_eval

    @property
    def columns(self) -> dict[str, str | None]:
        """What `to_examples` is told of the columns."""
        return {} if self.bundled else {"prompt_column": self.prompt_column, "answer_column": self.answer_column}

    @property
    def path(self) -> Path:
        """Where the results go."""
        if self.output_dir is not None:
            return Path(self.output_dir).expanduser()
        return Path(self.adapter).expanduser() / "evaluation" if self.adapter else Path("lowmem-npo-evaluation")

    @property
    def leak_settings(self) -> LeakSettings:
        """How the leak tests are run."""
        again = Relearning(share=self.relearn_share, steps=self.relearn_steps, lr=self.relearn_lr)
        return LeakSettings(self.seed, self.leak_samples, self.leak_temperature, again)

    def model_config(self, name: str) -> ModelConfig:
        """How the base model `name` is loaded."""
        return ModelConfig(
            model=name,
            revision=self.revision,
            qlora=self.qlora,
            attn=self.attn,
            dtype=self.dtype,
            device=self.device,
        )
