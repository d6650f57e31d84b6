"""What the model thinks of every token of an answer, given the true tokens before it: the ground of the leak tests.

Four figures per token, from one walk over the vocabulary in chunks, so that no tensor of tokens x vocabulary exists:

    logprob   log p(token)
    standard  (log p(token) - mean) / std of log p(w) where w is drawn from p: Min-K%++ (Zhang et al. 2024)
    deviation that std
    greedy    whether the token is the most likely one, so that greedy decoding would have written it

A model that recites is nearly certain; there both sides of `standard` are differences of nearly equal numbers. So all
is counted from the largest logit, and the means and variances of chunks are merged in float64 (Chan et al. 1983).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lowmem_kernels import FrozenHead
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from lowmem_npo.data import TokenizedRow
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.scoring.batching import BATCH_SIZE
from lowmem_npo.evaluation.scoring.likelihood import answer_batch, row_by_row
from lowmem_npo.model import answer_hidden, frozen_head

TOKENS, VOCABULARY = 256, 4096  # a tile of float64 logits is 8 MiB; about four are alive at once
TINY = 1e-150  # all of p on one token has none; `standard` divides by this one

Part = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Of a part of the vocabulary, each (r, 1): largest logit, its token, mass, mean, variance; mass and mean relative to
the largest logit."""


class NotFinite(UserError):
    """A model whose weights, or what an attack made of them, give NaN or infinity. row: the place of one that gets it.
    part: which rows these are."""

    def __init__(self, row: int, part: str = "answers") -> None:
        self.row = row
        super().__init__(
            f"The model gives row {row + 1} of '{part}' no finite likelihood; the weights or the adapter are damaged."
        )


@dataclass(frozen=True)
class TokenScores:
    """One row: a figure per answer token (all tokens but the first, if it has no prompt), EOS included, in order. cut:
    whether the answer is longer than its row could be, so that only its beginning has figures."""

    logprobs: list[float]
    standard: list[float]
    greedy: list[bool]
    deviation: list[float]
    cut: bool = False

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood per token, in nats."""
        return -math.fsum(self.logprobs) / len(self.logprobs)

    @property
    def above_mean(self) -> list[float]:
        """log p(token) - mean, of every token."""
        pairs = zip(self.standard, self.deviation, strict=True)
        return [standard * max(deviation, TINY) for standard, deviation in pairs]


def token_scores(
    model: PreTrainedModel | PeftModel,
    rows: Sequence[TokenizedRow],
    *,
    batch_size: int = BATCH_SIZE,
    description: str = "answer tokens",
    progress: bool = True,
) -> list[TokenScores]:
    """The scores of each row, in the order of `rows`.

    Raises NotFinite where the model gives NaN or infinity.
    """
    head = frozen_head(model)

    def scored(chosen: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """The place among the chosen rows of every token, and its figures."""
        answers = answer_hidden(model, answer_batch(model, [rows[i] for i in chosen]))
        figures = vocabulary_statistics(answers.hidden, head, answers.targets)
        return answers.sequence.cpu(), [x.cpu() for x in figures]

    def of_row(i: int, place: int, result: tuple[Tensor, list[Tensor]]) -> TokenScores:
        sequence, figures = result
        logprobs, standard, greedy, deviation = own = [x[sequence == place] for x in figures]
        if not all(x.isfinite().all() for x in own):
            raise NotFinite(i)
        is_cut = "cut" in rows[i]
        return TokenScores(logprobs.tolist(), standard.tolist(), greedy.tolist(), deviation.tolist(), is_cut)

    return row_by_row(model, rows, scored, of_row, batch_size, description, progress)


@torch.no_grad()
def most_likely(hidden: Tensor, head: FrozenHead) -> Tensor:
    """(N,) int64: the most likely token after each of `hidden` (N, d)."""
    tokens = [hidden.new_zeros(0, dtype=torch.int64)]
    for rows in hidden.float().split(TOKENS):
        top, best = rows.new_full((len(rows),), -math.inf, dtype=torch.float64), rows.new_zeros(len(rows)).long()
        for first in range(0, head.vocabulary, VOCABULARY):
            z, at = _logits(rows, head, slice(first, first + VOCABULARY)).max(1)
            best = torch.where(z > top, at + first, best)
            top = torch.maximum(z, top)
        tokens.append(best)
    return torch.cat(tokens)


@torch.no_grad()
def vocabulary_statistics(hidden: Tensor, head: FrozenHead, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprob (N,) float64, standard (N,) float64, greedy (N,) bool and deviation (N,) float64 of `targets` (N,) after
    `hidden` (N, d)."""
    parts = [
        _statistics(hidden[start : start + TOKENS].float(), head, targets[start : start + TOKENS])
        for start in range(0, len(targets), TOKENS)
    ]
    if not parts:
        nothing = hidden.new_zeros(0, dtype=torch.float64)
        return nothing, nothing, nothing.bool(), nothing
    logprobs, standard, greedy, deviation = (torch.cat(column) for column in zip(*parts, strict=True))
    return logprobs, standard, greedy, deviation


def _statistics(hidden: Tensor, head: FrozenHead, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wanted = targets[:, None]
    merged: Part | None = None
    z_target = torch.empty_like(wanted, dtype=torch.float64)
    for first in range(0, head.vocabulary, VOCABULARY):
        z = _logits(hidden, head, slice(first, first + VOCABULARY))  # (r, v) float64
        inside = (wanted >= first) & (wanted < first + z.shape[1])
        z_target = torch.where(inside, z.gather(1, (wanted - first).clamp(0, z.shape[1] - 1)), z_target)
        top, best = z.max(1, keepdim=True)
        z = z.sub_(top)
        weight = z.exp()
        mass = weight.sum(1, keepdim=True)
        mean = (weight * z).sum(1, keepdim=True) / mass
        variance = weight.mul_(z.sub_(mean).square_()).sum(1, keepdim=True) / mass
        part = (top, best + first, mass, mean, variance)
        merged = part if merged is None else _merge(merged, part)
    assert merged is not None, "a vocabulary has entries"
    top, best, mass, mean, variance = merged
    below_top = z_target - top
    deviation = variance.sqrt()
    standard = (below_top - mean) / deviation.clamp(min=TINY)
    return (below_top - mass.log())[:, 0], standard[:, 0], (best == wanted)[:, 0], deviation[:, 0]


def _merge(one: Part, other: Part) -> Part:
    """Two disjoint parts of the vocabulary taken together; of equal logits the first counts."""
    top = torch.maximum(one[0], other[0])
    (mass_a, mean_a), (mass_b, mean_b) = (
        (mass * (own - top).exp(), mean + (own - top)) for own, _, mass, mean, _ in (one, other)
    )
    mass = mass_a + mass_b
    a, b = mass_a / mass, mass_b / mass
    mean = a * mean_a + b * mean_b
    variance = a * one[4] + b * other[4] + a * b * (mean_a - mean_b).square()
    return top, torch.where(other[0] > one[0], other[1], one[1]), mass, mean, variance


def _logits(hidden: Tensor, head: FrozenHead, entries: slice) -> Tensor:
    """(r, v) float64, from a float32 product: softcap * tanh(scale * (h W^T + b) / softcap)."""
    z = (hidden @ head.weight[entries].float().T).double()
    if head.bias is not None:
        z += head.bias[entries]
    z *= head.logit_scale
    return z if head.softcap is None else (z / head.softcap).tanh_() * head.softcap
