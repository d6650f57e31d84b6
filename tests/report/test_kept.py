"""What became of the rows to keep: the states, what decides, and chance between rows."""

from __future__ import annotations

import pytest
from helpers.summaries import GONE, MEASURED, RECITED, stages, summary

from lowmem_npo.report.verdict import GENERAL_WORDS, RETAIN_WORDS, judge_evaluation, judge_run


@pytest.mark.parametrize(
    ("after", "decided"),
    [
        (summary(0.9, 0.9, 0.99), "recall, which fell from 1.00 to 0.90"),
        (summary(0.9, 0.99, 0.7), "probability, which fell from 0.99 to 0.70"),
        (summary(0.9, 0.7, 0.6), "probability, which fell from 0.99 to 0.60"),  # of two, the one of which less is left
        (summary(0.9, 0.96, 0.96), ""),
    ],
)
def test_the_measure_that_decided_on_what_was_lost_is_named(after, decided):
    for judged in (
        judge_run(stages(retain=after), 50304, {}),
        judge_evaluation({"retain": after}, {"retain": RECITED}, None, {}),
    ):
        told = [sentence.partition(" What decided is ")[2] for sentence in judged.sentences]
        assert [one for one in told if one] == ([f"{decided}."] if decided else [])


def test_a_fall_on_rows_to_keep_that_their_scatter_explains_is_not_told_as_a_loss():
    """Of what may be much, it is said that it may be; of all rows there are, nothing is left to chance."""

    def told(now, error, of=1000):
        measured = stages(
            retain=summary(0.4, now, 0.25, 1.9, of=of), before_retain=summary(0.3, 0.472, 0.2, 2.1, of=of)
        )
        verdict = judge_run(measured, 50304, {}, {"retain": {"rouge_l_recall": error}} if error else {})
        assert any(f"recall, which fell from 0.47 to {now:.2f}." in sentence for sentence in verdict.sentences)
        state = next(state for state, words in RETAIN_WORDS.items() if verdict.headline.endswith(f"{words}."))
        return state, verdict.tone

    assert told(0.333, 0.069) == told(0.333, None) == told(0.333, 0.07, of=100) == ("damaged", "bad")
    assert told(0.333, 0.07) == ("doubtful", "mixed")  # twice it: 0.140
    assert told(0.373, 0.05) == ("unsure", "good") and told(0.373, 0.049) == ("worse", "mixed")


def test_answers_to_keep_that_no_longer_appear_are_lost():
    """Though a word of each may be all that changed: a name, a year."""
    one_word = summary(0.0, 0.965, 0.955, 0.05)
    verdict = judge_run(stages(retain=one_word), 50304, {})
    assert verdict.headline.endswith(f"but it {RETAIN_WORDS['worse']}.") and verdict.tone == "mixed"
    assert any("the share of answers that appear, which fell from 1.00 to 0.00." in said for said in verdict.sentences)
    for kept in (
        stages(retain=summary(0.75, 0.965, 0.955)),
        stages(retain=one_word, before_retain=summary(0.49, 1, 1)),
    ):
        assert judge_run(kept, 50304, {}).headline.endswith(f"and {RETAIN_WORDS['kept']}.")


def test_rows_to_keep_alone_make_a_headline():
    """As `evaluate --retain` without --forget measures them: they are no benchmark's own figures."""
    now, worse = {"retain": RECITED}, {"retain": GONE}
    alone = judge_evaluation(now, {}, None, {})
    assert alone.headline == "On the rows measured, the model says 100 of 100 retain answers."
    assert "not known" in alone.sentences[0]
    assert "other rows" in judge_evaluation(now, {}, None, {}, incomparable=["retain"]).sentences[0]
    assert judge_evaluation(now, now, None, {}).headline.endswith("the model still says what it was to keep.")
    damaged = judge_evaluation(worse, now, None, {})
    assert damaged.headline.endswith("the model has lost much of what it was to keep.")
    assert damaged.sentences[0].endswith("What decided is probability, which fell from 0.99 to 0.01.")
    assert damaged.sentences[0].startswith("Of 100 retain answers, 0 appear in what the model says (before: 100)")


