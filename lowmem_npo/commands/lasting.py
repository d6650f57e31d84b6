"""Forgetting that lasts: which options make it, and the command that tests whether it does."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from lowmem_npo.config import ModelConfig, OutputConfig
from lowmem_npo.evaluation.leaks.quantization import QUANTIZATION
from lowmem_npo.evaluation.leaks.relearning import RELEARNING
from lowmem_npo.files import expanded
from lowmem_npo.model.saved_adapter import settings_of_run
from lowmem_npo.run_directory import RunFiles, run_of_adapter

LASTING = ("layered", "adversary", "sam")  # options against relearning
ATTACKING_MERGED = (QUANTIZATION.name, RELEARNING.name)  # in one evaluation, they attack merged weights as well


def made_last_by(run: Mapping[str, Any]) -> list[str]:
    """The options of a run that made forgetting last; under the recipe of that name, the recipe."""
    used = [f"--{name}" for name in LASTING if run.get(name) is not None]
    return ["--recipe lasting"] if used and run.get("recipe") == "lasting" else used


def testing_command(adapter: str, tests: Sequence[str], base: Sequence[str] = (), with_place: bool = True) -> str:
    """The command that runs leak tests on an adapter: into a directory of its own where the default one is taken.

    base: the options that name its base. with_place: whether it says where on this machine adapter and base are.
    """
    folder = expanded(adapter).resolve()
    name = adapter if with_place else without_place(folder)
    words = ["--adapter", name, *(base if with_place else ())]
    run_settings = settings_of_run(adapter)
    words += _loading(run_settings, with_place)
    files = RunFiles(folder)
    if (place := files.next_evaluation().path) != files.evaluation.path:
        words += ["--output-dir", str(Path(name, place.name))]
    rows = "" if run_settings else " --forget …"  # evaluate knows the rows of a run
    return f"`lowmem-npo evaluate {shlex.join(words)}{rows} --leaks {' '.join(tests)}`"


def without_place(path: Path) -> str:
    """What is in the directory of a run, or of one of its checkpoints, by the run's name; wherever that lies."""
    run = run_of_adapter(path).path
    return str(Path(run.name, path.relative_to(run)))


def _loading(run: Mapping[str, Any], with_place: bool) -> list[str]:
    """The options with which `evaluate` loads a model as the run did: where it would otherwise measure another one, or
    where that would not fit. with_place: whether those are among them that only fit this machine."""
    words = [f"--{name.replace('_', '-')}" for name in ("qlora", "stream_weights") if run.get(name)]
    valued = ["dtype", "attn", *(("device", "quantized_cache") if with_place else ())]
    defaults = {f.name: f.default for f in fields(ModelConfig)}
    for name in valued:
        if (value := run.get(name)) not in (None, defaults[name]):
            words += [f"--{name.replace('_', '-')}", str(value)]
    if with_place and run.get("stream_from") == "cache":  # else there may be room, or the cache is found
        words += ["--stream-from", "cache"]
    if (rows := run.get("eval_batch_size")) not in (None, OutputConfig.eval_batch_size):
        words += ["--batch-size", str(rows)]
    return words


def next_step(adapter: str) -> str:
    """What is left to do after a run that made forgetting last and has not tested it."""
    return (
        f"Whether that lasts was not tested: {testing_command(adapter, ATTACKING_MERGED)} attacks it, and "
        "`lowmem-npo merge` then writes the weights that it lasts in."
    )
