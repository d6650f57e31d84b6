"""Rotary embeddings: every way of transformers to the bit, float64 to the rounding, any heads and strides."""

import itertools

import pytest
import torch
from lowmem_kernels import rotary
from lowmem_kernels.rotary_embedding import LAYOUTS
from transformers.models.cohere import modeling_cohere
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.ernie4_5 import modeling_ernie4_5
from transformers.models.glm import modeling_glm
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama
from transformers.models.olmo import modeling_olmo

from tests.kernels.rowwise_reference import check_rotary, normal, tables

MODELS = {  # the model's function, layout, dtype of cos, whether only the result is rounded, R of a head of 12
    "Llama": (modeling_llama.apply_rotary_pos_emb, "halves", torch.bfloat16, False, 12),
    "GPT-NeoX": (modeling_gpt_neox.apply_rotary_pos_emb, "halves", torch.bfloat16, False, 4),
    "OLMo": (modeling_olmo.apply_rotary_pos_emb, "halves", torch.float32, False, 12),
    "Cohere": (modeling_cohere.apply_rotary_pos_emb, "pairs", torch.bfloat16, True, 12),
}


def of_whole_tables(function):
    """`function`, which reads the first half of the entries of cos and sin, one a pair."""
    return lambda q, k, cos, sin: function(q, k, torch.cat((cos, cos), -1), torch.cat((sin, sin), -1))


def by_itself(q, k, cos, sin):
    """GPT-J's function takes one tensor, (B, S, heads, D), and sines first."""
    turn = modeling_gptj.apply_rotary_pos_emb
    return tuple(turn(x.transpose(1, 2), sin, cos).transpose(1, 2) for x in (q, k))


MODELS_BY_PAIR = {  # likewise
    "gpt-oss": (modeling_gpt_oss.apply_rotary_pos_emb, "halves", torch.bfloat16, False, 12),
    "GPT-J": (by_itself, "pairs", torch.bfloat16, False, 12),
    "GLM": (of_whole_tables(modeling_glm.apply_rotary_pos_emb), "pairs", torch.bfloat16, False, 8),
    "Ernie 4.5": (of_whole_tables(modeling_ernie4_5.apply_rotary_pos_emb), "pairs", torch.bfloat16, True, 12),
    "DeepSeek-V2": (
        lambda q, k, cos, sin: modeling_deepseek_v2.apply_rotary_emb(q, k, torch.complex(cos, sin)),
        *("pairs", torch.float32, False, 12),
    ),
    "DeepSeek-V3": (
        of_whole_tables(modeling_deepseek_v3.apply_rotary_pos_emb_interleave),
        *("pairs-to-halves", torch.bfloat16, False, 12),
    ),
}


@pytest.fixture(params=["torch", "triton"])
def engine(request) -> str:
    return request.param


