"""`lowmem-npo train` as a user runs it: real files, a real tokenizer, real 4-bit layers, real processes."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from helpers.saved_adapters import same_adapter
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_npo.cli import main
from lowmem_npo.commands.arguments import parse_run
from lowmem_npo.errors import UserError
from lowmem_npo.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "lowmem_npo", "train", *map(str, arguments)]


@pytest.fixture(scope="module")
def lume_run(lume_model, shared_data, tmp_path_factory):
    """(directory, output) of a QLoRA run on real LUME rows."""
    folder = tmp_path_factory.mktemp("run") / "out"
    result = subprocess.run(
        command(
            *("--model", lume_model, "--qlora", "--forget", shared_data / "lume/forget_train.jsonl"),
            *("--retain", shared_data / "lume/retain_train.jsonl", "--max-steps", 6, "--eval-rows", 2),
            *("--output-dir", folder),
        ),
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def test_the_first_loss_is_that_of_an_identity_adapter(lume_run):
    """L = (2/beta) ln 2 + gamma * NLL + delta * 0; any mismatch of policy and reference, or of rows, would show."""
    folder, _ = lume_run
    metrics = [line for line in read_metrics(folder / "metrics.jsonl") if "retain_nll" in line]
    assert [line["step"] for line in metrics] == list(range(1, 7))
    first = metrics[0]
    assert first["retain_kl"] == 0
    assert first["loss"] == pytest.approx(2 / 0.5 * math.log(2) + 1.0 * first["retain_nll"], abs=1e-3)
    assert metrics[-1]["retain_kl"] > 0 and metrics[-1]["forget_log_ratio"] != 0


def test_the_first_retain_nll_is_that_of_the_model(lume_run, lume_model, shared_data):
    """The logged NLL is that of the model's logits on the rows of the first step."""
    from lowmem_npo.config import ModelConfig
    from lowmem_npo.data import read_rows, to_examples, tokenize
    from lowmem_npo.model import load_model
    from lowmem_npo.training.step_rows import StepBatches

    tokenizer = AutoTokenizer.from_pretrained(lume_model)
    rows = tokenize(to_examples(read_rows(str(shared_data / "lume/retain_train.jsonl"))), tokenizer, max_length=1024)
    _, chosen = StepBatches(1112, 1136, 4, 4, seed=42).step_rows(0)
    model = load_model(ModelConfig(str(lume_model), qlora=True))
    nll, count = 0.0, 0
    for index in chosen:
        ids, labels = torch.tensor([rows[index]["input_ids"]]), rows[index]["labels"]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(ids).last_hidden_state[0]
        table = (hidden.double() @ model.lm_head.weight.double().T).log_softmax(-1)
        for t in range(1, len(labels)):
            if labels[t] != -100:
                nll, count = nll - table[t - 1, labels[t]].item(), count + 1
    logged = read_metrics(lume_run[0] / "metrics.jsonl")[0]["retain_nll"]
    assert logged == pytest.approx(nll / count, rel=1e-3)


def test_what_a_run_writes(lume_run, lume_model):
    folder, printed = lume_run
    assert "NLL per answer token" in printed and "exact match" in printed
    table = json.loads((folder / "before_after.json").read_text())
    assert set(table) == {"before", "after"} and set(table["before"]) == {"forget", "retain"}
    assert (folder / "before_after.md").read_text().startswith("| set")
    assert AutoTokenizer.from_pretrained(folder)("Hello").input_ids
    base = AutoModelForCausalLM.from_pretrained(lume_model)
    adapted = PeftModel.from_pretrained(base, folder)
    assert adapted.peft_config["default"].r == 5
    weights = load_file(folder / "adapter_model.safetensors")
    assert any(w.abs().max() > 0 for name, w in weights.items() if "lora_B" in name)
    assert sorted(folder.glob("checkpoint-*"))
    assert not list(folder.glob("*.partial"))
    to_deploy = ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md", "run.yaml")
    assert len({(folder / name).stat().st_mode for name in to_deploy}) == 1  # whoever reads one reads all
    assert (folder / "before.json").stat().st_mode & 0o077 == 0  # it holds text of rows


