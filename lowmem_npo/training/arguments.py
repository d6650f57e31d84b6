"""The trainer's arguments from a run's configuration, for the run itself and for its estimate."""

from __future__ import annotations

from accelerate import PartialState

from lowmem_npo.config import RunConfig
from lowmem_npo.model.loading import resolve_device
from lowmem_npo.run_directory import RunDirectory
from lowmem_npo.training.trainer import NPOConfig


def npo_config(config: RunConfig, kind: type[NPOConfig] = NPOConfig) -> NPOConfig:
    """The trainer's arguments for a run, as an instance of `kind`."""
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
    }
    if "save_steps" in config.trainer_args:  # else the Trainer would ignore it
        settings["save_strategy"] = "steps"
    return kind(**{**settings, **config.trainer_args})
