"""What the conditions of --stop-when mean, on evaluations made up for it."""

from __future__ import annotations

import math

import pytest

from lowmem_npo import stop_conditions as conditions
from lowmem_npo.config import DataConfig, ModelConfig, ObjectiveConfig, OutputConfig, RunConfig, StoppingConfig
from lowmem_npo.errors import UserError
from lowmem_npo.stop_conditions import StopEvaluation, best, held, holds, parse_conditions

START = StopEvaluation(0, 0.0, forget_nll=0.1, retain_nll=0.2, holdout_nll=5.0, membership_auc=1.0)


def at(step: int, forget: float, retain: float, auc: float = 0.9, holdout: float = 5.0) -> StopEvaluation:
    return StopEvaluation(step, step / 10, forget, retain, holdout, auc)


@pytest.mark.parametrize(
    "text, before, after",
    [
        ("forget-at-holdout", at(1, 4.99, 9, 0.1), at(1, 5.0, 0.2, 0.9)),
        ("forget-at-holdout", at(1, 4.99, 9, 0.1, holdout=4.0), at(1, 5.0, 0.2, 0.9, holdout=8.0)),
        ("mia-crosses", at(1, 9, 9, 0.501), at(1, 0.1, 0.2, 0.5)),
        ("retain-loss+10%", at(1, 9, 0.219, 0.1), at(1, 0.1, 0.221, 0.9)),
        ("retain-loss+150%", at(1, 9, 0.499, 0.1), at(1, 0.1, 0.501, 0.9)),
        ("retain-loss+0.05", at(1, 9, 0.249, 0.1), at(1, 0.1, 0.251, 0.9)),
        ("retain-loss+1", at(1, 9, 1.199, 0.1), at(1, 0.1, 1.201, 0.9)),
    ],
)
def test_each_holds_when_it_should_and_not_before(text, before, after):
    (condition,) = parse_conditions([text])
    assert not holds(condition, before, START)
    assert holds(condition, after, START)


@pytest.mark.parametrize("text", ["forget-at-holdout", "mia-crosses", "retain-loss+10%"])
def test_a_run_that_lost_its_numbers_stops(text):
    (condition,) = parse_conditions([text])
    assert holds(condition, StopEvaluation(3, 0.3, math.nan, math.nan, math.nan, math.nan), START)


def test_patience_asks_for_as_many_in_a_row():
    conditions = parse_conditions(["forget-at-holdout", "retain-loss+10%"])
    run = [START, at(1, 6, 0.2), at(2, 4, 0.3), at(3, 6, 0.3), at(4, 6, 0.2), at(5, 6, 0.3), at(6, 7, 0.3)]
    ends = {p: [now.step for now in run if held(run[: now.step + 1], conditions, p)] for p in (1, 2, 3, 4, 5)}
    assert ends == {1: [1, 2, 3, 4, 5, 6], 2: [3, 4, 5, 6], 3: [5, 6], 4: [6], 5: []}
    assert [c.text for c in held(run[:4], conditions, 2)] == ["retain-loss+10%"]


# Evaluations, conditions, and the step whose adapter must be kept.
CASES = {
    "nearest to the holdout, not the last": ([at(1, 4.9, 0.2), at(2, 5.6, 0.2)], ["forget-at-holdout"], 1),
    "nearest to the holdout, beyond it": ([at(1, 4.0, 0.2), at(2, 5.2, 0.2)], ["forget-at-holdout"], 2),
    "the earliest of equally near ones": ([at(1, 4.5, 0.2), at(2, 5.5, 0.2)], ["forget-at-holdout"], 1),
    "nearest to an AUC of one half": ([at(1, 4, 0.2, 0.56), at(2, 5, 0.2, 0.4)], ["mia-crosses"], 1),
    "the goal named first": ([at(1, 4.9, 0.2, 0.6), at(2, 7, 0.2, 0.5)], ["mia-crosses", "forget-at-holdout"], 2),
    "the last before the damage": ([at(1, 1, 0.2), at(2, 2, 0.21), at(3, 5, 0.3)], ["retain-loss+10%"], 2),
    "damaged, then recovered": ([at(1, 1, 0.5), at(2, 2, 0.21), at(3, 3, 0.3)], ["retain-loss+10%"], 2),
    "nearest of those within the limit": (
        [at(1, 3, 0.2), at(2, 4, 0.21), at(3, 5, 0.3)],
        ["forget-at-holdout", "retain-loss+10%"],
        2,
    ),
    "none within the limit: what lost least": ([at(1, 1, 0.4), at(2, 2, 0.3), at(3, 5, 0.9)], ["retain-loss+10%"], 2),
    "no number is never the best": ([at(1, 4, 0.2), at(2, math.nan, 0.2)], ["forget-at-holdout"], 1),
}


