"""A mistake in the command line or the data ends in one clear sentence and exit code 2, with nothing written."""

from __future__ import annotations

import errno
import importlib
import io
import json
import os
import shutil
import socketserver
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from lowmem_npo.cli import COMMANDS, main

GOOD = '{"question": "Who?", "answer": "Nobody."}\n'
KEPT = '{"question": "Where?", "answer": "Nowhere."}\n'


@pytest.fixture
def files(tmp_path):
    (tmp_path / "forget.jsonl").write_text(GOOD * 2)
    (tmp_path / "retain.jsonl").write_text(KEPT)
    return tmp_path


def run(byte_model, files, *more, forget="forget.jsonl", retain="retain.jsonl"):
    return main(["train", "--model", str(byte_model), "--forget", str(files / forget), "--retain", str(files / retain),
                 "--output-dir", str(files / "out"), "--eval-rows", "0", "--max-steps", "1", *more])  # fmt: skip


def fails(capsys, code, *messages):
    out, err = capsys.readouterr()
    assert code == 2, out
    line = err.strip().splitlines()[-1]
    assert line.startswith("lowmem-npo train: ") and "Traceback" not in err
    assert all(message in line for message in messages), line


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "empty"),
        (GOOD + '{"question": "Who", "answer"\n', "2"),
        (GOOD + '{"question": "Who?"}\n', "answer"),
        (GOOD + '{"question": "Who?", "answer": "  "}\n', "empty answer"),
        (GOOD + '{"question": "Who?", "answer": 12}\n', "2"),
        ('{"a": "x", "b": "y"}\n', "a, b"),
    ],
)
def test_bad_rows(content, message, byte_model, files, capsys):
    (files / "bad.jsonl").write_text(content)
    fails(capsys, run(byte_model, files, forget="bad.jsonl"), "bad.jsonl", message)
    assert not (files / "out").exists()


def test_missing_file(byte_model, files, capsys):
    fails(capsys, run(byte_model, files, forget="absent.jsonl"), "absent.jsonl")


def test_an_answer_truncated_to_nothing(byte_model, files, capsys):
    (files / "long.jsonl").write_text(json.dumps({"input": "x" * 50, "output": "y"}) + "\n")
    fails(capsys, run(byte_model, files, "--max-length", "40", forget="long.jsonl"), "long.jsonl", "--max-length")


def test_overlap_is_reported_and_can_be_allowed(byte_model, files, capsys):
    (files / "both.jsonl").write_text(KEPT + GOOD)
    fails(capsys, run(byte_model, files, retain="both.jsonl"), "forget.jsonl", "both.jsonl", "--allow-overlap")
    assert run(byte_model, files, "--allow-overlap", retain="both.jsonl") == 0


def test_an_output_directory_in_use(byte_model, files, capsys):
    assert run(byte_model, files) == 0
    fails(capsys, run(byte_model, files), "out", "finished run")
    fails(capsys, run(byte_model, files, "--resume", "--beta", "0.1"), "beta")
    shutil.rmtree(files / "out")
    (files / "out").mkdir()
    (files / "out" / "thesis.tex").write_text("")
    fails(capsys, run(byte_model, files), "other files")
    assert [p.name for p in (files / "out").iterdir()] == ["thesis.tex"]
    shutil.rmtree(files / "out")
    fails(capsys, run(byte_model, files, "--resume"), "no run")
    (files / "out").write_text("")
    fails(capsys, run(byte_model, files), "is a file")
    below = ["--dry-run", "--output-dir", str(files / "out" / "mine")]
    fails(capsys, run(byte_model, files, *below), f"mine' cannot be made: '{files / 'out'}' is a file")


def test_a_dry_run_knows_that_flash_attention_is_not_installed(byte_model, files, capsys):
    flash = ["--attn", "flash_attention_2", "--device", "cpu"]
    fails(capsys, run(byte_model, files, "--dry-run", *flash), "flash-attn is not installed")


