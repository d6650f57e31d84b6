"""`--alternatives self`: the original model writes the answers that dpo prefers, once; nobody else may read them."""

from __future__ import annotations

import json
import shutil
import stat
from dataclasses import replace

import pytest
from helpers.dense_step import random_rows
from helpers.rows import write_rows
from helpers.saved_adapters import same_adapter
from transformers import AutoTokenizer

from lowmem_npo.cli import main
from lowmem_npo.commands.arguments import parse_run
from lowmem_npo.commands.train import own_texts
from lowmem_npo.data.example import Example
from lowmem_npo.data.self_answered import answers_number, asking, other_answer, stand_in, with_own_answers
from lowmem_npo.data.templates import Template
from lowmem_npo.data.tokenized_rows import TokenizedRows
from lowmem_npo.errors import UserError
from lowmem_npo.training.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("hub_cache")


OPTIONS = ("--device", "cpu", "--dtype", "float32", "--limit", "6", "--batch-size", "3", "--eval-rows", "0")
ALTPO = ("--forget-term", "dpo", "--alternatives", "self:2", "--epochs", "3", "--lr", "1e-2")


def train(model, folder, *more):
    return main(["train", "--model", str(model), *OPTIONS, *ALTPO, "--output-dir", str(folder), *map(str, more)])


def answers(folder):
    return [json.loads(line)["alternatives"] for line in (folder / "alternatives.jsonl").read_text().splitlines()]


