"""How much memory a run takes, before it starts: one real training step on a GPU that has no memory but counts it.

The model is built from its configuration alone, `NPOTrainer` runs its own `training_step` and its own optimiser, and
every live storage is counted. There is no formula: what the code does is what is counted.
"""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lowmem_npo.config import ModelConfig, RunConfig, StreamOptions
from lowmem_npo.console import silent
from lowmem_npo.data.batching import Batch
from lowmem_npo.estimate.rows import StepRows, token_row
from lowmem_npo.estimate.simulator.allocator import needed
from lowmem_npo.estimate.simulator.gpu import CAPABILITY, GPU, FakeGPU, fake_gpu, with_values
from lowmem_npo.estimate.simulator.model import fake_model
from lowmem_npo.estimate.simulator.work import Operation
from lowmem_npo.estimate.tracking import TrackedReference, track_adversary, track_kinds
from lowmem_npo.libraries import segments_expand
from lowmem_npo.memory.lock_step import can_lock_step
from lowmem_npo.memory.streaming import is_streamed, weight_stream
from lowmem_npo.memory.streaming.blocks import Weight
from lowmem_npo.memory.streaming.stream import WeightStream
from lowmem_npo.memory.switches import apply_switches, stream_layers
from lowmem_npo.model import attach_lora
from lowmem_npo.model.layers import causal_lm
from lowmem_npo.model.packable import packable
from lowmem_npo.training.arguments import npo_config
from lowmem_npo.training.trainer import NPOConfig, NPOTrainer

CONTEXT_BYTES = 512 * 2**20
"""What CUDA itself and the loaded kernels take of a GPU, outside of PyTorch's allocator: about this much on cards of
compute capability 8.0 to 9.0. A run on a GPU measures its own."""

KINDS = (
    *("frozen weights", "slots", "adapter", "adversary", "checkpoints", "layer work", "head", "reference", "batch"),
    "cuBLAS",
)

Work = list[tuple[str, list[Operation]]]
"""What a step does, in order: its sections ("adversary", "reference", "policy", "optimizer") and the operations of
each."""

ONCE = ("adversary", "optimizer")  # sections of a step that do not come again with every micro-batch


@dataclass(frozen=True)
class Estimate:
    """The memory that one training step takes, and what it does."""

    peak_bytes: int  # of what is allocated on the GPU
    needed_bytes: int  # what PyTorch's allocator must have to serve that: it cannot use all of what is free
    by_kind: dict[str, int]  # what peak_bytes consists of
    host_bytes: int  # the peak of tensors in host memory
    copied_bytes: int = 0  # from host memory to the GPU, by one micro-batch
    copied_once_bytes: int = 0  # the same, by what comes once in a step
    streamed_bytes: int = 0  # of host_bytes, the layers' weights that are streamed
    largest_block_bytes: int = 0  # of these, what the largest layer has
    weights_bytes: int = 0  # of the whole model, where its layers are streamed
    context_bytes: int = CONTEXT_BYTES
    work: Work = field(default_factory=list, compare=False, repr=False)  # of one micro-batch, and what comes once
    later_work: Work = field(default_factory=list, compare=False, repr=False)  # the same with a cached reference

    @classmethod
    def of(cls, gpu: FakeGPU) -> Estimate:
        """What the simulated GPU has counted."""
        copied = [(part in ONCE, o.bytes) for part, some in gpu.work.sections for o in some if o.part == "to GPU"]
        return cls(
            peak_bytes=gpu.peak,
            needed_bytes=needed(gpu.trace, gpu.peak, segments_expand()),
            by_kind={kind: gpu.at_peak.get(kind, 0) for kind in KINDS},
            host_bytes=gpu.off_device_peak,
            copied_bytes=sum(size for once, size in copied if not once),
            copied_once_bytes=sum(size for once, size in copied if once),
            work=list(gpu.work.sections),
        )

    @property
    def total_bytes(self) -> int:
        """The GPU memory needed."""
        return self.needed_bytes + self.context_bytes

    def copied_in_step(self, micro_batches: int) -> int:
        """Bytes from host memory to the GPU."""
        return self.copied_once_bytes + micro_batches * self.copied_bytes

    def fits(self, budget: int) -> bool:
        return self.total_bytes <= budget