def test_an_unknown_target_lists_the_candidates(byte_model, files, capsys):
    fails(capsys, run(byte_model, files, "--lora-targets", "query"), "query", "q_proj", "down_proj")
    fails(capsys, run(byte_model, files, "--lora-targets", "lm_head"), "lm_head", "frozen")
    for other in ("norm", "self_attn", "act_fn", "embed_tokens --lora-layers 0"):  # PEFT adapts none of these
        options = ["--dry-run", "--lora-targets", *other.split()]
        fails(
            capsys, run(byte_model, files, *options), "PEFT cannot adapt these (Target module", "down_proj, gate_proj"
        )
    assert not (files / "out").exists()


def test_models_that_are_not_causal(byte_model, files, capsys, tmp_path):
    from transformers import BertConfig, T5Config

    for config in (
        T5Config(architectures=["T5ForConditionalGeneration"]),
        BertConfig(architectures=["BertForMaskedLM"]),
    ):
        config.save_pretrained(tmp_path / "other")
        fails(capsys, run(tmp_path / "other", files), "not a causal language model", config.architectures[0])
    (tmp_path / "other" / "config.json").write_text('{"model_type": "hf_olmo"}')
    fails(capsys, run(tmp_path / "other", files), "original format")
    (tmp_path / "other" / "config.json").write_text("{")
    fails(capsys, run(tmp_path / "other", files), "config.json")
    (tmp_path / "other" / "config.json").unlink()
    fails(capsys, run(tmp_path / "other", files), "config.json")
    fails(capsys, run(tmp_path / "none" / "here", files), "There is no directory")


def test_no_network_and_no_copy(files, capsys, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    fails(capsys, run("allenai/OLMo-7B", files), "allenai/OLMo-7B", "the hub cannot be reached")


@pytest.mark.parametrize("source", ["--model", "--forget"])
def test_a_hub_that_does_not_answer_is_asked_once(source, byte_model, files, tmp_path):
    """The libraries would ask for every file, five times, and wait in between."""
    asked, is_over = [], threading.Event()

    class Hub(socketserver.BaseRequestHandler):
        def handle(self):
            asked.append(self.request.recv(1000))
            is_over.wait()

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{hub.server_address[1]}"
        rows = {"--forget": str(files / "forget.jsonl"), "--retain": str(files / "retain.jsonl")}
        options = {"--model": str(byte_model), **rows, source: "someone/something"}
        words = ["train", *(word for option in options.items() for word in option)]
        start = "import sys, lowmem_npo.libraries as l, lowmem_npo.cli as c; l.HUB_SECONDS = 0.1; sys.exit(c.main())"
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        process = subprocess.run(
            [sys.executable, "-c", start, *words], env=environment, capture_output=True, text=True, timeout=300
        )
        is_over.set()
        hub.shutdown()
    assert process.returncode == 2 and "the hub cannot be reached" in process.stderr, process.stderr
    assert source == "--forget" or f"({address}: " in process.stderr
    assert len(asked) == 1


def test_remote_code_is_never_run(byte_model, files, capsys, tmp_path):
    folder = tmp_path / "custom"
    folder.mkdir()
    (folder / "config.json").write_text(
        '{"model_type": "mine", "architectures": ["MineForCausalLM"], "auto_map": {"AutoConfig": "mine.C", '
        '"AutoModelForCausalLM": "mine.M"}}'
    )
    marker = tmp_path / "ran"
    (folder / "mine.py").write_text(f"open({str(marker)!r}, 'w')\n")
    fails(capsys, run(folder, files), "never run here")
    assert not marker.exists()


def test_flash_attention_not_installed(byte_model, files, capsys):
    fails(capsys, run(byte_model, files, "--attn", "flash_attention_2"), "flash-attn is not installed", "sdpa")


def test_no_gpu(byte_model, files, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    fails(capsys, run(byte_model, files, "--device", "cuda"), "no CUDA GPU")


def test_a_full_disk(byte_model, files, capsys, monkeypatch):
    usage = shutil.disk_usage(files)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=300_000))
    fails(capsys, run(byte_model, files), "has 293.0 KiB free, the run writes up to 64.")
    assert not (files / "out").exists()


