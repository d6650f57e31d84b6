"""`lowmem-npo evaluate` as a user runs it: real models and files; interrupted, resumed, and with bad input."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from helpers.evaluating import NAMES, evaluate, fails, lume_files, result
from helpers.rows import write_rows
from helpers.tiny_models import tiny_model
from rouge_score.rouge_scorer import RougeScorer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_npo.cli import main
from lowmem_npo.evaluation.benchmarks import lm_eval as harness
from lowmem_npo.evaluation.comparing import differences
from lowmem_npo.evaluation.directory import EvaluationDirectory, as_json, settings_of
from lowmem_npo.evaluation.scoring import scorer as measuring
from lowmem_npo.evaluation.settings import EvaluationConfig
from lowmem_npo.files import json_sha256


@pytest.fixture
def files(tmp_path):
    return lume_files(tmp_path)


@pytest.fixture(scope="module")
def brief_model(byte_model, tmp_path_factory):
    """A byte model that prefers a few letters, the space and the end of the sequence: short answers with words."""
    tokenizer = AutoTokenizer.from_pretrained(byte_model)
    model = tiny_model("olmo", len(tokenizer), seed=1)
    liked = [tokenizer.eos_token_id, *(tokenizer.convert_tokens_to_ids(letter) for letter in "aotĠ")]
    with torch.no_grad():
        model.lm_head.weight[liked] *= 8
    folder = tmp_path_factory.mktemp("brief")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def continuation(folder, prompt):
    """The greedy text of one prompt, through transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=256, do_sample=False,
                         pad_token_id=tokenizer.eos_token_id)  # fmt: skip
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def scores_by_the_official_steps(folder, path):
    """Id of the row -> its score, one prompt at a time."""
    rouge, scores = RougeScorer(["rougeL"], use_stemmer=True), {}
    for row in map(json.loads, path.read_text().splitlines()):
        text = continuation(folder, row["input"])
        if row["id"].endswith("sc1"):
            scores[row["id"]] = rouge.score(row["output"], text)["rougeL"].recall
        else:
            scores[row["id"]] = float(row["output"].strip().lower() == text.strip().lower())
    return scores


def test_lume_from_files_to_official_result(brief_model, files, capsys):
    rows = [json.loads(line) for line in (files / "retain.jsonl").read_text().splitlines()]
    rows[1]["output"] = f" {continuation(brief_model, rows[1]['input']).upper()} "  # Task1's question: answered
    write_rows(files / "retain.jsonl", rows)
    assert evaluate(files, brief_model, "--members", str(files / "members.jsonl"),
                    "--nonmembers", str(files / "others.jsonl")) == 0  # fmt: skip
    printed, content = capsys.readouterr().out, result(files)
    official = result(files, name="evaluation_results.jsonl")
    assert official == content["lume"]
    for part in ("forget", "retain"):
        wanted = scores_by_the_official_steps(brief_model, files / f"{part}.jsonl")
        rows = [json.loads(line) for line in (files / "out" / "rows.jsonl").read_text().splitlines()]
        assert {r["id"]: r["score"] for r in rows if r["set"] == part} == pytest.approx(wanted)
        assert any(0 < score < 1 for score in wanted.values())  # a word or two by chance
        block = official[f"{part}-set"]
        for task, name in zip(("Task1", "Task2", "Task3"), NAMES, strict=True):
            assert block[task] == {"regurgitation-score": wanted[f"{name}sc1"], "knowledge-score": wanted[f"{name}qa0"]}
        completions = [score for row, score in wanted.items() if row.endswith("sc1")]
        assert block["overall-regurgitation-score"] == pytest.approx(sum(completions) / 3)
    assert official["retain-set"]["Task1"]["knowledge-score"] == 1
    assert official["harmonic-mean-task-aggregate"] == 0  # the other questions of retain are not answered
    assert official["mia_final_score"] == pytest.approx(1 - 2 * abs(official["mia_loss_acc"] - 0.5))
    assert content["membership"]["members"] == 4 and content["membership"]["nonmembers"] == 3
    assert official["mmlu_average"] is None and official["aggregate-score"] is None
    assert "all 6 forget rows" in printed and "missing  needs --lm-eval mmlu" in printed
    assert "Miss Ada" not in (files / "out" / "evaluation.json").read_text()


