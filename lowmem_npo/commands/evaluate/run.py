"""An evaluation, from its configuration to tables and files. Reads from top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from lowmem_npo.claim import check_unclaimed, claimed
from lowmem_npo.commands.evaluate.membership import further_membership
from lowmem_npo.commands.evaluate.plan import EvaluationPlan, plan_evaluation
from lowmem_npo.config import ModelConfig, StreamOptions
from lowmem_npo.console import Say
from lowmem_npo.data import Rows
from lowmem_npo.endings import ended_with, going_on
from lowmem_npo.evaluation.answer_table import FORGET, same_rows
from lowmem_npo.evaluation.answers import NotGenerated
from lowmem_npo.evaluation.benchmarks.contract import Benchmark, Selection
from lowmem_npo.evaluation.benchmarks.muse import MUSE
from lowmem_npo.evaluation.benchmarks.plain import PLAIN, summaries_of
from lowmem_npo.evaluation.benchmarks.registry import BENCHMARKS
from lowmem_npo.evaluation.benchmarks.tofu import TOFU
from lowmem_npo.evaluation.comparing import loaded_otherwise
from lowmem_npo.evaluation.directory import OTHER_ROWS, THE_ADAPTER, THE_BASE, as_json
from lowmem_npo.evaluation.fluency import fluency
from lowmem_npo.evaluation.leaks.contract import NO_HOLDOUT, LeakTest, SavedModel, Subject, leak_results
from lowmem_npo.evaluation.leaks.measure import repeated, run_leak_tests, steps_of_tuning, time_of_tuning
from lowmem_npo.evaluation.leaks.registry import leak_tests
from lowmem_npo.evaluation.leaks.worst import not_beside_gold
from lowmem_npo.evaluation.open_unlearning import muse_figures, tofu_figures, token_figures
from lowmem_npo.evaluation.result import Evaluation
from lowmem_npo.evaluation.scoring.journal import Journal
from lowmem_npo.evaluation.scoring.scorer import Scorer
from lowmem_npo.evaluation.settings import EvaluationConfig
from lowmem_npo.files import expanded
from lowmem_npo.memory.switches import load_base, stream_layers
from lowmem_npo.model import check_causal, check_head
from lowmem_npo.model.adapters import original_model
from lowmem_npo.model.loading import resolve_device
from lowmem_npo.model.names import Base
from lowmem_npo.model.saved_adapter import check_unchanged, load_adapter
from lowmem_npo.report.as_audited import of_another_adapter, of_another_base
from lowmem_npo.report.content import read_content
from lowmem_npo.report.evaluation_text import evaluation_text
from lowmem_npo.report.verdict import judge_evaluation
from lowmem_npo.run_directory import EvaluationFiles, RunFiles
from lowmem_npo.sizes import counted


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
            check_unclaimed(plan.config.path)  # an evaluation that is no dry one claims it
            plan.directory.check()
            for line in _announced(plan):
                say(line)
            return Evaluation(notes=plan.context.notes)
        with claimed(plan.config.path, say):
            return measure(plan, say)


def _announced(plan: EvaluationPlan) -> list[str]:
    """What would be measured, and what that takes, in lines."""
    config, written = plan.config, list[tuple[int, int]]()
    lines = [f"Note: {note}" for note in plan.context.notes]
    for benchmark, name, chosen in plan.selected:
        what = "likelihoods and answers" if benchmark is PLAIN else benchmark.title
        lines.append(f"Would measure {_rows(name, chosen)}: {what}")
        written += benchmark.written(name, chosen, plan.context) if config.lets_write else []
    counts = " and ".join(_rows(name, chosen) for name, chosen in plan.leak_rows.items())
    tests = leak_tests(config.leaks)
    lines += [f"Leak test {test.name}, on {counts}: {test.summary}" for test in tests]
    besides = ", besides what leak tests ask" if tests else ""
    if written:
        most = max(length for _, length in written)
        lines.append(f"Would write {counted(len(written), 'answer')} of up to {most} tokens{besides}")
    if plan.leak_rows:
        scorer = Scorer(None, plan.context.tokenizer, Journal(None), plan.rows_at_once, config.lets_write)
        if steps := steps_of_tuning(tests, _subject(plan, tests, plan.directory.merged, scorer)):
            left = ", those that were taken before among them" if config.resume else ""
            lines.append(f"Would take {counted(steps, 'step')} of fine-tuning{left}")
    return [*lines, "Dry run: nothing was measured or written."]


def _rows(name: str, chosen: Selection) -> str:
    return counted(len(chosen.rows), f"{name} row")


def measure(
    plan: EvaluationPlan, say: Say, load: Callable[[ModelConfig, Say], PreTrainedModel] | None = None
) -> Evaluation:
    """The evaluation itself. load: gives the base model, which is left with the adapter on it; None: from its files."""
    config, directory = plan.config, plan.directory
    directory.check()
    model = _loaded(plan, say, load)
    on_base = _note_base(plan)
    journal = directory.begin()
    stream_layers(model, config, resolve_device(config.device))
    with original_model(model):
        check_head(model)
        check_causal(model)
    scorer = Scorer(model, plan.context.tokenizer, journal, plan.rows_at_once, config.lets_write)
    counts = _counts(plan.selected, plan.sources, plan.leak_rows)
    result = Evaluation(rows=counts, notes=plan.context.notes, gold_leaks=plan.gold.leaks)
    _measure_benchmarks(plan, scorer, result)
    if plan.leak_rows:
        tests = leak_tests(config.leaks)
        subject = _subject(plan, tests, directory.merged, scorer)
        _attack_in_memory(plan, tests, subject, result, say)
        if others := [test for test in tests if test.loads_models]:
            subject = replace(subject, scorer=scorer.without_model())
            del model, scorer  # makes room for the models that these tests load
            result.leaks |= run_leak_tests(others, subject)
        result.leak_rows = _scores_by_row(result, plan.leak_rows)
    _score(plan, result)
    directory.save(result)
    say("\n" + evaluation_text(result.to_json(), plan.context.before))
    say(f"\nEvery figure is in {directory.result}, every scored row in {directory.rows.name} beside it.")
    for line in _last_lines(plan, result, on_base, say):
        say(line)
    return result


def _loaded(
    plan: EvaluationPlan, say: Say, load: Callable[[ModelConfig, Say], PreTrainedModel] | None
) -> PreTrainedModel | PeftModel:
    """The model, with the adapter on it."""
    config = plan.config
    model = load(plan.model_config, say) if load else load_base(plan.model_config, config, say)
    if not config.adapter:
        return model
    adapted = load_adapter(model, config.adapter)
    check_unchanged(config.adapter, plan.digests[THE_ADAPTER])
    return adapted


def _note_base(plan: EvaluationPlan) -> bool:
    """Notes which base is evaluated. Whether it is the one that the adapter was trained on, if there is an adapter."""
    config = plan.config
    base = Base.here(str(plan.model_config.model), plan.model_config.revision, of_adapter=not config.any_base)
    if base.weights is not None:
        plan.digests[THE_BASE] = base.weights
        plan.know_base(base.weights)
    another = of_another_base(expanded(config.adapter), base) if config.adapter else None
    plan.context.notes += [another] if another else []
    return another is None


def _measure_benchmarks(plan: EvaluationPlan, scorer: Scorer, result: Evaluation) -> None:
    for benchmark, name, selection in plan.selected:
        try:
            measured = benchmark.measure(name, selection, scorer, plan.context)
        except NotGenerated as error:  # had `written` said so, it would have been refused before
            result.notes.append(f"{name}: {benchmark.title} was not measured: {error}")
            continue
        result.measured.setdefault(benchmark.name, {})[name] = measured
        said = benchmark.said(selection, measured, plan.context)
        if (figures := fluency(scorer, name, said)) is not None:
            result.fluency[name] = figures


def _attack_in_memory(
    plan: EvaluationPlan, tests: Sequence[LeakTest], subject: Subject, result: Evaluation, say: Say
) -> None:
    """The leak tests of the model in memory; the others of `tests` ask it for what they will need."""
    for test in tests:
        test.prepare(subject)
    for line in time_of_tuning(tests, subject):
        say(line)
    result.leaks = run_leak_tests([test for test in tests if not test.loads_models], subject)
    rows = {part: selection.rows for part, selection in plan.leak_rows.items()}
    result.open_unlearning = token_figures(subject.token_scores(), rows, plan.context.tokenizer, plan.gold.min_k)
    places = {part: selection.places for part, selection in plan.leak_rows.items()}
    further, notes = further_membership(plan.config, plan.gold, places, subject)
    result.open_unlearning |= further
    result.notes += notes


def _score(plan: EvaluationPlan, result: Evaluation) -> None:
    """The benchmarks' scores, and what is made of these."""
    context = plan.context
    for benchmark in BENCHMARKS:
        if (scores := benchmark.score(result.measured, context)) is not None:
            result.scores[benchmark.name] = scores
    tofu, muse = result.measured.get(TOFU.name, {}), result.measured.get(MUSE.name, {})
    result.open_unlearning |= tofu_figures(result.scores.get(TOFU.name), tofu, context.tokenizer)
    result.open_unlearning |= muse_figures(muse, context.tokenizer)
    if plan.leak_rows and "holdout" not in plan.leak_rows:
        result.notes.append(f"Leak tests: {NO_HOLDOUT}.")
    result.notes += not_beside_gold(result.leaks, result.gold_leaks)