def test_run_yaml_is_accepted_back(lume_run, tmp_path, capsys):
    folder, _ = lume_run
    settings = yaml.safe_load((folder / "run.yaml").read_text())
    again = parse_run(["--config", str(folder / "run.yaml")], "train")
    assert yaml.safe_load(again.to_yaml()) == settings
    resumed = parse_run(["--resume", f"--output-dir={folder}", "--epochs", "99"], "train").flat()
    assert {name for name in settings if resumed[name] != settings[name]} == {"epochs"}
    for other in (["--model", "gpt2"], ["--model", "gpt2", "--config", str(folder / "run.yaml")]):
        assert parse_run(["--resume", "--output-dir", str(folder), *other], "train").model.model == "gpt2"
    (tmp_path / "run.yaml").write_text("[1]")
    for arguments, command, message in (
        (["--resume", "--output-dir", str(tmp_path)], "train", "run.yaml' is damaged: write the run's options into it"),
        (["--resume", "--output-dir", str(tmp_path / "none")], "train", f"there is no run in '{tmp_path / 'none'}'"),
        (["--resume"], "train", "there is no run in 'lowmem-npo-output'"),
        (["--resume", "--output-dir", str(folder)], "estimate", "--model must be given"),  # its own run's
        (["--resume", "--output-dir", str(folder), "--output-dir"], "train", "--output-dir needs a value"),
        (["--output-dir", "--resume"], "train", "--output-dir needs a value"),
        (["--resume", "--no-such", "3"], "train", "There is no option --no-such"),
    ):
        with pytest.raises(UserError, match=message):
            parse_run(arguments, command)
    overridden = parse_run(["--config", str(folder / "run.yaml"), "--beta", "0.1", "--no-qlora"], "train").flat()
    changed = {name for name in settings if overridden[name] != settings[name]}
    assert changed == {"beta", "qlora"}
    assert main(["train", "--config", str(folder / "run.yaml"), "--output-dir", str(tmp_path / "x"), "--dry-run"]) == 0
    assert "Nothing was trained" in capsys.readouterr().out
    assert not (tmp_path / "x").exists()


