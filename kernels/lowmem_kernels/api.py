"""The public functions: they check their arguments, let an engine solve the problem, and attach the known gradient."""

import torch
from torch import Tensor

from lowmem_kernels.dispatch import Engine, solve
from lowmem_kernels.head import FrozenHead
from lowmem_kernels.problem import IGNORE_INDEX, Direction, Problem


def token_logprobs(
    hidden: Tensor, head: FrozenHead, targets: Tensor, *, engine: Engine = "auto", checked: bool = False
) -> Tensor:
    """log softmax(z_t)[targets_t] for every token t, with z the head's logits.

    hidden   (N, d) in the dtype of head.weight
    targets  (N,) int64 in [0, V), or -100: that row is ignored, its output is 0 and its gradient zero
    engine   auto, torch, or one of the Triton engines chunks and tiles (CUDA; on a CPU only under TRITON_INTERPRET=1)
    checked  the targets are known to be in [0, V), and none to be -100: they are not looked at, for which the host
             would wait for the GPU

    Returns (N,) float32, differentiable (once) in hidden. Raises ValueError, naming the argument.
    """
    _check_hidden("hidden", hidden, head)
    _check_targets(targets, hidden)
    need_grad = torch.is_grad_enabled() and hidden.requires_grad
    ce_weight = hidden.new_full(hidden.shape[:1], -1.0, dtype=torch.float32) if need_grad else None
    problem = Problem(hidden.detach(), None, head, targets, ce_weight, None, "policy-reference", need_grad)
    answer = solve(problem, engine, checked)
    assert answer.logprobs is not None
    return _with_gradient(hidden, answer.logprobs, answer.grad)


def token_kl(
    hidden: Tensor,
    ref_hidden: Tensor,
    head: FrozenHead,
    *,
    direction: Direction = "policy-reference",
    engine: Engine = "auto",
) -> Tensor:
    """KL divergence of the two next-token distributions of every token, over the whole vocabulary.

    hidden      (N, d) the policy's hidden states, in the dtype of head.weight
    ref_hidden  (N, d) the reference's, the same dtype; no gradient flows into it
    direction   policy-reference: KL(policy || reference); reference-policy: KL(reference || policy)

    Returns (N,) float32, never negative, differentiable (once) in hidden. Raises ValueError, naming the argument.
    """
    _check_hidden("hidden", hidden, head)
    _check_hidden("ref_hidden", ref_hidden, head, rows=hidden)
    _check_direction(direction)
    need_grad = torch.is_grad_enabled() and hidden.requires_grad
    kl_weight = hidden.new_ones(hidden.shape[:1], dtype=torch.float32) if need_grad else None
    problem = Problem(hidden.detach(), ref_hidden.detach(), head, None, None, kl_weight, direction, need_grad)
    answer = solve(problem, engine)
    assert answer.kl is not None
    return _with_gradient(hidden, answer.kl, answer.grad)


