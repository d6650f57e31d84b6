"""How far a row would still move the weights: the norm of its loss's gradient, tensor by tensor.

Of all weights of the model, as it would be with its adapter merged into them. No gradient of the whole model exists: a
tensor's own is measured and freed as soon as backward reaches it, and so is that of a layer's weight which is scaled
(DoRA) or in 4 bits, the product of what came in and what came back. What other adapters add to a weight leaves its
gradient as it is. Layers are recomputed, so that of each there is only its input until backward reaches it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowmem_npo.data import TokenizedRow
from lowmem_npo.evaluation.scoring.likelihood import answer_batch
from lowmem_npo.memory.checkpointing import checkpointing
from lowmem_npo.model import answer_hidden, frozen_head
from lowmem_npo.model.adapters import adapted_weight
from lowmem_npo.model.layers import causal_lm, linear_layers
from lowmem_npo.model.modes import eval_mode


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
    with eval_mode(model), torch.enable_grad(), _measured(model, norms), checkpointing(lm):
        answers = answer_hidden(model, batch)
        z = F.linear(answers.hidden[:-1], layer.weight[:tokens], None if bias is None else bias[:tokens])
        z = z.float() * head.logit_scale
        z = z if head.softcap is None else (z / head.softcap).tanh() * head.softcap
        F.cross_entropy(z, answers.targets[:-1]).backward()
    return torch.stack(norms).mean().item()


@contextmanager
def _measured(model: PreTrainedModel | PeftModel, norms: list[Tensor]) -> Iterator[None]:
    """Inside, a backward pass adds the norm of each tensor's gradient to `norms`, and leaves no gradient behind."""
    weights = {layer: _weight(layer) for layer in linear_layers(causal_lm(model)).values()}
    multiplied = {id(weight) for layer, weight in weights.items() if _has_no_own(layer, weight)}
    adapters = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    added = {id(p) for a in adapters for name, p in a.named_parameters() if not name.startswith("base_layer.")}
    kept = {p: (p.requires_grad, p.grad) for p in model.parameters()}
    products = _Products(norms)
    handles = [
        layer.register_forward_hook(partial(products.called, id(weight)))
        for layer, weight in weights.items()
        if id(weight) in multiplied
    ]
    try:
        for p in kept:
            p.grad = None
            p.requires_grad_(p.is_floating_point() and id(p) not in multiplied | added)
            if p.requires_grad:
                handles.append(p.register_post_accumulate_grad_hook(partial(_own, norms)))
        yield
        norms += [_norm(rest) for rest in products.sums.values()]
    finally:
        for handle in handles:
            handle.remove()
        for p, (required, gradient) in kept.items():
            p.requires_grad_(required)
            p.grad = gradient


def _weight(layer: Any) -> Tensor:
    return adapted_weight(layer) if isinstance(layer, BaseTunerLayer) else layer.weight


def _has_no_own(layer: nn.Module, weight: Tensor) -> bool:
    """Whether autograd gives the weight no gradient, or another than the merged one has."""
    adds = isinstance(layer, LoraLayer) and not layer.lora_magnitude_vector
    return not weight.is_floating_point() or (isinstance(layer, BaseTunerLayer) and not adds)


def _own(norms: list[Tensor], tensor: Tensor) -> None:
    assert tensor.grad is not None
    norms.append(_norm(tensor.grad))
    tensor.grad = None


def _norm(gradient: Tensor) -> Tensor:
    """In float32, of which no copy is made."""
    return torch.linalg.vector_norm(gradient, dtype=torch.float32)


class _Products:
    """The gradients of linear layers' weights, from the inputs and the gradients of the results.

    A weight that several calls share has the sum of theirs, which is kept until backward has come to the first.
    `sums` is what is left of weights of whose calls one does not reach the loss.
    """

    def __init__(self, norms: list[Tensor]) -> None:
        self._norms = norms
        self._calls = Counter[int]()
        self._leaf = torch.empty(0, requires_grad=True)
        self.sums: dict[int, Tensor] = {}

    def called(self, weight: int, layer: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> None:
        saved = _Saved.apply(args[0].detach(), self._leaf).grad_fn
        if torch._C._current_graph_task_id() != -1:  # the call is recomputed: the tensor saved above is the first one's
            return
        self._calls[weight] += 1
        result.register_hook(lambda gradient: self._add(weight, _product(gradient, *saved.saved_tensors)))

    def _add(self, weight: int, product: Tensor) -> None:
        earlier = self.sums.pop(weight, None)
        product = product if earlier is None else earlier + product
        self._calls[weight] -= 1
        if self._calls[weight]:
            self.sums[weight] = product
        else:
            self._norms.append(_norm(product))


class _Saved(torch.autograd.Function):
    """Saves a tensor as autograd does, of a recomputed layer only then. leaf: any that needs a gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, leaf: Tensor) -> Tensor:
        ctx.save_for_backward(tensor)
        return tensor.new_empty(0)


def _product(gradient: Tensor, x: Tensor) -> Tensor:
    """(out features, in features): the gradient of a weight."""
    return gradient.flatten(0, -2).float().T @ x.flatten(0, -2).float()
