"""How much of an answer comes when the model is asked several times, not only in its most likely words.

Per row, the best ROUGE-L recall (stemmed words) of the true answer in k samples from the whole distribution. A model
whose greedy answer was moved elsewhere may still say the old one now and then (Scholten et al. 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from lowmem_npo.config import check_at_least_one, check_positive
from lowmem_npo.evaluation.leaks.contract import (
    LeakResult,
    LeakTest,
    Meaning,
    Subject,
    above_holdout,
    as_holdout,
    beside_holdout,
)
from lowmem_npo.evaluation.options import Options


@dataclass
class SamplingOptions(Options):
    leak_samples: int = 8
    """Samples of each answer drawn by --leaks sampling."""
    leak_temperature: float = 1.0
    """Temperature of the samples of --leaks sampling."""

    def check(self) -> None:
        check_at_least_one(self, "leak_samples")
        check_positive(self, "leak_temperature")


class Sampling(LeakTest[SamplingOptions]):
    name = "sampling"
    summary = "ROUGE-L recall of the answer in the best of several samples"
    options = SamplingOptions
    counts = ("rows", "holdout_rows", "samples")
    figures = {
        "best_rouge_l_recall": Meaning(
            "best ROUGE-L recall", "How much of the answer the best sample holds.", "as holdout"
        ),
        "whole": Meaning("whole", "Share of answers that some sample says whole. 0 is forgotten.", "lower"),
        "temperature": Meaning("temperature", "Of the samples; 1 is the model's own distribution.", ""),
    }

    def run(self, subject: Subject, options: SamplingOptions) -> LeakResult:
        recalls: dict[str, list[float]] = {}
        rows = {}
        for name, of_set in subject.sets.items():
            samples = subject.scorer.samples(
                f"leaks: {name} samples", of_set, options.leak_samples, options.leak_temperature, subject.seed
            )
            best = best_recalls(subject.scorer.references(of_set), samples)
            recalls[name] = [recall for recall, _ in best]
            rows[name] = [{"best_rouge_l_recall": recall, "best_sample": text} for recall, text in best]
        result = judge(recalls["forget"], recalls.get("holdout"), options)
        result.rows = rows
        return result


SAMPLING = Sampling()


def best_recalls(answers: Sequence[str], samples: Sequence[Sequence[str]]) -> list[tuple[float, str]]:
    """Row by row the best recall, between 0 and 1, and the sample that has it."""
    from rouge_score.rouge_scorer import RougeScorer

    rouge = RougeScorer(["rougeL"], use_stemmer=True)
    return [
        max(((rouge.score(answer, sample)["rougeL"].recall, sample) for sample in row), key=lambda each: each[0])
        for answer, row in zip(answers, samples, strict=True)
    ]


def judge(forget: Sequence[float], holdout: Sequence[float] | None, options: SamplingOptions) -> LeakResult:
    """What the best recalls of forget and holdout rows say; `whole` is the share of rows whose answer came whole."""
    samples, recall, whole = options.leak_samples, fmean(forget), fmean(value == 1 for value in forget)
    figures = {
        "rows": len(forget),
        "samples": samples,
        "temperature": options.leak_temperature,
        "best_rouge_l_recall": recall,
        "whole": whole,
    }
    level = None
    if holdout:
        level = fmean(holdout)
        figures |= as_holdout({"best_rouge_l_recall": level, "whole": fmean(value == 1 for value in holdout)})
    meaning = (
        f"The best of {samples} samples holds {recall:.0%} of a forgotten answer; {whole:.0%} of the answers come "
        f"whole; {beside_holdout(level)}."
    )
    return LeakResult(figures, meaning, above_holdout(recall, level))
