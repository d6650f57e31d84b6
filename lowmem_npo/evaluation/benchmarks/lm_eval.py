"""Tasks of EleutherAI's lm-evaluation-harness, such as MMLU, on the model as it is in memory."""

from __future__ import annotations

import difflib
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, cast

from lowmem_npo.errors import UserError, one_line
from lowmem_npo.evaluation.benchmarks.contract import Benchmark, Context, Measured, Selection
from lowmem_npo.evaluation.figures import Figure, at, finite
from lowmem_npo.evaluation.options import Options, free
from lowmem_npo.ranges import CountOrNone

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lowmem_npo.evaluation.scoring.scorer import Scorer

INSTALL = "pip install 'lowmem-npo[eval]'"
MMLU_SHARE = 0.75  # of the accuracy before unlearning; below it SemEval-2025 Task 4 does not rank a model

Metrics = dict[str, float | None]


@dataclass
class LmEvalOptions(Options):
    lm_eval: tuple[str, ...] = free(())
    """Tasks of lm-eval, such as mmlu; they download their data. Needs: pip install 'lowmem-npo[eval]'. `evaluate
    --resume` adds them to those that it began with; none leaves these out."""
    lm_eval_path: str | None = free(None)
    """Folder of further task files for lm-eval."""
    lm_eval_shots: CountOrNone | None = None
    """Examples before each lm-eval question. Default: the task's own number."""


class LmEval(Benchmark[dict[str, Metrics], dict[str, Metrics]]):
    name = "lm_eval"
    group = "lm-eval"
    title = "lm-eval"
    summary = "--lm-eval runs tasks of lm-eval such as MMLU"
    note = "What the model can do beyond the data of this run."
    options = LmEvalOptions
    empty: ClassVar[dict[str, Any]] = {}

    def check(self, options: LmEvalOptions) -> None:
        if options.lm_eval:
            check_tasks(options.lm_eval, options.lm_eval_path)

    def own_sets(self, options: LmEvalOptions) -> dict[str, Selection]:
        return {task: Selection([task], 1) for task in options.lm_eval if task != "none"}  # as --resume may be told

    def measure(self, name: str, selection: Selection, scorer: Scorer, context: Context) -> list[dict[str, Metrics]]:
        part, options = f"lm-eval: {name}", cast(LmEvalOptions, context.config)
        if 0 not in scorer.journal.known(part):
            metrics = run_tasks(
                scorer.loaded_model,
                scorer.tokenizer,
                [name],
                path=options.lm_eval_path,
                shots=options.lm_eval_shots,
                limit=context.config.limit,
                batch_size=context.config.batch_size,
            )
            scorer.journal.write(part, [0], [metrics])
        return [scorer.journal.known(part)[0]]

    def score(self, measured: Measured, context: Context) -> dict[str, Metrics] | None:
        results = self.results(measured)
        mmlu, before = mmlu_accuracy(results), mmlu_accuracy(context.before.get(self.name, {}))
        if mmlu is not None and before and mmlu < MMLU_SHARE * before:
            context.notes.append(
                f"WARNING: MMLU fell from {before:.3f} to {mmlu:.3f}, below {MMLU_SHARE:.0%} of it: "
                "the model is damaged, and SemEval-2025 Task 4 would not rank it."
            )
        return results or None

    def results(self, measured: Measured) -> dict[str, Metrics]:
        """Task -> its metrics; None for one that is no finite number, such as the perplexity of a damaged model."""
        return {
            task: {metric: finite(value) for metric, value in metrics.items()}
            for (by_task,) in self.own(measured).values()
            for task, metrics in by_task.items()
        }

    def to_json(self, scores: dict[str, Metrics]) -> dict[str, Metrics]:
        return scores

    def figures(self, content: Mapping[str, Metrics]) -> list[Figure]:
        meaning = "lm-eval's own measure of the task; a fall is damage beyond the data."
        return [
            Figure(task, metric, f"{task}, {metric}", at(content, task, metric), "as before", meaning)
            for task, metrics in content.items()
            for metric in metrics
        ]


LM_EVAL = LmEval()


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
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    path: str | None = None,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, Metrics]:
    """Task -> metric -> value for the named tasks (a group such as mmlu with its own aggregate, not its members).

    limit: questions per task, the first ones; None for all. Raises UserError where a task's data cannot be had.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from lowmem_npo.evaluation.scoring.eval_mode import evaluating
    from lowmem_npo.evaluation.scoring.generation import plain_generation
    from lowmem_npo.memory.exhausted import as_fits
    from lowmem_npo.model import compute_autocast

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with evaluating(model), compute_autocast(model), plain_generation(model, tokenizer):
        try:
            evaluated = as_fits(
                model,
                batch_size,
                lambda at_once: simple_evaluate(
                    model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=at_once),
                    tasks=list(tasks),
                    num_fewshot=shots,
                    limit=limit,
                    task_manager=_task_manager(tasks, path),
                    log_samples=False,
                    bootstrap_iters=0,
                ),
            )
        except (OSError, ValueError) as error:  # OSError: no network, no local copy; ValueError: no such data set
            reason = one_line(error, 300)
            raise UserError(f"--lm-eval {' '.join(tasks)}: the task's data cannot be loaded ({reason}).") from error
    return {task: _numbers(evaluated["results"][task]) for task in tasks}


def mmlu_accuracy(results: Mapping[str, Metrics]) -> float | None:
    """The accuracy over all MMLU questions, or None where MMLU was not run."""
    return results.get("mmlu", {}).get("acc")


def _numbers(metrics: dict[str, Any]) -> Metrics:
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
