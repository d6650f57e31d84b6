"""The demo's checks: whether the model has forgotten what it should, for good, and kept what it should."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from textwrap import shorten

from lowmem_npo.evaluation.answer_table import Stages
from lowmem_npo.evaluation.answers import AnswerEvaluation, AnswerSummary
from lowmem_npo.evaluation.figures import shares
from lowmem_npo.evaluation.leaks.contract import LeakResults
from lowmem_npo.evaluation.leaks.worst import worst_attacks

RECITED = 0.95
FORGOTTEN_MARGIN = 0.05
NLL_MARGIN = 0.30
LASTING_MARGIN = 0.15
KEPT = 0.97


@dataclass(frozen=True)
class Check:
    """A condition on the demo's result. `meaning`: a sentence with the numbers."""

    name: str
    passed: bool
    meaning: str


def judge(stages: Stages, leaks: Mapping[str, LeakResults]) -> list[Check]:
    """The five checks on stages "before", "after" and "gold" (the model that never saw the forget rows)."""
    before, after, gold = (stages[stage] for stage in ("before", "after", "gold"))
    forget, never_saw = after["forget"], gold["forget"]
    worst = worst_attacks(leaks)["after"]
    assert worst.gold is not None, "the gold model is attacked as well"
    off = forget.nll / never_saw.nll - 1
    distance, most = shares(abs(off), NLL_MARGIN)
    returned, most_returned = shares(worst.value - worst.gold, LASTING_MARGIN)
    return [
        Check(
            "recited",
            before["forget"].exact_match >= RECITED,
            f"Before, the model gives {_share(before['forget'])} forget answers word for word "
            f"(required: at least {RECITED:.0%}).",
        ),
        Check(
            "forgotten",
            forget.exact_match <= never_saw.exact_match + FORGOTTEN_MARGIN,
            f"After, it gives {_share(forget)}; the model that never saw them gives {_share(never_saw)} "
            f"(required: at most {FORGOTTEN_MARGIN:.0%} more).",
        ),
        Check(
            "not overdone",
            abs(off) <= NLL_MARGIN,
            f"Its NLL per token of forget answers is now {forget.nll:.2f}, that model's {never_saw.nll:.2f} "
            f"({'-' if off < 0 else '+'}{distance}; required: within {most}). Answers far less likely than for a model "
            "that never saw them would give away what was removed.",
        ),
        Check(
            "lasting",
            worst.value <= worst.gold + LASTING_MARGIN,
            f"{worst.sentence.removesuffix('.')} ({returned} more than that model; required: at most {most_returned}).",
        ),
        Check(
            "kept",
            after["retain"].exact_match >= KEPT,
            f"It still gives {_share(after['retain'])} retain answers word for word (required: at least {KEPT:.0%}).",
        ),
    ]


def examples(evaluations: dict[str, dict[str, AnswerEvaluation]], per_set: dict[str, int]) -> str:
    """The answers to some questions at every stage, one below the other: the first `per_set` rows of each set."""
    stages = list(evaluations)
    width = max(map(len, ["truth", *stages]))
    lines = []
    for data_set, count in per_set.items():
        for rows in list(zip(*(evaluations[stage][data_set].records for stage in stages), strict=True))[:count]:
            question = rows[0].prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
            lines.append(f"{data_set}: {question}")
            answers = {"truth": rows[0].reference} | {s: row.answer for s, row in zip(stages, rows, strict=True)}
            for stage, text in answers.items():
                lines.append(f"  {stage:<{width}}  {shorten(text, 96 - width, placeholder=' …') or '(nothing)'}")
    return "\n".join(lines)


def _share(summary: AnswerSummary) -> str:
    return f"{round(summary.exact_match * summary.rows)} of {summary.rows}"
