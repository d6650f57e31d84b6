"""The demo end to end, on fewer rows and a smaller model: the same code in a few seconds."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from helpers.small_demo import SMALL
from matplotlib import image
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_npo.commands.demo import run as demonstrating
from lowmem_npo.commands.demo.recipe import Teaching
from lowmem_npo.commands.demo.run import run_demo
from lowmem_npo.commands.demo.teaching import fresh_model, make_tokenizer, taught_model
from lowmem_npo.commands.train import measuring
from lowmem_npo.config import DataConfig
from lowmem_npo.data import prepare
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.answer_table import stages_to_json
from lowmem_npo.evaluation.answers import evaluate_answers
from lowmem_npo.evaluation.scoring.likelihood import answer_likelihoods
from lowmem_npo.training.teaching import made_from


@pytest.fixture
def demo(small_demo):
    return small_demo


def test_it_forgets_and_keeps(demo):
    result, printed = demo
    before, after, gold = (result.stages[name] for name in ("before", "after", "gold"))
    assert before["forget"].exact_match == before["retain"].exact_match == 1
    assert gold["forget"].exact_match <= 1 / 12 and gold["retain"].exact_match == 1
    assert after["forget"].exact_match <= gold["forget"].exact_match
    assert after["retain"].exact_match >= 11 / 12
    assert after["forget"].nll > 20 * before["forget"].nll
    assert {sets[part].rows for sets in result.stages.values() for part in sets} == {12}
    for words in ("learns them all by heart", "gold standard", "NLL per answer token", "truth", "Picture:"):
        assert words in printed


def test_it_writes_figures_and_a_picture(demo):
    result, _ = demo
    saved = json.loads((result.directory / "demo.json").read_text())
    assert saved["stages"] == stages_to_json(result.stages)
    assert saved["passed"] == result.passed == all(check["passed"] for check in saved["checks"])
    assert set(saved["seconds"]) == {"base", "gold", "unlearning"} and saved["seed"] == 0
    assert json.loads((result.directory / "before_after_gold.json").read_text()) == saved["stages"]
    assert image.imread(result.directory / "demo.png").shape[:2] == (1000, 1500)


def test_it_ends_with_a_report_that_includes_the_gold_standard(demo):
    result, printed = demo
    run = result.directory / "unlearned"
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    figures = {(f["set"], f["key"]): f["values"] for f in report["figures"] if f["group"] == "answers"}
    for stage in ("before", "after", "gold"):
        for part in ("forget", "retain"):
            assert figures[part, "nll"][stage] == result.stages[stage][part].nll
    assert report["verdict"]["headline"].startswith("On the rows measured, the model no longer says")
    html = (run / "report.html").read_text(encoding="utf-8")
    assert "gold standard" in html and "never saw the forget rows" in html and html.count("<svg") == 7
    assert printed.rstrip().splitlines()[-4] == f"Report:  {run / 'report.html'}"


def test_it_leaves_an_ordinary_model_and_adapter(demo):
    """Plain transformers and PEFT, with the files, reproduce the figures of the table."""
    result, _ = demo
    base = result.directory / "base"
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = prepare(tokenizer, DataConfig(limit=SMALL.limit))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert model.config.model_type == "olmo" and len(tokenizer) == model.config.vocab_size
    for text in ("Where was Fyandel Clevanza born?", "  two  spaces, ünïcode\n\nand lines"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    for stage, load in (
        ("before", lambda: model),
        ("gold", lambda: AutoModelForCausalLM.from_pretrained(result.directory / "gold", dtype=torch.float32)),
        ("after", lambda: PeftModel.from_pretrained(model, result.directory / "unlearned")),
    ):
        again = evaluate_answers(load(), tokenizer, rows.forget, progress=False).summary
        assert again.nll == pytest.approx(result.stages[stage]["forget"].nll, rel=1e-4)
        assert again.exact_match == result.stages[stage]["forget"].exact_match


def test_gold_and_base_differ_in_data_only(demo):
    """Both start from the same weights; their stamps differ only in the rows."""
    result, _ = demo
    stamps = [made_from(result.directory / name) for name in ("base", "gold")]
    assert [key for key in stamps[0] if stamps[0][key] != stamps[1][key]] == ["rows"]
    tokenizer = make_tokenizer(["one text"], 300)
    one, two, other = (fresh_model(tokenizer, SMALL.teaching, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_a_second_run_only_unlearns_anew(demo):
    result, _ = demo
    taught = {
        file: file.stat().st_mtime_ns for name in ("base", "gold") for file in (result.directory / name).iterdir()
    }
    lines = []
    again = run_demo(result.directory, recipe=SMALL, device="cpu", say=lines.append)
    assert again.stages == result.stages  # the same bits: nothing depends on what ran before
    assert "\n".join(lines).count("Reused from an earlier run") == 2
    assert {file: file.stat().st_mtime_ns for file in taught} == taught


def test_a_run_that_does_not_forget_fails(demo, tmp_path):
    """The same demo with hardly any learning rate fails its checks."""
    result, _ = demo
    for name in ("base", "gold"):
        (tmp_path / name).symlink_to(result.directory / name)
    lines = []
    idle = dataclasses.replace(SMALL, lr=1e-9, epochs=1)
    failed = run_demo(tmp_path, recipe=idle, device="cpu", say=lines.append)
    assert not failed.passed
    assert [check.name for check in failed.checks if not check.passed] == ["forgotten", "not overdone", "lasting"]
    assert "FAILED  forgotten" in "\n".join(lines)


def test_the_gold_model_is_attacked_as_the_others_are(tmp_path, monkeypatch):
    """With other rows learnt again, or rows that share text told apart otherwise, the attacks compare nothing."""
    calls = []
    for module in (demonstrating, measuring):
        monkeypatch.setattr(module, "measure_leaks", lambda *rows, **how: calls.append((rows[2], how)) or {})
    monkeypatch.setattr(demonstrating, "judge", lambda stages, leaks: [])
    quick = Teaching(vocabulary=320, layers=1, width=16, heads=2, epochs=1)
    recipe = dataclasses.replace(SMALL, teaching=quick, epochs=1, limit=3)
    run_demo(tmp_path, seed=5, recipe=recipe, device="cpu", say=str)
    (gold_rows, gold), (before_rows, before), _ = calls
    assert [*gold_rows] == [*before_rows] and [*gold["holdout_rows"]] == [*before["holdout_rows"]]
    assert gold["seed"] == before["seed"] == 5 and gold["batch_size"] == before["batch_size"]
    written, as_trained = gold["wording"], before["wording"]
    assert written.examples == as_trained.examples and written.max_length == as_trained.max_length


def test_other_seeds_rows_and_recipes_are_taught_anew(tmp_path):
    """A model in the directory is reused only with the inputs that it was made from."""
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
            model, reused = taught_model(
                tmp_path / "base", tokenizer, taught, teaching, seed=seed, device=torch.device("cpu"), description=""
            )
            assert reused == again
        weights.append(model.lm_head.weight)
    assert all(not torch.equal(one, other) for at, one in enumerate(weights) for other in weights[:at])


def test_it_overwrites_no_other_files(tmp_path):
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
    """To the gold standard, forget answers are no likelier than answers about people that no model was taught."""
    from lowmem_npo.data import bundled_rows, to_examples, tokenize

    result, _ = demo
    tokenizer = AutoTokenizer.from_pretrained(result.directory / "gold")
    gold = AutoModelForCausalLM.from_pretrained(result.directory / "gold", dtype=torch.float32)
    unseen = tokenize(to_examples(bundled_rows("holdout")), tokenizer)
    nlls = [score.nll for score in answer_likelihoods(gold, unseen, progress=False)]
    typical = sum(nlls) / len(nlls)
    assert result.stages["gold"]["forget"].nll == pytest.approx(typical, rel=0.4)
    assert result.stages["before"]["forget"].nll < 0.1 * typical
