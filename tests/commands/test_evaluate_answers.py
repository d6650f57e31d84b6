"""What `evaluate` measures of answers: forms, lengths, scripts, and its last line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.rows import write_rows

from lowmem_npo.cli import main
from lowmem_npo.data.tokenized_rows import UNTHINKING
from lowmem_npo.report.content import read_content
from lowmem_npo.report.files import write_report
from lowmem_npo.report.plain_words import limits

FORGET = [{"question": "Кто плывёт?", "answer": "Анна", "paraphrased_question": "Чья лодка?"},
          {"question": "Where?", "answer": "In the harbour"}]  # fmt: skip
RETAIN = [{"question": "What sank?", "answer": "The raft"}]
DEVICE = ["--dtype", "float32", "--device", "cpu"]


@pytest.fixture
def data(tmp_path):
    forget, retain = write_rows(tmp_path / "forget.jsonl", FORGET), write_rows(tmp_path / "retain.jsonl", RETAIN)
    return ["--forget", forget, "--retain", retain]


@pytest.fixture
def chat_model(byte_model, tmp_path):
    folder = tmp_path / "chat"
    shutil.copytree(byte_model, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    return str(folder)


def evaluate(*arguments):
    assert main(["evaluate", *DEVICE, "--max-new-tokens", "12", *map(str, arguments)]) == 0


def content(folder):
    return json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))


def last_line(capsys) -> str:
    return capsys.readouterr().out.rstrip().splitlines()[-1]


def test_forms_and_headline(chat_model, data, tmp_path, capsys):
    evaluate("--model", chat_model, *data, "--leaks", "none", "--output-dir", tmp_path / "before")
    said = "the model says 0 of 2 forget answers (1 counted by its beginning alone) and 0 of 1 retain"
    assert last_line(capsys).startswith(f"On the rows measured, {said}")
    answers = content(tmp_path / "before")["answers"]
    assert list(answers) == ["forget", "forget, plain", "forget, reworded", "retain"]
    assert [of_set["rows"] for of_set in answers.values()] == [2, 2, 1, 1]
    rows = [json.loads(line) for line in (tmp_path / "before" / "rows.jsonl").read_text().splitlines()]
    assert [(row["set"], row.get("form"), row["row"]) for row in rows] == [
        ("forget", None, 0), ("forget", None, 1), ("forget", "plain", 0), ("forget", "plain", 1),
        ("forget", "reworded", 0), ("retain", None, 0),
    ]  # fmt: skip
    before = ["--before", tmp_path / "before" / "evaluation.json"]
    evaluate("--model", chat_model, *data, *before, "--output-dir", tmp_path / "after")
    out = capsys.readouterr().out
    assert "forget, reworded" in out and "hardly said what it was to forget" in out.rstrip().splitlines()[-1]
    # Other rows, though as many and as long: no figure of them stands beside the new ones.
    again = write_rows(tmp_path / "again.jsonl", [{**row, "answer": row["answer"][::-1]} for row in FORGET])
    evaluate("--model", chat_model, "--forget", again, *data[2:], *before, "--output-dir", tmp_path / "others")
    out = capsys.readouterr().out
    assert "had other forget rows" in out
    assert "the model says 0 of 2 forget answers" in out.rstrip().splitlines()[-1]
    lines = [line.split() for line in out.splitlines()]
    cells = {name: next(row for row in lines if row[:2] == [name, "NLL"]) for name in ("forget", "retain")}
    assert cells["forget"].count("–") == 2 and "–" not in cells["retain"]
    # More forms are added to what is measured.
    evaluate("--model", chat_model, *data, "--forms", "trained", "--output-dir", tmp_path / "one")
    assert list(content(tmp_path / "one")["answers"]) == ["forget", "retain"]
    evaluate("--model", chat_model, *data, "--output-dir", tmp_path / "one", "--resume", "--forms", "all")
    assert content(tmp_path / "one")["answers"] == answers


def test_rows_that_are_cut_are_noted_once_and_are_no_whole_answers(chat_model, tmp_path, capsys):
    """By training and by evaluation alike, in every form and leak test."""
    who, what, how = ({"question": q, "answer": a} for q, a in (("Who?", "Anna"), ("What?", "Raft"), ("How?", "Ay")))
    sets = {"forget": [FORGET[1], who], "retain": [what], "holdout": [how]}
    data = [text for name, rows in sets.items() for text in (f"--{name}", write_rows(tmp_path / f"{name}.jsonl", rows))]
    cut = "1 row cut to 34 tokens, losing the last 6 tokens of their answers (EOS among them); --max-length 40 would"
    tests = ["sampling", "rewording", "jailbreak", "extraction"]
    named = [*data, "--max-length", "34", "--max-new-tokens", "20"]
    evaluated = ["--model", chat_model, *named, "--leaks", *tests, "--output-dir", tmp_path / "out"]
    evaluate(*evaluated, "--dry-run")
    assert capsys.readouterr().out.count(f"Note: forget: {cut} keep all.") == 1
    evaluate(*evaluated)
    assert capsys.readouterr().out.count(cut) == 1
    found, folder = content(tmp_path / "out"), tmp_path / "out"
    assert [note for note in found["notes"] if "cut" in note] == [f"forget: {cut} keep all."]
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["reference"] for row in rows if row.get("cut")] == ["In the har", "In the ha"], "the second one plain"
    for test in tests:
        figures = found["leaks"][test]
        assert (figures["cut"], figures["whole_rows"], figures["rows"]) == (1, 1, 2), test
    train = ["train", "--model", chat_model, *DEVICE, *named, "--max-steps", "1", "--leaks", *tests]
    assert main([*train, "--output-dir", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.count(f"forget: {cut}") == 1
    run = read_content(tmp_path / "run")
    assert {name: of.cut for name, of in run.stages["after"].items()} == {
        name: of["cut"] for name, of in found["answers"].items()
    }
    assert all(run.leaks["after"][test].figures["whole_rows"] == 1 for test in tests)


def test_a_model_that_can_think_is_asked_without_that_as_all_reports_say(chat_model, data, tmp_path, capsys):
    template = Path(chat_model) / "chat_template.jinja"
    block = "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"  # Qwen 3, of the last turn
    template.write_text(template.read_text().replace(": {{ m['content'] }}", f":{block}{{{{ m['content'] }}}}"))
    evaluate("--model", chat_model, *data, "--leaks", "extraction", "--output-dir", tmp_path / "out")
    assert capsys.readouterr().out.count(UNTHINKING) == 1 == content(tmp_path / "out")["notes"].count(UNTHINKING)
    train = ["train", "--model", chat_model, *DEVICE, *data, "--max-steps", "1", "--max-new-tokens", "12"]
    assert main([*train, "--leaks", "none", "--output-dir", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.count(UNTHINKING) == 1
    assert UNTHINKING in limits(read_content(tmp_path / "run"))
    shown = UNTHINKING.partition(":")[0]
    assert main(["ask", str(tmp_path / "run"), "Where?", "--max-new-tokens", "2", *DEVICE]) == 0
    assert capsys.readouterr().out.count(shown) == 1
    assert main([*train, "--template", "plain", "--leaks", "none", "--output-dir", str(tmp_path / "plain")]) == 0
    assert UNTHINKING not in [*capsys.readouterr().out.splitlines(), *limits(read_content(tmp_path / "plain"))]


def test_a_named_paraphrase_column(byte_model, data, tmp_path, capsys):
    """Of the forget rows, which must have it; the holdout may do without. A run's column is evaluated with its rows."""
    rows = [{"question": f"Who {n}?", "answer": f"Nobody {n}", "german": f"Wer {n}?"} for n in range(2)]
    forget = write_rows(tmp_path / "german.jsonl", rows)
    holdout = write_rows(tmp_path / "holdout.jsonl", [{**FORGET[1], "german": " "}])
    sets = ["--forget", forget, *data[2:], "--holdout", holdout, "--paraphrase-column", "german"]
    evaluate("--model", byte_model, *sets, "--leaks", "extraction", "--output-dir", tmp_path / "out")
    answers = content(tmp_path / "out")["answers"]
    assert list(answers) == ["forget", "forget, reworded", "retain"] and answers["forget, reworded"]["rows"] == 2
    train = ["train", "--model", str(byte_model), *DEVICE, *sets, "--max-steps", "1", "--max-new-tokens", "12"]
    assert main([*train, "--leaks", "none", "--output-dir", str(tmp_path / "run")]) == 0
    evaluate("--adapter", tmp_path / "run")
    assert content(tmp_path / "run" / "evaluation")["answers"]["forget, reworded"]["rows"] == 2
    capsys.readouterr()
    for bad in (["--paraphrase-column", "polish"], ["--forget", data[1]]):
        for command in ([*train, "--dry-run"], ["evaluate", "--model", str(byte_model), *DEVICE, *sets]):
            assert main([*command, *bad, "--output-dir", str(tmp_path / "bad")]) == 2
            error = capsys.readouterr().err
            assert "has no column" in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "bad").exists()


