"""What a simulated step allocates, by kind, and what it does, by section: hooks and wrappers about the step itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only
from transformers import PreTrainedModel

from lowmem_npo.data.batching import RowBatch
from lowmem_npo.estimate.simulator.gpu import GPU, FakeGPU
from lowmem_npo.memory.checkpointing import is_checkpointed
from lowmem_npo.model.layers import decoder, decoder_layers
from lowmem_npo.training.adversary import Adversary, Factors
from lowmem_npo.training.reference import LiveReference


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


def track_adversary(gpu: FakeGPU, adversary: Adversary) -> None:
    """The adversary's step is a section of its own, and what it consists of is of a kind of its own."""
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


class TrackedReference(LiveReference):
    """The trainer's reference, whose passes are a section of their own, and their results of a kind of their own."""

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
