"""On a GPU (`pytest -m gpu`): the same checks at real sizes with the real block sizes; offsets past 2^31; memory."""

import itertools
from dataclasses import replace

import pytest
import torch
from lowmem_kernels import FrozenHead, chunks_engine, glu, retain_loss, rms_norm, rotary, token_kl, token_logprobs
from lowmem_kernels.gated_activation import ACTIVATIONS
from lowmem_kernels.rotary_embedding import LAYOUTS

from tests.kernels.reference import DIRECTIONS, check, check_jointly, dense, make_case, run, run_jointly
from tests.kernels.rowwise_reference import (
    GPT_OSS,
    check_act,
    check_glu,
    check_norms,
    check_packed,
    check_rotary,
    normal,
)
from tests.kernels.test_accuracy import KL_LEVELS, OPTIONS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

DEVICE = "cuda"
N, SAMPLED = 8192, 128  # tokens, and how many of them are compared with float64
VOCABULARIES, SIZES = (50304, 128256, 151936), (2048, 4096)
GIB, MIB = 2**30, 2**20


@pytest.fixture(autouse=True)
def small_blocks():
    """None here: the sizes are those of the GPU."""


@pytest.fixture(params=["chunks", "tiles"])
def engine(request) -> str:
    return request.param


def sample(n: int) -> torch.Tensor:
    """Evenly spaced tokens, the first and the last among them."""
    return torch.linspace(0, n - 1, min(n, SAMPLED), device=DEVICE).round().long()


def need_memory(gib: float) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / GIB
    if free < gib:
        pytest.skip(f"needs {gib:.0f} GiB of free GPU memory; there are {free:.0f}")


@pytest.mark.parametrize("v, d", itertools.product(VOCABULARIES, SIZES))
def test_real_sizes(engine, v, d):
    need_memory(3 * v * d * 8 / GIB)
    for level in (1e-6, 1e-2):
        case = make_case(N, d, v, distance=KL_LEVELS[level], sharpness=1.5, device=DEVICE)
        check(case, engine, rows=sample(N))
        check_jointly(case, engine, rows=sample(N))


@pytest.mark.parametrize("n, d, v", [(16384, 1024, 151936), (256, 8704, 262144)])
def test_offsets_past_two_to_the_31(engine, n, d, v):
    assert max(n * v, v * d) > 2**31
    need_memory(3 * v * d * 8 / GIB)
    case = make_case(n, d, v, device=DEVICE)
    case.targets[-1] = v - 1
    check(case, engine, rows=sample(n))
    check_jointly(case, engine, rows=sample(n))


