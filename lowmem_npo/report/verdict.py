"""The first sentences of a report: what the figures say, and no more.

The rules are few, and the report states them (`RULES`). Each looks at the share that is left of what was there before,
because no fixed number means the same for a model that recited and for one that half remembered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lowmem_npo.evaluation.answer_table import Stages
from lowmem_npo.evaluation.answers import AnswerSummary
from lowmem_npo.evaluation.leaks.contract import LeakResults

KNOWN = 0.2  # ROUGE-L recall before; with less there was little to forget
VERBATIM = 0.05  # share of answers that may still come word for word
REMAINS = 0.5  # of recall and probability
UNTOUCHED = 0.9
KEPT, DAMAGED = 0.95, 0.75  # of recall, and of probability
OVERDONE = 1.3  # times the NLL of a model that never saw the rows

RULES = (
    f"“No longer says”: at most {VERBATIM:.0%} of the measured forget answers come word for word (or at most "
    f"{VERBATIM:.0%} more than from a model that never saw them), and both ROUGE-L recall and answer probability are "
    f"at most half of what they were. “Still says”: both are above {UNTOUCHED:.0%} of what they were. “In part”: "
    f"anything between. “Hardly knew”: ROUGE-L recall was below {KNOWN} before. “Still says what it was to keep”: "
    f"recall and probability on retain rows are at least {KEPT:.0%} of what they were; below {DAMAGED:.0%} of either, "
    "much is lost. “Overdone”: forget answers are less likely than a uniform guess over the vocabulary, or "
    f"their NLL is over {OVERDONE} times that of a model that never saw them."
)

FORGET_WORDS = {
    "forgotten": "the model no longer says what it was to forget",
    "partly": "the model has forgotten in part",
    "untouched": "the model still says what it was to forget",
    "unknown": "the model hardly knew what it was to forget, so forgetting cannot be seen",
}
RETAIN_WORDS = {
    "kept": "still says what it was to keep",
    "worse": "has lost some of what it was to keep",
    "damaged": "has lost much of what it was to keep",
    None: "what it was to keep was not measured",
}


@dataclass(frozen=True)
class Verdict:
    """tone: "good", "mixed", "bad" or "unknown". headline: a sentence. sentences: the numbers behind it."""

    tone: str
    headline: str
    sentences: list[str]


def judge_run(stages: Stages, vocabulary: int | None, leaks: Mapping[str, LeakResults]) -> Verdict:
    """stages: of the before/after table, or empty. vocabulary: the model's. leaks: stage -> test -> result."""
    if not {"before", "after"} <= set(stages) or "forget" not in stages["after"]:
        return Verdict(
            "unknown",
            "Whether the model has forgotten was not measured.",
            ["The run was made with --eval-rows 0, or did not reach its end: this page says what was trained, not "
             "with what result. `lowmem-npo evaluate` measures the adapter."],
        )  # fmt: skip
    before, after, gold = (stages.get(stage, {}) for stage in ("before", "after", "gold"))
    numbers = [value for sets in (before, after) for s in sets.values() for value in (s.nll, s.probability)]
    if not all(map(math.isfinite, numbers)):
        return Verdict(
            "bad",
            "The model no longer gives finite numbers.",
            ["Likelihoods are NaN or infinite: the training diverged, and nothing else here means anything. Try a "
             "smaller --lr or another --seed first."],
        )  # fmt: skip
    forget = _forget_state(before["forget"], after["forget"], gold.get("forget"))
    retain = _retain_state(before["retain"], after["retain"]) if "retain" in after else None
    overdone = _overdone(after["forget"], gold.get("forget"), vocabulary) if forget != "unknown" else None
    leaking = _leaking(leaks.get("after", {}))

    headline = f"On the rows measured, {FORGET_WORDS[forget]}{_conjunction(forget, retain)}{RETAIN_WORDS[retain]}"
    if overdone:
        headline += "; the forgetting is overdone"
    if leaking:
        headline += f"{', and' if overdone else ', but'} leak tests still find traces"
    sentences = [_figures("forget", before, after, gold)]
    if retain:
        sentences.append(_figures("retain", before, after, gold))
    if overdone:
        sentences.append(overdone)
    sentences.append(_leak_sentence(leaks.get("after", {}), leaks.get("gold")))
    return Verdict(_tone(forget, retain, bool(overdone or leaking)), headline + ".", sentences)


