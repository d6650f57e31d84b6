"""The first sentences of a report: what the figures say by the rules of `verdict_rules`, and no more."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lowmem_npo.evaluation.answer_table import FORGET, GENERAL, NOT_GENERATED, RETAIN, Stages, same_rows
from lowmem_npo.evaluation.answers import AnswerSummary, part_of
from lowmem_npo.evaluation.asking import CHAT, PLAIN, REWORDED
from lowmem_npo.evaluation.figures import shares, side_by_side
from lowmem_npo.evaluation.leaks.contract import LeakResults
from lowmem_npo.evaluation.leaks.worst import WorstAttack, worst_attacks
from lowmem_npo.report.kept import Kept, hardly_in_full, hardly_said, of_passages, remains, what_became
from lowmem_npo.report.leak_sentence import leak_sentence, leaking_tests
from lowmem_npo.report.verdict_rules import MOSTLY_SAID, OVERDONE, REMAINS, SAID, UNTOUCHED

FORGET_WORDS = {
    "forgotten": "the model no longer says what it was to forget",
    "less likely": "the model, which hardly said an answer in full even before, is less likely to say what it was to "
    "forget",
    "partly": "the model has forgotten in part",
    "untouched": "the model still says what it was to forget",
    "as much": "the model still says as much as before of what it was to forget",
    "unknown": "the model hardly said what it was to forget even before, so forgetting cannot be seen",
}
# Of a form in which it is not known what the model said before.
NOW_WORDS = {**FORGET_WORDS, "as much": "the model says some of what it was to forget"}
SEVERITY = ("unknown", "less likely", "forgotten", "partly", "as much", "untouched")
RECITES = {"says": "recites", "hardly said": "could hardly recite", "answers": "passages"}
FORM_WORDS = {CHAT: "through its chat template", PLAIN: "without its chat template", REWORDED: "in other words"}
RETAIN_WORDS = {
    "kept": "still says what it was to keep",
    "unsure": "still says what it was to keep, as far as the rows can tell",
    "doubtful": "may have lost much of what it was to keep (too few rows to tell)",
    "worse": "has lost some of what it was to keep",
    "damaged": "has lost much of what it was to keep",
    "other rows": "what it was to keep was measured on other rows than before",
    None: "what it was to keep was not measured",
}
HARDLY_SAID = "hardly said what it was to keep even before"
HARDLY_SAID_WORDS = {  # of rows to keep
    "kept": f"{HARDLY_SAID}, which is no less likely now",
    "unsure": f"{HARDLY_SAID}, which is no less likely now, as far as the rows can tell",
    "doubtful": f"{HARDLY_SAID}, which may be much less likely now (too few rows to tell)",
    "worse": f"{HARDLY_SAID}, which is less likely now",
    "damaged": f"{HARDLY_SAID}, which is much less likely now",
}
GENERAL_WORDS = {
    "kept": "answers general questions as before",
    "unsure": "answers general questions as before, as far as the rows can tell",
    "doubtful": "may answer general questions much worse (too few rows to tell)",
    "worse": "answers general questions less well",
    "damaged": "answers general questions much worse",
}
KEPT_STATES = ("kept", "unsure")


OTHER_WORDS = (
    "The forget answers as they are written are less likely than noise, and the model says some of them all the same, "
    "in sentences of its own: rows with those sentences forget more, which `lowmem-npo ask MODEL --file FILE --json` "
    "writes."
)
PASSAGES_WORDS = (
    "How the model goes on with these texts was measured, word for word; what it answers when asked what is in them "
    "was not: rows with questions measure that."
)


@dataclass(frozen=True)
class Verdict:
    """tone: "good", "mixed", "bad" or "unknown". headline: a sentence. sentences: the numbers behind it."""

    tone: str
    headline: str
    sentences: list[str]


NEVER_FINITE = Verdict(
    "bad",
    "The model gave no finite numbers even before training.",
    ["Likelihoods are NaN or infinite before training already, and nothing else here means anything. Look for the "
     "cause in the model's weights, or in their type (--dtype), first."],
)  # fmt: skip
DIVERGED = Verdict(
    "bad",
    "The model no longer gives finite numbers.",
    ["Likelihoods are NaN or infinite: the training diverged, and nothing else here means anything. Try a smaller --lr "
     "or another --seed first."],
)  # fmt: skip


def judge_run(
    stages: Stages,
    vocabulary: int | None,
    leaks: Mapping[str, LeakResults],
    errors: Mapping[str, Mapping[str, float]] = MappingProxyType({}),
    unfinished: str | None = None,
) -> Verdict:
    """stages: of the before/after table, or empty; a set that `before` has no figures of was not measured there, or on
    other rows. A form of the forget rows that was not asked then is judged by what was said in the trained one.
    vocabulary: the model's. leaks: stage -> test -> result. errors: set -> measure -> the standard error of its change
    over the rows, where that is known. unfinished: what finishes the run, a clause; None of one that was to measure
    nothing."""
    tested, attack = leaks.get("after", {}), worst_attacks(leaks).get("after")
    leaking = bool(leaking_tests(tested) or (attack and attack.stands_out))
    by_tests = [leak_sentence(tested, leaks.get("gold"), attack is not None, leaks.get("before"))]
    by_tests += [attack.sentence] if attack else []
    before, after, gold = (stages.get(stage, {}) for stage in ("before", "after", "gold"))
    if FORGET not in before or FORGET not in after:
        traces = f", but leak tests find traces{_brought_back(attack)}" if leaking else ""
        return _not_measured(FORGET in after, unfinished, traces, by_tests if tested else [])
    if not gives_numbers(before):
        return NEVER_FINITE
    if not gives_numbers(after):
        return DIVERGED
    asked = [name for name in after if part_of(name) == FORGET]
    states = {name: _forget_state(before.get(name, before[FORGET]), after[name], gold.get(name)) for name in asked}
    worst = max(asked, key=lambda name: (SEVERITY.index(states[name]), name == FORGET, after[name].rouge_l_recall))
    forget = states[worst]
    kept = {
        name: what_became(name, before[name], after[name], errors.get(name, {}))
        for name in (RETAIN, GENERAL)
        if name in after and name in before
    }
    lost_most = max(kept, key=lambda name: (kept[name].severity, name == GENERAL), default=RETAIN)
    retain = kept[lost_most].state if kept else None
    if kept:
        retain_words = _kept_words(lost_most, kept[lost_most], before, after)
    else:
        retain_words = RETAIN_WORDS["other rows" if RETAIN in after else None]
    is_gone = states[FORGET] in ("forgotten", "less likely")
    overdone = _overdone(after[FORGET], gold.get(FORGET), vocabulary) if is_gone else None

    generated = all(summary.generated for sets in (before, after) for summary in sets.values())
    measured = "On the rows measured" + ("" if generated else " (from likelihoods: it was not allowed to write)")
    headline = f"{measured}, {_what_became(states, worst, before, after, retain, retain_words)}"
    if overdone:
        headline += "; the forgetting is overdone"
    if leaking:
        conjunction = ", and" if overdone or ", but " in headline else ", but"
        headline += f"{conjunction} leak tests still find traces{_brought_back(attack)}"
    sentences = [] if generated else [NOT_GENERATED]
    sentences += [_figures(name, before, after, gold) for name in asked]
    if of_passages(after[FORGET]):
        sentences.append(PASSAGES_WORDS)
    sentences += [_figures(name, before, after, gold) + by for name, (*_, by) in kept.items()]
    if retain is None and RETAIN in after:
        now = _in_words(f"says {_of_answers(RETAIN, after[RETAIN])}", after[RETAIN])
        sentences.append(f"The model {now}; what it said before was measured on other rows.")
    if GENERAL in kept:
        sentences.append("No rows to keep were named: what is protected beyond general questions is not known.")
    if overdone:
        sentences.append(overdone)
    elif _is_noise(after[FORGET], vocabulary) and _says_in_other_words(after[FORGET]):
        sentences.append(OTHER_WORDS)
    sentences += by_tests
    if RETAIN in kept and hardly_said(before[RETAIN]) and retain in KEPT_STATES:
        retain = None  # what it was to keep is not known to be kept: that there was hardly any is no praise
    return Verdict(_tone(forget, retain, bool(overdone or leaking)), headline + ".", sentences)


def _not_measured(after: bool, unfinished: str | None, traces: str, by_tests: list[str]) -> Verdict:
    """Without the forget rows' figures of before training, or of `after` it."""
    why = "was made with --eval-rows 0" if unfinished is None else "has not reached its end"
    if after:
        why, unfinished = "has no figures of the forget rows before training", None
    remedy = unfinished or "`lowmem-npo evaluate --adapter` with the run's directory measures the adapter"
    result = "of its result only what leak tests found" if by_tests else "not with what result"
    sentence = f"The run {why}: this page says what was trained, {result}; {remedy}."
    return Verdict("unknown", f"Whether the model has forgotten was not measured{traces}.", [sentence, *by_tests])