def _subject(plan: EvaluationPlan, tests: Sequence[LeakTest], merged: Path, scorer: Scorer) -> Subject:
    """What `tests` look at. merged: where the merged model lies meanwhile."""
    config = plan.config
    streaming = StreamOptions(config.stream_weights, config.stream_from)
    return Subject(
        scorer,
        plan.leak_rows["forget"].rows,
        plan.leak_rows["holdout"].rows if "holdout" in plan.leak_rows else None,
        config,
        config.seed,
        SavedModel(plan.model_config, config.adapter, merged, streaming, plan.digests.get(THE_ADAPTER)),
        config.max_new_tokens,
        leak_results(plan.context.before.get("leaks", {})),
        retain=plan.attacker.retain,
        general=plan.attacker.general,
        wording=plan.attacker.wording,
        repeated=repeated(tests),
    )


def _last_lines(plan: EvaluationPlan, result: Evaluation, on_base: bool, say: Say) -> list[str]:
    """The worst attack, if any was made, and the first sentence of the run's report, which these figures are part of;
    before that, where these answers are not those that the report goes by, and in its place of any other model and of
    other rows, the same of these figures alone. The worst attack is one of all that the sentence beside it goes by.
    on_base: whether the adapter is on its run's base. `say` is told if it is not the run's own."""
    config, context, now = plan.config, plan.context, result.scores.get(PLAIN.name, {})
    vocabulary = context.fit.vocabulary if context.fit else None
    own = judge_evaluation(
        now,
        summaries_of(context.before.get(PLAIN.name) or {}),
        vocabulary,
        result.leaks,
        gold_leaks=result.gold_leaks,
        incomparable=context.incomparable,
        before_leaks=leak_results(context.before.get("leaks") or {}),
    ).headline
    worst = [result.worst_attack.sentence] if result.worst_attack else []
    run = RunFiles(expanded(config.adapter)) if config.adapter else None
    included = [] if run is None else [evaluation.path.resolve() for evaluation in run.evaluations()]
    if run is None or not run.run_yaml.is_file() or config.path.resolve() not in included:
        return [*worst, own]
    if other := of_another_adapter(run.path):
        say(other)
    elif on_base and not plan.directory.beside_options[OTHER_ROWS] and (content := read_content(run.path)).stages:
        after, headline = content.stages.get("after", {}), content.verdict.headline
        alike = not loaded_otherwise(content.settings, as_json(config))
        alike = alike and (FORGET not in now or (FORGET in after and same_rows(after[FORGET], now[FORGET])))
        tests = ", and by leak tests, these among them" if result.leaks else ""
        of_run = f"The run's report goes by the answers that the run itself measured{tests}: {headline}"
        if not alike:
            return [*worst, own, of_run]
        of_both = content.worst_attacks.get("after")
        return [of_both.sentence, headline] if worst and of_both else [headline]
    return [*worst, own]


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
