"""The demo end to end on fewer rows and a smaller model: the same code, some seconds."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from helpers.small_demo import SMALL
from matplotlib import image
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_npo.commands.demo.recipe import Teaching
from lowmem_npo.commands.demo.run import run_demo
from lowmem_npo.commands.demo.teaching import STAMP, fresh_model, make_tokenizer, taught_model
from lowmem_npo.config import DataConfig
from lowmem_npo.data import prepare
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.answer_table import stages_from_json
from lowmem_npo.evaluation.answers import evaluate_answers
from lowmem_npo.evaluation.scoring.likelihood import answer_likelihoods


@pytest.fixture
def demo(small_demo):
    return small_demo


def test_it_forgets_and_keeps(demo):
    found, said = demo
    before, after, gold = (found.stages[name] for name in ("before", "after", "gold"))
    assert before["forget"].exact_match == before["retain"].exact_match == 1
    assert gold["forget"].exact_match <= 1 / 12 and gold["retain"].exact_match == 1
    assert after["forget"].exact_match <= gold["forget"].exact_match
    assert after["retain"].exact_match >= 11 / 12
    assert after["forget"].nll > 20 * before["forget"].nll
    assert {sets[part].rows for sets in found.stages.values() for part in sets} == {12}
    for words in ("learns them all by heart", "gold standard", "NLL per answer token", "truth", "Picture:"):
        assert words in said


def test_it_leaves_numbers_and_a_picture(demo):
    found, _ = demo
    saved = json.loads((found.directory / "demo.json").read_text())
    assert stages_from_json(saved["stages"]) == found.stages
    assert saved["passed"] == found.passed == all(check["passed"] for check in saved["checks"])
    assert set(saved["seconds"]) == {"base", "gold", "unlearning"} and saved["seed"] == 0
    assert stages_from_json(json.loads((found.directory / "before_after_gold.json").read_text())) == found.stages
    assert image.imread(found.directory / "demo.png").shape[:2] == (1000, 1500)


def test_it_ends_with_the_report_and_the_gold_standard_in_it(demo):
    found, said = demo
    run = found.directory / "unlearned"
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    figures = {(f["set"], f["key"]): f["values"] for f in report["figures"] if f["group"] == "answers"}
    for stage in ("before", "after", "gold"):
        for part in ("forget", "retain"):
            assert figures[part, "nll"][stage] == found.stages[stage][part].nll
    assert report["verdict"]["headline"].startswith("On the rows measured, the model no longer says")
    html = (run / "report.html").read_text(encoding="utf-8")
    assert "gold standard" in html and "never saw the forget rows" in html and html.count("<svg") == 6
    assert said.rstrip().splitlines()[-4] == f"Report:  {run / 'report.html'}"


def test_what_it_leaves_is_an_ordinary_model_and_adapter(demo):
    """The table's numbers come out again from the files, with plain transformers and PEFT."""
    found, _ = demo
    base = found.directory / "base"
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = prepare(tokenizer, DataConfig(limit=SMALL.limit))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert model.config.model_type == "olmo" and len(tokenizer) == model.config.vocab_size
    for text in ("Where was Fyandel Clevanza born?", "  two  spaces, ünïcode\n\nand lines"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    for stage, load in (
        ("before", lambda: model),
        ("gold", lambda: AutoModelForCausalLM.from_pretrained(found.directory / "gold", dtype=torch.float32)),
        ("after", lambda: PeftModel.from_pretrained(model, found.directory / "unlearned")),
    ):
        again = evaluate_answers(load(), tokenizer, rows.forget, limit=None, progress=False).summary
        assert again.nll == pytest.approx(found.stages[stage]["forget"].nll, rel=1e-4)
        assert again.exact_match == found.stages[stage]["forget"].exact_match


def test_gold_and_base_differ_in_data_only(demo):
    """Same initial weights, and the gold standard learnt the retain rows as well as the base did."""
    found, _ = demo
    stamps = [json.loads((found.directory / name / STAMP).read_text()) for name in ("base", "gold")]
    assert [key for key in stamps[0] if stamps[0][key] != stamps[1][key]] == ["rows"]
    tokenizer = make_tokenizer(["one text"], 300)
    one, two, other = (fresh_model(tokenizer, SMALL.teaching, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_a_second_run_only_unlearns_anew(demo):
    found, _ = demo
    taught = {file: file.stat().st_mtime_ns for name in ("base", "gold") for file in (found.directory / name).iterdir()}
    said = []
    again = run_demo(found.directory, recipe=SMALL, device="cpu", say=said.append)
    assert again.stages == found.stages  # the same bits: nothing depends on what ran before
    assert "\n".join(said).count("Found from an earlier run") == 2
    assert {file: file.stat().st_mtime_ns for file in taught} == taught


def test_a_run_that_does_not_forget_fails(demo, tmp_path):
    """The checks are sharp: the same demo with a learning rate of nearly nothing says so."""
    found, _ = demo
    for name in ("base", "gold"):
        (tmp_path / name).symlink_to(found.directory / name)
    said = []
    idle = dataclasses.replace(SMALL, lr=1e-9, epochs=1)
    result = run_demo(tmp_path, recipe=idle, device="cpu", say=said.append)
    assert not result.passed
    assert [check.name for check in result.checks if not check.passed] == ["forgotten", "not overdone"]
    assert "FAILED  forgotten" in "\n".join(said)


def test_other_seeds_rows_and_recipes_are_taught_anew(tmp_path):
    """A model found in the directory counts only for what it was made from."""
    tokenizer = make_tokenizer(["one text"], 300)
    rows = prepare(tokenizer, DataConfig(limit=3)).forget.rows
    quick = Teaching(layers=1, width=16, heads=2, epochs=1)
    weights = []
    for seed, taught, teaching in (
        (0, rows, quick),
        (1, rows, quick),
        (1, rows[:2], quick),
        (1, rows[:2], dataclasses.replace(quick, epochs=2)),
    ):
        for again in (False, True):
            model, found = taught_model(
                tmp_path / "base", tokenizer, taught, teaching, seed=seed, device=torch.device("cpu"), description=""
            )
            assert found == again
        weights.append(model.lm_head.weight)
    assert all(not torch.equal(one, other) for at, one in enumerate(weights) for other in weights[:at])


def test_it_overwrites_nothing_of_others(tmp_path):
    precious = tmp_path / "base" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("years of work")
    with pytest.raises(UserError, match="was not written by the demo"):
        run_demo(tmp_path, recipe=SMALL, device="cpu", say=str)
    assert precious.read_text() == "years of work"


def test_the_callers_threads_and_random_numbers_are_left_alone(tmp_path):
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    fresh_model(make_tokenizer(["one text"], 300), SMALL.teaching, 0)
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(UserError):
        (tmp_path / "gold").mkdir()
        (tmp_path / "base").mkdir()
        run_demo(tmp_path, recipe=SMALL, device="cpu", say=str)
    assert torch.get_num_threads() == threads


def test_nothing_of_the_forget_part_reaches_the_gold_standard(demo):
    """Forget answers are no likelier to the gold standard than answers of people that nobody was ever taught."""
    from lowmem_npo.data import bundled_rows, to_examples, tokenize

    found, _ = demo
    tokenizer = AutoTokenizer.from_pretrained(found.directory / "gold")
    gold = AutoModelForCausalLM.from_pretrained(found.directory / "gold", dtype=torch.float32)
    unseen = tokenize(to_examples(bundled_rows("holdout")), tokenizer)
    nlls = [score.nll for score in answer_likelihoods(gold, unseen, progress=False)]
    typical = sum(nlls) / len(nlls)
    assert found.stages["gold"]["forget"].nll == pytest.approx(typical, rel=0.4)
    assert found.stages["before"]["forget"].nll < 0.1 * typical
