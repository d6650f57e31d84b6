"""Where a run resumes: at its newest checkpoint of which all loads.

The Trainer itself continues without what is missing, with fresh moments, another schedule or other random numbers.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerState
from transformers.trainer import safe_globals

from lowmem_npo.console import Say
from lowmem_npo.endings import lacks_memory
from lowmem_npo.files import file_sha256, load_json, write_atomically
from lowmem_npo.model.adapters import adapter_weights
from lowmem_npo.run_directory import AdapterFiles, RunFiles, step_of

DAMAGED = "damaged-"  # before the name of a checkpoint from which no run can go on
STATE = ("optimizer.pt", "scheduler.pt", "rng_state.pth")  # of one process, beside the weights


def resume_point(
    run: RunFiles, trainer: Trainer, steps: int, say: Say, also: Callable[[int], str | None] = lambda step: None
) -> str | None:
    """The newest whole checkpoint of `run`; None if there is none, and the run of `steps` steps starts from its
    beginning. `also` reports what else a step lacks. What is not whole is reported and renamed: the Trainer, which
    removes the oldest checkpoints by their dates, would keep it in place of a whole one. For the main process."""
    whole: list[Path] = []
    for checkpoint in run.checkpoints():
        step = step_of(checkpoint)
        # Of those before, which may have been saved without their state, only what is kept of them counts.
        to_train = step < steps if not whole else not trainer.args.save_only_model
        damage = _damage(AdapterFiles(checkpoint), trainer, to_train) or (None if whole else also(step))
        if damage is None:
            whole.append(checkpoint)
        else:
            aside = set_aside(checkpoint)
            say(f"--resume: {checkpoint.name} is not whole: {damage}. It is {aside.name} now, until the run has ended.")
    if not whole:
        say("--resume: there is no whole checkpoint, so the run starts from its beginning.")
        return None
    say(f"--resume: continues from {whole[0].name}.")
    return str(whole[0])


def set_aside(checkpoint: Path) -> Path:
    """Renames a checkpoint from which no run can go on; returns its new place, where it is until the run has ended."""
    aside = checkpoint.with_name(f"{DAMAGED}{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)  # of an earlier time
    return checkpoint.rename(aside)


def remove_damaged(run: RunFiles, say: Say) -> None:
    """Removes what was set aside, and says so: of a run that is complete nothing in it is needed."""
    aside = sorted(path for path in run.path.glob(f"{DAMAGED}checkpoint-*") if path.is_dir())
    for path in aside:
        shutil.rmtree(path, ignore_errors=True)
    if aside:
        say(f"{', '.join(path.name for path in aside)} removed: the run is complete without.")


def write_digest(files: AdapterFiles) -> None:
    """Writes the hashes of a checkpoint's files so far: what a format checks by itself, if anything, is that a file is
    one of its kind, not that it belongs to this step."""
    there = [file for file in _hashed(files) if file.exists()]
    write_atomically(files.digest, "".join(f"{file_sha256(file)}  {file.name}\n" for file in there))


def _hashed(files: AdapterFiles) -> list[Path]:
    states = (files.path / name for name in STATE)
    return [files.adapter_config, files.weights, files.micro_batch_parts, files.adversary, *states]


def _damage(files: AdapterFiles, trainer: Trainer, to_train: bool) -> str | None:
    """What of a checkpoint is missing or damaged.

    to_train: training continues from it; else only its adapter and its state are needed.
    """
    hashes = _hashes(files.digest)
    checks: dict[Path, Callable[[Path], bool]] = {
        files.trainer_state: lambda file: TrainerState.load_from_json(str(file)).global_step == step_of(files.path),
        files.adapter_config: lambda file: isinstance(load_json(file), dict),
        files.weights: lambda file: _is_adapter(file, trainer.model),
    }
    if to_train:
        assert trainer.model is not None
        parameters = sum(p.requires_grad for p in trainer.model.parameters())
        checks[files.path / "optimizer.pt"] = lambda file: (
            sum(len(group["params"]) for group in _load(file)["param_groups"]) == parameters
        )
        checks[files.path / "scheduler.pt"] = lambda file: "last_epoch" in _load(file)
        processes = trainer.args.world_size
        names = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
        states = [files.path / name for name in names]
        if not any(state.exists() for state in states):  # saved by another number of processes
            states = sorted(files.path.glob("rng_state*.pth")) or states
        if files.micro_batch_parts.exists() or files.micro_batch_parts.name in hashes:
            checks[files.micro_batch_parts] = lambda file: len(json.loads(file.read_bytes())["parts"]) > 0
        if files.adversary.exists() or files.adversary.name in hashes:
            checks[files.adversary] = _is_finite
        checks |= {state: lambda file: {"python", "numpy", "cpu"} <= _load(file).keys() for state in states}
    hashed = {file.name for file in _hashed(files) if file in checks}
    checks[files.digest] = lambda file: hashed <= hashes.keys()  # without, a damage of numbers would not be seen
    for file, is_whole in checks.items():
        if not file.is_file():
            return f"{file.name} is missing"
        try:
            if is_whole(file) and hashes.get(file.name) in (None, file_sha256(file)):
                continue
        except Exception as error:  # every format and reader has errors of its own
            if lacks_memory(error):
                raise
        return f"{file.name} is damaged or of another run"
    return None


def _is_adapter(file: Path, model: Any) -> bool:
    """Whether the weights are those of the model's adapter, by names and shapes."""
    weights = load_file(file)
    return all(
        name in weights and weights[name].shape == tensor.shape for name, tensor in adapter_weights(model).items()
    )


def _is_finite(file: Path) -> bool:
    weights = load_file(file).values()
    return len(weights) > 0 and all(bool(weight.isfinite().all()) for weight in weights)


def _hashes(digest: Path) -> dict[str, str]:
    """File name -> hash, of the files that `write_digest` knew."""
    if not digest.exists():
        return {}
    lines = digest.read_text(encoding="utf-8", errors="replace").splitlines()
    return {name: sha256 for sha256, _, name in (line.partition("  ") for line in lines)}


def _load(file: Path) -> Any:
    """What torch.save wrote, its checksums verified, which torch.load does not do."""
    with zipfile.ZipFile(file) as archive:
        if archive.testzip() is not None:
            raise ValueError(f"{file} is damaged")
    with safe_globals():
        return torch.load(file, map_location="cpu", weights_only=True)