@pytest.mark.parametrize("case", CASES)
def test_the_best_adapter(case):
    evaluations, texts, kept = CASES[case]
    assert best([START, *evaluations], parse_conditions(texts)).step == kept


@pytest.mark.parametrize("bug", ["last", "first", "limits ignored", "distance without sign", "nan is near"])
def test_the_cases_notice_bugs(bug, monkeypatch):
    broken = {
        "last": lambda es, cs: es[-1],
        "first": lambda es, cs: es[1],
        "limits ignored": lambda es, cs: best(es, [c for c in cs if c.kind == "goal"]),
        "distance without sign": best,
        "nan is near": best,
    }[bug]
    if bug == "distance without sign":
        monkeypatch.setattr(conditions, "abs", lambda value: value, raising=False)
    if bug == "nan is near":
        monkeypatch.setattr(conditions, "_or_infinite", lambda value: value if value == value else 0.0)
    assert any(broken([START, *es], parse_conditions(texts)).step != kept for es, texts, kept in CASES.values())


def test_nothing_is_best_before_training():
    assert best([START], parse_conditions(["forget-at-holdout"])) is None


@pytest.mark.parametrize(
    "text, message",
    [
        ("forget-at-holdot", "did you mean forget-at-holdout"),
        ("mia", "Conditions are"),
        ("retain-loss", "retain-loss+10%"),
        ("retain-loss+0%", "above 0"),
        ("retain-loss+-5%", "Conditions are"),
        ("retain-loss+ten", "Conditions are"),
        ("retain-loss+10 %", "Conditions are"),
        ("", "a text that is not empty"),
    ],
)
def test_malformed_conditions(text, message):
    with pytest.raises(UserError, match="--stop-when") as error:
        StoppingConfig(stop_when=(text,))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "stopping, data, output, message",
    [
        ({"stop_when": ("mia-crosses", "mia-crosses")}, {}, {}, "each condition once"),
        ({"stop_when": ("retain-loss+1%", "retain-loss+1")}, {}, {}, "each condition once"),
        ({"eval_every": 3}, {}, {}, "--eval-every .* give both"),
        ({"stop_patience": 3}, {}, {}, "--stop-patience .* give both"),
        ({"stop_when": ("mia-crosses",), "stop_patience": 0}, {}, {}, "--stop-patience must be at least 1"),
        ({"stop_when": ("mia-crosses",), "eval_every": 0}, {}, {}, "--eval-every must be at least 1"),
        ({"stop_when": ("mia-crosses",)}, {"forget": "f.jsonl", "retain": "r.jsonl"}, {}, "give --holdout"),
        ({"stop_when": ("retain-loss+1%",)}, {"forget": "f.jsonl", "holdout": "h.jsonl"}, {}, "give --retain"),
        ({"stop_when": ("mia-crosses",)}, {}, {"eval_rows": 0}, "--eval-rows"),
    ],
)
def test_what_does_not_go_together(stopping, data, output, message):
    with pytest.raises(UserError, match=message):
        RunConfig(
            ModelConfig("m"),
            data=DataConfig(**data),
            objective=ObjectiveConfig(gamma=0, delta=0),
            stopping=StoppingConfig(**stopping),
            output=OutputConfig(**output),
        )


def test_flags_and_file_give_the_conditions(tmp_path):
    from lowmem_npo.commands.arguments import parse_run

    flags = ["--model", "m", "--stop-when", "forget-at-holdout", "retain-loss+10%", "--eval-every", "5"]
    run = parse_run(flags, "train")
    assert [c.text for c in run.stopping.conditions] == ["forget-at-holdout", "retain-loss+10%"]
    file = tmp_path / "run.yaml"
    file.write_text(run.to_yaml())
    assert parse_run(["--config", str(file)], "train").stopping == run.stopping
    assert parse_run(["--model", "m"], "train").flat()["stop_when"] is None
