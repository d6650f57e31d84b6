"""How far a row would still move the weights: the norm of its loss's gradient, tensor by tensor.

Of all weights of the model, as it would be with its adapter merged into them. No gradient of the whole model exists: a
tensor's own is measured and freed as soon as backward reaches it, and that of a linear layer, whose weight may be in 4
bits, is the product of what came in and what came back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowmem_npo.data import TokenizedRow
from lowmem_npo.evaluation.scoring.likelihood import answer_batch
from lowmem_npo.model import answer_hidden, frozen_head
from lowmem_npo.model.layers import causal_lm, linear_layers
from lowmem_npo.model.modes import eval_mode

BIASES = ("bias", "base_layer.bias")  # of a linear layer, which are tensors by themselves


def gradient_norms(model: PreTrainedModel | PeftModel, rows: Sequence[TokenizedRow]) -> list[float | None]:
    """Of each row the mean, over the tensors, of the L2 norm of the gradient of its answer's mean NLL per token.

    The last token is left out; None for an answer of no other.
    """
    return [_gradient_norm(model, row) if _answer_tokens(row) > 1 else None for row in rows]


def _answer_tokens(row: TokenizedRow) -> int:
    return len(row["input_ids"]) - max(1, row["prompt_length"])


def _gradient_norm(model: PreTrainedModel | PeftModel, row: TokenizedRow) -> float:
    lm, norms = causal_lm(model), list[Tensor]()
    batch, head, layer = answer_batch(model, [row]), frozen_head(model), cast(Any, lm.get_output_embeddings())
    tokens, bias = len(head.weight), getattr(layer, "bias", None)  # with the gradients that `head` is without
    with eval_mode(model), torch.enable_grad(), _measured(model, norms):
        answers = answer_hidden(model, batch)
        z = F.linear(answers.hidden[:-1], layer.weight[:tokens], None if bias is None else bias[:tokens])
        z = z.float() * head.logit_scale
        z = z if head.softcap is None else (z / head.softcap).tanh() * head.softcap
        F.cross_entropy(z, answers.targets[:-1]).backward()
    return torch.stack(norms).mean().item()


@contextmanager
def _measured(model: PreTrainedModel | PeftModel, norms: list[Tensor]) -> Iterator[None]:
    """Inside, a backward pass adds the norm of each tensor's gradient to `norms`, and leaves no gradient behind."""
    products = [
        layer
        for layer in cast("Iterable[Any]", linear_layers(causal_lm(model)).values())
        if isinstance(layer, BaseTunerLayer) or not layer.weight.is_floating_point()
    ]
    inside = {id(p) for layer in products for name, p in layer.named_parameters() if name not in BIASES}
    kept = {p: (p.requires_grad, p.grad) for p in model.parameters()}
    handles = [layer.register_forward_hook(partial(_product, norms)) for layer in products]
    try:
        for p in kept:
            p.grad = None
            p.requires_grad_(p.is_floating_point() and id(p) not in inside)
            if p.requires_grad:
                handles.append(p.register_post_accumulate_grad_hook(partial(_own, norms)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for p, (required, gradient) in kept.items():
            p.requires_grad_(required)
            p.grad = gradient


def _own(norms: list[Tensor], tensor: Tensor) -> None:
    assert tensor.grad is not None
    norms.append(tensor.grad.float().norm())
    tensor.grad = None


def _product(norms: list[Tensor], layer: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> None:
    """The gradient of a linear layer's weight, from its input and the gradient of its result."""
    x = args[0].detach().flatten(0, -2).float()
    result.register_hook(lambda gradient: norms.append((gradient.flatten(0, -2).float().T @ x).norm()))
