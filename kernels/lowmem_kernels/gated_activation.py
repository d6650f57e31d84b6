"""The gate of a gated MLP, act(gate) * up (Shazeer 2020): SwiGLU and GeGLU. Nothing is kept but gate and up.

The activation is computed in float32 and rounded to the dtype of gate, and so is its product with up: as the plain form
does it. The backward pass computes the activation again.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lowmem_kernels.launch import launch
from lowmem_kernels.rowwise import RowEngine, check_floating, fused

Activation = Literal["silu", "gelu", "gelu-tanh"]
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "gelu-tanh")


def glu(gate: Tensor, up: Tensor, activation: Activation = "silu", *, engine: RowEngine = "auto") -> Tensor:
    """act(gate) * up.

    gate        (..., d) bfloat16, float16 or float32, of any strides
    up          the same shape and dtype
    activation  silu (SwiGLU), gelu (GeGLU, with erf) or gelu-tanh (its approximation, in Gemma)
    engine      auto, triton (CUDA; on a CPU only under TRITON_INTERPRET=1) or torch

    Returns (..., d) contiguous, in the dtype of gate, differentiable (once) in both. Raises ValueError, naming the
    argument.
    """
    check_floating("gate", gate)
    check_floating("up", up, ("gate", gate))
    if gate.ndim == 0 or up.shape != gate.shape:
        raise ValueError(f"up must have the shape of gate, (..., d), not {tuple(up.shape)} and {tuple(gate.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be 'silu', 'gelu' or 'gelu-tanh', not {activation!r}")
    triton = fused(gate, engine)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _Gated.apply(gate, up, activation, triton)
    return forward(gate, up, activation, triton)


def forward(gate: Tensor, up: Tensor, activation: Activation, triton: bool) -> Tensor:
    if triton:
        return _launch(gate, up, None, activation)[0]
    return activated(gate, activation) * up


def activated(x: Tensor, activation: Activation) -> Tensor:
    """act(x), by PyTorch: in float32, rounded to the dtype of x."""
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu-tanh" else "none")


def plain_backward(gate: Tensor, up: Tensor, grad: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """d loss / d gate and d loss / d up from grad, d loss / d output, by PyTorch."""
    grad = grad.float()
    with torch.enable_grad():
        x = gate.detach().float().requires_grad_()
        (slope,) = torch.autograd.grad(activated(x, activation).sum(), x)
    return (grad * up * slope).to(gate.dtype), (grad * activated(gate, activation)).to(up.dtype)


def _launch(gate: Tensor, up: Tensor, grad: Tensor | None, activation: Activation) -> tuple[Tensor, Tensor | None]:
    """The output and None or, with grad, the gradients of gate and up, by the kernel."""
    from lowmem_kernels.gated_activation_kernel import BLOCK, NUM_WARPS, glu_kernel

    (gate, gate_stride), (up, up_stride) = _rows(gate), _rows(up)
    grad = None if grad is None else grad.contiguous()
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    up_grad = None if grad is None else torch.empty_like(out)
    d = gate.shape[-1]
    launch(
        glu_kernel,
        (gate.numel() // max(1, d), -(-d // BLOCK)),
        gate_ptr=gate,
        up_ptr=up,
        grad_ptr=grad,
        out_ptr=out,
        up_grad_ptr=up_grad,
        gate_stride=gate_stride,
        up_stride=up_stride,
        D=d,
        ACTIVATION=activation,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        num_stages=1,
    )
    return out, up_grad


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """x and the distance of its rows; a contiguous copy where they are not equally far apart."""
    d = x.shape[-1]
    if x.is_contiguous():
        return x, d
    outer = [(size, stride) for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size != 1]
    regular = all(a[1] == b[0] * b[1] for a, b in zip(outer, outer[1:], strict=False))
    if not outer or not regular or (x.stride(-1) != 1 and d != 1):
        return x.contiguous(), d
    return x, outer[-1][1]


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, activation, triton):
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.triton = activation, triton
        return forward(gate, up, activation, triton)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return *(_launch if ctx.triton else plain_backward)(gate, up, grad, ctx.activation), None, None
