"""RMSNorm and LayerNorm with frozen weights: differentiable in the input, which is all that the backward pass keeps.

RMSNorm    y = x / sqrt(mean(x^2) + eps) * (weight + offset)              (Zhang and Sennrich 2019)
LayerNorm  y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias         (Ba, Kiros and Hinton 2016)

All in float32, rounded once to the dtype of x; `round_first` rounds twice, as Llama's norm does. With x_hat the
normalised row and g = d loss / d x_hat, the gradient of x is (g - mean(g) - x_hat mean(g x_hat)) / sqrt(...), without
the mean(g) for RMSNorm.
"""

from dataclasses import asdict
from typing import NamedTuple

import torch
from torch import Tensor

from lowmem_kernels.launch import capability, launch
from lowmem_kernels.rowwise import RowEngine, check_device, check_floating, check_frozen, dense, fused, laid_out_like

LONGEST_ROW = 8192  # that the Triton kernel holds in its registers


class Norm(NamedTuple):
    """A norm but for the rows; the fields are the arguments of `rms_norm` and `layer_norm`."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    offset: float
    center: bool  # LayerNorm
    round_first: bool

    def scale(self, weight: Tensor) -> Tensor:
        """What multiplies the normalised rows, in float32."""
        return (weight + self.offset).float() if self.center else weight.float() + self.offset


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float,
    offset: float = 0.0,
    round_first: bool = False,
    engine: RowEngine = "auto",
) -> Tensor:
    """Each row of x over its root mean square, times a frozen weight.

    x            (..., d) bfloat16, float16 or float32, of any strides
    weight       (d,) floating point, or None; must not require grad
    offset       added to the weight: 1 in Gemma, whose weights are about 0
    round_first  rounds to the dtype of x before the weight multiplies, too: Llama, Mistral, Qwen; not Gemma, OLMo 2
    engine       auto, triton (CUDA; on a CPU only under TRITON_INTERPRET=1) or torch. Rows of more than 8192 entries
                 need torch, and get it with auto

    Returns (..., d) in the dtype of x, differentiable (once) in x. Raises ValueError, naming the argument.
    """
    return _normalise(x, Norm(weight, None, eps, offset, False, round_first), engine)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float,
    offset: float = 0.0,
    engine: RowEngine = "auto",
) -> Tensor:
    """Each row of x less its mean, over its standard deviation, times a frozen weight, plus a frozen bias.

    bias      (d,) floating point, or None; must not require grad
    offset    added to the weight, in its own dtype: 1 in Nemotron, whose weights are about 0
    the rest  as in `rms_norm`

    Returns (..., d) in the dtype of x, also under autocast; differentiable (once) in x. Raises ValueError, naming the
    argument.
    """
    return _normalise(x, Norm(weight, bias, eps, offset, True, False), engine)


def _normalise(x: Tensor, norm: Norm, engine: RowEngine) -> Tensor:
    check_floating("x", x)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have rows, shape (..., d), not {tuple(x.shape)}")
    for name, values in (("weight", norm.weight), ("bias", norm.bias)):
        if values is not None:
            if values.shape != x.shape[-1:]:
                raise ValueError(f"{name} must have shape ({x.shape[-1]},), not {tuple(values.shape)}")
            check_floating(name, values)
            check_device(name, values, ("x", x))
            check_frozen(name, values)
    if not norm.eps >= 0:
        raise ValueError(f"eps must be a number that is not negative, not {norm.eps}")
    triton = fused(x, engine)
    if triton and x.shape[-1] > LONGEST_ROW:
        if engine == "triton":
            raise ValueError(f"x has rows of {x.shape[-1]} entries; engine 'triton' takes {LONGEST_ROW}")
        triton = False
    if torch.is_grad_enabled() and x.requires_grad:
        return _Normalised.apply(x, norm, triton)
    return forward(x, norm, triton)


def forward(x: Tensor, norm: Norm, triton: bool) -> Tensor:
    return _launch(x, None, norm) if triton else plain_forward(x, norm)


def plain_forward(x: Tensor, norm: Norm) -> Tensor:
    """y, by PyTorch."""
    y, _ = _normalised(x, norm)
    if norm.round_first:
        y = y.to(x.dtype).float()
    if norm.weight is not None:
        y = y * norm.scale(norm.weight)
    if norm.bias is not None:
        y = y + norm.bias.float()
    return y.to(x.dtype)


def plain_backward(x: Tensor, grad: Tensor, norm: Norm) -> Tensor:
    """d loss / d x from grad, d loss / d y, by PyTorch."""
    y, scale = _normalised(x, norm)
    grad = grad.float()
    if norm.weight is not None:
        grad = grad * norm.scale(norm.weight)
    along = (grad * y).mean(-1, keepdim=True)
    if norm.center:
        grad = grad - grad.mean(-1, keepdim=True)
    return ((grad - y * along) * scale).to(x.dtype)


def _normalised(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """The normalised rows in float32, and what they were multiplied by."""
    x = x.float()
    if norm.center:
        x = x - x.mean(-1, keepdim=True)
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)
    return x * scale, scale


def _launch(x: Tensor, grad: Tensor | None, norm: Norm) -> Tensor:
    """y or, with grad, d loss / d x, by the kernel."""
    from lowmem_kernels.norm_kernel import norm_config, norm_kernel

    x = dense(x)
    grad = None if grad is None else laid_out_like(grad, x)
    out = torch.empty_like(x)
    d = x.shape[-1]
    rows = x.numel() // d
    config = norm_config(capability(x.device), d)
    launch(
        norm_kernel,
        (-(-rows // config.ROWS),),
        x_ptr=x,
        grad_ptr=grad,
        weight_ptr=None if norm.weight is None else norm.weight.contiguous(),
        bias_ptr=None if norm.bias is None else norm.bias.contiguous(),
        out_ptr=out,
        num_rows=rows,
        D=d,
        eps=float(norm.eps),
        offset=float(norm.offset),
        CENTER=norm.center,
        ROUND_FIRST=norm.round_first,
        **asdict(config),
    )
    return out


class _Normalised(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm, triton):
        ctx.save_for_backward(x)
        ctx.norm, ctx.triton = norm, triton
        return forward(x, norm, triton)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return (_launch if ctx.triton else plain_backward)(x, grad, ctx.norm), None, None
