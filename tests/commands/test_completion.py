"""The script of `lowmem-npo completion`, sourced by a real bash, which is asked for what the Tab key would give."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from lowmem_npo.cli import COMMANDS, main

# Completes the last of the words that it is given, as readline does, and prints what there is to choose from.
TAB = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
registered=$(complete -p lowmem-npo); set -- $registered
while [ "$1" != -F ]; do shift; done
"$2"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """The file that a user makes with `lowmem-npo completion bash > FILE`."""
    folder = tmp_path_factory.mktemp("completion")
    command = [sys.executable, "-m", "lowmem_npo", "completion", "bash"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True)
    (folder / "script").write_text(printed.stdout)
    (folder / "forget_me.jsonl").write_text("")
    return folder / "script"


@pytest.fixture
def completions(script):
    if shutil.which("bash") is None:
        pytest.skip("needs bash")

    def completed(*words):
        command = ["bash", "--norc", "-c", TAB, "tab", str(script), *words]
        printed = subprocess.run(command, cwd=script.parent, check=True, capture_output=True, text=True)
        assert not printed.stderr
        return [line for line in printed.stdout.splitlines() if line]

    return completed


def test_commands(completions):
    assert set(completions("lowmem-npo", "")) >= set(COMMANDS)
    assert completions("lowmem-npo", "ev") == ["evaluate"]


@pytest.mark.parametrize(
    "command, typed, offered",
    [
        ("train", "--lora-", {"--lora-r", "--lora-alpha", "--lora-dropout", "--lora-targets", "--lora-layers"}),
        ("train", "--conf", {"--config"}),
        ("train", "--warmup-", {"--warmup-steps", "--warmup-ratio"}),
        ("sweep", "--see", {"--seed", "--seeds"}),
        ("sweep", "--teach-", {"--teach-epochs", "--teach-lr", "--teach-batch-size"}),
        ("sweep", "--gri", {"--grid"}),
        ("estimate", "--bud", {"--budget"}),
        ("estimate", "--gpu", {"--gpu"}),
        ("estimate", "--js", {"--json"}),
        ("evaluate", "--hold", {"--holdout"}),
        ("merge", "--quant", {"--quantize-check"}),
        ("ask", "--max-new", {"--max-new-tokens"}),
        ("demo", "--se", {"--seed"}),
        ("report", "--pro", {"--prove"}),
        ("data", "--lim", {"--limit"}),
    ],
)
def test_options(completions, command, typed, offered):
    assert set(completions("lowmem-npo", command, typed)) == offered


def test_choices_and_files(completions):
    assert completions("lowmem-npo", "train", "--dtype", "") == ["bf16", "float32"]
    assert completions("lowmem-npo", "merge", "--base-weights", "w") == ["whole"]
    assert completions("lowmem-npo", "sweep", "--teach", "f") == ["full"]
    assert completions("lowmem-npo", "train", "--qlora", "--forget", "forget_") == ["forget_me.jsonl"]


@pytest.mark.full
@pytest.mark.parametrize("shell, word", [("zsh", "#compdef lowmem-npo"), ("fish", "function _tyro_lowmem_npo")])
def test_other_shells(shell, word, capsys):
    assert main(["completion", shell]) == 0
    assert word in capsys.readouterr().out
