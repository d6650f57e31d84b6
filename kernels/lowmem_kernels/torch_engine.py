"""The algorithm in plain PyTorch: one chunk of tokens x one chunk of the vocabulary at a time. Runs on every device.

Every quantity is a statistic of a SET of vocabulary entries that can be merged with that of a disjoint set, so the
vocabulary is walked once. For a set A, with p and q the softmax of policy and reference restricted to A,

    top + rest   log sum_A exp z. Two numbers, since next to a logit of 1e4 one float32 would round it to 1e-3
    ref_top      the same as top for the reference
    shift        rest - the reference's rest: small where the two are alike, and then known to as many digits
    kl           KL(p || q), or KL(q || p)
    mean         sum_A p_i dz_i/dh
    kl_grad      d kl / dh

Merging uses the chain rule of relative entropy: the KL of the whole is the KL between the masses of the parts plus the
mass-weighted KLs inside the parts. Its terms are non-negative, so nothing cancels, however small the KL is; within a
part it is summed as p*l - (p - q), with l = log p - log q, which is non-negative for every entry. (The usual
E_p[z - z_ref] + lse_ref - lse loses a third of its value at KL 3e-6, and all of it below.)

The target is kept out of the vocabulary walk and merged last, as a set of its own. Then log p(y) = logsigmoid(z_y - lse
of the others), and d log p(y)/dh = (1 - p(y)) (dz_y/dh - mean of the others), exact also where p(y) is nearly 1.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lowmem_kernels.head import FrozenHead
from lowmem_kernels.problem import Answer, Direction, Problem

TOKENS, VOCABULARY = 256, 4096  # a tile of float32 logits is at most 4 MiB; about six are live at once
MASKED = -1e30  # a logit without weight; finite, so that masked - masked is 0 and not NaN


class Part(NamedTuple):
    """The statistics of a set of vocabulary entries for r tokens. Columns are (r, 1), rows are (r, d); float32."""

    top: Tensor
    rest: Tensor
    ref_top: Tensor | None = None
    shift: Tensor | None = None
    kl: Tensor | None = None
    mean: Tensor | None = None
    kl_grad: Tensor | None = None


def solve(problem: Problem) -> Answer:
    """The answer to `problem`, never holding N x V elements."""
    answer = problem.empty_answer()
    rows_at_once = TOKENS
    if problem.head.vocabulary <= VOCABULARY:  # one vocabulary chunk: two token chunks at least
        rows_at_once = min(TOKENS, max(1, -(-problem.num_tokens // 2)))
    for start in range(0, problem.num_tokens, rows_at_once):
        _solve_rows(problem, answer, slice(start, start + rows_at_once))
    return answer


def _solve_rows(problem: Problem, answer: Answer, rows: slice) -> None:
    head, direction = problem.head, problem.direction
    hidden = problem.hidden[rows].float()
    ref_hidden = None if problem.ref_hidden is None else problem.ref_hidden[rows].float()
    targets = None if problem.targets is None else problem.targets[rows]

    whole = None
    for first in range(0, head.vocabulary, VOCABULARY):
        part = _vocabulary_chunk(hidden, ref_hidden, head, first, targets, direction, problem.need_grad)
        whole = part if whole is None else merge(whole, part, direction)[0]

    ce_grad = None
    if targets is not None:
        others, target = whole, _target(hidden, ref_hidden, head, targets, problem.need_grad)
        whole, log_others, log_target = merge(others, target, direction)
        answer.logprobs[rows] = log_target.squeeze(1)
        if problem.need_grad and problem.ce_weight is not None:
            ce_grad = log_others.exp() * (others.mean - target.mean)
    if ref_hidden is not None:
        answer.kl[rows] = whole.kl.squeeze(1)

    if problem.need_grad:
        grad = torch.zeros_like(hidden)
        if ce_grad is not None:
            grad.addcmul_(problem.ce_weight[rows, None], ce_grad)
        if problem.kl_weight is not None:
            grad.addcmul_(problem.kl_weight[rows, None], whole.kl_grad)
        answer.grad[rows] = grad


def _vocabulary_chunk(
    hidden: Tensor,  # (r, d) float32
    ref_hidden: Tensor | None,  # (r, d) float32
    head: FrozenHead,
    first: int,
    targets: Tensor | None,  # (r,)
    direction: Direction,
    need_grad: bool,
) -> Part:
    """The statistics of the entries [first, first + VOCABULARY), targets left out."""
    entries = slice(first, first + VOCABULARY)
    weight = head.weight[entries].float()
    bias = None if head.bias is None else head.bias[entries].float()
    z, slope = _logits(product(hidden, weight), bias, head)
    _mask(z, first, targets)
    p, top, log_sum = _softmax_(z)
    if ref_hidden is None:
        return Part(top, log_sum, mean=product(_times_slope(p, slope), weight.T) if need_grad else None)

    z_ref, _ = _logits(product(ref_hidden, weight), bias, head)
    _mask(z_ref, first, targets)
    q, ref_top, ref_log_sum = _softmax_(z_ref)
    shift = log_sum - ref_log_sum
    # log(q / p). Large and nearly equal numbers are subtracted first; z and z_ref are relative to their maxima by now.
    ratio = z_ref.sub_(z).add_(shift)
    excess = difference(q, p, ratio)
    if direction == "policy-reference":
        kl = torch.addcmul(excess, p, ratio, value=-1).sum(1, keepdim=True)
    else:
        kl = torch.addcmul(-excess, q, ratio).sum(1, keepdim=True)
    if not need_grad:
        return Part(top, log_sum, ref_top, shift, kl)

    slope_kl = ratio.add_(kl).mul_(p).neg_() if direction == "policy-reference" else excess.neg_()  # d kl / dz
    kl_grad = product(_times_slope(slope_kl, slope), weight.T)
    return Part(top, log_sum, ref_top, shift, kl, product(_times_slope(p, slope), weight.T), kl_grad)


def product(rows: Tensor, weight: Tensor) -> Tensor:
    """(r, n), (m, n) -> (r, m) float32: rows @ weight.T.

    On a CPU by oneDNN: MKL, which PyTorch would call, takes twice as long on AMD's processors.
    """
    if rows.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")
    return rows @ weight.T


def _target(hidden: Tensor, ref_hidden: Tensor | None, head: FrozenHead, targets: Tensor, need_grad: bool) -> Part:
    """The statistics of the sets {target}: there the KL is 0 and the mean is dz_y/dh."""
    weight = head.weight[targets].float()
    bias = None if head.bias is None else head.bias[targets, None].float()
    z, slope = _logits((hidden * weight).sum(1, keepdim=True), bias, head)
    mean = _times_slope(weight, slope) if need_grad else None
    if ref_hidden is None:
        return Part(z, torch.zeros_like(z), mean=mean)
    z_ref, _ = _logits((ref_hidden * weight).sum(1, keepdim=True), bias, head)
    zero = torch.zeros_like(z)
    return Part(z, zero, z_ref, zero, zero, mean, torch.zeros_like(hidden) if need_grad else None)


def merge(a: Part, b: Part, direction: Direction) -> tuple[Part, Tensor, Tensor]:
    """The statistics of the union of two disjoint sets, and the log of the policy's mass on each, given the union."""
    odds = (b.top - a.top) + (b.rest - a.rest)
    log_p_a, log_p_b = logsigmoid(-odds), logsigmoid(odds)
    p_a, p_b = log_p_a.exp(), log_p_b.exp()
    top = torch.maximum(a.top, b.top)
    rest = torch.where(odds > 0, b.rest + (b.top - top) - log_p_b, a.rest + (a.top - top) - log_p_a)
    mean = None if a.mean is None else p_a * a.mean + p_b * b.mean
    if a.ref_top is None:
        return Part(top, rest, mean=mean), log_p_a, log_p_b

    ref_odds = (b.ref_top - a.ref_top) + ((b.rest - b.shift) - (a.rest - a.shift))
    gap = (b.top - a.top) - (b.ref_top - a.ref_top) + (b.shift - a.shift)  # odds - ref_odds, with all its digits
    log_q_a, log_q_b = logsigmoid(-ref_odds), logsigmoid(ref_odds)  # log of the reference's mass on each
    q_a, q_b = log_q_a.exp(), log_q_b.exp()
    ratio_a, ratio_b = _log_ratio(log_p_a, log_q_a, p_b, -gap), _log_ratio(log_p_b, log_q_b, p_a, gap)
    excess_a, excess_b = difference(q_a, p_a, ratio_a), difference(q_b, p_b, ratio_b)
    if direction == "policy-reference":
        inner = p_a, p_b
        between = (excess_a - p_a * ratio_a) + (excess_b - p_b * ratio_b)
    else:
        inner = q_a, q_b
        between = (q_a * ratio_a - excess_a) + (q_b * ratio_b - excess_b)
    kl = inner[0] * a.kl + inner[1] * b.kl + between
    kl_grad = None
    if a.kl_grad is not None:
        if direction == "policy-reference":
            outer = p_a * (a.kl - ratio_a - kl), p_b * (b.kl - ratio_b - kl)
        else:
            outer = -excess_a, -excess_b
        kl_grad = inner[0] * a.kl_grad + inner[1] * b.kl_grad + outer[0] * a.mean + outer[1] * b.mean
    ref_top = torch.maximum(a.ref_top, b.ref_top)
    # Either is the shift of the union; the one that changes less is the more accurate.
    shift_a = a.shift + ((a.top - top) - (a.ref_top - ref_top) + ratio_a)
    shift_b = b.shift + ((b.top - top) - (b.ref_top - ref_top) + ratio_b)
    shift = torch.where(odds > 0, shift_b, shift_a)
    return Part(top, rest, ref_top, shift, kl, mean, kl_grad), log_p_a, log_p_b


