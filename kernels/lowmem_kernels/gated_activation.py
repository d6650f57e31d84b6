"""Activations of MLPs, gated (Shazeer 2020) or not: SwiGLU, GeGLU, squared ReLU. Nothing is kept but their inputs.

    y = act(min(gate, limit)) * (clamp(up, -limit, limit) + up_offset)          or, without up, y = act(gate)

The activation is computed in float32 and rounded to the dtype of gate, and so is its product with up: as the plain form
does it. The backward pass computes the activation again.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lowmem_kernels.launch import launch
from lowmem_kernels.rowwise import RowEngine, check_floating, fused

Activation = Literal["silu", "gelu", "gelu-tanh", "relu", "relu2"]
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "gelu-tanh", "relu", "relu2")


class Gate(NamedTuple):
    """What is computed of gate and up; the fields are the arguments of `glu`."""

    activation: Activation = "silu"
    alpha: float = 1.0
    limit: float | None = None
    up_offset: float = 0.0


def glu(
    gate: Tensor,
    up: Tensor,
    activation: Activation = "silu",
    *,
    alpha: float = 1.0,
    limit: float | None = None,
    up_offset: float = 0.0,
    engine: RowEngine = "auto",
) -> Tensor:
    """act(gate) * up.

    gate        (..., d) bfloat16, float16 or float32, of any strides
    up          the same shape and dtype
    activation  silu (SwiGLU), gelu (GeGLU, with erf), gelu-tanh (its approximation, in Gemma), relu or relu2, its
                square (So et al. 2021)
    alpha       of silu: x sigmoid(alpha x); 1.702 in gpt-oss
    limit       gate is at most this, and up between it and its negative; 7 in gpt-oss. None: neither has a limit
    up_offset   added to up, 1 in gpt-oss
    engine      auto, triton (CUDA; on a CPU only under TRITON_INTERPRET=1) or torch

    Returns (..., d) contiguous, in the dtype of gate, differentiable (once) in both. Raises ValueError, naming the
    argument.
    """
    check_floating("gate", gate)
    check_floating("up", up, ("gate", gate))
    if gate.ndim == 0 or up.shape != gate.shape:
        raise ValueError(f"up must have the shape of gate, (..., d), not {tuple(up.shape)} and {tuple(gate.shape)}")
    how = _checked(activation, alpha, limit, up_offset)
    triton = fused(gate, engine)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _Gated.apply(gate, up, how, triton)
    return forward(gate, up, how, triton)


def packed_glu(
    gate_up: Tensor,
    activation: Activation = "silu",
    *,
    interleaved: bool = False,
    alpha: float = 1.0,
    limit: float | None = None,
    up_offset: float = 0.0,
    engine: RowEngine = "auto",
) -> Tensor:
    """`glu` of the two parts of one tensor, whose gradient is written in one piece.

    gate_up      (..., 2 d), of any strides: gate and then up
    interleaved  gate is every other entry, from the first one on, and up the others: gpt-oss
    the rest     as in `glu`
    """
    check_floating("gate_up", gate_up)
    if gate_up.ndim == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up must have shape (..., 2 d), not {tuple(gate_up.shape)}")
    how = _checked(activation, alpha, limit, up_offset)
    triton = fused(gate_up, engine)
    if torch.is_grad_enabled() and gate_up.requires_grad:
        return _Packed.apply(gate_up, interleaved, how, triton)
    return forward(*_parts(gate_up, interleaved), how, triton)


def act(x: Tensor, activation: Activation, *, alpha: float = 1.0, engine: RowEngine = "auto") -> Tensor:
    """act(x), for an MLP without a gate; the arguments are those of `glu`."""
    check_floating("x", x)
    if x.ndim == 0:
        raise ValueError("x must have shape (..., d), not ()")
    how = _checked(activation, alpha, None, 0.0)
    triton = fused(x, engine)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Gated.apply(x, None, how, triton)
    return forward(x, None, how, triton)


def _checked(activation: str, alpha: float, limit: float | None, up_offset: float) -> Gate:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be 'silu', 'gelu', 'gelu-tanh', 'relu' or 'relu2', not {activation!r}")
    if alpha != 1.0 and activation != "silu":
        raise ValueError(f"alpha is for 'silu', not for {activation!r}")
    if limit is not None and not limit > 0:
        raise ValueError(f"limit must be a positive number, not {limit}")
    return Gate(activation, float(alpha), None if limit is None else float(limit), float(up_offset))


def forward(gate: Tensor, up: Tensor | None, how: Gate, triton: bool) -> Tensor:
    if triton:
        out = torch.empty_like(gate, memory_format=torch.contiguous_format)
        _launch(gate, up, None, how, out, None)
        return out
    if how.limit is not None:
        gate = gate.clamp(max=how.limit)
    value = activated(gate, how)
    return value if up is None else value * _limited(up, how)


def activated(x: Tensor, how: Gate) -> Tensor:
    """act(x), by PyTorch: in float32, rounded to the dtype of x."""
    if how.activation == "relu":
        return F.relu(x)
    if how.activation == "relu2":
        return F.relu(x).square()
    if how.activation == "silu":
        return F.silu(x) if how.alpha == 1.0 else (x.float() * torch.sigmoid(how.alpha * x.float())).to(x.dtype)
    return F.gelu(x, approximate="tanh" if how.activation == "gelu-tanh" else "none")


def _limited(up: Tensor, how: Gate) -> Tensor:
    if how.limit is not None:
        up = up.clamp(-how.limit, how.limit)
    return up + how.up_offset if how.up_offset else up


def plain_backward(gate: Tensor, up: Tensor | None, grad: Tensor, how: Gate) -> tuple[Tensor, Tensor | None]:
    """d loss / d gate and d loss / d up from grad, d loss / d output, by PyTorch."""
    grad = grad.float()
    with torch.enable_grad():
        x = gate.detach().float().requires_grad_()
        limited = x if how.limit is None else x.clamp(max=how.limit)
        (slope,) = torch.autograd.grad(activated(limited, how).sum(), x)
    if up is None:
        return (grad * slope).to(gate.dtype), None
    up_grad = grad * activated(gate if how.limit is None else gate.clamp(max=how.limit), how)
    if how.limit is not None:
        up_grad = up_grad * (up.abs() <= how.limit)
    return (grad * _limited(up, how) * slope).to(gate.dtype), up_grad.to(up.dtype)


def _launch(
    gate: Tensor, up: Tensor | None, grad: Tensor | None, how: Gate, out: Tensor, up_grad: Tensor | None
) -> None:
    """Writes the output into `out` or, with grad, the gradients of gate and up into `out` and `up_grad`."""
    from lowmem_kernels.gated_activation_kernel import BLOCK, NUM_WARPS, glu_kernel

    if not gate.numel():
        return
    d = gate.shape[-1]
    gate, gate_row, gate_entry = _rows(gate)
    up, up_row, up_entry = (None, 0, 0) if up is None else _rows(up)
    out_row, out_entry = _distances(out)
    up_grad_row, up_grad_entry = (0, 0) if up_grad is None else _distances(up_grad)
    launch(
        glu_kernel,
        (gate.numel() // d, -(-d // BLOCK)),
        gate_ptr=gate,
        up_ptr=up,
        grad_ptr=None if grad is None else grad.contiguous(),
        out_ptr=out,
        up_grad_ptr=up_grad,
        gate_row=gate_row,
        up_row=up_row,
        out_row=out_row,
        up_grad_row=up_grad_row,
        gate_entry=gate_entry,
        up_entry=up_entry,
        out_entry=out_entry,
        up_grad_entry=up_grad_entry,
        D=d,
        alpha=how.alpha,
        limit=how.limit,
        up_offset=how.up_offset,
        ACTIVATION=how.activation,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        num_stages=1,
    )


def _rows(x: Tensor) -> tuple[Tensor, int, int]:
    """An input and the distances of its rows and entries; a contiguous copy if its rows are not equally far apart."""
    outer = [(size, stride) for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size != 1]
    if any(a[1] != b[0] * b[1] for a, b in zip(outer, outer[1:], strict=False)):
        return x.contiguous(), x.shape[-1], 1
    return x, outer[-1][1] if outer else 0, x.stride(-1)


def _distances(out: Tensor) -> tuple[int, int]:
    """Those of an output's rows and entries, which no copy may take the place of."""
    rows, row, entry = _rows(out)
    assert rows is out
    return row, entry