def estimate(
    config: RunConfig,
    architecture: PretrainedConfig,
    rows: StepRows | None = None,
    capability: tuple[int, int] = CAPABILITY,
    later: bool = False,
) -> Estimate:
    """Simulates the step that `config` describes on a model of `architecture`.

    Args:
        rows: the step's. Default: of --max-length tokens.
        capability: the compute capability of the GPU.
        later: whether to simulate a second step, which reads its reference from a cache, for `later_work`.
    """
    rows = (rows or StepRows.of_length(config)).micro_batch(config)
    padding_free = packable(architecture, config.model.attn)
    lock_step = config.memory.stream_weights and can_lock_step(architecture, config.model.attn)
    judged = partial(_simulate, padding_free=padding_free, lock_step=lock_step, later=later)
    simulate = partial(judged, config, architecture, capability)
    result, joint = simulate(rows), config.memory.joint_pass_tokens
    if joint == "auto" or not 0 < joint < rows.tokens(padding_free) or config.objective.parts_go_apart:
        return result
    # The largest rows go apart; shorter ones may take more, together.
    together = simulate(rows.at_most(joint, padding_free))
    larger = max(result, together, key=lambda estimated: estimated.peak_bytes)
    needed_bytes = max(result.needed_bytes, together.needed_bytes)
    return replace(larger, needed_bytes=needed_bytes, work=result.work, later_work=result.later_work)


def _simulate(
    config: RunConfig,
    architecture: PretrainedConfig,
    capability: tuple[int, int],
    rows: StepRows,
    *,
    padding_free: bool,
    lock_step: bool,
    later: bool,
) -> Estimate:
    with fake_gpu("frozen weights", capability) as gpu:
        base = fake_model(architecture, config.model, on_host=config.memory.stream_weights)
        weights = _weights(base)
        with gpu.allocating("adapter"):
            model = attach_lora(base, config.adapter)
            apply_switches(model, config.memory, GPU)
        if (stream := weight_stream(model)) is not None:  # what else is not trained has come to the GPU
            gpu.mark(stream.slots, "slots")
            rest = [p for p in model.parameters() if not p.requires_grad and not is_streamed(p)]
            gpu.mark([Weight(parameter, []).tensors for parameter in rest], "frozen weights")
            gpu.mark(list(model.buffers()), "frozen weights")
        workspaces = cublas_workspaces(gpu)
        gpu.kind = "layer work"
        with tempfile.TemporaryDirectory() as folder:
            trainer = _trainer(model, config, rows, folder, padding_free)
        if not lock_step:
            trainer.passes.lock_step = None
        track_kinds(gpu, causal_lm(model))
        reference = trainer.passes.reference = TrackedReference(gpu, trainer.passes.reference)
        gpu.kind = "adapter"
        optimizer = trainer.create_optimizer()
        first_optimizer_step(optimizer)
        if config.training.micro_batches() > 1:  # from the second one on, there are gradients to add to
            _give_gradients(optimizer)
        gpu.kind = "batch"
        batch, totals = _batch(trainer)
        if trainer.passes.adversary is not None:
            track_adversary(gpu, trainer.passes.adversary)
        gpu.kind = "layer work"
        gpu.restart_peak()
        gpu.work.restart()
        trainer.training_step(model, batch, totals)
        gpu.kind = "adapter"
        gpu.work.begin("optimizer")
        optimizer.step()
        result = _with_stream(Estimate.of(gpu), stream, weights)
        if later:
            reference.stored = True
            gpu.work.restart("policy")
            _batch(trainer)  # what comes before a step does so again
            trainer.training_step(model, batch, totals)
            gpu.work.begin("optimizer")
            optimizer.step()
            result = replace(result, later_work=list(gpu.work.sections))
        del workspaces
        return result


def estimate_streamed(
    model: ModelConfig, architecture: PretrainedConfig, capability: tuple[int, int] = CAPABILITY
) -> Estimate:
    """The weights alone, streamed: what they take of the GPU and of the host before the model is asked anything."""
    with fake_gpu("frozen weights", capability) as gpu:
        base = fake_model(architecture, model, on_host=True)
        weights = _weights(base)
        stream_layers(base, StreamOptions(stream_weights=True), GPU)
        gpu.restart_peak()
        return _with_stream(Estimate.of(gpu), weight_stream(base), weights)


