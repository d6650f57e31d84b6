"""Lock-step: reference and policy visit a layer together, so that a step traverses the layers twice, not three times.

A pass of the policy takes the reference along. Where it has gone through a layer, the reference's hidden states of the
same rows follow: adapters off, in eval mode, without a graph. What else the layer is given (masks, tables of
positions) is the same for both. The layers below the lowest adapter run once, as they do in a shared prefix; what
follows the layers runs a second time for the reference, whose pass finds them done.

Where weights are streamed this is a third of what is copied. The graph is that of the policy alone, to the bit, and
nothing of the reference outlives its visit but the hidden states that go on to the next layer.

It needs layers that hand on nothing but hidden states, which is tried out on a few tokens, in float32 on a small random
copy of the architecture (all that an estimate can try) and then on the model itself, and an adapter that lies in them
and is switched off layer by layer, which one that is continued from another is not.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from lowmem_kernels.dispatch import has_values
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig

from lowmem_npo.config import AdapterConfig
from lowmem_npo.data.batching import RowBatch
from lowmem_npo.endings import tried
from lowmem_npo.errors import UserError
from lowmem_npo.memory.checkpointing import hidden_first
from lowmem_npo.memory.forwards import in_place
from lowmem_npo.memory.prefix import Memory, SharedPrefix, stand_ins
from lowmem_npo.model.adapters import attach_lora, reference_mode
from lowmem_npo.model.continued import ContinuedModel
from lowmem_npo.model.head import answer_hidden, few_tokens
from lowmem_npo.model.layers import causal_lm, decoder_layers
from lowmem_npo.model.packable import Hashed, plain_attention
from lowmem_npo.model.trial import trial_model


class LockStep:
    """The decoder layers from the lowest trained one up, visited by policy and reference together."""

    def __init__(self, model: PeftModel, below: list[nn.Module]) -> None:
        self.below = below
        self.layers: list[nn.Module] = list(decoder_layers(model))[len(self.below) - 1 :] if self.below else []

    @classmethod
    def where_it_fits(cls, model: PeftModel, prefix: SharedPrefix) -> LockStep | None:
        """None if the reference needs passes of its own."""
        lock_step, lm = cls(model, prefix.modules), causal_lm(model)
        trained = {p for p in model.parameters() if p.requires_grad}
        fits = trained and trained <= {p for layer in lock_step.layers for p in layer.parameters()}
        fits = fits and not isinstance(model, ContinuedModel)
        head = lm.get_output_embeddings().weight
        if fits and has_values(head):  # of a simulated model its architecture is asked before: `can_lock_step`
            attention = plain_attention(str(lm.config._attn_implementation))
            fits = head.dtype == torch.float32 or can_lock_step(lm.config, attention)
            fits = fits and lock_step._suffices(model)
        return lock_step if fits else None

    @contextmanager
    def passes(self) -> Iterator[_Memory]:
        """For two passes over ONE batch: the policy's, and then the reference's."""
        memory = _Memory()
        visits = {layer: _Visit(layer, memory, layer is self.layers[-1]) for layer in self.layers}
        with in_place({module: memory.in_place_of(module.forward, keeps=False) for module in self.below} | visits):
            yield memory

    def _suffices(self, model: PeftModel) -> bool:
        """Whether a policy and a reference that enter the layers with different states leave them as they do alone."""
        batch = RowBatch.whole(few_tokens(causal_lm(model)))

        def enters_as_another(layer: Any, args: Any, options: dict[str, Any]) -> Any:
            hidden, *others = hidden_first(layer.forward, args, options := dict(options))
            return (hidden.roll(1, -2), *others), options

        def takes_another_along(*call: Any) -> None:
            (memory.states, *_), _ = enters_as_another(*call)

        with reference_mode(model):
            alone = [answer_hidden(model, batch).hidden]
            with _before(self.layers[0], enters_as_another):
                alone.append(answer_hidden(model, batch).hidden)
            together = []
            with (
                tried(RuntimeError),  # a stand-in was written to
                self.passes() as memory,
                _before(self.layers[0], takes_another_along),
            ):
                together = [answer_hidden(model, batch).hidden for _ in alone]
        if not together:
            return False
        before, beside = (torch.stack(states).float() for states in (alone, together))
        # The same work on the same numbers.
        return bool((beside - before).norm() <= 8 * torch.finfo(alone[0].dtype).eps * before.norm())


def can_lock_step(architecture: PretrainedConfig, attention: str) -> bool:
    """Whether the layers of `architecture` hand on nothing but hidden states, as far as a small copy of it can tell;
    attention: --attn. In float32 a side state shows that moves the reference by less than bf16 rounds."""
    return _can_lock_step(Hashed(architecture), attention)


@functools.lru_cache(maxsize=64)
def _can_lock_step(architecture: Hashed, attention: str) -> bool:
    with torch.random.fork_rng(devices=[]), suppress(UserError):
        if (small := trial_model(architecture.config, attention)) is not None:
            model = attach_lora(small, AdapterConfig(lora_targets=("all-linear",)))
            return LockStep(model, [small.get_input_embeddings()])._suffices(model)
    return True  # no copy of it can be made: the model itself is tried


@contextmanager
def _before(layer: nn.Module, hook: Any) -> Iterator[None]:
    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class _Memory(Memory):
    states: Tensor | None = None  # the reference's, as they enter the next layer


class _Visit:
    """Replaces a layer's `forward`: of the policy's pass, which runs it for both, and of the reference's after that."""

    def __init__(self, layer: nn.Module, memory: _Memory, is_last: bool) -> None:
        self.layer, self.forward, self.memory, self.is_last = layer, layer.forward, memory, is_last
        self._stand_in: Any = None

    def __call__(self, *args: Any, **options: Any) -> Any:
        memory = self.memory
        if memory.result is not None:
            return memory.result if self.is_last else self._stand_in
        hidden, *others = args = hidden_first(self.forward, args, options)
        policy = self.forward(*args, **options)
        with reference_mode(self.layer):
            reference = self.forward(hidden if memory.states is None else memory.states, *others, **options)
        if self.is_last:
            memory.result = reference
        else:
            memory.states, self._stand_in = tree_leaves(reference)[0], stand_ins(reference)
        return policy
