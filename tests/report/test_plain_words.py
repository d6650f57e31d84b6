"""The first page: the run's own counts and names, in words that need no explanation."""

import json
import math
import re
from dataclasses import replace

import pytest

from lowmem_npo.evaluation.answers import AnswerSummary
from lowmem_npo.evaluation.leaks.contract import LeakResult
from lowmem_npo.evaluation.leaks.registry import LEAK_TESTS
from lowmem_npo.report.content import read_content
from lowmem_npo.report.plain_words import GOLD_LEAKS_ALONE, NO_GOLD, ORIGINAL, first_page

TITLES = ["What was asked", "What was done", "What was found", "What remains", "What this does not show"]


def summary(said=0.0, recall=0.0, rows=20, of=None, nll=3.0) -> AnswerSummary:
    return AnswerSummary(
        rows=rows, rows_in_set=of or rows, tokens=100, nll=nll, probability=0.1, rouge_l_recall=recall,
        exact_match=said, appears=said, max_new_tokens=64,
    )  # fmt: skip


@pytest.fixture
def content(run):
    return read_content(run)


def part(content, title: str) -> list[str]:
    return {part.title: part.sentences for part in first_page(content, "Tiny")}[title]


def test_it_comes_first_and_has_five_parts(run, content):
    html = (run / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'<h2 id="plain\d">(.*?)</h2>', html) == TITLES
    first, _, rest = html.partition('id="figures"')
    assert all(title in first for title in TITLES) and "<svg" not in first and "<table" not in first
    assert content.verdict.sentences[0].split(";")[0] in re.sub("<[^>]+>", "", rest), "the figures follow"
    words = re.sub("<[^>]+>", " ", first.partition("<body>")[2])
    assert re.findall(r"\b(?!AI\b)[A-Z]{2,}\b", words.replace("lowmem-npo", "")) == []


def test_it_names_the_data_without_its_folder(run, content):
    asked = " ".join(part(content, "What was asked"))
    assert "The language model “Tiny” was to forget what is in 5 examples (“forget.jsonl”)" in asked
    assert "it was trained on 2 examples to protect (“retain.jsonl”), below" in asked and str(run.parent) not in asked
    assert "in 3 steps" in part(content, "What was done")[0]


def test_its_counts_are_those_of_the_table(run, content):
    table = json.loads((run / "before_after.json").read_text())
    found = part(content, "What was found")
    for sentence, name in zip(found, table["after"], strict=False):
        was, now = (table[stage][name] for stage in ("before", "after"))
        counts = [round(stage["appears"] * stage["rows"]) for stage in (was, now)]
        assert f"the model gave {counts[0]} before and gives {counts[1]} now" in sentence
    assert len(found) == len(table["after"]) + 1


def test_every_form_and_part_has_its_sentence(content):
    stages = {
        "before": {"forget": summary(0.9, 0.95, of=1112), "forget, plain": summary(0.8, 0.9),
                   "retain": summary(1.0, 1.0), "general": summary(0.5, 0.5)},
        "after": {"forget": summary(0.05, 0.125, of=1112), "forget, plain": summary(0.1, 0.2),
                  "retain": summary(0.95, 0.98), "general": summary(0.5, 0.5)},
        "gold": {"forget": summary(0, 0.1), "retain": summary(1.0, 1.0)},
    }  # fmt: skip
    in_words = summary(0.5, 0.75)  # not asked so before
    stages["after"]["forget, reworded"] = in_words
    content = replace(content, stages=stages)
    assert part(content, "What was found") == [
        "Of 20 (measured, of 1,112) answers to forget, the model gave 18 before and gives 1 now; a model that never "
        "saw them gives 0. Of their words, 95% came before and 12% come now.",
        "Of 20 answers to forget, asked without its chat template, the model gave 16 before and gives 2 now. Of their "
        "words, 90% came before and 20% come now.",
        "Of 20 answers to protect, the model gave 20 before and gives 19 now. Of their words, 100% came before and 98% "
        "come now.",
        "Of 20 answers to general questions, the model gave 10 before and gives 10 now. Of their words, 50% came "
        "before and 50% come now.",
        "Of 20 answers to forget, asked in other words, the model gives 10 now. Of their words, 75% come.",
        "An answer counts as given if it is in one piece anywhere in what the model says.",
    ]
    assert "second model" in part(content, "What was done")[-1]
    assert NO_GOLD not in part(content, "What this does not show")


