"""An evaluation, from its configuration to tables and files. Reads from top to bottom."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowmem_npo.claim import claimed
from lowmem_npo.commands.evaluate.earlier import read_earlier
from lowmem_npo.commands.evaluate.membership import further_membership
from lowmem_npo.commands.evaluate.streaming import with_streaming
from lowmem_npo.config import ModelConfig, StreamOptions
from lowmem_npo.console import Say
from lowmem_npo.data import Example, Rows, Template, TokenizedRow, bundled_rows, read_rows, to_examples, tokenize
from lowmem_npo.data.fit import known_fit
from lowmem_npo.data.overlap import find_overlap
from lowmem_npo.data.passages import Passages
from lowmem_npo.data.prepare import bundled_general, general_rows, is_general
from lowmem_npo.endings import ended_with, going_on
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.answers import NotGenerated
from lowmem_npo.evaluation.asking import Wording
from lowmem_npo.evaluation.benchmarks.contract import Benchmark, Context, Selection
from lowmem_npo.evaluation.benchmarks.documents import DOCUMENTS
from lowmem_npo.evaluation.benchmarks.muse import MUSE
from lowmem_npo.evaluation.benchmarks.plain import PLAIN, summaries_of
from lowmem_npo.evaluation.benchmarks.registry import BENCHMARKS
from lowmem_npo.evaluation.benchmarks.tofu import TOFU, TofuOptions
from lowmem_npo.evaluation.directory import THE_ADAPTER, EvaluationDirectory, as_begun, differences, digest
from lowmem_npo.evaluation.fluency import fluency
from lowmem_npo.evaluation.leaks.contract import NO_HOLDOUT, LeakResult, SavedModel, Subject
from lowmem_npo.evaluation.leaks.measure import repeated, run_leak_tests, time_of_tuning
from lowmem_npo.evaluation.leaks.registry import leak_tests
from lowmem_npo.evaluation.leaks.retuning import RETUNING
from lowmem_npo.evaluation.leaks.worst import retained_leaks
from lowmem_npo.evaluation.open_unlearning import muse_figures, retained_min_k, tofu_figures, token_figures
from lowmem_npo.evaluation.result import Evaluation
from lowmem_npo.evaluation.scoring.batching import at_once
from lowmem_npo.evaluation.scoring.scorer import Scorer
from lowmem_npo.evaluation.settings import EvaluationConfig
from lowmem_npo.memory.switches import load_base, stream_layers
from lowmem_npo.model import check_causal, check_head, load_tokenizer, resolve_name
from lowmem_npo.model.adapters import original_model
from lowmem_npo.model.loading import load_config, resolve_device
from lowmem_npo.model.notes import model_notes
from lowmem_npo.model.saved_adapter import load_adapter, resolve_base, settings_of_run
from lowmem_npo.model.stop_tokens import stop_tokens
from lowmem_npo.report.content import read_content
from lowmem_npo.report.evaluation_text import evaluation_text
from lowmem_npo.report.verdict import judge_evaluation
from lowmem_npo.run_directory import AdapterFiles, EvaluationFiles, RunFiles


def evaluate(config: EvaluationConfig, say: Say = print) -> Evaluation:
    """Evaluates the model, prints tables, and writes evaluation.json and its companions into `config.path`.

    Data, adapter, tasks and directory are checked before the weights are loaded. Every batch is saved as soon as it is
    measured, so that `resume` measures nothing twice.

    Raises:
        UserError: something the user can fix, in one sentence.
    """
    with ended_with(going_on(EvaluationFiles(config.path).settings, config.resume)):
        plan = plan_evaluation(config, say)
        if config.dry_run:
            for line in _announced(plan):
                say(line)
            return Evaluation(notes=plan.context.notes)
        with claimed(plan.config.path, say):
            return measure(plan, say)


def _announced(plan: EvaluationPlan) -> list[str]:
    """What would be measured, in lines."""
    lines = [f"{benchmark.title}: {len(chosen.rows)} {name} rows" for benchmark, name, chosen in plan.selected]
    counts = " and ".join(f"{len(chosen.rows)} {name} rows" for name, chosen in plan.leak_rows.items())
    lines += [f"Leak test {test.name}, on {counts}: {test.summary}" for test in leak_tests(plan.config.leaks)]
    return [*lines, "Dry run: nothing was measured or written."]


@dataclass
class EvaluationPlan:
    """A validated evaluation. digests: a hash of each set, and of the adapter. selected: what each benchmark measures.
    leak_rows: set -> rows of the leak tests."""

    config: EvaluationConfig
    model_config: ModelConfig
    context: Context
    sources: dict[str, Rows]
    digests: dict[str, str]
    selected: list[tuple[Benchmark, str, Selection]]
    leak_rows: dict[str, Selection]
    attacker: Attacker

    @property
    def rows_at_once(self) -> int:
        """Rows per batch."""
        sets = (*(chosen for _, _, chosen in self.selected), *self.leak_rows.values())
        most = max((len(chosen.rows) for chosen in sets), default=0)
        return at_once(self.config.batch_size, most, self.config.stream_weights)


@dataclass
class Attacker:
    """What a leak test may use beside the rows that it asks for. retain, general: rows that it may teach the model.
    wording: how forget and holdout rows were written."""

    retain: Sequence[TokenizedRow] | None = None
    general: Sequence[TokenizedRow] | None = None
    wording: Wording | None = None


def plan_evaluation(
    config: EvaluationConfig, say: Say, *, first: int | None = None, only: Collection[str] | None = None
) -> EvaluationPlan:
    """Reads and checks all but the weights; writes nothing.

    first: read only so many rows of each set; None: where no data is named, as many as the adapter's run did, else all.
    only: names of the benchmarks that are measured; None: all whose rows there are.

    Raises:
        UserError: as for `evaluate`.
    """
    model_config = _model_config(config, say)
    run = settings_of_run(config.adapter) if config.adapter else {}
    if model_config.double_quant == "auto":  # the base is quantised as the adapter's run had it
        model_config = replace(model_config, double_quant=run.get("double_quant", "auto"))
    limit = first or (run.get("limit") if config.bundled else None)
    config = as_begun(config.completed(run))
    architecture = load_config(model_config)
    for line in model_notes(architecture, model_config):
        say(line)
    stops = stop_tokens(model_config, architecture)
    tokenizer = load_tokenizer(model_config)
    template = Template.of(config, stops)
    sources = _read(config, limit, tokenizer, template, say)
    digests = _digests(config, sources)
    before, others = read_earlier(config, digests)
    notes = _notes(config, run, digests)
    context = Context(config, tokenizer, template, before, notes, known_fit(architecture), others)
    if context.fit is not None:
        context.fit.check_padding(tokenizer)
    for benchmark in BENCHMARKS:
        benchmark.check(config)
    selected = [chosen for chosen in _select(sources, context) if only is None or chosen[0].name in only]
    leak_rows, attacker = _select_for_leaks(sources, context)
    if leak_rows:
        for test in leak_tests(config.leaks):
            test.check_rows(config, {part: len(selection.rows) for part, selection in leak_rows.items()})
    for line in _forms(selected, sources, leak_rows, context):
        say(line)
    config = context.config = with_streaming(config, model_config, architecture, selected, context, say)
    return EvaluationPlan(config, model_config, context, sources, digests, selected, leak_rows, attacker)


def measure(
    plan: EvaluationPlan, say: Say, load: Callable[[ModelConfig, Say], PreTrainedModel] | None = None
) -> Evaluation:
    """The evaluation itself. load: gives the base model, which is left with the adapter on it; None: from its files."""
    config, context, selected, leak_rows = plan.config, plan.context, plan.selected, plan.leak_rows
    directory = EvaluationDirectory(config, plan.digests)
    journal = directory.begin()

    model: PreTrainedModel | PeftModel
    model = load(plan.model_config, say) if load else load_base(plan.model_config, config, say)
    if config.adapter:
        model = load_adapter(model, config.adapter)
    stream_layers(model, config, resolve_device(config.device))
    with original_model(model):
        check_head(model)
        check_causal(model)
    scorer = Scorer(model, context.tokenizer, journal, plan.rows_at_once, config.generate_answers != "off")
    gold_leaks = retained_leaks(cast(TofuOptions, config).retained_log)
    result = Evaluation(rows=_counts(selected, plan.sources, leak_rows), notes=context.notes, gold_leaks=gold_leaks)
    for benchmark, name, selection in selected:
        try:
            measured = benchmark.measure(name, selection, scorer, context)
        except NotGenerated as error:  # had `written` said so, it would have been refused before
            result.notes.append(f"{name}: {benchmark.title} was not measured: {error}")
            continue
        result.measured.setdefault(benchmark.name, {})[name] = measured
        said = benchmark.said(selection, measured, context)
        if (figures := fluency(scorer, name, said)) is not None:
            result.fluency[name] = figures
    if leak_rows:
        rows = {part: selection.rows for part, selection in leak_rows.items()}
        streaming = StreamOptions(config.stream_weights, config.stream_from)
        saved = SavedModel(plan.model_config, config.adapter, directory.merged, streaming)
        before = context.before.get("leaks") or {}
        earlier = {name: LeakResult.from_json(of_test) for name, of_test in before.items()}
        sets = (rows["forget"], rows.get("holdout"))
        tests = leak_tests(config.leaks)
        subject = Subject(
            scorer,
            *sets,
            config,
            config.seed,
            saved,
            config.max_new_tokens,
            earlier,
            retain=plan.attacker.retain,
            general=plan.attacker.general,
            wording=plan.attacker.wording,
            repeated=repeated(tests),
        )
        for test in tests:
            test.prepare(subject)
        for line in time_of_tuning(tests, subject):
            say(line)
        result.leaks = run_leak_tests([test for test in tests if not test.loads_models], subject)
        reference = retained_min_k(cast(TofuOptions, config).retained_log)
        result.open_unlearning = token_figures(subject.token_scores(), rows, context.tokenizer, reference)
        places = {part: selection.places for part, selection in leak_rows.items()}
        digests = {part: plan.digests[part] for part in rows}
        further, notes = further_membership(config, digests, places, subject)
        result.open_unlearning |= further
        result.notes += notes
        if others := [test for test in tests if test.loads_models]:
            subject = replace(subject, scorer=scorer.without_model())
            del model, scorer  # makes room for the models that these tests load
            result.leaks |= run_leak_tests(others, subject)
        result.leak_rows = _scores_by_row(result, leak_rows)

    for benchmark in BENCHMARKS:
        if (scores := benchmark.score(result.measured, context)) is not None:
            result.scores[benchmark.name] = scores
    result.open_unlearning |= tofu_figures(result.scores.get(TOFU.name), result.measured.get(TOFU.name, {}))
    result.open_unlearning |= muse_figures(result.measured.get(MUSE.name, {}))
    if leak_rows and "holdout" not in leak_rows:
        result.notes.append(f"Leak tests: {NO_HOLDOUT}.")
    directory.save(result)
    say("\n" + evaluation_text(result.to_json(), context.before))
    say(f"\nEvery figure is in {directory.result}, every scored row in {directory.rows.name} beside it.")
    if (worst := result.worst_attack) is not None:
        say(worst.sentence)
    say(_headline(config, result, context))
    return result


def _headline(config: EvaluationConfig, result: Evaluation, context: Context) -> str:
    """The first sentence of the run's report, which these figures are part of; for any other model the same of these
    figures alone."""
    run = RunFiles(Path(config.adapter).expanduser()) if config.adapter else None
    if run is not None and run.run_yaml.is_file() and config.path == run.evaluation.path:
        content = read_content(run.path)
        if content.stages:
            return content.verdict.headline
    before = summaries_of(context.before.get(PLAIN.name) or {})
    vocabulary = context.fit.vocabulary if context.fit else None
    return judge_evaluation(
        result.scores.get(PLAIN.name, {}),
        before,
        vocabulary,
        result.leaks,
        gold_leaks=result.gold_leaks,
        incomparable=context.incomparable,
    ).headline


# -- what is evaluated, and on which rows -----------------------------------------------------------------------------


def _model_config(config: EvaluationConfig, say: Say) -> ModelConfig:
    """How the base model is loaded: the one of --model, or the one that the adapter was trained on."""
    if config.adapter:
        name, revision = resolve_base(config.adapter, config.model, config.revision, config.any_base, say)
        return replace(config.model_config(name), revision=revision)
    assert config.model is not None, "EvaluationConfig requires a model or an adapter"
    name, line = resolve_name(config.model, config.revision)
    if line:
        say(line)
    return config.model_config(name)


def _read(
    config: EvaluationConfig, limit: int | None, tokenizer: PreTrainedTokenizerBase, template: Template, say: Say
) -> dict[str, Rows]:
    """The rows of each set; limit: only the first N."""
    if config.bundled:
        say("No data named: using the bundled biographies of invented people.")
        parts = ("forget", "retain", "holdout") if config.leaks else ("forget", "retain")
        return {part: bundled_rows(part, limit=limit) for part in parts}
    named = config.named_data
    if named:
        say("Data: " + ", ".join(f"{part} {source}" for part, source in named.items()))
    passages = Passages.of(config, tokenizer)
    whole = replace(passages, form="text")  # of a document whose loss is measured, each passage once
    columns = tuple(config.columns.values())
    sources = {
        part: read_rows(source, limit=limit, passages=whole if part in DOCUMENTS.sets else passages, columns=columns)
        for part, source in named.items()
    }
    for part, rows in sources.items():
        for note in rows.notes:
            say(f"{part}: {note}")
    if "forget" in sources and is_general(named.get("retain")):  # as in training
        forget = to_examples(sources["forget"], **config.columns)
        sources["retain"], lines = general_rows(sources["retain"], forget, tokenizer, template, config.tokens_per_row)
        for line in lines:
            say(line)
    return sources


def _select(sources: Mapping[str, Rows], context: Context) -> list[tuple[Benchmark, str, Selection]]:
    """What is measured by which benchmark: each set by the first benchmark that recognises it."""
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


def _select_for_leaks(sources: Mapping[str, Rows], context: Context) -> tuple[dict[str, Selection], Attacker]:
    """The rows of the leak tests, whatever their benchmark: "forget", and "holdout" if there is one; and what else they
    may use. Empty if there are no leak tests.

    Raises UserError if the holdout has rows of the forget set.
    """
    config = cast(EvaluationConfig, context.config)
    if not config.leaks:
        return {}, Attacker()
    given = {part: sources[part] for part in ("forget", "holdout") if part in sources}
    examples = {part: to_examples(rows, **config.columns_of(part, rows)) for part, rows in given.items()}
    if "holdout" in examples and (pairs := find_overlap(examples["forget"], examples["holdout"])):
        where = " is ".join(example.where for example in pairs[0])
        raise UserError(
            f"{len(pairs)} of the forget rows are in the holdout as well ({where}), which must hold only rows that the "
            "model was never taught: remove them from one of the two."
        )
    selected, measured = {}, dict[str, list[Example]]()
    for part, of_part in examples.items():
        places = context.choose(len(of_part))
        measured[part] = chosen = [of_part[i] for i in places]
        rows = tokenize(chosen, context.tokenizer, max_length=config.tokens_per_row, template=context.template)
        for example, row in zip(chosen, rows, strict=True):
            context.check(example.where, row["input_ids"])
        selected[part] = Selection(rows, len(of_part), places)
    how = (context.tokenizer, context.template, config.tokens_per_row)
    attacker = Attacker(wording=Wording(measured, *how[1:], context.fit))
    if RETUNING.name in config.leaks:
        attacker.general = bundled_general("general", examples["forget"], *how)
        if "retain" in sources:
            to_keep = to_examples(sources["retain"], **config.columns)
            kept = [to_keep[i] for i in context.choose(len(to_keep))]
            attacker.retain = tokenize(kept, context.tokenizer, max_length=how[2], template=how[1], drop_too_long=True)
    return selected, attacker


def _forms(
    selected: Sequence[tuple[Benchmark, str, Selection]],
    sources: Mapping[str, Rows],
    leak_rows: Mapping[str, Selection],
    context: Context,
) -> list[str]:
    """How the rows of each set are written, where no benchmark has a form of its own."""
    named = {name for benchmark, name, _ in selected if benchmark.uses_template}
    columns = cast(EvaluationConfig, context.config).columns
    return [
        f"{name}: {context.template.describe(to_examples(rows, **columns)[0], context.tokenizer)}"
        for name, rows in sources.items()
        if name in named | set(leak_rows)
    ]


def _counts(
    selected: Sequence[tuple[Benchmark, str, Selection]],
    sources: Mapping[str, Rows],
    leak_rows: Mapping[str, Selection],
) -> dict[str, dict[str, int]]:
    """Set -> the number of its rows that are scored, and of all."""
    selections = dict(leak_rows) | {name: selection for _, name, selection in selected if name in sources}
    return {name: {"scored": len(s.rows), "in_set": s.rows_in_set} for name, s in selections.items()}


def _scores_by_row(result: Evaluation, leak_rows: Mapping[str, Selection]) -> dict[str, dict[int, dict[str, Any]]]:
    """Set -> the row's place in it -> its scores in the leak tests."""
    by_row: dict[str, dict[int, dict[str, Any]]] = {}
    for test in result.leaks.values():
        for part, rows in test.rows.items():
            for place, scores in zip(leak_rows[part].places, rows, strict=True):
                by_row.setdefault(part, {}).setdefault(place, {}).update(scores)
    return by_row


# -- the earlier evaluation, and what qualifies a comparison ----------------------------------------------------------


def _notes(config: EvaluationConfig, run: Mapping[str, Any], digests: Mapping[str, str]) -> list[str]:
    """What qualifies the figures: another base than the adapter was trained on, or an earlier evaluation with other
    rows or other settings."""
    notes = []
    if run.get("qlora") and not config.qlora:
        notes.append("The adapter was trained on the 4-bit base and is measured on the unquantised one (no --qlora).")
    if config.before is not None:
        others = differences(config.before, config, digests)
        if others:
            notes.append(f"The earlier evaluation had {' and '.join(others)}: the two are not comparable.")
    return notes


def _digests(config: EvaluationConfig, sources: Mapping[str, Rows]) -> dict[str, str]:
    """A hash of each set, and of the adapter."""
    digests = {part: digest(json.loads(json.dumps(rows.rows, default=str))) for part, rows in sources.items()}
    if config.adapter:
        digests[THE_ADAPTER] = digest(AdapterFiles(Path(config.adapter).expanduser()).weights)
    return digests
