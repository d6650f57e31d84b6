"""Rotary position embedding (Su et al. 2021) of queries and keys at once; nothing is kept but the cosines and sines.

With R = cos.shape[-1] entries of a head rotated and the others left as they are,

    y = x cos + rotate(x) sin,    rotate(x) = (-x_2, x_1) of each pair (x_1, x_2)

layout        pairs are                    cos and sin are, as models hand them over
halves        entries i and i + R/2        one of each entry                        Llama, GPT-NeoX, OLMo
pairs         entries 2i and 2i + 1        one of each entry                        Cohere
pairs-first   entries 2i and 2i + 1        of pair i in entry i, R/2 of R are read  GLM, Ernie 4.5, Helium

The backward pass is the transpose: the rotation by the negative angle.
"""

from dataclasses import asdict
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lowmem_kernels.launch import launch
from lowmem_kernels.rowwise import RowEngine, check_device, check_floating, check_frozen, fused

Layout = Literal["halves", "pairs", "pairs-first"]
LAYOUTS: tuple[Layout, ...] = ("halves", "pairs", "pairs-first")


class Rotation(NamedTuple):
    """cos and sin (B or 1, S, R), contiguous; what the arguments of `rotary` say about them."""

    cos: Tensor
    sin: Tensor
    layout: Layout
    round_each: bool


def rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    layout: Layout = "halves",
    round_once: bool = False,
    engine: RowEngine = "auto",
) -> tuple[Tensor, Tensor]:
    """Queries and keys, rotated by the angles of their positions.

    q           (B, heads, S, D) bfloat16, float16 or float32, of any strides
    k           (B, key heads, S, D) in the dtype of q
    cos, sin    (B or 1, S, R) with R <= D even, floating point; of any strides; must not require grad
    layout      which entries form a pair: see above
    round_once  rounds only the result. Otherwise, where cos has the dtype of q, each product is rounded to it as well,
                as the plain form does; where cos is float32, the result is rounded once in any case
    engine      auto, triton (CUDA; on a CPU only under TRITON_INTERPRET=1) or torch

    Returns both in shape and dtype as they were, differentiable (once). Raises ValueError, naming the argument.
    """
    _check(q, k, cos, sin, layout)
    round_each = not round_once and q.dtype != torch.float32 and cos.dtype == q.dtype
    rotation = Rotation(cos.contiguous(), sin.contiguous(), layout, round_each)
    triton = fused(q, engine)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return _Rotated.apply(q, k, rotation.cos, rotation.sin, layout, round_each, triton)
    return rotate(q, k, rotation, False, triton)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, layout: str) -> None:
    for name, x in (("q", q), ("k", k)):
        if x.ndim != 4:
            raise ValueError(f"{name} must have shape (batch, heads, tokens, head size), not {tuple(x.shape)}")
    check_floating("q", q)
    check_floating("k", k, ("q", q))
    if (k.shape[0], *k.shape[2:]) != (q.shape[0], *q.shape[2:]):
        raise ValueError(f"k must have the shape of q but for the heads, not {tuple(k.shape)} beside {tuple(q.shape)}")
    batch, _, tokens, size = q.shape
    if cos.ndim != 3 or cos.shape[0] not in (1, batch) or cos.shape[1] != tokens:
        raise ValueError(f"cos must have shape ({batch} or 1, {tokens}, R), not {tuple(cos.shape)}")
    if cos.shape[2] > size or cos.shape[2] % 2 or not cos.shape[2]:
        raise ValueError(f"cos must have an even number of entries up to {size} a token, not {cos.shape[2]}")
    if sin.shape != cos.shape:
        raise ValueError(f"sin must have the shape of cos, {tuple(cos.shape)}, not {tuple(sin.shape)}")
    for name, x in (("cos", cos), ("sin", sin)):
        check_floating(name, x)
        check_device(name, x, ("q", q))
        check_frozen(name, x)
    if sin.dtype != cos.dtype:
        raise ValueError(f"sin is {sin.dtype}, but cos is {cos.dtype}; cast one of them")
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be 'halves', 'pairs' or 'pairs-first', not {layout!r}")


def rotate(q: Tensor, k: Tensor, rotation: Rotation, back: bool, triton: bool) -> tuple[Tensor, Tensor]:
    """Both rotated or, with `back`, multiplied by the transpose of the rotation."""
    if triton:
        return _launch(q, k, rotation, back)
    return plain_rotate(q, rotation, back), plain_rotate(k, rotation, back)


def plain_rotate(x: Tensor, rotation: Rotation, back: bool) -> Tensor:
    """The same of one tensor, by PyTorch."""
    cos, sin, layout, round_each = rotation
    rotated, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if layout == "pairs-first":
        cos, sin = (table.chunk(2, -1)[0].repeat_interleave(2, -1) for table in (cos, sin))
    if not round_each:
        rotated, cos, sin = rotated.float(), cos.float(), sin.float()
    # the transpose of x -> partner(x) sin is x -> -partner(x sin)
    turned = -partner(rotated * sin, layout) if back else partner(rotated, layout) * sin
    y = rotated * cos + turned
    return torch.cat((y.to(x.dtype), rest), -1) if rest.shape[-1] else y.to(x.dtype)


def partner(x: Tensor, layout: Layout) -> Tensor:
    """(-x_2, x_1) in place of each pair (x_1, x_2)."""
    if layout == "halves":
        x_1, x_2 = x.chunk(2, -1)
        return torch.cat((-x_2, x_1), -1)
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def _launch(q: Tensor, k: Tensor, rotation: Rotation, back: bool) -> tuple[Tensor, Tensor]:
    from lowmem_kernels.rotary_embedding_kernel import rotary_config, rotary_kernel

    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    batch, heads, tokens, size = q.shape
    rotated = rotation.cos.shape[-1]
    strides = {
        f"{name}_{dimension}": x.stride(index)
        for name, x in (("q", q), ("k", k), ("q_out", q_out), ("k_out", k_out))
        for index, dimension in enumerate(("batch", "head", "token"))
    }
    launch(
        rotary_kernel,
        (batch * tokens if heads and k.shape[1] else 0,),
        q_ptr=q,
        k_ptr=k,
        cos_ptr=rotation.cos,
        sin_ptr=rotation.sin,
        q_out_ptr=q_out,
        k_out_ptr=k_out,
        S=tokens,
        D=size,
        R=rotated,
        q_heads=heads,
        k_heads=k.shape[1],
        **strides,
        table_batch=rotation.cos.stride(0) if rotation.cos.shape[0] > 1 else 0,
        PAIRED=rotation.layout != "halves",
        FIRST_HALF=rotation.layout == "pairs-first",
        ROUND_EACH=rotation.round_each,
        enable_fp_fusion=False,  # on bfloat16 units it would leave the rounding of a product out
        BACKWARD=back,
        **asdict(rotary_config(size, rotated, heads)),
    )
    return q_out, k_out


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, layout, round_each, triton):
        ctx.save_for_backward(cos, sin)
        ctx.how = layout, round_each
        ctx.triton = triton
        return rotate(q, k, Rotation(cos, sin, layout, round_each), False, triton)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, q_grad, k_grad):
        rotation = Rotation(*ctx.saved_tensors, *ctx.how)
        return *rotate(q_grad, k_grad, rotation, True, ctx.triton), None, None, None, None, None
