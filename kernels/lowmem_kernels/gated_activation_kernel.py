"""act(gate) * up of a gated MLP, or both gradients of it, in one reading of gate and up."""

import triton
import triton.language as tl

from lowmem_kernels.device_math import rounded

BLOCK = 1024
NUM_WARPS = 4
ROOT_HALF = tl.constexpr(0.7071067811865476)  # sqrt(1/2)
DENSITY_AT_0 = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
ROOT_2_OVER_PI = tl.constexpr(0.7978845608028654)


@triton.jit
def glu_kernel(
    gate_ptr,  # (n, D), rows gate_stride apart
    up_ptr,  # (n, D), rows up_stride apart
    grad_ptr,  # (n, D) d loss / d out, contiguous; or None: forward
    out_ptr,  # (n, D) written, contiguous: act(gate) * up, or d loss / d gate
    up_grad_ptr,  # (n, D) written, contiguous: d loss / d up; or None
    gate_stride,
    up_stride,
    D,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < D
    dtype = out_ptr.dtype.element_ty
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    value, slope = activation(gate, ACTIVATION)
    value = rounded(value, dtype).to(tl.float32)
    at = row * D + column
    if grad_ptr is None:
        tl.store(out_ptr + at, rounded(value * up, dtype), mask=inside)
    else:
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, rounded(grad * up * slope, dtype), mask=inside)
        tl.store(up_grad_ptr + at, rounded(grad * value, dtype), mask=inside)


@triton.jit
def activation(x, ACTIVATION: tl.constexpr):
    """(act(x), act'(x))."""
    if ACTIVATION == "silu":
        share = 1.0 / (1.0 + tl.exp(-x))
        return x * share, share * (1.0 + x * (1.0 - share))
    elif ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.erf(x * ROOT_HALF))
        return x * share, share + x * DENSITY_AT_0 * tl.exp(-0.5 * x * x)
    else:  # 0.5 (1 + tanh(z)) = 1 / (1 + exp(-2z)), without the difference of two numbers near 1
        z = ROOT_2_OVER_PI * (x + 0.044715 * x * x * x)
        share = 1.0 / (1.0 + tl.exp(-2.0 * z))
        return x * share, share + x * share * (1.0 - share) * 2.0 * ROOT_2_OVER_PI * (1.0 + 3 * 0.044715 * x * x)
