"""Whether the demo's model forgot what it should, kept what it should, and how to tell."""

from __future__ import annotations

from dataclasses import dataclass

from lowmem_npo.evaluation.answer_table import Stages
from lowmem_npo.evaluation.answers import AnswerEvaluation, AnswerSummary

RECITED = 0.95
FORGOTTEN_MARGIN = 0.05
NLL_MARGIN = 0.30
KEPT = 0.97


@dataclass(frozen=True)
class Check:
    """One thing that must hold, and the numbers that say so."""

    name: str
    passed: bool
    meaning: str


def judge(stages: Stages) -> list[Check]:
    """The four checks on stages "before", "after" and "gold" (the model that never saw the forget rows)."""
    before, after, gold = (stages[stage] for stage in ("before", "after", "gold"))
    forget, never_saw = after["forget"], gold["forget"]
    return [
        Check(
            "recited",
            before["forget"].exact_match >= RECITED,
            f"Before, the model gives {_share(before['forget'])} forget answers word for word "
            f"(asked: {RECITED:.0%} or more).",
        ),
        Check(
            "forgotten",
            forget.exact_match <= never_saw.exact_match + FORGOTTEN_MARGIN,
            f"After, it gives {_share(forget)}; the model that never saw them gives {_share(never_saw)} "
            f"(asked: at most {FORGOTTEN_MARGIN:.0%} more).",
        ),
        Check(
            "not overdone",
            abs(forget.nll / never_saw.nll - 1) <= NLL_MARGIN,
            f"Forget answers are now at NLL {forget.nll:.2f} per token, to that model at {never_saw.nll:.2f} "
            f"({forget.nll / never_saw.nll - 1:+.0%}; asked: within {NLL_MARGIN:.0%}). Answers made far less likely "
            "than to a model that never saw them would give away what was removed.",
        ),
        Check(
            "kept",
            after["retain"].exact_match >= KEPT,
            f"It still gives {_share(after['retain'])} retain answers word for word (asked: {KEPT:.0%} or more).",
        ),
    ]


def examples(evaluations: dict[str, dict[str, AnswerEvaluation]], per_set: dict[str, int]) -> str:
    """The same questions at every stage, side by side: the first `per_set` rows of each set."""
    stages = list(evaluations)
    width = max(map(len, ["truth", *stages]))
    lines = []
    for data_set, count in per_set.items():
        for rows in list(zip(*(evaluations[stage][data_set].records for stage in stages), strict=True))[:count]:
            question = rows[0].prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
            lines.append(f"{data_set}: {question}")
            said = {"truth": rows[0].reference, **{stage: row.answer for stage, row in zip(stages, rows, strict=True)}}
            for who, text in said.items():
                lines.append(f"  {who:<{width}}  {' '.join(text.split()) or '(nothing)'}")
    return "\n".join(lines)


def _share(summary: AnswerSummary) -> str:
    return f"{round(summary.exact_match * summary.rows)} of {summary.rows}"
