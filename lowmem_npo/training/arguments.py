"""The trainer's arguments from a run's configuration, for the run itself and for its estimate."""

from __future__ import annotations

from copy import copy
from functools import partial
from typing import Any, cast

import torch
from accelerate import PartialState
from transformers import Trainer, get_scheduler
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from lowmem_npo.config import RunConfig
from lowmem_npo.errors import UserError, one_line
from lowmem_npo.model.loading import check_can_run, resolve_device
from lowmem_npo.ranges import check_values, shortened
from lowmem_npo.run_directory import RunDirectory
from lowmem_npo.training.honoured import HONOURED, RANGES, as_is, check_effect
from lowmem_npo.training.npo_config import NPOConfig
from lowmem_npo.training.reporting import check_reporting


def npo_config(config: RunConfig, kind: type[NPOConfig] = NPOConfig) -> NPOConfig:
    """The trainer's arguments for a run, as an instance of `kind`.

    Raises:
        UserError: an argument that would have no effect, or has a value that is not valid.
    """
    training, on_cpu = config.training, resolve_device(config.model.device).type == "cpu"
    process, reference = PartialState(cpu=on_cpu), RunDirectory(config).reference_dir
    settings = {
        **vars(config.objective),
        "output_dir": str(config.output_dir),
        "per_device_train_batch_size": training.micro_batch_size or training.batch_size,
        "gradient_accumulation_steps": training.micro_batches(process.num_processes),
        "step_batch_size": training.batch_size,
        "retain_batch_size": training.retain_rows,
        "layered": training.layered,
        "layered_weight": training.layered_weight,
        "num_train_epochs": training.epochs,
        "max_steps": training.max_steps or -1,
        "learning_rate": training.lr,
        "seed": training.seed,
        "joint_pass_tokens": 0 if config.memory.joint_pass_tokens == "auto" else config.memory.joint_pass_tokens,
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
    """Raises a UserError for what loading or the Trainer would refuse: attention, optimiser, schedule, reports."""
    check_can_run(config.model, resolve_device(config.model.device))
    args = npo_config(config)
    optimizer_name, schedule_name = OptimizerNames(args.optim).value, SchedulerType(args.lr_scheduler_type).value
    named = f"--optim {optimizer_name}" + (f", --optim-args {args.optim_args}" if args.optim_args else "")
    try:
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = optimizer_class([torch.nn.Parameter(torch.zeros(1))], **options)
        named = f"--lr-scheduler-type {schedule_name}"
        named += f", --lr-scheduler-kwargs {args.lr_scheduler_kwargs}" if args.lr_scheduler_kwargs else ""
        steps = 1000  # any number does
        schedule = partial(get_scheduler, args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps)
        schedule(cast(dict | None, args.lr_scheduler_kwargs) or None)
    except Exception as error:  # each optimiser and schedule has errors of its own
        raise UserError(f"{named}: not valid, or not to be had here ({shortened(str(error))}).") from error
    if args.optim_args:
        without = copy(args)
        without.optim_args = None
        if Trainer.get_optimizer_cls_and_kwargs(without) == (optimizer_class, options):
            raise _takes_none("--optim-args", args.optim_args, f"--optim {optimizer_name}")
    if args.lr_scheduler_kwargs:
        try:
            schedule({"no schedule has this": None})
        except Exception:  # it reads them
            pass
        else:
            raise _takes_none("--lr-scheduler-kwargs", args.lr_scheduler_kwargs, f"--lr-scheduler-type {schedule_name}")
    check_reporting(args.report_to or [])


def honoured_args(config: RunConfig) -> dict[str, Any]:
    """`config.trainer_args`, complete, without those that ask for what is done anyway.

    Raises:
        UserError: an argument that would have no effect.
    """
    args = config.trainer_args
    defaults = as_is() | {"bf16": config.model.dtype == "bf16"}
    if "ddp_backend" in args:
        defaults["ddp_backend"] = PartialState().backend or args["ddp_backend"]
    check_effect(args, defaults, lambda name, value: f"--{name.replace('_', '-')} {value}")
    honoured = {name: value for name, value in args.items() if name in HONOURED}
    check_values(honoured, RANGES)
    for what in ("save", "logging"):
        steps, strategy = args.get(f"{what}_steps"), args.get(f"{what}_strategy", "steps")
        if steps is None:
            continue
        if strategy != "steps":
            raise UserError(
                f"--{what}-steps would have no effect under --{what}-strategy {strategy}: give one of them."
            )
        honoured[f"{what}_strategy"] = "steps"
    named = [name for name in ("run_name", "project", "trackio_space_id") if args.get(name)]
    if named and args.get("report_to") in (None, "none", []):
        raise UserError(f"--{named[0].replace('_', '-')} would have no effect without --report-to: give both.")
    return honoured


def _takes_none(option: str, value: Any, by: str) -> UserError:
    return UserError(f"{option} {value} would have no effect: {by} takes none.")


def _refused(error: Exception) -> UserError:
    return UserError(f"An option of transformers.TrainingArguments is not valid: {one_line(error)}")
