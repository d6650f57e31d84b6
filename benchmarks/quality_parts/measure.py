"""What is measured of a model that was made to forget: what it says, what still betrays the rows, and what comes back
when some of them are taught again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.quality_parts.methods import Method
from benchmarks.quality_parts.subjects import GOLD, Model, Subject, flags_of_sets, run_command
from lowmem_npo.data import TokenizedRow, read_rows, to_examples, tokenize
from lowmem_npo.evaluation.answers import evaluate_answers
from lowmem_npo.evaluation.leaks import membership
from lowmem_npo.evaluation.leaks.contract import Subject as LeakSubject
from lowmem_npo.evaluation.leaks.extraction import extraction_figures
from lowmem_npo.evaluation.leaks.fine_tuning import tune
from lowmem_npo.evaluation.leaks.registry import LeakOptions
from lowmem_npo.evaluation.leaks.relearning import RelearningOptions, split
from lowmem_npo.evaluation.leaks.tuned import Tuning
from lowmem_npo.evaluation.ranking import compressed
from lowmem_npo.evaluation.scoring.journal import Journal
from lowmem_npo.evaluation.scoring.likelihood import answer_likelihoods
from lowmem_npo.evaluation.scoring.scorer import Scorer
from lowmem_npo.evaluation.scoring.token_scores import token_scores
from lowmem_npo.run_directory import EvaluationFiles

Figures = dict[str, Any]
BENCHMARKS = ("tofu", "lume", "membership", "leaks", "open_unlearning", "fluency")  # of evaluation.json
GENERAL = "builtin:holdout"  # questions, answers and texts of no particular subject, that nothing here is trained on


@dataclass(frozen=True)
class Attack:
    """One of `--relearn-attacks family`: a fresh LoRA of rank 16 is taught a share of the forgotten rows, four a step,
    and the others are measured. rate: of learning, in units of that of `--leaks relearning`."""

    share: float
    steps: int
    rate: float = 1.0

    @property
    def title(self) -> str:
        shown = {0.2: "1/5", 0.5: "1/2"}.get(self.share, f"{self.share:g}")
        return f"{shown} shown, {self.steps} steps" + (f", lr ×{self.rate:g}" if self.rate != 1 else "")

    @property
    def part(self) -> str:
        """As pieces call it."""
        return f"attack-{self.share:g}-{self.steps}" + (f"-x{self.rate:g}" if self.rate != 1 else "")


ATTACKS = (Attack(0.2, 20), Attack(0.2, 100), Attack(0.2, 100, 3), Attack(0.5, 60), Attack(0.5, 200, 3))


def measure_answers(subject: Subject, name: str, method: Method | None, seed: int) -> Figures:
    """What the model says and finds likely: the rows to forget and to retain, membership, and general rows."""
    model, (tokenizer, data) = subject.load(name, method, seed), subject.inputs(seed)
    size = subject.eval_batch_size
    figures: Figures = {}
    for part in ("forget", "retain"):
        said = evaluate_answers(model, tokenizer, getattr(data, part), batch_size=size, progress=False).summary
        figures[part] = {"nll": said.nll, "exact_match": said.exact_match, "rouge_l_recall": said.rouge_l_recall}
    rows = {"forget": data.forget, "holdout": data.holdout}
    scores = {part: token_scores(model, of, batch_size=size, progress=False) for part, of in rows.items() if of}
    figures["forget"]["extraction_strength"] = extraction_figures(scores["forget"])["extraction_strength"]
    sizes = {part: [compressed(row, tokenizer) for row in of] for part, of in rows.items() if of}
    forget, holdout = (membership.scored(scores[part], sizes[part]) for part in rows)
    judged = membership.judge(forget, holdout).figures
    figures["membership"] = {score: judged[f"{score}_auc"] for score in membership.TITLES}
    general = tokenize(to_examples(read_rows(GENERAL)), tokenizer, max_length=512)
    likelihoods = answer_likelihoods(model, general, batch_size=size, progress=False)
    figures["general_nll"] = sum(row.nll_sum for row in likelihoods) / sum(row.tokens for row in likelihoods)
    return figures


def measure_attack(subject: Subject, name: str, method: Method | None, seed: int, attack: Attack) -> Figures:
    """Of the rows that the attack did not show: extraction strength and NLL per token, before and after it.

    What an adapter has changed is part of the model, as merged into its weights: the attack adds to it.
    """
    model, (tokenizer, data) = subject.load(name, method, seed), subject.inputs(seed)
    return attacked(model, tokenizer, data.forget, seed, attack, subject.eval_batch_size)


def attacked(
    model: Model, tokenizer: Any, forget: Sequence[TokenizedRow], seed: int, attack: Attack, batch_size: int
) -> Figures:
    scorer = Scorer(model, tokenizer, Journal(None, progress=False), batch_size)
    subject = LeakSubject(scorer, forget, None, LeakOptions(), seed)
    taught, asked = ([forget[place] for place in places] for places in split(len(forget), attack.share, seed))
    lr = attack.rate * RelearningOptions.relearn_lr
    tuned = tune(subject, Tuning("relearning", taught, asked, [attack.steps], lr)).after[attack.steps]
    kept = ("extraction_strength", "nll")
    return {key: tuned.after[key] for key in kept} | {"before": {key: tuned.before[key] for key in kept}}


def measure_scores(subject: Subject, name: str, method: Method | None, seed: int) -> Figures:
    """The benchmark's own scores and the leak tests, by `lowmem-npo evaluate`: of its evaluation.json what is a
    figure of the whole set."""
    subject.load(name, method, seed)
    config = subject.config(method or Method(name), seed, subject.runs / name / f"seed-{seed}")
    of = EvaluationFiles(subject.directory / "evaluations" / name / f"seed-{seed}")
    if method is None:
        model = ["--model", str(subject.models(seed) / name)]
    else:
        model = ["--adapter", str(config.output_dir), "--model", config.model.model]
    arguments = [*model, *flags_of_sets({**subject.files, **subject.further})]
    gold = EvaluationFiles(subject.directory / "evaluations" / GOLD / "seed-0").result
    if gold != of.result:
        if not gold.exists():  # measured on another machine; without it there is no forget quality
            measure_scores(subject, GOLD, None, 0)
        arguments += ["--retained-log", str(gold)]
    arguments += ["--template", config.data.template, "--max-length", str(config.data.max_length)]
    arguments += ["--leaks", "extraction", "sampling", "membership"]
    if subject.scored_rows is not None:
        arguments += ["--limit", str(subject.scored_rows)]
    arguments += ["--batch-size", str(subject.eval_batch_size), "--output-dir", str(of.path)]
    resume = ["--resume"] if of.settings.exists() else []
    run_command(["evaluate", *arguments, *resume], of.path.with_suffix(".log"))
    return totals(json.loads(of.result.read_text(encoding="utf-8")))


def totals(evaluation: Figures) -> Figures:
    """The figures of sets, without those of single rows."""

    def numbers(content: Any) -> Any:
        if isinstance(content, dict):
            kept = {key: numbers(value) for key, value in content.items()}
            return {key: value for key, value in kept.items() if value is not None and value != {}}
        return content if isinstance(content, (int, float)) and not isinstance(content, bool) else None

    kept = {key: numbers(evaluation.get(key)) for key in BENCHMARKS}
    return {key: figures for key, figures in kept.items() if figures}
