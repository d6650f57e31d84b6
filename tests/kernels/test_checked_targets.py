"""Targets that are known to be valid are not looked at, and give the same bits."""

import torch
from lowmem_kernels import dispatch, retain_loss, token_logprobs

from tests.kernels.reference import make_case


def test_checked_targets_are_not_looked_at(engine, monkeypatch):
    case = make_case(9, 48, 150)

    def run(checked):
        hidden = case.hidden.clone().requires_grad_()
        logprobs = token_logprobs(hidden, case.head, case.targets, engine=engine, checked=checked)
        joint = (case.ref_hidden, case.head, case.targets, 0.3, 0.7)
        loss, *_ = retain_loss(hidden, *joint, engine=engine, checked=checked)
        (logprobs.sum() + loss).backward()
        return logprobs, loss, hidden.grad

    looked = run(checked=False)
    monkeypatch.setattr(dispatch, "_kept_rows", lambda *_: 1 / 0)
    assert all(torch.equal(a, b) for a, b in zip(looked, run(checked=True), strict=True))
