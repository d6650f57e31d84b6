"""Help, and mistakes in options and paths, are answered without the libraries that take seconds to import."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from lowmem_npo.cli import COMMANDS

# What importing any of these takes is most of a second, or several.
HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate", "scipy", "sklearn", "nltk", "pandas", "matplotlib")
TRAIN = ["--model", "m", "--forget", "builtin", "--retain", "builtin"]
MISTAKES = [
    (["train", "--model", "./nowhere"], "There is no directory './nowhere'"),
    (["train", "--model", "a/b/c", "--forget", "builtin"], "There is no directory 'a/b/c'"),
    (["train", "--model", "m", "--forget", "nowhere.jsonl", "--retain", "builtin"], "There is no file nowhere.jsonl"),
    (["train", "--model", "m", "--forget", "a.txt,b.txt", "--retain", "builtin"], "There is no file a.txt"),
    (["train", "--model", "m", "--forget", "o/d", "--retain", "no where"], "is neither a file nor a hub name"),
    (["train", "--adapter", "./nowhere"], "There is no directory './nowhere'"),
    (["train", *TRAIN, "--weight-decoy", "1"], "did you mean --weight-decay?"),
    (["train", *TRAIN, "--lr", "-1"], "--lr must be 0 or a positive number"),
    (["train", *TRAIN, "--batch-size", "many"], "must be a whole number, not 'many'"),
    (["train", *TRAIN, "--config", "nowhere.yaml"], "cannot read 'nowhere.yaml'"),
    (["train", *TRAIN, "--config", "pipe.txt"], "'pipe.txt' cannot be used: it must hold lines"),
    (["train", "--model", "m", "--forget", "pipe.txt", "--retain", "builtin"], "pipe.txt is a pipe, a socket or a"),
    (
        ["train", *TRAIN, "--optim", "adamw_torch_fuse"],
        "has no such value as 'adamw_torch_fuse'; did you mean adamw_torch_fused or",
    ),
    (["train", *TRAIN, "--optim", "foo"], "--optim has no such value as 'foo'; there are adamw_torch, "),
    (["train", *TRAIN, "--lr-scheduler-type", "cosin"], "constant, "),
    (["train", *TRAIN, "--lr-scheduler-type=cosin"], "not 'cosin'; did you mean cosine?"),
    (["train", *TRAIN, "--save-strategy", "best"], "--save-strategy best is not supported by this trainer"),
    (["train", *TRAIN, "--logging-strategy", "x"], "--logging-strategy must be one of no, steps, epoch, not 'x'."),
    (["train", *TRAIN, "--weight-decay", "much"], "--weight-decay must be a number, not 'much'."),
    (["train", *TRAIN, "--weight-decay", "-1"], "--weight-decay must be 0 or a positive number, not -1"),
    (["train", *TRAIN, "--dataloader-num-workers", "2.5"], "must be a whole number, not '2.5'."),
    (["train", *TRAIN, "--report-to", "wandb", "tensorbord"], "not 'tensorbord'; did you mean tensorboard?"),
    (["train", *TRAIN, "--log-level", "loud"], "--log-level must be one of detail, debug, "),
    (["train", *TRAIN, "--tf32", "maybe"], "--tf32 must be true or false, not 'maybe'."),
    (["train", *TRAIN, "--leaks", "extration"], "There is no leak test 'extration' here: did you mean extraction?"),
    (["train", *TRAIN, "--dtype", "fp16"], "--dtype must be one of bf16, float32, not 'fp16'; did you mean bf16?"),
    (["train", *TRAIN, "--joint-pass-tokens", "many"], "must be a whole number or auto, not 'many'"),
    (["estimate", "--model", "m", "--optim", "foo"], "--optim has no such value as 'foo'"),
    (["sweep", *TRAIN, "--grid", "gamma=1", "--lr-scheduler-type", "x"], "must be one of linear, cosine"),
    (["train", "--model", "./nowhere", "--weight-decay", "0.1"], "There is no directory './nowhere'"),
    (["estimate", "--model", "/nowhere/at/all"], "There is no directory"),
    (["estimate", "--model", "m", "--max-lenght", "3"], "did you mean --max-length?"),
    (["sweep", "--model", "~/nowhere"], "There is no directory"),
    (["estimate", "--model", "~no-such-user/nowhere"], "There is no directory"),  # whose home is not known
    (["train", "--model", "./nowhere", "--output-dir=~no-such-user/run"], "There is no directory './nowhere'"),
    (["train", "--config=~no-such-user.yaml"], "cannot read '~no-such-user.yaml'"),
    (["train", "--resume", "--output-dir=~no-such-user/run"], "there is no run in '~no-such-user/run'"),
    (["report", "~no-such-user"], "There is no run in '~no-such-user'"),
    (["data", "~no-such-user.csv"], "There is no file ~no-such-user.csv"),
    (["sweep", *TRAIN, "--grid", "gama=1"], "gama"),
    (["data", "nowhere.csv"], "There is no file nowhere.csv"),
    (["data", "builtin", "/dev/zero"], "/dev/zero is a pipe, a socket or a device"),
    (["data", "--nera", "1", "builtin"], "--nera"),
    (["ask", "./nowhere", "Who?"], "There is no directory './nowhere'"),
    (["ask", "m", "--temprature", "1"], "--temprature"),
    (["merge", "--adapter", "nowhere", "--output-dir", "m"], "There is no directory 'nowhere': --adapter"),
    (["merge", "--adapter", ".", "--ouput-dir", "m"], "--ouput-dir"),
    (["evaluate", "--model", "./nowhere"], "There is no directory './nowhere'"),
    (["evaluate", "--adapter", "nowhere"], "There is no directory 'nowhere': --adapter"),
    (["evaluate", "--model", "m", "--members", "a.jsonl", "--nonmembers", "b.jsonl"], "There is no file a.jsonl"),
    (["evaluate", "--model", "m", "--before", "nowhere.json"], "--before: there is no file 'nowhere.json'"),
    (["evaluate", "--model", "m", "--retained-log", "pipe.txt"], "--retained-log: 'pipe.txt' is no file"),
    (["evaluate", "--model", "m", "--forget", "builtin", "--leaks", "extration"], "extration"),
    (["evaluate", "--model", "m", "--limt", "3"], "--limt"),
    (["evaluate"], "Nothing to evaluate"),
    (["report", "nowhere"], "There is no run in 'nowhere'"),
    (["report", "nowhere", "--exmples", "3"], "--exmples"),
    (["train", "--model", "o/m", "--forget", "frage.csv"], "frage.csv has the columns Frage, Antwort"),
    (
        ["train", "--model", "o/m", "--forget", "frage.csv", "--prompt-column", "F", "--answer-column", "Antwort"],
        "no column F",
    ),
    (
        ["train", "--model", "o/m", "--forget", "frage.csv", "--answer-column", "A"],
        "Antwort: neither A, named by --answer",
    ),
    (
        ["sweep", "--model", "o/m", "--forget", "frage.csv", "--grid", "beta=1"],
        "frage.csv has the columns Frage, Antwort",
    ),
    (["train", *TRAIN, "--resume", "--output-dir", "nowhere"], "--resume: there is no run in 'nowhere'"),
    (["train", "--model", "o/m", "--forget", "builtin", "--output-dir", "cache"], "'cache' holds other files"),
    (
        ["train", "--model", "o/m", "--forget", "builtin"],
        "The model 'o/m' is not on this machine and the hub cannot be",
    ),
    (["sweep", "--model", "o/m", "--forget", "builtin"], "The model 'o/m' is not on this machine"),
    (["ask", "runn", "Who?"], "The model 'runn' is not on this machine"),
    (["evaluate", "--model", "o/m", "--forget", "builtin"], "The model 'o/m' is not on this machine"),
    (["data", "o/d:facts"], "o/d:facts is no local file, the hub cannot be reached"),
    (["env", "--gpu"], "'--gpu' belongs to no option; env takes none"),
    (["demo", "--device", "tpu"], "tpu"),
    (["completion", "csh"], "must be one of"),
    (["schema", "--jsn"], "'--jsn' belongs to no option; schema takes none"),
    (["tarin"], "there is no command 'tarin'; did you mean train? The commands are "),
]
ASKED = [*([name, "--help"] for name in COMMANDS), ["train", "--help-all"], ["--help"], ["--version"]]

# Runs every command line and prints [exit code, what it printed on both streams, the heavy modules that it imported].
PROGRAM = """
import contextlib, io, json, sys
from lowmem_npo.cli import main
heavy, results = set(json.loads(sys.argv[1])), []
for arguments in json.loads(sys.argv[2]):
    printed, before = io.StringIO(), set(sys.modules)
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            code = main(arguments)
        except SystemExit as stopped:
            code = stopped.code
    results.append([code, printed.getvalue(), sorted(heavy & set(sys.modules) - before)])
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Command line -> what came of it."""
    lines = [arguments for arguments, _ in MISTAKES] + ASKED
    command, folder = (
        [sys.executable, "-c", PROGRAM, json.dumps(HEAVY), json.dumps(lines)],
        tmp_path_factory.mktemp("a"),
    )
    (folder / "cache" / "hub").mkdir(parents=True)  # of the hub, and a directory that holds something
    os.mkfifo(folder / "pipe.txt")  # nobody writes into it
    (folder / "frage.csv").write_text("Frage;Antwort\nWo?;Wien\n", encoding="utf-8")
    offline = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    offline |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    ran = subprocess.run(command, cwd=folder, env=offline, capture_output=True, text=True, check=True)
    return {tuple(line): answer for line, answer in zip(lines, json.loads(ran.stdout), strict=True)}


@pytest.mark.parametrize("arguments, message", MISTAKES, ids=[" ".join(line) for line, _ in MISTAKES])
def test_a_mistake_is_answered_at_once(arguments, message, answers):
    code, printed, imported = answers[tuple(arguments)]
    assert code == 2 and message in printed and imported == []


@pytest.mark.parametrize("arguments", ASKED, ids=" ".join)
def test_help_is_answered_at_once(arguments, answers):
    code, printed, imported = answers[tuple(arguments)]
    assert code in (0, None) and "lowmem-npo" in printed and imported == []
