"""How much of an answer greedy decoding still writes: exact memorisation and extraction strength.

    exact memorisation   share of the answer's tokens that are the most likely one after the true tokens before them
                         (Tirumala et al. 2022)
    extraction strength  1 - k / |y|, k being the length of the shortest beginning of the answer after which greedy
                         decoding writes all the rest (Carlini et al. 2021); 1: the prompt alone is enough

One pass gives both: where every later token is the most likely one after the true tokens before it, greedy decoding
writes exactly those. Where not even the last token is, extraction strength is 0 (open-unlearning's 1 / |y| counts it as
extracted from all others).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lowmem_npo.evaluation.figures import shares
from lowmem_npo.evaluation.leaks.attack import (
    BY_MAX_LENGTH,
    STRENGTH,
    Attack,
    OfRow,
    answer_words,
    counted_whole,
    counted_words,
    cut_figures,
    cut_words,
    group_figures,
    p_values,
)
from lowmem_npo.evaluation.leaks.contract import LeakResult, LeakTest, Meaning, Subject, as_holdout, beside_holdout
from lowmem_npo.evaluation.options import Options

if TYPE_CHECKING:
    from lowmem_npo.evaluation.scoring.token_scores import TokenScores

FIGURES = {
    "nll": Meaning(
        "NLL",
        "NLL per answer token, averaged over rows. As on rows never seen is best; lower is remembered.",
        "as holdout",
    ),
    "exact_memorization": Meaning(
        "exact memorization",
        "Share of answer tokens that are the likeliest after the true words before them.",
        "as holdout",
    ),
    "extraction_strength": Meaning(
        STRENGTH, "How much of an answer's end the model writes by itself once begun; 1 is all of it.", "as holdout"
    ),
    "recited": Meaning(
        "recited", "Share of answers that come whole, with no word of them given. 0 is forgotten.", "lower"
    ),
}


class Extraction(LeakTest[Options]):
    """Means over rows; `recited` is the share of rows that the prompt alone brings forth."""

    name = "extraction"
    summary = "share of an answer that greedy decoding finishes by itself"
    in_words = (
        "giving the model the beginning of the answer, after its question where there is one, and letting it go on"
    )
    options = Options
    figures = FIGURES
    main = "extraction_strength"

    def run(self, subject: Subject, options: Options) -> LeakResult:
        scores = subject.token_scores()
        result = judge(scores["forget"], scores.get("holdout"), strength_before(subject), subject.groups)
        result.rows = {
            name: [
                {"exact_memorization": exact_memorization(row), "extraction_strength": extraction_strength(row)}
                for row in rows
            ]
            for name, rows in scores.items()
        }
        return result

    def attacks(self, figures: Mapping[str, Any]) -> dict[str, Attack]:
        return {"": written} if (written := attack_of(figures)) else {}


EXTRACTION = Extraction()


def judge(
    forget: Sequence[TokenScores],
    holdout: Sequence[TokenScores] | None,
    before: float | None = None,
    groups: Mapping[str, Sequence[Hashable]] | None = None,
) -> LeakResult:
    """The figures of both sets, and what they say. before: the extraction strength of the model before it forgot.
    groups: as for `beside_each_other`."""
    figures = beside_each_other(forget, holdout, groups)
    written = attack_of(figures)
    assert written is not None
    own, beside = beside_holdout(written.value, written.level, before)
    meaning = (
        f"Once begun, the model writes the last {own} of {answer_words(figures)} by itself, token for token "
        f"({shares(figures['recited'])[0]} of {counted_words(figures)} with no word of them given); {beside}."
        f"{cut_words(figures, BY_MAX_LENGTH)}"
    )
    return LeakResult.judged(figures, meaning, written, before)


ORIGINAL_PART = "leaks: forget answers, original model"  # of the journal


def original_scores(subject: Subject) -> list[TokenScores] | None:
    """What the model before it forgot thinks of the forget answers; None where there is a holdout, or no such model."""
    return subject.of_original(lambda scorer: scorer.token_scores(ORIGINAL_PART, subject.forget))


def strength_before(subject: Subject) -> float | None:
    """The extraction strength of the model before it forgot; None with a holdout, or where it is not known."""
    if (scores := original_scores(subject)) is not None:
        return extraction_figures(scores)["extraction_strength"]
    return subject.earlier_figure(EXTRACTION.name, "extraction_strength")


def attack_of(figures: Mapping[str, Any]) -> Attack | None:
    """The extraction strength among `figures`, as what an attack brought back; None where it was not measured."""
    return Attack.in_figures(STRENGTH, figures, "extraction_strength", "recited")


def exact_memorization(row: TokenScores) -> float:
    """Between 0 and 1."""
    return fmean(row.greedy)


def extraction_strength(row: TokenScores) -> float:
    """Between 0 and 1."""
    missed = [place for place, greedy in enumerate(row.greedy) if not greedy]
    return 1 - (missed[-1] + 1) / len(row.greedy) if missed else 1.0


def extraction_figures(rows: Sequence[TokenScores], counted: Sequence[TokenScores] | None = None) -> dict[str, float]:
    """The figures of a set of rows: how likely its answers are, and how much of them greedy decoding writes. counted:
    the rows among which whole answers are counted; None: as of a set by itself."""
    if counted is None:
        (counted,) = counted_whole([rows])
    return {
        "rows": len(rows),
        "nll": fmean(row.nll for row in rows),
        "exact_memorization": fmean(map(exact_memorization, rows)),
        "extraction_strength": fmean(map(extraction_strength, rows)),
        "recited": fmean(map(_is_recited, counted)),
        **cut_figures(rows, counted),
    }


def beside_each_other(
    forget: Sequence[TokenScores],
    holdout: Sequence[TokenScores] | None,
    groups: Mapping[str, Sequence[Hashable]] | None = None,
) -> dict[str, float]:
    """The figures of both sets, and the p-values of the difference of their extraction strengths. groups: set -> that
    of each row, of those that are one piece of evidence; None: each row is one."""
    sets = {"forget": forget, **({"holdout": holdout} if holdout else {})}
    counted = counted_whole([*sets.values()])
    own, *others = map(extraction_figures, sets.values(), counted)
    of_rows = [_of_rows(rows, None if groups is None else groups[of]) for of, rows in sets.items()]
    if not others:
        return {**own, **group_figures(*of_rows)}
    return {**own, **as_holdout(*others), **p_values(*of_rows)}


def _is_recited(row: TokenScores) -> bool:
    return extraction_strength(row) == 1


def _of_rows(rows: Sequence[TokenScores], groups: Sequence[Hashable] | None) -> list[OfRow]:
    each = zip(rows, groups or [None] * len(rows), strict=True)
    return [OfRow(extraction_strength(row), _is_recited(row), group, row.cut) for row, group in each]
