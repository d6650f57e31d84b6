"""Everything below the lowest adapter, which policy and reference have in common, is run once for both."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from lowmem_npo.model.layers import causal_lm, decoder_layers


class SharedPrefix:
    """The input embedding and the decoder layers below the lowest one that is trained.

    Nothing in them depends on the adapter, so for one batch the policy's pass and the reference's enter the lowest
    adapted layer with the same hidden states, which need no gradient.
    """

    def __init__(self, model: PeftModel) -> None:
        lm = causal_lm(model)
        below: list[nn.Module] = [lm.get_input_embeddings()]
        for layer in decoder_layers(lm):
            if any(p.requires_grad for p in layer.parameters()):
                break
            below.append(layer)
        trained = any(p.requires_grad for module in below for p in module.parameters())
        self.modules = [] if trained else below

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """For passes over ONE batch: the first runs the prefix, without gradient; later ones reuse its result."""
        memory = _Memory()
        before = [vars(module).get("forward") for module in self.modules]
        try:
            for module in self.modules:
                module.forward = memory.in_place_of(module.forward, keeps=module is self.modules[-1])
            yield
        finally:
            for module, forward in zip(self.modules, before, strict=True):
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward


class _Memory:
    """The output of the prefix's last module: hidden states, or a tuple that begins with them."""

    def __init__(self) -> None:
        self.result: Any = None

    def in_place_of(self, forward: Callable[..., Any], keeps: bool) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self.result is not None:
                return self.result  # only the last module's output is used: the others ignore their input
            with torch.no_grad():
                result = forward(*args, **kwargs)
            if keeps:
                self.result = result
            return result

        return run
