"""Fine-tuning on other rows: what is taught and asked for, each attack by its name, what is said where rows lack."""

from __future__ import annotations

import pytest
import torch
from helpers.dense_step import random_rows, word_tokenizer
from helpers.tiny_models import tiny_model

from lowmem_npo.evaluation.leaks import fine_tuning
from lowmem_npo.evaluation.leaks.contract import Subject
from lowmem_npo.evaluation.leaks.retuning import RETUNING, RetuningOptions
from lowmem_npo.evaluation.leaks.worst import worst_attack
from lowmem_npo.evaluation.scoring.journal import Journal
from lowmem_npo.evaluation.scoring.scorer import Scorer

FORGET, HOLDOUT, RETAIN, GENERAL = (random_rows(5, seed=seed) for seed in range(4))
OPTIONS = RetuningOptions(retune_steps=8, retune_lr=1e-2)


def retuned(retain=RETAIN, general=GENERAL, holdout=HOLDOUT, forget=FORGET):
    scorer = Scorer(tiny_model(), word_tokenizer(), Journal(None, progress=False), batch_size=4)
    return RETUNING.measure(Subject(scorer, forget, holdout, OPTIONS, retain=retain, general=general))


def test_each_set_is_taught_by_itself_and_all_forget_rows_are_asked_for(monkeypatch):
    real, taught = fine_tuning.fine_tune, []

    def tuned(model, rows, **options):
        taught.append((rows, options["steps"], options["lr"]))
        return real(model, rows, **options)

    monkeypatch.setattr(fine_tuning, "fine_tune", tuned)
    figures = retuned().figures
    assert taught == [(RETAIN, 8, 1e-2), (GENERAL, 8, 1e-2)]
    names = ["8 steps on the retain rows, lr 0.01", "8 steps on general texts, lr 0.01"]
    assert list(RETUNING.attacks(figures)) == names and figures["rows"] == figures["shown_rows"] == 5
    assert len({figures["before"]["nll"], *(figures[name]["nll"] for name in names)}) == 3
    assert figures["nll"] in {figures[name]["nll"] for name in names}


def test_forget_rows_among_those_taught_come_back():
    """The attack works: taught the forget rows as if they were to be kept, the model is found out."""
    options = {"holdout": HOLDOUT, "general": None}
    result = retuned(retain=FORGET, **options)
    assert result.figures["nll"] < 0.7 * result.figures["before"]["nll"]
    assert retuned(**options).figures["nll"] > result.figures["nll"] + 0.5


def test_what_lacks_is_said():
    result = retuned(retain=None)
    assert list(RETUNING.attacks(result.figures)) == ["8 steps on general texts, lr 0.01"]
    assert result.meaning.endswith("On rows to keep it was not tried: there are none (--retain names some).")
    assert "worse" not in result.meaning and "--retain" not in retuned().meaning
    assert "of the 5 forgotten answers by" in result.meaning
    assert "of the forgotten answer by" in retuned(forget=FORGET[:1], general=None).meaning
    none = retuned(retain=[], general=None)
    assert none.leaks is None and none.meaning.startswith("Not measured: there are neither rows to keep (--retain")
    assert worst_attack({"retuning": none}) is None


@pytest.mark.parametrize("empty", [None, []])
def test_its_cost_is_that_of_what_is_tried(empty):
    scorer = Scorer(None, None, Journal(None), batch_size=4)
    subject = Subject(scorer, FORGET, None, OPTIONS, retain=empty, general=GENERAL)
    assert RETUNING.tuning_steps(subject, OPTIONS) == 8
    assert torch.is_grad_enabled()
