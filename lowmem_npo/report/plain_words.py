"""The first page of a report: for a reader who is not an engineer, without abbreviations or figures but counts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem_npo.config import REFUSING_TERMS
from lowmem_npo.data.reading import general_words
from lowmem_npo.data.tokenized_rows import UNTHINKING
from lowmem_npo.evaluation.answer_table import FORGET, GENERAL, NOT_GENERATED, RETAIN
from lowmem_npo.evaluation.answers import AnswerSummary, part_of
from lowmem_npo.evaluation.asking import REWORDED
from lowmem_npo.evaluation.figures import shares
from lowmem_npo.evaluation.leaks.beside_before import none_before
from lowmem_npo.evaluation.leaks.registry import by_name
from lowmem_npo.evaluation.leaks.relearning import RELEARNING
from lowmem_npo.evaluation.leaks.rewording import REWORDING
from lowmem_npo.evaluation.leaks.sampling import SAMPLING, WHOLE
from lowmem_npo.evaluation.leaks.worst import WorstAttack, attacks_of
from lowmem_npo.report.audit import seconds
from lowmem_npo.report.content import STAGES, Content
from lowmem_npo.report.kept import of_passages
from lowmem_npo.report.leak_sentence import OnGold, was_run
from lowmem_npo.report.verdict import form_words, gives_numbers, said_count
from lowmem_npo.run_directory import RunFiles
from lowmem_npo.sizes import counted, first_of
from lowmem_npo.sources import data_names

ORIGINAL = (
    "The original weights are as they were: what is forgotten is so only with the adapter on them, or in a merged "
    "model. Whoever has the base model can leave the adapter off."
)
# What no test shows, and what shows a part of it: a leak test, or a form in which the rows are asked.
UNTRIED = {
    "other wordings": (REWORDING.name, REWORDED),
    "other languages": (),
    "random answers": (SAMPLING.name,),
    "a little further training": (RELEARNING.name,),
}
RELATED = "What is not in the examples to forget is not forgotten, however closely related."
NO_GOLD = (
    "The only complete yardstick is a model that was never taught the examples to forget. None was available, so it is "
    "not known what such a model would have said."
)
GOLD_LEAKS_ALONE = (
    "The only complete yardstick is a model that was never taught the examples to forget. Of one, only what leak tests "
    "found is compared with here, not what it says when it is asked."
)
WHAT_COUNTS = "An answer counts as given if it is in one piece anywhere in what the model says."


# By whether a test finds traces, None where it cannot tell, and whether it compared with the model before instead of
# with a holdout.
FINDS = {
    (True, False): "Traces are found by",
    (False, False): "No traces are found by",
    (True, True): "Much of what there was is still found by",
    (False, True): "Much less than before is found by",
    (None, False): "Whether there are traces could not be told by",
}
# Of tests that find none.
NONE_BEFORE = "None were found so before the forgetting either, so this tells nothing of it."


@dataclass(frozen=True)
class Part:
    """A heading of the first page and what is below it."""

    title: str
    sentences: list[str]


def first_page(content: Content, model: str) -> list[Part]:
    """What was asked, done and found, what remains, and what the report does not show. model: its name."""
    parts = {
        "What was asked": _asked(content, model),
        "What was done": _done(content),
        "What was found": _found(content),
        "What remains": _remains(content),
        "What this does not show": limits(content),
    }
    return [Part(title, list(sentences)) for title, sentences in parts.items()]


def _asked(content: Content, model: str) -> Iterator[str]:
    data: Mapping[str, Any] = content.audit["data"] if content.audit else {}
    forget, retain = data.get(FORGET), data.get(RETAIN)
    examples = f"{counted(forget['rows'], 'example')} (“{_source(forget)}”)" if forget else "the examples given"
    yield f"The language model “{model}” was to forget what is in {examples}. Below they are called forget rows."
    if retain is None:
        yield "It was to keep what it knows otherwise, but no examples of that were used in the training."
        return
    if not (content.settings.get("gamma", 1) or content.settings.get("delta", 1)):
        yield (
            f"It was to keep what it knows otherwise, but the training did not use the "
            f"{counted(retain['rows'], 'example')} of that (“{_source(retain)}”). Below they are called retain rows."
        )
    elif general := general_words(retain["source"] or ""):
        yield (
            f"It was to keep what it knows otherwise. No examples of that were named, so {retain['rows']:,} of "
            f"{general} were used, below called retain rows."
        )
    else:
        yield (
            "It was to keep what it knows otherwise. For that it was trained on "
            f"{counted(retain['rows'], 'example')} to protect (“{_source(retain)}”), below called retain rows."
        )


def _done(content: Content) -> Iterator[str]:
    audit, stages = content.audit, content.stages
    if audit is None or audit["adapter"] is None:
        yield "An adapter, a small addition to the model, was trained, but no record says that it was finished."
    else:
        refuses = content.settings.get("forget_term") in REFUSING_TERMS
        aim = "to refuse the questions" if refuses else "to unlearn the answers"
        time = f" It took {_duration(span)}." if (span := seconds(audit["sessions"])) is not None else ""
        yield (
            f"An adapter, a small addition to the model, was trained {aim} in {audit['optimizer_steps']:,} steps. The "
            f"model's own weights were not changed.{time}"
        )
        if (folds := content.settings.get("layered")) is not None:
            yield (
                f"The answers were unlearned in {folds} stages: in the first a part of them, in each further one "
                "another part as well; what had not come yet was kept until then."
            )
        if content.settings.get("adversary") is not None:
            yield (
                "Before each step an attacker was trained to bring back some of the answers, and others were unlearned "
                "against it."
            )
    if {"before", "after"} <= set(stages):
        yield (
            "Before and after, the model was given the same questions or beginnings of texts. What it said was "
            "compared with the true answers."
        )
    if "gold" in stages:
        yield (
            "So was a second model, taught in the same way but without the examples to forget: it shows what a model "
            "says that never saw them."
        )


def _found(content: Content) -> Iterator[str]:
    before, after, gold = (content.stages.get(stage, {}) for stage in ("before", "after", "gold"))
    if not (FORGET in before and FORGET in after and gives_numbers(before, after)):
        yield from content.verdict.sentences
        return
    if not after[FORGET].generated:
        yield NOT_GENERATED
    for name, now in after.items():
        if part_of(name) == FORGET or (name in (RETAIN, GENERAL) and name in before):
            never_saw = f"; a model that never saw them gives {said_count(gold[name])}" if name in gold else ""
            yield _course(name, before.get(name), now, never_saw if part_of(name) == FORGET else "")
    yield WHAT_COUNTS.replace("An answer", "A continuation") if of_passages(after[FORGET]) else WHAT_COUNTS


def _course(name: str, was: AnswerSummary | None, now: AnswerSummary, never_saw: str) -> str:
    """was: None of a form in which the rows were not asked before."""
    kind = {FORGET: "to forget", RETAIN: "to protect", GENERAL: "to general questions"}[part_of(name)]
    whole = now.rows == now.rows_in_set or name.endswith(REWORDED)  # a row may be asked in several paraphrases
    of = f"{now.rows:,}" if whole else f"{now.rows:,} (measured, of {now.rows_in_set:,})"
    s = "" if whole and now.rows == 1 else "s"
    what = f"the continuation{s} of {of} passage{s}" if of_passages(now) else f"{of} answer{s}"
    start = f"Of {what} {kind}, " + ("" if name == part_of(name) else f"asked {form_words(name)}, ")
    if was is None:
        (words_are,) = shares(now.rouge_l_recall)
        return f"{start}the model gives {said_count(now):,} now{never_saw}. Of their words, {words_are} come."
    words_were, words_are = shares(was.rouge_l_recall, now.rouge_l_recall)
    return (
        f"{start}the model gave {said_count(was):,} before and gives {said_count(now):,} now{never_saw}. Of their "
        f"words, {words_were} came before and {words_are} come now."
    )


def _remains(content: Content) -> Iterator[str]:
    after = content.stages.get("after", {})
    passages = FORGET in after and of_passages(after[FORGET])
    for sentence in _came_back(content):
        yield _of_passages(sentence) if passages else sentence
    yield ORIGINAL
    if names := list(_with_text(RunFiles(content.directory))):
        named = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
        yield f"Text of rows is in {named}, beside this report: do not pass that on with the report."


def _of_passages(sentence: str) -> str:
    """What is told of answers, as of texts that the model goes on with."""
    sentence = sentence.replace(", after its question where there is one,", ",")
    return re.sub(r"\b(an )?answer(s?)\b", lambda word: f"{'a ' if word[1] else ''}passage{word[2]}", sentence)


def _came_back(content: Content) -> Iterator[str]:
    """What leak tests and the worst attack found, with each test in the words for what it tries."""
    after = content.leaks.get("after", {})
    passed_before = none_before(after, content.leaks.get("before", {}))
    outcomes = {
        name: (result.leaks, result.against_before and result.leaks is not None)
        for name, result in after.items()
        if was_run(result) and name not in passed_before
    }
    if all(leaks is None for leaks, _ in outcomes.values()):
        why = "none of the tests could tell" if outcomes or passed_before else "no test that could tell was run"
        yield f"Whether the answers come in other ways than by asking is not known: {why}."
    for outcome, start in FINDS.items():
        tests = [name for name in outcomes if outcomes[name] == outcome]
        if tests:
            yield f"{start} {'; by '.join(map(_way, tests))}."
        if tests and outcome == (True, False) and (gold := content.leaks.get("gold")):
            yield _on_gold(OnGold.of(tests, gold))
    if passed_before:
        yield f"{FINDS[False, False]} {'; by '.join(map(_way, passed_before))}. {NONE_BEFORE}"
    if (worst := content.worst_attacks.get("after")) is not None:
        attacks = attacks_of(content.leaks["after"]).values()
        yield _worst(worst, nothing=not any(attack.value for attack in attacks))


def _on_gold(known: OnGold) -> str:
    """Of tests that find traces, how many find the same in a model that never saw the examples."""
    *decided, undecided, not_run = map(len, known)
    if not any(decided):
        why = "of these tests none that could tell was tried on it"
        return f"Whether the same is found in a model that never saw the examples is not known: {why}."
    start = f"In a model that never saw the examples, the same is found by {decided[0] or 'none'} of these tests"
    rest = [f"{not_run} of them {'were' if not_run > 1 else 'was'} not tried on it"] if not_run else []
    rest += [f"{undecided} of them could not tell there"] if undecided else []
    return "; ".join([start, *rest]) + "."


def _with_text(files: RunFiles) -> Iterator[str]:
    """The files of a run, of those that it has, that hold text of rows."""
    measured = [file for of in files.evaluations() for file in (of.rows, of.journal)]
    for file in (*map(files.answers, STAGES), files.self_written, files.alternatives, *measured):
        if file.is_file():
            yield file.relative_to(files.path).as_posix()


def _worst(worst: WorstAttack, nothing: bool) -> str:
    """The attack that brings back most, and what stands beside it. nothing: whether no attack brings anything back."""
    own, *others = shares(*(value for value in (worst.value, worst.holdout, worst.gold) if value is not None))
    beside, one = [], "one of them" if nothing else "the same"
    if worst.holdout is not None:
        beside.append(f"of answers that the model never saw, {one} brings forth {others.pop(0)}")
    if worst.gold is not None:
        beside.append(f"from a model that never saw the examples, it brings {others.pop(0)}")
    if nothing:
        none = "None of the ways that were tried to bring answers back brings any back"
        return f"{'; '.join([none, *beside])}."
    what = "of the answers" if worst.figure == WHOLE else "of an answer"
    how = f" ({worst.attack})" if worst.attack else ""
    levels = "; ".join(["", *beside]) or "; what it brings forth of answers that the model never saw is not known"
    chance = ", which with so few examples may be chance" if worst.by_chance else ""
    most = "The most comes back by"
    if worst.level is not None and worst.value <= worst.level:
        never_saw = "of answers that the model never saw" if worst.gold is None else "from a model that never saw them"
        most = (
            f"None of the ways that were tried brings back more of the answers than comes {never_saw}; closest to it is"
        )
    return f"{most} {_way(worst.test)}{how}: {own} {what}{levels}{chance}{worst.remark}."


def _way(name: str) -> str:
    """What the leak test `name` tries, after "by"."""
    return by_name(name).in_words or f"the test “{name}”"


def limits(content: Content) -> Iterator[str]:
    """What the report does not show."""
    if {"before", "after"} <= set(content.stages):
        yield (
            "The model was asked in the words of the data, and in those other forms that are listed, and its likeliest "
            "answer was taken (greedy)."
        )
        if content.audit and content.audit["data"].get(FORGET, {}).get("unthinking"):
            yield UNTHINKING
        tried = {name for name, result in content.leaks.get("after", {}).items() if result.figures}
        tried |= {name.partition(", ")[2] for name in content.stages["after"]}
        *ways, last = [way for way, shown_by in UNTRIED.items() if not tried.intersection(shown_by)]
        such = f"{', '.join(ways)} or {last}" if ways else last
        yield f"What was not tried, such as {such}, may bring back what these ways do not."
        if "gold" not in content.stages:
            yield GOLD_LEAKS_ALONE if any(map(was_run, content.leaks.get("gold", {}).values())) else NO_GOLD
    else:
        yield "Whether anything was forgotten, and whether anything else was lost, was not measured."
    yield RELATED


def _source(data: Mapping[str, Any]) -> str:
    """Files by their names, without their folders."""
    names = data_names(data["source"] or "bundled")
    return first_of([Path(name).name if Path(name).is_absolute() else name for name in names], separator=", ")


def _duration(seconds: float) -> str:
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"
