"""The mathematics of unlearning, on per-token log-probabilities: the only place where the losses are written down.

    L = L_forget + gamma * NLL(retain) + delta * KL(retain)

Every function takes the quantities of ONE micro-batch on one process and divides by totals of the WHOLE optimiser step
(`StepTotals`). Sums over micro-batches and processes therefore give the mean over the step exactly, however the step is
split; a mean of per-micro-batch means would not when answers differ in length.

The retain terms are weighted sums of per-token quantities whose weights are known beforehand (`retain_weights`), so
they are computed with their gradient by `lowmem_kernels.retain_loss`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem_npo.config import FORGET_TERMS, ObjectiveConfig
from lowmem_npo.errors import UserError
from lowmem_npo.forget_terms import custom_term

LET_GO = 0.5  # nats per token: an optimiser with momentum goes on for some steps after the gradient has ended


@dataclass(frozen=True)
class StepTotals:
    """Counts of one optimiser step, over all its micro-batches and processes. Alternative answers do not count."""

    forget_sequences: int
    forget_tokens: int  # answer tokens that are predicted
    retain_tokens: int
    held_tokens: int = 0  # among those to retain: of rows to forget whose turn has not come (layered unlearning)

    @property
    def own_tokens(self) -> int:
        """Of the retain rows themselves."""
        return self.retain_tokens - self.held_tokens


@dataclass(frozen=True)
class SequenceLogprobs:
    """Per-token log-probs of a batch of answers, and which sequence each token belongs to."""

    token_logprobs: Tensor  # (N,) float32
    sequence: Tensor  # (N,) int64, in [0, num_sequences)
    num_sequences: int

    def up_to(self, levels: Tensor) -> SequenceLogprobs:
        """The same numbers, with a gradient that lets each answer go as its mean NLL per token nears its level.

        levels: (B,) nats per token. The gradient fades over the last `LET_GO` nats and is 0 from the level on, so what
        is further away than that is never pulled back.
        """
        nll = -self.sums().detach() / self.lengths()
        push = ((levels - nll) / LET_GO).clamp(0, 1).float()[self.sequence]
        held = self.token_logprobs.detach()
        return replace(self, token_logprobs=held + push * (self.token_logprobs - held))

    def sums(self) -> Tensor:
        """(B,) float64, log-prob of each whole answer: log pi(y|x) = sum over its tokens.

        A ratio is the difference of two such sums, and a GPU adds in no fixed order: in float32, that of an identity
        adapter would be off by thousandths of a nat after 500 tokens, and by others in every run.
        """
        zeros = torch.zeros(self.num_sequences, dtype=torch.float64, device=self.sequence.device)
        return zeros.index_add(0, self.sequence, self.token_logprobs.double())

    def lengths(self) -> Tensor:
        """(B,) answer tokens of each sequence, at least 1 so that it can divide."""
        zeros = self.sequence.new_zeros(self.num_sequences)  # a bincount would wait for the GPU
        return zeros.index_add(0, self.sequence, torch.ones_like(self.sequence)).clamp(min=1)


def npo(log_ratio: Tensor, beta: float) -> Tensor:
    """Negative preference optimisation, elementwise: (2/beta) * log(1 + ratio^beta), with log_ratio = log(pi / pi_ref).

    Zhang et al. 2024, "Negative Preference Optimization", eq. 3. 2/beta * ln 2 when policy and reference agree; towards
    gradient ascent as beta goes to 0; its gradient vanishes as the policy forgets.
    """
    return (2.0 / beta) * F.softplus(beta * log_ratio)


def simnpo(mean_logprob: Tensor, beta: float, margin: float) -> Tensor:
    """Reference-free NPO, elementwise on length-normalised log-probs: -(2/beta) * logsigmoid(-beta * mean - margin).

    Fan et al. 2024, "Simplicity Prevails: Rethinking Negative Preference Optimization for LLM Unlearning", eq. 4.
    """
    return (2.0 / beta) * F.softplus(beta * mean_logprob + margin)


def dpo(log_ratio: Tensor, alternative: Tensor, beta: float) -> Tensor:
    """Direct preference optimisation of an alternative answer over the forgotten one, elementwise on their log-ratios
    log(pi / pi_ref): -(2/beta) * logsigmoid(beta * (alternative - log_ratio)).

    Rafailov et al. 2023, "Direct Preference Optimization", eq. 7, times 2/beta as in NPO, which is this with the
    alternative left out (Zhang et al. 2024). AltPO (Mekala et al. 2025) where the alternatives are the model's own.
    """
    return npo(log_ratio - alternative, beta)


def wga(logprob: Tensor, beta: float) -> Tensor:
    """Weighted gradient ascent, elementwise on token log-probs: p^beta * log p, the weight a constant to the gradient.

    Wang et al. 2025, "Rethinking LLM Unlearning Objectives: A Gradient Perspective and Go Beyond" (WGA, alpha there).
    Gradient ascent at beta 0; with a larger beta, tokens that are unlikely already are left alone.
    """
    return (beta * logprob).detach().exp() * logprob


def satimp(logprob: Tensor, beta1: float, beta2: float) -> Tensor:
    """Ascent weighted by saturation and importance, elementwise on token log-probs: p^beta1 * (1 - p)^beta2 * log p,
    the weight a constant to the gradient.

    Yang et al. 2025, "Exploring Criteria of Loss Reweighting to Enhance LLM Unlearning" (SatImp).
    """
    doubt = -torch.expm1(logprob.detach())  # 1 - p, precise near p = 1
    return (beta1 * logprob).detach().exp() * doubt.clamp(min=0) ** beta2 * logprob


def jensun(logprob: Tensor) -> Tensor:
    """Jensen-Shannon divergence, in nats, of the model's distribution and all of its mass on one token, elementwise on
    that token's log-probs: log 2 + (p log p - (1 + p) log(1 + p)) / 2.

    Singh et al. 2025, "Unlearning That Lasts" (JensUn), where the token is the refusal's. Of the distribution it takes
    the token's probability alone: where the other side is 0, each p_i contributes p_i * log 2. At most log 2.
    """
    p = logprob.exp()
    return math.log(2) + (p * logprob - (1 + p) * torch.log1p(p)) / 2


def forget_loss(
    objective: ObjectiveConfig, policy: SequenceLogprobs, reference: Tensor | None, totals: StepTotals
) -> Tensor:
    """The forget term's share of the step's loss from one micro-batch.

    Args:
        policy: log-probs of the forget answers (for `idk` and `jensun`: of the refusals) under the policy, with
            gradient; each followed by its alternative, where there are any.
        reference: what `objective.needs_reference` says: of the original model (B,) float64 sums, (N,) float32
            log-probs of the tokens, or None.
        totals: counts of the whole optimiser step.

    Returns:
        Scalar float32.
    """
    term, sequences, tokens = objective.forget_term, totals.forget_sequences, totals.forget_tokens
    if (custom := custom_term(term, FORGET_TERMS)) is not None:
        loss = custom(objective, policy, reference, totals)
        if not (isinstance(loss, Tensor) and loss.ndim == 0 and loss.requires_grad):
            raise UserError(f"The forget term {term} returned {loss!r}, which is no scalar tensor with a gradient.")
        return loss.float()
    if term == "ga":  # ascent on the NLL, a mean over answer tokens as in TOFU (Maini et al. 2024)
        return policy.token_logprobs.sum() / tokens
    if term == "idk":
        return -policy.token_logprobs.sum() / tokens
    if term == "wga":
        return wga(policy.token_logprobs, objective.wga_beta).sum() / tokens
    if term == "satimp":
        return satimp(policy.token_logprobs, objective.satimp_beta1, objective.satimp_beta2).sum() / tokens
    if term == "jensun":
        return jensun(policy.token_logprobs).sum() / tokens
    if term == "simnpo":
        mean = (policy.sums() / policy.lengths()).float()
        return simnpo(mean, objective.beta, objective.simnpo_margin).sum() / sequences
    assert reference is not None
    if term == "dpo":  # an alternative follows each answer
        forgotten, alternative = (policy.sums() - reference).float().view(-1, 2).unbind(1)
        return dpo(forgotten, alternative, objective.beta).sum() / sequences
    if objective.normalization == "token":
        return npo(policy.token_logprobs - reference, objective.beta).sum() / tokens
    log_ratio = (policy.sums() - reference).float()
    if objective.normalization == "length":
        log_ratio = log_ratio / policy.lengths()
    return npo(log_ratio, objective.beta).sum() / sequences


def retain_weights(objective: ObjectiveConfig, totals: StepTotals) -> tuple[float, float]:
    """Weights of one retain token's cross-entropy and of its KL: gamma / T and delta / T for a step of T tokens."""
    tokens = max(totals.retain_tokens, 1)
    return objective.gamma / tokens, objective.delta / tokens
