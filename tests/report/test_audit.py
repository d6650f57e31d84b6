"""The audit record: hashes that others can check without this code, and no text."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime, timezone
from importlib.metadata import version

import pytest
import yaml
from helpers.reported_run import FORGET, RETAIN, train
from helpers.rows import write_rows

from lowmem_npo.cli import main
from lowmem_npo.report.audit import ALGORITHM, find_rows, row_hash


def audit_of(folder) -> dict:
    return json.loads((folder / "audit.json").read_text(encoding="utf-8"))


def hash_by_hand(salt: str, prompt: str, answer: str) -> str:
    """As ALGORITHM says, without the code under test."""

    def quoted(text: str) -> str:
        return json.dumps(text)  # ASCII, escaped

    return hashlib.sha256(
        bytes.fromhex(salt) + f'{{"answer":{quoted(answer)},"prompt":{quoted(prompt)}}}'.encode()
    ).hexdigest()


def test_every_forget_row_can_be_checked_by_hand(run):
    rows = audit_of(run)["forget_rows"]
    assert rows["sha256"] == [hash_by_hand(rows["salt"], row["question"], row["answer"]) for row in FORGET]
    assert len(rows["salt"]) == 32 and '{"answer":...,"prompt":...}' in rows["algorithm"] == ALGORITHM


def test_the_hash_depends_on_salt_and_on_every_letter():
    from lowmem_npo.data import Example

    base = Example("Who?", "Nobody.", "here", "question/answer")
    others = [
        Example("Who", "?Nobody.", "here", "question/answer"),
        Example("Who?", "Nobody", "here", "question/answer"),
        Example(None, "Who?Nobody.", "here", "text"),
        Example("Who?", "Nobody.", "here", "messages", messages=({"role": "user", "content": "Who?"},)),
    ]
    hashes = {row_hash(base, "00"), row_hash(base, "01"), *(row_hash(other, "00") for other in others)}
    assert len(hashes) == 6
    assert row_hash(Example("Who?", "Nobody.", "elsewhere", "input/output", id="7"), "00") == row_hash(base, "00")


def test_files_settings_versions_and_times(run, data, byte_model):
    audit = audit_of(run)
    for part, rows in (("forget", FORGET), ("retain", RETAIN)):
        record = audit["data"][part]
        assert record["sha256"] == hashlib.sha256((data / f"{part}.jsonl").read_bytes()).hexdigest()
        assert record["rows"] == len(rows) and record["source"] == str(data / f"{part}.jsonl")
        assert record["schema"] == "question/answer" and record["system_prompts"] == 0
    weights = (run / "adapter_model.safetensors").read_bytes()
    assert audit["adapter"] == {
        "file": "adapter_model.safetensors",
        "sha256": hashlib.sha256(weights).hexdigest(),
        "bytes": len(weights),
        "of_step": 3,
    }
    assert audit["configuration"] == yaml.safe_load((run / "run.yaml").read_text())
    assert audit["seed"] == 42 and audit["optimizer_steps"] == 3
    assert audit["model"]["name"] == str(byte_model) and audit["model"]["class"] == "OlmoForCausalLM"
    assert audit["model"]["vocabulary"] == 258 and audit["model"]["weights"] == "float32"
    (session,) = audit["sessions"]
    for package in ("torch", "transformers", "peft", "bitsandbytes"):
        assert session["versions"][package] == version(package)
    began, ended = (datetime.fromisoformat(session[key]) for key in ("started", "ended"))
    assert began <= ended <= datetime.now(timezone.utc) and session["last_step"] == 3


def test_the_models_fingerprint_is_the_models(run, byte_model, data, tmp_path):
    """The same weights give the same fingerprint, whatever is trained on them; other weights give another."""
    from helpers.tiny_models import tiny_model
    from transformers import AutoTokenizer

    known = audit_of(run)["model"]["weights_fingerprint"]
    tiny_model("olmo", 258, seed=1).save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(byte_model).save_pretrained(tmp_path / "other")
    quick = ("--max-steps", 1, "--eval-rows", 0)
    assert audit_of(train(tmp_path / "a", byte_model, data, *quick))["model"]["weights_fingerprint"] == known
    assert audit_of(train(tmp_path / "b", tmp_path / "other", data, *quick))["model"]["weights_fingerprint"] != known


def test_rows_can_be_proved(run, tmp_path, capsys):
    chosen = [FORGET[3], {"question": "Who guards the amber vault?", "answer": "Somebody else."}, FORGET[0]]
    rows = write_rows(tmp_path / "rows.jsonl", chosen)
    assert [place for _, place in find_rows(run, rows)] == [4, None, 1]
    with pytest.raises(SystemExit) as stop:
        main(["report", str(run), "--prove", rows])
    assert stop.value.code == 1
    printed = capsys.readouterr().out
    assert "line 1: forget row 4" in printed and "line 2: not among" in printed and "2 of 3 rows" in printed
    assert main(["report", str(run), "--prove", write_rows(tmp_path / "all.jsonl", FORGET)]) == 0


def test_a_resumed_run_keeps_its_salt_and_counts_its_sessions(byte_model, data, tmp_path, capsys):
    mine = tmp_path / "data"
    mine.mkdir()
    write_rows(mine / "forget.jsonl", FORGET), write_rows(mine / "retain.jsonl", RETAIN)
    settings = ("--eval-rows", 0, "--save-steps", 1)
    folder = train(tmp_path / "out", byte_model, mine, *settings, "--max-steps", 1)
    first = audit_of(folder)
    train(folder, byte_model, mine, *settings, "--max-steps", 2, "--resume")
    second = audit_of(folder)
    assert second["forget_rows"] == first["forget_rows"]
    assert [session["last_step"] for session in second["sessions"]] == [1, 2] and second["optimizer_steps"] == 2
    assert "2 sessions" in (folder / "report.html").read_text(encoding="utf-8")
    assert [session["training"]["steps"] for session in second["sessions"]] == [1, 1]
    train(folder, byte_model, mine, *settings, "--max-steps", 2, "--resume")  # which trains nothing
    took = second["sessions"][-1]["training"]["seconds_per_step"]
    second = audit_of(folder)
    assert second["sessions"][-1]["training"]["seconds_per_step"] is None
    assert f"A step took {took:.3g} s" in (folder / "report.html").read_text(encoding="utf-8")

    write_rows(mine / "forget.jsonl", [*FORGET[:-1], {"question": "Other?", "answer": "Row."}])
    arguments = ["--model", byte_model, "--forget", mine / "forget.jsonl", "--retain", mine / "retain.jsonl"]
    arguments += ["--dtype", "float32", "--device", "cpu", "--batch-size", 2, "--output-dir", folder, *settings]
    capsys.readouterr()
    assert main(["train", *map(str, arguments), "--max-steps", "3", "--resume"]) == 2
    assert "the forget rows have changed" in capsys.readouterr().err
    assert audit_of(folder) == second


PEOPLE = [
    {"question": f"What does {name} keep?", "answer": f"A {kept}.", "person": name, "alt": f"No {kept}."}
    for name in ("Ada", "Bo", "Cy", "Di")
    for kept in ("heron", "marmot")
]
UNSEEN = [{"question": "Who is out?", "answer": "The tide."}]


def resumes(folder, model, data, *options):
    arguments = ["--model", model, "--forget", data / "forget.jsonl", "--retain", data / "retain.jsonl"]
    arguments += ["--holdout", data / "holdout.jsonl", "--dtype", "float32", "--device", "cpu", "--batch-size", 2]
    return main(["train", *map(str, [*arguments, *options, "--output-dir", folder, "--resume"])])


@pytest.mark.parametrize(
    "file, row, column, value, named",
    [
        ("forget", 7, "person", "Ada", "folds of the forget rows (--layered, by --group-column person)"),
        ("forget", 7, "alt", "No lynx.", "other answers to the forget rows (--alternative-column alt)"),
        ("forget", 7, "answer", "A lynx.", "forget rows"),
        ("retain", 0, "answer", "In the park.", "retain rows"),
        ("holdout", 0, "answer", "The cat.", "holdout rows"),
        ("forget", 7, "in other words", "Which beast?", "paraphrases"),
        ("holdout", 0, "in other words", "Who was it?", "paraphrases"),
    ],
)
def test_a_run_is_not_resumed_with_other_rows_groups_or_answers(
    file, row, column, value, named, byte_model, tmp_path, capsys
):
    sets = {"forget": PEOPLE, "retain": RETAIN, "holdout": UNSEEN}
    for name in ("forget", "holdout"):
        sets[name] = [{**row, "in other words": f"Say: {row['question']}"} for row in sets[name]]
    for name, rows in sets.items():
        write_rows(tmp_path / f"{name}.jsonl", rows)
    options = ["--layered", 2, "--group-column", "person", "--forget-term", "dpo", "--alternative-column", "alt"]
    options += ["--paraphrase-column", "in other words"]
    options += ["--epochs", 1, "--eval-rows", 0, "--leaks", "none", "--holdout", tmp_path / "holdout.jsonl"]
    folder = train(tmp_path / "run", byte_model, tmp_path, *options)
    audit = audit_of(folder)
    assert sorted(sum(audit["forget_rows"]["folds"], [])) == list(range(8))
    sets[file] = [dict(one) for one in sets[file]]
    sets[file][row][column] = value
    write_rows(tmp_path / f"{file}.jsonl", sets[file])
    capsys.readouterr()
    assert resumes(folder, byte_model, tmp_path, *options) == 2
    assert f"--resume: the {named} have changed since the run in" in capsys.readouterr().err
    assert audit_of(folder) == audit


def test_a_run_is_not_resumed_with_another_holdout_row_in_either_half(byte_model, tmp_path, capsys):
    """One half sets the levels up to which rows are forgotten, the other is what the run is judged by."""
    unseen = [{"question": f"Who is {name}?", "answer": f"The {name}."} for name in ("fox", "owl", "elk", "bee")]
    for name, rows in {"forget": PEOPLE, "retain": RETAIN, "holdout": unseen}.items():
        write_rows(tmp_path / f"{name}.jsonl", rows)
    options = ["--forget-level", "holdout", "--epochs", 1, "--eval-rows", 0, "--leaks", "none"]
    folder = train(tmp_path / "run", byte_model, tmp_path, *options, "--holdout", tmp_path / "holdout.jsonl")
    audit = audit_of(folder)
    for changed in range(4):
        rows = [{**row, "answer": "Nobody."} if at == changed else row for at, row in enumerate(unseen)]
        write_rows(tmp_path / "holdout.jsonl", rows)
        assert resumes(folder, byte_model, tmp_path, *options) == 2
        assert "--resume: the holdout rows" in capsys.readouterr().err
    assert audit_of(folder) == audit
    write_rows(tmp_path / "holdout.jsonl", unseen)
    assert resumes(folder, byte_model, tmp_path, *options) == 0


def test_a_run_whose_groups_have_other_names_is_resumed_and_one_whose_record_lacks_something_is_not(
    byte_model, tmp_path, capsys
):
    for name, rows in {"forget": PEOPLE, "retain": RETAIN, "holdout": UNSEEN}.items():
        write_rows(tmp_path / f"{name}.jsonl", rows)
    options = ["--layered", 2, "--group-column", "person", "--epochs", 1, "--eval-rows", 0, "--leaks", "none"]
    folder = train(tmp_path / "run", byte_model, tmp_path, *options, "--holdout", tmp_path / "holdout.jsonl")
    write_rows(tmp_path / "forget.jsonl", [{**row, "person": f"{row['person']} Quill"} for row in PEOPLE])
    assert resumes(folder, byte_model, tmp_path, *options) == 0
    for name in ("folds", "alternatives", "paraphrases"):
        audit = audit_of(folder)
        record = {key: value for key, value in audit["forget_rows"].items() if key != name}
        (folder / "audit.json").write_text(json.dumps({**audit, "forget_rows": record}))
        assert resumes(folder, byte_model, tmp_path, *options) == 2
        assert f"cannot be read as the audit record of a run ({name} is missing)" in capsys.readouterr().err
        (folder / "audit.json").write_text(json.dumps(audit))
    without = {
        part: {name: of for name, of in record.items() if name != "tokenised"} for part, record in audit["data"].items()
    }
    (folder / "audit.json").write_text(json.dumps({**audit, "data": without}))
    assert resumes(folder, byte_model, tmp_path, *options) == 2
    assert "(tokenised is missing)" in capsys.readouterr().err


def test_a_damaged_or_missing_record_is_reported(own_run, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", FORGET)
    audit = audit_of(own_run)
    for damaged in ("{", "7", audit | {"data": {"retain": 7}}, audit | {"forget_rows": {"salt": [1], "sha256": []}}):
        (own_run / "audit.json").write_text(damaged if isinstance(damaged, str) else json.dumps(damaged))
        assert main(["report", str(own_run)]) == 2
        assert "cannot be read as the audit record" in capsys.readouterr().err
    (own_run / "audit.json").unlink()
    assert main(["report", str(own_run), "--prove", rows]) == 2
    assert main(["report", str(own_run)]) == 0
    assert "no audit record" in (own_run / "report.html").read_text(encoding="utf-8")
