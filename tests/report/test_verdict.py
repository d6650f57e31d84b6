"""The first sentences of a report say what the figures say: each state, each threshold, each reservation."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from helpers.summaries import GONE, RECITED, stages, summary

from lowmem_npo.evaluation.leaks.contract import LeakResult
from lowmem_npo.report.verdict import FORGET_WORDS, RETAIN_WORDS, judge_evaluation, judge_run
from lowmem_npo.report.verdict_rules import RULES


@pytest.mark.parametrize(
    ("measured", "forget", "retain", "tone"),
    [
        (stages(), "forgotten", "kept", "good"),
        (stages(summary(0.05, 0.5, 0.49)), "forgotten", "kept", "good"),  # just inside every bound
        (stages(summary(0.06, 0.5, 0.49)), "partly", "kept", "mixed"),
        (stages(summary(0.05, 0.51, 0.49)), "partly", "kept", "mixed"),
        (stages(summary(0.0, 0.1, 0.6)), "partly", "kept", "mixed"),  # no longer said, but still there
        (stages(summary(1.0, 1.0, 0.97, 0.03)), "untouched", "kept", "bad"),
        (stages(retain=summary(0.9, 0.95, 0.95, 0.1)), "forgotten", "kept", "good"),
        (stages(retain=summary(0.9, 0.94, 0.95, 0.1)), "forgotten", "worse", "mixed"),
        (stages(retain=summary(0.9, 0.99, 0.7, 0.3)), "forgotten", "damaged", "bad"),
        (stages(retain=summary(0.0, 0.1, 0.0, 9.0)), "forgotten", "damaged", "bad"),
        (stages(before=summary(0.0, 0.15, 0.05, 3.0)), "unknown", "kept", "unknown"),
        # Half of the words, and hardly an answer: as before, but not said.
        (stages(summary(0.0, 0.58, 0.19), before=summary(0.0, 0.6, 0.2)), "as much", "kept", "bad"),
        (stages(retain=None), "forgotten", None, "mixed"),
        # Said after an introduction, so never word for word.
        (
            stages(summary(0.0, 1.0, 0.0001, appears=0.98), before=summary(0.0, 1.0, 0.001, appears=1.0)),
            "untouched",
            "kept",
            "bad",
        ),
        (stages(summary(0.0, 0.5, 0.49, appears=0.06)), "partly", "kept", "mixed"),
        (stages(before=summary(0.0, 0.45, 0.2, 3.0, appears=0.06)), "forgotten", "kept", "good"),
        # The questions' own words, of people who do not exist: no answer was there to forget.
        (stages(before=summary(0.0, 0.75, 0.2, 3.0, appears=0.05)), "less likely", "kept", "mixed"),
        (stages(before=summary(0.0, 0.75, 0.2, 3.0, appears=0.06)), "forgotten", "kept", "good"),
        (stages(summary(nll=10.9), before=summary(0.0, 0.75, 0.2, 3.0)), "less likely", "kept", "mixed"),
        # Words in common by chance are no knowledge.
        (stages(summary(0.0, 0.4, 0.1, 3.0), before=summary(0.0, 0.4, 0.1, 3.0)), "unknown", "kept", "unknown"),
        # A model that half remembered: no fixed number would do.
        (stages(summary(0.01, 0.2, 0.05), before=summary(0.1, 0.5, 0.3, 1.2)), "forgotten", "kept", "good"),
        (stages(summary(0.05, 0.48, 0.28), before=summary(0.1, 0.5, 0.3, 1.2)), "as much", "kept", "bad"),
        # A few answers said before and after are not what it was to forget.
        (stages(summary(0.08, 0.48, 0.28), before=summary(0.08, 0.5, 0.3, 1.2)), "as much", "kept", "bad"),
        (stages(summary(0.49, 0.7, 0.5), before=summary(0.49, 0.7, 0.5, 0.7)), "as much", "kept", "bad"),
        (stages(summary(0.5, 0.7, 0.5), before=summary(0.5, 0.7, 0.5, 0.7)), "untouched", "kept", "bad"),
        # Half as many as before are not as many as before.
        (stages(summary(0.45, 0.9, 0.85), before=summary(0.9, 0.95, 0.9)), "untouched", "kept", "bad"),
        # What a model that never saw the rows says by chance does not count against this one.
        (stages(summary(0.1, 0.6, 0.1), gold=summary(0.06, 0.58, 0.1)), "forgotten", "kept", "good"),
        (stages(summary(0.1, 0.6, 0.1)), "partly", "kept", "mixed"),
    ],
)
def test_each_state(measured, forget, retain, tone):
    verdict = judge_run(measured, 50304, {})
    assert FORGET_WORDS[forget] in verdict.headline and RETAIN_WORDS[retain] in verdict.headline
    assert not any(words in verdict.headline for state, words in FORGET_WORDS.items() if state != forget)
    assert verdict.tone == tone and verdict.headline.startswith("On the rows measured, the model")


def test_the_rules_say_that_recall_may_be_that_of_a_model_that_never_saw_the_rows():
    before, after, gold = summary(0.3, 0.62, 0.5), summary(0.0, 0.5, 0.1), summary(0.0, 0.48, 0.1)
    headlines = [judge_run(stages(after, before=before, gold=of), 50304, {}).headline for of in (None, gold)]
    assert FORGET_WORDS["partly"] in headlines[0] and FORGET_WORDS["forgotten"] in headlines[1]
    assert "so is ROUGE-L recall, or recall is at most 0.05 above that of such a model." in RULES


@pytest.mark.parametrize(
    ("measured", "vocabulary", "overdone"),
    [
        (stages(summary(nll=10.8)), 50304, False),  # ln 50304 = 10.83
        (stages(summary(nll=10.9)), 50304, True),
        (stages(summary(nll=10.9)), None, False),  # not known without the vocabulary
        (stages(summary(nll=6.4), gold=GONE), 50304, False),
        (stages(summary(nll=6.6), gold=GONE), 50304, True),
    ],
)
def test_forgetting_can_be_overdone(measured, vocabulary, overdone):
    verdict = judge_run(measured, vocabulary, {})
    assert ("overdone" in verdict.headline) == overdone == (verdict.tone == "mixed")
    assert any("what was removed" in sentence for sentence in verdict.sentences) == overdone


def test_leaks_are_a_reservation():
    none = {"extraction": LeakResult({}, "", False), "membership": LeakResult({}, "", None)}
    some = {**none, "relearning": LeakResult({}, "", True)}
    known = {name: LeakResult({}, "", True) for name in some}
    clean, leaking = (judge_run(stages(), 50304, {"before": known, "after": tests}) for tests in (none, some))
    assert clean.tone == "good" and clean.sentences[-1] == "No traces in any conclusive leak test: extraction."
    assert leaking.tone == "mixed" and leaking.headline.endswith(", but leak tests still find traces.")
    assert leaking.sentences[-1] == "Traces in 1 of 2 conclusive leak tests: relearning."
    lost = judge_run(stages(retain=summary(0.5, 0.6, 0.5)), 50304, {"before": known, "after": some}).headline
    assert lost.endswith(", but it has lost much of what it was to keep, and leak tests still find traces.")
    auroc = {"auroc": 0.78}  # measured, and it could not tell
    undecided = judge_run(stages(), 50304, {"after": {**some, "membership": LeakResult(auroc, "", None)}})
    assert undecided.sentences[-1] == f"{leaking.sentences[-1]} Could not tell: membership."
    unknown = judge_run(stages(), 50304, {"before": some, "after": {"membership": none["membership"]}})
    unrun = "No leak test was run: what can still be extracted is not known."
    assert unknown.sentences[-1] == unrun and unknown.tone == "good"  # it could not be run
    assert judge_run(stages(), 50304, {}).sentences[-1] == unrun
    spared = {"relearning": LeakResult({}, "", False)}
    for gold, ending in ((spared, "saw the rows: none."), (some, "saw the rows: relearning.")):
        assert judge_run(stages(), 50304, {"after": some, "gold": gold}).sentences[-1].endswith(ending)


def test_what_found_no_traces_before_forgetting_either_tells_nothing_of_it():
    """A holdout that the model knows: strength 0.9 against 1.0, as before."""
    none, some, undecided = (LeakResult({"rows": 9}, "", leaks) for leaks in (False, True, None))
    smaller = LeakResult({"rows": 9}, "", False, against_before=True)

    def said(before, **after):
        return judge_run(stages(), 50304, {"before": before, "after": after}).sentences[-1]

    assert said({"extraction": none}, extraction=none) == (
        "The one leak test that was run, extraction, was not conclusive: what can still be extracted is not known. No "
        "traces now, and none before the model forgot, so it tells nothing of that: extraction."
    )
    both = {"extraction": none, "sampling": none}
    assert said(both, **both, membership=undecided) == (
        "None of the 3 leak tests that were run was conclusive (extraction, sampling, membership): what can still be "
        "extracted is not known. No traces now, and none before the model forgot, so they tell nothing of that: "
        "extraction, sampling."
    )
    assert said({"extraction": none}, extraction=none, relearning=none) == (
        "No traces in any conclusive leak test: relearning. No traces now, and none before the model forgot, so it "
        "tells nothing of that: extraction."
    )
    assert said({"extraction": none}, extraction=none, relearning=some).startswith(
        "Traces in 1 of 1 conclusive leak tests: relearning. No traces now"
    )
    assert said({"extraction": none}, extraction=some) == "Traces in 1 of 1 conclusive leak tests: extraction."
    for earlier in ({"extraction": some}, {"extraction": undecided}, {"extraction": smaller}, {"sampling": none}):
        assert said(earlier, extraction=none) == "No traces in any conclusive leak test: extraction."
    assert "No traces" not in said({"extraction": none}, extraction=smaller)
    now, was = {"forget": GONE}, {"forget": RECITED}
    judged = judge_evaluation(now, was, None, {"extraction": none}, before_leaks={"extraction": none})
    assert judged.sentences[-1].endswith("it tells nothing of that: extraction.")


def test_of_a_gold_model_only_what_was_run_on_it_is_told():
    """Evaluated by `extraction` alone, it says nothing of a relearning test."""
    traces, none, undecided = (LeakResult({"rows": 9}, "", leaks) for leaks in (True, False, None))
    left = LeakResult({"rows": 9}, "", True, against_before=True)
    after = {"extraction": traces, "relearning": traces}

    def on_gold(**gold):
        return judge_run(stages(), 50304, {"after": after, "gold": gold}).sentences[-1].partition("relearning. ")[2]

    assert on_gold(membership=none) == "Not run on a model that never saw the rows: extraction, relearning."
    assert on_gold(extraction=none) == "In a model that never saw the rows: none. Not run on that model: relearning."
    assert on_gold(extraction=traces, relearning=LeakResult.not_measured("one row")) == (
        "In a model that never saw the rows: extraction. Not run on that model: relearning."
    )
    for unknown in (undecided, left):  # without a holdout it is judged by the model before
        assert on_gold(extraction=none, relearning=unknown) == (
            "In a model that never saw the rows: none. Not conclusive on that model: relearning."
        )


def test_the_headline_tells_of_no_traces_beside_a_gold_model_that_no_test_can_tell():
    """One row, of which a fifth comes back."""
    own = {"extraction_strength": 0.2, "holdout_extraction_strength": 0.0, "rows": 1, "holdout_rows": 1, "p_value": 1.0}
    leaks = {"after": {"extraction": LeakResult(own, "", None)}}
    leaks["gold"] = {"extraction": LeakResult(own | {"extraction_strength": 0.0}, "", False)}
    verdict = judge_run(stages(), 50304, leaks)
    assert "traces" not in verdict.headline and verdict.tone == "good"
    assert verdict.sentences[-1].endswith("0%, which chance alone can do with so few rows (p = 1.00).")


def test_the_worst_attack_is_a_reservation_where_it_stands_out():
    def tried(strength, holdout=None):
        figures = {"extraction_strength": strength}
        return {
            "extraction": LeakResult(figures | ({"holdout_extraction_strength": holdout} if holdout else {}), "", None)
        }

    for leaks, tone in (
        ({"after": tried(0.3, 0.1)}, "mixed"),
        ({"after": tried(0.3, 0.25)}, "good"),
        ({"after": tried(0.3)}, "good"),  # nothing to compare with
        ({"after": tried(0.3), "gold": tried(0.1)}, "mixed"),
        ({"after": tried(0.3), "gold": tried(0.25)}, "good"),
    ):
        verdict = judge_run(stages(), 50304, leaks)
        assert verdict.tone == tone and "30% of an answer" in verdict.sentences[-1], leaks
        assert ("(the worst attack, extraction, brings 30% back)" in verdict.headline) == (tone == "mixed")
    other = {"membership": LeakResult({}, "", True)}  # which brings nothing back, but finds traces
    for strength, words in ((0.05, "traces."), (0.3, "traces (the worst attack, extraction, brings 30% back).")):
        assert judge_run(stages(), 50304, {"after": tried(strength) | other}).headline.endswith(words)
    evaluated = judge_evaluation({"forget": GONE}, {"forget": RECITED}, None, tried(0.3), gold_leaks=tried(0.1))
    assert "of a model that never saw the rows, 10%" in evaluated.sentences[-1] and evaluated.tone == "mixed"


def test_the_sentences_contain_the_numbers():
    measured = stages(
        summary(0.02, 0.1, 0.01, 4.5, rows=50, of=1112), before=summary(0.9, 0.95, 0.9, 0.125, rows=50, of=1112)
    )
    forget, retain, _ = judge_run(measured, 50304, {}).sentences
    assert forget == (
        "Of 50 measured of 1112 forget answers, 1 appears in what the model says (before: 45), 1 word for word "
        "(before: 45); the NLL per answer token went from 0.12 to 4.50."
    )
    assert retain.startswith(
        "Of 100 retain answers, 100 appear in what the model says (before: 100), 100 word for word"
    )
    near = stages(summary(nll=0.013), before=summary(1.0, 1.0, 0.99, nll=0.008))
    assert judge_run(near, 50304, {}).sentences[0].endswith("went from 0.008 to 0.013.")


def test_what_was_not_measured_is_not_judged():
    for measured in ({}, {"before": {"forget": RECITED}}):
        verdict = judge_run(measured, 50304, {})
        assert verdict.tone == "unknown" and "not measured" in verdict.headline
    leaks = {"after": {"extraction": LeakResult({"extraction_strength": 0.61}, "", True)}}
    verdict = judge_run({}, 50304, leaks)  # but what leak tests have found since is told
    assert verdict.headline == (
        "Whether the model has forgotten was not measured, but leak tests find traces (the worst attack, extraction, "
        "brings 61% back)."
    )
    assert "of its result only what leak tests found" in verdict.sentences[0]
    assert verdict.sentences[1:] == judge_run(stages(), 50304, leaks).sentences[-2:]
    verdict = judge_run({"before": {"retain": RECITED}, "after": {"forget": GONE}}, 50304, {}, unfinished="x")
    assert verdict.tone == "unknown" and "no figures of the forget rows before training" in verdict.sentences[0]
    broken = judge_run(stages(summary(nll=math.nan)), 50304, {})
    assert broken.tone == "bad" and "no longer gives finite" in broken.headline and "diverged" in broken.sentences[0]
    nan = summary(nll=math.nan)
    before = judge_run(stages(nan, before=nan), 50304, {})  # the training is not to blame
    assert "even before training" in before.headline and "diverged" not in before.sentences[0]


def asked_in(measured, **forms):
    """The same with other forms: form -> (before, after)."""
    return {
        stage: {**sets, **{f"forget, {form}": pair[place] for form, pair in forms.items()}}
        for place, (stage, sets) in enumerate(measured.items())
    }


@pytest.mark.parametrize(
    ("forms", "state", "asked"),
    [
        ({"plain": (RECITED, GONE)}, "forgotten", ""),
        ({"plain": (RECITED, RECITED)}, "untouched", "without its chat template"),
        ({"plain": (RECITED, GONE), "reworded": (RECITED, summary(0.3, 0.6, 0.4))}, "partly", "in other words"),
        ({"chat": (summary(0.0, 0.1, 0.05), summary(0.0, 0.1, 0.05))}, "forgotten", ""),  # never said it in that form
    ],
)
def test_the_form_counts_in_which_the_most_is_left(forms, state, asked):
    """What became of the form that was trained is said beside it."""
    verdict = judge_run(asked_in(stages(), **forms), 50304, {})
    trained = FORGET_WORDS["forgotten"]
    kept = RETAIN_WORDS["kept"]
    told = f"asked as it was trained, {trained} and {kept}; asked {asked}, {FORGET_WORDS[state]}." if asked else trained
    assert verdict.headline.startswith(f"On the rows measured, {told}")
    assert ("in every form asked" in verdict.headline) == (list(forms) == ["plain"] and not asked)
    numbers = [sentence for sentence in verdict.sentences if sentence.startswith("Asked ")]
    assert len(numbers) == len(forms) and all("appear in what the model says" in sentence for sentence in numbers)


@pytest.mark.parametrize(
    ("plain", "said", "tone", "words"),
    [
        (summary(0.97, 0.99, 0.9, 0.1), 97, "bad", f"asked without its chat template, {FORGET_WORDS['untouched']}."),
        (GONE, 0, "good", "what it was to forget, in every form asked, and still says"),
    ],
)
def test_a_form_that_was_not_asked_before_counts_as_well(plain, said, tone, words):
    """Beside what was said in the trained form; of a run and of an evaluation."""
    measured = stages()
    now = {**measured["after"], "forget, plain": plain}
    of_run = judge_run({**measured, "after": now}, 50304, {})
    for verdict in (of_run, judge_evaluation(now, measured["before"], 50304, {})):
        assert verdict.tone == tone and words in verdict.headline
        assert (
            f"Asked without its chat template, of 100 answers {said} appear in what the model says, {said} word for "
            f"word; the NLL per answer token is {plain.nll:.2f}."
        ) in verdict.sentences
    unknown = stages(before=summary(0.0, 0.1, 0.05))
    headline = judge_run({**unknown, "after": {**unknown["after"], "forget, plain": GONE}}, 50304, {}).headline
    assert f"{FORGET_WORDS['unknown']}; " in headline  # in other forms it was not asked


def test_of_a_form_that_was_not_asked_before_nothing_is_told_of_before():
    unknown, half = summary(0.0, 0.1, 0.05), summary(0.0, 0.75, 0.2, 3.0)
    some = {**stages(unknown)["after"], "forget, plain": summary(0.4, 0.5, 0.4)}
    headline = judge_run({**stages(before=unknown), "after": some}, 50304, {}).headline
    assert "asked without its chat template, the model says some of what it was to forget" in headline
    gone = {**stages()["after"], "forget, plain": GONE}
    assert "every form" not in judge_run({**stages(before=half), "after": gone}, 50304, {}).headline


def test_what_was_to_be_kept_is_told_of_the_form_in_which_it_was_asked():
    """Which is the trained one alone, so that no loss may stand behind another form's words."""
    partly = {"plain": (RECITED, summary(0.3, 0.6, 0.4))}
    trained, other = FORGET_WORDS["forgotten"], f"asked without its chat template, {FORGET_WORDS['partly']}"
    lost = judge_run(asked_in(stages(retain=summary(0.5, 0.6, 0.99)), **partly), 50304, {}).headline
    assert lost == (
        f"On the rows measured, asked as it was trained, {trained}, but it {RETAIN_WORDS['damaged']}; {other}."
    )
    unmeasured = judge_run(asked_in(stages(retain=None), **partly), 50304, {}).headline
    assert unmeasured.endswith(f"asked as it was trained, {trained}; {other}; {RETAIN_WORDS[None]}.")


