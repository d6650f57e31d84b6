"""What a run is: typed, documented and validated once, whether it comes from flags, from YAML or from Python.

Each section is a module with one dataclass, and one box of `lowmem-npo train --help-all`; a field's docstring is its
help text. `RunConfig` puts the sections together. The file that `--config` reads holds the same names as the flags,
flat.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lowmem_npo.config.adapter import AdapterConfig
from lowmem_npo.config.data import DataConfig, DataOptions, PassageForm
from lowmem_npo.config.memory import TILE_ROWS, MemoryConfig, StreamOptions
from lowmem_npo.config.model import ModelConfig, ModelOptions
from lowmem_npo.config.objective import FORGET_TERMS, PREFERRING_TERMS, REFUSING_TERMS, ObjectiveConfig, may_prefer
from lowmem_npo.config.output import AnswerOptions, OutputConfig
from lowmem_npo.config.stopping import StoppingConfig
from lowmem_npo.config.training import KEPT_CHECKPOINTS, Recipe, TrainingConfig
from lowmem_npo.errors import UserError
from lowmem_npo.files import expanded
from lowmem_npo.sources import GENERAL_SET

__all__ = [
    "FORGET_TERMS",
    "KEPT_CHECKPOINTS",
    "PREFERRING_TERMS",
    "REFUSING_TERMS",
    "SECTIONS",
    "TILE_ROWS",
    "AdapterConfig",
    "AnswerOptions",
    "DataConfig",
    "DataOptions",
    "MemoryConfig",
    "ModelConfig",
    "ModelOptions",
    "ObjectiveConfig",
    "OutputConfig",
    "PassageForm",
    "Recipe",
    "RunConfig",
    "StoppingConfig",
    "StreamOptions",
    "TrainingConfig",
    "may_prefer",
]

SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "objective": ObjectiveConfig,
    "adapter": AdapterConfig,
    "memory": MemoryConfig,
    "training": TrainingConfig,
    "stopping": StoppingConfig,
    "output": OutputConfig,
}
# What one invocation does, not what the run is: never written to the run's configuration.
INVOCATION_ONLY = ("resume", "preview", "dry_run")


@dataclass
class RunConfig:
    """One run of `lowmem-npo train`."""

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    stopping: StoppingConfig = field(default_factory=StoppingConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    trainer_args: dict[str, Any] = field(default_factory=dict)
    """Further fields of `transformers.TrainingArguments`, by their own names (warmup_steps, logging_steps, ...)."""
    explicit: frozenset[str] = field(default=frozenset(), compare=False, repr=False)
    """Options that were given, on the command line or in a file: a recipe leaves them alone, default value or not."""

    def __post_init__(self) -> None:
        if self.data.retain is not None and self.data.forget is None:
            raise UserError(
                "--retain is given but --forget is not: give both, only --forget (then a bundled general set is kept), "
                "or neither (then the bundled biographies are used)."
            )
        if self.data.forget is not None and self.data.retain is None and self.objective.needs_retain:
            self.data = dataclasses.replace(self.data, retain=GENERAL_SET)
        term, other = self.objective.forget_term, self.data.alternatives
        if term in PREFERRING_TERMS and self.data.alternative_column is None and other is None:
            raise UserError(
                f"--forget-term {term} prefers another answer to the forgotten one: name its column, "
                "--alternative-column, or let the model write it, --alternatives self."
            )
        if other is not None and self.data.alternative_column is not None:
            raise UserError("--alternatives and --alternative-column both say what dpo prefers: leave one of them out.")
        self.memory.check_source(self.model)
        if self.objective.forget_level == "holdout" and self.data.forget is not None and self.data.holdout is None:
            raise UserError("--forget-level holdout pushes rows to where rows never taught are: name some, --holdout.")
        if self.objective.forget_level == "holdout" and self.data.tokens == "all":
            raise UserError("--forget-level is a level of answers, and --tokens all takes prompts too: leave one out.")
        if self.training.layered is not None and not self.objective.needs_retain:
            raise UserError(
                "--layered holds the folds whose turn has not come with the retain terms: give a positive --gamma or "
                "--delta."
            )
        for condition in self.stopping.conditions:
            needed = condition.needs
            if self.data.forget is not None and getattr(self.data, needed) is None:
                raise UserError(f"--stop-when {condition.text} measures {needed} rows: give --{needed}.")
        if self.stopping.stop_when and self.output.eval_rows < 1:
            raise UserError("--stop-when measures up to --eval-rows rows of each set: give at least 1.")

    @property
    def output_dir(self) -> Path:
        return expanded(self.output.output_dir)

    def flat(self) -> dict[str, Any]:
        """All settings under their flags' names; what differs per invocation only (resume, preview) left out."""
        settings: dict[str, Any] = {}
        for section in SECTIONS:
            settings.update(dataclasses.asdict(getattr(self, section)))
        settings = {name: value for name, value in settings.items() if name not in INVOCATION_ONLY}
        settings["lora_targets"] = list(settings["lora_targets"])
        for name in ("lora_layers", "modules_to_save", "stop_when"):
            settings[name] = list(settings[name]) or None
        settings["leaks"] = list(settings["leaks"]) or ["none"]
        return {**settings, **self.trainer_args}

    def chosen(self) -> dict[str, Any]:
        """The model, and of `flat` what differs from the defaults."""
        defaults = RunConfig(ModelConfig(self.model.model)).flat()
        del defaults["model"]
        return {name: value for name, value in self.flat().items() if name not in defaults or value != defaults[name]}

    def to_yaml(self) -> str:
        """The whole run as YAML that `--config` accepts back."""
        return yaml.safe_dump(self.flat(), sort_keys=False, allow_unicode=True)
