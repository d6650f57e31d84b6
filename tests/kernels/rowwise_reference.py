"""Norms, rotary embeddings and gated activations by their definitions, in any dtype, and what the kernels must reach.

The forms that round are those of transformers' modules, written out here so that the kernels are compared with them to
the bit; in float64 they are the exact values.
"""

from types import ModuleType

import lowmem_kernels
import torch
from torch import Tensor
from torch.nn import functional as F

UNIT = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-23}  # of the last place, relative
NOISE = 3e-6  # of float32 arithmetic with a few thousand terms, relative to a row's largest entry


def rms(x: Tensor, weight: Tensor | None, eps: float, offset: float, round_first: bool) -> Tensor:
    """As LlamaRMSNorm (round_first), Olmo2RMSNorm and, with offset 1, GemmaRMSNorm compute it."""
    high = x if x.dtype == torch.float64 else x.to(torch.float32)
    y = high * torch.rsqrt(high.pow(2).mean(-1, keepdim=True) + eps)
    if round_first:
        y = y.to(x.dtype)
        return y if weight is None else (weight.to(x.dtype) + offset) * y
    return (y if weight is None else y * (offset + weight.to(y.dtype))).to(x.dtype)


def layer(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    high = x.dtype if x.dtype == torch.float64 else torch.float32
    weight, bias = (None if part is None else part.to(high) for part in (weight, bias))
    return F.layer_norm(x.to(high), x.shape[-1:], weight, bias, eps).to(x.dtype)


def turned(x: Tensor, cos: Tensor, sin: Tensor, layout: str, by_pair: bool, round_once: bool) -> Tensor:
    """As transformers' apply_rotary_pos_emb does it for (B, H, S, D) x."""
    if x.dtype == torch.float64:
        cos, sin = cos.double(), sin.double()
    elif round_once:
        cos, sin = cos.float(), sin.float()
    if by_pair and layout == "pairs":
        cos, sin = (t.repeat_interleave(2, dim=-1) for t in (cos, sin))
    elif by_pair:
        cos, sin = (torch.cat((t, t), dim=-1) for t in (cos, sin))
    cos, sin = cos[:, None], sin[:, None]
    rotated, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    if layout == "pairs-to-halves":  # as DeepSeek-V3 once wrote it
        rotated = rotated.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    if layout == "pairs":
        other = torch.stack((-rotated[..., 1::2], rotated[..., 0::2]), dim=-1).flatten(-2)
    else:
        half = rotated.shape[-1] // 2
        other = torch.cat((-rotated[..., half:], rotated[..., :half]), dim=-1)
    return torch.cat(((rotated * cos + other * sin).to(x.dtype), rest), dim=-1)


def gated(
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    alpha: float = 1.0,
    limit: float = torch.inf,
    up_offset: float = 0.0,
) -> Tensor:
    """As LlamaMLP or, with a limit, gpt-oss's experts; without up, as an MLP that has no gate."""
    act = {
        "silu": lambda x: x / (1 + torch.exp(-alpha * x)),
        "gelu": lambda x: x * torch.special.ndtr(x),
        "gelu-tanh": lambda x: x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)),
        "relu": torch.relu,
        "relu2": lambda x: torch.relu(x) ** 2,
    }[activation]
    high = gate.dtype if gate.dtype == torch.float64 else torch.float32
    value = act(gate.clamp(max=limit).to(high)).to(gate.dtype)
    return value if up is None else value * (up.clamp(-limit, limit) + up_offset)