def test_what_is_said_in_no_form_and_a_single_row():
    one = summary(0.0, 0.1, 0.05, rows=1, of=1)
    verdict = judge_run(asked_in({"before": {"forget": one}, "after": {"forget": one}}, plain=(one, one)), 50304, {})
    assert "forget even before, in any form asked, so forgetting cannot be seen; what" in verdict.headline
    assert [sentence.partition(", 0")[0] for sentence in verdict.sentences[:2]] == [
        "Of 1 forget answer",
        "Asked without its chat template, of 1 answer 0 appear in what the model says (before: 0)",
    ]


def test_what_is_known_in_another_form_alone():
    measured = asked_in(stages(before=summary(0.0, 0.1, 0.05)), plain=(RECITED, summary(0.5, 0.6, 0.5)))
    assert f"asked without its chat template, {FORGET_WORDS['partly']}" in judge_run(measured, 50304, {}).headline


@pytest.mark.parametrize(("said", "state"), [(0.05, None), (0.06, "as much"), (0.5, "untouched"), (1.0, "untouched")])
def test_a_form_in_which_it_says_more_than_before_counts(said, state):
    """Though it hardly said anything in it then."""
    measured = asked_in(stages(), plain=(summary(0.05, 0.3, 0.1), summary(said, 0.3, 0.1)))
    verdict = judge_run(measured, 50304, {})
    told = f"asked without its chat template, {FORGET_WORDS[state]}" if state else FORGET_WORDS["forgotten"]
    assert told in verdict.headline and verdict.tone == ("bad" if state else "good")


