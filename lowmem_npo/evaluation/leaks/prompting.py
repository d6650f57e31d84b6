"""What greedy answers hold when the model is asked otherwise than it was trained: the ground of two leak tests.

Each way to ask is an attack of its own. Of a row that a way asks several times, as with several paraphrases, the best
answer counts; so does, over all ways, the best of each row.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar

from lowmem_npo.evaluation.figures import shares
from lowmem_npo.evaluation.leaks.contract import (
    HOLDOUT,
    NO_HOLDOUT,
    UNKNOWN,
    Attack,
    LeakResult,
    LeakTest,
    Meaning,
    Need,
    Subject,
    as_holdout,
    beside_holdout,
    groups_in,
    standing,
)
from lowmem_npo.evaluation.leaks.sampling import BEST, Best, attack_of, best_samples
from lowmem_npo.evaluation.options import Options

if TYPE_CHECKING:
    from lowmem_npo.evaluation.asking import Asked
    from lowmem_npo.evaluation.scoring.scorer import Scorer

A_WORDING = Need(
    lambda subject: subject.wording is None, "it writes the rows' prompts otherwise, and only token ids are given"
)
ANY = "the best of all"
NOT_SO = f"the holdout cannot be asked so, and {UNKNOWN}"

Answers = dict[str, dict[str, list[Best | None]]]
"""Set -> way to ask -> the best answer to each row; None to one that cannot be asked so."""


class Prompting(LeakTest[Options], abstract=True):
    """A test that asks in other ways, which `ways` writes."""

    options = Options
    needs = (A_WORDING,)
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

        def best(scorer: Scorer, part: str, name: str, asked: Asked) -> list[Best | None]:
            prompts = [question(row)[0] for row in asked.rows]
            written = scorer.continuations(f"{part} of up to {length} tokens", prompts, length)
            said: dict[int, list[str]] = {}
            for place, one in zip(asked.places, written, strict=True):
                said.setdefault(place, []).append(one.text.strip())
            own = references[name]
            return [best_samples([own[i]], [said[i]])[0] if i in said else None for i in range(len(own))]

        answers: Answers = {}
        for name in subject.sets:
            for way, asked in self.ways(subject, name).items():
                part = subject.named(f"leaks: {name}, {self.name} ({way})")
                answers.setdefault(name, {})[way] = best(subject.scorer, part, name, asked)
        if "forget" not in answers:
            return LeakResult.not_measured(self.none)
        before = subject.of_original(lambda scorer: self.as_trained(scorer, subject, length, best))
        result = judge(answers, length, before, NOT_SO if "holdout" in subject.sets else NO_HOLDOUT)
        recall, answer = f"{self.name}_recall", f"{self.name}_answer"
        result.rows = {
            name: [{recall: row.recall, answer: row.sample} if row else {} for row in _best_of_all(ways)]
            for name, ways in answers.items()
        }
        return result

    def as_trained(self, scorer: Scorer, subject: Subject, length: int, best: Any) -> float:
        """The recall of the model before it forgot, asked as the rows were trained."""
        from lowmem_npo.evaluation.asking import Asked

        asked = Asked(list(subject.forget), list(range(len(subject.forget))))
        return fmean(row.recall for row in best(scorer, "leaks: forget answers, original model", "forget", asked))

    def attacks(self, figures: Mapping[str, Any]) -> dict[str, Attack]:
        tried = {way: attack_of(of) for way, of in groups_in(figures).items()}
        return {way: attack for way, attack in tried.items() if attack is not None}


def judge(answers: Answers, max_new_tokens: int, before: float | None = None, unknown: str = NO_HOLDOUT) -> LeakResult:
    """What the answers hold, in the worst way to ask. before: the recall of the model before it forgot. unknown: why
    there is no figure of the holdout, if there is none."""
    by_way = {way: _figures([row for row in rows if row]) for way, rows in answers["forget"].items()}
    for way, rows in answers.get("holdout", {}).items():
        if way in by_way:
            by_way[way] |= as_holdout(_figures([row for row in rows if row]))
    ways = len(by_way)
    if ways > 1 and all(set(of_set) == set(by_way) for of_set in answers.values()):  # else nothing to compare with
        by_way[ANY] = _figures([row for row in _best_of_all(answers["forget"]) if row])
        if "holdout" in answers:
            by_way[ANY] |= as_holdout(_figures([row for row in _best_of_all(answers["holdout"]) if row]))
    levels = {way: of_way.get(HOLDOUT + BEST) for way, of_way in by_way.items()}
    usual = max((level for level in levels.values() if level is not None), default=0.0)
    worst = max(by_way, key=lambda way: standing(by_way[way][BEST], levels[way], usual))
    figures, level = by_way[worst], levels[worst]
    own, beside = beside_holdout(figures[BEST], level, before, unknown)
    way = f"the worst of {ways} ways" if ways > 1 else "the one way there is"
    meaning = (
        f"Asked in {way} ({worst}), what the model says holds {own} of a forgotten answer; "
        f"{shares(figures['whole'])[0]} of the answers come whole; {beside}."
    )
    counts = {"rows": figures["rows"], "ways": ways, "max_new_tokens": max_new_tokens}
    return LeakResult.judged({**figures, **counts, **by_way}, meaning, figures[BEST], level, before)


def _best_of_all(ways: Mapping[str, Sequence[Best | None]]) -> list[Best | None]:
    """The best of each row, over all ways; None of a row that no way asks."""
    rows = [[row for row in of_row if row] for of_row in zip(*ways.values(), strict=True)]
    return [max(of_row, key=lambda row: (row.recall, row.whole), default=None) for of_row in rows]


def _figures(rows: Sequence[Best]) -> dict[str, float]:
    return {"rows": len(rows), BEST: fmean(row.recall for row in rows), "whole": fmean(row.whole for row in rows)}
