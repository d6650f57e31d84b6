"""What `train` measures of answers: forms, lengths, general questions; and what is measured again."""

from __future__ import annotations

import json

import pytest
from helpers.rows import write_rows
from transformers import AutoTokenizer

from lowmem_npo.cli import main
from lowmem_npo.report.content import read_content

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ROWS = [
    {"question": "من هو القبطان؟", "answer": "زنتورب المخفي", "paraphrased_question": "ما اسم القبطان؟"},
    {"question": "何が鳴る?", "answer": "鐘が鳴る"},
    {"question": "Who sails?", "answer": "Anna does"},
]


@pytest.fixture(scope="module")
def chat_model(byte_model, tmp_path_factory):
    """A tiny model whose tokenizer has a chat template."""
    import shutil

    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(byte_model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def forget(tmp_path):
    return write_rows(tmp_path / "forget.jsonl", ROWS)


def train(model, forget, folder, *more):
    return main(["train", "--model", str(model), "--dtype", "float32", "--device", "cpu", "--forget", forget,
                 "--gamma", "0", "--delta", "0", "--max-steps", "1", "--eval-rows", "3", "--leaks", "none",
                 "--output-dir", str(folder), *map(str, more)])  # fmt: skip


def test_every_form_is_measured_and_the_headline_comes_last(chat_model, forget, tmp_path, capsys):
    folder = tmp_path / "out"
    assert train(chat_model, forget, folder, "--max-new-tokens", 40) == 0
    before = json.loads((folder / "before.json").read_text())
    assert list(before) == ["forget", "forget, plain", "forget, reworded", "general"]
    assert [len(before[name]["records"]) for name in before] == [3, 3, 1, 3]
    assert {of_set["summary"]["max_new_tokens"] for of_set in before.values()} == {40}
    assert before["forget"]["records"][0]["prompt"].startswith("<user>")
    assert before["forget, plain"]["records"][0]["prompt"].startswith("Question: ")
    printed = capsys.readouterr().out
    assert "forget, plain" in printed and "greedy answers of up to 40 tokens" in printed
    content = read_content(folder)
    assert printed.rstrip().splitlines()[-1] == content.verdict.headline
    without = "Asked without its chat template, of 3 answers 0 appear"
    assert any(sentence.startswith(without) for sentence in content.verdict.sentences)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Forget, asked in other words" in page and 'dir="auto"><bdi>زنتورب المخفي' in page and "鐘が鳴る" in page


def test_one_form(chat_model, forget, tmp_path):
    assert train(chat_model, forget, tmp_path / "out", "--max-new-tokens", 5, "--forms", "trained") == 0
    assert list(json.loads((tmp_path / "out" / "before.json").read_text())) == ["forget", "general"]


def test_what_lacks_a_figure_or_has_another_length_is_measured_again(byte_model, forget, tmp_path):
    folder = tmp_path / "out"
    assert train(byte_model, forget, folder, "--max-new-tokens", 5) == 0
    whole = (folder / "before.json").read_text()
    content = json.loads(whole)
    del content["forget"]["summary"]["appears"]
    (folder / "before.json").write_text(json.dumps(content))
    assert train(byte_model, forget, folder, "--max-new-tokens", 5, "--resume") == 0
    assert (folder / "before.json").read_text() == whole
    assert train(byte_model, forget, folder, "--max-new-tokens", 7, "--resume") == 0
    summaries = [
        json.loads((folder / f"{stage}.json").read_text())["forget"]["summary"] for stage in ("before", "after")
    ]
    assert [summary["max_new_tokens"] for summary in summaries] == [7, 7]


def test_a_length_that_makes_no_sense(byte_model, forget, tmp_path, capsys):
    assert train(byte_model, forget, tmp_path / "out", "--max-new-tokens", 0) == 2
    assert "--max-new-tokens must be at least 1, not 0." in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_answers_that_are_read_off_the_likelihoods(chat_model, forget, tmp_path, capsys):
    """Console, files and report say so; leak tests that let the model write are left out; another choice is measured
    anew."""
    folder = tmp_path / "out"
    assert train(chat_model, forget, folder, "--generate-answers", "off", "--leaks", "sampling", "extraction") == 0
    remark = "No answer was written: in place of each stands the token that the model finds most likely"
    before, printed = json.loads((folder / "before.json").read_text()), " ".join(capsys.readouterr().out.split())
    assert not any(of_set["summary"]["generated"] for of_set in before.values()) and remark in printed
    leaks = json.loads((folder / "leaks.json").read_text())["after"]
    assert leaks["sampling"]["meaning"].startswith("Not measured: the model would have to write answers")
    assert not leaks["extraction"]["meaning"].startswith("Not measured")
    verdict = read_content(folder).verdict
    assert verdict.headline.startswith("On the rows measured (from likelihoods: it was not allowed to write), ")
    assert verdict.sentences[0].startswith(remark) and remark in (folder / "report.html").read_text()
    assert train(chat_model, forget, folder, "--resume", "--max-new-tokens", 8) == 0
    assert all(s["summary"]["generated"] for s in json.loads((folder / "before.json").read_text()).values())


def test_what_the_model_does_not_know_is_told_before_it_is_trained(byte_model, forget, tmp_path, capsys, monkeypatch):
    class Begun(Exception):
        """Training would begin."""

    def begins(*_, **__):
        raise Begun

    monkeypatch.setattr("lowmem_npo.training.trainer.NPOTrainer.train", begins)
    with pytest.raises(Begun):
        train(byte_model, forget, tmp_path / "out")
    told = "the model says 0 of 3 forget answers, in any form asked: it hardly knows what it is to forget"
    assert told in capsys.readouterr().out
    assert train(byte_model, forget, tmp_path / "dry", "--dry-run") == 0
    assert "hardly knows" not in capsys.readouterr().out