def gradients(function, inputs: list[Tensor], upstream: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of `inputs`, detached."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    grads = torch.autograd.grad(outputs, leaves, [g.to(y.dtype) for y, g in zip(outputs, upstream, strict=True)])
    return [y.detach() for y in outputs], list(grads)


def check(ours, plain, inputs: list[Tensor], roundings: int, *, of_terms: bool = False, seed: int = 0) -> None:
    """Asserts that `ours` agrees with `plain`, the same function written with PyTorch's operators for any dtype.

    Values have the bits of `plain` but for one in fifty, which is one unit in the last place off; against float64 they
    have the error of `roundings` roundings. Gradients have the error of two, and are no worse than those of `plain`.
    With `of_terms`, roundings are of terms as large as the row's largest entry, whatever is left of them in the sum.
    """
    g = torch.Generator(inputs[0].device).manual_seed(seed)
    dtype = inputs[0].dtype
    like = [x.detach() for x in inputs]
    outputs = plain(*like)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [torch.randn(y.shape, generator=g, device=y.device).to(dtype) for y in outputs]
    values, grads = gradients(ours, like, upstream)
    plain_values, plain_grads = gradients(plain, like, upstream)
    true_values, true_grads = gradients(plain, [x.double() for x in like], [u.double() for u in upstream])
    for value, by_plain, true in zip(values, plain_values, true_values, strict=True):
        assert value.dtype == by_plain.dtype == dtype and value.shape == by_plain.shape
        assert_close(value, true, roundings, of_terms)
        if dtype != torch.float32 and value.numel():
            assert (value == by_plain).double().mean() >= 0.98, "the bits of the plain form"
    for grad, by_plain, true, x in zip(grads, plain_grads, true_grads, inputs, strict=True):
        assert grad.dtype == x.dtype and grad.shape == x.shape
        assert_close(grad, true, max(2, roundings), of_terms)
        if grad.numel():
            error, plain_error = ((y.double() - true).norm().item() for y in (grad, by_plain))
            limit = 1.1 * plain_error + 1e-6 * true.norm().item()
            assert error <= limit, f"a gradient off by {error:.1e}, the plain form's by {plain_error:.1e}"


def assert_close(value: Tensor, true: Tensor, roundings: int, of_terms: bool) -> None:
    if not value.numel():
        return
    largest = true.abs().amax(-1, keepdim=True)
    limit = roundings * UNIT[value.dtype] / 2 * (largest if of_terms else true.abs()) + NOISE * largest
    if value.dtype == torch.float16:
        limit = limit + 2.0**-24  # below 6e-5 it has fewer digits
    excess = ((value.double() - true).abs() - limit).max().item()
    assert excess <= 0, f"off by {excess:.1e} more than {roundings} roundings"


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0, device: str = "cpu") -> Tensor:
    g = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=g, device=device).to(dtype)


def check_norms(engine: str, kernels: ModuleType = lowmem_kernels, n: int = 5, d: int = 96, **of: object) -> None:
    """RMSNorm as Llama, OLMo 2 and Gemma compute it, and LayerNorm, on rows of very different sizes."""
    dtype = of.get("dtype", torch.bfloat16)
    device = of.get("device", "cpu")
    x = 3 * normal(n, d, seed=1, device=device) * torch.logspace(-3, 1, n, device=device)[:, None] + 0.01
    x = x.to(dtype)
    weight = normal(d, dtype=dtype, seed=2, device=device)
    bias = normal(d, dtype=dtype, seed=3, device=device)
    for values, offset, round_first in (
        (weight, 0.0, True),
        (weight, 0.0, False),
        (weight, 1.0, False),
        (None, 0, True),
    ):
        check(
            lambda x: kernels.rms_norm(
                x, values, eps=1e-5, offset=offset, round_first=round_first, engine=engine),  # noqa: B023
            lambda x: rms(x, values, 1e-5, offset, round_first),  # noqa: B023
            [x], 1 + (round_first and values is not None),
        )  # fmt: skip
    for values, shift, offset in ((weight, bias, 0.0), (weight, None, 1.0), (None, None, 0.0)):
        check(
            lambda x: kernels.layer_norm(x, values, shift, eps=1e-5, offset=offset, engine=engine),  # noqa: B023
            lambda x: layer(x, None if values is None else values + offset, shift, 1e-5),  # noqa: B023
            [x], 1,
        )  # fmt: skip