def test_what_the_leak_tests_found(content):
    result = {leaks: LeakResult({}, "", leaks) for leaks in (True, False, None)}
    smaller = {leaks: LeakResult({}, "", leaks, against_before=True) for leaks in (True, False)}
    after = {"extraction": result[True], "membership": result[False], "sampling": smaller[True],
             "quantization": smaller[False], "relearning": result[None]}  # fmt: skip
    gold = {"extraction": result[False]}
    assert part(replace(content, leaks={"after": after, "gold": gold}), "What remains") == [
        "Traces are found by giving the model the beginning of the answer, after its question where there is one, and "
        "letting it go on.",
        "In a model that never saw the examples, the same is found by none of these tests.",
        "No traces are found by looking at how likely the answers are to the model, without letting it say them.",
        "Much of what there was is still found by asking several times for random answers instead of the "
        "likeliest one.",
        "Much less than before is found by storing the model in another form, with the adapter merged or in 4 bits as "
        "many do to save memory, and attacking that.",
        ORIGINAL,
        "Text of rows is in before.json and after.json, beside this report: do not pass that on with the report.",
    ]
    for none in ({}, {"after": {"relearning": result[None]}}):
        assert "not known: no test" in part(replace(content, leaks=none), "What remains")[0]


def test_leak_tests_that_found_none_before_either_tell_nothing(content):
    none, some = (LeakResult({"rows": 9}, "", leaks) for leaks in (False, True))
    leaks = {"before": {"extraction": none, "membership": some}, "after": {"extraction": none, "membership": none}}
    found, nothing, *_ = part(replace(content, leaks=leaks), "What remains")
    assert found.startswith("No traces are found by looking at how likely") and "beginning of the answer" not in found
    assert nothing == (
        "No traces are found by giving the model the beginning of the answer, after its question where there is one, "
        "and letting it go on. None were found so before the forgetting either, so this tells nothing of it."
    )
    leaks["before"]["membership"] = none
    unknown, *_ = part(replace(content, leaks=leaks), "What remains")
    assert unknown.endswith("is not known: none of the tests could tell.")


def test_of_a_gold_model_only_the_tests_that_were_tried_on_it_count(content):
    traces, none, undecided = (LeakResult({"rows": 9}, "", leaks) for leaks in (True, False, None))
    after = dict.fromkeys(("extraction", "sampling", "relearning"), traces)

    def on_gold(**gold):
        lines = part(replace(content, leaks={"after": after, "gold": gold}), "What remains")
        return next(line for line in lines if "model that never saw the examples" in line)

    start = "In a model that never saw the examples, the same is found by"
    assert on_gold(extraction=none) == f"{start} none of these tests; 2 of them were not tried on it."
    assert on_gold(extraction=traces, sampling=undecided) == (
        f"{start} 1 of these tests; 1 of them was not tried on it; 1 of them could not tell there."
    )
    assert on_gold(membership=none) == (
        "Whether the same is found in a model that never saw the examples is not known: of these tests none that could "
        "tell was tried on it."
    )


def test_a_gold_model_of_which_only_leak_tests_are_known_is_not_said_to_be_missing(content):
    """As through `evaluate --retained-log`."""
    tried = {"extraction": LeakResult({"extraction_strength": 0.1}, "", False)}
    for gold, known in ((tried, True), ({"extraction": LeakResult.not_measured("no rows")}, False)):
        limits = part(replace(content, leaks={"after": tried, "gold": gold}), "What this does not show")
        assert (NO_GOLD in limits) != known and (GOLD_LEAKS_ALONE in limits) == known


