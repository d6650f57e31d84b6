"""How much memory a run takes, before it starts: one real training step on a GPU that has no memory but counts it.

The model is built from its configuration alone, `NPOTrainer` runs its own `training_step` and its own optimiser, and
every live storage is counted. There is no formula: what the code does is what is counted.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from lowmem_kernels import IGNORE_INDEX
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map, tree_map_only
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lowmem_npo.config import ModelConfig, RunConfig, StreamOptions
from lowmem_npo.data import TokenizedRow
from lowmem_npo.data.batching import Batch, RowBatch
from lowmem_npo.estimate.simulator.allocator import needed
from lowmem_npo.estimate.simulator.gpu import CAPABILITY, GPU, FakeGPU, fake_gpu, with_values
from lowmem_npo.estimate.simulator.model import fake_model
from lowmem_npo.estimate.simulator.work import Operation
from lowmem_npo.libraries import segments_expand
from lowmem_npo.memory.checkpointing import is_checkpointed
from lowmem_npo.memory.lock_step import can_lock_step
from lowmem_npo.memory.streaming import is_streamed, weight_stream
from lowmem_npo.memory.streaming.blocks import Weight
from lowmem_npo.memory.streaming.stream import WeightStream
from lowmem_npo.memory.switches import apply_switches, stream_layers
from lowmem_npo.model import attach_lora
from lowmem_npo.model.layers import causal_lm, decoder, decoder_layers
from lowmem_npo.model.packable import packable
from lowmem_npo.training.adversary import ROWS, Factors
from lowmem_npo.training.arguments import npo_config
from lowmem_npo.training.reference import LiveReference
from lowmem_npo.training.trainer import NPOConfig, NPOTrainer
from lowmem_npo.training.training_rows import Parts

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


@dataclass(frozen=True)
class Estimate:
    """The memory that one training step takes, and what it does."""

    peak_bytes: int  # of what is allocated on the GPU
    needed_bytes: int  # what PyTorch's allocator must have to serve that: it cannot use all of what is free
    by_kind: dict[str, int]  # what peak_bytes consists of
    host_bytes: int  # the peak of tensors in host memory
    copied_bytes: int = 0  # from host memory to the GPU, by one micro-batch
    streamed_bytes: int = 0  # of host_bytes, the layers' weights that are streamed
    largest_block_bytes: int = 0  # of these, what the largest layer has
    weights_bytes: int = 0  # of the whole model, where its layers are streamed
    context_bytes: int = CONTEXT_BYTES
    work: Work = field(default_factory=list, compare=False, repr=False)  # of one micro-batch, and what comes once
    later_work: Work = field(
        default_factory=list, compare=False, repr=False
    )  # the same with a reference that is cached

    @classmethod
    def of(cls, gpu: FakeGPU) -> Estimate:
        """What the simulated GPU has counted."""
        return cls(
            peak_bytes=gpu.peak,
            needed_bytes=needed(gpu.trace, gpu.peak, segments_expand()),
            by_kind={kind: gpu.at_peak.get(kind, 0) for kind in KINDS},
            host_bytes=gpu.off_device_peak,
            copied_bytes=sum(o.bytes for _, some in gpu.work.sections for o in some if o.part == "to GPU"),
            work=list(gpu.work.sections),
        )

    @property
    def total_bytes(self) -> int:
        """The GPU memory needed."""
        return self.needed_bytes + self.context_bytes

    def fits(self, budget: int) -> bool:
        return self.total_bytes <= budget


@dataclass(frozen=True)
class StepRows:
    """The largest rows that can occur in one optimiser step, largest first: (tokens, answer tokens) of each."""

    forget: tuple[tuple[int, int], ...]
    retain: tuple[tuple[int, int], ...]
    alternatives: tuple[tuple[int, int], ...] = ()  # one of which goes with each of `forget`, if there are any
    taught_again: tuple[tuple[int, int], ...] = ()  # what the adversary learns before the step, if there is one

    @classmethod
    def of_length(cls, config: RunConfig) -> StepRows:
        """Rows of --max-length tokens, all of them answer: the worst case, for data that are not known."""
        row = (config.data.max_length, config.data.max_length - 1)
        forget, paired = (row,) * config.training.batch_size, config.objective.forget_term == "dpo"
        taught_again = (row,) * ROWS if config.objective.adversary is not None else ()
        return cls(forget, (row,) * config.training.retain_rows, forget if paired else (), taught_again)

    @classmethod
    def of_data(cls, config: RunConfig, rows: Parts, typical: bool = False) -> StepRows:
        """The longest rows, with the longest answers.

        typical: rows of all lengths that there are instead, evenly, as many tokens as a step has on average. Those of
        about the mean length come first, so that a micro-batch has its share.
        """
        size, chosen = config.training.batch_size, _spread if typical else _largest
        return cls(
            chosen(rows.forget, size),
            chosen(rows.retain or (), config.training.retain_rows),
            chosen(rows.alternatives, size),
            chosen(rows.taught_again, min(ROWS, max(len(rows.taught_again) - size, 0))),
        )

    def tokens(self, padding_free: bool) -> int:
        """Of all of them in one pass."""
        lengths = [length for part in (self.forget, self.alternatives, self.retain) for length, _ in part]
        return sum(lengths) if padding_free else len(lengths) * max(lengths, default=0)

    def at_most(self, tokens: int, padding_free: bool) -> StepRows:
        """As many rows, each shortened by the same share, that have at most so many tokens in one pass."""
        share = tokens / self.tokens(padding_free)

        def of(part: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
            lengths = [max(2, int(length * share)) for length, _ in part]
            return tuple((length, min(a, length - 1)) for length, (_, a) in zip(lengths, part, strict=True))

        return StepRows(of(self.forget), of(self.retain), of(self.alternatives), self.taught_again)

    def micro_batch(self, config: RunConfig) -> StepRows:
        """The largest rows that go through the model at once."""
        micro_batches = config.training.micro_batches()
        retain = -(-config.training.retain_rows // micro_batches) if config.objective.needs_retain else 0
        forget = -(-config.training.batch_size // micro_batches)
        return StepRows(self.forget[:forget], self.retain[:retain], self.alternatives[:forget], self.taught_again)


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
    if joint == "auto" or not 0 < joint < rows.tokens(padding_free) or not rows.retain:
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
            gpu.mark([p for p in model.parameters() if not p.requires_grad and not is_streamed(p)], "frozen weights")
            gpu.mark(list(model.buffers()), "frozen weights")
        workspaces = cublas_workspaces(gpu)
        gpu.kind = "layer work"
        with tempfile.TemporaryDirectory() as folder:
            trainer = _trainer(model, config, rows, folder, padding_free)
        if not lock_step:
            trainer.passes.lock_step = None
        track_kinds(gpu, causal_lm(model))
        reference = trainer.passes.reference = _Reference(gpu, trainer.passes.reference)
        gpu.kind = "adapter"
        optimizer = trainer.create_optimizer()
        first_optimizer_step(optimizer)
        if config.training.micro_batches() > 1:  # from the second one on, there are gradients to add to
            _give_gradients(optimizer)
        gpu.kind = "batch"
        batch, totals = _batch(trainer)
        _track_adversary(gpu, trainer)
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
    others = [token_row(*row) for row in rows.taught_again]  # forget rows, too, with the true answers
    alternatives = [token_row(*row) for row in rows.alternatives]
    trainer = NPOTrainer(
        model,
        arguments,
        [token_row(*row) for row in rows.forget] + others,
        [token_row(*row) for row in rows.retain],
        alternative_dataset=alternatives + others if alternatives else None,
        true_dataset=[token_row(*row) for row in rows.forget] + others,
        processing_class=cast(PreTrainedTokenizerBase, SimpleNamespace(pad_token_id=0)),
    )
    in_step = list(range(len(rows.forget))), list(range(len(rows.retain)))
    others_are_taught = {"step_rows": lambda step: in_step, "spared": lambda step: in_step[0]}
    vars(trainer.step_batches).update(others_are_taught)
    return trainer


def token_row(length: int, answers: int) -> TokenizedRow:
    prompt = length - answers
    return {"input_ids": [0] * length, "labels": [IGNORE_INDEX] * prompt + [0] * answers, "prompt_length": prompt}


def _batch(trainer: NPOTrainer) -> tuple[Batch, Any]:
    """The trainer's own first micro-batch, as fake tensors whose values are known, and its totals."""
    with _disable_current_modes():
        batches, totals = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    batch = {part: rows and replace(rows, data=with_values(rows.data)) for part, rows in batches[0].items()}
    trainer.ahead = [batch] if trainer.ahead else []
    if (lesson := trainer.lesson) is not None:
        passes = [replace(rows, data=with_values(rows.data)) for rows in lesson.passes]
        trainer.lesson = lesson._replace(passes=passes)
    return batch, totals


