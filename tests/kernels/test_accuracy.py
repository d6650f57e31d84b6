"""Every engine against dense float64: odd shapes, every option, KL from 1e-6 to 10, extreme logits."""

import itertools
from dataclasses import replace

import pytest
import torch
from lowmem_kernels import FrozenHead, token_kl, token_logprobs

from tests.kernels.reference import DIRECTIONS, check, check_jointly, dense, make_case, run, run_jointly

OPTIONS = list(itertools.product((False, True), (None, 3.0), (1.0, 0.25)))  # bias, softcap, logit scale
# mean KL: the distance of the logits that gives it (its square / 2, as long as it is small)
KL_LEVELS = {1e-6: 1.5e-3, 1e-5: 5e-3, 1e-4: 0.015, 1e-3: 0.045, 1e-2: 0.14, 1e-1: 0.45, 1.0: 1.5, 10.0: 6.0}


@pytest.mark.parametrize("n, d, v", [(1, 96, 33), (7, 123, 507), (3, 507, 1000), (252, 96, 100), (2, 1, 2), (2, 16, 1)])
def test_odd_shapes(engine, n, d, v):
    case = make_case(n, d, v)
    if v > 1:  # with one token both are 0, and so are all gradients
        check_jointly(case, engine)
    check(case, engine)


def test_real_vocabulary(engine, large_blocks):
    case = make_case(3, 64, 50304)
    check(case, engine)
    check_jointly(case, engine)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("bias, softcap, logit_scale", OPTIONS)
def test_options(engine, direction, bias, softcap, logit_scale):
    case = make_case(5, 96, 301, bias=bias, softcap=softcap, logit_scale=logit_scale, direction=direction, distance=0.5)
    check(case, engine)
    check_jointly(case, engine)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_dtypes(engine, dtype, direction):
    case = make_case(6, 64, 203, dtype=dtype, direction=direction)
    check(case, engine)
    check_jointly(case, engine)
    hidden = case.hidden.requires_grad_()
    for grad in (run(case, engine).kl_grad, run_jointly(case, engine, torch.ones(6), torch.ones(6))[1]):
        assert torch.equal(grad.to(hidden.dtype).double(), grad)  # the gradient has the dtype of hidden


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    "level",
    [pytest.param(level, marks=[] if level in (1e-6, 1e-3, 10.0) else [pytest.mark.slow]) for level in KL_LEVELS],
)
def test_kl_levels(engine, level, direction):
    case = make_case(6, 160, 700, distance=KL_LEVELS[level], sharpness=1.5, direction=direction)
    assert level / 2 < dense(case).kl.mean() < 2 * level
    check(case, engine)
    check_jointly(case, engine)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_identical_hidden_is_exactly_zero(engine, direction, softcap):
    case = make_case(9, 123, 400, bias=True, softcap=softcap, direction=direction)
    outcome = run(replace(case, ref_hidden=case.hidden.clone()), engine)
    assert (outcome.kl == 0).all() and (outcome.kl_grad == 0).all()
    assert (run(case, engine).kl > 0).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_extreme_logits(engine, direction):
    """Logits of 1e4 and -1e4, ties for the first place, one dominant token, probabilities that underflow."""
    d, v = 16, 300
    weight = torch.zeros(v, d)
    weight[:, 0] = torch.linspace(-100, 100, v)
    weight[7, 1] = 50.0  # one dominant token
    weight[[3, 200], 2] = 40.0  # a tie
    hidden = torch.zeros(6, d)
    hidden[0, 0], hidden[1, 0] = 100.0, -100.0  # +-1e4
    hidden[2, 1], hidden[3, 2], hidden[4, 1], hidden[5, 2] = 2.0, 1.0, 0.1, 0.25
    ref_hidden = hidden.roll(1, 0)
    targets = torch.tensor([299, 299, 7, 3, 0, 200])
    for dtype in (torch.bfloat16, torch.float32):
        head = FrozenHead(weight.to(dtype))
        case = make_case(6, d, v, direction=direction)
        case = replace(case, hidden=hidden.to(dtype), ref_hidden=ref_hidden.to(dtype), head=head, targets=targets)
        check(case, engine)


def test_nearly_certain_targets(engine):
    """Where p(y) = 1 - 1e-7 plain float32 has no correct digit of 1 - p(y), which is the size of the gradient."""
    case = make_case(4, 32, 400, dtype=torch.float32)
    weight = case.head.weight.clone()
    weight[5] = case.hidden.sum(0) * 0
    weight[5, 0] = 24.0
    hidden = case.hidden.clone()
    hidden[:, 0] = torch.tensor([0.9, 0.95, 1.0, 1.05])
    case = replace(case, hidden=hidden, head=FrozenHead(weight), targets=torch.full((4,), 5))
    true, outcome = dense(case), run(case, engine)
    assert (true.logprobs.abs() < 1e-5).all()
    assert ((outcome.logprobs - true.logprobs) / true.logprobs).abs().max() < 1e-4
    assert ((outcome.logprob_grad - true.logprob_grad).norm(dim=1) / true.logprob_grad.norm(dim=1)).max() < 1e-4


def test_same_bits_every_run(engine):
    case = make_case(17, 96, 403)
    first, second = run(case, engine), run(case, engine)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_without_gradient_the_values_are_the_same(engine):
    case = make_case(17, 96, 403)
    with_grad = run(case, engine)
    with torch.no_grad():
        logprobs = token_logprobs(case.hidden, case.head, case.targets, engine=engine)
        kl = token_kl(case.hidden, case.ref_hidden, case.head, engine=engine)
    torch.testing.assert_close(logprobs.double(), with_grad.logprobs, rtol=1e-6, atol=0)
    torch.testing.assert_close(kl.double(), with_grad.kl, rtol=1e-4, atol=0)
