"""`lowmem-npo evaluate`, from configuration to tables and files. Reads top to bottom."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from lowmem_npo.commands.arguments import with_help
from lowmem_npo.console import Say
from lowmem_npo.data import Rows, Template, TokenizedRows, bundled_rows, read_rows, to_examples, tokenize
from lowmem_npo.data.overlap import find_overlap
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.benchmarks.contract import Benchmark, Context, Selection
from lowmem_npo.evaluation.benchmarks.registry import BENCHMARKS
from lowmem_npo.evaluation.directory import THE_ADAPTER, EvaluationDirectory, digest
from lowmem_npo.evaluation.leaks.contract import NO_HOLDOUT, SavedModel, Subject
from lowmem_npo.evaluation.leaks.measure import run_leak_tests
from lowmem_npo.evaluation.leaks.registry import LEAK_TESTS, leak_tests
from lowmem_npo.evaluation.result import Evaluation
from lowmem_npo.evaluation.scoring.scorer import Scorer
from lowmem_npo.evaluation.settings import EvaluationConfig
from lowmem_npo.libraries import quiet_libraries
from lowmem_npo.model import load_model, load_tokenizer, resolve_name
from lowmem_npo.model.loading import load_config
from lowmem_npo.model.saved_adapter import (
    base_of_adapter,
    check_base,
    load_adapter,
    revision_of_adapter,
    settings_of_run,
)
from lowmem_npo.report.evaluation_text import evaluation_text
from lowmem_npo.run_directory import AdapterFiles, EvaluationFiles


class LeakRows(NamedTuple):
    """Rows of the leak tests, their places in their set, and how many rows that has."""

    rows: TokenizedRows
    places: list[int]
    rows_in_set: int


def main(arguments: Sequence[str]) -> None:
    command_line = with_help(EvaluationConfig, LEAK_TESTS)
    parsed = tyro.cli(command_line, args=list(arguments), prog="lowmem-npo evaluate")
    quiet_libraries()
    evaluate(EvaluationConfig(**vars(parsed)))


def evaluate(config: EvaluationConfig, say: Say = print) -> Evaluation:
    """Measures the model, prints tables, writes evaluation.json and its companions into `config.path`.

    Data, adapter, tasks and directory are checked before the weights are loaded; every batch is written down as it is
    measured, so that `resume` repeats nothing.

    Raises:
        UserError: something the user can fix, said in one sentence.
    """
    name, line = resolve_name(config.model or base_of_adapter(config.adapter))
    if line:
        say(line)
    run = settings_of_run(config.adapter) if config.adapter else {}
    first_rows = run.get("limit") if config.bundled else None  # nothing is named: the rows of the adapter's run
    config = config.completed(run)
    model_config = config.model_config(name)
    if config.adapter and not config.any_base:
        check_base(config.adapter, name)
        model_config.revision = config.revision or revision_of_adapter(config.adapter)
    load_config(model_config)
    tokenizer = load_tokenizer(model_config)
    sources = _read(config, first_rows, say)
    context = Context(config, tokenizer, Template(config.prompt_template), _read_before(config))
    if run.get("qlora") and not config.qlora:
        context.notes.append("The adapter was trained on the 4-bit base and is measured on the whole one (no --qlora).")
    if difference := _asked_otherwise(config):
        context.notes.append(difference)
    for benchmark in BENCHMARKS:
        benchmark.check(config)
    selected = _select(sources, context)
    leak_rows = _leak_rows(sources, context)
    directory = EvaluationDirectory(config, _digests(config, sources))
    journal = directory.begin()

    model = load_model(model_config)
    if config.adapter:
        model = load_adapter(model, config.adapter)
    scorer = Scorer(model, tokenizer, journal, config.batch_size)
    result = Evaluation(rows=_counts(selected, sources, leak_rows), notes=context.notes)
    for benchmark, name, selection in selected:
        measured = benchmark.measure(name, selection, scorer, context)
        result.measured.setdefault(benchmark.name, {})[name] = measured
    if leak_rows:
        rows = {part: of_part.rows for part, of_part in leak_rows.items()}
        saved = SavedModel(model_config, config.adapter, directory.merged)
        subject = Subject(scorer, rows["forget"], rows.get("holdout"), config, config.seed, saved)
        tests = leak_tests(config.leaks)
        for test in tests:
            test.prepare(subject)
        result.leaks = run_leak_tests([test for test in tests if not test.loads_models], subject)
        if others := [test for test in tests if test.loads_models]:
            subject = replace(subject, scorer=scorer.without_model())
            del model, scorer  # the others load models of their own
            result.leaks |= run_leak_tests(others, subject)
        result.leak_rows = _rows_by_place(result, leak_rows)

    for benchmark in BENCHMARKS:
        if (scores := benchmark.score(result.measured, context)) is not None:
            result.scores[benchmark.name] = scores
    if leak_rows and "holdout" not in leak_rows:
        context.notes.append(f"Leak tests: {NO_HOLDOUT}.")
    directory.save(result)
    say("\n" + evaluation_text(result.to_json(), context.before))
    say(f"\nEvery figure is in {directory.result}, every scored row in {directory.rows.name} beside it.")
    return result


def _read(config: EvaluationConfig, first_rows: int | None, say: Say) -> dict[str, Rows]:
    """Each set's rows; first_rows: only the first N of each."""
    if config.bundled:
        say("No data named: using the bundled biographies of invented people.")
        parts = ("forget", "retain", "holdout") if config.leaks else ("forget", "retain")
        return {part: bundled_rows(part, limit=first_rows) for part in parts}
    named = config.named_data
    if named:
        say("Data: " + ", ".join(f"{part} {source}" for part, source in named.items()))
    return {part: read_rows(source, limit=first_rows) for part, source in named.items()}


