"""Rotary position embedding (Su et al. 2021) of queries and keys at once; nothing is kept but the cosines and sines.

With R entries of a head rotated and the others left as they are,

    y = x cos + rotate(x) sin,    rotate(x) = (-x_2, x_1) of each pair (x_1, x_2)

layout           pairs are
halves           entries i and i + R/2                                Llama, GPT-NeoX, OLMo; gpt-oss: by_pair
pairs            entries 2i and 2i + 1                                Cohere; GPT-J, GLM, Llama 4, DeepSeek-V2: by_pair
pairs-to-halves  entries 2i and 2i + 1 of x, i and i + R/2 of y       DeepSeek-V3

cos and sin have one entry of each entry of y, R in all or, `by_pair`, one of each pair, R/2 in all. The backward pass
is the transpose: the rotation by the negative angle.
"""

from dataclasses import asdict
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lowmem_kernels.launch import launch
from lowmem_kernels.rowwise import RowEngine, check_device, check_floating, check_frozen, fused

Layout = Literal["halves", "pairs", "pairs-to-halves"]
LAYOUTS: tuple[Layout, ...] = ("halves", "pairs", "pairs-to-halves")


class Rotation(NamedTuple):
    """cos and sin (B or 1, S, R, or R/2 by pair), of the same strides; what the arguments of `rotary` say of them."""

    cos: Tensor
    sin: Tensor
    layout: Layout
    by_pair: bool
    round_each: bool

    @property
    def rotated(self) -> int:
        """Entries of a head that are rotated."""
        return self.cos.shape[-1] * (2 if self.by_pair else 1)


