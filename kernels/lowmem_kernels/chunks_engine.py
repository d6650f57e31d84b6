"""The training engine: cuBLAS products over a chunk of tokens x the whole vocabulary, and a Triton kernel on its rows.

For each chunk: logits = h W^T in float32, the row kernel makes them the gradient's rows in place, and one product with
W gives the rows of d/dh. With the KL, the hidden states of policy and reference are stacked: one reading of W gives
both models' logits. The work of 2 products for log-probabilities, 3 with the KL: nothing is recomputed. The
workspace is that of one chunk, allocated once per call.
"""

from dataclasses import asdict

import torch
import triton.language as tl
from torch import Tensor

from lowmem_kernels.launch import capability, has_values, launch
from lowmem_kernels.problem import Answer, Problem
from lowmem_kernels.row_kernel import row_config, row_kernel

WORKSPACE_BYTES = 256 * 2**20
FEWEST_TOKENS = 64  # fewer rows would leave the products waiting for W
TRITON_DTYPE = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def solve(problem: Problem) -> Answer:
    """The answer to `problem`, within WORKSPACE_BYTES of workspace (more only if FEWEST_TOKENS tokens need more)."""
    answer = problem.empty_answer()
    hidden, ref_hidden, head = problem.hidden, problem.ref_hidden, problem.head
    (n, d), v = hidden.shape, head.vocabulary
    models = 1 if ref_hidden is None else 2
    stride = -(-v // 8) * 8  # rows start at multiples of 32 bytes, which fast GEMMs need
    tokens = tokens_per_chunk(n, bytes_each=models * 4 * stride + (models - 1) * 2 * d * hidden.element_size())
    logits = hidden.new_empty(models * tokens, stride, dtype=torch.float32)
    both_hidden = hidden.new_empty((models - 1) * 2 * tokens, d)
    # float16 holds nothing below 6e-8: there the rows are scaled to its range, and scaled back after the product
    magnitude = hidden.new_empty(tokens, dtype=torch.float32) if hidden.dtype == torch.float16 else None
    config = row_config(capability(hidden.device))
    for start in range(0, n, tokens):
        stop = min(start + tokens, n)

        def chunk(x: Tensor | None, start=start, stop=stop) -> Tensor | None:
            return None if x is None else x[start:stop]

        rows = stop - start
        some_hidden = hidden[start:stop]
        if ref_hidden is not None:
            some_hidden = torch.cat([some_hidden, ref_hidden[start:stop]], out=both_hidden[: 2 * rows])
        product(some_hidden, head.weight.T, out=logits[: models * rows, :v])
        z = logits[:rows]
        launch(
            row_kernel,
            (-(-rows // config.ROWS),),
            z_ptr=z,
            ref_z_ptr=None if ref_hidden is None else logits[rows : 2 * rows],
            bias_ptr=head.bias,
            targets_ptr=chunk(problem.targets),
            ce_weight_ptr=chunk(problem.ce_weight) if problem.need_grad else None,
            kl_weight_ptr=chunk(problem.kl_weight) if problem.need_grad else None,
            logprobs_ptr=chunk(answer.logprobs),
            kl_ptr=chunk(answer.kl),
            magnitude_ptr=magnitude if problem.need_grad else None,
            num_rows=rows,
            stride=stride,
            V=v,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            POLICY_FIRST=problem.direction == "policy-reference",
            NEED_GRAD=problem.need_grad,
            GRAD_DTYPE=TRITON_DTYPE[hidden.dtype],
            **asdict(config),
        )
        if answer.grad is not None:
            product(z.view(hidden.dtype)[:, :v], head.weight, out=answer.grad[start:stop])
            if magnitude is not None:
                answer.grad[start:stop].mul_(magnitude[:rows, None])
    return answer


def tokens_per_chunk(num_tokens: int, bytes_each: int) -> int:
    """As many as the workspace holds, in steps of FEWEST_TOKENS, and chunks of about the same size."""
    most = (WORKSPACE_BYTES - 2**20) // bytes_each  # 1 MiB is for the numbers per token
    most = max(most // FEWEST_TOKENS, 1) * FEWEST_TOKENS
    chunks = max(1, -(-num_tokens // most))
    even = -(-num_tokens // chunks)
    return max(1, min(num_tokens, -(-even // FEWEST_TOKENS) * FEWEST_TOKENS))


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, accumulated in float32 and rounded once to the dtype of `out`."""
    if not has_values(a):
        return
    if not a.is_cuda:  # under Triton's interpreter
        # In 16 bits, processors with AMX multiply what lies behind a row by 0, also NaN (oneDNN's issue 5717).
        out.copy_(a.float() @ b.float())
    elif a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