def _parts(gate_up: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return gate_up[..., ::2], gate_up[..., 1::2]
    half = gate_up.shape[-1] // 2
    return gate_up[..., :half], gate_up[..., half:]


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, how, triton):
        ctx.save_for_backward(gate, up)
        ctx.how, ctx.triton = how, triton
        return forward(gate, up, how, triton)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        if not ctx.triton:
            return *plain_backward(gate, up, grad, ctx.how), None, None
        gate_grad = torch.empty_like(gate, memory_format=torch.contiguous_format)
        up_grad = None if up is None else torch.empty_like(gate_grad)
        _launch(gate, up, grad, ctx.how, gate_grad, up_grad)
        return gate_grad, up_grad, None, None


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, interleaved, how, triton):
        ctx.save_for_backward(gate_up)
        ctx.interleaved, ctx.how, ctx.triton = interleaved, how, triton
        return forward(*_parts(gate_up, interleaved), how, triton)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (gate_up,) = ctx.saved_tensors
        gate, up = _parts(gate_up, ctx.interleaved)
        result = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
        into = _parts(result, ctx.interleaved)
        if ctx.triton:
            _launch(gate, up, grad, ctx.how, *into)
        else:
            for part, values in zip(into, plain_backward(gate, up, grad, ctx.how), strict=True):
                assert values is not None
                part.copy_(values)
        return result, None, None, None
