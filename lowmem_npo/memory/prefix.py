"""Everything below the lowest adapter, which policy and reference have in common, is run once for both."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lowmem_kernels.dispatch import has_values
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lowmem_npo.data.batching import RowBatch
from lowmem_npo.endings import tried
from lowmem_npo.memory.forwards import in_place
from lowmem_npo.model.head import answer_hidden, few_tokens
from lowmem_npo.model.layers import causal_lm, decoder_layers
from lowmem_npo.model.modes import eval_mode

logger = logging.getLogger(__name__)


class SharedPrefix:
    """The input embedding and the decoder layers below the lowest one that is trained.

    Nothing in them depends on the adapter, so for one batch the policy's pass and the reference's enter the lowest
    adapted layer with the same hidden states, which need no gradient. An architecture whose upper layers read anything
    else from below (Zamba's: the embedding again) shares nothing; that is tried out on a few tokens.
    """

    def __init__(self, model: PeftModel) -> None:
        lm = causal_lm(model)
        below: list[nn.Module] = [lm.get_input_embeddings()]
        for layer in decoder_layers(lm):
            if any(p.requires_grad for p in layer.parameters()):
                break
            below.append(layer)
        self.modules = [] if _needs_gradient(model, below) else below
        if has_values(lm.get_output_embeddings().weight) and not self._suffices(model):
            self.modules = []
            logger.warning(
                "The layers below the adapters run for the policy and again for the reference: "
                "in %s the layers above them read more than their result.", type(lm).__name__,
            )  # fmt: skip

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """For passes over ONE batch: the first runs the prefix, without gradient; later ones reuse its result."""
        memory = Memory()
        forwards = {m: memory.in_place_of(m.forward, keeps=m is self.modules[-1]) for m in self.modules}
        with in_place(forwards):
            yield

    @torch.no_grad()
    def _suffices(self, model: PeftModel) -> bool:
        """Whether a pass that reuses the prefix's result gives what the pass before it gave, which ran the prefix."""
        ids = few_tokens(causal_lm(model))
        with eval_mode(model), self.shared():
            whole = answer_hidden(model, RowBatch.whole(ids)).hidden
            with tried(RuntimeError):  # a stand-in was written to
                shared = answer_hidden(model, RowBatch.whole(ids)).hidden
                return torch.allclose(shared, whole, rtol=0.0, atol=0.01 * float(whole.abs().max()))
        return False


def _needs_gradient(model: PeftModel, below: list[nn.Module]) -> bool:
    """Whether anything is trained in `below`, or between its modules, such as an embedding of positions."""
    if any(p.requires_grad for module in below for p in module.parameters()):
        return True
    lm = causal_lm(model)
    in_layers = {id(p) for p in decoder_layers(lm).parameters()}
    if all(id(p) in in_layers for p in lm.parameters() if p.requires_grad):
        return False
    depends = False

    def look(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal depends
        depends = any(isinstance(part, Tensor) and part.requires_grad for part in tree_leaves(output))

    ids, handle = few_tokens(lm), below[-1].register_forward_hook(look)
    try:
        with eval_mode(model), torch.enable_grad():
            answer_hidden(model, RowBatch.whole(ids))
    finally:
        handle.remove()
    return depends


class Memory:
    """What passes over one batch have in common: the output of the last module that is not run again, hidden states or
    a tuple that begins with them."""

    def __init__(self) -> None:
        self.result: Any = None

    def in_place_of(self, forward: Callable[..., Any], keeps: bool) -> Callable[..., Any]:
        """`forward` without gradient until there is a result. keeps: whether it gives the result."""
        stand_in: Any = None

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal stand_in
            if self.result is not None:
                return self.result if keeps else stand_in
            with torch.no_grad():
                result = forward(*args, **kwargs)
            if keeps:
                self.result = result
            else:
                stand_in = stand_ins(result)
            return result

        return run


def stand_ins(result: Any) -> Any:
    """Takes the place of a result that is not needed again, without its memory; a pass that used it would give NaN."""

    def of(tensor: Tensor) -> Tensor:
        return tensor.new_full((), torch.nan if tensor.is_floating_point() else 0).expand(tensor.shape)

    return tree_map_only(Tensor, of, result)
