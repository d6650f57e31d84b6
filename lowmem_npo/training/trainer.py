"""One optimiser step of unlearning, inside `transformers.Trainer`.

`NPOTrainer.training_step` reads as the paper does: reference, forget, backward; retain, backward. Everything around it
(epochs, schedulers, accumulation, logging, checkpoints, resume, `accelerate launch`) is the Trainer's.
"""

from __future__ import annotations

import copy
import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from numbers import Real
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from lowmem_kernels import token_logprobs
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerState, set_seed

from lowmem_npo.claim import make_directory
from lowmem_npo.config import FORGET_TERMS, REFUSING_TERMS, AdapterConfig, ObjectiveConfig
from lowmem_npo.console import Say
from lowmem_npo.data.batching import Batch, ForgetRetain, Pick, RowBatch, collator
from lowmem_npo.data.fit import Fit
from lowmem_npo.errors import UserError
from lowmem_npo.forget_terms import Term, register
from lowmem_npo.memory.checkpointing import enable_checkpointing
from lowmem_npo.model import answer_hidden, attach_lora, check_causal, check_head, packs_rows
from lowmem_npo.model.adapters import note_on_experts, restore_adapter
from lowmem_npo.model.layers import causal_lm
from lowmem_npo.model.modes import eval_mode, train_adapter
from lowmem_npo.run_directory import AdapterFiles, step_of
from lowmem_npo.training.adversary import Collate, Lesson
from lowmem_npo.training.checkpoints import write_digest
from lowmem_npo.training.finite import FiniteSteps
from lowmem_npo.training.forget_point import ForgetPoint
from lowmem_npo.training.layered import LayeredBatches
from lowmem_npo.training.npo_config import NPOConfig
from lowmem_npo.training.objective import StepTotals
from lowmem_npo.training.out_of_memory import DividedSteps
from lowmem_npo.training.passes import passes_of
from lowmem_npo.training.sampler import EpochOfSampler, sampler_of, steps_of
from lowmem_npo.training.script_rows import rows_of_script
from lowmem_npo.training.script_words import in_script_words
from lowmem_npo.training.sharpness import Neighbour
from lowmem_npo.training.training_rows import Shown

logger = logging.getLogger(__name__)
PARTS = ("forget", "retain", "both")  # of a micro-batch


