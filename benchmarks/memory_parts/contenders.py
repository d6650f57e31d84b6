"""What `memory.py` compares: NPO as it is usually written, and lowmem-npo with one more switch at a time.

Every contender does the same step on the same rows: 4 forget and 4 retain rows, all of their tokens answer tokens,
NPO + retain cross-entropy + full-vocabulary KL, bf16, AdamW, checkpointed layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from lowmem_kernels import IGNORE_INDEX
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.shared.baselines import Baseline
from lowmem_npo.commands.arguments import parse_run
from lowmem_npo.config import RunConfig
from lowmem_npo.estimate.rows import token_row
from lowmem_npo.estimate.simulator.gpu import CAPABILITY, GPU, fake_gpu, with_values
from lowmem_npo.estimate.simulator.model import fake_model
from lowmem_npo.estimate.step import Estimate, cublas_workspaces, estimate, first_optimizer_step
from lowmem_npo.estimate.tracking import track_kinds
from lowmem_npo.memory.switches import apply_switches
from lowmem_npo.model import attach_lora, load_model
from lowmem_npo.model.layers import causal_lm
from lowmem_npo.training.arguments import npo_config
from lowmem_npo.training.trainer import NPOTrainer

ROWS = 4


@dataclass(frozen=True)
class Contender:
    """A way to do the step: a baseline's properties, or flags of `lowmem-npo train`."""

    name: str
    flags: tuple[str, ...] = ()
    baseline: dict[str, bool] = field(default_factory=dict)  # two_models, lora
    turn: int = 1  # the order of measuring, since time may run out
    model: str | None = None  # overrides --model
    lengths: tuple[int, ...] = ()  # measured only at these numbers of tokens; default: any

    @property
    def is_baseline(self) -> bool:
        return bool(self.baseline)

    def run(self, tokens: int, model: str = "model") -> RunConfig:
        return parse_run(["--model", model, "--max-length", str(tokens), *self.flags], "train")


def _ours() -> Iterator[Contender]:
    """Each with one switch more than the one before. * marks switches that are on by default."""
    plain = ("--no-gradient-checkpointing", "--no-sliced-float32")
    yield Contender("lowmem-npo, bf16, no layer recomputed", plain, turn=3)
    yield Contender("+ --gradient-checkpointing *", plain[1:], turn=2)
    yield Contender("+ --sliced-float32 *", turn=2)
    flags: tuple[str, ...] = ()
    for switch, turn in (
        ("--qlora", 0),
        ("--embedding-on-cpu", 1),
        ("--tile-mlp", 1),
        ("--offload-checkpoints", 0),
        ("--reference cached", 1),
        ("--micro-batch-size 1", 1),
        ("--lora-layers 16-31", 1),
    ):
        flags += tuple(switch.split())
        yield Contender(f"+ {switch}", flags, turn=turn)
    yield Contender(
        "OLMo-2-32B, down to --offload-checkpoints",
        ("--qlora", "--embedding-on-cpu", "--tile-mlp", "--offload-checkpoints"),
        turn=2,
        model="allenai/OLMo-2-0325-32B",
        lengths=(2048,),
    )


CONTENDERS = (
    Contender("two models, full fine-tuning", baseline={"two_models": True, "lora": False}, turn=0),
    Contender("two models, LoRA", baseline={"two_models": True, "lora": True}, turn=0),
    Contender("one model, LoRA, dense logits", baseline={"two_models": False, "lora": True}, turn=0),
    Contender("one model, QLoRA, dense logits", ("--qlora",), {"two_models": False, "lora": True}, turn=0),
    *_ours(),
)


def simulate(
    contender: Contender, architecture: PretrainedConfig, tokens: int, capability: tuple[int, int] = CAPABILITY
) -> Estimate:
    """The memory of the contender's step on a GPU, simulated without one."""
    if not contender.is_baseline:
        return estimate(contender.run(tokens), architecture, capability=capability)
    rows = batch(tokens)
    with fake_gpu("frozen weights", capability) as gpu:

        def load() -> PreTrainedModel:
            if models:
                gpu.kind = "reference"
            models.append(fake_model(architecture, contender.run(tokens).model))
            gpu.kind = "adapter"
            return models[-1]

        models: list[PreTrainedModel] = []
        baseline = Baseline.build(load, **contender.baseline)
        if not contender.baseline["lora"]:
            gpu.mark(list(baseline.policy.parameters()), "adapter")  # all of them are trained
        workspaces = cublas_workspaces(gpu)
        for model in models:
            track_kinds(gpu, causal_lm(model))
        gpu.kind = "adapter"
        first_optimizer_step(baseline.optimizer)
        gpu.kind = "batch"
        forget, retain = ({name: with_values(values).to(GPU) for name, values in rows.items()} for _ in range(2))
        gpu.kind = "layer work"
        gpu.restart_peak()
        baseline.step(forget, retain)
        del workspaces
        return Estimate.of(gpu)


def real_step(contender: Contender, weights: Path, tokens: int, folder: Path) -> Callable[[], Any]:
    """One step of the contender on the GPU, as a function; its model comes from `weights`, and `folder` is scratch."""
    config = contender.run(tokens, str(weights))
    config = replace(config, output=replace(config.output, output_dir=str(folder)))
    if contender.is_baseline:
        baseline = Baseline.build(lambda: load_model(config.model), **contender.baseline)
        on_gpu = {name: values.to("cuda") for name, values in batch(tokens).items()}
        return lambda: baseline.step(on_gpu, on_gpu)

    model = attach_lora(load_model(config.model), config.adapter)
    apply_switches(model, config.memory)
    rows = [token_row(tokens, tokens - 1)] * ROWS
    tokenizer = cast(PreTrainedTokenizerBase, SimpleNamespace(pad_token_id=0, get_vocab=dict))
    trainer = NPOTrainer(model, npo_config(config), rows, rows, processing_class=tokenizer)
    optimizer = trainer.create_optimizer()
    micro_batches = trainer.args.gradient_accumulation_steps

    def step() -> None:
        batches, totals = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), micro_batches, GPU)
        for batch in batches:
            trainer.training_step(model, batch, totals)
        optimizer.step()
        optimizer.zero_grad()

    return step


def batch(tokens: int) -> dict[str, Tensor]:
    """The rows as a batch for the baselines."""
    labels = torch.zeros(ROWS, tokens, dtype=torch.int64)
    labels[:, 0] = IGNORE_INDEX
    ids = torch.zeros_like(labels)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
