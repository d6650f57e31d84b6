"""What the kernels should compute: dense, in float64, by autograd, and written independently of the engines.

Also the cases to test them on, and the accuracy contract that every engine must meet and every broken kernel must fail.
"""

from dataclasses import dataclass, replace
from types import ModuleType
from typing import NamedTuple

import lowmem_kernels
import torch
from lowmem_kernels import FrozenHead
from torch import Tensor

DIRECTIONS = ("policy-reference", "reference-policy")


@dataclass(frozen=True)
class Case:
    """One set of inputs: N hidden states of policy and reference, a head, targets."""

    hidden: Tensor
    ref_hidden: Tensor
    head: FrozenHead
    targets: Tensor
    direction: str = "policy-reference"

    def take(self, rows: Tensor) -> "Case":
        """Some of the tokens."""
        return replace(self, hidden=self.hidden[rows], ref_hidden=self.ref_hidden[rows], targets=self.targets[rows])


class Outcome(NamedTuple):
    """Per token: log-probability, KL, and the rows of their derivatives with respect to hidden."""

    logprobs: Tensor
    kl: Tensor
    logprob_grad: Tensor
    kl_grad: Tensor


def make_case(
    n: int,
    d: int,
    v: int,
    *,
    distance: float = 0.1,
    sharpness: float = 2.0,
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = False,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    direction: str = "policy-reference",
    seed: int = 0,
    device: str = "cpu",
) -> Case:
    """Logits with standard deviation `sharpness`; policy and reference logits about `distance` apart.

    The second named of the two distributions is the sharper one, so that the KL is not bounded by log V.
    """
    g = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    weight = normal(v, d)
    hidden = normal(n, d) * sharpness / d**0.5
    ref_hidden = hidden.to(dtype).float() + normal(n, d) * distance / d**0.5
    head = FrozenHead(weight.to(dtype), normal(v).to(dtype) if bias else None, softcap, logit_scale)
    if direction == "reference-policy":
        hidden, ref_hidden = ref_hidden, hidden
    targets = torch.randint(v, (n,), generator=g, device=device)
    return Case(hidden.to(dtype), ref_hidden.to(dtype), head, targets, direction)


def logits(hidden: Tensor, head: FrozenHead, dtype: torch.dtype) -> Tensor:
    z = hidden.to(dtype) @ head.weight.to(dtype).T
    z = head.logit_scale * (z if head.bias is None else z + head.bias.to(dtype))
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def dense(case: Case, dtype: torch.dtype = torch.float64) -> Outcome:
    """The definitions, with full logits. In float32 this is what plain PyTorch would give."""
    hidden = case.hidden.detach().to(dtype).requires_grad_()
    log_p = torch.log_softmax(logits(hidden, case.head, dtype), dim=1)
    log_q = torch.log_softmax(logits(case.ref_hidden, case.head, dtype), dim=1)
    logprobs = log_p.gather(1, case.targets[:, None]).squeeze(1)
    first, second = (log_p, log_q) if case.direction == "policy-reference" else (log_q, log_p)
    kl = torch.nn.functional.kl_div(second, first, log_target=True, reduction="none").sum(1)
    grads = [torch.autograd.grad(x.sum(), hidden, retain_graph=True)[0] for x in (logprobs, kl)]
    if dtype == torch.float32:  # what autograd hands to the model has the dtype of hidden
        grads = [grad.to(case.hidden.dtype) for grad in grads]
    return Outcome(logprobs.detach().double(), kl.detach().double(), *(grad.double() for grad in grads))


def run(case: Case, engine: str, kernels: ModuleType = lowmem_kernels) -> Outcome:
    """The same, by token_logprobs and token_kl."""
    hidden = case.hidden.detach().requires_grad_()
    logprobs = kernels.token_logprobs(hidden, case.head, case.targets, engine=engine)
    kl = kernels.token_kl(hidden, case.ref_hidden, case.head, direction=case.direction, engine=engine)
    grads = [torch.autograd.grad(x.sum(), hidden)[0] for x in (logprobs, kl)]
    return Outcome(logprobs.detach().double(), kl.detach().double(), *(grad.double() for grad in grads))


