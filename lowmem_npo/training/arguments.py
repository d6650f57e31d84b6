"""The trainer's arguments from a run's configuration, for the run itself and for its estimate."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from typing import Any, cast

import torch
from accelerate import PartialState
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations

from lowmem_npo.config import RunConfig
from lowmem_npo.errors import UserError
from lowmem_npo.model.loading import resolve_device
from lowmem_npo.run_directory import RunDirectory
from lowmem_npo.training.trainer import NPOConfig

# The fields of `TrainingArguments` that have an effect here, besides those that our own options set.
HONOURED = frozenset({
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm", "tf32", "full_determinism", "data_seed", "dataloader_num_workers",
    "dataloader_pin_memory", "save_strategy", "save_steps", "save_total_limit", "save_only_model", "logging_strategy",
    "logging_steps", "logging_first_step", "logging_nan_inf_filter", "log_level", "log_level_replica", "disable_tqdm",
    "report_to", "run_name", "project", "trackio_space_id",
})  # fmt: skip
INSTEAD = {
    "bf16|fp16": "the compute type is --dtype, bf16 or float32",
    "use_cpu": "give --device cpu",
    "per_device_eval_batch_size": "give --eval-batch-size",
    "eval_.*|do_eval|load_best_.*|metric_for_.*": "--stop-when measures while training and keeps the best adapter",
    "activation_checkpointing": "give --gradient-checkpointing",
}
# Values that ask for an evaluation by the Trainer, or for its own training step.
WITHOUT_EFFECT = {
    "save_strategy": "best",
    "lr_scheduler_type": "reduce_lr_on_plateau|greedy",
    "optim": "schedule_free_.*|lomo|adalomo|galore_.*|apollo_.*",
}


def npo_config(config: RunConfig, kind: type[NPOConfig] = NPOConfig) -> NPOConfig:
    """The trainer's arguments for a run, as an instance of `kind`.

    Raises:
        UserError: an argument that would have no effect, or has a value that is not valid.
    """
    training, on_cpu = config.training, resolve_device(config.model.device).type == "cpu"
    process, reference = PartialState(cpu=on_cpu), RunDirectory(config).reference_dir
    settings = {
        **vars(config.objective),
        "output_dir": config.output.output_dir,
        "per_device_train_batch_size": training.micro_batch_size or training.batch_size,
        "gradient_accumulation_steps": training.micro_batches(process.num_processes),
        "step_batch_size": training.batch_size,
        "retain_batch_size": training.retain_rows,
        "num_train_epochs": training.epochs,
        "max_steps": training.max_steps or -1,
        "learning_rate": training.lr,
        "seed": training.seed,
        "reference_dir": None if reference is None else str(reference),
        "use_cpu": on_cpu,
        "report_to": "none",
        "disable_tqdm": not process.is_main_process,
        **honoured_args(config),
    }
    try:
        return kind(**settings)
    except (ValueError, TypeError, ImportError) as error:
        raise _refused(error) from error


def check_trainer_args(config: RunConfig) -> None:
    """Raises a UserError for what the Trainer would refuse with the model loaded: optimiser, schedule, reports."""
    args = npo_config(config)
    try:
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = optimizer_class([torch.nn.Parameter(torch.zeros(1))], **options)
        steps = 1000  # any number does
        get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            args.get_warmup_steps(steps),
            steps,
            cast(dict | None, args.lr_scheduler_kwargs) or None,
        )
    except Exception as error:  # each optimiser and schedule has errors of its own
        raise _refused(error) from error
    available = get_available_reporting_integrations()
    for name in args.report_to or []:
        if name not in available:
            names = ", ".join(available) or "none"
            raise UserError(f"--report-to {name}: its package is not installed, or there is none (installed: {names}).")


def honoured_args(config: RunConfig) -> dict[str, Any]:
    """`config.trainer_args`, complete, without those that ask for what is done anyway.

    Raises:
        UserError: an argument that would have no effect.
    """
    args, honoured = config.trainer_args, dict[str, Any]()
    as_is = {f.name: None if f.default is MISSING else f.default for f in fields(TrainingArguments)}
    as_is["bf16"] = config.model.dtype == "bf16"
    if "ddp_backend" in args:
        as_is["ddp_backend"] = PartialState().backend or args["ddp_backend"]
    for name, value in args.items():
        flag = f"--{name.replace('_', '-')}"
        if name in HONOURED:
            if re.fullmatch(WITHOUT_EFFECT.get(name, ""), str(value)):
                raise UserError(f"{flag} {value} is not supported by this trainer: choose another, or leave it out.")
            honoured[name] = value
        elif value != as_is.get(name):
            hint = next((hint for names, hint in INSTEAD.items() if re.fullmatch(names, name)), "leave it out")
            raise UserError(f"{flag} {value} would have no effect: {hint} (docs/options.md lists what is honoured).")
    if args.get("warmup_steps") and args.get("lr_scheduler_type", "constant") == "constant":
        honoured["lr_scheduler_type"] = "constant_with_warmup"  # `constant` ignores a warm-up
    for what in ("save", "logging"):
        steps, strategy = args.get(f"{what}_steps"), args.get(f"{what}_strategy", "steps")
        if steps is None:
            continue
        if steps <= 0:
            raise UserError(f"--{what}-steps must be positive, not {steps:g}.")
        if strategy != "steps":
            raise UserError(
                f"--{what}-steps would have no effect under --{what}-strategy {strategy}: give one of them."
            )
        honoured[f"{what}_strategy"] = "steps"
    return honoured


def _refused(error: Exception) -> UserError:
    return UserError(f"An option of transformers.TrainingArguments is not valid: {' '.join(str(error).split())}")