def test_the_model_writes_them_once_and_later_runs_read_them(byte_model, tmp_path, hub_cache, capsys, monkeypatch):
    first = tmp_path / "first"
    assert train(byte_model, first, "--save-steps", 1, "--save-total-limit", 9) == 0
    printed = capsys.readouterr().out
    assert "forget, alternatives: self:2, which the original model will write" in printed
    assert printed.count("retain: bundled") <= 1
    assert "The original model writes 2 other answers to each of 6 forget rows." in printed
    assert "forget, alternatives: 12 rows" in printed
    assert len(answers(first)) == 6 and all(len(own) == 2 and all(own) for own in answers(first))
    (cached,) = hub_cache.rglob("alternatives.jsonl")
    for file in (cached, first / "alternatives.jsonl"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    lines = read_metrics(first / "metrics.jsonl")
    assert lines[0]["forget_loss"] == pytest.approx(2 / 0.5 * 0.6931472, rel=1e-5)  # both as the original has them
    assert lines[5]["forget_loss"] < lines[0]["forget_loss"]

    monkeypatch.setattr(own_texts, "sampled_answers", lambda *a, **k: pytest.fail("they are there"))
    assert train(byte_model, tmp_path / "second", "--seed", 7, "--reference", "cached") == 0  # whatever --seed
    assert answers(tmp_path / "second") == answers(first)
    shutil.rmtree(hub_cache)
    resumed = tmp_path / "resumed"
    shutil.copytree(first, resumed)
    for file in ("adapter_model.safetensors", "report.json"):
        (resumed / file).unlink()
    for step in range(3, 7):
        shutil.rmtree(resumed / f"checkpoint-{step}")
    assert train(byte_model, resumed, "--save-steps", 1, "--save-total-limit", 9, "--resume") == 0
    assert same_adapter(first, resumed)


def test_a_dry_run_and_an_estimate_write_none(byte_model, tmp_path, hub_cache, capsys):
    assert train(byte_model, tmp_path / "run", "--dry-run") == 0
    assert "self:2, which the original model will write" in capsys.readouterr().out
    data = ["--forget", rows_file(tmp_path, 6), "--retain", "builtin"]
    assert main(["estimate", "--model", str(byte_model), *data, *ALTPO[:4], "--batch-size", "2"]) == 0
    assert not hub_cache.exists() and not (tmp_path / "run").exists()


def test_another_model_or_other_rows_get_others(byte_model, tmp_path):
    def path(*flags, rows=(("a", "b"),)):
        config = parse_run(["--model", str(byte_model), *ALTPO[:4], *flags], "train")
        return own_texts.own_answers(config, [Example(*row, "here", "question/answer") for row in rows])

    same = path()
    assert path("--seed", "3") == path("--lr", "1") == same
    assert len({same, path("--alternatives", "self:3"), path("--qlora"), path(rows=(("a", "c"),))}) == 4


def rows_file(folder, count):
    return write_rows(
        folder / "forget.jsonl", [{"question": f"Who is {n}?", "answer": f"The {n}."} for n in range(count)]
    )


def test_a_sweep_may_have_terms_that_prefer_none(byte_model, tmp_path):
    swept = tmp_path / "swept"
    options = ["--alternatives", "self:1", "--max-steps", "1", "--leaks", "none", "--output-dir", str(swept)]
    run = ["sweep", "--seeds", "1", "--grid", "forget-term=npo,dpo", "--model", str(byte_model), *OPTIONS[:-1], "2"]
    assert main([*run, *options]) == 0
    npo, dpo = (swept / f"forget-term={term}" / "seed-42" for term in ("npo", "dpo"))
    assert len(answers(dpo)) == 6 and not (npo / "alternatives.jsonl").exists()
    assert "--alternatives has no effect with --forget-term npo." in (npo / "log.txt").read_text()


def test_rows_to_which_it_writes_none_are_named(byte_model, tmp_path, capsys, monkeypatch):
    """A model that says the answers themselves, whatever it is asked for, but to the first row."""
    tell = {1: "the 1", 2: "Answer: The 2.\nMore"}
    tokens = iter(range(10**6))

    def recites(model, tokenizer, prompts, **options):
        return [[tokenizer.encode(tell.get(_row(tokenizer, one.ids), f"No one, {next(tokens)}."))] for one in prompts]

    monkeypatch.setattr(own_texts, "sampled_answers", recites)
    data = ("--forget", rows_file(tmp_path, 3), "--retain", "builtin", "--batch-size", 1)
    assert train(byte_model, tmp_path / "run", *data) == 2
    said = capsys.readouterr().err
    assert "--alternatives self:2: the original model writes no other answer to" in said
    assert "line 2; " in said and "line 3: write one yourself" in said and "line 1" not in said


def _row(tokenizer, ids):
    return int(tokenizer.decode(ids).rpartition("Who is ")[2].partition("?")[0])


@pytest.mark.parametrize(
    "options, message",
    [
        (("--alternatives", "other", "--forget-term", "npo"), "--alternatives other: give self, or self:N"),
        (("--alternatives", "other"), "--alternatives other: give self, or self:N for N other answers to each row"),
        (("--alternatives", "self:0"), "--alternatives self:0: give at least 1 answer and at most 100, as in"),
        (("--alternative-column", "other"), "both say what dpo prefers: leave one of them out"),
    ],
)
def test_bad_input_is_found_before_the_weights(options, message, byte_model, tmp_path, capsys):
    assert train(byte_model, tmp_path / "run", "--dry-run", *options) == 2
    assert message in capsys.readouterr().err


def test_what_counts_as_another_answer():
    row = Example("Who?", "It was Ada Quill.", "line 1", "question/answer")
    assert other_answer(" It was Bo Rook.\n\nQuestion: Who else?", row) == "It was Bo Rook."
    assert other_answer("Answer: It was Bo.", row) == "It was Bo."
    for told in ("", " \n", "...", "it was ADA quill", "I think it was Ada Quill, in May.", "\nIt was Ada Quill.\n"):
        assert other_answer(told, row) is None
    assert other_answer("It was Bo. And then she", row, cut=True) == "It was Bo."  # the limit came first
    assert other_answer("It was Bo and", row, cut=True) == "It was Bo and"
    short = Example("Is it?", "No", "line 1", "question/answer")
    assert other_answer("There is no bridge.", short) == "There is no bridge." and other_answer("no!", short) is None
    assert other_answer("No, it is not.", short) is None  # which says it
    for true, said in (
        ("Ada Quill", "I think Ada Quill did."),
        ("Antwerp", "In Antwerp, in May."),
        ("Jos\u00e9 Ram\u00edrez", "Jose\u0301 Rami\u0301rez"),  # an accent that follows its letter
        (
            "\u5b83\u5728\u5317\u4eac\u3002",
            "\u4ed6\u8bf4\u5b83\u5728\u5317\u4eac\u5417",
        ),  # Chinese, which has no spaces
    ):
        assert other_answer(said, replace(row, answer=true)) is None
    assert (
        other_answer("\u0939\u093e\u0901\u0964 \u0914\u0930", row, cut=True) == "\u0939\u093e\u0901\u0964"
    )  # Hindi's full stop
    lines = Example("List.", "a\nb", "line 1", "question/answer")
    assert other_answer("c\nd\n\nQuestion:", lines) == "c\nd"
    assert answers_number(None) is None and answers_number("self") == 5 and answers_number("self:3") == 3


def test_it_is_asked_for_in_the_form_of_the_model(byte_model):
    tokenizer = AutoTokenizer.from_pretrained(byte_model)
    row = Example("Who is it?", "Ada Quill.", "line 1", "question/answer")
    plain = tokenizer.decode(asking(row, tokenizer, Template()))
    assert plain.endswith("Question: Who is it?\nAnswer: Ada Quill.\nAnother answer, with other facts:")
    text = replace(row, prompt=None, schema="text")
    assert tokenizer.decode(asking(text, tokenizer, Template())).count("Question:") == 1  # that of the pattern
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    for form in ("plain", "auto", "{prompt} ->"):  # whatever the rows' own is
        asked = tokenizer.decode(asking(row, tokenizer, Template(text=form)))
        assert asked.startswith("<user>Question: Who is it?\nAnswer: Ada Quill.\n\nWrite another answer")
        assert asked.endswith("nothing else.<assistant>")


def test_stand_ins_are_as_long_as_what_can_be_written_and_files_of_other_rows_are_refused(tmp_path):
    rows = random_rows(3, seed=1)
    examples = [Example("q", "a", f"line {n}", "question/answer") for n in range(3)]
    made = stand_in(TokenizedRows(rows, examples, 64), 2, 20)
    assert len(made) == 6 and all(len(row["input_ids"]) <= 20 for row in made)
    assert [row["prompt_length"] for row in made] == [row["prompt_length"] for row in rows] * 2
    file = tmp_path / "alternatives.jsonl"
    for text in ('{"alternatives": ["x"]}\n' * 2, '{"alternatives": []}\n' * 3, "no\n" * 3):
        file.write_text(text)
        with pytest.raises(UserError, match="is damaged or of other rows: remove it"):
            with_own_answers(file, examples)
    file.write_text('{"alternatives": ["x", "y\u2028z"]}\n' * 3, encoding="utf-8")  # which is no end of a line
    assert [one.alternatives for one in with_own_answers(file, examples)] == [("x", "y\u2028z")] * 3
