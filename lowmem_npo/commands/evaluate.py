"""`lowmem-npo evaluate`, from configuration to tables and files. Reads top to bottom."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
from transformers import PreTrainedTokenizerBase

from lowmem_npo.data import (
    Rows,
    Template,
    TokenizedRow,
    TokenizedRows,
    bundled_rows,
    read_rows,
    to_examples,
    tokenize,
)
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.answers import AnswerSummary, choose_rows
from lowmem_npo.evaluation.benchmarks.documents import MembershipScore, documents, membership
from lowmem_npo.evaluation.benchmarks.lm_eval import check_tasks, mmlu_accuracy, run_tasks
from lowmem_npo.evaluation.benchmarks.lume import MAX_NEW_TOKENS as LUME_NEW_TOKENS
from lowmem_npo.evaluation.benchmarks.lume import (
    MMLU_SHARE,
    LumeRow,
    choose_lume_rows,
    lume_rows,
    lume_scores,
    score_generations,
)
from lowmem_npo.evaluation.benchmarks.tofu import (
    FORGET,
    REAL_AUTHORS,
    RETAIN,
    WORLD_FACTS,
    TofuRow,
    forget_quality,
    measure_tofu,
    model_utility,
    retained_truth_ratios,
    score_tofu,
    tofu_rows,
)
from lowmem_npo.evaluation.directory import EvaluationDirectory, digest
from lowmem_npo.evaluation.probing import probe, probe_other_forms, probed_rows
from lowmem_npo.evaluation.result import Evaluation
from lowmem_npo.evaluation.scoring.scorer import Measuring
from lowmem_npo.evaluation.settings import EvaluationConfig
from lowmem_npo.libraries import quiet_libraries
from lowmem_npo.model import load_model, load_tokenizer, resolve_name
from lowmem_npo.model.loading import load_config
from lowmem_npo.model.saved_adapter import (
    WEIGHTS,
    base_of_adapter,
    check_base,
    load_adapter,
    revision_of_adapter,
    settings_of_run,
)
from lowmem_npo.report.evaluation_text import evaluation_text

Say = Callable[[str], None]


@dataclass(frozen=True)
class EvaluationSet:
    """One set, read and chosen, of exactly one kind: LUME's rows, TOFU's, or any other (tokenised)."""

    rows_in_set: int
    lume: list[LumeRow] = field(default_factory=list)
    tofu: list[TofuRow] = field(default_factory=list)
    plain: TokenizedRows | None = None
    places: list[int] = field(default_factory=list)  # of the plain rows in their set


def main(arguments: Sequence[str]) -> None:
    config = tyro.cli(EvaluationConfig, args=list(arguments), prog="lowmem-npo evaluate")
    quiet_libraries()
    evaluate(config)


def evaluate(config: EvaluationConfig, say: Say = print) -> Evaluation:
    """Measures the model, prints tables, writes evaluation.json and its companions into `config.path`.

    Data, adapter, tasks and directory are checked before the weights are loaded; every batch is written down as it is
    measured, so that `resume` repeats nothing.

    Raises:
        UserError: something the user can mend, said in one sentence.
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
    result = Evaluation()
    if run.get("qlora") and not config.qlora:
        result.notes.append("The adapter was trained on the 4-bit base and is measured on the whole one (no --qlora).")
    sources = _read(config, first_rows, say)
    template = Template(config.prompt_template)
    sets = {
        part: _choose(part, sources[part], config, tokenizer, template, result)
        for part in (FORGET, RETAIN, REAL_AUTHORS, WORLD_FACTS)
        if part in sources
    }
    probed = probed_rows(config, sources, tokenizer, template)
    attacked = {part: documents(sources[part], tokenizer) for part in ("members", "nonmembers") if part in sources}
    retained = retained_truth_ratios(config.retained_log) if config.retained_log else None
    before = _read_before(config.before)
    if before is not None and (difference := _asked_otherwise(config)):
        result.notes.append(difference)
    if config.lm_eval:
        check_tasks(config.lm_eval, config.lm_eval_path)
    directory = EvaluationDirectory(config, _digests(config, sources))
    journal = directory.begin()

    model = load_model(model_config)
    if config.adapter:
        model = load_adapter(model, config.adapter)
    measuring = Measuring(model, tokenizer, journal, config.batch_size)
    for part, data in sets.items():
        _measure_set(part, data, measuring, result, template, config.max_length)
    if attacked:
        result.membership = _attack(attacked, config, measuring, result)
    if probed:
        probe(probed, config, measuring, result)
    for task in config.lm_eval:
        result.lm_eval.update(_run_task(task, config, measuring))
    if "quantization" in config.leaks:
        measuring = measuring.without_model()
        del model  # each form is a model of its own
        probe_other_forms(probed, config, model_config, measuring, directory.path, result)

    _combine(result, retained, before)
    official = result.lume.official() if result.lume else None
    directory.save(result.to_json(), result.rows_to_json(), official)
    say("\n" + evaluation_text(result, before))
    say(f"\nEvery figure is in {directory.path / 'evaluation.json'}, every scored row in rows.jsonl beside it.")
    return result


