"""Linear layers with a LoRA adapter, each as one node of the graph: y = W x + s B A x (Hu et al. 2021).

Written as modules, as PEFT does it, the adapter's part is a tensor of its own, scaled, added to a copy of the frozen
part, and in the backward pass each of these steps is one more kernel over all tokens, one more operator for the host to
launch and one more node. Here the small products are accumulated onto the large ones:

    forward    y  = W x               y  += s (A x) B^T
    backward   dx = W^T dy            dx += (s B^T dy) A        dB = s dy^T (A x)        dA = (s B^T dy)^T x

The frozen part is computed by the layer itself, whatever holds its weights, so an adapter that is the identity, B = 0,
gives the bits of the model without it. (Unsloth, Han et al. 2023, derives such backward passes for whole blocks.)
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft.tuners import lora
from peft.tuners.lora.bnb import Linear4bit as AdaptedLinear4bit
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def join_adapters(model: nn.Module) -> None:
    """Makes every linear layer in `model` that has one plain LoRA adapter run as one node. Exact up to rounding."""
    for module in model.modules():
        if "forward" not in vars(module) and _is_plain(module):
            module.forward = AdaptedLinear(module)


def _is_plain(module: Any) -> bool:
    """Whether it is a frozen layer, in 4 bits or unquantised, and one adapter without a magnitude or a bias."""
    if type(module) not in (lora.Linear, AdaptedLinear4bit) or len(module.lora_A) != 1:
        return False
    ((name, down),) = module.lora_A.items()
    base = module.get_base_layer()
    return (
        type(base) in (nn.Linear, Linear4bit)
        and not any(parameter.requires_grad for parameter in base.parameters())
        and not module.fan_in_fan_out
        and name not in module.lora_variant
        and type(down) is nn.Linear
        and not module.lora_bias[name]
    )


class AdaptedLinear:
    """Replaces the `forward` of a LoRA layer of PEFT."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.plain = layer, layer.forward
        (self.adapter,) = layer.lora_A

    def __call__(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        layer, name = self.layer, self.adapter
        if args or options or layer.merged:
            return self.plain(x, *args, **options)
        if layer.disable_adapters:
            return layer.base_layer(x)
        dropout = layer.lora_dropout[name]
        drops = dropout.training and not isinstance(dropout, nn.Identity)
        if drops or layer.active_adapters != [name]:  # a second one stands beside it for a while
            return self.plain(x)
        down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
        return _Adapted.apply(x, down, up, layer.scaling[name], layer.base_layer)


class _Adapted(torch.autograd.Function):
    """x (..., d) -> (..., e), with A (r, d) and B (e, r)."""

    @staticmethod
    def forward(ctx, x: Tensor, down: Tensor, up: Tensor, scale: float, base: nn.Module) -> Tensor:
        kind, ctx.x_dtype = x.device.type, x.dtype
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        y = base(x)
        rows = x.flatten(0, -2)
        low = rows @ down.to(x.dtype).T
        y.flatten(0, -2).addmm_(low, up.to(x.dtype).T, alpha=scale)
        ctx.save_for_backward(rows, low, down, up)
        ctx.scale, ctx.base, ctx.shape = scale, base, x.shape
        return y.to(ctx.x_dtype) if isinstance(base, Linear4bit) else y  # as the layer itself returns it

    @staticmethod
    @once_differentiable
    def backward(ctx, y_grad: Tensor):
        rows, low, down, up = ctx.saved_tensors
        x_wanted, down_wanted, up_wanted = ctx.needs_input_grad[:3]
        y_grad = y_grad.flatten(0, -2).to(rows.dtype)
        x_grad = down_grad = up_grad = None
        if up_wanted:
            up_grad = (y_grad.T @ low).to(up.dtype).mul_(ctx.scale)
        low_grad = (y_grad @ up.to(rows.dtype)).mul_(ctx.scale)
        if down_wanted:
            down_grad = (low_grad.T @ rows).to(down.dtype)
        if x_wanted:
            x_grad = (y_grad @ _weight(ctx.base, rows.dtype)).addmm_(low_grad, down.to(rows.dtype))
            x_grad = x_grad.view(ctx.shape).to(ctx.x_dtype)
        return x_grad, down_grad, up_grad, None, None


def _weight(base: Any, dtype: torch.dtype) -> Tensor:
    """(e, d)."""
    weight = base.weight
    if isinstance(base, Linear4bit):
        weight = dequantize_4bit(weight, weight.quant_state)
    return weight.to(dtype)
