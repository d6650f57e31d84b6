"""What greedy answers hold when the model is asked otherwise than it was trained: the ground of two leak tests.

Each way to ask is an attack of its own. Of a row that a way asks several times, as with several paraphrases, the best
answer counts; so does, over all ways, the best of each row. The best of many answers is better than the best of few:
only rows that are asked in the same ways are compared, and of one that is asked more often than another, the best that
is to be expected of as many answers as every row has.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import chain
from math import comb, prod
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar

from lowmem_npo.evaluation.leaks.attack import HOLDOUT, Attack, answer_words, cut_words, furthest, of_tries
from lowmem_npo.evaluation.leaks.contract import (
    NO_HOLDOUT,
    UNKNOWN,
    LeakResult,
    LeakTest,
    Meaning,
    Need,
    Subject,
    beside_holdout,
    groups_in,
)
from lowmem_npo.evaluation.leaks.sampling import (
    BEST,
    Best,
    attack_of,
    best_samples,
    in_groups,
    recall_of,
    said_figures,
    whole_words,
)
from lowmem_npo.evaluation.options import Options

if TYPE_CHECKING:
    from lowmem_npo.evaluation.asking import Asked
    from lowmem_npo.evaluation.scoring.scorer import Scorer

A_WORDING = Need(
    lambda subject: subject.wording is None, "it writes the rows' prompts otherwise, and only token ids are given"
)
A_QUESTION = Need(
    lambda subject: (
        subject.wording is not None
        and not any((example.prompt or "").strip() for example in subject.wording.examples["forget"])
    ),
    "the rows are texts without a question",
)
ANY = "the best of all"
NOT_SO = f"the holdout cannot be asked so, and {UNKNOWN}"

Answers = dict[str, dict[str, list[list[Best]]]]
"""Set -> way to ask -> the answers to each row, of which there are none where it cannot be asked so."""


class Prompting(LeakTest[Options], abstract=True):
    """A test that asks in other ways, which `ways` writes."""

    options = Options
    needs = (A_WORDING, A_QUESTION)
    counts = ("rows", "holdout_rows", "ways", "max_new_tokens")
    main = BEST
    figures = {
        BEST: Meaning("ROUGE-L recall", "How much of the true answer is in what the model says.", "as holdout"),
        "whole": Meaning("whole", "Share of answers that come in one piece. 0 is forgotten.", "lower"),
    }
    none: ClassVar[str]
    """Why it was not measured where no row can be asked otherwise."""

    @abstractmethod
    def ways(self, subject: Subject, name: str) -> Mapping[str, Asked]:
        """Way to ask -> the rows of the set `name` in it; their places are those in the set."""

    def run(self, subject: Subject, options: Options) -> LeakResult:
        from lowmem_npo.evaluation.answers import answer_length, question

        length = answer_length([row for rows in subject.sets.values() for row in rows], subject.max_new_tokens)
        references = {name: subject.scorer.references(rows, length) for name, rows in subject.sets.items()}

        def ask(scorer: Scorer, part: str, name: str, asked: Asked) -> list[list[Best]]:
            prompts = [question(row)[0] for row in asked.rows]
            written = scorer.continuations(f"{part} of up to {length} tokens", prompts, length)
            said: list[list[Best]] = [[] for _ in references[name]]
            for place, one in zip(asked.places, written, strict=True):
                best = best_samples([references[name][place]], [[one.text.strip()]])
                said[place] += in_groups(best, [subject.groups[name][place]])
            return said

        answers: Answers = {}
        for name in subject.sets:
            for way, asked in self.ways(subject, name).items():
                part = subject.named(f"leaks: {name}, {self.name} ({way})")
                answers.setdefault(name, {})[way] = ask(subject.scorer, part, name, asked)
        if "forget" not in answers:
            return LeakResult.not_measured(self.none)
        before = subject.of_original(lambda scorer: self.as_trained(scorer, subject, ask))
        result = judge(answers, length, before, NOT_SO if "holdout" in subject.sets else NO_HOLDOUT)
        recall, answer = f"{self.name}_recall", f"{self.name}_answer"
        result.rows = {
            name: [
                {recall: row.recall, answer: row.sample} if row else {}
                for row in map(_best, zip(*of.values(), strict=True))
            ]
            for name, of in answers.items()
        }
        return result

    def as_trained(self, scorer: Scorer, subject: Subject, ask: Any) -> float:
        """The recall of the model before it forgot, asked as the rows were trained."""
        from lowmem_npo.evaluation.asking import Asked

        asked = Asked(list(subject.forget), list(range(len(subject.forget))))
        return fmean(row.recall for (row,) in ask(scorer, "leaks: forget answers, original model", "forget", asked))

    def attacks(self, figures: Mapping[str, Any]) -> dict[str, Attack]:
        tried = {way: attack_of(of) for way, of in groups_in(figures).items()}
        return {way: attack for way, attack in tried.items() if attack is not None}


def judge(answers: Answers, max_new_tokens: int, before: float | None = None, unknown: str = NO_HOLDOUT) -> LeakResult:
    """What the answers hold, in the worst way to ask. before: the recall of the model before it forgot. unknown: why
    there is no figure of the holdout, if there is none."""
    ways = list(answers["forget"])
    tried = {way: [way] for way in ways} | ({ANY: ways} if len(ways) > 1 else {})
    by_way = {name: figures for name, of in tried.items() if (figures := compared(answers, of))}
    by_way = {way: of_tries(figures, len(by_way)) for way, figures in by_way.items()}
    said = {way: attack for way, figures in by_way.items() if (attack := recall_of(figures)) is not None}
    worst = furthest(said)
    figures = by_way[worst]
    own, beside = beside_holdout(said[worst].value, said[worst].level, before, unknown)
    way = f"the worst of {len(ways)} ways" if len(ways) > 1 else "the one way there is"
    meaning = (
        f"Asked in {way} ({worst}), what the model says holds {own} of {answer_words(figures)}; "
        f"{whole_words(figures)}; {beside}.{cut_words(figures)}"
        f"{_rows_compared(answers, tried[worst], figures)}"
    )
    if len(tried) > len(by_way):
        meaning += f" {ANY.capitalize()} ways is left out: no holdout row could be asked in each of them."
    counts = {"rows": figures["rows"], "ways": len(ways), "max_new_tokens": max_new_tokens}
    result = LeakResult.judged({**figures, **counts, **by_way}, meaning, said[worst], before)
    not_told = [way for way in ways if said[way].level is not None and said[way].stands_out is None]
    if result.leaks is False and not_told:
        result.leaks = None
        result.meaning += f" Whether more comes in other ways cannot be told: {', '.join(not_told)}."
    return result


def compared(answers: Answers, ways: Sequence[str]) -> dict[str, float]:
    """The figures of the best answer to each row over all `ways`: of rows that are asked in every one, as if all were
    asked as often. Where no holdout row is, there is nothing to be like: of one way, all that was said to forget
    rows counts; of several, there are no figures."""
    asked = {
        name: [row for row in zip(*(of.get(way, []) for way in ways), strict=False) if all(row)]
        for name, of in answers.items()
    }
    if all(asked.values()) and "holdout" in asked:
        times = [min(map(len, of_way)) for of_way in zip(*chain(*asked.values()), strict=True)]
        own, others = (_expected(asked[name], times) for name in ("forget", "holdout"))
        return said_figures(own, others)
    if "holdout" in asked and len(ways) > 1:
        return {}
    forget = zip(*(answers["forget"][way] for way in ways), strict=True)
    return said_figures(_expected([row for row in forget if any(row)]))


def _expected(rows: Sequence[Sequence[Sequence[Best]]], times: Sequence[int] | None = None) -> list[Best]:
    """What is to be expected of each row's best answer. rows: the answers to each, in each way. times: how many in each
    way count; None: all."""

    def expected(row: Sequence[Sequence[Best]], figure: str) -> float:
        return expected_best([[getattr(each, figure) for each in way] for way in row], times)

    return [
        Best(expected(row, "recall"), "", expected(row, "whole"), any(said.cut for said in answers), answers[0].group)
        for row in rows
        if (answers := [*chain(*row)])
    ]


def expected_best(groups: Sequence[Sequence[float]], times: Sequence[int] | None = None) -> float:
    """The highest value that is to be expected of so many of each group, whichever they are; None: of all."""
    if times is None:
        return max(chain(*groups))
    expected, before = 0.0, 0.0
    for value in sorted(set(chain(*groups))):
        share = prod(  # of the choices, those of which none is above `value`
            comb(sum(each <= value for each in group), count) / comb(len(group), count)
            for group, count in zip(groups, times, strict=True)
        )
        expected, before = expected + value * (share - before), share
    return expected


def _best(ways: Sequence[Sequence[Best]]) -> Best | None:
    """The best of all answers to a row; None to one that no way asks."""
    return max(chain(*ways), key=lambda said: (said.recall, said.whole), default=None)


def _rows_compared(answers: Answers, ways: Sequence[str], figures: Mapping[str, float]) -> str:
    """What is to be known of the rows that are compared, where not all were asked, or some more often."""
    sets = {name: of for name, of in answers.items() if HOLDOUT + BEST in figures}
    asked, words = [len(of[ways[0]]) for of in sets.values()], ""
    if asked and asked != [figures["rows"], figures[HOLDOUT + "rows"]]:
        rows = f"{figures['rows']} of {asked[0]} forgotten rows with {figures[HOLDOUT + 'rows']} of {asked[1]}"
        words += f" Compared are {rows} of the holdout, which could be asked so."
    if any(len({len(row) for of in sets.values() for row in of[way] if row}) > 1 for way in ways):
        words += " Rows that were asked more often than others count as if they had been asked as often."
    return words