def test_a_terminal_that_cannot_show_the_text(byte_model, files, monkeypatch):
    """It never ends a command: merge used to fail after writing, over one "…"."""
    (files / "forget.jsonl").write_text(json.dumps({"question": "Zoë 鐘\u202e", "answer": "…"}) + "\n")
    for encoding, shown in (("ascii", "Zo\\xeb \\u9418"), ("latin-1", "Zoë \\u9418"), ("utf-8", "Zoë 鐘")):
        with monkeypatch.context() as terminal:
            terminal.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
            assert run(byte_model, files, "--preview", "1") == 0
            sys.stdout.flush()
            assert shown in sys.stdout.buffer.getvalue().decode(encoding)


def test_an_argument_that_is_not_text(capsys):
    for command in COMMANDS:  # "ö" in Latin-1, as Python reads it
        assert main([command, "--output-dir", os.fsdecode(b"\xf6")]) == 2
        assert "is not UTF-8 text: rename the file" in capsys.readouterr().err


def test_an_interrupted_command_says_so(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("lowmem_npo.commands.merge"), "main", interrupted)
    assert main(["merge"]) == 130
    assert capsys.readouterr().err == "lowmem-npo merge: interrupted.\n"


def test_no_library_writes_to_the_terminal(byte_model, files):
    data = ["--forget", files / "forget.jsonl", "--retain", files / "retain.jsonl"]
    settings = ["--device", "cpu", "--max-steps", 1, "--eval-rows", 1, "--output-dir", files / "out"]
    result = subprocess.run(
        [sys.executable, "-m", "lowmem_npo", *map(str, ["train", "--model", byte_model, *data, *settings])],
        capture_output=True, text=True, cwd=Path(__file__).parents[1], env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert all(line.startswith("unlearning, step 1 of 1: forget loss") for line in result.stderr.splitlines() if line)


@pytest.mark.parametrize("words", [["--help"], ["train", "--help-all"], ["env"]])
def test_a_reader_that_leaves_ends_a_command_quietly(words):
    """As `lowmem-npo … | head` does."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "lowmem_npo", *words]
    result = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(write_end)
    assert (result.returncode, result.stderr) == (141, "")


@pytest.mark.parametrize("words, code, error", [
    ("--help > /dev/full", 2, "lowmem-npo: what it prints cannot be written: No space left on device.\n"),
    ("--help <&- >&-", 0, ""),
    ("nonsense 2> /dev/full", 2, ""),
    ("nonsense <&- >&- 2>&-", 2, ""),
])  # fmt: skip
def test_nobody_need_listen(words, code, error):
    """A full disk behind what is printed, or nothing at all."""
    line = f"exec '{sys.executable}' -m lowmem_npo {words}"
    result = subprocess.run(["sh", "-c", line], stderr=subprocess.PIPE, text=True, timeout=300)
    assert (result.returncode, result.stderr) == (code, error)


def test_closed_streams_are_open_here_and_in_children():
    """Nothing is typed at one, and what a child opens does not take its place."""
    code = """import os, subprocess, sys
from lowmem_npo.libraries import prepare_console
prepare_console()
try:
    input()
except EOFError:
    child = "import os; open(os.environ['OUT'], 'w').write(' '.join(os.readlink(f'/dev/fd/{n}') for n in range(3)))"
    sys.exit(subprocess.run([sys.executable, "-c", child]).returncode)
sys.exit(7)
"""
    with tempfile.NamedTemporaryFile("r") as out:
        command = ["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, code]
        assert subprocess.run(command, env={**os.environ, "OUT": out.name}, timeout=300).returncode == 0
        assert out.read() == "/dev/null /dev/null /dev/null"


class Full(io.StringIO):
    def flush(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_only_what_is_printed_is_called_so(monkeypatch, capsys):
    """Called from Python, where stdout may be no file; with a pipe of its own that breaks."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Full())
        assert main(["--version"]) == 2
    assert capsys.readouterr().err == "lowmem-npo: what it prints cannot be written: No space left on device.\n"

    def breaks(arguments):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    monkeypatch.setattr("lowmem_npo.commands.env.main", breaks)
    with pytest.raises(BrokenPipeError):
        main(["env"])
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "w") as nobody_reads:
        monkeypatch.setattr(sys, "stdout", nobody_reads)
        assert main(["env"]) == 141
