"""Together with the rest of PyTorch: autograd, autocast, torch.compile, fake and meta tensors, custom-op rules."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from lowmem_kernels import FrozenHead, dispatch, retain_loss, token_kl, token_logprobs

from tests.kernels.reference import Case, make_case, relative, run, run_jointly

ROOT = Path(__file__).resolve().parents[2]


def three_losses(hidden, ref_hidden, head, targets, engine):
    hidden = torch.tanh(hidden)  # something before and after, for autograd and the compiler
    logprobs = token_logprobs(hidden, head, targets, engine=engine)
    kl = token_kl(hidden, ref_hidden, head, engine=engine)
    loss, _, _ = retain_loss(hidden, ref_hidden, head, targets, 0.3, 0.7, engine=engine)
    return torch.sigmoid(logprobs.sum() * 0.1) + kl.square().sum() + 2 * loss


def test_backward_scales_the_rows(engine):
    case = make_case(5, 32, 90)
    hidden = case.hidden.requires_grad_()
    logprobs = token_logprobs(hidden, case.head, case.targets, engine=engine)
    (unit,) = torch.autograd.grad(logprobs.sum(), hidden, retain_graph=True)
    upstream = torch.tensor([0.0, 1.0, -2.0, 0.5, 1e-3])
    (grad,) = torch.autograd.grad(logprobs, hidden, upstream)
    assert torch.equal(grad, (unit.float() * upstream[:, None]).to(grad.dtype))


def test_no_second_derivative(engine):
    case = make_case(2, 8, 20, dtype=torch.float32)
    hidden = case.hidden.requires_grad_()
    (grad,) = torch.autograd.grad(token_logprobs(hidden, case.head, case.targets).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), hidden)


def test_no_gradient_work_unless_needed(engine, monkeypatch):
    need_grad = []
    module = import_module(f"lowmem_kernels.{engine}_engine")
    solve = module.solve
    monkeypatch.setattr(module, "solve", lambda problem: (need_grad.append(problem.need_grad), solve(problem))[1])
    case = make_case(3, 8, 20)
    three_losses(case.hidden, case.ref_hidden, case.head, case.targets, engine)
    with torch.no_grad():
        three_losses(case.hidden.requires_grad_(), case.ref_hidden, case.head, case.targets, engine)
    assert need_grad == [False] * 6
    three_losses(case.hidden, case.ref_hidden, case.head, case.targets, engine)
    assert need_grad == [False] * 6 + [True] * 3


def test_weights_that_are_zero(engine):
    case = make_case(3, 16, 40)
    hidden = case.hidden.requires_grad_()

    def grad_of(ce_weight, kl_weight, ref_hidden):
        loss, logprobs, kl = retain_loss(
            hidden, ref_hidden, case.head, case.targets, ce_weight, kl_weight, engine=engine
        )
        return torch.autograd.grad(loss, hidden)[0], logprobs, kl

    zeros = torch.zeros(3)
    grad, logprobs, kl = grad_of(1.0, 0.0, None)
    assert (kl == 0).all()
    assert relative(grad_of(torch.ones(3), zeros, case.ref_hidden)[0].double(), grad.double()) < 5e-3
    grad, logprobs_too, kl = grad_of(0.0, 1.0, case.ref_hidden)
    assert (kl > 0).all() and torch.allclose(logprobs, logprobs_too, rtol=1e-6)
    assert relative(grad_of(zeros, torch.ones(3), case.ref_hidden)[0].double(), grad.double()) < 5e-3


def test_any_strides(engine):
    """Transposed matrices, every second target, one weight expanded over the rows: the same as contiguous."""
    case = make_case(6, 40, 300, bias=True)
    weights = torch.full((6,), 0.5)
    expected = run_jointly(case, engine, weights, weights)
    head = replace(case.head, weight=case.head.weight.T.contiguous().T, bias=case.head.bias.repeat_interleave(2)[::2])
    case = replace(
        case,
        hidden=case.hidden.T.contiguous().T,
        ref_hidden=torch.cat([case.ref_hidden] * 2, 1)[:, :40],
        head=head,
        targets=case.targets.repeat_interleave(2)[::2],
    )
    outcome = run_jointly(case, engine, weights[:1].expand(6), weights.repeat_interleave(2)[::2])
    for a, b in zip(outcome, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-2 * float(b.abs().max()))


def test_more_entries_than_32_bits_can_count(engine):
    """Rows of W and of the hidden states further apart than 2^31 entries; the memory between them is never touched."""

    def far_apart(matrix, step):
        space = torch.empty((len(matrix) - 1) * step + matrix.shape[1], dtype=matrix.dtype)
        return space.as_strided(matrix.shape, (step, 1)).copy_(matrix)

    case = make_case(6, 96, 35)
    far = Case(
        far_apart(case.hidden, 2**29),
        far_apart(case.ref_hidden, 2**29),
        FrozenHead(far_apart(case.head.weight, 2**26)),
        case.targets,
    )
    assert far.head.weight[-1].storage_offset() > 2**31 and far.hidden[-1].storage_offset() > 2**31
    assert all(torch.equal(one, other) for one, other in zip(run(case, engine), run(far, engine), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_changes_nothing(engine, dtype):
    case = make_case(5, 32, 90, dtype=dtype)

    def outcome():
        hidden = case.hidden.detach().requires_grad_()
        values = token_logprobs(hidden, case.head, case.targets, engine=engine)
        kl = token_kl(hidden, case.ref_hidden, case.head, engine=engine)
        return values, kl, torch.autograd.grad(values.sum() + kl.sum(), hidden)[0]

    plain = outcome()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = outcome()
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


def test_precision_settings_are_restored(engine):
    case = make_case(2, 8, 20)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        token_logprobs(case.hidden, case.head, case.targets, engine=engine)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction_split_k"),
    reason="this torch has no setting for split-K",
)
@pytest.mark.parametrize("setting", [(False, False), (True, True), (False, True)])
def test_the_setting_for_split_k_is_left_alone(setting):
    cuda = torch.backends.cuda.matmul
    name = "allow_bf16_reduced_precision_reduction"

    def current():
        return getattr(cuda, name), getattr(cuda, f"{name}_split_k")

    before = current()
    try:
        setattr(cuda, name, setting)
        with dispatch._full_precision("cpu"):
            assert current() == (False, setting[1])
        assert current() == setting
    finally:
        setattr(cuda, name, before)


def test_inside_a_compiled_function():
    """Every engine, in one other process: torch.compile cannot read bytecode in which coverage is measured."""
    code = "from tests.kernels.test_integration import check_compiled; check_compiled()"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")])},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def check_compiled():
    for engine in ("torch", "chunks", "tiles"):
        torch._dynamo.reset()
        check_compiled_engine(engine)


def check_compiled_engine(engine):
    case = make_case(5, 32, 90, dtype=torch.float32)
    weight, ref_hidden, targets = case.head.weight, case.ref_hidden, case.targets
    targets[1] = -100

    def step(hidden):
        return three_losses(hidden, ref_hidden, FrozenHead(weight), targets, engine)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    hidden = case.hidden.requires_grad_()
    expected, result = step(hidden), compiled(hidden)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(torch.autograd.grad(result, hidden), torch.autograd.grad(expected, hidden))
    with torch.no_grad():
        torch.testing.assert_close(compiled(hidden), expected)


@pytest.mark.parametrize("with_kl, with_targets", [(True, True), (True, False), (False, True)])
def test_operator_keeps_the_rules(engine, with_kl, with_targets):
    case = make_case(4, 16, 50)
    ones = torch.ones(4)
    arguments = (
        case.hidden, case.ref_hidden if with_kl else None, case.head.weight, None,
        case.targets if with_targets else None, ones if with_targets else None, ones if with_kl else None,
        None, 1.0, "policy-reference", True, engine,
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.lowmem_kernels.solve.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_meta_tensors_without_fake_mode(engine):
    hidden = torch.randn(7, 16, device="meta", requires_grad=True)
    kl = token_kl(hidden, hidden.detach(), FrozenHead(torch.randn(100, 16, device="meta")), engine=engine)
    kl.sum().backward()
    assert kl.is_meta and hidden.grad.shape == (7, 16)
