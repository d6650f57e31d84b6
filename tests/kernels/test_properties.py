"""Any shape, any head, any dtype, any rows left out: the engines against dense float64."""

import os

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from lowmem_kernels import token_logprobs

from tests.kernels.reference import DIRECTIONS, check, check_jointly, dense, make_case, relative

# The interpreter takes seconds for an example; LOWMEM_EXAMPLES=1000 looks further.
EXAMPLES = settings(
    max_examples=int(os.environ.get("LOWMEM_EXAMPLES", 5)),
    deadline=None,
    derandomize="LOWMEM_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the fixtures choose engine and block sizes
)


@st.composite
def cases(draw):
    return make_case(
        draw(st.integers(1, 20), label="n"),
        draw(st.integers(8, 150), label="d"),
        draw(st.integers(2, 600), label="v"),
        distance=draw(st.sampled_from([1e-2, 0.1, 1.0])),
        sharpness=draw(st.sampled_from([0.5, 2.0, 8.0])),
        dtype=draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32])),
        bias=draw(st.booleans()),
        softcap=draw(st.sampled_from([None, 2.0, 30.0])),
        logit_scale=draw(st.sampled_from([1.0, 0.125, -2.0])),
        direction=draw(st.sampled_from(DIRECTIONS)),
        seed=draw(st.integers(0, 2**20)),
    )


@EXAMPLES
@given(case=cases(), data=st.data())
def test_any_case(engine, case, data):
    true = dense(case)
    # What the contract covers. Float32 inputs are held to 1e-4, which float32 logits cannot give for a KL below 1e-3.
    assume(true.kl.min() > (1e-3 if case.hidden.dtype == torch.float32 else 1e-6) and true.kl.max() < 20)
    check(case, engine)
    check_jointly(case, engine)
    ignored = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(case.targets), max_size=len(case.targets))))
    hidden = case.hidden.detach().requires_grad_()
    logprobs = token_logprobs(hidden, case.head, case.targets.masked_fill(ignored, -100), engine=engine)
    (grad,) = torch.autograd.grad(logprobs.sum(), hidden)
    assert (logprobs[ignored] == 0).all() and (grad[ignored] == 0).all()
    assert relative(logprobs[~ignored].double(), true.logprobs[~ignored]) < 1e-4