def rotary(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    layout: Layout = "halves",
    by_pair: bool = False,
    round_once: bool = False,
    engine: RowEngine = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Queries and keys, rotated by the angles of their positions.

    q           (B, heads, S, D) bfloat16, float16 or float32, of any strides
    k           (B, key heads, S, D) in the dtype of q; or None
    cos, sin    (B or 1, S, R) with R <= D even or, by_pair, (B or 1, S, R/2); floating point, of any strides; must not
                require grad
    layout      which entries form a pair: see above
    by_pair     cos and sin have one entry a pair
    round_once  rounds only the result. Otherwise, where cos has the dtype of q, each product is rounded to it as well,
                as the plain form does; where cos is float32, the result is rounded once in any case
    engine      auto, triton (CUDA; on a CPU only under TRITON_INTERPRET=1) or torch

    Returns both in shape and dtype as they were (None for None), differentiable (once). Raises ValueError, naming the
    argument.
    """
    _check(q, k, cos, sin, layout, by_pair)
    round_each = not round_once and q.dtype != torch.float32 and cos.dtype == q.dtype
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    rotation = Rotation(cos, sin, layout, by_pair, round_each)
    triton = fused(q, engine)
    if torch.is_grad_enabled() and (q.requires_grad or (k is not None and k.requires_grad)):
        return _Rotated.apply(q, k, *rotation, triton)
    return rotate(q, k, rotation, False, triton)


def _check(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, layout: str, by_pair: bool) -> None:
    for name, x in (("q", q), ("k", k)):
        if x is not None and x.ndim != 4:
            raise ValueError(f"{name} must have shape (batch, heads, tokens, head size), not {tuple(x.shape)}")
    check_floating("q", q)
    if k is not None:
        check_floating("k", k, ("q", q))
        if (k.shape[0], *k.shape[2:]) != (q.shape[0], *q.shape[2:]):
            raise ValueError(
                f"k must have the shape of q but for the heads, not {tuple(k.shape)} beside {tuple(q.shape)}"
            )
    batch, _, tokens, size = q.shape
    if cos.ndim != 3 or cos.shape[0] not in (1, batch) or cos.shape[1] != tokens:
        raise ValueError(f"cos must have shape ({batch} or 1, {tokens}, R), not {tuple(cos.shape)}")
    width = cos.shape[2]
    if by_pair and not 0 < 2 * width <= size:
        raise ValueError(f"cos must have at most {size // 2} entries a token, one a pair, not {width}")
    if not by_pair and (width > size or width % 2 or not width):
        raise ValueError(f"cos must have an even number of entries up to {size} a token, not {width}")
    if sin.shape != cos.shape:
        raise ValueError(f"sin must have the shape of cos, {tuple(cos.shape)}, not {tuple(sin.shape)}")
    for name, x in (("cos", cos), ("sin", sin)):
        check_floating(name, x)
        check_device(name, x, ("q", q))
        check_frozen(name, x)
    if sin.dtype != cos.dtype:
        raise ValueError(f"sin is {sin.dtype}, but cos is {cos.dtype}; cast one of them")
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be 'halves', 'pairs' or 'pairs-to-halves', not {layout!r}")


def rotate(q: Tensor, k: Tensor | None, rotation: Rotation, back: bool, triton: bool) -> tuple[Tensor, Tensor | None]:
    """Both rotated or, with `back`, multiplied by the transpose of the rotation."""
    if triton:
        return _launch(q, k, rotation, back)
    return plain_rotate(q, rotation, back), None if k is None else plain_rotate(k, rotation, back)


def plain_rotate(x: Tensor, rotation: Rotation, back: bool) -> Tensor:
    """The same of one tensor, by PyTorch."""
    cos, sin, layout, by_pair, round_each = rotation
    rotated, rest = x[..., : rotation.rotated], x[..., rotation.rotated :]
    if by_pair:
        cos, sin = (t.repeat_interleave(2, -1) if layout == "pairs" else torch.cat((t, t), -1) for t in (cos, sin))
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if not round_each:
        rotated, cos, sin = rotated.float(), cos.float(), sin.float()
    if layout == "pairs-to-halves" and not back:
        rotated = torch.cat((rotated[..., ::2], rotated[..., 1::2]), -1)
    # the transpose of x -> partner(x) sin is x -> -partner(x sin)
    turned = -partner(rotated * sin, layout) if back else partner(rotated, layout) * sin
    y = rotated * cos + turned
    if layout == "pairs-to-halves" and back:
        y = torch.stack(y.chunk(2, -1), -1).flatten(-2)
    return torch.cat((y.to(x.dtype), rest), -1) if rest.shape[-1] else y.to(x.dtype)


def partner(x: Tensor, layout: Layout) -> Tensor:
    """(-x_2, x_1) in place of each pair (x_1, x_2)."""
    if layout == "pairs":
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    x_1, x_2 = x.chunk(2, -1)
    return torch.cat((-x_2, x_1), -1)


def _launch(q: Tensor, k: Tensor | None, rotation: Rotation, back: bool) -> tuple[Tensor, Tensor | None]:
    from lowmem_kernels.rotary_embedding_kernel import rotary_config, rotary_kernel

    q = q if q.stride(-1) == 1 else q.contiguous()
    k = k if k is None or k.stride(-1) == 1 else k.contiguous()
    q_out, k_out = torch.empty_like(q), None if k is None else torch.empty_like(k)
    batch, heads, tokens, size = q.shape
    strides = {
        f"{name}_{dimension}": 0 if x is None else x.stride(index)
        for name, x in (("q", q), ("k", k), ("q_out", q_out), ("k_out", k_out))
        for index, dimension in enumerate(("batch", "head", "token"))
    }
    table_batch, table_token, table_entry = rotation.cos.stride()
    into_halves = rotation.layout == "pairs-to-halves"
    launch(
        rotary_kernel,
        (batch * tokens if heads and (k is None or k.shape[1]) else 0,),
        q_ptr=q,
        k_ptr=k,
        cos_ptr=rotation.cos,
        sin_ptr=rotation.sin,
        q_out_ptr=q_out,
        k_out_ptr=k_out,
        S=tokens,
        D=size,
        R=rotation.rotated,
        q_heads=heads,
        k_heads=0 if k is None else k.shape[1],
        **strides,
        table_batch=table_batch if rotation.cos.shape[0] > 1 else 0,
        table_token=table_token,
        table_entry=table_entry,
        PAIRS_IN=rotation.layout == "pairs" or (into_halves and not back),
        PAIRS_OUT=rotation.layout == "pairs" or (into_halves and back),
        BY_PAIR=rotation.by_pair,
        ROUND_EACH=rotation.round_each,
        enable_fp_fusion=False,  # on bfloat16 units it would leave the rounding of a product out
        BACKWARD=back,
        **asdict(rotary_config(size, rotation.rotated, heads)),
    )
    return q_out, k_out


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, layout, by_pair, round_each, triton):
        ctx.save_for_backward(cos, sin)
        ctx.how = layout, by_pair, round_each
        ctx.triton = triton
        return rotate(q, k, Rotation(cos, sin, *ctx.how), False, triton)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, q_grad, k_grad):
        rotation = Rotation(*ctx.saved_tensors, *ctx.how)
        return *rotate(q_grad, k_grad, rotation, True, ctx.triton), *(None,) * 6
