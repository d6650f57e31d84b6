"""CPU seconds and FLOPs of a training step on real rows with a real model: the plain ways and ours, interleaved.

All ways train the same rows of the same steps in turn, so that whatever else the machine does meets all of them. The
first epoch fills the cached reference, the second reads it. Seconds are the processor's, of all threads.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from lowmem_kernels import IGNORE_INDEX
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.shared.baselines import Baseline, Batch
from benchmarks.shared.peers import LikeOpenUnlearning, LikeTRL
from benchmarks.speed_parts.table import EPOCHS
from lowmem_npo.config import AdapterConfig, MemoryConfig, ModelConfig
from lowmem_npo.data import TokenizedRow, read_rows, to_examples, tokenize
from lowmem_npo.data.batching import Pick
from lowmem_npo.data.example import Example
from lowmem_npo.memory.switches import apply_switches
from lowmem_npo.model import attach_lora, load_model, load_tokenizer
from lowmem_npo.training.step_rows import StepBatches
from lowmem_npo.training.trainer import NPOConfig, NPOTrainer

ROWS = 4  # forget rows and retain rows of a step
DENSE, DENSE_KEPT = "dense logits, padded, checkpointed", "dense logits, padded"
PLAIN: dict[str, tuple[type[Baseline], dict[str, Any]]] = {
    DENSE: (Baseline, {"two_models": False}),
    DENSE_KEPT: (Baseline, {"two_models": False, "checkpointing": False}),
    "as TRL does it": (LikeTRL, {"two_models": False}),
    "as open-unlearning does it": (LikeOpenUnlearning, {"two_models": True}),
}
KEPT: dict[str, Any] = {"gradient_checkpointing": False, "reference": "cached"}
OURS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # switches, and arguments of the trainer
    "ours": (KEPT, {}),
    "ours, padded": (KEPT, {"padding_free": False}),
    "ours, live reference": ({**KEPT, "reference": "live"}, {}),
    "ours, checkpointed": ({**KEPT, "gradient_checkpointing": True}, {}),
    "ours, checkpointed, tiled MLP": ({**KEPT, "gradient_checkpointing": True, "tile_mlp": 256}, {}),
    "ours, checkpointed, live reference, padded": (
        {"gradient_checkpointing": True, "reference": "live"},
        {"padding_free": False},
    ),
}
FILES = {
    "lume": ("lume/forget_train.jsonl", "lume/retain_train.jsonl"),
    "tofu": ("tofu/forget05.json", "tofu/retain95.json"),
}
EXAMPLE_SEED = 0
Rows = Sequence[TokenizedRow]
Step = Callable[[list[int], list[int]], None]


@dataclass
class Way:
    """One way of doing a step, and what it took: by epoch, CPU seconds of each timed step, and one step's FLOPs."""

    step: Step
    seconds: dict[str, list[float]] = field(default_factory=lambda: {epoch: [] for epoch in EPOCHS})
    flops: dict[str, int] = field(default_factory=dict)

    def summary(self) -> dict[str, dict[str, float]]:
        return {
            epoch: {"median": median(taken), "fastest": min(taken), "slowest": max(taken), "flops": self.flops[epoch]}
            for epoch, taken in self.seconds.items()
        }