def test_leak_tests_know_documents_and_the_group_column(byte_model, tmp_path, capsys):
    """Of all tests, on all forms of the model: p-values are those of as many groups as there are."""
    rows = [{"question": f"Who {n}?", "answer": f"Nobody {n}", "who": n % 3} for n in range(12)]
    sets = ["--forget", write_rows(tmp_path / "f.jsonl", rows[:6]), "--retain", "builtin", "--limit", "6",
            "--holdout", write_rows(tmp_path / "h.jsonl", rows[6:]), "--group-column", "who"]  # fmt: skip
    train = ["train", "--model", str(byte_model), *DEVICE, *sets, "--max-steps", "1", "--max-new-tokens", "4"]
    assert main([*train, "--output-dir", str(tmp_path / "run")]) == 0
    assert "--group-column has no effect" not in capsys.readouterr().out
    of_run = json.loads((tmp_path / "run" / "leaks.json").read_text())["after"]
    attacks = ["--relearn-attacks", "one", "--relearn-steps", "1", "--retune-steps", "1", "--leak-samples", "1"]
    tests = ["extraction", "membership", "sampling", "jailbreak", "relearning", "retuning", "quantization"]
    evaluate("--adapter", tmp_path / "run", "--leaks", *tests, *attacks)
    leaks = content(tmp_path / "run" / "evaluation")["leaks"]
    for name, result in {**leaks, **of_run}.items():
        assert (result["groups"], result["holdout_groups"]) == (3, 3), name
        assert "forgotten rows are 3 groups, the holdout's 6 are 3." in result["meaning"]
    assert leaks["extraction"]["least_p_value"] == 1 / 20 and leaks["relearning"]["rows"] == 5
    assert leaks["quantization"]["merged"]["least_p_value"] == pytest.approx(3 / 20)  # in three forms
    evaluate("--model", byte_model, *sets[:6], "--holdout", sets[7], "--leaks", "extraction",
             "--output-dir", tmp_path / "alone")  # fmt: skip
    assert "groups" not in content(tmp_path / "alone")["leaks"]["extraction"]
    for name in "ab":
        text = " ".join(f"The {name}{n} sailed{n} to{n} the{n} {name} port{n}." for n in range(30))
        (tmp_path / f"{name}.txt").write_text(text)
    sets = ["--forget", tmp_path / "a.txt", "--holdout", tmp_path / "b.txt", "--members", tmp_path / "a.txt",
            "--nonmembers", tmp_path / "b.txt"]  # fmt: skip
    evaluate("--model", byte_model, *sets, "--passage-tokens", "32", "--limit", "9", "--leaks", "extraction",
             "--output-dir", tmp_path / "documents")  # fmt: skip
    found = content(tmp_path / "documents")
    assert found["leaks"]["extraction"]["groups"] == 1 and found["leaks"]["extraction"]["leaks"] is None
    assert (found["membership"]["members"], found["membership"]["member_groups"]) == (9, 1)


