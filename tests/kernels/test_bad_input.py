"""Bad input is a ValueError that names the argument."""

from dataclasses import replace

import pytest
import torch
from lowmem_kernels import FrozenHead, dispatch, retain_loss, token_kl, token_logprobs, torch_engine

WEIGHT = torch.randn(11, 6)
HIDDEN, TARGETS = torch.randn(4, 6), torch.tensor([0, 3, 10, 5])
HEAD = FrozenHead(WEIGHT)

BAD_HEADS = {
    "weight requires grad": dict(weight=WEIGHT.clone().requires_grad_()),
    "weight must have shape": dict(weight=WEIGHT[0]),
    "weight must be bfloat16": dict(weight=WEIGHT.double()),
    "bias must have shape": dict(weight=WEIGHT, bias=torch.zeros(10)),
    "bias must be bfloat16": dict(weight=WEIGHT, bias=torch.zeros(11, dtype=torch.int64)),
    "bias requires grad": dict(weight=WEIGHT, bias=torch.zeros(11, requires_grad=True)),
    "bias is on meta": dict(weight=WEIGHT, bias=torch.zeros(11, device="meta")),
    "softcap must be": dict(weight=WEIGHT, softcap=0.0),
    "logit_scale must be": dict(weight=WEIGHT, logit_scale=float("nan")),
}
LOGPROB, KL, RETAIN = "token_logprobs", "token_kl", "retain_loss"
BAD_CALLS = {
    "hidden must have shape": [(f, dict(hidden=torch.randn(4, 5))) for f in (LOGPROB, KL, RETAIN)],
    r"hidden must have shape \(tokens, 6\), not \(2, 2, 6\)": [(LOGPROB, dict(hidden=torch.randn(2, 2, 6)))],
    "hidden is torch.bfloat16": [(f, dict(hidden=HIDDEN.bfloat16())) for f in (LOGPROB, KL, RETAIN)],
    "hidden is on meta": [(f, dict(hidden=HIDDEN.to("meta"))) for f in (LOGPROB, KL, RETAIN)],
    "ref_hidden has 3 rows": [(f, dict(ref_hidden=HIDDEN[:3])) for f in (KL, RETAIN)],
    "ref_hidden is torch.float16": [(f, dict(ref_hidden=HIDDEN.half())) for f in (KL, RETAIN)],
    "ref_hidden may be None only if kl_weight is 0": [(RETAIN, dict(ref_hidden=None))],
    "targets must have shape": [(f, dict(targets=TARGETS[:3])) for f in (LOGPROB, RETAIN)],
    "targets must be int64": [(f, dict(targets=TARGETS.int())) for f in (LOGPROB, RETAIN)],
    "targets is on meta": [(f, dict(targets=TARGETS.to("meta"))) for f in (LOGPROB, RETAIN)],
    r"the first is targets\[1\] = 11": [(f, dict(targets=torch.tensor([0, 11, 3, 99]))) for f in (LOGPROB, RETAIN)],
    r"the first is targets\[2\] = -1": [(f, dict(targets=torch.tensor([0, -100, -1, 3]))) for f in (LOGPROB, RETAIN)],
    "direction must be": [(f, dict(direction="forward")) for f in (KL, RETAIN)],
    "engine must be": [(f, dict(engine="cuda")) for f in (LOGPROB, KL, RETAIN)],
    "ce_weight must be a number or have shape": [(RETAIN, dict(ce_weight=torch.ones(3)))],
    "kl_weight must be float32": [(RETAIN, dict(kl_weight=torch.ones(4, dtype=torch.float64)))],
    "kl_weight requires grad": [(RETAIN, dict(kl_weight=torch.ones(4, requires_grad=True)))],
}


def call(function: str, changes: dict):
    arguments = dict(
        hidden=HIDDEN, ref_hidden=HIDDEN, head=HEAD, targets=TARGETS, ce_weight=1.0, kl_weight=1.0,
        direction="policy-reference", engine="torch",
    )  # fmt: skip
    arguments |= changes
    names = {
        LOGPROB: ("hidden", "head", "targets", "engine"),
        KL: ("hidden", "ref_hidden", "head", "direction", "engine"),
        RETAIN: tuple(arguments),
    }
    functions = {LOGPROB: token_logprobs, KL: token_kl, RETAIN: retain_loss}
    return functions[function](**{name: arguments[name] for name in names[function]})


@pytest.mark.parametrize("message", BAD_HEADS)
def test_bad_head(message):
    with pytest.raises(ValueError, match=message):
        FrozenHead(**BAD_HEADS[message])


@pytest.mark.parametrize("message, function, changes", [(m, f, c) for m, calls in BAD_CALLS.items() for f, c in calls])
def test_bad_call(message, function, changes):
    call(function, {})  # nothing else is wrong
    with pytest.raises(ValueError, match=message):
        call(function, changes)


def test_a_changed_head_is_checked():
    with pytest.raises(ValueError, match="softcap"):
        replace(HEAD, softcap=-1.0)


@pytest.mark.parametrize("name", ["chunks", "tiles"])
def test_triton_engines_say_what_they_need(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=f"engine '{name}' runs on CUDA tensors, not on cpu"):
        token_logprobs(HIDDEN, HEAD, TARGETS, engine=name)
    monkeypatch.setattr(dispatch, "find_spec", lambda package: None)
    with pytest.raises(ValueError, match=f"engine '{name}' needs triton, which is not installed"):
        token_logprobs(HIDDEN, HEAD, TARGETS, engine=name)
    assert dispatch.choose_engine(is_cuda=True) == "torch"


def test_auto_engine(monkeypatch):
    assert (dispatch.choose_engine(is_cuda=True), dispatch.choose_engine(is_cuda=False)) == ("chunks", "torch")
    monkeypatch.setattr(torch_engine, "solve", lambda problem: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        token_logprobs(HIDDEN, HEAD, TARGETS)  # on a CPU, though the interpreter could run the others
