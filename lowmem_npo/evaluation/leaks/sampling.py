"""How much of an answer comes when the model is asked several times, not only in its most likely words.

Per row, the best ROUGE-L recall of the true answer in k samples from the whole distribution, each as long as the model
likes. A model whose greedy answer was moved elsewhere may still say the old one now and then (Scholten et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from lowmem_npo.evaluation.figures import at, shares
from lowmem_npo.evaluation.leaks.attack import (
    Attack,
    OfRow,
    answer_words,
    asked_for,
    counted_whole,
    counted_words,
    cut_figures,
    cut_words,
    group_figures,
    p_values,
    whole_in,
)
from lowmem_npo.evaluation.leaks.contract import LeakResult, LeakTest, Meaning, Subject, as_holdout, beside_holdout
from lowmem_npo.evaluation.options import Options
from lowmem_npo.ranges import Count, Positive

if TYPE_CHECKING:
    from lowmem_npo.data import TokenizedRow
    from lowmem_npo.evaluation.scoring.scorer import Reference, Scorer


BEST = "best_rouge_l_recall"
RECALL, WHOLE = "ROUGE-L recall", "answers said whole"  # of what an attack brings back


@dataclass
class SamplingOptions(Options):
    leak_samples: Count = 8
    """Samples of each answer drawn by --leaks sampling."""
    leak_temperature: Positive = 1.0
    """Temperature of the samples of --leaks sampling."""


class Sampling(LeakTest[SamplingOptions]):
    name = "sampling"
    summary = "ROUGE-L recall of the answer in the best of several samples"
    in_words = "asking several times for random answers instead of the likeliest one"
    options = SamplingOptions
    counts = ("rows", "holdout_rows", "samples", "max_new_tokens")
    main = BEST
    figures = {
        BEST: Meaning("best ROUGE-L recall", "How much of the answer the best sample holds.", "as holdout"),
        "whole": Meaning("whole", "Share of answers that some sample says whole. 0 is forgotten.", "lower"),
        "temperature": Meaning("temperature", "Of the samples; 1 is the model's own distribution.", ""),
    }

    def run(self, subject: Subject, options: SamplingOptions) -> LeakResult:
        from lowmem_npo.evaluation.answers import answer_length

        length = answer_length([row for rows in subject.sets.values() for row in rows], subject.max_new_tokens)

        def best(scorer: Scorer, part: str, rows: Sequence[TokenizedRow]) -> list[Best]:
            drawn = (options.leak_samples, options.leak_temperature, subject.seed, length)
            return best_samples(scorer.references(rows, length), scorer.samples(part, rows, *drawn))

        parts = {name: subject.named(f"leaks: {name} samples") for name in subject.sets}
        best_of = {
            name: in_groups(best(subject.scorer, parts[name], rows), subject.groups[name])
            for name, rows in subject.sets.items()
        }
        result = judge(best_of["forget"], best_of.get("holdout"), options, length, self.before(subject, length, best))
        result.rows = {
            name: [{BEST: row.recall, "best_sample": row.sample} for row in rows] for name, rows in best_of.items()
        }
        return result

    def before(self, subject: Subject, length: int, best: Callable[..., list[Best]]) -> float | None:
        """The recall of the model before it forgot; None where there is a holdout, or where it is not known."""
        if subject.earlier_figure(self.name, "max_new_tokens") == length:
            return subject.earlier_figure(self.name, BEST)
        part = "leaks: forget samples, original model"
        of_original = subject.of_original(lambda scorer: best(scorer, part, subject.forget))
        return None if of_original is None else fmean(row.recall for row in of_original)

    def attacks(self, figures: Mapping[str, Any]) -> dict[str, Attack]:
        return {"": said} if (said := attack_of(figures)) else {}


SAMPLING = Sampling()


def attack_of(figures: Mapping[str, Any]) -> Attack | None:
    """What the best of several answers hold, as what an attack brought back; None where it was not measured.

    Answers to one question share words by chance: where no holdout says how many, only whole answers count.
    """
    said = recall_of(figures)
    if said is not None and said.level is not None:
        return said
    if (whole := whole_in(figures, "whole")) is None:
        return None
    rows, groups = asked_for(figures)
    return Attack(WHOLE, whole.value, None, others=_by_figure(figures), whole=whole, rows=rows, groups=groups)


def recall_of(figures: Mapping[str, Any]) -> Attack | None:
    """The recall among `figures`, as what an attack brought back; None where it was not measured."""
    return Attack.in_figures(RECALL, figures, BEST, "whole", _by_figure(figures))


def _by_figure(figures: Mapping[str, Any]) -> dict[str, float]:
    known = ((title, at(figures, name)) for title, name in ((RECALL, BEST), (WHOLE, "whole")))
    return {title: value for title, value in known if value is not None}


class Best(NamedTuple):
    """A row's best recall, between 0 and 1, the sample that has it, and whether some sample says the answer whole, or
    what is to be expected of that. cut: whether only the beginning of the answer was looked for. group: of rows that
    are one piece of evidence; None: it is one by itself."""

    recall: float
    sample: str
    whole: float
    cut: bool = False
    group: Hashable = None

    @property
    def of_row(self) -> OfRow:
        return OfRow(self.recall, self.whole, self.group, self.cut)


def in_groups(rows: Sequence[Best], groups: Sequence[Hashable]) -> list[Best]:
    """The same, of rows in these groups."""
    return [row._replace(group=group) for row, group in zip(rows, groups, strict=True)]


def best_samples(answers: Sequence[Reference], samples: Sequence[Sequence[str]]) -> list[Best]:
    """Row by row; `samples` has those of each row."""
    from lowmem_npo.data.words import appears
    from lowmem_npo.evaluation.wording import rouge_l_recall

    best = []
    for answer, row in zip(answers, samples, strict=True):
        tried = ((rouge_l_recall(answer.text, sample), sample) for sample in row)
        recall, sample = max(tried, key=lambda each: each[0])
        best.append(Best(recall, sample, any(appears(answer.text, sample) for sample in row), answer.cut))
    return best


def judge(
    forget: Sequence[Best],
    holdout: Sequence[Best] | None,
    options: SamplingOptions,
    max_new_tokens: int,
    before: float | None = None,
) -> LeakResult:
    """What the best samples of forget and holdout rows say. before: the recall of the model before it forgot."""
    samples, figures = options.leak_samples, said_figures(forget, holdout)
    said = recall_of(figures)
    assert said is not None
    own, beside = beside_holdout(said.value, said.level, before)
    meaning = (
        f"The best of {samples} samples holds {own} of {answer_words(figures)}; "
        f"{whole_words(figures)}; {beside}.{cut_words(figures)}"
    )
    counts = {"samples": samples, "max_new_tokens": max_new_tokens}
    figures = {**counts, "temperature": options.leak_temperature, **figures}
    return LeakResult.judged(figures, meaning, said, before)


def said_figures(forget: Sequence[Best], holdout: Sequence[Best] | None = None) -> dict[str, float]:
    """The figures of what was said to forget rows and, where there are any, to holdout rows, with the p-values of the
    difference."""
    sets = [forget, *([holdout] if holdout else [])]
    counted = counted_whole(sets)
    own, *others = (_figures(rows, some) for rows, some in zip(sets, counted, strict=True))
    of_rows = [[row.of_row for row in rows] for rows in sets]
    if not others:
        return {**own, **group_figures(*of_rows)}
    return {**own, **as_holdout(*others), **p_values(*of_rows)}


def _figures(rows: Sequence[Best], counted: Sequence[Best]) -> dict[str, float]:
    """counted: the rows of which whole answers are counted."""
    figures = {"rows": len(rows), BEST: fmean(row.recall for row in rows), "whole": fmean(row.whole for row in counted)}
    return figures | cut_figures(rows, counted)


def whole_words(figures: Mapping[str, Any]) -> str:
    """How many answers came whole."""
    return f"{shares(figures['whole'])[0]} of {counted_words(figures)} come whole"