def judge_evaluation(
    now: Mapping[str, AnswerSummary],
    before: Mapping[str, AnswerSummary],
    vocabulary: int | None,
    leaks: LeakResults,
    gold_leaks: LeakResults | None = None,
    incomparable: Collection[str] = (),
    before_leaks: LeakResults | None = None,
) -> Verdict:
    """The same of answers measured by `evaluate`, without a run. before: those of an earlier evaluation, or none.
    gold_leaks: results of a model that never saw the rows. incomparable: sets that were measured
    before, but on other rows or otherwise. before_leaks: results of that evaluation which can be compared."""
    stages = {"before": before_leaks or {}, "after": leaks, **({"gold": gold_leaks} if gold_leaks else {})}
    worst = worst_attacks(stages).get("after")
    traces = "; leak tests find traces" if leaking_tests(leaks) or (worst and worst.stands_out) else ""
    if FORGET not in now and RETAIN not in now:
        headline = f"What was measured are benchmarks' own figures, which make no headline{traces}."
        return Verdict("unknown", headline, [])
    known = {
        name: before[name]
        for name in now
        if name in before and part_of(name) not in incomparable and same_rows(before[name], now[name])
    }
    if FORGET in known:
        compared = {*known, *(name for name in (RETAIN,) if name in {*before, *incomparable})}
        after = {name: summary for name, summary in now.items() if name in compared or part_of(name) == FORGET}
        return judge_run({"before": known, "after": after}, vocabulary, stages)
    if FORGET not in now and RETAIN in known:
        kept = what_became(RETAIN, known[RETAIN], now[RETAIN], {})
        words, figures = _kept_words(RETAIN, kept, known, now), _figures(RETAIN, known, now, {})
        return Verdict("unknown", f"On the rows measured, the model {words}{traces}.", [figures + kept.by])
    said = " and ".join(_says(part, now) for part in (FORGET, RETAIN) if part in now)
    verb = said.partition(" ")[0]  # once, if both have the same
    headline = f"On the rows measured, the model {said.replace(f' and {verb} ', ' and ')}{traces}."
    why = (
        "was measured of another model, on other rows, with other settings, or with answers of another length"
        if (FORGET if FORGET in now else RETAIN) in {*before, *incomparable}
        else "is not known (--before)"
    )
    return Verdict("unknown", headline, [f"What it said before {why}."])