def difference(q: Tensor, p: Tensor, ratio: Tensor) -> Tensor:
    """q - p, given ratio = log(q / p): no cancellation where they are close, no overflow where they are not."""
    return ratio.abs().neg_().expm1_().neg_().mul_(torch.maximum(p, q)).copysign_(ratio)


def _log_ratio(log_p: Tensor, log_q: Tensor, other_p: Tensor, x: Tensor) -> Tensor:
    """log(q / p) where p / q = 1 + other_p (e^x - 1): accurate also where both are close, 0 exactly where x is 0."""
    return torch.where(x.abs() < 1, -torch.log1p(other_p * torch.expm1(x)), log_q - log_p)


def _logits(product: Tensor, bias: Tensor | None, head: FrozenHead) -> tuple[Tensor, Tensor | float | None]:
    """The logits, in place, and dz/d(product), None where it is 1 everywhere."""
    if bias is not None:
        product.add_(bias)
    if head.logit_scale != 1:
        product.mul_(head.logit_scale)
    if head.softcap is None:
        return product, None if head.logit_scale == 1 else head.logit_scale
    product.div_(head.softcap).tanh_()
    slope = product.square().neg_().add_(1).mul_(head.logit_scale)
    return product.mul_(head.softcap), slope


def _times_slope(x: Tensor, slope: Tensor | float | None) -> Tensor:
    return x if slope is None else x * slope


def _mask(z: Tensor, first: int, targets: Tensor | None) -> None:
    """Takes the targets that lie in this chunk out of it. The same steps whatever the values, so fake tensors pass."""
    if targets is not None:
        column = (targets[:, None] - first).clamp(0, z.shape[1] - 1)
        is_here = column + first == targets[:, None]
        z.scatter_(1, column, torch.where(is_here, MASKED, z.gather(1, column)))


def _softmax_(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(softmax, maximum, log-sum-exp relative to the maximum); makes z relative to the maximum, in place."""
    top = z.amax(1, keepdim=True)
    p = z.sub_(top).exp()
    total = p.sum(1, keepdim=True)
    return p.div_(total), top, total.log()