def _read(config: EvaluationConfig, first_rows: int | None, say: Say) -> dict[str, Rows]:
    """Each set's rows; first_rows: only so many of each."""
    if config.bundled:
        say("No data named: using the bundled biographies of invented people.")
        parts = (FORGET, RETAIN, "holdout") if config.leaks else (FORGET, RETAIN)
        return {part: bundled_rows(part, limit=first_rows) for part in parts}
    sources = {
        FORGET: config.forget,
        RETAIN: config.retain,
        REAL_AUTHORS: config.real_authors,
        WORLD_FACTS: config.world_facts,
        "members": config.members,
        "nonmembers": config.nonmembers,
        "holdout": config.holdout,
    }
    named = {part: source for part, source in sources.items() if source is not None}
    if named:
        say("Data: " + ", ".join(f"{part} {source}" for part, source in named.items()))
    return {part: read_rows(source, limit=first_rows) for part, source in named.items()}


def _choose(
    part: str,
    rows: Rows,
    config: EvaluationConfig,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    result: Evaluation,
) -> EvaluationSet:
    """Which rows of a set are scored, and as what; what is left out is noted."""
    if part in (FORGET, RETAIN) and (lume := lume_rows(rows)):
        if left_out := len(rows) - len(lume):
            result.notes.append(f"{part}: {left_out} rows without a LUME id (…sc1, …qa0) are left out.")
        return EvaluationSet(len(lume), lume=choose_lume_rows(lume, config.limit, config.seed))
    tofu = tofu_rows(rows)
    if part in (REAL_AUTHORS, WORLD_FACTS) and not tofu:
        raise UserError(f"{rows.name} has no column perturbed_answer, which TOFU's {part} need.")
    chosen = choose_rows(len(rows), config.limit, config.seed)
    if tofu:
        return EvaluationSet(len(rows), tofu=[tofu[i] for i in chosen])
    if {"input", "output"} <= set(rows.columns):
        result.notes.append(
            f"{part}: no row has a LUME id (…sc1 for completions, …qa0 for questions), so it is scored without "
            "LUME's aggregate, by likelihood and greedy answers."
        )
    examples = to_examples(rows, **config.columns)
    plain = tokenize([examples[i] for i in chosen], tokenizer, max_length=config.max_length, template=template)
    return EvaluationSet(len(rows), plain=plain, places=chosen)


def _measure_set(
    part: str, data: EvaluationSet, measuring: Measuring, result: Evaluation, template: Template, max_length: int
) -> None:
    if data.lume:
        prompts = [list(measuring.tokenizer(row.input, verbose=False).input_ids) for row in data.lume]
        texts = measuring.continuations(f"{part}: LUME generations", prompts, LUME_NEW_TOKENS)
        # transformers 4, with which the official scores were made, cleans spaces up when decoding; 5 leaves it to us.
        texts = [measuring.tokenizer.clean_up_tokenization(text) for text in texts]
        result.lume_answers[part] = score_generations(data.lume, texts)
        scored = len(data.lume)
    elif data.tofu:
        result.tofu_answers[part] = measure_tofu(measuring, part, data.tofu, template, max_length)
        result.tofu[part] = score_tofu(part, result.tofu_answers[part])
        scored = len(data.tofu)
    else:
        records = measuring.answers(f"{part}: answers", data.plain, data.places)
        result.answers[part] = records
        result.summaries[part] = AnswerSummary.of(records, rows_in_set=data.rows_in_set)
        scored = len(records)
    result.rows[part] = {"scored": scored, "in_set": data.rows_in_set}