def measure(model: Path, files: Sequence[Path], steps: int, folder: Path, say: Callable[[str], None]) -> dict:
    """What each way takes for `steps` steps on rows of `files`, to forget and to retain.

    Returns, under "tokens", how many a step has, real ones and padded; under "ways" the medians by epoch. One further
    step of each epoch comes first, whose FLOPs are counted and whose time is not.
    """
    config = ModelConfig(str(model), device="cpu")
    tokenizer = load_tokenizer(config)
    forget, retain = (tokenize(_sample(file, ROWS * (steps + 1)), tokenizer) for file in files)
    ways = {}
    for name, (kind, options) in PLAIN.items():
        ways[name] = Way(_plain_step(kind.build(lambda: load_model(config), lora=True, **options), forget, retain))
    for name, (switches, arguments) in OURS.items():
        reference = str(folder / name) if switches["reference"] == "cached" else None
        arguments = {"output_dir": str(folder), "reference_dir": reference, **arguments}
        ways[name] = Way(_our_step(load_model(config), MemoryConfig(**switches), arguments, forget, retain, tokenizer))
    order = StepBatches(len(forget), len(retain), ROWS, ROWS)
    rows = [order.step_rows(step) for step in range(order.steps_per_epoch)]
    for epoch in EPOCHS:
        for number, of_step in enumerate(rows):
            for way in ways.values():
                if number == 0:
                    way.flops[epoch] = _flops(way.step, *of_step)
                else:
                    before = time.process_time()
                    way.step(*of_step)
                    way.seconds[epoch].append(time.process_time() - before)
            if number:
                taken = "; ".join(f"{name} {way.seconds[epoch][-1]:.2f}" for name, way in ways.items())
                say(f"{epoch} epoch, step {number} of {steps}: {taken}")
    return {"tokens": _tokens(forget, retain, rows), "ways": {name: way.summary() for name, way in ways.items()}}


def _sample(file: Path, count: int) -> list[Example]:
    examples = to_examples(read_rows(str(file)))
    return random.Random(EXAMPLE_SEED).sample(examples, count)


def _plain_step(way: Baseline, forget: Rows, retain: Rows) -> Step:
    def step(forget_rows: list[int], retain_rows: list[int]) -> None:
        way.step(padded([forget[i] for i in forget_rows]), padded([retain[i] for i in retain_rows]))

    return step


def _our_step(
    model: PreTrainedModel,
    memory: MemoryConfig,
    arguments: dict[str, Any],
    forget: Rows,
    retain: Rows,
    tokenizer: PreTrainedTokenizerBase,
) -> Step:
    adapted = attach_lora(model, AdapterConfig())
    apply_switches(adapted, memory)
    args = NPOConfig(per_device_train_batch_size=ROWS, report_to="none", use_cpu=True, **arguments)
    trainer = NPOTrainer(adapted, args, forget, retain, processing_class=tokenizer)
    optimizer, dataset = trainer.create_optimizer(), trainer.train_dataset

    def step(forget_rows: list[int], retain_rows: list[int]) -> None:
        picks = [Pick("forget", i) for i in forget_rows] + [Pick("retain", i) for i in retain_rows]
        rows: Any = [dataset[pick] for pick in picks]
        batch: Any = trainer.data_collator(rows)
        (batch,), totals = trainer.get_batch_samples(iter([batch]), 1, args.device)
        trainer.training_step(adapted, batch, totals)
        optimizer.step()
        optimizer.zero_grad()

    return step


def padded(rows: Rows) -> Batch:
    """Padded on the right, as the plain ways take it."""
    width = max(len(row["input_ids"]) for row in rows)
    ids, labels = torch.zeros(len(rows), width, dtype=torch.int64), torch.full((len(rows), width), IGNORE_INDEX)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[index, :length], labels[index, :length] = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        mask[index, :length] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _tokens(forget: Rows, retain: Rows, steps: list[tuple[list[int], list[int]]]) -> dict[str, float]:
    """Tokens of a step, the mean over steps: real ones, and as many as the padded passes of both parts have."""
    parts = forget, retain
    lengths = [[[len(part[i]["input_ids"]) for i in rows[n]] for n, part in enumerate(parts)] for rows in steps]
    real = mean(sum(map(sum, step)) for step in lengths)
    return {"real": real, "padded": mean(sum(len(part) * max(part) for part in step) for step in lengths)}


def _flops(step: Step, forget_rows: list[int], retain_rows: list[int]) -> int:
    with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
        step(forget_rows, retain_rows)
    return counter.get_total_flops()


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """As PyTorch counts its attention on a GPU: both products, whole, whether causal or not."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[-2] * (width + value[-1])


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Five products, one of them the scores, which are computed again."""
    return 5 * _attention(query, key, value) // 2


def _linear(rows: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * prod(rows) * weight[0]


ON_CPU = {
    torch.ops.mkldnn._linear_pointwise: _linear,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
