"""The four tasks of the kernel benchmark, the bare matrix products in them, and the errors of a result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels_parts.cases import CE_WEIGHT, KL_WEIGHT, Case, Truth


@dataclass(frozen=True)
class Task:
    """`function` is the contender's method; `products` is the number of N x V x d products it needs."""

    key: str
    title: str
    function: str
    products: int

    def run(self, contender: Any, case: Case) -> tuple[Tensor, Tensor | None]:
        """The value, and the gradient in hidden of: log-probs times upstream (b), the mean KL (c), the loss (d)."""
        if isinstance(contender, Floor):
            return contender.run(case, self.products)
        function = getattr(contender, self.function)
        if self.key == "a":
            with torch.no_grad():
                return function(case.without_grad()), None
        value = function(case)
        loss = value if self.key == "b" else value.mean()
        (grad,) = torch.autograd.grad(loss, case.hidden, case.upstream if self.key == "b" else None)
        return value.detach(), grad


TASKS = (
    Task("a", "log-probs, no gradient", "logprobs", 1),
    Task("b", "log-probs, forward and backward", "logprobs", 2),
    Task("c", "KL, forward and backward", "kl", 3),
    Task("d", "cross-entropy and KL, forward and backward", "retain", 3),
)


def offers(contender: Any, task: Task) -> bool:
    return isinstance(contender, Floor) or hasattr(contender, task.function)


class Floor:
    """Only the matrix products, bfloat16 in and out, into memory allocated beforehand."""

    name = "floor"

    def __init__(self, case: Case) -> None:
        self._logits = case.hidden.new_empty(len(case.hidden), len(case.weight), requires_grad=False)
        self._grad = torch.empty_like(case.hidden, requires_grad=False)

    def run(self, case: Case, products: int) -> tuple[Tensor, Tensor | None]:
        with torch.no_grad():
            for hidden in (case.hidden, case.ref_hidden)[: max(1, products - 1)]:
                torch.mm(hidden, case.weight.T, out=self._logits)
            if products > 1:
                torch.mm(self._logits, case.weight, out=self._grad)
        return self._logits[:0], None


def errors(task: Task, value: Tensor, grad: Tensor | None, exact: Truth, case: Case) -> dict[str, float]:
    """How far a result is from the truth, on the tokens that the truth was computed for.

    logprob   the largest |error| / max(1, |log-prob|)
    kl        of the sum of the KLs, relative; only if the truth covers every token
    kl_token  of the tokens' KLs, relative, in the Euclidean norm; not for contenders that return only the mean
    grad      of the gradient in hidden, relative, in the Euclidean norm
    """
    result: dict[str, float] = {}
    rows, tokens = exact.rows, len(case.hidden)
    if task.function == "logprobs":
        distance = (value[rows].double() - exact.logprobs).abs() / exact.logprobs.abs().clamp(min=1)
        result["logprob"] = float(distance.max())
    elif task.function == "kl":
        if len(rows) == tokens:
            result["kl"] = abs(float(value.double().mean() / exact.kl.mean()) - 1)
        if value.ndim:
            result["kl_token"] = relative(value[rows].double(), exact.kl)
    if grad is not None:
        result["grad"] = relative(grad[rows].double(), _gradient(task, exact, case))
    return result


def _gradient(task: Task, exact: Truth, case: Case) -> Tensor:
    tokens = len(case.hidden)
    if task.function == "logprobs":
        return case.upstream[exact.rows, None] * exact.logprob_grad
    if task.function == "kl":
        return exact.kl_grad / tokens
    return (KL_WEIGHT * exact.kl_grad - CE_WEIGHT * exact.logprob_grad) / tokens


def relative(value: Tensor, true: Tensor) -> float:
    return float((value - true).norm() / true.norm())