def test_a_killed_and_resumed_run_ends_in_the_same_bits(byte_model, tmp_path, capsys):
    settings = [
        *("train", "--model", byte_model, "--dtype", "float32", "--max-steps", 9, "--save-steps", 3, "--eval-rows", 0),
        *("--batch-size", 5, "--micro-batch-size", 2, "--lora-dropout", 0.1, "--lr", 1e-2, "--limit", 12),
    ]
    settings = [*map(str, settings), "--device", "cpu"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main([*settings, "--output-dir", str(whole)]) == 0

    waits = [sys.executable, ROOT / "tests" / "helpers" / "waiting.py", "5", *settings]
    process = subprocess.Popen([*waits, "--output-dir", killed], env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (killed / "checkpoint-3" / "trainer_state.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert main([*settings, "--output-dir", str(killed)]) == 2
    assert "--resume" in capsys.readouterr().err

    assert main(["train", "--output-dir", str(killed), "--resume"]) == 0  # its settings are in its run.yaml
    assert same_adapter(whole, killed)
    lines = [[line["step"] for line in read_metrics(folder / "metrics.jsonl")] for folder in (whole, killed)]
    assert lines[0] == lines[1] == list(range(1, 10))
    losses = [[line["retain_nll"] for line in read_metrics(folder / "metrics.jsonl")] for folder in (whole, killed)]
    assert losses[0] == losses[1]


def test_a_finished_run_resumed_is_measured_but_not_trained(byte_model, tmp_path, capsys):
    """Three steps end within an epoch of 15: the Trainer by itself would take a fourth."""
    arguments = ["--model", str(byte_model), "--dtype", "float32", "--device", "cpu", "--max-steps", "3"]
    arguments += ["--save-steps", "1", "--leaks", "none", "--output-dir", str(tmp_path / "o")]
    assert main(["train", *arguments, "--eval-rows", "2"]) == 0
    adapter = (tmp_path / "o" / "adapter_model.safetensors").read_bytes()
    assert main(["train", *arguments, "--eval-rows", "3", "--resume"]) == 0
    assert (tmp_path / "o" / "adapter_model.safetensors").read_bytes() == adapter
    assert json.loads((tmp_path / "o" / "after.json").read_text())["forget"]["summary"]["rows"] == 3
    assert json.loads((tmp_path / "o" / "audit.json").read_text())["adapter"]["of_step"] == 3
    capsys.readouterr()
    assert main(["train", *arguments, "--resume", "--max-steps", "2"]) == 2
    assert "has trained 3 steps, and these settings ask for 2" in capsys.readouterr().err


def test_a_run_with_named_chat_templates_resumes_once_its_adapter_is_saved(byte_model, tmp_path):
    """transformers saves them as a directory, which cannot be renamed onto that of the interrupted run."""
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(byte_model, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ messages }}{{ tools }}"}
    tokenizer.save_pretrained(base)
    arguments = ["--model", str(base), "--template", "plain", "--device", "cpu", "--limit", "4", "--leaks", "none"]
    arguments += ["--max-steps", "1", "--eval-rows", "0", "--output-dir", str(run)]
    assert main(["train", *arguments]) == 0
    (run / "report.json").unlink()  # it was killed before its last file
    assert main(["train", *arguments, "--resume"]) == 0
    assert AutoTokenizer.from_pretrained(run).chat_template == tokenizer.chat_template
    assert not (run / "adapter.partial").exists()


TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
ACCELERATE = (
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes", "2"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--rdzv_backend", "c10d", "--main_process_port", "0"),
)
OF_TWO = (
    *("--dtype", "float32", "--max-steps", "3", "--eval-rows", "0", "--limit", "12", "--device", "cpu"),
    *("--batch-size", "5", "--retain-batch-size", "3", "--optim", "sgd", "--lr", "0.1"),
)


@pytest.fixture(scope="module")
def alone(byte_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert main(["train", "--model", str(byte_model), *OF_TWO, "--output-dir", str(folder)]) == 0
    return folder


@pytest.mark.parametrize(
    "launcher", [pytest.param(TORCHRUN, id="torchrun", marks=pytest.mark.slow), pytest.param(ACCELERATE, id="launch")]
)
def test_two_processes_give_the_gradient_of_one(launcher, alone, byte_model, tmp_path):
    """Five rows do not divide over two processes, and answers differ in length: a mean of means would differ."""
    arguments = ["-m", "lowmem_npo", "train", "--model", str(byte_model), *OF_TWO, "--ddp-backend", "gloo"]
    launched = subprocess.run(
        [sys.executable, *launcher, *arguments, "--output-dir", str(tmp_path / "run")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert launched.returncode == 0, launched.stderr[-3000:]
    folders = (alone, tmp_path / "run")
    logs = [read_metrics(folder / "metrics.jsonl")[:3] for folder in folders]
    for one, two in zip(*logs, strict=True):
        for name in ("loss", "grad_norm", "forget_loss", "forget_nll", "retain_nll", "retain_kl"):
            assert two[name] == pytest.approx(one[name], rel=1e-5, abs=1e-9), name
    adapters = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    # SGD from the same start: the sum of three steps' gradients, so their difference is the gradients'.
    moved = sum(w.double().square().sum() for n, w in adapters[0].items() if "lora_B" in n)
    apart = sum((w.double() - adapters[1][n].double()).square().sum() for n, w in adapters[0].items() if "lora_B" in n)
    assert moved > 0 and float((apart / moved).sqrt()) < 1e-5
    assert apart > 0  # other sums: there were two


def test_bundled_data_is_announced(byte_model, tmp_path, capsys):
    assert main(["train", "--model", str(byte_model), "--dry-run", "--output-dir", str(tmp_path / "o")]) == 0
    assert "bundled biographies" in capsys.readouterr().out


def test_preview_shows_and_trains_nothing(lume_model, shared_data, tmp_path, capsys):
    lume = shared_data / "lume"
    data = ["--forget", str(lume / "forget_train.jsonl"), "--retain", str(lume / "retain_train.jsonl")]
    options = ["--model", str(lume_model), "--preview", "2", "--output-dir", str(tmp_path / "o")]
    assert main(["train", *data, *options]) == 0
    printed = capsys.readouterr().out
    assert "<|endoftext|>⟧" in printed and "forget 2 of 1112" in printed and "retain 2 of 1136" in printed
    assert not (tmp_path / "o").exists()