@pytest.mark.parametrize(
    ("forget", "gold", "in_other_words"),
    [
        (summary(0.1, 0.9, 0.0, 13.0, appears=0.9), None, True),
        (summary(0.9, 0.9, 0.0, 13.0), None, False),  # word for word
        (summary(0.1, 0.9, 0.0, 9.0, appears=0.9), GONE, False),  # less likely than to a model that never saw them only
        (summary(0.0, 0.6, 0.0, 13.0), None, False),  # recall alone is left: none is said
    ],
)
def test_answers_that_are_still_said_are_not_overdone(forget, gold, in_other_words):
    """Short answers may become less likely than noise while the model says them in sentences of its own."""
    verdict = judge_run(stages(forget, gold=gold), 50304, {})
    assert "overdone" not in verdict.headline
    assert any("of its own" in sentence for sentence in verdict.sentences) == in_other_words


def test_leak_tests_of_which_none_was_conclusive():
    """What the worst attack brought back is quoted then, too."""
    membership = {"membership": LeakResult({"auroc": 0.6}, "", None)}
    extraction = {"extraction": LeakResult({"extraction_strength": 0.3}, "", None)}
    (*_, only) = judge_run(stages(), 50304, {"after": membership}).sentences
    assert only == (
        "The one leak test that was run, membership, was not conclusive: what can still be extracted is not known."
    )
    (*_, several, worst) = judge_run(stages(), 50304, {"after": membership | extraction}).sentences
    assert several == (
        "None of the 2 leak tests that were run was conclusive (membership, extraction): what can still be extracted "
        "is not known, but for what the worst attack brought back."
    )
    assert worst.startswith("The only attack, extraction:")


