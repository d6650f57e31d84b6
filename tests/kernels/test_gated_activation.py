"""Activations, gated or not: PyTorch's own to the bit, float64 to the rounding, any shape and strides."""

import pytest
import torch
from lowmem_kernels import act, glu, packed_glu
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from tests.kernels.rowwise_reference import GPT_OSS, check_act, check_glu, check_packed, gated, normal

ACTIVATIONS = {  # by transformers' name
    "silu": "silu",
    "gelu": "gelu",
    "gelu-tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


@pytest.fixture(params=["torch", "triton"])
def engine(request) -> str:
    return request.param


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_definition(engine, activation):
    check_glu(engine, activation=activation)
    check_act(engine, activation)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("how", [{}, GPT_OSS], ids=["SwiGLU", "gpt-oss"])
def test_dtypes(engine, how, dtype):
    check_glu(engine, dtype=dtype, **how)
    check_packed(engine, dtype=dtype, interleaved=bool(how), **how)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gate_and_up_in_one_tensor(engine, interleaved):
    check_packed(engine, interleaved=interleaved, **GPT_OSS)
    for rows in ((1,), (), (1, 1), (3, 1), (0,), (2, 0)):  # none: an expert without tokens
        check_packed(engine, interleaved=interleaved, rows=rows, d=24, dtype=torch.float32, **GPT_OSS)


def test_the_experts_of_gpt_oss(engine):
    """They round in between, in bfloat16; in float32 they are the same to the last digits, also at the limit itself."""
    experts = GptOssExperts.__new__(GptOssExperts)
    torch.nn.Module.__init__(experts)
    experts.alpha, experts.limit = 1.702, 7.0
    gate_up = 5 * normal(6, 40, dtype=torch.float32)
    gate_up[0, :4] = torch.tensor([7.0, 7.0, -7.0, -7.0])
    leaves = [gate_up.clone().requires_grad_() for _ in range(2)]
    ours = packed_glu(leaves[0], interleaved=True, alpha=1.702, limit=7.0, up_offset=1.0, engine=engine)
    theirs = experts._apply_gate(leaves[1])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y, x in zip((ours, theirs), leaves, strict=True)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-4)


def test_a_number_that_is_none_stays_one(engine):
    """A limit hides no divergence."""
    x = torch.full((1, 4), torch.nan)
    for y in (glu(x, x, limit=1.0, engine=engine), act(x, "relu2", engine=engine), act(x, "relu", engine=engine)):
        assert y.isnan().all()


@pytest.mark.parametrize("n, d", [(1, 1), (12, 5), (3, 507), (2, 1024), (2, 2500)])
def test_odd_shapes(engine, n, d):
    check_glu(engine, n=n, d=d)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_activations_of_transformers_to_the_bit(engine, activation):
    gate, up = normal(40, 100, seed=1), normal(40, 100, seed=2)
    theirs = ACT2FN[ACTIVATIONS[activation]](gate) * up
    ours = glu(gate, up, activation, engine=engine)
    same = (theirs == ours).double().mean().item()
    assert same > 0.998, f"{same:.4f} of the bits"
    # PyTorch's own loses the digits of a GELU far below 0, in 1 + tanh or 1 + erf
    torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_from_zero(engine, activation):
    """Where an exponential overflows, or 0 / 0 and 0 * inf lie near."""
    gate = torch.tensor([[-1e4, -200.0, -90.0, -20.0, 0.0, 20.0, 200.0, 1e4]], requires_grad=True)
    up = torch.full_like(gate, 2.0).requires_grad_()
    y = glu(gate, up, activation, engine=engine)
    grads = torch.autograd.grad(y.sum(), (gate, up))
    wide = [x.detach().double().clamp(-100, None).requires_grad_() for x in (gate, up)]
    true = torch.autograd.grad(gated(*wide, activation).sum(), wide)
    torch.testing.assert_close(y.double(), gated(*wide, activation), rtol=1e-5, atol=1e-6)
    for ours, exact in zip(grads, true, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)


def test_strides(engine):
    """The two halves of a fused projection, as in Phi-3; a transposed tensor; a gradient in another order."""
    both, other = normal(2, 5, 24, seed=1), normal(2, 12, 5, seed=2).transpose(1, 2)
    for gate, up in ((both[..., :12], both[..., 12:]), (both[..., 12:], other), (other, both[:, :, ::2])):
        leaves = [x.detach().requires_grad_() for x in (gate, up)]
        plain = [x.detach().contiguous().requires_grad_() for x in (gate, up)]
        y, expected = glu(*leaves, engine=engine), F.silu(plain[0]) * plain[1]
        torch.testing.assert_close(y, expected, rtol=2**-7, atol=1e-6)
        upstream = normal(2, 12, 5, seed=3).transpose(1, 2)
        for a, b in zip(
            *(torch.autograd.grad(z, x, upstream) for z, x in ((y, leaves), (expected, plain))), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=2**-5, atol=2**-7)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 4)])
def test_nothing_to_gate(engine, shape):
    gate = torch.empty(shape, requires_grad=True)
    y = glu(gate, gate.detach(), engine=engine)
    y.sum().backward()
    assert y.shape == gate.grad.shape == shape


def test_only_gate_and_up_are_kept(engine):
    gate, up, kept = normal(4, 8).requires_grad_(), normal(4, 8), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        glu(gate, up, engine=engine)
    assert {t.data_ptr() for t in kept} == {gate.data_ptr(), up.data_ptr()}


X = torch.randn(3, 4)
BAD = {
    "gate must be bfloat16": dict(gate=X.double()),
    "up is torch.float16, but gate is torch.float32": dict(up=X.half()),
    "up is on meta": dict(up=X.to("meta")),
    "up must have the shape of gate": dict(up=X[:1]),
    "activation must be 'silu', 'gelu', 'gelu-tanh', 'relu' or 'relu2', not 'tanh'": dict(activation="tanh"),
    "alpha is for 'silu', not for 'gelu'": dict(activation="gelu", alpha=1.702),
    "limit must be a positive number, not 0": dict(limit=0),
    "engine must be": dict(engine=""),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_call(message):
    glu(X, X, engine="torch")
    with pytest.raises(ValueError, match=message):
        glu(**{**dict(gate=X, up=X, engine="torch"), **BAD[message]})


def test_one_tensor_must_have_two_parts():
    with pytest.raises(ValueError, match=r"gate_up must have shape \(..., 2 d\), not \(3, 5\)"):
        packed_glu(torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"x must have shape \(..., d\), not \(\)"):
        act(torch.tensor(1.0), "silu")
