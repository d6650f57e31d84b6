"""`lowmem-npo ask`: both answers of one loaded model, as generation gives them one by one."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from lowmem_npo.cli import main
from lowmem_npo.commands.merge.options import MergeConfig
from lowmem_npo.commands.merge.run import merge
from lowmem_npo.run_directory import RunFiles

CHATML = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def run(small_demo):
    """The directory of a run that has forgotten facts which its base recites."""
    result, _ = small_demo
    return result.directory / "unlearned"


@pytest.fixture(scope="module")
def facts(run):
    records = json.loads((run / "before.json").read_text())["forget"]["records"]
    known = [record for record in records if record["exact_match"]]
    assert len(known) >= 3
    return known[:3]


def question_of(record):
    return record["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:")


def asked(*arguments, capsys):
    assert main(["ask", *map(str, arguments)]) == 0
    return capsys.readouterr()


def greedy(model, tokenizer, text, new=48):
    """The definition: one token after another, without a cache."""
    ids, answer = tokenizer(text).input_ids, []
    with torch.no_grad():
        while len(answer) < new:
            token = model(input_ids=torch.tensor([ids + answer])).logits[0, -1].argmax().item()
            if token == tokenizer.eos_token_id:
                break
            answer.append(token)
    return tokenizer.decode(answer, skip_special_tokens=True).strip()


def test_the_original_still_knows_what_the_other_has_forgotten(run, facts, capsys):
    questions = [question_of(record) for record in facts]
    printed = asked(run, *questions, "--json", "--max-new-tokens", 48, capsys=capsys)
    answers = [json.loads(line) for line in printed.out.splitlines()]
    base = AutoModelForCausalLM.from_pretrained(run.parent / "base")
    tokenizer = AutoTokenizer.from_pretrained(run.parent / "base")
    texts = [f"Question: {question}\nAnswer:" for question in questions]
    original = [greedy(base, tokenizer, text) for text in texts]
    unlearned = [greedy(PeftModel.from_pretrained(base, run), tokenizer, text) for text in texts]
    assert [answer["question"] for answer in answers] == questions
    assert [answer["original"] for answer in answers] == original == [record["reference"] for record in facts]
    begins = [text[:8] for text in unlearned]  # what it goes on with is nearly tied, and differs between processors
    assert [answer["unlearned"][:8] for answer in answers] == begins and unlearned != original
    assert "written as 'Question: {prompt}" in printed.err  # the remark is not among the objects


def test_in_a_terminal_and_from_a_file(run, facts, tmp_path, capsys):
    question, file = question_of(facts[0]), tmp_path / "questions.txt"
    typed = asked(run, question, "--max-new-tokens", 48, capsys=capsys).out
    assert f"original:  {facts[0]['reference']}\n" in typed and "unlearned: " in typed
    file.write_text(f"{question}\n\n{question_of(facts[1])}\n", encoding="utf-8")
    listed = asked(run, "--file", file, "--max-new-tokens", 48, capsys=capsys).out
    for record in facts[:2]:
        assert f"{question_of(record)}\noriginal:  {record['reference']}\nunlearned: " in listed


@pytest.mark.parametrize("name", ["q.csv", "q.txt", "q.json.gz"])
def test_of_a_table_the_questions_are_asked_as_if_they_were_typed(name, run, facts, tmp_path, capsys):
    questions, file = [question_of(record) for record in facts], tmp_path / name
    rows = [{"Question": question, "answer": "not to be shown"} for question in questions]
    text = "Question;answer\n" + "".join(";".join(row.values()) + "\n" for row in rows)
    file.write_bytes(gzip.compress(json.dumps(rows).encode()) if name.endswith(".gz") else text.encode())
    how = ["--json", "--max-new-tokens", 8]
    printed = asked(run, "--file", file, *how, capsys=capsys)
    assert printed.out == asked(run, *questions, *how, capsys=capsys).out
    assert f"The questions are the column question of {file}; the model is not shown the answers." in printed.err


def test_a_table_is_read_by_the_columns_of_the_run(run, facts, tmp_path, capsys):
    copy, question = tmp_path / "run", question_of(facts[0])
    shutil.copytree(run, copy)
    settings = yaml.safe_load((copy / "run.yaml").read_text()) | {"prompt_column": "frage", "answer_column": "antwort"}
    (copy / "run.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "q.jsonl").write_text(json.dumps({"frage": question, "antwort": "hidden"}))
    how = ["--json", "--max-new-tokens", 8]
    printed = asked(copy, "--file", tmp_path / "q.jsonl", *how, capsys=capsys)
    assert json.loads(printed.out)["question"] == question and "the column frage of" in printed.err
    long = " ".join([question] * 40)  # longer than the name of any file
    assert json.loads(asked(run, long, *how, capsys=capsys).out)["question"] == long


def test_of_a_conversation_in_a_table_all_but_the_answer_is_shown(chat_run, tmp_path, capsys):
    copy, folder, tokenizer = chat_run
    turns = [("system", "Be kind."), ("user", "Who?"), ("assistant", "He."), ("user", "And?"), ("assistant", "Hidden.")]
    turns = [{"role": role, "content": content} for role, content in turns]
    (tmp_path / "q.jsonl").write_text(json.dumps({"messages": turns}))
    printed = asked(copy, "--file", tmp_path / "q.jsonl", "--json", "--max-new-tokens", 12, capsys=capsys)
    text = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
    answer = greedy(AutoModelForCausalLM.from_pretrained(folder), tokenizer, text, 12)
    assert json.loads(printed.out).items() >= {"question": "And?", "original": answer}.items()
    assert "the column messages of" in printed.err


def test_the_run_is_named_as_in_other_commands(run, facts, capsys):
    question, how = question_of(facts[0]), ["--json", "--max-new-tokens", 8]
    by_place = asked(run, question, *how, capsys=capsys).out
    assert asked("--adapter", run, *how, question, capsys=capsys).out == by_place
    assert asked(question, *how, f"--adapter={run}", capsys=capsys).out == by_place


def with_schema(run, schema):
    """The run as if its forget rows had had this schema."""
    audit = json.loads(RunFiles(run).audit.read_text())
    audit["data"]["forget"]["schema"] = schema
    RunFiles(run).audit.write_text(json.dumps(audit))


def test_a_base_model_is_asked_in_the_form_of_the_run(run, facts, tmp_path, capsys):
    """Rows of other columns are trained bare, so that `Question: ` before one would be a second."""
    copy, question = tmp_path / "run", question_of(facts[0])
    shutil.copytree(run, copy)
    for schema in ("asked/told", None):  # None: texts
        with_schema(copy, schema)
        prompt = f"Question: {question}\nAnswer:" if schema else question
        printed = asked(copy, prompt, "--json", "--max-new-tokens", 48, capsys=capsys)
        assert json.loads(printed.out)["original"] == facts[0]["reference"]
        assert ("written as '{prompt}'" in printed.err) == bool(schema)


def test_a_merged_model_has_one_answer(run, facts, tmp_path, capsys):
    merge(MergeConfig(str(run), str(tmp_path / "merged"), dtype="stored"), say=lambda line: None)
    question = [question_of(facts[0]), "--json", "--max-new-tokens", 48]
    both, one = (json.loads(asked(m, *question, capsys=capsys).out) for m in (run, tmp_path / "merged"))
    assert one == {"question": both["question"], "answer": both["unlearned"]}


@pytest.fixture(scope="module")
def chat_run(run, tmp_path_factory):
    """The run as if its base were a chat model."""
    base, copy = (tmp_path_factory.mktemp(name) / name for name in ("base", "unlearned"))
    shutil.copytree(run.parent / "base", base)
    shutil.copytree(run, copy)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = CHATML.replace("<eos>", tokenizer.eos_token)
    tokenizer.save_pretrained(base)
    settings = (copy / "adapter_config.json").read_text()
    (copy / "adapter_config.json").write_text(settings.replace(str(run.parent / "base"), str(base)))
    return copy, base, tokenizer


@pytest.mark.parametrize(
    "form, schema, template", [("plain", "question/answer", "Question: {prompt}"), ("auto", "input/output", "{prompt}")]
)
def test_a_chat_model_is_asked_plainly_where_the_run_wrote_so(chat_run, form, schema, template, tmp_path, capsys):
    copy, _, _ = chat_run
    run = tmp_path / "run"
    shutil.copytree(copy, run)
    with_schema(run, schema)
    RunFiles(run).run_yaml.write_text(json.dumps(RunFiles(run).settings() | {"template": form}))
    assert f"written as '{template}" in asked(run, "Who?", "--json", "--max-new-tokens", 1, capsys=capsys).err


@pytest.mark.parametrize("brought, told", [(1, "a system prompt"), (3, "3 system prompts"), (0, ""), (None, "")])
def test_a_typed_question_lacks_the_system_prompt_that_rows_had(chat_run, brought, told, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(chat_run[0], run)
    audit = json.loads(RunFiles(run).audit.read_text())
    audit["data"]["forget"]["system_prompts"] = brought
    RunFiles(run).audit.write_text(json.dumps(audit))
    how = ["Who?", "--json", "--max-new-tokens", 1]
    line = f"Forgotten rows have {told} of their own, which a typed question lacks: give it with --system."
    assert ("give it with --system" in (noted := asked(run, *how, capsys=capsys).err)) == bool(told)
    assert not told or line in noted
    assert "give it with" not in asked(run, *how, "--system", "Be kind.", capsys=capsys).err


def test_a_conversation_is_remembered(chat_run, monkeypatch, capsys):
    """Each side has its own history; /new begins another."""
    copy, folder, tokenizer = chat_run
    monkeypatch.setattr("sys.stdin", io.StringIO("Who is he?\nAnd she?\n/new\nAnd she?\n"))
    printed = asked(copy, "--max-new-tokens", 12, "--system", "Be kind.", capsys=capsys).out
    assert "written with the model's chat template" in printed and "remembered" in printed

    base = AutoModelForCausalLM.from_pretrained(folder)
    system, expected = {"role": "system", "content": "Be kind."}, []
    for conversation in (["Who is he?", "And she?"], ["And she?"]):
        histories = {"original": [system], "unlearned": [system]}
        for question in conversation:
            for side, turns in histories.items():
                model = base if side == "original" else PeftModel.from_pretrained(base, copy)
                turns.append({"role": "user", "content": question})
                text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
                answer = greedy(model, tokenizer, text, 12)
                turns.append({"role": "assistant", "content": answer})
                expected.append(f"{side}:".ljust(11) + answer)
                if side == "unlearned":
                    base = model.unload()
    lines = [line.removeprefix("> ").rstrip() for line in printed.splitlines()]  # after `input`'s own words
    lines = [line for line in lines if line.startswith(("original", "unlearned"))]
    assert lines == [line.splitlines()[0].rstrip() for line in expected]


def test_drawn_answers_follow_their_seed(run, facts, capsys):
    def drawn(seed):
        options = ["--temperature", 1.5, "--seed", seed, "--json", "--max-new-tokens", 12]
        return asked(run, question_of(facts[0]), *options, capsys=capsys).out

    assert drawn(1) == drawn(1) != drawn(2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere", "Who?"], "nowhere"),
        (["{empty}", "Who?"], "holds no adapter"),
        (["{run}", "Who?", "--file", "q.txt"], "given twice"),
        (["{run}", "--file", "nowhere.txt"], "nowhere.txt' cannot be read"),
        (["{run}", "--file", "/dev/zero"], "'/dev/zero' has more than 10,000,000 bytes, which no questions have"),
        (["{run}", "--file", "{empty}/pipe"], "nothing to ask"),
        (["{run}", "--file", "{empty}/wide.csv"], "wide.csv has the columns Who?, Why?, which are no questions with"),
        (["{run}", "--file", "{empty}/text.jsonl"], "text.jsonl, line 1 is a text, which holds no question"),
        (["{run}", "--json"], "nothing to ask"),
        (["--model", "{run}", "Who is Bo?"], "the run, or a model, is named before the questions"),
        (["{empty}", "Who?", "--adapter", "{run}"], "is a directory, not a question"),
        (["{run}", "Who?", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["{run}", "Who?", "--temperature", "-1"], "--temperature"),
        (["{run}", "Who?", "--template", "chat"], "has no chat template"),
    ],
)
def test_mistakes_end_in_one_sentence(arguments, message, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    os.mkfifo(tmp_path / "pipe")  # nobody writes into it
    (tmp_path / "wide.csv").write_text("Who?,Why?\nHe,So\n")
    (tmp_path / "text.jsonl").write_text('{"text": "He was born there."}')
    assert main(["ask", *(a.format(run=run, empty=tmp_path) for a in arguments)]) == 2
    error = capsys.readouterr().err.splitlines()
    assert message in error[-1] and "Traceback" not in "".join(error)


def test_what_the_model_cannot_take_does_not_end_the_conversation(byte_model, tmp_path, monkeypatch, capsys):
    """Learnt positions; a token beyond the embedding."""
    config = GPT2Config(vocab_size=258, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(byte_model)
    tokenizer.add_tokens(["<far>"])
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{'Why' * 30}?\nWho is <far>?\nWho?\n"))
    out = asked(tmp_path, "--max-new-tokens", 3, capsys=capsys).out
    assert "has learnt only 64 positions: ask a shorter question." in out
    assert "The question has the token '<far>' of id" in out
    assert out.count("answer:") == 1
    assert main(["ask", str(tmp_path), "Why" * 30]) == 2
    assert "ask a shorter question" in capsys.readouterr().err


def test_typed_in_a_real_terminal(run, facts):
    """Standard input that ends is the end of the conversation."""
    question = question_of(facts[0])
    command = [sys.executable, "-m", "lowmem_npo", "ask", str(run), "--max-new-tokens", "48"]
    process = subprocess.run(command, input=f"{question}\n", capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    assert f"original:  {facts[0]['reference']}\n" in process.stdout
