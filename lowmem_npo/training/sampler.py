"""The sampler of a run: which `StepBatches` it takes its rows from, and its epochs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lowmem_npo.training.adversary import check_others
from lowmem_npo.training.layered import LayeredBatches, attack_length, check_folds
from lowmem_npo.training.npo_config import NPOConfig
from lowmem_npo.training.step_rows import StepBatches, num_steps
from lowmem_npo.training.training_rows import TrainingRows


def sampler_of(args: NPOConfig, rows: TrainingRows) -> StepBatches:
    """This process's; in stages under `layered`, in halves where attackers go on for several steps.

    Raises:
        UserError: a fold does not fill a batch, a stage has no step, or no row is left for the attacker.
    """
    micro_batches, processes, batch_size = args.gradient_accumulation_steps, args.world_size, _batch_size(args)
    sizes = {
        "num_retain": rows.num_retain,
        "batch_size": batch_size,
        "retain_batch_size": args.retain_batch_size or batch_size,
        "micro_batches": micro_batches,
        "seed": args.data_seed if args.data_seed is not None else args.seed,
        "rank": args.process_index,
        "world_size": processes,
        "alternatives": rows.alternatives,
    }
    steps = steps_of(rows, args)
    folds, attack_steps = rows.folds or [list(range(rows.num_forget))], 1
    if args.attack_steps:
        attack_steps = attack_length(args.attack_steps, steps, len(folds))
    check_division(rows.num_forget, rows.folds, batch_size, steps, attack_steps if args.attack_steps else 0)
    if rows.folds is None and attack_steps == 1:
        return StepBatches(rows.num_forget, **sizes)
    return LayeredBatches(folds, steps, args.layered_weight, attack_steps=attack_steps, **sizes)


def steps_of(rows: TrainingRows, args: NPOConfig) -> int:
    """Optimiser steps of the whole run."""
    return num_steps(rows.num_forget, _batch_size(args), args.num_train_epochs, args.max_steps)


def _batch_size(args: NPOConfig) -> int:
    """Forget rows of an optimiser step, over all micro-batches and processes."""
    at_once = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return args.step_batch_size or at_once


def check_division(
    num_forget: int, folds: Sequence[Sequence[int]] | None, batch_size: int, steps: int, attack_steps: int
) -> None:
    """Raises a UserError as `sampler_of` does.

    folds: None: all rows at once. attack_steps: for how many steps an attacker goes on; 0: there is none.
    """
    if folds is not None:
        check_folds(folds, batch_size, steps)
    if attack_steps:
        check_others(num_forget, folds, batch_size, attack_steps)


class EpochOfSampler(TrainerCallback):
    """Sets the sampler's epoch, counted from steps so that a resumed run sees the very same rows."""

    def __init__(self, step_batches: StepBatches) -> None:
        self.step_batches = step_batches

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.step_batches.set_epoch(state.global_step // self.step_batches.steps_per_epoch)