class NPOTrainer(Trainer):
    """Makes `model` forget `forget_dataset` and keep `retain_dataset`.

    Args:
        model: a causal LM whose base is frozen: a `PeftModel`, or a plain model together with `peft_config`.
        args: `NPOConfig`.
        forget_dataset: a `datasets.Dataset` or a list of rows, with the columns that files may have, tokenised here as
            the command line does, with its report, and refused where they are also to be kept; or tokenised rows, as
            `lowmem_npo.data.tokenize` makes them. For the terms `idk` and `jensun` those teach the refusal already
            (`lowmem_npo.data.targets`).
        retain_dataset: the same for what must be kept; None if gamma and delta are both 0.
        alternative_dataset: other answers to the same prompts, which `dpo` prefers: as many rows as forget_dataset, in
            its order, or several times as many, of which another part is taken in every epoch.
        forget_levels: how far each row of forget_dataset is pushed, as a mean NLL per answer token in nats
            (`lowmem_npo.training.forget_level`). Default: without end.
        true_dataset: under `layered` and `adversary`, rows with the true answers where forget_dataset is tokenised and
            teaches a refusal: what is held until its turn, what is taught again.
        forget_term: a forget term of your own in place of `args.forget_term`; `lowmem_npo.forget_terms` says what it is
            given.
        say: where is reported what tokenising did to raw rows, and a step that cannot be taken.
        peft_config: `AdapterConfig` of the LoRA adapter to attach if `model` has none yet.
        processing_class: tokenizer; saved with the adapter, and its padding token fills short rows.

    Raises:
        UserError: no adapter to train, an output head that is not supported, no rows or retain rows missing, raw rows
            both to forget and to keep (unless `args.allow_overlap`), a reference cache of another model or of other
            rows.
    """

    args: NPOConfig
    model: PeftModel
    train_dataset: ForgetRetain

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: NPOConfig,
        forget_dataset: Any,
        retain_dataset: Any = None,
        *,
        processing_class: PreTrainedTokenizerBase,
        peft_config: AdapterConfig | None = None,
        forget_term: Term | None = None,
        alternative_dataset: Any = None,
        true_dataset: Any = None,
        forget_levels: Sequence[float] | None = None,
        say: Say = print,
        **trainer_kwargs: Any,
    ) -> None:
        if forget_term is not None:
            args.forget_term = register(forget_term, FORGET_TERMS)
        with in_script_words(args):
            objective: ObjectiveConfig = args.objective
        if objective.needs_retain and retain_dataset is None:
            raise UserError(
                "gamma or delta is positive but there are no retain rows: give retain_dataset, or set both to 0."
            )
        kept = retain_dataset if objective.needs_retain else None
        given = (forget_dataset, kept, alternative_dataset, true_dataset)
        rows = rows_of_script(causal_lm(model), processing_class, args, *given, say)
        model = _adapted(model, peft_config, args, say)
        args = _with_own_checkpointing(model, args)
        # cuDNN's attention, PyTorch's choice on Hopper and Blackwell, plans anew for every length of a batch: about a
        # second each. For the whole process: a layer's recomputation must choose as its first pass did.
        torch.backends.cuda.enable_cudnn_sdp(False)
        args._n_gpu = min(args.n_gpu, 1)  # several GPUs are used by several processes, never by DataParallel
        neighbour = None if objective.sam is None else Neighbour(model, objective.sam)
        self._step_rows: list[Batch] = []  # a step's micro-batches
        self._rows = rows
        self.passes = passes_of(model, args, objective, rows, processing_class)
        if forget_levels is not None:
            self.push_up_to(forget_levels)
        if args.should_save:  # else transformers would, also one that has been removed meanwhile
            make_directory(Path(str(args.output_dir)))
        super().__init__(
            model=model,
            args=args,
            train_dataset=ForgetRetain(rows.forget, rows.retain),
            data_collator=collator(
                Fit.of(causal_lm(model)).padding(processing_class),
                with_retain=objective.needs_retain,
                pack=args.padding_free and packs_rows(model),
                joint_tokens=0 if objective.parts_go_apart else args.joint_pass_tokens,
            ),
            processing_class=processing_class,
            **trainer_kwargs,
        )
        with in_script_words(args):
            self.step_batches = sampler_of(args, rows)
        self.add_callback(EpochOfSampler(self.step_batches))
        self.add_callback(FiniteSteps(self._step_is_finite, self._rows_not_finite, say))
        heard = say if args.process_index == 0 else logger.warning  # what happens to one process alone
        self.divided = DividedSteps(
            self._collated, self.passes.answers_per_row, args.per_device_train_batch_size, heard
        )
        self.forget_point = ForgetPoint(
            self.passes, neighbour, self.divided, self._next_lesson, self.accelerator, args.device, self._sum_gradients
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        files = AdapterFiles(Path(output_dir or str(self.args.output_dir)))
        if self.args.should_save:
            make_directory(files.path)
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            # safetensors lets nobody else read its files; a server may run as somebody else
            shutil.copymode(files.adapter_config, files.weights)
            if _internal_call and output_dir is not None:  # a checkpoint
                write_digest(files)

    def _save_rng_state(self, output_dir: str) -> None:  # a checkpoint's last file but trainer_state.json
        super()._save_rng_state(output_dir)
        parts = gather_object([self.divided.parts]) if self.args.world_size > 1 else [self.divided.parts]
        if self.args.should_save:
            files = AdapterFiles(Path(output_dir))
            self.divided.save(files, parts)
            files.adversary.unlink(missing_ok=True)  # of an earlier time
            adversary, step = self.passes.adversary, self.state.global_step
            if adversary is not None and self.step_batches.attack_began(step) < step:
                adversary.save(files)
            write_digest(files)

    def restore(self, checkpoint: str) -> None:
        """Restores the adapter and the state of `checkpoint` without training: `train` would take at least one step."""
        self._load_from_checkpoint(checkpoint)
        self.state = TrainerState.load_from_json(str(AdapterFiles(Path(checkpoint)).trainer_state))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        files = AdapterFiles(Path(resume_from_checkpoint))
        if self.args.layered is not None or self.args.attack_steps > 1:
            began = TrainerState.load_from_json(str(files.trainer_state)).max_steps
            now = steps_of(self._rows, self.args)
            if began != now:
                raise UserError(
                    f"The run in '{files.path.parent}' began with {began} steps, over which its stages and attackers "
                    f"are laid out, and now has {now}: resume it with {began}, or start anew."
                )
        restore_adapter(self.model, load_file(files.weights))
        self.divided.resume(files, self.args.process_index, self.args.world_size)
        if self.passes.adversary is not None:
            self.passes.adversary.resume(files, self.step_batches.attack_began(step_of(files.path)))

    def push_up_to(self, levels: Sequence[float]) -> None:
        """Sets the mean NLL per answer token, in nats, up to which each forget row is pushed.

        Raises:
            UserError: not one for each row, no numbers, or a term that does not look at the forgotten answers.
        """
        number, answers, term = self._rows.num_forget, len(self._rows.forget), self.passes.objective.forget_term
        if term in REFUSING_TERMS:
            raise UserError(
                f"forget_levels apply to the forgotten answers, but {term} trains on a refusal: leave them out."
            )
        if len(levels) != number:
            raise UserError(f"There are {len(levels)} forget_levels for {number} rows to forget: give one for each.")
        if wrong := [level for level in levels if not isinstance(level, Real | Tensor) or math.isnan(level)]:
            raise UserError(f"forget_levels has {wrong[0]!r}: give a mean NLL per token for each row.")
        self.passes.levels = torch.tensor([*levels, *[math.inf] * (answers - number)])  # another answer has no end

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self.passes.objective.forget_level != "none" and self.passes.levels is None:
            raise UserError("forget_level holdout needs forget_levels: lowmem_npo.training.forget_level makes them.")
        output = super().train(*args, **kwargs)
        return output._replace(training_loss=output.metrics.get("train_loss", output.training_loss))  # see `log`

    # -- data: one forget and one retain batch per step -------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Plain, not sharded by accelerate: `StepBatches` already yields this process's share of every step."""
        return DataLoader(
            self.train_dataset,
            batch_sampler=self.step_batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Any]:
        """The micro-batches of one optimiser step, and its `StepTotals` over all of them and all processes."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        forget, retain = ([batch[part] for batch in batches if batch[part]] for part in ("forget", "retain"))
        every = self.passes.answers_per_row
        counts = (
            sum(len(b) for b in forget) // every,
            sum(sum(b.answers[::every]) for b in forget),
            sum(b.num_answers for b in retain),
            sum(n for b in retain for row, n in zip(b.rows, b.answers, strict=True) if row >= self._rows.num_retain),
        )
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(torch.tensor(counts, device=device), reduction="sum").tolist()
        self._step_rows = batches
        self.divided.begin()
        self.forget_point.begin(batches)
        totals = StepTotals(*counts)
        self.passes.metrics.begin_step(totals)
        return batches, totals

    def shown(self, step: int) -> Shown:
        """What global step `step`, from 0, shows of the rows to retain, over all processes."""
        return self._rows.shown(self.step_batches.step_rows(step)[1])

    @property
    def num_retain(self) -> int:
        return self._rows.num_retain

    def _next_lesson(self) -> Lesson:
        """What the adversary is taught before the step that comes, in passes no larger than the step's."""
        where = (self.step_batches, self.state.global_step, self.divided.parts)
        return Lesson.of(*where, self._rows.taught_again, cast(Collate, self.data_collator))

    # -- the step ---------------------------------------------------------------------------------------------------

    def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Adds the gradients of one micro-batch to the adapter's; returns its share of the step's loss, detached."""
        totals: StepTotals = num_items_in_batch  # which the Trainer passes on from `get_batch_samples`
        train_adapter(self.model)
        passes = partial(self._add_gradients, totals=totals)
        loss = self.divided.run(inputs, passes, self._restart_step, self.state.global_step + 1)
        if self.accelerator.sync_gradients:
            self._sum_gradients()
        # The Trainer reports the mean over processes; ours are shares of a sum. Its sum would never be finite again.
        return torch.where(loss.isfinite(), loss * self.args.world_size, 0.0)

    def _add_gradients(self, batch: Batch, totals: StepTotals) -> Tensor:
        """Those of a micro-batch or of a part of one; returns its loss, detached."""
        forget, retain, both = (rows and rows.to(self.args.device) for rows in map(batch.get, PARTS))
        loss = torch.zeros((), device=self.args.device)
        step = self.state.global_step
        self.forget_point.find(step, self.step_batches.attack_began(step), totals)
        parts = ((forget, self.passes.forget, self.forget_point.there()), (retain, self.passes.retain, nullcontext()))
        passes = [(partial(run, rows), where) for rows, run, where in parts if rows]
        if forget and both:
            passes = [(partial(self.passes.both, both, len(forget)), nullcontext())]
        for run, where in passes:  # one after the other: the graphs of two passes never meet
            with where:
                part = run(totals)
                self.accelerator.backward(part)
            loss += part.detach()
            del part
        return loss

    def _restart_step(self) -> None:
        """Drops what the step has added to gradients and figures. The adversary and the neighbour, once there, stay.

        Raises:
            torch.OutOfMemoryError: see `ForgetPoint.restart`.
        """
        self.forget_point.restart()
        self.model.zero_grad()

    def _collated(self, picks: list[Pick]) -> Batch:
        rows: list[Any] = [self.train_dataset[pick] for pick in picks]
        return self.data_collator(rows)

    def _sum_gradients(self) -> bool:
        """Sums the adapter's gradients over all processes, if there are several: the passes call the bare module, so
        DDP's own hooks never run, and losses are already shares of the whole step, so a sum (not DDP's mean) is exact.
        """
        if self.args.world_size == 1:
            return False
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(flat)
        for p, total in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = total.view_as(p)
        return True

    def _step_is_finite(self) -> bool:
        """Whether the step's figures and its gradient are finite, in every process; ends the step for its figures."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        is_finite = self.passes.metrics.end_step(get_total_norm(gradients))
        if self.args.world_size > 1:
            bad = torch.tensor(int(not is_finite), device=self.args.device)
            is_finite = int(self.accelerator.reduce(bad, reduction="sum")) == 0
        return is_finite

    def _rows_not_finite(self) -> list[str]:
        """The rows of the step, in words and by part, that have no finite log-probs when each is alone, or all of them
        if none is at fault by itself."""
        parts = PARTS[:2]
        passes = [(part, batch[part]) for part in parts for batch in self._step_rows]
        rows = [(part, i) for part, of_part in passes if of_part for i in of_part.rows]
        with torch.no_grad(), eval_mode(self.model):
            damaged = [row for row in rows if not self._is_finite(*row)]
        if self.args.world_size > 1:
            rows, damaged = gather_object(rows), gather_object(damaged)
        places = {self._rows.place(*row) for row in damaged or rows}
        by_part = {part: [i for of_part, i in places if of_part == part] for part in parts}
        return [self._rows.named(part, of_part) for part, of_part in by_part.items() if of_part]

    def _is_finite(self, part: str, row: int) -> bool:
        alone = RowBatch.of([getattr(self.train_dataset, part)[row]], pack=False).to(self.args.device)
        answers = answer_hidden(self.model, alone)
        return bool(token_logprobs(answers.hidden, self.passes.head, answers.targets).isfinite().all())

    # -- logging ----------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the step's own quantities, averaged over the optimiser steps since the last log line."""
        if "loss" in logs and self.passes.metrics.steps:
            names, values = self.passes.metrics.means_and_reset()
            if self.args.world_size > 1:
                values = self.accelerator.reduce(values.to(self.args.device), reduction="sum")
            logs.update(zip(names, values.tolist(), strict=True))
            if not values.isfinite().all():
                logs["loss"] = math.nan
            if self.divided.parts > 1:
                logs["micro_batch_parts"] = self.divided.parts
            if self._rows.folds is not None and isinstance(self.step_batches, LayeredBatches):
                logs["stage"] = self.step_batches.stage(self.state.global_step - 1) + 1
        losses = [line["loss"] for line in self.state.log_history if math.isfinite(line.get("loss", math.nan))]
        if "train_loss" in logs and losses:  # the Trainer's is of the steps since the run was resumed
            logs["train_loss"] = fmean(losses)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: the Trainer's estimate knows neither the reference pass nor the missing logits."""
        return 0