def _weights(model: PreTrainedModel) -> int:
    """Bytes, statistics of 4-bit weights included."""
    return sum(tensor.nbytes for parameter in model.parameters() for tensor in Weight(parameter, []).tensors)


def _with_stream(result: Estimate, stream: WeightStream | None, weights: int) -> Estimate:
    if stream is None:
        return result
    sizes = [len(block) for block in stream.blocks]
    return replace(result, streamed_bytes=sum(sizes), largest_block_bytes=max(sizes), weights_bytes=weights)


def cublas_workspaces(gpu: FakeGPU) -> list[Tensor]:
    """What cuBLAS keeps for each thread that multiplies, in the forward pass and in the backward pass: of PyTorch's
    size (`CublasHandlePool.cpp`), or of the user's."""
    large = torch.cuda.get_device_capability() >= (9, 0)
    settings = re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    kib = sum(int(size) * int(count) for size, count in settings) or (32768 if large else 8320)
    with gpu.allocating("cuBLAS"):
        return [torch.empty(kib * 2**10, dtype=torch.uint8, device=GPU) for _ in ("forward", "backward")]


class _Arguments(NPOConfig):
    """The trainer's arguments, on the fake GPU."""

    @property
    def device(self) -> torch.device:
        return GPU

    @property
    def process_index(self) -> int:
        return 0


def _trainer(model: PeftModel, config: RunConfig, rows: StepRows, folder: str, padding_free: bool) -> NPOTrainer:
    """The run's own trainer, for one micro-batch and one device."""
    step = replace(
        config,
        model=replace(config.model, device="cpu"),  # keeps the Trainer from looking for a real GPU
        memory=replace(config.memory, reference="live", reference_dir=None),
        training=replace(
            config.training,
            batch_size=len(rows.forget),
            micro_batch_size=None,
            retain_batch_size=len(rows.retain) or None,
            layered=None,  # its steps are those of any run, of rows that `StepRows` knows
        ),
        output=replace(config.output, output_dir=folder),
        trainer_args={name: value for name, value in config.trainer_args.items() if name.startswith("optim")},
    )
    arguments = npo_config(step, _Arguments)
    arguments.padding_free = padding_free
    arguments.max_steps = 1  # whose rows are given below, so that none need be left for attackers who go on
    others = [token_row(*row, token=1) for row in rows.taught_again]  # forget rows, too, with the true answers
    alternatives = [token_row(*row) for row in rows.alternatives]
    trainer = NPOTrainer(
        model,
        arguments,
        [token_row(*row) for row in rows.forget] + others,
        [token_row(*row) for row in rows.retain],
        alternative_dataset=alternatives + others if alternatives else None,
        true_dataset=[token_row(*row) for row in rows.forget] + others,
        processing_class=cast(PreTrainedTokenizerBase, SimpleNamespace(pad_token_id=0)),
        say=silent,
    )
    in_step = list(range(len(rows.forget))), list(range(len(rows.retain)))
    others_are_taught = {"step_rows": lambda step: in_step, "spared": lambda step: in_step[0]}
    vars(trainer.step_batches).update(others_are_taught)
    return trainer


def _batch(trainer: NPOTrainer) -> tuple[Batch, Any]:
    """The trainer's own first micro-batch, as fake tensors whose values are known, and its totals."""
    with _disable_current_modes():
        batches, totals = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    batch = {part: rows and replace(rows, data=with_values(rows.data)) for part, rows in batches[0].items()}
    point = trainer.forget_point
    point.ahead = [batch] if point.ahead else []
    if point.lesson is not None:
        passes = [replace(rows, data=with_values(rows.data)) for rows in point.lesson.passes]
        point.lesson = point.lesson._replace(passes=passes)
    return batch, totals


def first_optimizer_step(optimizer: torch.optim.Optimizer) -> None:
    """Makes the optimiser allocate its state, which lives through all later steps."""
    _give_gradients(optimizer)
    optimizer.step()
    optimizer.zero_grad()


def _give_gradients(optimizer: torch.optim.Optimizer) -> None:
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        parameter.grad = torch.zeros_like(parameter)
