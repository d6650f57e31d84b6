"""The engine that puts no logits into memory: Triton kernels that walk the vocabulary in tiles.

Without a gradient: one sweep (tile_statistics.py), the work of 1 product, 2 with the KL; the workspace is a few numbers
per token. With a gradient the logits are computed again (tile_gradient.py): the work of 3 products, 5 with the KL.
"""

from dataclasses import asdict
from operator import itemgetter

import torch
from torch import Tensor

from lowmem_kernels.launch import capability, launch
from lowmem_kernels.problem import Answer, Problem
from lowmem_kernels.tile_config import TileConfig, logits_config, product_config, shares_of_vocabulary
from lowmem_kernels.tile_gradient import product_kernel, slope_kernel
from lowmem_kernels.tile_statistics import finalise_kernel, sweep_kernel

TOKENS, VOCABULARY = 2048, 4096  # of the gradient's buffers: 16 MiB of slopes, and TOKENS float32 rows of d hidden


def solve(problem: Problem) -> Answer:
    """The answer to `problem`, never holding more than TOKENS x VOCABULARY entries, and those only for a gradient."""
    answer = problem.empty_answer()
    if not problem.need_grad:
        _sweep(problem, answer, None)
        return answer
    n, v, d = problem.num_tokens, problem.head.vocabulary, problem.hidden.shape[1]
    tokens, columns = min(TOKENS, n), min(VOCABULARY, -(-v // 8) * 8)
    slopes = problem.hidden.new_empty(tokens, columns)
    sums = problem.hidden.new_empty(tokens, d, dtype=torch.float32) if v > columns else None
    for start in range(0, n, TOKENS):
        some = itemgetter(slice(start, start + TOKENS))
        part, part_answer = problem.map_rows(some), answer.map(some)
        per_token = {
            "others_ptr": part.hidden.new_empty(part.num_tokens, dtype=torch.float32),
            "magnitude_ptr": part.hidden.new_empty(part.num_tokens, dtype=torch.float32)
            if part.hidden.dtype == torch.float16  # holds nothing below 6e-8: rows are scaled to its range
            else None,
        }
        statistics = _sweep(part, part_answer, per_token)
        _gradient(part, part_answer, per_token, statistics, slopes, sums)
    return answer


def _sweep(problem: Problem, answer: Answer, per_token: dict[str, Tensor | None] | None) -> Tensor:
    """Log-probabilities and KL into `answer`; returns (shares, 5 or 2, N), the first being for the whole vocabulary."""
    hidden, n = problem.hidden, problem.num_tokens
    config = _logits_config("sweep", problem)
    row_blocks, tiles = -(-n // config.ROWS), -(-problem.head.vocabulary // config.COLUMNS)
    tiles_per_share = -(-tiles // shares_of_vocabulary(max(row_blocks, 1), tiles, _processors(hidden.device)))
    shares = -(-tiles // tiles_per_share)
    statistics = hidden.new_empty(shares, 5 if problem.ref_hidden is not None else 2, n, dtype=torch.float32)
    launch(
        sweep_kernel,
        (row_blocks, shares),
        **_inputs(problem),
        statistics_ptr=statistics,
        V=problem.head.vocabulary,
        tiles_per_share=tiles_per_share,
        EVEN_D=hidden.shape[1] % config.DEPTH == 0,
        **asdict(config),
    )
    launch(
        finalise_kernel,
        (-(-n // 16),),
        **_inputs(problem),
        ce_weight_ptr=problem.ce_weight if per_token else None,
        kl_weight_ptr=problem.kl_weight if per_token else None,
        statistics_ptr=statistics,
        logprobs_ptr=answer.logprobs,
        kl_ptr=answer.kl,
        shares=shares,
        ROWS=16,
        DEPTH=32,
        num_warps=4,
        num_stages=1,
        **(per_token or {"others_ptr": None, "magnitude_ptr": None}),
    )
    return statistics


def _gradient(
    problem: Problem,
    answer: Answer,
    per_token: dict[str, Tensor | None],
    statistics: Tensor,  # (shares, 5 or 2, N)
    slopes: Tensor,  # (TOKENS, VOCABULARY) buffer
    sums: Tensor | None,  # (TOKENS, d) float32 buffer
) -> None:
    """d loss / d hidden into `answer`."""
    (n, d), v = problem.hidden.shape, problem.head.vocabulary
    config = _logits_config("slope", problem)
    product = product_config(capability(problem.hidden.device), problem.hidden.dtype, d)
    columns = slopes.shape[1]
    for first in range(0, v, columns):
        launch(
            slope_kernel,
            (-(-n // config.ROWS), -(-columns // config.COLUMNS)),
            **_inputs(problem),
            ce_weight_ptr=problem.ce_weight,
            kl_weight_ptr=problem.kl_weight,
            statistics_ptr=statistics,
            slope_ptr=slopes,
            first_column=first,
            V=v,
            slope_stride=columns,
            EVEN_D=d % config.DEPTH == 0,
            **per_token,
            **asdict(config),
        )
        launch(
            product_kernel,
            (-(-n // product.ROWS), -(-d // product.COLUMNS)),
            slope_ptr=slopes,
            weight_ptr=problem.head.weight,
            sum_ptr=sums,
            magnitude_ptr=per_token["magnitude_ptr"],
            grad_ptr=answer.grad,
            first_column=first,
            N=n,
            V=v,
            D=d,
            weight_stride_v=problem.head.weight.stride(0),
            weight_stride_d=problem.head.weight.stride(1),
            slope_stride=columns,
            IS_FIRST=first == 0,
            IS_LAST=first + columns >= v,
            **asdict(product),
        )


def _inputs(problem: Problem) -> dict:
    """The arguments that all kernels over logits share."""
    hidden, ref_hidden, head = problem.hidden, problem.ref_hidden, problem.head
    ref_strides = (1, 1) if ref_hidden is None else ref_hidden.stride()
    return {
        "hidden_ptr": hidden,
        "ref_hidden_ptr": ref_hidden,
        "weight_ptr": head.weight,
        "bias_ptr": head.bias,
        "targets_ptr": problem.targets,
        "N": problem.num_tokens,
        "D": hidden.shape[1],
        "hidden_stride_n": hidden.stride(0),
        "hidden_stride_d": hidden.stride(1),
        "ref_hidden_stride_n": ref_strides[0],
        "ref_hidden_stride_d": ref_strides[1],
        "weight_stride_v": head.weight.stride(0),
        "weight_stride_d": head.weight.stride(1),
        "softcap": head.softcap,
        "logit_scale": head.logit_scale,
        "POLICY_FIRST": problem.direction == "policy-reference",
    }


def _logits_config(kernel: str, problem: Problem) -> TileConfig:
    hidden, (n, d) = problem.hidden, problem.hidden.shape
    extras = (problem.ref_hidden is not None) + (problem.head.softcap is not None)
    return logits_config(kernel, capability(hidden.device), hidden.dtype, d, extras, n)


def _processors(device: torch.device) -> int:
    """Streaming multiprocessors; those of a 24 GB card where there is no GPU to ask."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 82