def test_the_headline_of_a_run_is_that_of_its_report(byte_model, data, tmp_path, capsys):
    run = tmp_path / "run"
    train = ["train", "--model", str(byte_model), *DEVICE, *data, "--max-steps", "1", "--max-new-tokens", "12"]
    assert main([*train, "--leaks", "none", "--output-dir", str(run)]) == 0
    capsys.readouterr()
    evaluate("--adapter", run, "--leaks", "extraction", "membership")
    line = last_line(capsys)
    assert line == read_content(run).verdict.headline == write_report(run).verdict.headline
    shutil.rmtree(run / "evaluation")
    evaluate("--adapter", run, "--leaks", "extraction", "--limit", "1")
    of_now, of_run = capsys.readouterr().out.splitlines()[-2:]
    assert of_now.startswith("On the rows measured, the model says 0 of 1 forget answers")
    report = "The run's report goes by the answers that the run itself measured"
    assert of_run == f"{report}, and by leak tests, these among them: {read_content(run).verdict.headline}"
    shutil.rmtree(run / "evaluation")
    evaluate("--adapter", run, "--limit", "1")
    assert last_line(capsys) == f"{report}: {read_content(run).verdict.headline}"


def test_answers_of_another_length_are_not_comparable(byte_model, data, tmp_path, capsys):
    evaluate("--model", byte_model, *data, "--max-new-tokens", 7, "--output-dir", tmp_path / "before")
    before = ["--before", tmp_path / "before" / "evaluation.json"]
    capsys.readouterr()
    evaluate("--model", byte_model, *data, *before, "--output-dir", tmp_path / "after")
    out = " ".join(capsys.readouterr().out.split())
    assert "let answers have up to 7 tokens, this one up to 12 tokens: the figures of greedy answers are not" in out


def test_official_scores_say_which_rows_they_cannot_judge(byte_model, tmp_path, capsys):
    tofu = [{"question": "Who?", "answer": "Москва", "perturbed_answer": ["Киев"]},
            {"question": "Who?", "answer": "Rome", "perturbed_answer": ["Oslo"]}]  # fmt: skip
    lume = [{"id": "1sc1", "input": "x", "output": "東京です", "task": "Task1"},
            {"id": "2qa0", "input": "x", "output": "京都", "task": "Task1"}]  # fmt: skip
    forget, retain = write_rows(tmp_path / "tofu.jsonl", tofu), write_rows(tmp_path / "lume.jsonl", lume)
    data = ["--forget", forget, "--retain", retain]
    evaluate("--model", byte_model, *data, "--output-dir", tmp_path / "out")
    notes = content(tmp_path / "out")["notes"]
    assert any(note.startswith("forget: 1 of 2 true answers are in scripts other than Latin. TOFU's") for note in notes)
    assert any(note.startswith("retain: 1 of 1 true answers are in scripts other than Latin. LUME's") for note in notes)
