"""Activation checkpointing: a layer's activations are recomputed in the backward pass (Chen et al. 2016)."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lowmem_npo.memory.forwards import replacement, restored
from lowmem_npo.memory.offload import CheckpointOffload
from lowmem_npo.model.layers import decoder_layers
from lowmem_npo.model.modes import draws_random_numbers


def enable_checkpointing(model: PreTrainedModel, offload: bool = False) -> None:
    """Checkpoints the decoder layers, non-reentrant: works with frozen inputs, keeps autocast, allows no_grad. Those
    below the lowest trained one have no gradient, and nothing to recompute.

    Args:
        offload: keep the layers' inputs in host memory until the backward pass (`CheckpointOffload`).
    """
    run = CheckpointOffload().checkpoint if offload else partial(checkpoint, use_reentrant=False)
    for layer in _differentiated_layers(model):
        if not is_checkpointed(layer):
            layer.forward = CheckpointedForward(layer, run)


def _differentiated_layers(model: PreTrainedModel) -> Sequence[nn.Module]:
    """The decoder layers from the lowest trained one up; all of them if anything outside the layers is trained, too,
    such as an embedding, or nothing is."""
    layers = list(decoder_layers(model))
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    below = list(itertools.takewhile(lambda layer: not any(id(p) in trained for p in layer.parameters()), layers))
    in_layers = {id(p) for layer in layers for p in layer.parameters()}
    return layers[len(below) :] if trained and trained <= in_layers else layers


@contextmanager
def checkpointing(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the decoder layers are checkpointed; on leaving, only those that were before."""
    with restored(layer for layer in decoder_layers(model) if not is_checkpointed(layer)):
        enable_checkpointing(model)
        yield


def is_checkpointed(layer: nn.Module) -> bool:
    return replacement(layer, CheckpointedForward) is not None


def hidden_first(forward: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    """A layer's `args`, beginning with the hidden states: if they were given by name, they are taken from `options`."""
    return args or (options.pop(next(iter(inspect.signature(forward).parameters))),)


class CheckpointedForward:
    """Replaces a layer's `forward`. Transformers' own checkpointing works in training mode only, with all that this
    mode changes in the frozen base."""

    def __init__(self, layer: nn.Module, run: Callable[..., Any]) -> None:
        self.layer, self.forward, self.run = layer, layer.forward, run
        self.__signature__ = inspect.signature(layer.forward)

    def __call__(self, *args: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **options)
        args = hidden_first(self.forward, args, options)
        return self.run(partial(self.forward, **options), *args, preserve_rng_state=draws_random_numbers(self.layer))