@pytest.mark.parametrize("n, d, v", [(1, 96, 33), (7, 123, 507), (252, 507, 1000), (300, 512, 50277), (16, 1, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_odd_shapes(engine, n, d, v, dtype):
    case = make_case(n, d, v, dtype=dtype, device=DEVICE)
    check(case, engine)
    check_jointly(case, engine)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("bias, softcap, logit_scale", OPTIONS)
def test_options(engine, direction, bias, softcap, logit_scale):
    case = make_case(
        200, 512, 5003, bias=bias, softcap=softcap, logit_scale=logit_scale, direction=direction, distance=0.5,
        device=DEVICE,
    )  # fmt: skip
    check(case, engine)
    check_jointly(case, engine)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("level", KL_LEVELS)
def test_kl_levels(engine, level, direction):
    case = make_case(
        64, 1024, 16000, distance=KL_LEVELS[level], sharpness=1.5, direction=direction, device=DEVICE
    )  # fmt: skip
    check(case, engine)
    check_jointly(case, engine)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_identical_hidden_is_zero(engine, softcap):
    """To the bit where the kernel is ours; cuBLAS may sum the rows of one product in different orders (split-K)."""
    case = make_case(1000, 2048, 50304, bias=True, softcap=softcap, device=DEVICE)
    apart, same = run(case, engine), run(replace(case, ref_hidden=case.hidden.clone()), engine)
    kl, grad = (0.0, 0.0) if engine == "tiles" else (1e-6 * apart.kl.min(), 1e-3 * apart.kl_grad.abs().max())
    assert (apart.kl > 0).all()
    assert (same.kl <= kl).all() and (same.kl_grad.abs() <= grad).all()


def test_same_bits_every_run(engine):
    case = make_case(1000, 2048, 50304, device=DEVICE)
    ones = torch.ones(1000, device=DEVICE)
    first, second = (run(case, engine) + run_jointly(case, engine, ones, ones) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nan_and_ignored_rows_do_not_spread(engine):
    case = make_case(300, 512, 50304, device=DEVICE)
    spoiled, targets = case.hidden.clone(), case.targets.clone()
    spoiled[[0, 131, 299]] = float("nan")
    targets[0] = -100
    hidden = spoiled.requires_grad_()
    logprobs = token_logprobs(hidden, case.head, targets, engine=engine)
    (grad,) = torch.autograd.grad(logprobs.sum(), hidden)
    assert logprobs[0] == 0 and (grad[0] == 0).all()
    assert logprobs[[131, 299]].isnan().all() and grad[[131, 299]].isnan().all()
    rest = torch.tensor([row for row in range(300) if row not in (0, 131, 299)], device=DEVICE)
    true = dense(case.take(rest))
    assert ((logprobs[rest] - true.logprobs).abs() <= 1e-4 * true.logprobs.abs().clamp(min=1)).all()


def test_inside_a_compiled_function(engine):
    case = make_case(64, 256, 5000, device=DEVICE)

    def step(hidden):
        hidden = torch.tanh(hidden)
        head = FrozenHead(case.head.weight)
        loss, _, _ = retain_loss(hidden, case.ref_hidden, head, case.targets, 0.3, 0.7, engine=engine)
        return 2 * loss + token_logprobs(hidden, head, case.targets, engine=engine).square().sum()

    hidden = case.hidden.requires_grad_()
    expected, compiled = step(hidden), torch.compile(step, fullgraph=True)(hidden)
    torch.testing.assert_close(compiled, expected, rtol=1e-3, atol=0)
    grads = [torch.autograd.grad(x, hidden)[0].float() for x in (expected, compiled)]
    assert (grads[0] - grads[1]).norm() < 1e-2 * grads[0].norm()


def workspace(call) -> int:
    """Bytes at the peak beyond what was there before and what `call` returns."""
    call()  # compiles, and lets cuBLAS take its own workspace
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = sum(x.untyped_storage().nbytes() for x in call())
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - kept


@pytest.mark.parametrize("v, d", itertools.product(VOCABULARIES, SIZES))
def test_workspace(v, d):
    need_memory(4 * v * d * 2 / GIB + 2)
    case = make_case(N, d, v, device=DEVICE)
    hidden = case.hidden.requires_grad_()

    def with_gradient(function, *arguments):
        values = function(hidden, *arguments, engine="chunks")
        values = values if isinstance(values, tuple) else (values,)
        return *(x.detach() for x in values), torch.autograd.grad(values[0].sum(), hidden)[0]

    calls = {
        "logprobs": lambda: with_gradient(token_logprobs, case.head, case.targets),
        "kl": lambda: with_gradient(token_kl, case.ref_hidden, case.head),
        "both": lambda: with_gradient(retain_loss, case.ref_hidden, case.head, case.targets, 1.0, 1.0),
    }
    for name, call in calls.items():
        assert workspace(call) <= chunks_engine.WORKSPACE_BYTES == 256 * MIB, name
    with torch.no_grad():
        assert workspace(lambda: (token_logprobs(hidden, case.head, case.targets, engine="tiles"),)) <= 4 * MIB
        assert workspace(lambda: (token_kl(hidden, case.ref_hidden, case.head, engine="tiles"),)) <= 4 * MIB


DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, d", [(8192, 4096), (131072, 128), (2048, 8192), (252, 507), (3, 5000)])
def test_norms(n, d, dtype):
    check_norms("triton", n=n, d=d, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("by_pair", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rotary(layout, by_pair, dtype):
    for table in {dtype, torch.float32}:
        check_rotary(
            "triton", layout=layout, by_pair=by_pair, batch=4, tokens=507, heads=(32, 8), size=128, rotated=128,
            dtype=dtype, table=table, device=DEVICE,
        )  # fmt: skip
    check_rotary(
        "triton", layout=layout, by_pair=by_pair, tokens=252, size=123, rotated=80, dtype=dtype, table=dtype,
        device=DEVICE,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_glu(activation, dtype):
    check_glu("triton", activation=activation, n=8192, d=11008, dtype=dtype, device=DEVICE)
    check_glu("triton", activation=activation, n=252, d=507, dtype=dtype, device=DEVICE)
    check_act("triton", activation, n=252, d=507, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", [{}, GPT_OSS], ids=["SwiGLU", "gpt-oss"])
def test_packed_glu(how, dtype):
    check_packed("triton", n=8192, d=2880, dtype=dtype, device=DEVICE, interleaved=bool(how), **how)
    check_packed("triton", n=252, d=507, dtype=dtype, device=DEVICE, interleaved=not how, **how)


def test_rows_past_two_to_the_31():
    need_memory(20)
    x = torch.ones(2**19 + 3, 4104, dtype=torch.bfloat16, device=DEVICE)
    x[-1] = torch.linspace(-1, 1, 4104, device=DEVICE)
    assert x.numel() > 2**31
    torch.testing.assert_close(rms_norm(x, eps=0.0)[-1:], rms_norm(x[-1:], eps=0.0, engine="torch"), rtol=2**-7, atol=0)
    y = glu(x, x)
    torch.testing.assert_close(y[-1:], glu(x[-1:], x[-1:], engine="torch"), rtol=2**-6, atol=1e-6)


def test_the_layers_kernels_keep_no_copy():
    x, weight = normal(8192, 4096, device=DEVICE).requires_grad_(), normal(4096, device=DEVICE)
    assert workspace(lambda: (rms_norm(x, weight, eps=1e-5),)) <= MIB
    q = normal(4, 32, 2048, 128, device=DEVICE).requires_grad_()
    table = torch.ones(1, 2048, 128, device=DEVICE)
    assert workspace(lambda: rotary(q, q, table, table)) <= MIB
    assert workspace(lambda: (glu(x, x),)) <= MIB
