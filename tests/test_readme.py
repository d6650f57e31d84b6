"""What the README shows works as it stands there."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def code(title: str) -> str:
    lines = section(title).splitlines()
    return "\n".join(line[4:] for line in lines if line.startswith("    "))


def test_the_two_commands_are_on_the_first_screen():
    first = README.splitlines()[:25]
    for script in ("demo", "test"):
        assert any(f"bash scripts/{script}.sh" in line for line in first)
        assert (ROOT / "scripts" / f"{script}.sh").is_file()


def test_every_flag_exists(capsys):
    from lowmem_npo.cli import main
    from lowmem_npo.commands.arguments import parse_run

    with pytest.raises(SystemExit):
        parse_run(["--help"], "train")
    known = set(re.findall(r"--[a-z][a-z0-9-]*", capsys.readouterr().out)) | {"--help", "--config"}
    for command in ("sweep", "estimate", "report", "evaluate"):
        with contextlib.suppress(SystemExit):
            main([command, "--help"])
        known |= set(re.findall(r"--[a-z][a-z0-9-]*", capsys.readouterr().out))
    for block in re.findall(r"`([^`\n]*)`|\n {4}(lowmem-npo [^\n]*)", README):
        line = "".join(block)
        if line.startswith(("--", "lowmem-npo")):
            for flag in re.findall(r"--[a-z][a-z0-9-]*", line):
                assert flag in known, f"the README names {flag}"


def test_the_kernels_alone():
    from helpers.tiny_models import tiny_model

    torch.manual_seed(0)
    model, input_ids = tiny_model("llama"), torch.randint(0, 97, (1, 12))
    hidden = torch.randn(11, 32, requires_grad=True)
    names = {"model": model, "input_ids": input_ids, "ref_hidden": torch.randn(11, 32)}
    text = code("The kernels alone").replace(
        "hidden = model.model(input_ids).last_hidden_state[0, :-1]", "hidden = given"
    )
    assert "given" in text
    exec(compile(text, "README", "exec"), names | {"given": hidden}, names)
    logits = hidden @ model.lm_head.weight.T
    expected = logits.log_softmax(-1)[torch.arange(11), input_ids[0, 1:]]
    torch.testing.assert_close(names["logp"], expected, rtol=1e-4, atol=1e-4)
    assert hidden.grad.abs().sum() > 0 and names["loss"].item() > 0
    with torch.no_grad():
        exec(compile(code("The kernels alone").split("loss, logprobs")[0], "README", "exec"), names)


def test_from_python(byte_model, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(tmp_path)
    (tmp_path / "forget.jsonl").write_text('{"question": "Who?", "answer": "Nobody."}\n' * 3)
    (tmp_path / "retain.jsonl").write_text('{"question": "Where?", "answer": "Nowhere."}\n')
    names = {
        "model": AutoModelForCausalLM.from_pretrained(byte_model),
        "tokenizer": AutoTokenizer.from_pretrained(byte_model),
    }
    text = code("From Python").replace('output_dir="out"', 'output_dir="out", max_steps=2, use_cpu=True')
    assert "max_steps=2" in text
    exec(compile(text, "README", "exec"), names)
    assert names["trainer"].state.global_step == 2
