"""The worst attack: which of all it is, what stands beside it, and every place that it is told in."""

from __future__ import annotations

import json
import random
from statistics import fmean

import pytest

from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.chance import p_more
from lowmem_npo.evaluation.leaks.contract import LeakResult
from lowmem_npo.evaluation.leaks.measure import read_leaks, write_leaks
from lowmem_npo.evaluation.leaks.worst import attacks_of, not_beside_gold, retained_leaks, worst_attack, worst_attacks
from lowmem_npo.evaluation.result import Evaluation


def written(strength, holdout=None):
    return {"extraction_strength": strength} | ({} if holdout is None else {"holdout_extraction_strength": holdout})


def said(recall, whole, holdout=None):
    own = {"best_rouge_l_recall": recall, "whole": whole}
    return own if holdout is None else {**own, "holdout_best_rouge_l_recall": holdout}


def results(**figures):
    return {name: LeakResult(of_test, "", None) for name, of_test in figures.items()}


RELEARNING = {"20 steps, 20% shown, lr 0.001": written(0.3, 0.1), "100 steps, 20% shown, lr 0.001": written(0.5, 0.4)}
RESULTS = results(
    extraction=written(0.05, 0.02),
    sampling=said(0.6, 0.1, 0.45),
    membership={"loss_auc": 1.0},
    relearning={"before": written(0.9), "original": written(1.0), **written(0.3, 0.1), **RELEARNING},
    quantization={"as_evaluated": written(0.9), "merged": written(0.2, 0.02), "merged_4bit": written(0.21, 0.02)},
)


def test_what_is_furthest_above_the_holdout():
    worst = worst_attack(RESULTS)
    assert (worst.test, worst.attack) == ("relearning", "20 steps, 20% shown, lr 0.001")
    assert (worst.value, worst.holdout, worst.gold, worst.attacks) == (0.3, 0.1, None, 6)
    assert worst.stands_out is True and worst.figure == "extraction strength"
    assert worst.sentence == (
        "The worst of 6 attacks, relearning: 20 steps, 20% shown, lr 0.001: the model then writes the last 30% of an "
        "answer by itself; of answers that the model never saw, 10%."
    )
    # By the value alone it would have been another, and by the order of the tests, too.
    assert max(attacks_of(RESULTS), key=lambda key: attacks_of(RESULTS)[key].value) == ("sampling", "")


def test_the_level_decides_and_gold_is_one():
    """Without a holdout: 45% where gold gives 10% is worse than 50% where it gives 48%, and a form in which the model
    is stored has gold's level of the same attack."""
    first, second = "20 steps, 20% shown, lr 0.001", "100 steps, 20% shown, lr 0.001"
    gold = results(relearning={first: written(0.48), second: written(0.1)}, extraction=written(0.02))
    now = results(relearning={first: written(0.5), second: written(0.45)})
    assert (worst_attack(now, gold).attack, worst_attack(now, gold).stands_out) == (second, True)
    now |= results(quantization={"merged": {**written(0.2), f"relearning: {second}": written(0.46)}})
    worst = worst_attack(now, gold)
    assert (worst.attack, worst.gold) == (f"merged in bf16, relearning: {second}", 0.1) and worst.stands_out
    assert worst.short_name == "relearning, merged in bf16", "nothing was rounded"
    rounded = worst_attack(results(quantization={"merged_4bit": written(0.9)}))
    assert rounded.short_name == "extraction, merged and rounded to 4 bits"
    unknown = now | results(sampling=said(0.9, 0.4))
    assert worst_attack(unknown, gold).attack == worst.attack, "a model that never saw the rows may say as much"
    unknown = now | results(sampling=said(0.9, 0.9))
    assert worst_attack(unknown, gold).test == worst_attack(unknown).test == "sampling", "no model guesses that"


def test_what_has_nothing_beside_it_is_not_passed_over():
    """A paraphrase of which the holdout has no like; an attack that was not made on the gold model."""
    reworded = results(extraction=written(0.09, 0.03), rewording={"reworded": said(0.95, 0.92)})
    worst = worst_attack(reworded)
    assert (worst.test, worst.attack, worst.value) == ("rewording", "reworded", 0.92) and worst.stands_out is True
    assert worst.sentence.endswith("92% of the answers then come whole; what the model gives for rows that it never "
                                   "saw is not known.")  # fmt: skip
    attacked = results(extraction=written(0.04), relearning={"20 steps, 20% shown, lr 0.001": written(0.09)})
    worst = worst_attack(attacked, results(extraction=written(0.03)))
    assert worst.test == "relearning" and worst.stands_out is None
    attacked["extraction"] = LeakResult(written(0.2), "", None)  # known to stand out, which the other is not
    assert worst_attack(attacked, results(extraction=written(0.03))).test == "extraction"