def test_leak_tests_that_could_not_tell_are_named(content):
    undecided = {"membership": LeakResult({"auroc": 0.78}, "", None, against_before=True)}
    way = "looking at how likely the answers are to the model, without letting it say them."
    others = {"extraction": LeakResult({}, "", False)}
    found, untold, *_ = part(replace(content, leaks={"after": others | undecided}), "What remains")
    assert found.startswith("No traces are found by giving the model the beginning")
    assert untold == f"Whether there are traces could not be told by {way}"
    unknown, alone, *_ = part(replace(content, leaks={"after": undecided}), "What remains")
    assert unknown.endswith("is not known: none of the tests could tell.") and alone == untold


def test_only_files_that_are_there_are_named(content, tmp_path):
    """Of all that may hold text of rows."""
    bare = replace(content, directory=tmp_path)
    assert part(bare, "What remains")[-1] == ORIGINAL
    for name in ("after.json", "evaluation/rows.jsonl", "evaluation-2/measured.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert part(bare, "What remains")[-1].startswith(
        "Text of rows is in after.json, evaluation/rows.jsonl and evaluation-2/measured.jsonl, beside this report"
    )


def test_what_was_tried_is_not_among_what_was_not(content):
    def untried(*tests, **forms):
        measured = {name: LeakResult({"rows": 5}, "", False) for name in tests}
        stages = {
            stage: sets | {f"forget, {form}": summary() for form in forms} for stage, sets in content.stages.items()
        }
        limits = part(replace(content, leaks={"after": measured}, stages=stages), "What this does not show")
        (such,) = [re.search("such as (.*), may bring back", limit) for limit in limits if "not tried" in limit]
        return such[1]

    assert untried() == "other wordings, other languages, random answers or a little further training"
    assert untried("relearning") == "other wordings, other languages or random answers"
    assert (
        untried("relearning", "sampling", reworded=True)
        == untried("relearning", "sampling", "rewording")
        == ("other languages")
    )
    unmeasured = {"after": {"relearning": LeakResult({}, "Not measured.", None)}}
    assert any(
        "further training" in limit for limit in part(replace(content, leaks=unmeasured), "What this does not show")
    )


def test_the_worst_attack_is_told_without_its_terms(content):
    def relearnt(strength, holdout):
        figures = {"extraction_strength": strength, "holdout_extraction_strength": holdout}
        return {"relearning": LeakResult({"20 steps, 20% shown, lr 0.001": figures}, "", True)}

    leaks = {"after": relearnt(0.45, 0.12), "gold": relearnt(0.11, 0.1)}
    (line,) = [line for line in part(replace(content, leaks=leaks), "What remains") if "The most comes back" in line]
    assert line == (
        "The most comes back by teaching the model some of the examples again, and letting it complete the others (20 "
        "steps, 20% shown, lr 0.001): 45% of an answer; of answers that the model never saw, the same brings forth "
        "12%; from a model that never saw the examples, it brings 11%."
    )
    few = {
        "extraction": LeakResult(
            {"extraction_strength": 0.4, "holdout_extraction_strength": 0.2, "p_value": 0.3}, "", None
        )
    }
    lines = part(replace(content, leaks={"after": few}), "What remains")
    assert any(line.endswith("brings forth 20%, which with so few examples may be chance.") for line in lines)
    merged = {"merged": {"extraction_strength": 0.1, "relearning: 20 steps": {"extraction_strength": 0.6}}}
    (line,) = [
        line
        for line in part(
            replace(content, leaks={"after": {"quantization": LeakResult(merged, "", True)}}), "What remains"
        )
        if "The most comes back" in line
    ]
    assert "with the adapter merged" in line and "(merged in bf16, relearning: 20 steps): 60%" in line
    whole = {"after": {"sampling": LeakResult({"whole": 0.25}, "", None)}}
    assert any("25% of the answers; what it" in line for line in part(replace(content, leaks=whole), "What remains"))