def _attack(
    attacked: dict[str, list[TokenizedRow]], config: EvaluationConfig, measuring: Measuring, result: Evaluation
) -> MembershipScore:
    nll = {}
    for part, rows in attacked.items():
        chosen = choose_rows(len(rows), config.limit, config.seed)
        nll[part] = measuring.nll(f"{part}: loss of documents", [rows[i] for i in chosen])
        result.rows[part] = {"scored": len(chosen), "in_set": len(rows)}
    return membership(nll["members"], nll["nonmembers"])


def _run_task(task: str, config: EvaluationConfig, measuring: Measuring) -> dict[str, dict[str, float]]:
    part = f"lm-eval: {task}"
    if 0 not in measuring.journal.known(part):
        found = run_tasks(
            measuring.model,
            measuring.tokenizer,
            [task],
            path=config.lm_eval_path,
            shots=config.lm_eval_shots,
            limit=config.limit,
            batch_size=config.batch_size,
        )
        measuring.journal.write(part, [0], [found])
    return measuring.journal.known(part)[0]


def _combine(result: Evaluation, retained: list[float] | None, before: dict[str, Any] | None) -> None:
    """The figures made of several others, and what must be said about them."""
    mmlu = mmlu_accuracy(result.lm_eval)
    if result.lume_answers:
        sets = (result.lume_answers.get(part, []) for part in (FORGET, RETAIN))
        auc = result.membership.auc if result.membership else None
        result.lume = lume_scores(*sets, mia_auc=auc, mmlu=mmlu)
        if result.lume.missing:
            result.notes.append(f"No LUME task aggregate: {'; '.join(result.lume.missing)}.")
    if result.tofu:
        result.model_utility = model_utility(result.tofu)
        if retained is not None and FORGET in result.tofu:
            result.forget_quality = forget_quality(result.tofu[FORGET].truth_ratios, retained)
    if result.membership and result.membership.all_equal:
        result.notes.append(f"Membership: {result.membership.meaning}.")
    mmlu_before = mmlu_accuracy((before or {}).get("lm_eval", {}))
    if mmlu is not None and mmlu_before and mmlu < MMLU_SHARE * mmlu_before:
        result.notes.append(
            f"WARNING: MMLU fell from {mmlu_before:.3f} to {mmlu:.3f}, below {MMLU_SHARE:.0%} of it: "
            "the model is damaged, and SemEval-2025 Task 4 would not rank it."
        )


def _read_before(path: str | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        content = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--before: '{path}' cannot be read as an earlier evaluation.json.") from error
    if not isinstance(content, dict) or not {"rows", "answers", "lume", "lm_eval"} <= set(content):
        raise UserError(f"--before: '{path}' is no evaluation.json of `lowmem-npo evaluate`.")
    return content


def _asked_otherwise(config: EvaluationConfig) -> str | None:
    """What must be said where the evaluation before wrote its prompts, or cut its rows, otherwise."""
    try:
        settings = (Path(config.before).expanduser().parent / "settings.json").read_text(encoding="utf-8")
        then = json.loads(settings)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    names = ("prompt_template", "max_length")
    other = [f"{name} {then[name]!r}" for name in names if name in then and then[name] != getattr(config, name)]
    return f"The evaluation before had {' and '.join(other)}: the two are not comparable." if other else None


def _digests(config: EvaluationConfig, sources: dict[str, Rows]) -> dict[str, str]:
    found = {part: digest(json.loads(json.dumps(rows.rows, default=str))) for part, rows in sources.items()}
    if config.adapter:
        found["the adapter"] = digest(Path(config.adapter).expanduser() / WEIGHTS)
    return found
