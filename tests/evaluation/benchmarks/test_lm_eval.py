"""lm-eval on the model in memory: a task of ours, so that no network is needed, against dense float64."""

from __future__ import annotations

import json
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import yaml
from helpers.rows import write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_npo.cli import main
from lowmem_npo.evaluation.benchmarks.lm_eval import LM_EVAL, mmlu_accuracy

TaskManager = pytest.importorskip("lm_eval.tasks", reason="needs: pip install 'lowmem-npo[eval]'").TaskManager

QUESTIONS = [{"question": f"What is {n} and {n}?", "choices": ["A", "B", "C", "D"], "answer": n % 4} for n in range(12)]


@pytest.fixture
def tasks(tmp_path):
    """A folder with a group of two tasks in MMLU's form."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for part, rows in (("one", QUESTIONS[:7]), ("two", QUESTIONS[7:])):
        write_rows(tmp_path / f"{part}.jsonl", rows)
        task = {
            "task": f"tiny_{part}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / f"{part}.jsonl")}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}\nAnswer:",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        (folder / f"{part}.yaml").write_text(yaml.safe_dump(task))
    acc = [{"metric": "acc", "weight_by_size": True}]
    group = {"group": "tiny", "task": ["tiny_one", "tiny_two"], "aggregate_metric_list": acc}
    (folder / "group.yaml").write_text(yaml.safe_dump(group))
    return folder


def ours_alone(manager, include_path, **_):
    return manager(include_path=include_path, include_defaults=False)


def dense_accuracy(folder):
    """How often the right letter is the likeliest, and which letters were."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    chosen = []
    for row in QUESTIONS:
        prompt = f"{row['question']}\nAnswer:"
        sums = []
        for choice in row["choices"]:
            ids = tokenizer(f"{prompt} {choice}").input_ids
            start = len(tokenizer(prompt).input_ids)
            with torch.no_grad():
                logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            sums.append(float(sum(logprobs[t - 1, ids[t]] for t in range(start, len(ids)))))
        chosen.append(max(range(4), key=sums.__getitem__))
    return [int(pick == row["answer"]) for pick, row in zip(chosen, QUESTIONS, strict=True)]


def test_a_task_on_a_model(byte_model, tasks, tmp_path, capsys):
    options = ["--model", str(byte_model), "--dtype", "float32", "--device", "cpu", "--lm-eval-path", str(tasks)]
    out = ["--output-dir", str(tmp_path / "out")]
    assert main(["evaluate", *options, *out, "--lm-eval", "tiny"]) == 0
    right = dense_accuracy(byte_model)
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    # A mean over questions, not over tasks: 7 and 5 of them.
    assert found["lm_eval"] == {"tiny": {"acc": pytest.approx(sum(right) / 12)}}
    assert 0 < sum(right) < 12 and sum(right) / 12 != (sum(right[:7]) / 7 + sum(right[7:]) / 5) / 2
    assert "tiny" in capsys.readouterr().out
    # What stands in the journal is not run again; another task is added to those that were named.
    (tmp_path / "one.jsonl").unlink()
    assert main(["evaluate", *out, "--device", "cpu", "--lm-eval", "tiny_two", "--resume"]) == 0
    again = json.loads((tmp_path / "out" / "evaluation.json").read_text())["lm_eval"]
    assert again == {**found["lm_eval"], "tiny_two": {"acc": pytest.approx(sum(right[7:]) / 5)}}


def test_tasks_that_cannot_run(byte_model, tasks, tmp_path, capsys, monkeypatch):
    # Reading lm-eval's own 14,000 tasks takes half a minute.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(ours_alone, TaskManager))
    options = ["evaluate", "--model", str(byte_model), "--device", "cpu", "--lm-eval-path", str(tasks)]
    assert main([*options, "--output-dir", str(tmp_path / "a"), "--lm-eval", "tiny_ones"]) == 2
    said = capsys.readouterr().err
    assert "lm-eval has no such task" in said and "tiny_one" in said and "Traceback" not in said
    assert not (tmp_path / "a").exists()
    (tmp_path / "two.jsonl").unlink()
    assert main([*options, "--output-dir", str(tmp_path / "b"), "--lm-eval", "tiny_two"]) == 2
    assert "the task's data cannot be loaded" in capsys.readouterr().err


@pytest.mark.parametrize("after, warned", [(0.36, True), (0.38, False)])
def test_mmlu_below_three_quarters_of_before(after, warned):
    context = SimpleNamespace(before={"lm_eval": {"mmlu": {"acc": 0.5}}}, notes=[])
    LM_EVAL.score({"lm_eval": {"mmlu": [{"mmlu": {"acc": after}}]}}, context)
    assert any("MMLU fell from 0.500" in note for note in context.notes) is warned


def test_only_mmlu_itself_is_the_mmlu_average():
    assert mmlu_accuracy({"mmlu": {"acc": 0.4}, "arc_easy": {"acc": 0.9}}) == 0.4
    assert mmlu_accuracy({"mmlu_anatomy": {"acc": 0.4}}) is None


def test_a_metric_that_is_no_number_is_none():
    measured = {LM_EVAL.name: {"tiny": [{"tiny": {"acc": 0.5, "perplexity": math.inf, "f1": math.nan}}]}}
    assert LM_EVAL.results(measured) == {"tiny": {"acc": 0.5, "perplexity": None, "f1": None}}