def run_jointly(
    case: Case, engine: str, ce_weight: Tensor, kl_weight: Tensor, kernels: ModuleType = lowmem_kernels
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """retain_loss: the loss, its gradient, and the log-probabilities and KLs."""
    hidden = case.hidden.detach().requires_grad_()
    loss, logprobs, kl = kernels.retain_loss(
        hidden, case.ref_hidden, case.head, case.targets, ce_weight, kl_weight, direction=case.direction, engine=engine
    )
    (grad,) = torch.autograd.grad(loss, hidden)
    return loss.detach().double(), grad.double(), logprobs.double(), kl.double()


def relative(value: Tensor, true: Tensor) -> float:
    """Relative error in the Euclidean norm; 0 / 0 = 0."""
    error, size = (value - true).norm().item(), true.norm().item()
    return error / size if size else (0.0 if error == 0 else float("inf"))


def check(case: Case, engine: str, kernels: ModuleType = lowmem_kernels, rows: Tensor | None = None) -> None:
    """Asserts the accuracy contract (docs/kernels.md) for this engine on this case, or on `rows` of it."""
    outcome = run(case, engine, kernels)
    if rows is not None:
        outcome, case = Outcome(*(x[rows] for x in outcome)), case.take(rows)
    true, plain = dense(case), dense(case, torch.float32)
    largest = max(logits(h, case.head, torch.float64).abs().max() for h in (case.hidden.detach(), case.ref_hidden))
    resolution_of_logits = 2e-7 * largest * abs(case.head.logit_scale) * case.head.weight.double().norm(dim=1).max()
    low = case.hidden.dtype != torch.float32
    grad_limit = 1e-2 if low else 1e-4

    logprob_error = ((outcome.logprobs - true.logprobs).abs() / true.logprobs.abs().clamp(min=1)).max().item()
    assert logprob_error <= 1e-4, f"log-prob off by {logprob_error:.1e}"
    kl_error = ((outcome.kl - true.kl).abs() / true.kl.clamp(min=1e-6)).max().item()
    assert kl_error <= 5e-3, f"KL off by {kl_error:.1e}"
    assert (outcome.kl >= 0).all(), "a negative KL"
    for name in ("logprob_grad", "kl_grad"):
        ours, exact, baseline = getattr(outcome, name), getattr(true, name), getattr(plain, name)
        error, baseline_error = relative(ours, exact), relative(baseline, exact)
        sizes = exact.norm(dim=1)
        # A KL of 1e4 is known in float32 to 1e-3, and that is what its gradient, p * (log p - log q - KL), is made of.
        resolution = 4e-7 * abs(case.head.logit_scale) * true.kl * case.head.weight.double().norm(dim=1).max()
        row_limit = grad_limit * sizes.clamp(min=1e-4 * sizes.mean()) + resolution
        if name == "kl_grad":  # made of differences of logits, which float32 knows to 1e-7 of the largest
            row_limit = row_limit + resolution_of_logits
        excess = (ours - exact).norm(dim=1) - row_limit
        limit = max(grad_limit / 3, 1.5 * baseline_error) + float(resolution.norm() / exact.norm().clamp(min=1e-30))
        assert error <= limit, f"{name} off by {error:.1e}, more than {limit:.1e}"
        assert (excess <= 0).all(), f"row {int(excess.argmax())} of {name} off by more than {grad_limit}"


def check_jointly(case: Case, engine: str, kernels: ModuleType = lowmem_kernels, rows: Tensor | None = None) -> None:
    """retain_loss against the same weighted sum of the dense quantities, with a different weight for every token."""
    n = len(case.targets)
    rows = torch.arange(n, device=case.hidden.device) if rows is None else rows
    true = dense(case.take(rows))
    ce_weight = torch.linspace(0.2, 1.0, n, device=case.hidden.device)
    kl_weight = torch.linspace(1.0, 0.1, n, device=case.hidden.device)
    # KL and cross-entropy alike in size, so that an error in either shows
    kl_weight = kl_weight * float(true.logprob_grad.norm() / true.kl_grad.norm().clamp(min=1e-12))
    loss, grad, logprobs, kl = run_jointly(case, engine, ce_weight, kl_weight, kernels)
    assert relative(loss, (-ce_weight.double() * logprobs + kl_weight.double() * kl).sum()) <= 1e-5
    ce_weight, kl_weight = ce_weight[rows].double(), kl_weight[rows].double()
    exact = -ce_weight[:, None] * true.logprob_grad + kl_weight[:, None] * true.kl_grad
    assert relative(grad[rows], exact) <= (1e-2 if case.hidden.dtype != torch.float32 else 1e-4)
    assert relative(logprobs[rows], true.logprobs) <= 1e-4
    assert relative(kl[rows], true.kl) <= 5e-3