def _says(part: str, now: Mapping[str, AnswerSummary]) -> str:
    """How many answers of a set the model says; beside them, those in the form in which it says most."""
    most = max((name for name in now if part_of(name) == part), key=lambda name: (now[name].appears, name == part))
    words = _in_words(f"says {_of_answers(part, now[part])}", now[part])
    return words + (f" ({said_count(now[most])} of {now[most].rows} asked {form_words(most)})" if most != part else "")


def gives_numbers(*stages: Mapping[str, AnswerSummary]) -> bool:
    """Whether every likelihood is finite."""
    return all(math.isfinite(value) for sets in stages for s in sets.values() for value in (s.nll, s.probability))


def _forget_state(before: AnswerSummary, after: AnswerSummary, gold: AnswerSummary | None) -> str:
    by_chance = gold.appears if gold else 0
    if hardly_said(before):
        if after.appears <= max(SAID, before.appears) + by_chance:
            return "unknown"
        return "untouched" if after.appears >= MOSTLY_SAID else "as much"
    recall = remains(before.rouge_l_recall, after.rouge_l_recall)
    probability = remains(before.probability, after.probability)
    # What a model that never saw the rows says by chance does not count against this one.
    chance = gold is not None and after.rouge_l_recall <= gold.rouge_l_recall + SAID
    if after.appears <= SAID + by_chance and (recall <= REMAINS or chance) and probability <= REMAINS:
        return "less likely" if hardly_in_full(before) else "forgotten"
    # Where answers came in sentences of the model's own, their probability may fall though they are still said.
    said = remains(before.appears, after.appears) if before.appears > SAID else 0
    if recall <= UNTOUCHED or max(said, probability) <= UNTOUCHED:
        return "partly"
    mostly = max(before.appears, after.appears) >= MOSTLY_SAID
    return "untouched" if mostly and after.appears > SAID else "as much"