def retain_loss(
    hidden: Tensor,
    ref_hidden: Tensor | None,
    head: FrozenHead,
    targets: Tensor,
    ce_weight: float | Tensor,
    kl_weight: float | Tensor,
    *,
    direction: Direction = "policy-reference",
    engine: Engine = "auto",
    checked: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """sum over tokens with targets_t != -100 of  ce_weight_t * (-logprob_t) + kl_weight_t * kl_t,  in one pass.

    ce_weight, kl_weight   a number, or (N,) float32 (for example 1 / number of answer tokens in the whole step)
    ref_hidden             (N, d); may be None where kl_weight is the number 0: then there is no KL work and kl is 0
    the rest               as in `token_logprobs` and `token_kl`

    Returns the scalar float32 loss, differentiable (once) in hidden, and the detached (N,) float32 log-probabilities
    and KLs. Raises ValueError, naming the argument.
    """
    _check_hidden("hidden", hidden, head)
    _check_targets(targets, hidden)
    _check_direction(direction)
    ce_weights = _weights("ce_weight", ce_weight, hidden)
    kl_weights = _weights("kl_weight", kl_weight, hidden)
    if kl_weights is None:
        ref_hidden = None
    elif ref_hidden is None:
        raise ValueError("ref_hidden may be None only if kl_weight is 0")
    else:
        _check_hidden("ref_hidden", ref_hidden, head, rows=hidden)
        ref_hidden = ref_hidden.detach()
    need_grad = torch.is_grad_enabled() and hidden.requires_grad
    problem = Problem(hidden.detach(), ref_hidden, head, targets, ce_weights, kl_weights, direction, need_grad)
    answer = solve(problem, engine, checked)
    assert answer.logprobs is not None

    kl = torch.zeros_like(answer.logprobs) if answer.kl is None else answer.kl
    loss = torch.zeros_like(answer.logprobs)
    for weight, values in ((ce_weights, -answer.logprobs), (kl_weights, kl)):
        if weight is not None:
            loss = loss + torch.where(targets == IGNORE_INDEX, 0.0, weight) * values
    return _with_gradient(hidden, loss.sum(), answer.grad), answer.logprobs, kl


def _with_gradient(hidden: Tensor, values: Tensor, grad: Tensor | None) -> Tensor:
    return values if grad is None else KnownGradient.apply(hidden, values, grad)


class KnownGradient(torch.autograd.Function):
    """Gives `values` their gradient: row t of `grad` is d values_t / d hidden_t, or d values / d hidden_t."""

    @staticmethod
    def forward(ctx, hidden, values, grad):
        ctx.save_for_backward(grad)
        ctx.dtype = hidden.dtype
        return values.view_as(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        (grad,) = ctx.saved_tensors
        # float32 upstream x bfloat16 rows, rounded once, without a float32 copy of the rows
        scaled = torch.mul(grad, upstream.reshape(-1, 1), out=torch.empty_like(grad, dtype=ctx.dtype))
        return scaled, None, None


def _check_hidden(name: str, hidden: Tensor, head: FrozenHead, rows: Tensor | None = None) -> None:
    size = head.weight.shape[1]
    if hidden.ndim != 2 or hidden.shape[1] != size:
        raise ValueError(f"{name} must have shape (tokens, {size}), not {tuple(hidden.shape)}")
    if rows is not None and hidden.shape[0] != rows.shape[0]:
        raise ValueError(f"{name} has {hidden.shape[0]} rows, but hidden has {rows.shape[0]}")
    if hidden.dtype != head.weight.dtype:
        raise ValueError(f"{name} is {hidden.dtype}, but the head's weight is {head.weight.dtype}; cast one of them")
    if hidden.device != head.weight.device:
        raise ValueError(f"{name} is on {hidden.device}, but the head's weight is on {head.weight.device}")


def _check_targets(targets: Tensor, hidden: Tensor) -> None:
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must have shape ({hidden.shape[0]},), not {tuple(targets.shape)}")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64, not {targets.dtype}")
    if targets.device != hidden.device:
        raise ValueError(f"targets is on {targets.device}, but hidden is on {hidden.device}")


def _check_direction(direction: str) -> None:
    if direction not in ("policy-reference", "reference-policy"):
        raise ValueError(f"direction must be 'policy-reference' or 'reference-policy', not {direction!r}")


def _weights(name: str, weight: float | Tensor, hidden: Tensor) -> Tensor | None:
    """As (N,) float32; None where it is the number 0, so that its work is left out."""
    if not isinstance(weight, Tensor):
        return hidden.new_full(hidden.shape[:1], weight, dtype=torch.float32) if weight != 0 else None
    if weight.shape != hidden.shape[:1]:
        raise ValueError(f"{name} must be a number or have shape ({hidden.shape[0]},), not {tuple(weight.shape)}")
    if weight.dtype != torch.float32:
        raise ValueError(f"{name} must be float32, not {weight.dtype}")
    if weight.device != hidden.device:
        raise ValueError(f"{name} is on {weight.device}, but hidden is on {hidden.device}")
    if weight.requires_grad:
        raise ValueError(f"{name} requires grad, but the loss is differentiable in hidden only; detach it")
    return weight