def test_the_real_rows_of_lume(lume_model, shared_data, tmp_path):
    """One row of every task and kind, through the whole command, with the real tokenizer and vocabulary."""
    data = [word for part in ("forget", "retain")
            for word in (f"--{part}", str(shared_data / "lume" / f"{part}_validation.jsonl"))]  # fmt: skip
    assert main(["evaluate", "--model", str(lume_model), "--dtype", "float32", "--device", "cpu", *data, "--limit", "6",
                 "--leaks", "extraction", "--output-dir", str(tmp_path / "out")]) == 0  # fmt: skip
    official = result(tmp_path, name="evaluation_results.jsonl")
    for part in ("forget-set", "retain-set"):
        for task in ("Task1", "Task2", "Task3"):
            assert all(0 <= score <= 1 for score in official[part][task].values()) and len(official[part][task]) == 2
    assert official["harmonic-mean-task-aggregate"] == 0  # a random model answers nothing
    assert result(tmp_path)["leaks"]["extraction"]["rows"] == 6


class Killed(KeyboardInterrupt):
    pass


def test_an_interrupted_evaluation_continues(brief_model, files, monkeypatch):
    whole = ["--batch-size", "2"]
    assert evaluate(files, brief_model, *whole, output="whole") == 0
    real, generated = measuring.greedy_answers, []

    def greedy(model, tokenizer, prompts, **options):
        if len(generated) == 4:  # the second batch of retain
            raise Killed
        generated.append(len(prompts))
        return real(model, tokenizer, prompts, **options)

    monkeypatch.setattr(measuring, "greedy_answers", greedy)
    assert evaluate(files, brief_model, *whole) == 130
    assert not (files / "out" / "evaluation.json").exists()
    with (files / "out" / "measured.jsonl").open("a") as journal:
        journal.write('{"part": "retain: LUME generations", "rows": [0, 1], "val')  # killed while writing
    generated[:] = [0]  # room for three more batches, but only two are left
    assert evaluate(files, brief_model, *whole, "--resume") == 0
    assert generated == [0, 2, 2]
    for name in ("evaluation.json", "rows.jsonl", "measured.jsonl"):
        assert (files / "out" / name).read_text() == (files / "whole" / name).read_text()


def test_a_directory_belongs_to_one_evaluation(byte_model, files, capsys):
    write_rows(
        files / "plain.jsonl", [{"question": "Who?", "answer": "Me."}, {"question": "Where?", "answer": "Here."}]
    )
    (files / "plain2.jsonl").write_text((files / "plain.jsonl").read_text())
    run = lambda *more, name="plain": main(  # noqa: E731
        ["evaluate", "--model", str(byte_model), "--forget", str(files / f"{name}.jsonl"), "--device", "cpu",
         "--output-dir", str(files / "out"), *more]
    )  # fmt: skip
    fails(capsys, run("--resume"), "no evaluation")
    assert run() == 0
    fails(capsys, run(), "holds an evaluation", "--resume")
    fails(capsys, run("--resume", "--limit", "1"), "other settings", "limit was None, is 1")
    assert run("--resume", name="plain2") == 0  # the same rows elsewhere
    assert run("--resume", "--members", str(files / "members.jsonl"), "--nonmembers", str(files / "others.jsonl")) == 0
    assert result(files)["membership"]["members"] == 4
    write_rows(files / "plain.jsonl", [{"question": "Who?", "answer": "You."}])
    fails(capsys, run("--resume"), "forget has changed")
    (files / "thesis").mkdir()
    (files / "thesis" / "main.tex").write_text("")
    fails(capsys, evaluate(files, byte_model, output="thesis"), "other files")
    fails(capsys, evaluate(files, byte_model, output="forget.jsonl"), "is a file")


def test_rows_that_are_not_of_lume_are_scored_without_its_aggregate(byte_model, files, capsys):
    rows = [{"input": "Who went", "output": "Me."}, {"input": "Who is", "output": "You."}]
    rows.append({"input": "x", "output": "y"})
    write_rows(files / "noid.jsonl", rows)
    write_rows(files / "strange.jsonl", [{**rows[0], "id": "1qa0", "task": "Task7"}, {**rows[1], "id": "seven"}])
    out = ["--output-dir", str(files / "out"), "--device", "cpu", "--limit", "2"]
    assert main(["evaluate", "--model", str(byte_model), "--forget", str(files / "noid.jsonl"),
                 "--retain", str(files / "strange.jsonl"), *out]) == 0  # fmt: skip
    printed, content = capsys.readouterr().out, result(files)
    assert content["answers"]["forget"]["rows"] == 2 and content["answers"]["forget"]["nll"] > 0
    assert content["lume"]["harmonic-mean-task-aggregate"] is None
    assert content["lume"]["retain-set"]["Task7"] == {"regurgitation-score": None, "knowledge-score": 0.0}
    for note in ("forget: no row has a LUME id", "retain: 1 rows without a LUME id",
                 "No LUME task aggregate", "retain has rows of Task7, which LUME does not know"):  # fmt: skip
        assert note in printed
    assert "2 of 3 forget rows" in printed


