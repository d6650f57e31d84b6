"""Whether the demo's checks pass and fail where they should."""

from __future__ import annotations

import pytest

from lowmem_npo.commands.demo.checks import judge
from lowmem_npo.evaluation.answers import AnswerSummary
from lowmem_npo.evaluation.leaks.relearning import judge as judge_relearning
from lowmem_npo.evaluation.leaks.tuned import Tuned


def stages(before=1.0, after=0.0, gold=0.0, nll=5.0, gold_nll=5.0, retain=1.0):
    def summary(exact, nll):
        return AnswerSummary(100, 100, 1000, nll, 0.5, 0.5, exact, exact, 64)

    return {
        "before": {"forget": summary(before, 0.01), "retain": summary(1.0, 0.01)},
        "after": {"forget": summary(after, nll), "retain": summary(retain, 0.02)},
        "gold": {"forget": summary(gold, gold_nll), "retain": summary(1.0, 0.01)},
    }


def leaks(relearnt=0.1, gold_relearnt=0.1):
    """Of two attacks, by both of which what was not shown comes back."""

    def result(strength):
        def after(strength):
            return {"extraction_strength": strength, "rows": 80, "nll": 1.0, "holdout_extraction_strength": 0.1}

        weak, strong = (Tuned(20, 60, {"extraction_strength": 0.1}, after(s), None) for s in (0.1, strength))
        return {"relearning": judge_relearning({"60 steps, half shown": strong, "20 steps": weak})}

    return {"before": {}, "after": result(relearnt), "gold": result(gold_relearnt)}


@pytest.mark.parametrize(
    ("figures", "failed"),
    [
        ({}, []),
        ({"before": 0.95, "after": 0.05, "nll": 6.4, "retain": 0.97}, []),  # just inside every bound
        ({"after": 0.1, "gold": 0.06}, []),  # what a model that never saw the rows guesses is allowed
        ({"before": 0.94}, ["recited"]),
        ({"after": 0.06}, ["forgotten"]),
        ({"nll": 6.6}, ["not overdone"]),
        ({"nll": 3.4}, ["not overdone"]),  # nor may they stay far likelier
        ({"retain": 0.96}, ["kept"]),
        ({"relearnt": 0.26}, ["lasting"]),
        ({"relearnt": 0.3, "gold_relearnt": 0.16}, []),  # what comes back from a model that never saw the rows
        ({"after": 1.0, "nll": 0.01}, ["forgotten", "not overdone"]),  # nothing unlearned
        ({"nll": 80.0, "retain": 0.0}, ["not overdone", "kept"]),  # everything destroyed
    ],
)
def test_each_check_fails_alone_and_where_it_should(figures, failed):
    relearnt = {key: figures[key] for key in ("relearnt", "gold_relearnt") if key in figures}
    checks = judge(stages(**{key: of for key, of in figures.items() if key not in relearnt}), leaks(**relearnt))
    assert [check.name for check in checks if not check.passed] == failed
    assert [check.name for check in checks] == ["recited", "forgotten", "not overdone", "lasting", "kept"]


def test_the_meanings_contain_the_numbers():
    meanings = [check.meaning for check in judge(stages(after=0.02, nll=4.0, retain=0.99), leaks(0.23, 0.12))]
    assert "100 of 100" in meanings[0] and "2 of 100" in meanings[1] and "99 of 100" in meanings[4]
    assert "60 steps, half shown" in meanings[3] and "23%" in meanings[3] and "12%" in meanings[3]
    assert "4.00" in meanings[2] and "5.00" in meanings[2] and "-20%" in meanings[2]


def test_what_fails_by_little_is_seen_to_fail():
    checks = {check.name: check.meaning for check in judge(stages(nll=6.52), leaks(0.2504, 0.1))}
    assert "(+30.4%; required: within 30.0%)" in checks["not overdone"]
    assert "(15.04% more than that model; required: at most 15.00%)" in checks["lasting"]
