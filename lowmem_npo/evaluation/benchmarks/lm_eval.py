"""Tasks of EleutherAI's lm-evaluation-harness, such as MMLU, on the model as it stands in memory."""

from __future__ import annotations

import difflib
import importlib.util
import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.scoring.eval_mode import evaluating
from lowmem_npo.model import compute_autocast

INSTALL = "pip install 'lowmem-npo[eval]'"


def check_tasks(tasks: Sequence[str], path: str | None = None) -> None:
    """Raises UserError where lm-eval is not installed or does not know a task. Loads neither model nor data."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"--lm-eval needs a package that is not installed: {INSTALL}")
    known = _task_manager(tasks, path).all_tasks
    for task in tasks:
        if task not in known:
            near = difflib.get_close_matches(task, known, n=3)
            hint = f"; near it: {', '.join(near)}" if near else "; `lm_eval ls tasks` lists them"
            raise UserError(f"--lm-eval {task}: lm-eval has no such task{hint}.")


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    path: str | None = None,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, float]]:
    """Task -> metric -> value for the named tasks (a group such as mmlu with its own aggregate, not its members).

    limit: questions per task, the first ones; None for all. Raises UserError where a task's data cannot be had.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with evaluating(model), compute_autocast(model):
        try:
            found = simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=list(tasks),
                num_fewshot=shots,
                limit=limit,
                task_manager=_task_manager(tasks, path),
                log_samples=False,
                bootstrap_iters=0,
            )
        except (OSError, ValueError) as error:  # OSError: no network, no local copy; ValueError: no such data set
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"--lm-eval {' '.join(tasks)}: the task's data cannot be loaded ({reason}).") from error
    return {task: _numbers(found["results"][task]) for task in tasks}


def mmlu_accuracy(results: dict[str, dict[str, float]]) -> float | None:
    """The accuracy over all MMLU questions, or None where MMLU was not run."""
    return results.get("mmlu", {}).get("acc")


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """{"acc,none": 0.5, "acc_stderr,none": "N/A", "alias": "mmlu"} -> {"acc": 0.5}"""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and "stderr" not in name and "," in name
    }


def _task_manager(tasks: Sequence[str], path: str | None) -> Any:
    """lm-eval's index of tasks; of `path` alone where that holds them all."""
    if path is not None and set(tasks) <= set(_index(path, False).all_tasks):
        return _index(path, False)
    return _index(path, True)


@lru_cache(maxsize=2)  # reading lm-eval's own task files takes half a minute
def _index(path: str | None, with_defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=path, include_defaults=with_defaults)