def tables(batch: int, tokens: int, rotated: int, layout: str, dtype: torch.dtype, device: str = "cpu"):
    """cos and sin (batch, tokens, rotated) as transformers' models make them; every row has positions of its own."""
    position = torch.arange(tokens, device=device)[None] + 3 * torch.arange(batch, device=device)[:, None]
    angle = position[..., None] * 100.0 ** (-torch.arange(0, rotated, 2, device=device) / rotated)
    angle = angle.repeat_interleave(2, dim=-1) if layout == "pairs" else torch.cat((angle, angle), dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def check_rotary(
    engine: str,
    kernels: ModuleType = lowmem_kernels,
    *,
    layout: str = "halves",
    batch: int = 2,
    tokens: int = 3,
    heads: tuple[int, int] = (6, 2),
    size: int = 12,
    rotated: int = 8,
    one_table: bool = False,
    by_pair: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    table: torch.dtype = torch.bfloat16,
    round_once: bool = False,
    device: str = "cpu",
) -> None:
    """(B, H, S, D) views of (B, S, H, D) tensors, as transformers' attention has them."""
    q, k = (normal(batch, tokens, h, size, dtype=dtype, seed=h, device=device).transpose(1, 2) for h in heads)
    cos, sin = tables(1 if one_table else batch, tokens, rotated, layout, table, device)
    if by_pair:  # views, of a stride of their own
        cos, sin = (t[..., ::2] if layout == "pairs" else t[..., : rotated // 2] for t in (cos, sin))
    round_each = dtype == table != torch.float32 and not round_once
    check(
        lambda q, k: kernels.rotary(
            q, k, cos, sin, layout=layout, by_pair=by_pair, round_once=round_once, engine=engine),
        lambda q, k: tuple(turned(x, cos, sin, layout, by_pair, round_once) for x in (q, k)),
        [q, k], 3 if round_each else 1, of_terms=round_each,
    )  # fmt: skip


GPT_OSS = {"alpha": 1.702, "limit": 1.0, "up_offset": 1.0}  # but for the limit, 7


def check_glu(
    engine: str,
    kernels: ModuleType = lowmem_kernels,
    activation: str = "silu",
    n: int = 5,
    d: int = 96,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    **how: float,
) -> None:
    """With up in a tensor of its own."""
    gate, up = (normal(n, d, dtype=dtype, seed=s, device=device) for s in (1, 2))
    check(
        lambda gate, up: kernels.glu(gate, up, activation, **how, engine=engine),
        lambda gate, up: gated(gate, up, activation, **how),
        [gate, up], 2 + ("up_offset" in how),
    )  # fmt: skip


def check_packed(
    engine: str,
    kernels: ModuleType = lowmem_kernels,
    interleaved: bool = False,
    n: int = 5,
    d: int = 96,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    rows: tuple[int, ...] | None = None,
    **how: float,
) -> None:
    """With gate and up in one tensor. rows: its outer dimensions. Default: (n,)."""
    parts = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(0, d), slice(d, None))
    check(
        lambda x: kernels.packed_glu(x, interleaved=interleaved, **how, engine=engine),
        lambda x: gated(*(x[..., part] for part in parts), "silu", **how),
        [normal(*((n,) if rows is None else rows), 2 * d, dtype=dtype, device=device)], 2 + ("up_offset" in how),
    )  # fmt: skip


def check_act(
    engine: str,
    activation: str,
    kernels: ModuleType = lowmem_kernels,
    n: int = 5,
    d: int = 96,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
) -> None:
    """Without a gate."""
    check(
        lambda x: kernels.act(x, activation, engine=engine),
        lambda x: gated(x, None, activation),
        [normal(n, d, dtype=dtype, device=device)], 1,
    )  # fmt: skip