@pytest.mark.parametrize("layout, rotated", list(itertools.product(LAYOUTS, [8, 12])))
def test_definition(engine, layout, rotated):
    check_rotary(engine, layout=layout, rotated=rotated, by_pair=rotated == 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dtypes(engine, dtype):
    check_rotary(engine, dtype=dtype, table=dtype)
    check_rotary(engine, dtype=dtype, table=torch.float32, layout="pairs", by_pair=True)


@pytest.mark.parametrize(
    "of",
    [
        dict(tokens=1, batch=1, heads=(1, 1), size=2, rotated=2),
        dict(tokens=13, batch=1, heads=(7, 7), size=123, rotated=80),
        dict(tokens=2, batch=3, heads=(12, 3), size=252, rotated=252, one_table=True),
        dict(tokens=3, batch=2, heads=(2, 1), size=256, rotated=64, table=torch.float32),
    ],
    ids=str,
)
def test_odd_shapes(engine, of):
    check_rotary(engine, **of)


@pytest.mark.parametrize("model", [*MODELS, *MODELS_BY_PAIR])
def test_the_functions_of_transformers_to_the_bit(engine, model):
    by_pair = model in MODELS_BY_PAIR
    plain, layout, table, round_once, rotated = {**MODELS, **MODELS_BY_PAIR}[model]
    q, k = normal(2, 4, 4, 12, seed=1), normal(2, 2, 4, 12, seed=2)
    cos, sin = tables(2, 4, rotated, layout, table)
    if by_pair:
        cos, sin = (t[..., ::2] if layout == "pairs" else t[..., : rotated // 2] for t in (cos, sin))
    upstream = normal(2, 4, 4, 12, seed=3), normal(2, 2, 4, 12, seed=4)
    results = []
    for function in (
        plain,
        lambda *x: rotary(*x, layout=layout, by_pair=by_pair, round_once=round_once, engine=engine),
    ):
        leaves = [x.clone().requires_grad_() for x in (q, k)]
        outputs = function(*leaves, cos, sin)
        results.append((*outputs, *torch.autograd.grad(outputs, leaves, upstream)))
    for index, (theirs, ours) in enumerate(zip(*results, strict=True)):
        if index < 2 or not (round_once or table == torch.float32):
            assert torch.equal(theirs, ours)
        else:  # autograd rounds the two parts of their gradients, ours is rounded once
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2**-7 * 3)


def test_strides(engine):
    """A slice of a fused qkv, as GPT-NeoX has it, a contiguous (B, H, S, D), an expanded table."""
    qkv = normal(2, 5, 3, 4, 16, seed=1)
    q, k = qkv[:, :, 0].transpose(1, 2)[..., :8], qkv[:, :, 1].transpose(1, 2).contiguous()[..., 2:10]
    cos, sin = (t.expand(2, -1, -1) for t in tables(1, 5, 8, "halves", torch.bfloat16))
    expected = rotary(*(x.contiguous() for x in (q, k, cos, sin)), engine="torch")
    for a, b in zip(rotary(q, k, cos, sin, engine=engine), expected, strict=True):
        assert torch.equal(a, b)


def test_queries_without_keys(engine):
    q, tables_ = normal(2, 4, 3, 12), tables(2, 3, 8, "pairs", torch.bfloat16)
    (alone, none), (beside, _) = (rotary(q.requires_grad_(), k, *tables_, engine=engine) for k in (None, q))
    assert none is None and torch.equal(alone, beside)
    assert torch.equal(*(torch.autograd.grad(y.float().square().sum(), q)[0] for y in (alone, beside)))


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 3, 0), (2, 0, 5)])
def test_nothing_to_rotate(engine, shape):
    batch, heads, tokens = shape
    q = torch.empty(batch, heads, tokens, 8, requires_grad=True)
    table = torch.ones(1, tokens, 8)
    y, _ = rotary(q, q, table, table, engine=engine)
    y.sum().backward()
    assert y.shape == q.grad.shape == q.shape


def test_nothing_is_kept_but_the_angles(engine):
    q, (cos, sin), kept = normal(1, 2, 3, 8).requires_grad_(), tables(1, 3, 8, "halves", torch.float32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rotary(q, q.detach(), cos, sin, engine=engine)
    assert {t.data_ptr() for t in kept} == {cos.data_ptr(), sin.data_ptr()}


Q, TABLE = torch.randn(2, 4, 3, 8), torch.randn(1, 3, 8)
BAD = {
    r"q must have shape \(batch, heads, tokens, head size\), not \(4, 3, 8\)": dict(q=Q[0]),
    "q must be bfloat16, float16 or float32, not torch.float64": dict(q=Q.double()),
    "k is torch.bfloat16, but q is torch.float32": dict(k=Q.bfloat16()),
    "k is on meta, but q is on cpu": dict(k=Q.to("meta")),
    "k must have the shape of q but for the heads": dict(k=Q[:, :, :2]),
    r"cos must have shape \(2 or 1, 3, R\), not \(1, 2, 8\)": dict(cos=TABLE[:, :2]),
    r"cos must have shape \(2 or 1, 3, R\), not \(3, 8\)": dict(cos=TABLE[0]),
    "cos must have an even number of entries up to 8 a token, not 7": dict(cos=TABLE[..., :7]),
    "cos must have an even number of entries up to 8 a token, not 10": dict(cos=torch.ones(1, 3, 10)),
    "cos must have at most 4 entries a token, one a pair, not 8": dict(by_pair=True),
    r"sin must have the shape of cos, \(1, 3, 8\)": dict(sin=TABLE[..., :6]),
    "sin requires grad": dict(sin=TABLE.clone().requires_grad_()),
    "sin is torch.bfloat16, but cos is torch.float32": dict(sin=TABLE.bfloat16()),
    "cos is on meta": dict(cos=TABLE.to("meta")),
    "layout must be 'halves', 'pairs' or 'pairs-to-halves', not 'interleaved'": dict(layout="interleaved"),
    "engine must be": dict(engine="tiles"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_call(message):
    arguments = dict(q=Q, k=Q, cos=TABLE, sin=TABLE, engine="torch")
    rotary(**arguments)  # nothing else is wrong
    with pytest.raises(ValueError, match=message):
        rotary(**{**arguments, **BAD[message]})
