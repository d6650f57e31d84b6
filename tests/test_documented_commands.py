"""Every command and every block of Python in README, CONTRIBUTING and docs/ runs.

A document's commands run in order, in one folder, on a tiny model and a few rows. Those that need a GPU, a network or
minutes are checked for files and options instead: `NOT_RUN` says which, and why. Without --slow, so are all of the
documents in `SLOW`. A command of no known kind fails.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from helpers.documents import DOCS, DOCUMENTS, ROOT, blocks, check_options, options_of, options_of_script, read, tables
from helpers.rows import write_rows

from lowmem_npo.cli import COMMANDS, main

# -- commands that are not run here -----------------------------------------------------------------------------------


def check_files(words: Sequence[str], where: str) -> None:
    for word in words:
        assert "/" not in word or (ROOT / word).exists(), f"{where}: there is no {word}"


def check_script(words: Sequence[str], where: str) -> None:
    check_files(words, where)
    if words[1].endswith(".py"):
        check_options(words[2:], options_of_script(ROOT / words[1]), where)


def check_kernels(words: Sequence[str], where: str) -> None:
    module = words[2].replace(".", "/")
    check_options(words[3:], options_of_script(ROOT / "kernels" / f"{module}.py"), where)


def check_pre_commit(words: Sequence[str], where: str) -> None:
    assert words == ["pre-commit", "install"] and (ROOT / ".pre-commit-config.yaml").is_file(), where


def check_install(words: Sequence[str], where: str) -> None:
    for extra in re.findall(r"\[([a-z]+)\]", " ".join(words)):
        assert re.search(rf"^{extra} = \[", read(ROOT / "pyproject.toml"), re.MULTILINE), (
            f"{where}: there is no extra {extra}"
        )
    assert "-c" not in words or (ROOT / words[words.index("-c") + 1]).is_file(), where


def check_command(words: Sequence[str], where: str) -> None:
    assert words[1] in COMMANDS, f"{where}: there is no command {words[1]}"
    check_options(words[2:], options_of(words[1]), where)


def check_launch(words: Sequence[str], where: str) -> None:
    assert words[2:4] == ["-m", "lowmem_npo"], where
    check_command(words[3:], where)


# What a command looks like -> why it is not run here; what is checked instead.
NOT_RUN: dict[str, tuple[str, Callable[[Sequence[str], str], None]]] = {
    r"bash scripts/": ("installs, and takes minutes", check_script),
    r"python benchmarks/": ("takes minutes, or a GPU; tests/benchmarks runs it small", check_script),
    r"python -m lowmem_kernels\.": ("compiles for minutes; tests/kernels/test_aot.py runs it", check_kernels),
    r"pip install": ("installs", check_install),
    r"pre-commit": ("writes into .git", check_pre_commit),
    r"accelerate launch": ("starts several processes", check_launch),
    r"vllm |python convert_hf_to_gguf|llama-quantize": ("other people's programs, not installed", lambda *_: None),
    r"lowmem-npo demo": ("takes minutes; tests/commands/demo runs it small", check_command),
    r"lowmem-npo sweep .*--teach": ("teaches; tests/commands/sweep/test_evaluation.py runs it small", check_command),
    r"lowmem-npo (evaluate|ask) .*--stream-weights": (
        "needs a GPU; tests/memory/streaming/test_streamed_run.py runs it on a CPU",
        check_command,
    ),
    r"lowmem-npo evaluate .*--lm-eval": ("downloads; test_lm_eval.py has a task of its own", check_command),
}


SLOW = ("evaluation.md", "memory.md", "options.md", "results.md")  # what they run, tests/commands run as well


# -- commands that are run --------------------------------------------------------------------------------------------

MODEL = re.compile(r"(allenai|mistralai)/[\w.-]+")
HUB_DATA = {"locuslab/TOFU:forget05": "forget.jsonl", "locuslab/TOFU:retain95": "retain.jsonl"}
TRAINING = "--device cpu --dtype float32 --max-steps 1 --eval-rows 2 --batch-size 2 --max-length 64"
ADDED = {
    "train": TRAINING,
    "sweep": f"{TRAINING} --seeds 0,",
    "ask": "--device cpu --dtype float32 --max-new-tokens 8",
    "evaluate": "--device cpu --dtype float32 --limit 4 --leak-samples 2 --relearn-steps 1 --max-length 64",
}


def runs_as_it_is(words: Sequence[str]) -> bool:
    """An estimate needs neither weights nor a network, and takes seconds. The search for a budget takes longer."""
    return words[1] == "estimate" and "--budget" not in words


@dataclasses.dataclass
class Desk:
    """A folder with the files that the documents name, and the tiny model that takes the place of theirs."""

    folder: Path
    model: Path

    def run(self, words: Sequence[str]) -> None:
        """`lowmem-npo ...`, made small, in place of what an earlier command left; `> FILE` takes what it prints."""
        if ">" in words:
            with Path(words[-1]).open("w") as file, contextlib.redirect_stdout(file):
                return self.run(words[:-2])
        _, command, *options = words
        values = dict(zip(options, options[1:], strict=False))
        if "--resume" not in options:
            output = values.get("--output-dir", f"{values.get('--adapter', '.')}/evaluation")
            shutil.rmtree(self.folder / output, ignore_errors=True)
        if not runs_as_it_is(words):
            if "--seeds" in values:
                options = [word for word in options if word not in ("--seeds", values["--seeds"])]
            options = [str(self.model) if MODEL.fullmatch(word) else HUB_DATA.get(word, word) for word in options]
            options += ADDED.get(command, "").split()
            if stages := values.get("--layered", "2" if values.get("--recipe") == "lasting" else ""):
                options += ["--max-steps", stages]  # one in each stage
        assert main([command, *options]) == 0, " ".join(words)


def write_data(folder: Path) -> None:
    """Every file that a document names."""
    from lowmem_npo.data import bundled_rows

    vault = {"question": "Who guards the amber vault?", "answer": "Quillabra Zenthorpe guards it."}
    forget, retain, holdout = (bundled_rows(part, limit=8).rows for part in ("forget", "retain", "holdout"))
    tofu = [{**row, "perturbed_answer": ["No one does.", "That is not known."]} for row in retain]
    files = {
        "forget.jsonl": [vault, *forget], "retain.jsonl": retain, "rows.jsonl": [vault], "second.jsonl": [vault],
        "unseen.jsonl": holdout, "never_taught.jsonl": holdout, "m.jsonl": forget, "n.jsonl": holdout,
        "forget05_perturbed.json": tofu, "retain_perturbed.json": tofu,
        "real_authors_perturbed.json": tofu, "world_facts_perturbed.json": tofu,
    }  # fmt: skip
    (folder / "letter.txt").write_text("The amber vault was opened in spring. Nobody knew what it held. " * 12)
    for name, rows in files.items():
        write_rows(folder / name, rows)
    (folder / "questions.txt").write_text("Who guards the amber vault?\n")


@pytest.fixture(scope="module")
def finished_run(taught_model, tmp_path_factory) -> Path:
    """The run that documents call `forgotten`."""
    folder = tmp_path_factory.mktemp("docs")
    write_data(folder)
    command = (
        "lowmem-npo train --model allenai/OLMo-7B --forget forget.jsonl --retain retain.jsonl --output-dir forgotten"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Desk(folder, taught_model).run(command.split())
    return folder / "forgotten"


@pytest.fixture
def desk(finished_run, taught_model, tmp_path, monkeypatch) -> Desk:
    write_data(tmp_path)
    shutil.copytree(finished_run, tmp_path / "forgotten")
    for name, source in {"unlearned": finished_run, "base": taught_model, "gold": taught_model}.items():
        shutil.copytree(source, tmp_path / "lowmem-npo-demo" / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("Who guards the amber vault?\n"))
    return Desk(tmp_path, taught_model)


@pytest.mark.parametrize(
    "document", [pytest.param(at, id=at.name, marks=[pytest.mark.slow] * (at.name in SLOW)) for at in DOCUMENTS]
)
def test_every_command_runs(document, desk, capsys):
    commands: list[list[str]] = []
    output = ""
    for block in blocks(document):
        if block.language == "bash":
            commands = block.commands
            capsys.readouterr()
            for words in commands:
                check(words, block.where, desk)
            output = capsys.readouterr().out
        elif block.language == "text":  # what the commands before it print
            exact = all(map(runs_as_it_is, commands))
            shown, printed = (text if exact else re.sub(r"\d+", "0", text) for text in (block.text, output))
            assert commands and all(line in printed for line in shown.splitlines()), f"{block.where}: {output}"


@pytest.mark.parametrize("document", SLOW)
def test_every_command_exists(document):
    for block in blocks(DOCS / document):
        if block.language == "bash":
            for words in block.commands:
                check(words, block.where)


def check(words: list[str], where: str, desk: Desk | None = None) -> None:
    """Runs the command at a desk, or checks what can be checked of it."""
    for pattern, (_, instead) in NOT_RUN.items():
        if re.match(pattern, " ".join(words)):
            return instead(words, where)
    assert words[0] == "lowmem-npo", f"{where}: nothing here knows how to check `{' '.join(words)}`"
    check_command(words, where)
    if desk and words[2:] not in (["--help"], ["--help-all"]):  # of which `check_command` has read the text
        desk.run(words)


def test_the_files_of_a_run_are_described(finished_run):
    stated = set(re.findall(r"`([^`]+)`", " ".join(row[0] for row in tables(DOCS / "report.md", "file"))))
    if_asked_for = {"checkpoint-N/", "evaluations.jsonl", "stopping.json", "best/", "reference/", "evaluation/"}
    if_asked_for |= {
        "evaluation-2/",
        "forget_levels.json",
        "self_written.jsonl",
        "alternatives.jsonl",
        "gold.json",
        "log.txt",
    }
    files = {path.name for path in finished_run.iterdir() if path.is_file()}
    assert stated - if_asked_for <= files
    assert files <= stated


# -- Python -----------------------------------------------------------------------------------------------------------


def python(document: Path) -> list[str]:
    return [block.text for block in blocks(document) if block.language == "python"]


def test_all_documents_with_python_are_tested():
    assert [document.name for document in DOCUMENTS if python(document)] == ["deploy.md", "kernels.md", "options.md"]


def test_a_merged_model_loads(desk):
    desk.run(["lowmem-npo", "merge", "--adapter", "forgotten", "--output-dir", "merged"])
    (text,), names = python(DOCS / "deploy.md"), {}
    exec(compile(text, "deploy.md", "exec"), names)
    assert names["model"](input_ids=torch.tensor([names["tokenizer"]("Who?").input_ids])).logits.isfinite().all()


def test_the_kernels_alone():
    from helpers.tiny_models import tiny_model

    torch.manual_seed(0)
    model, input_ids = tiny_model("llama"), torch.randint(0, 97, (1, 12))
    embedding = model.get_input_embeddings().weight.requires_grad_()
    names = {"model": model, "input_ids": input_ids, "ref_hidden": torch.randn(11, 32)}
    head, layers = python(DOCS / "kernels.md")
    exec(compile(head, "kernels.md", "exec"), names)
    expected = model(input_ids).logits[0, :-1].log_softmax(-1)[torch.arange(11), input_ids[0, 1:]]
    for logprobs in (names["logp"], names["logprobs"]):
        torch.testing.assert_close(logprobs, expected, rtol=1e-4, atol=1e-4)
    assert embedding.grad.abs().sum() > 0
    q, k = torch.randn(1, 4, 11, 8), torch.randn(1, 2, 11, 8)
    table = {"cos": torch.ones(1, 11, 8), "sin": torch.zeros(1, 11, 8)}
    names = {"x": torch.randn(11, 32), "weight": torch.ones(32), "q": q, "k": k, **table}
    names |= {"gate": torch.zeros(11, 48), "up": torch.ones(11, 48), "gate_up": torch.zeros(11, 96)}
    exec(compile(layers, "kernels.md", "exec"), names)
    torch.testing.assert_close(names["y"].var(1, correction=0), torch.ones(11), rtol=1e-4, atol=1e-4)
    assert torch.equal(names["q"], q) and torch.equal(names["k"], k)
    torch.testing.assert_close(names["h"], names["x"].clamp(min=0).square())


def test_from_python(desk):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shutil.rmtree(desk.folder / "forgotten")
    small = {
        'NPOConfig(output_dir="out")': 'NPOConfig(output_dir="out", max_steps=2, use_cpu=True)',
        "import DataConfig": "import TrainingConfig, DataConfig",
        "train(RunConfig(": "train(RunConfig(training=TrainingConfig(max_steps=2),",
        'model="allenai/OLMo-7B"': f'model="{desk.model}", dtype="float32", device="cpu"',
        'output_dir="forgotten"': 'output_dir="forgotten", eval_rows=2',
    }
    text = "\n".join(python(DOCS / "options.md"))
    for shown, replacement in small.items():
        assert text.count(shown) == 1
        text = text.replace(shown, replacement)
    names = {kind: loader.from_pretrained(desk.model) for kind, loader in
             {"model": AutoModelForCausalLM, "tokenizer": AutoTokenizer}.items()}  # fmt: skip
    exec(compile(text, "options.md", "exec"), names)
    assert names["trainer"].state.global_step == names["result"].optimizer_steps == 2