def test_what_brought_nothing_back_is_not_the_worst():
    """Though it has no level that it could be below."""
    attacked = results(extraction=written(0.1, 0.12), rewording={"reworded": said(0.2, 0.0)})
    assert worst_attack(attacked).test == "extraction"
    assert worst_attack(results(rewording={"reworded": said(0.2, 0.0)})).value == 0


def test_it_stands_out_where_its_test_says_so():
    """What chance explains comes after what it does not, however far above; so it does beside a gold model."""
    few = results(extraction={**written(0.2, 0.02), "p_value": 0.01}, sampling={**said(0.6, 0.1, 0.3), "p_value": 0.2})
    assert (worst_attack(few).test, worst_attack(few).stands_out, worst_attack(few).p) == ("extraction", True, 0.01)
    chance = worst_attack({"sampling": few["sampling"]})
    assert chance.stands_out is None and chance.p == 0.2
    assert chance.sentence.endswith("never saw, 30%, which chance alone can do with so few rows (p = 0.20).")
    little = worst_attack(results(extraction={**written(0.05, 0.0), "p_value": 0.3, "least_p_value": 0.2}))
    assert little.stands_out is None and little.by_chance and little.least_p == 0.2
    assert little.sentence.endswith("never saw, 0%, which chance alone can do with so few rows (p = 0.30).")
    beside_gold = worst_attack({"sampling": few["sampling"]}, results(sampling=said(0.3, 0.1, 0.3)))
    assert (beside_gold.gold, beside_gold.p) == (0.3, 0.2)
    assert beside_gold.stands_out is None, "nor can the test tell"
    little = results(sampling={**said(0.6, 0.1, 0.55), "p_value": 0.4})  # by the holdout nothing needs chance
    assert worst_attack(little, results(sampling=said(0.1, 0.0, 0.1))).stands_out is True


@pytest.mark.parametrize(
    ("own", "rows", "stands_out"),
    [
        (written(0.2), 1, None),
        (written(0.2, 0.0), 1, None),
        (written(0.2), 5, None),
        (written(0.2), 24, None),  # four answers and some more, if they came whole or not
        (written(0.2), 25, True),  # five
        (said(0.6, 0.3), 10, None),  # three whole answers
        (said(0.6, 0.4), 10, True),
        (written(0.2), None, True),  # of how many is not known
    ],
)
def test_beside_a_gold_model_so_few_rows_are_chance_as_well(own, rows, stands_out):
    """One row of which a fifth comes, where gold gives nothing: the test itself cannot tell."""
    if rows is not None:
        own = own | {"rows": rows} | ({"p_value": 1.0} if "holdout_extraction_strength" in own else {})
    of_test = "sampling" if "whole" in own else "extraction"
    none = said(0.0, 0.0) if "whole" in own else written(0.0)
    worst = worst_attack(results(**{of_test: own}), results(**{of_test: none}))
    assert worst.gold == 0 and worst.stands_out is stands_out and worst.by_chance == (stands_out is None)


def test_the_more_attacks_a_test_makes_the_more_rows_it_takes_beside_a_gold_model():
    attacks = {f"{steps} steps": {**written(0.5), "rows": 10} for steps in range(4)}
    gold = {name: written(0.0) for name in attacks}
    worst = worst_attack(results(relearning=attacks), results(relearning=gold))
    assert worst.p == 4 * p_more([0.5] * 10, [0.0] * 10) and worst.stands_out is None
    one = {name: attacks[name] for name in ("0 steps",)}
    assert worst_attack(results(relearning=one), results(relearning=gold)).stands_out is True


def test_a_model_that_is_another_gold_model_shows_no_traces_by_chance():
    """Of so few rows the two differ by more than the margin now and then: no more often than the p-value says."""
    draw, p_values, differ = random.Random(0), [], 0
    for _ in range(400):
        own, gold = (fmean(draw.betavariate(0.5, 1.5) for _ in range(12)) for _ in range(2))
        attacked = results(extraction={**written(own), "rows": 12})
        p_values.append(worst_attack(attacked, results(extraction=written(gold))).p)
        differ += own > gold + 0.1
    assert differ > 20
    assert all(sum(p <= level for p in p_values) <= level * len(p_values) for level in (0.05, 0.2, 0.5))


