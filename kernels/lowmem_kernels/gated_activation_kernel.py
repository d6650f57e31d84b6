"""act(gate) * up of a gated MLP, or act(gate) of another; or their gradients; in one reading of gate and up."""

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
    gate_ptr,  # (n, D), rows gate_row apart, entries gate_entry
    up_ptr,  # (n, D), likewise; or None
    grad_ptr,  # (n, D) d loss / d out, contiguous; or None: forward
    out_ptr,  # (n, D) written: act(gate) * up, or d loss / d gate
    up_grad_ptr,  # (n, D) written: d loss / d up; or None
    gate_row,
    up_row,
    out_row,
    up_grad_row,
    gate_entry,
    up_entry,
    out_entry,
    up_grad_entry,
    D,
    alpha,  # of silu
    limit,  # of gate from above, of up on both sides; or None
    up_offset,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < D
    dtype = out_ptr.dtype.element_ty
    gate = tl.load(gate_ptr + row * gate_row + column * gate_entry, mask=inside, other=0.0).to(tl.float32)
    if limit is not None:
        gate_moves = (gate <= limit).to(tl.float32)
        gate = tl.where(gate > limit, limit, gate)  # NaN stays
    value, slope = activation(gate, alpha, ACTIVATION)
    value = rounded(value, dtype).to(tl.float32)
    if limit is not None:
        slope *= gate_moves
    up = tl.zeros_like(gate) + 1.0
    if up_ptr is not None:
        up = tl.load(up_ptr + row * up_row + column * up_entry, mask=inside, other=0.0).to(tl.float32)
        if limit is not None:
            up_moves = (tl.abs(up) <= limit).to(tl.float32)
            up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        up = rounded(up + up_offset, dtype).to(tl.float32)
    out = out_ptr + row * out_row + column * out_entry
    if grad_ptr is None:
        tl.store(out, rounded(value * up, dtype), mask=inside)
    else:
        grad = tl.load(grad_ptr + row * D + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out, rounded(grad * up * slope, dtype), mask=inside)
        if up_grad_ptr is not None:
            up_grad = grad * value
            if limit is not None:
                up_grad *= up_moves
            at = up_grad_ptr + row * up_grad_row + column * up_grad_entry
            tl.store(at, rounded(up_grad, dtype), mask=inside)


@triton.jit
def activation(x, alpha, ACTIVATION: tl.constexpr):
    """(act(x), act'(x))."""
    if ACTIVATION == "silu":
        share = 1.0 / (1.0 + tl.exp(-alpha * x))
        return x * share, share * (1.0 + alpha * x * (1.0 - share))
    elif ACTIVATION == "relu":
        return tl.where(x < 0, 0.0, x), tl.where(x > 0, 1.0, 0.0)
    elif ACTIVATION == "relu2":
        positive = tl.where(x < 0, 0.0, x)
        return positive * positive, 2.0 * positive
    elif ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.erf(x * ROOT_HALF))
        return x * share, share + x * DENSITY_AT_0 * tl.exp(-0.5 * x * x)
    else:  # 0.5 (1 + tanh(z)) = 1 / (1 + exp(-2z)), without the difference of two numbers near 1
        z = ROOT_2_OVER_PI * (x + 0.044715 * x * x * x)
        share = 1.0 / (1.0 + tl.exp(-2.0 * z))
        return x * share, share + x * share * (1.0 - share) * 2.0 * ROOT_2_OVER_PI * (1.0 + 3 * 0.044715 * x * x)