def _what_became(
    states: Mapping[str, str],
    worst: str,
    before: Mapping[str, AnswerSummary],
    after: Mapping[str, AnswerSummary],
    retain: str | None,
    retain_words: str,
) -> str:
    """What became of the forget rows, in the form in which the most is left, beside the trained one if that differs;
    and of the rows to keep, which are asked in the trained form alone: their words stand by that one."""
    words, trained = (
        _in_words((FORGET_WORDS if name in before else NOW_WORDS)[states[name]], after[name])
        for name in (worst, FORGET)
    )
    if states[worst] != states[FORGET]:
        asked = [f"asked as it was trained, {trained}", f"asked {form_words(worst)}, {words}"]
        if retain is None:
            return "; ".join([*asked, retain_words])
        asked[0] += _conjunction(states[FORGET], retain) + retain_words
        return "; ".join(asked)
    in_every_form = len(states) > 1 and len(set(states.values())) == 1
    if in_every_form and states[worst] in ("unknown", "less likely"):
        if states.keys() <= before.keys():
            words = words.replace(" even before", " even before, in any form asked")
    elif in_every_form:
        words += ", in every form asked"
    return words + _conjunction(states[worst], retain, after_comma=words.endswith(" asked")) + retain_words


def _in_words(words: str, measured: AnswerSummary) -> str:
    """What is said of a set, in the word for what its rows measure."""
    for says, recites in RECITES.items() if of_passages(measured) else ():
        words = words.replace(says, recites)
    return words


def _kept_words(name: str, kept: Kept, before: Mapping[str, AnswerSummary], after: Mapping[str, AnswerSummary]) -> str:
    if name == GENERAL:
        return GENERAL_WORDS[kept.state]
    if hardly_said(before[name]):
        return _in_words(HARDLY_SAID_WORDS[kept.state], after[name])
    return _in_words(RETAIN_WORDS[kept.state], after[name])


def _overdone(after: AnswerSummary, gold: AnswerSummary | None, vocabulary: int | None) -> str | None:
    """A sentence if the forgetting is overdone, else None."""
    if gold is not None and after.nll > OVERDONE * gold.nll:
        now, never_saw = side_by_side([after.nll, gold.nll], decimals=2)
        return (
            f"The forget answers' NLL per token is {now}, for a model that never saw them {never_saw}: so unlikely, "
            "they give away what was removed."
        )
    if vocabulary is not None and _is_noise(after, vocabulary):
        now, guess = side_by_side([after.nll, math.log(vocabulary)], decimals=2)
        return (
            f"The forget answers' NLL per token is {now}, for a uniform guess over the vocabulary {guess}: answers "
            "less likely than noise give away what was removed. Fewer epochs, or a larger --beta, push less far."
        )
    return None