def test_bad_member_files(byte_model, files, capsys):
    (files / "empty.jsonl").write_text("")
    members, others, empty = (str(files / f"{name}.jsonl") for name in ("members", "others", "empty"))
    fails(capsys, evaluate(files, byte_model, "--members", members), "--nonmembers")
    fails(capsys, evaluate(files, byte_model, "--members", members, "--nonmembers", empty), "holds no rows")
    fails(
        capsys, evaluate(files, byte_model, "--members", empty, "--nonmembers", others), "empty.jsonl", "holds no rows"
    )
    blank = write_rows(files / "blank.jsonl", [{"document": "A member."}, {"document": "  "}])
    fails(capsys, evaluate(files, byte_model, "--members", blank, "--nonmembers", others), "blank.jsonl, line 2")
    fails(capsys, evaluate(files, byte_model, "--members", str(files / "no.jsonl"), "--nonmembers", others), "no.jsonl")
    assert not (files / "out").exists()
    write_rows(files / "same.jsonl", [{"document": "The same."}] * 3)
    same = str(files / "same.jsonl")
    assert evaluate(files, byte_model, "--members", same, "--nonmembers", same, sets=[]) == 0
    assert "says nothing about the model" in capsys.readouterr().out
    assert result(files)["membership"]["auc"] == 0.5


def test_lm_eval_not_installed(byte_model, files, capsys, monkeypatch):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    fails(capsys, evaluate(files, byte_model, "--lm-eval", "mmlu"), "pip install 'lowmem-npo[eval]'")
    assert not (files / "out").exists()


def test_help_and_flags(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "--members" in printed and "--lm-eval" in printed and "Hub name or local directory" in printed


def test_another_model_in_the_same_place_does_not_go_on(byte_model, files, capsys):
    """As `merge` leaves one: what was measured of the old weights is none of the new ones'."""
    model = shutil.copytree(byte_model, files / "model")
    assert evaluate(files, model, "--forget", str(files / "forget.jsonl"), "--limit", "1") == 0
    resumed = ("--forget", str(files / "forget.jsonl"), "--limit", "1", "--resume")
    os.utime(model / "model.safetensors", (1, 1))  # copied anew, it is the same
    assert evaluate(files, model, *resumed) == 0
    other = {name: weight + 1 for name, weight in load_file(model / "model.safetensors").items()}
    save_file(other, model / "model.safetensors", metadata={"format": "pt"})
    fails(capsys, evaluate(files, model, *resumed), "--resume: the model has changed since")


def test_what_is_not_comparable_with_the_evaluation_of_before(tmp_path):
    digests = {"forget": json_sha256([{"question": "a", "answer": "b"}])}
    before = str(tmp_path / "before" / "evaluation.json")

    def differ(*, earlier, now):
        for name, options in (("before", earlier), ("after", now)):
            config = EvaluationConfig(model="m", forget="f.jsonl", output_dir=str(tmp_path / name), **options)
            shutil.rmtree(tmp_path / name, ignore_errors=True)
            EvaluationDirectory(config, digests).begin()
        return differences(settings_of(before), {**as_json(config), "digests": digests})

    assert differ(earlier={"batch_size": 3, "dtype": "float32"}, now={"leaks": ("all",), "relearn_steps": 3}) == []
    assert differ(earlier={"limit": 8, "qlora": True}, now={"limit": 9}) == ["qlora True", "limit 8"]
    assert differ(earlier={"leaks": ("all",)}, now={"leaks": ("all",), "relearn_steps": 3}) == []  # test by test
    config = EvaluationConfig(model="m", leaks=("all",), forget="f.jsonl")
    now = {**as_json(config), "digests": {"forget": json_sha256([])}}
    assert differences(settings_of(before), now) == ["other forget rows"]
