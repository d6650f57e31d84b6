"""RMSNorm and LayerNorm: transformers' own modules to the bit, float64 to the rounding, any rows and strides."""

import pytest
import torch
from lowmem_kernels import layer_norm, rms_norm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from tests.kernels.rowwise_reference import check_norms, normal

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(params=["torch", "triton"])
def engine(request) -> str:
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [96, 123])
def test_definition(engine, d, dtype):
    check_norms(engine, d=d, dtype=dtype)


@pytest.mark.parametrize("n, d", [(1, 1), (7, 5), (37, 64), (3, 507), (2, 4096)])
def test_odd_shapes(engine, n, d):
    if d == 1:  # its LayerNorm is nothing but noise
        x = normal(n, d)
        torch.testing.assert_close(rms_norm(x, eps=0.0, engine=engine), torch.sign(x))
    else:
        check_norms(engine, n=n, d=d)


def _modules(d: int):
    weight = normal(d, dtype=torch.bfloat16, seed=5)
    for kind in (LlamaRMSNorm, Olmo2RMSNorm, GemmaRMSNorm):
        module = kind(d, eps=1e-5).to(torch.bfloat16).requires_grad_(False)
        module.weight.copy_(weight)
        options = {"offset": 1.0} if kind is GemmaRMSNorm else {"round_first": kind is LlamaRMSNorm}
        yield module, lambda x, e, options=options: rms_norm(x, weight, eps=1e-5, engine=e, **options)
    yield OlmoLayerNorm(d), lambda x, e: layer_norm(x, eps=1e-5, engine=e)
    for kind, offset in ((torch.nn.LayerNorm, 0.0), (NemotronLayerNorm1P, 1.0)):
        module = kind(d).to(torch.bfloat16).requires_grad_(False)
        module.weight.copy_(weight), module.bias.copy_(weight.flip(0))
        yield module, lambda x, e, m=module, o=offset: layer_norm(x, m.weight, m.bias, eps=1e-5, offset=o, engine=e)


MODULES = ("Llama", "OLMo 2", "Gemma", "OLMo", "LayerNorm", "Nemotron")


@pytest.mark.parametrize("name", MODULES)
def test_the_modules_of_transformers_to_the_bit(engine, name):
    module, ours = list(_modules(192))[MODULES.index(name)]
    x = 3 * normal(40, 192, dtype=torch.float32, seed=7)
    x = (x * torch.logspace(-3, 1, 40)[:, None]).bfloat16()
    theirs, y = module(x), ours(x, engine)
    same = (theirs == y).double().mean().item()
    assert y.dtype == torch.bfloat16 and same >= 0.999, f"{same:.4f} of the bits"
    torch.testing.assert_close(y, theirs, rtol=2**-7, atol=1e-6)  # one unit in the last place


def test_strides(engine):
    """(B, H, S, D) views of (B, S, H, D), a slice of a wider tensor; gradients that come in another order."""
    whole, weight = normal(2, 5, 3, 40, seed=1), normal(32, seed=2)
    for x in (whole[..., :32].contiguous().transpose(1, 2), whole[..., 4:36], whole.transpose(1, 2)[..., :32]):
        x, upstream = x.detach().requires_grad_(), normal(*x.shape[:-2], 32, x.shape[-2], seed=3).transpose(-1, -2)
        plain = x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        y, expected = (rms_norm(z, weight, eps=1e-6, engine=e) for z, e in ((x, engine), (plain, "torch")))
        torch.testing.assert_close(y, expected, rtol=2**-7, atol=0)
        grads = [torch.autograd.grad(a, b, upstream)[0] for a, b in ((y, x), (expected, plain))]
        torch.testing.assert_close(*grads, rtol=2**-7, atol=1e-6)


def test_no_rows(engine):
    x = torch.empty(0, 7, 32, requires_grad=True)
    y = layer_norm(x, eps=1e-5, engine=engine)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 7, 32)


def test_rows_longer_than_the_kernel_takes():
    x = normal(1, 8193)
    torch.testing.assert_close(rms_norm(x, eps=1e-5), rms_norm(x, eps=1e-5, engine="torch"), rtol=0, atol=0)
    with pytest.raises(ValueError, match="x has rows of 8193 entries; engine 'triton' takes 8192"):
        rms_norm(x, eps=1e-5, engine="triton")


def test_only_the_input_is_kept(engine):
    x, kept = normal(6, 32).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rms_norm(x, normal(32), eps=1e-5, engine=engine)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


X, WEIGHT = torch.randn(4, 6), torch.randn(6)
BAD = {
    "x must be bfloat16, float16 or float32, not torch.float64": dict(x=X.double()),
    r"x must have rows, shape \(..., d\), not \(4, 0\)": dict(x=X[:, :0], weight=None, bias=None),
    r"x must have rows, shape \(..., d\), not \(\)": dict(x=X[0, 0], weight=None, bias=None),
    r"weight must have shape \(6,\), not \(5,\)": dict(weight=WEIGHT[:5]),
    "weight must be bfloat16, float16 or float32, not torch.int64": dict(weight=torch.ones(6, dtype=torch.int64)),
    "weight is on meta, but x is on cpu": dict(weight=WEIGHT.to("meta")),
    "weight requires grad, but it is frozen here": dict(weight=WEIGHT.clone().requires_grad_()),
    r"bias must have shape \(6,\)": dict(bias=WEIGHT[:1]),
    "bias requires grad": dict(bias=WEIGHT.clone().requires_grad_()),
    "eps must be a number that is not negative, not -1.0": dict(eps=-1.0),
    "eps must be a number": dict(eps=float("nan")),
    "engine must be 'auto', 'triton' or 'torch', not 'chunks'": dict(engine="chunks"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_call(message):
    arguments = dict(x=X, weight=WEIGHT, bias=WEIGHT, eps=1e-5, engine="torch")
    layer_norm(**arguments)  # nothing else is wrong
    with pytest.raises(ValueError, match=message):
        layer_norm(**{**arguments, **BAD[message]})


def test_the_triton_engine_says_what_it_needs(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="engine 'triton' runs on CUDA tensors, not on cpu"):
        rms_norm(X, eps=1e-5, engine="triton")