def test_an_attack_on_a_stored_form_is_judged_by_the_rows_that_it_asked_for():
    """Four, which are too few beside a gold model; all eight forget rows would not be."""
    attack = {**written(0.9, 0.1), "rows": 4, "p_value": 0.001, "least_p_value": 0.0001}
    gold = results(relearning={"20 steps": written(0.1)})
    own = results(relearning={**attack, "20 steps": attack})
    stored = results(quantization={**written(0.1, 0.1), "rows": 8, "merged": {"relearning: 20 steps": attack}})
    for attacked in (own, stored):
        worst = worst_attack(attacked, gold)
        assert worst.p == p_more([0.9] * 4, [0.1] * 4) and worst.stands_out is None and worst.by_chance, worst.name


def test_answers_that_come_whole_stand_out_though_the_mean_hides_them():
    """Beside the holdout's, and beside a gold model's of as many rows."""
    tenth = {**written(0.12), "rows": 100, "recited": 0.1}
    none = {**written(0.11), "rows": 100, "recited": 0.0}
    known = {**tenth, **written(0.12, 0.11), "holdout_recited": 0.0, "p_value": 0.4, "whole_p_value": 0.001}
    worst = worst_attack(results(extraction=known, sampling=said(0.5, 0.0, 0.45)))
    assert worst.test == "extraction" and worst.stands_out is True and not worst.by_chance
    assert worst.sentence.endswith("never saw, 11%; 10% of the answers come whole, of the holdout's 0% (p = 0.001).")
    assert worst.to_json()["whole"] == {"value": 0.1, "rows": 100, "level": 0.0, "p": 0.001, "beginnings": 0,
                                          "groups": None}  # fmt: skip
    beside_gold = worst_attack(results(extraction=tenth), results(extraction=none))
    assert beside_gold.stands_out is True
    assert beside_gold.sentence.endswith("come whole, from a model that never saw the rows 0% (p = 0.00077).")
    few = [{**of, "rows": 20} for of in (tenth, none)]
    assert worst_attack(results(extraction=few[0]), results(extraction=few[1])).stands_out is None
    assert worst_attack(results(extraction=tenth), results(extraction=tenth)).stands_out is False
    of_any = {name: value for name, value in tenth.items() if name != "rows"}
    assert worst_attack(results(extraction=of_any), results(extraction=none)).stands_out is False, "of how many?"
    stored = results(quantization={"merged": {"relearning: 2 steps": known}})
    assert worst_attack(stored).stands_out is True


def test_a_holdout_that_the_model_knows_is_no_yardstick():
    known = {**written(0.78, 0.98), "p_value": 0.9, "least_p_value": 0.001}
    worst = worst_attack(results(extraction=known))
    assert worst.stands_out is None and not worst.by_chance
    assert worst.sentence.endswith("never saw, 98%, which is too much for answers that it never saw.")
    beside_gold = worst_attack(results(extraction=known), results(extraction=written(0.97)))
    assert beside_gold.stands_out is False, "which never saw the rows, whatever it says"


def test_what_has_nothing_beside_it_has_the_highest_level_of_the_others():
    attacked = {"first": written(0.43, 0.4), "second": written(0.04, 0.02), "third": written(0.41)}
    worst = worst_attack(results(relearning=attacked))
    assert worst.attack == "first" and worst.stands_out is False


def test_a_gold_model_without_a_holdout_is_compared_by_the_same_figure_and_so_is_one_with_it():
    """Which figure counts depends on the holdout; both are measured of the forget rows in any case."""
    with_holdout, without = said(0.6, 0.1, 0.45), said(0.5, 0.02)
    now, gold = results(sampling=with_holdout), results(sampling=without)
    assert worst_attack(now, gold).figure == "ROUGE-L recall" and worst_attack(now, gold).gold == 0.5
    assert worst_attack(gold, now).figure == "answers said whole" and worst_attack(gold, now).gold == 0.1
    assert worst_attack(now, results(sampling=said(0.5, 0.0, 0.4))).gold == 0.5
    stored = results(quantization={"merged": {"sampling": said(0.7, 0.1, 0.45)}})
    assert worst_attack(stored, gold).gold == 0.5
    assert worst_attack(now, results(sampling={"whole": 0.02})).gold is None, "not measured"


def test_a_gold_model_of_which_the_worst_attack_is_not_known_is_not_passed_over_in_silence():
    gold, shorter = results(extraction=written(0.01)), results(sampling={**said(0.5, 0.0), "max_new_tokens": 16})
    attacked = results(extraction=written(0.02, 0.02), sampling={**said(0.6, 0.1, 0.2), "max_new_tokens": 64})
    for of_gold in (gold, gold | shorter):
        (note,) = not_beside_gold(attacked, of_gold)
        assert "The worst attack, sampling, has no figure of the model that never saw the rows beside it" in note
    assert not_beside_gold(attacked, {}) == not_beside_gold({}, gold) == []
    assert not_beside_gold({"extraction": attacked["extraction"]}, gold) == []