def _adapted(
    model: PreTrainedModel | PeftModel, peft_config: AdapterConfig | None, args: NPOConfig, say: Say
) -> PeftModel:
    """The model with an adapter to train, its own or a new one; raises UserError where there is none, or the model is
    not one that can be trained."""
    if not isinstance(model, PeftModel):
        if not isinstance(peft_config, AdapterConfig):
            others = "" if peft_config is None else f", not a {type(peft_config).__name__}"
            raise UserError(
                f"NPOTrainer trains an adapter: give a PeftModel, or peft_config=AdapterConfig(...){others}."
            )
        set_seed(args.seed)  # as the Trainer does later, too late for the adapter
        with in_script_words(args):
            model = attach_lora(model, peft_config)
        if line := note_on_experts(model, peft_config):
            say(line)
    elif peft_config is not None:
        say("The model has an adapter, which is trained; peft_config, which would make a new one, is not used.")
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("The model's adapter is frozen, so nothing is trained: load it with is_trainable=True.")
    of_adapter = (getattr(model.base_model, "prefix", "lora_"), "modules_to_save", "trainable_tokens")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not any(mark in name for mark in of_adapter):
            raise UserError(
                f"'{name}' is trained and is not the adapter's: the reference, which is the model without its adapter, "
                "would move with it. Freeze it; of PEFT's settings, bias must be 'none'."
            )
    check_head(model)
    check_causal(model)
    return model


def _with_own_checkpointing(model: PeftModel, args: NPOConfig) -> NPOConfig:
    """Where layers are to be recomputed, the arguments without that: transformers' own acts in training mode alone, in
    which the layers here are not, so that of this package is on instead."""
    asked = [name for name in ("gradient_checkpointing", "activation_checkpointing") if getattr(args, name, False)]
    if asked:
        enable_checkpointing(causal_lm(model))
        args = copy.copy(args)
        for name in asked:
            setattr(args, name, False)
    return args