def first_optimizer_step(optimizer: torch.optim.Optimizer) -> None:
    """Makes the optimiser allocate its state, which lives through all later steps."""
    _give_gradients(optimizer)
    optimizer.step()
    optimizer.zero_grad()


def _give_gradients(optimizer: torch.optim.Optimizer) -> None:
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        parameter.grad = torch.zeros_like(parameter)


def track_kinds(gpu: FakeGPU, model: PreTrainedModel) -> None:
    """Sets the kind of what is allocated, by hooks where a pass enters and leaves the parts of `model`."""

    def enters_decoder(*_: Any) -> None:
        gpu.kind = "layer work"

    def leaves_decoder(module: nn.Module, args: Any, output: Any) -> None:
        gpu.kind = "head"
        if output.last_hidden_state.requires_grad:
            output.last_hidden_state.register_hook(enters_decoder)

    def enters_layer(layer: nn.Module, args: tuple, kwargs: dict) -> None:
        if torch.is_grad_enabled() and is_checkpointed(layer):
            gpu.mark(args[0] if args else kwargs["hidden_states"], "checkpoints")

    decoder(model).register_forward_pre_hook(enters_decoder)
    decoder(model).register_forward_hook(leaves_decoder)
    for layer in decoder_layers(model):
        layer.register_forward_pre_hook(enters_layer, with_kwargs=True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: gpu.mark(p.grad, "adapter"))