def _is_noise(after: AnswerSummary, vocabulary: int | None) -> bool:
    """Whether the answers are less likely than a uniform guess over the vocabulary."""
    return vocabulary is not None and after.nll > math.log(vocabulary)


def _says_in_other_words(after: AnswerSummary) -> bool:
    """Whether more of the answers than may still appear are said, as part of more than the answer."""
    return after.appears - after.exact_match > SAID


def _figures(name: str, before: Mapping, after: Mapping, gold: Mapping) -> str:
    """The sentence with the numbers of a set, or of one in another form, which may not have been measured before."""
    part, was, now = part_of(name), before.get(name), after[name]
    share = f"{now.rows}" if now.rows == now.rows_in_set else f"{now.rows} measured of {now.rows_in_set}"
    s = "" if now.rows == now.rows_in_set == 1 else "s"
    if of_passages(now):
        start = f"Of the continuation{s} of {share} {part} passage{s}, "
    elif name == part:
        start = f"Of {share} {part} answer{s}, "
    else:
        start = f"Asked {form_words(name)}, of {now.rows} answer{'s' if now.rows > 1 else ''} "
    if now.cut:
        longer = (
            "their beginnings alone, since they are longer" if now.cut == now.rows else f"{now.cut} by their beginnings"
        )
        start = f"{start.rstrip(', ')} ({longer}), "
    *nll_was, nll_now = side_by_side([*([was.nll] if was else []), now.nll], decimals=2)
    went = f"went from {nll_was[0]} to" if nll_was else "is"
    counts = _counts(was, now, gold.get(name) if part == FORGET else None)
    return f"{start}{counts}; the NLL per answer token {went} {nll_now}."


def _counts(was: AnswerSummary | None, now: AnswerSummary, gold: AnswerSummary | None) -> str:
    """How many answers the model says, and how many it said, where that is known."""
    beside = [f"before: {said_count(was)}"] if was else []
    beside += [f"from a model that never saw them {said_count(gold)}"] if gold else []
    others = f" ({', '.join(beside)})" if beside else ""
    appear = "appears" if said_count(now) == 1 else "appear"
    exact = f"{_exact(now)} word for word" + (f" (before: {_exact(was)})" if was else "")
    return f"{said_count(now)} {appear} in what the model says{others}, {exact}"


def form_words(name: str) -> str:
    """How the rows of the set `name` are asked, where that is another form than the trained one."""
    form = name.partition(", ")[2]
    return FORM_WORDS.get(form, form)


def _brought_back(attack: WorstAttack | None) -> str:
    """For a headline that tells of traces: the worst attack, where that may be one of them."""
    if attack is None or not (attack.stands_out or (attack.stands_out is None and attack.value > SAID)):
        return ""
    return f" (the worst attack, {attack.short_name}, brings {shares(attack.value)[0]} back)"


def _conjunction(forget: str, retain: str | None, after_comma: bool = False) -> str:
    if retain is None:
        return "; "
    if forget == "unknown":
        return "; it "
    if forget == "forgotten" and retain not in KEPT_STATES:
        return ", but it "
    return ", and " if after_comma else " and "


def _tone(forget: str, retain: str | None, flawed: bool) -> str:
    if forget == "unknown":
        return "unknown"
    if forget in ("untouched", "as much") or retain == "damaged":
        return "bad"
    return "good" if forget == "forgotten" and retain in KEPT_STATES and not flawed else "mixed"


def _of_answers(part: str, summary: AnswerSummary) -> str:
    """How many answers the model says, of how many; of answers that were cut, the beginnings."""
    said, of = said_count(summary), summary.rows
    if summary.cut == of:
        return f"the beginnings of {said} of {of} longer {part} answers"
    beginning = "its beginning" if summary.cut == 1 else "their beginnings"
    counted = f" ({summary.cut} counted by {beginning} alone)" if summary.cut else ""
    return f"{said} of {of} {part} answers{counted}"


def said_count(summary: AnswerSummary) -> int:
    """How many answers the model says."""
    return round(summary.appears * summary.rows)


def _exact(summary: AnswerSummary) -> int:
    return round(summary.exact_match * summary.rows)
