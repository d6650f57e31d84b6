"""A tiny model that recites a few rows, where tests of forgetting begin, and the configuration of a run on it."""

from __future__ import annotations

from pathlib import Path

import torch

from lowmem_npo.commands.demo.recipe import Teaching
from lowmem_npo.commands.demo.teaching import make_tokenizer, taught_model
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
from lowmem_npo.data import Template, bundled_rows, prepare, to_examples

LIMIT = 12
TEACHING = Teaching(vocabulary=300, layers=2, width=48, heads=2, epochs=60, batch_size=8, lr=5e-3)


def teach_tiny_model(directory: Path) -> Path:
    """Teaches it, in a few seconds, and saves it in `directory`."""
    examples = [e for part in ("forget", "retain") for e in to_examples(bundled_rows(part, limit=LIMIT))]
    tokenizer = make_tokenizer(["".join(Template().render(example)) for example in examples], TEACHING.vocabulary)
    data = prepare(tokenizer, DataConfig(limit=LIMIT))
    rows = [*data.forget, *data.retain]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    taught_model(directory, tokenizer, rows, TEACHING, seed=0, device=torch.device("cpu"), description="teaching")
    torch.set_num_threads(threads)
    return directory


def unlearning_config(model: Path, output_dir: Path, stop_when: tuple[str, ...] = (), **changes) -> RunConfig:
    """A run that forgets fast: twelve rows, four steps per epoch, evaluated and saved at every second step."""
    eval_every = changes.pop("eval_every", 2 if stop_when else None)
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 100}
    training = {"batch_size": 3, "retain_batch_size": 6, "max_steps": 30, "lr": 8e-3, "seed": 0} | changes
    return RunConfig(
        model=ModelConfig(model=str(model), dtype="float32", device="cpu"),
        data=DataConfig(limit=LIMIT),
        objective=ObjectiveConfig(beta=0.06),
        adapter=AdapterConfig(lora_r=8, lora_alpha=8, lora_targets=("all-linear",)),
        memory=MemoryConfig(gradient_checkpointing="off"),
        training=TrainingConfig(**training),
        stopping=StoppingConfig(stop_when=stop_when, eval_every=eval_every),
        output=OutputConfig(output_dir=str(output_dir), eval_rows=LIMIT, eval_batch_size=12, leaks=()),
        trainer_args=saving,
    )