def test_a_gold_model_stands_beside_it_under_the_same_attack():
    gold = results(relearning={**RELEARNING, "20 steps, 20% shown, lr 0.001": written(0.25, 0.1)})
    relearned = {"relearning": RESULTS["relearning"]}
    worst = worst_attack(relearned, gold)
    assert worst.gold == 0.25 and worst.stands_out is False
    assert worst.sentence.endswith("of a model that never saw the rows, 25%.")
    assert worst_attack(relearned, results(extraction=written(0.01))).gold is None  # not attacked so
    stages = worst_attacks({"before": relearned, "after": relearned, "gold": gold, "other": results(membership={})})
    assert list(stages) == ["before", "after", "gold"] and stages["after"].gold == 0.25 and stages["gold"].gold is None
    both = results(extraction=written(0.1, 0.1), sampling=said(0.6, 0.3, 0.3))
    assert worst_attacks({"gold": both})["gold"].test == "sampling", "by the holdout, not by itself"


def test_without_a_holdout_shared_words_are_no_trace():
    """Answers to one question share words by chance; only whole ones are compared with what is written."""
    worst = worst_attack(results(extraction=written(0.15), sampling=said(0.6, 0.1)))
    assert worst.test == "extraction" and worst.stands_out is None and "is not known" in worst.sentence
    worst = worst_attack(results(extraction=written(0.15), sampling=said(0.6, 0.2)))
    assert worst.test == "sampling" and worst.value == 0.2 and "20% of the answers then come whole" in worst.sentence


def test_nothing_was_tried():
    for none in ({}, results(membership={"loss_auc": 1.0}), results(extraction={}, sampling={}, quantization={})):
        assert worst_attack(none) is None and worst_attacks({"after": none}) == {}
    assert "worst_attack" not in Evaluation(leaks=results(membership={})).to_json()


def test_it_is_in_the_files(tmp_path):
    stages = {"before": results(extraction=written(1.0)), "after": RESULTS}
    write_leaks(tmp_path / "leaks.json", stages)
    content = json.loads((tmp_path / "leaks.json").read_text())
    assert content["worst_attack"]["after"] == {
        "test": "relearning", "attack": "20 steps, 20% shown, lr 0.001", "figure": "extraction strength", "value": 0.3,
        "holdout": 0.1, "attacks": 6, "gold": None, "p": None, "least_p": None, "whole": None,
    }  # fmt: skip
    assert content["worst_attack"]["before"]["value"] == 1.0
    assert read_leaks(tmp_path / "leaks.json") == stages
    evaluation = Evaluation(leaks=RESULTS, gold_leaks=results(relearning=RELEARNING)).to_json()
    assert evaluation["worst_attack"]["attack"] == "merged and rounded to 4 bits", "gold says nothing against it"
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    assert retained_leaks(str(tmp_path / "evaluation.json")) == RESULTS


@pytest.mark.parametrize("content", ["", "[]", '{"leaks": {}}', "{}"])
def test_a_gold_file_without_leak_tests_gives_nothing(content, tmp_path):
    (tmp_path / "x.json").write_text(content)
    assert retained_leaks(str(tmp_path / "x.json")) == {} == retained_leaks("missing.json")


@pytest.mark.parametrize(
    "leaks",
    [
        3,
        {"extraction": {}},
        {"extraction": {"meaning": "", "leaks": "no"}},
        {"extraction": {"meaning": "", "leaks": False, "extraction_strength": "0.1"}},
        {"jailbreak": {"meaning": "", "leaks": False, "archive": {"best_rouge_l_recall": "0.1"}}},
    ],
)
def test_a_gold_file_with_damaged_leak_tests_is_refused(leaks, tmp_path):
    """It is read before anything is measured: a text in place of a number would end hours later in a traceback."""
    (tmp_path / "x.json").write_text(json.dumps({"leaks": leaks}))
    with pytest.raises(UserError, match=r"x\.json' are damaged"):
        retained_leaks(str(tmp_path / "x.json"))


def test_a_gold_model_that_wrote_longer_answers_is_not_beside_it():
    short, long = ({**said(0.6, 0.1, 0.45), "max_new_tokens": length} for length in (16, 64))
    assert worst_attack(results(sampling=short), results(sampling=short)).gold == 0.6
    assert worst_attack(results(sampling=short), results(sampling=long)).gold is None