def _select(sources: Mapping[str, Rows], context: Context) -> list[tuple[Benchmark, str, Selection]]:
    """What is measured, by which benchmark: each set by the first that recognises it."""
    selected: list[tuple[Benchmark, str, Selection]] = []
    for name, rows in sources.items():
        for benchmark in BENCHMARKS:
            selection = benchmark.select(name, rows, context) if name in benchmark.sets else None
            if selection is not None:
                selected.append((benchmark, name, selection))
                break
    for benchmark in BENCHMARKS:
        selected += [(benchmark, name, own) for name, own in benchmark.own_sets(context.config).items()]
    return selected


def _leak_rows(sources: Mapping[str, Rows], context: Context) -> dict[str, LeakRows]:
    """The rows of the leak tests, whatever their kind: "forget", and "holdout" where there is one; none, no tests.

    Raises UserError for forget rows that are in the holdout as well.
    """
    config = context.config
    if not config.leaks:
        return {}
    examples = {part: to_examples(sources[part], **config.columns) for part in ("forget", "holdout") if part in sources}
    if "holdout" in examples and (pairs := find_overlap(examples["forget"], examples["holdout"])):
        where = " is ".join(example.where for example in pairs[0])
        raise UserError(
            f"{len(pairs)} of the forget rows are in the holdout as well ({where}), which must hold only what the "
            "model was never taught: remove them from one of the two."
        )
    leak_rows = {}
    for part, of_part in examples.items():
        places = context.choose(len(of_part))
        chosen = [of_part[i] for i in places]
        rows = tokenize(chosen, context.tokenizer, max_length=config.tokens_per_row, template=context.template)
        leak_rows[part] = LeakRows(rows, places, len(of_part))
    return leak_rows


def _counts(
    selected: Sequence[tuple[Benchmark, str, Selection]],
    sources: Mapping[str, Rows],
    leak_rows: Mapping[str, LeakRows],
) -> dict[str, dict[str, int]]:
    """Set -> how many of its rows are scored."""
    of_leaks = {part: {"scored": len(rows.rows), "in_set": rows.rows_in_set} for part, rows in leak_rows.items()}
    of_benchmarks = {
        name: {"scored": len(selection.rows), "in_set": selection.rows_in_set}
        for _, name, selection in selected
        if name in sources
    }
    return of_leaks | of_benchmarks


def _rows_by_place(result: Evaluation, leak_rows: Mapping[str, LeakRows]) -> dict[str, dict[int, dict[str, Any]]]:
    """Set -> place of the row in it -> what the leak tests found of it."""
    by_place: dict[str, dict[int, dict[str, Any]]] = {}
    for test in result.leaks.values():
        for part, rows in test.rows.items():
            for place, scores in zip(leak_rows[part].places, rows, strict=True):
                by_place.setdefault(part, {}).setdefault(place, {}).update(scores)
    return by_place


def _read_before(config: EvaluationConfig) -> Mapping[str, Any]:
    """The evaluation that --before names, or nothing."""
    path = config.before
    if path is None:
        return {}
    try:
        content = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--before: '{path}' cannot be read as an earlier evaluation.json.") from error
    if not isinstance(content, dict) or not {"rows", "answers", "lume", "lm_eval"} <= set(content):
        raise UserError(f"--before: '{path}' is no evaluation.json of `lowmem-npo evaluate`.")
    return content


def _asked_otherwise(config: EvaluationConfig) -> str | None:
    """What must be said where the evaluation before wrote its prompts, or cut its rows, otherwise."""
    if config.before is None:
        return None
    settings = EvaluationFiles(Path(config.before).expanduser().parent).settings
    try:
        then = json.loads(settings.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    names = ("prompt_template", "max_length")
    other = [f"{name} {then[name]!r}" for name in names if name in then and then[name] != getattr(config, name)]
    return f"The evaluation before had {' and '.join(other)}: the two are not comparable." if other else None


def _digests(config: EvaluationConfig, sources: Mapping[str, Rows]) -> dict[str, str]:
    digests = {part: digest(json.loads(json.dumps(rows.rows, default=str))) for part, rows in sources.items()}
    if config.adapter:
        digests[THE_ADAPTER] = digest(AdapterFiles(Path(config.adapter).expanduser()).weights)
    return digests
