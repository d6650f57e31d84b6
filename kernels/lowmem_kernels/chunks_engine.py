"""The training engine: cuBLAS products over a chunk of tokens x the whole vocabulary, and a Triton kernel on its rows.

For each chunk: logits = h W^T in float32 (and the reference's), the row kernel makes them the gradient's rows in place,
and one product with W gives the rows of d/dh. 2 products for log-probabilities, 3 with the KL: nothing is recomputed.
The workspace is one buffer, or two with the KL, of float32 logits for one chunk, allocated once per call.
"""

from dataclasses import asdict

import torch
import triton.language as tl
from torch import Tensor

from lowmem_kernels.launch import capability, has_values, launch
from lowmem_kernels.problem import Answer, Problem
from lowmem_kernels.row_kernel import row_config, row_kernel

WORKSPACE_BYTES = 256 * 2**20
FEWEST_TOKENS = 256  # fewer rows would leave the products waiting for W
TRITON_DTYPE = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def solve(problem: Problem) -> Answer:
    """The answer to `problem`, within WORKSPACE_BYTES of workspace (more only if FEWEST_TOKENS tokens need more)."""
    answer = problem.empty_answer()
    hidden, ref_hidden, head = problem.hidden, problem.ref_hidden, problem.head
    n, v = problem.num_tokens, head.vocabulary
    stride = -(-v // 8) * 8  # rows start at multiples of 32 bytes, which fast GEMMs need
    tokens = tokens_per_chunk(n, stride, buffers=1 if ref_hidden is None else 2)

    def buffer() -> Tensor:
        return hidden.new_empty(tokens, stride, dtype=torch.float32)

    logits, ref_logits = buffer(), None if ref_hidden is None else buffer()
    # float16 holds nothing below 6e-8: there the rows are scaled to its range, and scaled back after the product
    magnitude = hidden.new_empty(tokens, dtype=torch.float32) if hidden.dtype == torch.float16 else None
    config = row_config(capability(hidden.device))
    for start in range(0, n, tokens):
        stop = min(start + tokens, n)

        def chunk(x: Tensor | None, start=start, stop=stop) -> Tensor | None:
            return None if x is None else x[start:stop]

        z = logits[: stop - start]
        product(hidden[start:stop], head.weight.T, out=z[:, :v])
        if ref_hidden is not None:
            product(ref_hidden[start:stop], head.weight.T, out=ref_logits[: stop - start, :v])
        launch(
            row_kernel,
            (-(-(stop - start) // config.ROWS),),
            z_ptr=logits,
            ref_z_ptr=ref_logits,
            bias_ptr=head.bias,
            targets_ptr=chunk(problem.targets),
            ce_weight_ptr=chunk(problem.ce_weight) if problem.need_grad else None,
            kl_weight_ptr=chunk(problem.kl_weight) if problem.need_grad else None,
            logprobs_ptr=chunk(answer.logprobs),
            kl_ptr=chunk(answer.kl),
            magnitude_ptr=magnitude if problem.need_grad else None,
            num_rows=stop - start,
            stride=stride,
            V=v,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            POLICY_FIRST=problem.direction == "policy-reference",
            NEED_GRAD=problem.need_grad,
            GRAD_DTYPE=TRITON_DTYPE[hidden.dtype],
            **asdict(config),
        )
        if problem.need_grad:
            product(z.view(hidden.dtype)[:, :v], head.weight, out=answer.grad[start:stop])
            if magnitude is not None:
                answer.grad[start:stop].mul_(magnitude[: stop - start, None])
    return answer


def tokens_per_chunk(num_tokens: int, stride: int, buffers: int) -> int:
    """As many as the workspace holds, in steps of 128, and chunks of about the same size."""
    most = WORKSPACE_BYTES // (4 * stride * buffers) // 128 * 128
    most = max(most, FEWEST_TOKENS)
    chunks = max(1, -(-num_tokens // most))
    even = -(-num_tokens // chunks)
    return max(1, min(num_tokens, -(-even // 128) * 128))


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, accumulated in float32 and rounded once to the dtype of `out`."""
    if not has_values(a):
        return
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:  # under Triton's interpreter
        torch.mm(a.float(), b.float(), out=out)
