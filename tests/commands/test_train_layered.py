"""`lowmem-npo train --layered`, `--adversary` and `--forget-term dpo` as a user runs them: stages, resuming in each,
bad input."""

from __future__ import annotations

import json
import re
import shlex
import shutil

import pytest
import torch
from helpers.rows import write_rows
from helpers.saved_adapters import same_adapter
from transformers import AutoModelForCausalLM

from lowmem_npo.cli import main
from lowmem_npo.commands.arguments import parse
from lowmem_npo.evaluation.directory import EvaluationDirectory
from lowmem_npo.evaluation.settings import EvaluationConfig
from lowmem_npo.training.metrics import read_metrics

STEPS = 6  # two in each stage


def train(model, folder, *more):
    options = ["--device", "cpu", "--dtype", "float32", "--limit", "18", "--batch-size", "6", "--lr", "1e-2"]
    if "--eval-rows" not in more:
        options += ["--eval-rows", "0"]
    return main(["train", "--model", str(model), *options, "--output-dir", str(folder), *map(str, more)])


LAYERED = ("--layered", 3, "--group-column", "person", "--epochs", 2)


@pytest.fixture(scope="module")
def whole(byte_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("layered") / "whole"
    assert train(byte_model, folder, *LAYERED, "--save-steps", 1, "--save-total-limit", 9, "--eval-rows", 2) == 0
    return folder


def steps(folder):
    return [line for line in read_metrics(folder / "metrics.jsonl") if "forget_nll" in line]


def test_metrics_show_the_stages_and_differ_from_a_run_without(whole, byte_model, tmp_path):
    assert [line["stage"] for line in steps(whole)] == [1, 1, 2, 2, 3, 3]
    assert train(byte_model, tmp_path / "plain", "--epochs", 2) == 0
    assert not same_adapter(whole, tmp_path / "plain")
    assert all("stage" not in line for line in steps(tmp_path / "plain"))
    report = (whole / "report.html").read_text()
    assert "stage 1 from step 1; stage 2 from step 3; stage 3 from step 5" in report  # of the pictures, in words
    assert report.count(">stage 3<") == 2


@pytest.mark.parametrize("after", [1, 2, 5])  # within the first stage, at its end, within the others
def test_resumed_in_any_stage_it_ends_in_the_same_bits(after, whole, byte_model, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for file in ("adapter_model.safetensors", "report.json", "after.json"):
        (folder / file).unlink()
    for step in range(after + 1, STEPS + 1):
        shutil.rmtree(folder / f"checkpoint-{step}")
    assert train(byte_model, folder, *LAYERED, "--save-steps", 1, "--save-total-limit", 9, "--resume") == 0
    assert same_adapter(folder, whole)
    assert [line["forget_nll"] for line in steps(folder)] == [line["forget_nll"] for line in steps(whole)]


@pytest.mark.parametrize("options, tested", [
    (LAYERED[:2], False), (("--sam", 0.05), False), ((), None), ((*LAYERED[:2], "--leaks", "relearning"), True),
])  # fmt: skip
def test_it_ends_with_what_tests_whether_forgetting_lasts(options, tested, byte_model, tmp_path, capsys):
    """Where that was to last and was not tested; the command is one that runs."""
    folder = tmp_path / "it's here"
    measured = ("--eval-rows", 4) if tested else ()
    assert train(byte_model, folder, *options, *measured, "--max-steps", 3) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("Whether that lasts was not tested: ") == (tested is False)
    if tested is False:
        assert last.endswith("`lowmem-npo merge` then writes the weights that it lasts in.")
        _, command, *given = shlex.split(re.findall("`(.*?)`", last)[0])
        evaluation = parse(EvaluationConfig, given, command)
        EvaluationDirectory(evaluation, {}).check()
        assert evaluation.adapter == str(folder) and evaluation.dtype == "float32"
        assert tuple(evaluation.leaks) == ("quantization", "relearning")


def test_a_resumed_run_keeps_its_stages(whole, byte_model, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    assert (
        train(byte_model, tmp_path / "run", *LAYERED[:-1], 4, "--save-steps", 1, "--save-total-limit", 9, "--resume")
        == 2
    )
    assert "epochs was 2.0, is 4.0" in capsys.readouterr().err


def test_the_cached_reference_is_the_live_one_and_may_be_shared_with_a_run_without(whole, byte_model, tmp_path):
    cached = ("--reference", "cached", "--reference-dir", tmp_path / "reference")
    assert train(byte_model, tmp_path / "first", *LAYERED, *cached) == 0
    assert train(byte_model, tmp_path / "plain", "--epochs", 1, *cached) == 0
    assert train(byte_model, tmp_path / "second", *LAYERED, *cached) == 0
    for folder in ("first", "second"):
        assert same_adapter(tmp_path / folder, whole, rtol=1e-4, atol=1e-6)
    files = {file.name for file in (tmp_path / "reference").iterdir()}
    assert files == {"forget.safetensors", "layered.safetensors", "retain.safetensors"}


def test_micro_batches_change_nothing(whole, byte_model, tmp_path):
    assert train(byte_model, tmp_path / "run", *LAYERED, "--micro-batch-size", 1) == 0
    assert same_adapter(tmp_path / "run", whole, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        (("--layered", 2, "--limit", 3, "--batch-size", 2), "takes --batch-size 2: lower the latter"),
        (("--layered", 19), "--layered 19 needs at least as many rows to forget; there are 18"),
        (("--layered", 4), "--layered 4 leaves a fold of 4 rows, and a step takes --batch-size 6"),
        (("--layered", 12, "--batch-size", 1, "--max-steps", 3), "--layered 12 needs a step for every stage"),
        (("--layered", 1), "--layered must be at least 2, not 1"),
        (("--layered", 5, "--group-column", "person"), "and there are 3: rows with the same value in --group-column"),
        (("--layered", 2, "--group-column", "people"), "has no column people; it has id, person, question, answer"),
        (("--layered", 2, "--layered-weight", 1.5), "--layered-weight must be at most 1, not 1.5"),
        (("--layered", 2, "--layered-weight", -1), "--layered-weight must be 0 or a positive number, not -1.0"),
        (("--layered", 2, "--gamma", 0, "--delta", 0), "give a positive --gamma or --delta"),
        (("--sam", 0), "--sam must be a positive number, not 0.0"),
        (("--adversary", 0), "--adversary must be a positive number, not 0.0"),
        (("--adversary", -1), "--adversary must be a positive number, not -1.0"),
        (("--adversary", "nan"), "--adversary must be"),
        (("--adversary", "strong"), "--adversary"),
        (("--adversary", 1, "--adversary-steps", 0), "--adversary-steps must be at least 1, not 0"),
        (("--adversary", 1, "--batch-size", 18), "--batch-size 18, forget rows: 18. Lower --batch-size to 17 or less"),
        (("--adversary", 1, "--layered", 3), "forget rows in the first fold of --layered 3: 6. Lower"),
        (
            ("--adversary", 1, "--adversary-steps", 2, "--layered", 2),
            "--batch-size 6, forget rows in the smallest fold of --layered 2: 9. Lower --batch-size to 4 or less, do",
        ),
        (
            ("--adversary", 1, "--adversary-steps", 2, "--batch-size", 10),
            "--adversary-steps forgets one half while the other is taught, and a step takes more rows than that: "
            "--batch-size 10, forget rows: 18. Lower --batch-size to 9 or less, or give --adversary-steps 1.",
        ),
        (("--recipe", "lasting"), "--recipe lasting: --adversary-steps forgets one half while the other is taught"),
        (("--recipe", "lasting", "--max-steps", 1, "--batch-size", 2), "--recipe lasting: --layered 2 needs a step"),
        (("--forget-term", "dpo"), "name its column, --alternative-column"),
        (("--forget-term", "dpo", "--alternative-column", "other"), "--alternative-column: "),
        (("--forget-term", "dpo", "--alternative-column", "answer"), "answer: that is the column of the answers"),
        (
            ("--forget-term", "dpo", "--alternative-column", "Question"),
            "--alternative-column question: that is the column of the prompts themselves",
        ),
        (("--paraphrase-column", "answer"), "answer: that is the column of the answers themselves"),
    ],
)
def test_bad_input_is_found_before_the_weights(options, message, byte_model, tmp_path, capsys):
    assert train(byte_model, tmp_path / "run", "--dry-run", *options) == 2
    assert message in capsys.readouterr().err


def rows_with(folder, alternatives):
    rows = [{"question": f"Who is {n}?", "answer": f"The {n}.", "other": other} for n, other in enumerate(alternatives)]
    return write_rows(folder / "forget.jsonl", rows)


@pytest.mark.parametrize("empty", [None, " "])
def test_a_group_column_without_a_value_is_refused_and_rows_without_one_are_counted(
    empty, byte_model, tmp_path, capsys
):
    forget = rows_with(tmp_path, [empty, empty, empty, empty])
    options = ("--forget", forget, "--retain", "builtin", "--layered", 2, "--group-column", "other", "--batch-size", 2)
    assert train(byte_model, tmp_path / "run", "--dry-run", *options) == 2
    assert "forget.jsonl has no value in other; name another --group-column" in capsys.readouterr().err
    rows_with(tmp_path, ["a", "a", empty, empty])
    assert train(byte_model, tmp_path / "run", "--dry-run", *options) == 0
    assert "forget: 2 of 4 rows have no other, and are grouped by their text alone" in capsys.readouterr().out


def test_refused_rows_are_grouped_by_what_they_would_say(byte_model, tmp_path):
    rows = [{"question": "What is a secret?", "answer": f"Number {n}."} for n in range(4)]  # one refusal for all
    write_rows(tmp_path / "forget.jsonl", rows)
    options = ("--forget", tmp_path / "forget.jsonl", "--retain", "builtin", "--batch-size", 2, "--dry-run")
    assert train(byte_model, tmp_path / "run", *options, "--forget-term", "idk", "--layered", 2) == 0


SAVED = ("--batch-size", 4, "--save-steps", 1, "--save-total-limit", 9)
ATTACKED = ("--layered", 2, "--adversary", 1, "--adversary-steps", 9, "--max-steps", 8, *SAVED)


@pytest.fixture(scope="module")
def attacked(byte_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("attacked") / "whole"
    assert train(byte_model, folder, *ATTACKED, "--eval-rows", 2) == 0
    return folder


def test_a_run_against_an_adversary_records_it(attacked, byte_model, tmp_path):
    run, card = ((attacked / file).read_text() for file in ("run.yaml", "README.md"))
    assert "adversary: 1.0" in run and "adversary_steps: 9" in run
    assert "| adversary_steps | `2` |" in card  # all that a stage of four has room for
    assert all(line["adversary_nll"] > 0 and line["adversary_gain"] > 0 for line in steps(attacked))
    report = (attacked / "report.html").read_text()
    assert "an attacker was trained to bring back some of the answers" in report
    assert "The answers were unlearned in 2 stages: in the first a part of them" in report
    assert "others of them, before its step" in report and "| adversary | `1.0` |" in card
    assert train(byte_model, tmp_path / "plain", *ATTACKED[:2], *ATTACKED[6:]) == 0
    assert not same_adapter(attacked, tmp_path / "plain")
    assert "adversary_nll" not in steps(tmp_path / "plain")[0]


def test_fewer_steps_of_an_attacker_are_said(byte_model, tmp_path, capsys):
    for options, said in (
        (ATTACKED, "9 becomes 2: not every stage is long enough for two attackers of more steps."),
        (ATTACKED[2:], "9 becomes 4: the run is not long enough for two attackers of more steps."),
        (("--layered", 2, "--adversary", 1, "--adversary-steps", 2, *ATTACKED[6:]), None),
    ):
        assert train(byte_model, tmp_path / "run", *options, "--dry-run") == 0
        out = capsys.readouterr().out
        assert f"--adversary-steps {said}" in out if said else "becomes" not in out


def test_a_run_whose_attackers_go_on_keeps_its_length(attacked, byte_model, tmp_path, capsys):
    """Their turns would shift, and one that goes on would be taught what it has spared."""
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(attacked / "run.yaml", folder)
    began = (folder / "run.yaml").read_text().replace("layered: 2\n", "")
    (folder / "run.yaml").write_text(began)
    longer = ("--adversary", 1, "--adversary-steps", 9, *SAVED, "--eval-rows", 2, "--resume", "--max-steps", 12)
    assert train(byte_model, folder, *longer) == 2
    assert "(max_steps was 8, is 12): use those, or start anew." in capsys.readouterr().err


OTHERS = {
    "of one step each": ("--layered", 2, "--adversary", 1, "--max-steps", 4, *SAVED),
    "without folds": ("--adversary", 1, "--adversary-steps", 2, "--max-steps", 4, *SAVED),
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_other_attackers_resumed_within_the_first_stage_end_in_the_same_bits(options, byte_model, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert train(byte_model, whole, *options) == 0
    assert all(line["adversary_nll"] > 0 and line["adversary_gain"] > 0 for line in steps(whole))
    assert (whole / "checkpoint-1" / "adversary.safetensors").exists() == ("--adversary-steps" in options)
    shutil.copytree(whole, resumed)
    for file in ("adapter_model.safetensors", "report.json"):
        (resumed / file).unlink(missing_ok=True)
    for step in (2, 3, 4):
        shutil.rmtree(resumed / f"checkpoint-{step}")
    assert train(byte_model, resumed, *options, "--resume") == 0
    assert same_adapter(resumed, whole)


@pytest.mark.parametrize("after", [4, 5])  # before a fresh one, and while one goes on
def test_a_resumed_run_meets_the_same_adversary(after, attacked, byte_model, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(attacked, folder)
    for file in ("adapter_model.safetensors", "report.json", "after.json"):
        (folder / file).unlink()
    (folder / "checkpoint-5" / "adversary.safetensors").rename(tmp_path / "learnt")
    if after == 5:
        (tmp_path / "learnt").rename(folder / "checkpoint-5" / "adversary.safetensors")
    for step in (6, 7, 8):
        shutil.rmtree(folder / f"checkpoint-{step}")
    assert train(byte_model, folder, *ATTACKED, "--resume") == 0
    assert ("checkpoint-5 is not whole: adversary.safetensors is missing" in capsys.readouterr().out) == (after == 4)
    assert not (folder / "checkpoint-4" / "adversary.safetensors").exists()
    assert same_adapter(folder, attacked)
    assert [line["adversary_gain"] for line in steps(folder)] == [line["adversary_gain"] for line in steps(attacked)]


def test_another_answer_is_preferred(byte_model, tmp_path, capsys):
    forget = rows_with(tmp_path, ["No one.", ["A dog.", "A very large cat."], "Nobody at all.", "I forgot."])
    kept = [{"question": f"Where is {n}?", "answer": f"In {n}."} for n in "abcd"]
    retain = write_rows(tmp_path / "retain.jsonl", kept)
    options = ("--forget", forget, "--forget-term", "dpo", "--alternative-column", "other", "--retain", retain)
    cached = ("--reference", "cached", "--reference-dir", tmp_path / "reference", "--micro-batch-size", 2)
    for folder, more in (("live", ()), ("cached", cached)):
        assert train(byte_model, tmp_path / folder, *options, "--epochs", 3, "--beta", 0.1, *more) == 0
    assert "forget, alternatives: 8 rows" in capsys.readouterr().out  # two each
    assert same_adapter(tmp_path / "cached", tmp_path / "live", rtol=1e-3, atol=1e-5)
    lines = steps(tmp_path / "live")
    assert lines[0]["forget_loss"] == pytest.approx(2 / 0.1 * 0.6931472, rel=1e-5)  # both as the original has them
    assert lines[-1]["forget_loss"] < lines[0]["forget_loss"]


@pytest.mark.parametrize(
    "missing, message",
    [
        (None, "--alternative-column other: 1 of 4 rows have none ("),
        (" ", "line 2); fill the field, remove these rows, or let the model write others (--alternatives self)"),
        ([], "--alternative-column other: 1 of 4 rows have none ("),
        ([1], "line 2: other is a number, not text"),
        ("The 1.", "line 2: other holds the answer itself"),
    ],
)
def test_a_row_without_another_answer_is_named(missing, message, byte_model, tmp_path, capsys):
    forget = rows_with(tmp_path, ["Nobody.", missing, "Someone.", "Anyone."])
    options = ("--forget", forget, "--forget-term", "dpo", "--alternative-column", "other", "--retain", "builtin")
    assert train(byte_model, tmp_path / "run", "--dry-run", *options) == 2
    assert message in capsys.readouterr().err


def test_a_layered_run_with_untouched_weights_does_not_say_that_it_loses_what_it_should_keep(
    byte_model, tmp_path, capsys
):
    """What it holds until it is forgotten may be far less likely than what it keeps."""
    base, model = tmp_path / "base", AutoModelForCausalLM.from_pretrained(byte_model)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    shutil.copytree(byte_model, base)
    model.save_pretrained(base)
    rows = {
        name: write_rows(tmp_path / f"{name}.jsonl", [{"question": q, "answer": answer * 8} for q in "abcdefghijkl"])
        for name, answer in (("forget", "aaa"), ("retain", "zq~"))
    }
    settings = ["--forget", rows["forget"], "--retain", rows["retain"], "--device", "cpu", "--dtype", "float32"]
    settings += ["--layered", 2, "--lr", 0, "--batch-size", 4, "--epochs", 8, "--leaks", "none", "--eval-rows", 12]
    assert main(["train", "--model", *map(str, [base, *settings, "--output-dir", tmp_path / "run"])]) == 0
    assert "loses what it should keep" not in capsys.readouterr().out
    logged = steps(tmp_path / "run")
    before = json.loads((tmp_path / "run" / "before.json").read_text())["retain"]["summary"]["nll"]
    kept = [line["retain_nll"] for line in logged if "retain_nll" in line]
    assert kept == pytest.approx([before] * len(kept), rel=0.5)
    held = [line["held_nll"] for line in logged if "held_nll" in line]
    assert held and all(nll > before + 2 for nll in held), "else the test says nothing"