@pytest.mark.parametrize(
    ("after", "state", "tone"),
    [
        (summary(0.0, 0.35, 0.2), "kept", "good"),  # the wording of a general answer is free
        (summary(0.0, 0.4, 0.185), "worse", "mixed"),
        (summary(0.0, 0.33, 0.2), "worse", "mixed"),
        (summary(0.0, 0.2, 0.2), "damaged", "bad"),
        (summary(0.0, 0.4, 0.1), "damaged", "bad"),
    ],
)
def test_without_rows_to_keep_utility_is_that_of_general_questions(after, state, tone):
    measured = stages(retain=None)
    measured["before"]["general"], measured["after"]["general"] = summary(0.0, 0.4, 0.2), after
    exact = {"general": dict.fromkeys(MEASURED, 0.0)}
    verdict = judge_run(measured, 50304, {}, exact)
    assert GENERAL_WORDS[state] + "." in verdict.headline and verdict.tone == tone
    single = judge_run(measured, 50304, {}).headline  # how far its answers scatter is not known
    unsure = {"kept": "kept", "worse": "unsure", "damaged": "doubtful"}[state]
    assert GENERAL_WORDS[unsure] + "." in single
    assert any("No rows to keep were named" in sentence for sentence in verdict.sentences)
    # A fall that the sampling of the rows explains is not said; neither is it taken for none.
    falls = {measure: getattr(measured["before"]["general"], measure) - getattr(after, measure) for measure in MEASURED}
    for errors, words in ((0.49, state), (0.51, unsure)):  # of each fall
        told = judge_run(measured, 50304, {}, {"general": {name: errors * fall for name, fall in falls.items()}})
        tones = {"unsure": "good", "doubtful": "mixed"}
        assert GENERAL_WORDS[words] + "." in told.headline and told.tone == tones.get(words, tone)
    # With general rows to keep, trained on, the worse of the two counts, and it is said which that is.
    both = stages(retain=summary(0.0, 0.1, 0.0))
    both["before"]["general"], both["after"]["general"] = summary(0.0, 0.4, 0.2), after
    words = GENERAL_WORDS[state] if state == "damaged" else RETAIN_WORDS["damaged"]
    assert words + "." in judge_run(both, 50304, {}, exact).headline


def test_what_was_hardly_said_before_cannot_still_be_said():
    """Of the rows to keep, too, the verb says what was measured, and tiny figures decide nothing: what counts is a
    likelihood that is visibly less, by the NLL or by the probability."""
    before = summary(0.0, 0.2, 0.1, 3.0)
    for after, words, tone in (
        (before, "no less likely now", "mixed"),
        (summary(0.0, 0.05, 0.09, 3.1), "no less likely now", "mixed"),
        (summary(0.0, 0.2, 0.051, 3.28), "no less likely now", "mixed"),
        (summary(0.0, 0.2, 0.1, 3.3), "less likely now", "mixed"),
        (summary(0.0, 0.2, 0.1, 3.7), "much less likely now", "bad"),
        (summary(0.0, 0.2, 0.04, 3.0), "much less likely now", "bad"),
    ):
        verdict = judge_run(stages(retain=after, before_retain=before), 50304, {})
        assert verdict.headline.endswith(f" it was to keep even before, which is {words}."), verdict.headline
        conjunction = " and hardly said" if words == "no less likely now" else ", but it hardly said"
        assert conjunction in verdict.headline and verdict.tone == tone
        assert any("What decided is" in told for told in verdict.sentences) is (words != "no less likely now")
        alone = judge_evaluation({"retain": after}, {"retain": before}, None, {})
        assert f"the model hardly said what it was to keep even before, which is {words}." in alone.headline
    untaught, unseen = summary(0.0, 0.14, 0.012, 4.6, of=8), summary(0.0, 0.14, 0.011, 4.65, of=8)
    assert "no less likely now." in judge_run(stages(retain=unseen, before_retain=untaught), 50304, {}).headline


def test_a_fall_of_what_was_hardly_said_that_chance_explains_does_not_decide():
    before, after = (summary(0.0, 0.2, 0.1, nll, of=1000) for nll in (3.0, 3.4))
    for error, words in ((0.1, "which is less likely now."), (0.3, "no less likely now, as far as the rows can tell.")):
        verdict = judge_run(stages(retain=after, before_retain=before), 50304, {}, {"retain": {"nll": error}})
        told = "Chance may explain" if error == 0.3 else "What decided is"
        assert verdict.headline.endswith(words) and verdict.tone == "mixed"
        assert any(f" {told} the NLL per answer token, which rose from 3.00 to 3.40." in it for it in verdict.sentences)
    many = judge_run(
        stages(retain=summary(1.0, 0.94, 0.99, 0.01, of=1000)), 50304, {}, {"retain": {"rouge_l_recall": 0.1}}
    )
    assert any(" Chance may explain recall, which fell from 1.00 to 0.94." in told for told in many.sentences)
