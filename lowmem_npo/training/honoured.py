"""Which of `transformers.TrainingArguments` this trainer honours; the others are refused instead of ignored."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import MISSING, fields
from typing import Annotated, Any

from annotated_types import Interval

from lowmem_npo.errors import UserError
from lowmem_npo.ranges import MOST, Count, Positive, PositiveOrZero, Probability, Seed

# The fields that have an effect here, besides those that our own options set.
HONOURED = frozenset({
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm", "tf32", "full_determinism", "data_seed", "dataloader_num_workers",
    "dataloader_pin_memory", "save_strategy", "save_steps", "save_total_limit", "save_only_model", "logging_strategy",
    "logging_steps", "logging_first_step", "logging_nan_inf_filter", "log_level", "log_level_replica", "disable_tqdm",
    "report_to", "run_name", "project", "trackio_space_id",
})  # fmt: skip
# Those that our own options set, and what a script of its own may set beside them.
FROM_PYTHON = frozenset({
    "output_dir", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps",
    "learning_rate", "seed", "use_cpu", "gradient_checkpointing", "activation_checkpointing", "ddp_backend",
    "ddp_timeout", "accelerator_config", "push_to_hub", "hub_model_id", "hub_token", "hub_strategy",
    "hub_private_repo", "hub_always_push", "hub_revision",
})  # fmt: skip
# The values that they may have, where `TrainingArguments` takes any.
RANGES = {
    "warmup_steps": Annotated[float, Interval(ge=0, le=MOST)], "weight_decay": PositiveOrZero,
    "adam_beta1": Probability, "adam_beta2": Probability, "adam_epsilon": PositiveOrZero,
    "max_grad_norm": PositiveOrZero | None, "data_seed": Seed | None,
    "dataloader_num_workers": Annotated[int, Interval(ge=0, le=1024)],
    "logging_steps": Annotated[float, Interval(gt=0, le=MOST)], "save_steps": Annotated[float, Interval(gt=0, le=MOST)],
    "save_total_limit": Count | None,
}  # fmt: skip
# Those of a script's own: on the command line they are options of ours.
SCRIPT_RANGES = {
    "num_train_epochs": Positive, "max_steps": Annotated[int, Interval(ge=-1, le=MOST)],
    "learning_rate": PositiveOrZero, "per_device_train_batch_size": Count, "gradient_accumulation_steps": Count,
    "seed": Seed,
}  # fmt: skip
# What is done anyway, where it is not the default: how layers are recomputed.
DONE = dict.fromkeys(("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"), {"use_reentrant": False})
RECOMPUTED = {".*_checkpointing_kwargs": "layers are recomputed with use_reentrant=False and nothing else"}
INSTEAD = RECOMPUTED | {
    "bf16|fp16": "the compute type is --dtype, bf16 or float32",
    "use_cpu": "give --device cpu",
    "per_device_eval_batch_size": "give --eval-batch-size",
    "eval_.*|do_eval|load_best_.*|metric_for_.*": "--stop-when measures while training and keeps the best adapter",
    "activation_checkpointing": "give --gradient-checkpointing",
}
IN_SCRIPTS = RECOMPUTED | {
    "bf16|fp16": "load the model in the type that it is to compute in",
    "per_device_eval_.*|eval_.*|do_eval|load_best_.*|metric_for_.*": "this trainer measures nothing while it trains; "
    "`lowmem-npo evaluate` measures the adapter",
}
# Values that ask for an evaluation by the Trainer, or for its own training step.
NOT_SUPPORTED = {
    "save_strategy": "best",
    "lr_scheduler_type": "reduce_lr_on_plateau|greedy",
    "optim": "schedule_free_.*|lomo|adalomo|galore_.*|apollo_.*",
}


def as_is() -> dict[str, Any]:
    """What is done without an argument: its default."""
    from transformers import TrainingArguments  # late: the command line needs the names above

    return {f.name: None if f.default is MISSING else f.default for f in fields(TrainingArguments)}


def check_supported(name: str, value: Any, spelled: str) -> None:
    """Raises UserError for a value of an honoured argument that needs another trainer; spelled: both, as given."""
    if is_unsupported(name, value):
        raise UserError(f"{spelled} is not supported by this trainer: choose another, or leave it out.")


def is_unsupported(name: str, value: Any) -> bool:
    """Whether this value of an honoured argument needs another trainer."""
    return bool(re.fullmatch(NOT_SUPPORTED.get(name, ""), str(value)))


def check_effect(
    args: Mapping[str, Any],
    as_is: Mapping[str, Any],
    spelled: Callable[[str, Any], str],
    instead: Mapping[str, str] = INSTEAD,
) -> None:
    """Checks that all of `args` are honoured.

    Args:
        args: the arguments by name.
        as_is: values that ask for what is done anyway.
        spelled: an argument and its value as the user gave them, for messages.
        instead: patterns of names, and what to give instead of such an argument.

    Raises:
        UserError: an argument would have no effect, or its value is not supported.
    """
    for name, value in args.items():
        if name in HONOURED:
            check_supported(name, value, spelled(name, value))
        elif _or_nothing(value) not in (_or_nothing(as_is.get(name)), _or_nothing(DONE.get(name, as_is.get(name)))):
            hint = next((hint for names, hint in instead.items() if re.fullmatch(names, name)), "leave it out")
            raise UserError(
                f"{spelled(name, value)} would have no effect: {hint} (docs/options.md lists what is honoured)."
            )


def _or_nothing(value: Any) -> Any:
    """None, false, an empty list and "no" are one: HfArgumentParser makes false of a "no". A dictionary may be JSON."""
    if isinstance(value, str) and value.startswith("{"):
        with suppress(ValueError):
            value = json.loads(value)
    return None if not value or value == "no" else value
