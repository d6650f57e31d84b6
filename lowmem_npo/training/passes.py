"""The passes of a step and their losses. In each the reference comes first, before any graph exists; in lock-step both
go through the layers together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from lowmem_kernels import FrozenHead, retain_loss, token_logprobs
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lowmem_npo.config import ObjectiveConfig
from lowmem_npo.data.batching import RowBatch
from lowmem_npo.files import expanded
from lowmem_npo.memory.lock_step import LockStep
from lowmem_npo.memory.prefix import SharedPrefix
from lowmem_npo.memory.streaming import weight_stream
from lowmem_npo.model import AnswerHidden, answer_hidden, frozen_head
from lowmem_npo.model.layers import causal_lm
from lowmem_npo.training.adversary import Adversary
from lowmem_npo.training.npo_config import NPOConfig
from lowmem_npo.training.objective import SequenceLogprobs, StepTotals, forget_loss, retain_weights
from lowmem_npo.training.reference import CachedReference, LiveReference
from lowmem_npo.training.step_metrics import StepMetrics
from lowmem_npo.training.training_rows import TrainingRows

Values = TypeVar("Values")


class Passes:
    """One pass over some rows: a () float32 loss with its graph, and the figures of these rows in `metrics`.

    adversary: whose attacker is in the model during a forget pass, and not in its reference.
    answers_per_row: how many rows of a forget batch belong to one row to forget: itself, and the other answer if it has
        any.
    num_retain: the retain rows; what comes after them is held until it is forgotten. None: nothing does.
    """

    def __init__(
        self,
        model: PeftModel,
        head: FrozenHead,
        objective: ObjectiveConfig,
        reference: LiveReference,
        adversary: Adversary | None,
        answers_per_row: int,
        num_retain: int | None = None,
    ) -> None:
        self.model, self.head, self.objective = model, head, objective
        self.reference, self.adversary, self.answers_per_row = reference, adversary, answers_per_row
        self.prefix = SharedPrefix(model)
        self.lock_step = None if weight_stream(model) is None else LockStep.where_it_fits(model, self.prefix)
        self.num_retain = num_retain
        self.metrics = StepMetrics(objective, holds=num_retain is not None)
        # Rows to forget -> their reference, for the step's next pass.
        self.kept: dict[tuple[int, ...], Tensor | None] = {}
        self.levels: Tensor | None = None  # (rows,) nats per token up to which each forget row is pushed

    def forget(self, batch: RowBatch, totals: StepTotals, *, again: bool = False) -> Tensor:
        """again: whether these rows go through the model once more in this step, which then does without a pass of the
        reference."""
        is_kept = batch.rows in self.kept
        reference_of = partial(self.kept.pop, batch.rows) if is_kept else partial(self.reference.forget, batch)
        if self.adversary is None:
            is_live = not is_kept and self.reference.runs(forget=batch.rows)
            answers, reference = self._run(batch, reference_of, is_live)
        else:  # which is in the layers, too
            with self.adversary.away():
                reference = reference_of()
            answers = answer_hidden(self.model, batch)
        if again:
            self.kept[batch.rows] = reference
        return self._forget_loss(answers, batch.rows, reference, totals)

    def retain(self, batch: RowBatch, totals: StepTotals) -> Tensor:
        reference_of = partial(self.reference.retain, batch)
        answers, reference = self._run(batch, reference_of, self.reference.runs(retain=batch.rows))
        return self._retain_loss(answers, batch.rows, 0, reference, totals)

    def both(self, batch: RowBatch, forget_rows: int, totals: StepTotals) -> Tensor:
        """`forget` and `retain` in one pass, of a batch whose first `forget_rows` rows are to be forgotten."""
        is_live = self.reference.runs(batch.rows[:forget_rows], batch.rows[forget_rows:])
        answers, references = self._run(batch, partial(self.reference.both, batch, forget_rows), is_live)
        forget, retain = answers.split(sum(batch.answers[:forget_rows]))
        loss = self._forget_loss(forget, batch.rows[:forget_rows], references[0], totals)
        return loss + self._retain_loss(retain, batch.rows[forget_rows:], forget_rows, references[1], totals)

    def _run(self, batch: RowBatch, reference: Callable[[], Values], is_live: bool) -> tuple[AnswerHidden, Values]:
        """The policy's answers and what `reference` returns, which runs the model if it `is_live`."""
        if is_live and self.lock_step is not None:
            with self.lock_step.passes():
                answers = answer_hidden(self.model, batch)
                return answers, reference()
        with self.prefix.shared():
            values = reference()
            return answer_hidden(self.model, batch), values

    def _forget_loss(
        self, answers: AnswerHidden, rows: Sequence[int], reference: Tensor | None, totals: StepTotals
    ) -> Tensor:
        """rows: (B,) places in the forget dataset of the rows that the answers belong to."""
        logprobs = token_logprobs(answers.hidden, self.head, answers.targets, checked=True)
        policy = SequenceLogprobs(logprobs, answers.sequence, len(rows))
        if self.levels is not None:
            policy = policy.up_to(self.levels[list(rows)].to(logprobs.device, non_blocking=True))
        loss = forget_loss(self.objective, policy, reference, totals)
        with torch.no_grad():  # the figures are of the answers to forget alone
            every = self.answers_per_row
            if every > 1:
                forgotten = answers.sequence % every == 0
                logprobs = logprobs * forgotten
                if reference is not None:
                    reference = reference[::every] if len(reference) == len(rows) else reference * forgotten
            self.metrics.add(forget_loss=loss, forget_nll=-logprobs.sum() / totals.forget_tokens)
            if reference is not None:
                ratio = logprobs.double().sum() - reference.double().sum()
                self.metrics.add(forget_log_ratio=ratio / totals.forget_sequences)
        return loss

    def _retain_loss(
        self,
        answers: AnswerHidden,
        rows: Sequence[int],
        first: int,
        reference_hidden: Tensor | None,
        totals: StepTotals,
    ) -> Tensor:
        """rows: (B,) places in the retain dataset of the rows that the answers belong to, of which the `first` is that
        in the batch."""
        ce_weight, kl_weight = retain_weights(self.objective, totals)
        loss, logprobs, kl = retain_loss(
            answers.hidden,
            reference_hidden,
            self.head,
            answers.targets,
            ce_weight,
            kl_weight,
            direction=self.objective.kl_direction,
            checked=True,
        )
        tokens, own = max(totals.retain_tokens, 1), logprobs
        if self.num_retain is not None and totals.held_tokens:
            is_held = torch.tensor([row >= self.num_retain for row in rows])
            held = is_held.to(logprobs.device, non_blocking=True)[answers.sequence - first]
            own = logprobs.masked_fill(held, 0.0)
            self.metrics.add(held_nll=-logprobs.masked_fill(~held, 0.0).sum() / totals.held_tokens)
        self.metrics.add(retain_nll=-own.sum() / max(totals.own_tokens, 1))
        if reference_hidden is not None:
            self.metrics.add(retain_kl=kl.sum() / tokens)
        return loss


def passes_of(
    model: PeftModel,
    args: NPOConfig,
    objective: ObjectiveConfig,
    rows: TrainingRows,
    tokenizer: PreTrainedTokenizerBase,
) -> Passes:
    """What a micro-batch goes through: the model with its head, the reference, the adversary."""
    rho, goes_on = objective.adversary, objective.attack_steps > 1
    adversary = None if rho is None else Adversary(model, rho, args.seed, args.device, goes_on=goes_on)
    lm = causal_lm(model)
    if getattr(lm, "hf_device_map", None) is None and not getattr(lm, "is_quantized", False):
        model.to(args.device)  # as the Trainer does later: a head that is taken before would stay where it is
    head = frozen_head(model)
    reference = LiveReference(model, head, objective)
    if args.reference_dir is not None:
        directory, names = expanded(args.reference_dir), rows.cache_names
        reference = CachedReference.open(reference, directory, rows.forget, rows.retain, tokenizer, names)
    held_from = None if rows.folds is None else rows.num_retain
    return Passes(model, head, objective, reference, adversary, 2 if rows.alternatives else 1, held_from)