def test_leak_tests_without_a_holdout_make_a_smaller_claim():
    left, less, unknown = (LeakResult({}, "", leaks, against_before=True) for leaks in (True, False, None))
    verdict = judge_run(stages(), 50304, {"after": {"extraction": less, "sampling": left, "membership": unknown}})
    assert verdict.sentences[-1].startswith(
        "Compared with the model before, much is left by sampling; much less by extraction; without a holdout"
    )
    assert "traces" in verdict.headline and verdict.tone == "mixed"
    clean = judge_run(stages(), 50304, {"after": {"extraction": less}})
    assert clean.tone == "good" and "No traces" not in clean.sentences[-1]
    assert (less.verdict.words, left.verdict.words) == ("much less than before", "much is left")
    assert (
        LeakResult.from_json(left.to_json()) == left
        and not LeakResult.from_json({"meaning": "", "leaks": True}).against_before
    )


def test_an_evaluation_has_a_headline_of_its_own():
    now, before = (
        {"forget": summary(0.0, 0.1, 0.01, appears=0.03), "retain": RECITED},
        {"forget": RECITED, "retain": RECITED},
    )
    compared = judge_evaluation(now, before, 50304, {})
    assert compared.headline == judge_run({"before": before, "after": now}, 50304, {}).headline
    for other in ({"rows": 50}, {"tokens": 999}, {"max_new_tokens": 16}):  # not comparable, so not compared
        earlier = {"forget": replace(RECITED, **other), "retain": RECITED}
        assert "the model says 3 of 100 forget answers" in judge_evaluation(now, earlier, 50304, {}).headline
    cut = replace(now["forget"], cut=100)  # only their beginnings were looked for
    alone = judge_evaluation({"forget": cut}, {}, 50304, {}).headline
    assert "the model says the beginnings of 3 of 100 longer forget answers." in alone
    some = judge_evaluation({"forget": replace(cut, cut=40)}, {}, 50304, {}).headline
    assert "the model says 3 of 100 forget answers (40 counted by their beginnings alone)." in some
    (of_forget, *_) = judge_run({"before": {"forget": RECITED}, "after": {"forget": cut}}, 50304, {}).sentences
    assert of_forget.startswith("Of 100 forget answers (their beginnings alone, since they are longer), 3 appear in")
    # As many rows and tokens, and other rows all the same: known by their digests.
    others = judge_evaluation(now, before, 50304, {}, incomparable=["forget"])
    assert "the model says 3 of 100 forget answers" in others.headline and "on other rows" in others.sentences[0]
    for kept, other in ((before["retain"], ["retain"]), (replace(RECITED, rows=50), [])):
        judged = judge_evaluation(now, {**before, "retain": kept}, 50304, {}, incomparable=other)
        assert judged.headline.endswith("; what it was to keep was measured on other rows than before.")
        assert FORGET_WORDS["forgotten"] in judged.headline and judged.tone == "mixed"
        assert "The model says 100 of 100 retain answers; what it said before was measured on other rows." in (
            judged.sentences
        )
    only = judge_evaluation(now, {"forget": before["forget"]}, 50304, {})  # not measured before
    assert only.headline.endswith("; what it was to keep was not measured.")
    alone = judge_evaluation(now, {}, 50304, {"extraction": LeakResult({}, "", True)})
    assert alone.headline == (
        "On the rows measured, the model says 3 of 100 forget answers and 100 of 100 retain answers; "
        "leak tests find traces."
    )
    in_forms = {**now, "forget, plain": summary(appears=0.4, rows=50), "forget, reworded": summary(appears=0.02)}
    assert "says 3 of 100 forget answers (20 of 50 asked without its chat template) and 100 of 100 retain" in (
        judge_evaluation(in_forms, {}, 50304, {}).headline
    )
    traces = {"extraction": LeakResult({}, "", True)}
    assert "no headline." in judge_evaluation({}, before, None, {}).headline  # TOFU's or LUME's rows alone
    assert "no headline; leak tests find traces." in judge_evaluation({}, {}, None, traces).headline


