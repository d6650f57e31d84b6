"""Inputs for the kernel benchmark, like those of training, and the exact results, in float64.

Logits are like a language model's: token v has the logit  -log(1 + v)  of Zipf's law plus a normal deviate, the targets
are drawn from the policy's softmax, and policy and reference hidden states differ by as much as gives their mean KL a
chosen value. Everything the kernels see is bfloat16; the truth is computed from exactly these bfloat16 numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

SPREAD = 4.0  # standard deviation of the logits around Zipf's law; the likeliest token then has probability 0.2 to 0.3
CE_WEIGHT, KL_WEIGHT = 1.0, 0.5  # gamma and delta of the retain loss
ROWS = 256  # tokens at a time when the truth is computed


@dataclass(frozen=True)
class Shape:
    """The size of a problem."""

    tokens: int
    vocabulary: int
    hidden: int

    def __str__(self) -> str:
        return f"{self.tokens} tokens, V {self.vocabulary}, d {self.hidden}"


@dataclass(frozen=True)
class Case:
    """One set of inputs.

    hidden, ref_hidden  (N, d) bfloat16; hidden is a leaf that requires grad
    weight              (V, d) bfloat16, frozen
    targets             (N,) int64
    upstream            (N,) float32: the gradient of the log-probabilities, in place of NPO's per-sequence weights
    """

    hidden: Tensor
    ref_hidden: Tensor
    weight: Tensor
    targets: Tensor
    upstream: Tensor

    def without_grad(self) -> Case:
        return replace(self, hidden=self.hidden.detach())


@dataclass(frozen=True)
class Truth:
    """Float64, for the tokens `rows`: log-probabilities and KLs (n,), and their derivatives in hidden (n, d)."""

    rows: Tensor
    logprobs: Tensor
    kl: Tensor
    logprob_grad: Tensor
    kl_grad: Tensor


def make_cases(shape: Shape, kl: float, count: int, device: str) -> list[Case]:
    """`count` sets of inputs with one head; the mean KL of each is about `kl` (5%)."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    bias = 8.0  # hidden[:, 0] is this constant, as real hidden states have a few large entries: it carries Zipf's law
    weight = normal(shape.vocabulary, shape.hidden).mul_(SPREAD / shape.hidden**0.5)
    weight[:, 0] = -torch.arange(1, shape.vocabulary + 1, device=device).log() / bias
    weight = weight.bfloat16()

    size, cases = None, []
    for _ in range(count):
        hidden, step = normal(shape.tokens, shape.hidden), normal(shape.tokens, shape.hidden)
        hidden[:, 0] = bias
        hidden = hidden.bfloat16()
        if size is None:
            size = _step_size(hidden[:64], step[:64], weight, kl)
        cases.append(
            Case(
                hidden=hidden.requires_grad_(),
                ref_hidden=(hidden.detach().float() + size * step).bfloat16(),
                weight=weight,
                targets=_sample(hidden.detach(), weight, generator),
                upstream=torch.rand(shape.tokens, generator=generator, device=device) + 0.5,
            )
        )
    return cases


def truth(case: Case, rows: int | None = None) -> Truth:
    """The truth for every token, or for `rows` of them, evenly spaced."""
    tokens = len(case.hidden)
    chosen = torch.arange(tokens, device=case.hidden.device)
    if rows is not None and rows < tokens:
        chosen = chosen[:: -(-tokens // rows)]
    weight = case.weight.double()
    parts = [_truth_of(case, weight, part) for part in chosen.split(ROWS)]
    return Truth(chosen, *map(torch.cat, zip(*parts, strict=True)))


def _truth_of(case: Case, weight: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
    targets = case.targets[rows]
    log_p, log_q = (torch.log_softmax(h[rows].double() @ weight.T, 1) for h in (case.hidden.detach(), case.ref_hidden))
    p, ratio = log_p.exp(), log_p - log_q
    kl = (p * ratio).sum(1)
    logprobs = log_p.gather(1, targets[:, None]).squeeze(1)
    return logprobs, kl, weight[targets] - p @ weight, (p * (ratio - kl[:, None])) @ weight


def _step_size(hidden: Tensor, step: Tensor, weight: Tensor, kl: float) -> float:
    """How far to move hidden states for a mean KL of `kl`, by bisection: rounding to bfloat16 leaves no formula."""
    weight = weight.double()
    log_p = torch.log_softmax(hidden.double() @ weight.T, 1)
    low, high = 1e-8, 1e2
    for _ in range(40):
        middle = (low * high) ** 0.5
        moved = (hidden.float() + middle * step).bfloat16()
        log_q = torch.log_softmax(moved.double() @ weight.T, 1)
        mean = float((log_p.exp() * (log_p - log_q)).sum(1).mean())
        if abs(mean - kl) < 0.01 * kl:
            break
        low, high = (middle, high) if mean < kl else (low, middle)
    return middle


def _sample(hidden: Tensor, weight: Tensor, generator: torch.Generator) -> Tensor:
    def draw() -> Iterator[Tensor]:
        for rows in hidden.split(ROWS):
            yield torch.multinomial(torch.softmax((rows @ weight.T).float(), 1), 1, generator=generator).squeeze(1)

    return torch.cat(list(draw()))