def _forget_state(before: AnswerSummary, after: AnswerSummary, gold: AnswerSummary | None) -> str:
    if before.rouge_l_recall < KNOWN:
        return "unknown"
    verbatim = VERBATIM + (gold.exact_match if gold else 0)
    recall = _remains(before.rouge_l_recall, after.rouge_l_recall)
    probability = _remains(before.probability, after.probability)
    # What a model that never saw the rows says by chance does not count against this one.
    chance = gold is not None and after.rouge_l_recall <= gold.rouge_l_recall + VERBATIM
    if after.exact_match <= verbatim and (recall <= REMAINS or chance) and probability <= REMAINS:
        return "forgotten"
    return "untouched" if recall > UNTOUCHED and probability > UNTOUCHED else "partly"


def _retain_state(before: AnswerSummary, after: AnswerSummary) -> str:
    recall = _remains(before.rouge_l_recall, after.rouge_l_recall)
    least = min(recall, _remains(before.probability, after.probability))
    return "kept" if least >= KEPT else "worse" if least >= DAMAGED else "damaged"


def _overdone(after: AnswerSummary, gold: AnswerSummary | None, vocabulary: int | None) -> str | None:
    """A sentence if the forgetting is overdone, else None."""
    if gold is not None and after.nll > OVERDONE * gold.nll:
        return (
            f"The forget answers' NLL per token is {after.nll:.2f}, for a model that never saw them {gold.nll:.2f}: so "
            "unlikely, they give away what was removed."
        )
    if vocabulary and after.nll > math.log(vocabulary):
        return (
            f"The forget answers' NLL per token is {after.nll:.2f}, for a uniform guess over the vocabulary "
            f"{math.log(vocabulary):.2f}: answers less likely than noise give away what was removed. Fewer epochs, or "
            "a larger --beta, push less far."
        )
    return None


def _figures(part: str, before: Mapping, after: Mapping, gold: Mapping) -> str:
    """The sentence with the numbers of a set."""
    was, now = before[part], after[part]
    known = f", from a model that never saw them {_count(gold[part])}" if part == "forget" and part in gold else ""
    share = f"{now.rows}" if now.rows == now.rows_in_set else f"{now.rows} measured of {now.rows_in_set}"
    return (
        f"Of {share} {part} answers, {_count(now)} {'comes' if _count(now) == 1 else 'come'} word for word "
        f"(before: {_count(was)}{known}); the NLL per answer token went from {was.nll:.2f} to {now.nll:.2f}."
    )


def _leaking(results: LeakResults) -> list[str]:
    return [name for name, result in results.items() if result.leaks is True]


def _leak_sentence(results: LeakResults, gold: LeakResults | None) -> str:
    conclusive = [name for name, result in results.items() if result.leaks is not None]
    if not conclusive:
        return "No leak test was run, or none was conclusive: what can still be extracted is not known."
    if not (leaking := _leaking(results)):
        return f"No traces in any conclusive leak test: {', '.join(conclusive)}."
    sentence = f"Traces in {len(leaking)} of {len(conclusive)} conclusive leak tests: {', '.join(leaking)}."
    if gold is not None:
        on_gold = ", ".join(_leaking(gold)) or "none"
        sentence += f" In a model that never saw the rows: {on_gold}."
    return sentence


def _conjunction(forget: str, retain: str | None) -> str:
    if retain is None:
        return "; "
    if forget == "unknown":
        return "; it "
    return ", but it " if forget == "forgotten" and retain != "kept" else " and "


def _tone(forget: str, retain: str | None, flawed: bool) -> str:
    if forget == "unknown":
        return "unknown"
    if forget == "untouched" or retain == "damaged":
        return "bad"
    return "good" if forget == "forgotten" and retain == "kept" and not flawed else "mixed"


def _remains(before: float, after: float) -> float:
    return after / before if before > 0 else 1.0


def _count(summary: AnswerSummary) -> int:
    return round(summary.exact_match * summary.rows)