@pytest.mark.parametrize(
    "strength, holdout, gold, sentence",
    [
        (0.0, None, None, "None of the ways that were tried to bring answers back brings any back."),
        (
            0.0, 0.02, None,
            "None of the ways that were tried to bring answers back brings any back; of answers that the model never "
            "saw, one of them brings forth 2%.",
        ),
        (
            0.05, 0.12, None,
            "None of the ways that were tried brings back more of the answers than comes of answers that the model "
            "never saw; closest to it is giving the model the beginning of the answer, after its question where there "
            "is one, and letting it go on: 5% of an answer; of answers that the model never saw, the same brings "
            "forth 12%.",
        ),
        (
            0.05, 0.02, 0.1,
            "None of the ways that were tried brings back more of the answers than comes from a model that never saw "
            "them; closest to it is giving the model the beginning of the answer, after its question where there is "
            "one, and letting it go on: 5% of an answer; of answers that the model never saw, the same brings forth 2%"
            "; from a model that never saw the examples, it brings 10%.",
        ),
    ],
)  # fmt: skip
def test_the_worst_attack_where_it_brings_nothing_back(content, strength, holdout, gold, sentence):
    def extracted(strength, holdout=None):
        beside = {} if holdout is None else {"holdout_extraction_strength": holdout}
        return {"extraction": LeakResult({"extraction_strength": strength, **beside}, "", False)}

    leaks = {"after": extracted(strength, holdout)} | ({"gold": extracted(gold)} if gold else {})
    found = replace(content, leaks=leaks)
    assert sentence in part(found, "What remains")
    (told,) = (worst.sentence for stage, worst in found.worst_attacks.items() if stage == "after")
    assert ("writes nothing of an answer by itself" in told) is (strength == 0) and " 0%" not in told
    figures = {"best_rouge_l_recall": 0.1, "whole": 0.0, "holdout_best_rouge_l_recall": 0.5}
    leaks["after"] |= {"sampling": LeakResult(figures, "", False)}  # less by far, but not nothing
    assert (
        not any("brings any back" in line for line in part(replace(content, leaks=leaks), "What remains"))
        or not holdout
    )


def test_of_passages_no_answers_are_told(content):
    texts = {"forget": replace(summary(), passages=20)}
    figures = {"extraction_strength": 0.4, "holdout_extraction_strength": 0.1}
    leaks = {"after": {"extraction": LeakResult(figures, "", True)}}
    *found, original = part(replace(content, stages={"before": texts, "after": texts}, leaks=leaks), "What remains")[:3]
    assert original == ORIGINAL
    assert found == [
        "Traces are found by giving the model the beginning of the passage, and letting it go on.",
        "The most comes back by giving the model the beginning of the passage, and letting it go on: 40% of a passage; "
        "of passages that the model never saw, the same brings forth 10%.",
    ]


def test_it_says_of_no_model_that_it_has_forgotten(content):
    """Of one that still says everything, or hardly said anything before, that would be a claim."""
    (original,) = [line for line in part(content, "What remains") if line.startswith("The original weights")]
    assert "are as they were" in original and "know" not in original


def test_every_leak_test_can_be_told_in_plain_words():
    for test in LEAK_TESTS:
        assert test.in_words[0].islower() and not test.in_words.endswith("."), test.name
        assert not re.search("[A-Z]{2,}|`", test.in_words), test.name


def test_runs_without_an_end_a_retain_set_or_finite_numbers(content):
    assert content.audit is not None
    audit = {**content.audit, "adapter": None, "data": {"forget": content.audit["data"]["forget"]}}
    killed = replace(content, audit=audit, stages={})
    assert "no record says that it was finished" in part(killed, "What was done")[0]
    assert "no examples of that were used" in part(killed, "What was asked")[1]
    assert part(killed, "What was found") == killed.verdict.sentences
    assert part(killed, "What this does not show")[0].startswith("Whether anything was forgotten")
    assert part(replace(content, audit=None), "What was asked")[0].startswith("The language model “Tiny”")
    general = {"source": "builtin", "rows": 64}
    protected = replace(content, audit={**audit, "data": {**audit["data"], "retain": general}})
    assert "so 64 of a bundled set of general questions" in part(protected, "What was asked")[1]
    several = {"source": "/home/me/a.txt,folder/b.txt,owner/name:split", "rows": 1}
    named = replace(content, audit={**audit, "data": {"forget": several}})
    assert "in 1 example (“a.txt, folder/b.txt, owner/name:split”)" in part(named, "What was asked")[0]
    broken = replace(content, stages={stage: {"forget": summary(nll=math.nan)} for stage in ("before", "after")})
    assert part(broken, "What was found") == broken.verdict.sentences