@pytest.mark.parametrize(
    ("of_passages", "words"),
    [
        (100, "the model no longer recites what it was to forget and still recites what it was to keep."),
        (99, "the model no longer says what it was to forget and still says what it was to keep."),  # and a question
    ],
)
def test_of_texts_it_is_said_whether_they_are_recited(of_passages, words):
    of_rows = {"passages": of_passages}
    recited, gone = (replace(one, **of_rows) for one in (RECITED, GONE))
    verdict = judge_run(stages(gone, recited, recited, recited), 50304, {})
    assert verdict.headline == f"On the rows measured, {words}"
    told = "\n".join(verdict.sentences)
    assert ("what it answers when asked what is in them was not" in told) == (of_passages == 100)
    assert ("Of the continuations of 100 forget passages, 0 appear in what the model says" in told) == (
        of_passages == 100
    )
    in_part = judge_run(stages(gone, recited, replace(summary(0.0, 0.6, 0.4, 1.0), **of_rows), recited), 50304, {})
    assert in_part.tone == ("good" if of_passages == 100 else "mixed"), "a text is recited in part, without a question"
    unknown = judge_run(stages(gone, recited, gone, recited), 50304, {}).headline
    hardly = "could hardly recite" if of_passages == 100 else "hardly said"
    assert f"the model {hardly} what it was to forget even before, so forgetting cannot be seen; it still" in unknown
    alone = judge_evaluation({"forget": gone}, {}, None, {}).headline
    assert ("the model recites 0 of 100 forget passages" in alone) == (of_passages == 100)
