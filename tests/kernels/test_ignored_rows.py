"""Rows with target -100: no output, no gradient, no harm, wherever they are. NaN does not spread to other rows."""

from dataclasses import replace

import pytest
import torch
from lowmem_kernels import retain_loss, token_logprobs

from tests.kernels.reference import dense, make_case, relative, run, run_jointly

PATTERNS = {
    "first": [0],
    "last": [8],
    "both ends": [0, 1, 8],
    "scattered": [2, 5, 7],
    "all but one": [0, 1, 2, 3, 5, 6, 7, 8],
    "all": list(range(9)),
}


@pytest.mark.parametrize("ignored", PATTERNS.values(), ids=PATTERNS)
def test_ignored_rows(engine, ignored):
    case = make_case(9, 48, 150)
    true = dense(case)
    kept = torch.ones(9, dtype=torch.bool)
    kept[ignored] = False
    hidden = case.hidden.clone()
    hidden[ignored] = float("nan")  # what is there must not matter
    hidden.requires_grad_()
    targets = case.targets.masked_fill(~kept, -100)

    logprobs = token_logprobs(hidden, case.head, targets, engine=engine)
    (grad,) = torch.autograd.grad(logprobs.sum(), hidden)
    assert (logprobs[~kept] == 0).all() and (grad[~kept] == 0).all()
    assert relative(logprobs[kept].double(), true.logprobs[kept]) < 1e-4
    assert relative(grad[kept].double(), true.logprob_grad[kept]) < 1e-2

    weight = torch.full((9,), 0.5).masked_fill(~kept, float("nan"))
    loss, logprobs, kl = retain_loss(hidden, case.ref_hidden, case.head, targets, weight, 2.0, engine=engine)
    (grad,) = torch.autograd.grad(loss, hidden)
    assert (logprobs[~kept] == 0).all() and (kl[~kept] == 0).all() and (grad[~kept] == 0).all()
    assert relative(loss.double(), (-0.5 * true.logprobs + 2.0 * true.kl)[kept].sum()) < 1e-3
    assert relative(grad[kept].double(), (-0.5 * true.logprob_grad + 2.0 * true.kl_grad)[kept]) < 1e-2


@pytest.mark.parametrize("n", [0, 3])
def test_no_rows_at_all(engine, n):
    case = make_case(3, 48, 150)
    hidden = case.hidden[:n].clone().requires_grad_()
    targets = torch.full((n,), -100)
    loss, logprobs, kl = retain_loss(hidden, case.ref_hidden[:n], case.head, targets, 1.0, 1.0, engine=engine)
    loss.backward()
    assert loss == 0 and logprobs.shape == kl.shape == (n,) and (hidden.grad == 0).all()


def test_nan_stays_in_its_row(engine):
    case = make_case(5, 48, 150)
    spoiled = case.hidden.clone()
    spoiled[2, 7] = float("nan")
    clean, outcome = run(case, engine), run(replace(case, hidden=spoiled), engine)
    joint = run_jointly(replace(case, hidden=spoiled), engine, torch.ones(5), torch.ones(5))
    assert joint[0].isnan()
    others = [0, 1, 3, 4]
    for name, values in zip(outcome._fields, outcome, strict=True):
        assert values[2].isnan().all(), name
        assert torch.equal(values[others], getattr(clean, name)[others]), name
    for values in joint[1:]:
        assert values[2].isnan().all() and not values[others].isnan().any()