def _track_adversary(gpu: FakeGPU, trainer: NPOTrainer) -> None:
    """The adversary's step is a section of its own, and what it consists of is of a kind of its own."""
    if (adversary := trainer.passes.adversary) is None:
        return
    fresh, relearn = adversary.fresh, adversary.relearn

    def tracked_fresh(step: int) -> list[Factors]:
        with gpu.allocating("adversary"):
            factors = fresh(step)
        for factor in factors:
            factor.b.register_post_accumulate_grad_hook(lambda b: gpu.mark(b.grad, "adversary"))
        return factors

    def tracked_relearn(*step: Any) -> Tensor:
        before = gpu.work.sections[-1][0]
        gpu.work.begin("adversary")
        gain = relearn(*step)
        gpu.work.begin(before)
        gpu.mark([(factor.a, factor.b) for factor in adversary.factors], "adversary")
        return gain

    vars(adversary).update(fresh=tracked_fresh, relearn=tracked_relearn)


class _Reference(LiveReference):
    """The trainer's, whose passes are a section of their own, and their results of a kind of their own."""

    def __init__(self, gpu: FakeGPU, live: LiveReference) -> None:
        super().__init__(live.model, live.head, live.objective)
        self.gpu = gpu
        self.stored = False  # whether results come from the host, as those of a cached reference do
        self._on_host: dict[str, Any] = {}  # what makes tensors like the results

    def forget(self, batch: RowBatch) -> Tensor | None:
        return self._simulated("forget", partial(super().forget, batch))

    def retain(self, batch: RowBatch) -> Tensor | None:
        return self._simulated("retain", partial(super().retain, batch))

    def both(self, batch: RowBatch, forget_rows: int) -> tuple[Tensor | None, Tensor | None]:
        return self._simulated("both", partial(super().both, batch, forget_rows))

    def runs(self, forget: Sequence[int] = (), retain: Sequence[int] = ()) -> bool:
        return not self.stored and super().runs(forget, retain)

    def _simulated(self, name: str, run: Callable[[], Any]) -> Any:
        before = self.gpu.work.sections[-1][0]
        self.gpu.work.begin("reference")
        if self.stored:
            result = tree_map(lambda make: make and make().to(GPU, non_blocking=True), self._on_host[name])
        else:
            result = run()
            self._on_host[name] = tree_map_only(Tensor, _like, result)
        self.gpu.work.begin(before)
        self.gpu.mark(result, "reference")
        return result


def _like(tensor: Tensor) -> Callable[[], Tensor]:
    """Makes tensors of the same size and type, in host memory."""
    return partial(torch.empty, tensor.shape, dtype=tensor.dtype, device="cpu")


def _spread(rows: Sequence[TokenizedRow], count: int) -> tuple[tuple[int, int], ...]:
    sizes = sorted(map(row_size, rows))
    chosen = [sizes[(2 * i + 1) * len(sizes) // (2 * count)] for i in range(count if sizes else 0)]
    mean = sum(length for length, _ in chosen) / max(len(chosen), 1)
    return tuple(sorted(chosen, key=lambda row: (abs(row[0] - mean), row)))


def row_size(row: TokenizedRow) -> tuple[int, int]:
    """Its tokens, and how many of them are predicted answer tokens."""
    length = len(row["input_ids"])
    return length, min(sum(label != IGNORE_INDEX for label in row["labels"]), length - 1)


def _largest(rows: Sequence[TokenizedRow], count: int) -> tuple[tuple[int, int], ...]:
    lengths = sorted((len(row["input_ids"]) for row in rows), reverse=True)[:count]
    answers = sorted((sum(label != IGNORE_INDEX for label in row["labels"]) for row in rows), reverse=True)[:count]
    return tuple((length, min(a, length - 1)) for length, a in zip(lengths, answers, strict=True))
