"""README, CONTRIBUTING and docs/ say what is so: every command and every block of Python runs, every option, default,
link and message exists.

A document's commands run in order, in one folder, on a tiny model and a few rows. Those that need a GPU, a network or
minutes are checked for files and options instead: `NOT_RUN` says which, and why. A command of no known kind fails.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import io
import json
import re
import shlex
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

import lowmem_npo
from lowmem_npo.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parents[1]
DOCS, README, PYPROJECT = ROOT / "docs", ROOT / "README.md", ROOT / "pyproject.toml"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]*")

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


# -- documents --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of code. where: its document and first line."""

    where: str
    language: str
    text: str

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command: continued lines are one, comments and settings of the environment left out."""
        lines = self.text.replace("\\\n", " ").splitlines()
        split = [shlex.split(re.sub(r"^[A-Z_]+=\S+ ", "", line), comments=True) for line in lines]
        return [words for words in split if words]


def blocks(document: Path) -> list[Block]:
    found, text = [], read(document)
    for match in re.finditer(r"^( *)```(\w*)\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE):
        indent, language, code = match.groups()
        line = text.count("\n", 0, match.start()) + 1
        found.append(
            Block(f"{document.name}, line {line}", language, re.sub(f"^{indent}", "", code, flags=re.MULTILINE))
        )
    assert text.count("```") == 2 * len(found), f"{document.name}: a block has no end"
    return found


def prose(document: Path) -> str:
    """The text outside fenced blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", read(document), flags=re.DOTALL | re.MULTILINE)


def tables(document: Path, first_title: str) -> list[list[str]]:
    """The rows, below the header, of every table whose first column has this title."""
    rows, inside = [], False
    for line in read(document).splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        inside = bool(cells) and (inside or cells[0] == first_title)
        if inside and cells[0] != first_title and not re.fullmatch(r":?-+:?", cells[0]):
            rows.append(cells)
    return rows


def anchors(document: Path) -> set[str]:
    """Where links into `document` may point, as GitHub makes them from headings."""
    headings = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# -- options ----------------------------------------------------------------------------------------------------------


@cache
def options_of(command: str) -> frozenset[str]:
    """Every flag that `lowmem-npo COMMAND` takes."""
    from transformers import TrainingArguments

    from lowmem_npo.commands.arguments import ALIASES

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([command, "--help-all" if command == "train" else "--help"])
    flags = {"--help", "--help-all", *FLAG.findall(printed.getvalue())}
    if command == "train":
        names = ["config", *ALIASES, *TrainingArguments.__dataclass_fields__]
        flags |= {f"--{name.replace('_', '-')}" for name in names}
    if command in ("sweep", "estimate"):
        flags |= options_of("train")
    return frozenset(flags)


def options_of_script(script: Path) -> set[str]:
    """Every flag that a script of ours declares."""
    return {"--help", *re.findall(r"add_argument\(\s*\"(--[a-z-]+)\"", read(script))}


def check_options(words: Sequence[str], known: Collection[str], where: str) -> None:
    for flag in FLAG.findall(" ".join(words)):
        assert flag.replace("_", "-") in known, f"{where}: there is no {flag}"


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
        assert re.search(rf"^{extra} = \[", read(PYPROJECT), re.MULTILINE), f"{where}: there is no extra {extra}"
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
            if stages := values.get("--layered", "3" if values.get("--recipe") == "lasting" else ""):
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
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
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


@pytest.mark.no_cover
@each_document
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


def check(words: list[str], where: str, desk: Desk) -> None:
    """Runs the command, or checks what can be checked of it."""
    for pattern, (_, instead) in NOT_RUN.items():
        if re.match(pattern, " ".join(words)):
            return instead(words, where)
    assert words[0] == "lowmem-npo", f"{where}: nothing here knows how to check `{' '.join(words)}`"
    check_command(words, where)
    if words[2:] not in (["--help"], ["--help-all"]):  # of which `check_command` has read the text
        desk.run(words)


@each_document
def test_every_block_is_of_a_kind_that_is_checked(document):
    for block in blocks(document):
        assert block.language in ("bash", "text", "python", "json"), block.where
        if block.language == "json":
            assert all(json.loads(line) for line in block.text.splitlines())
    indented = re.findall(r"^ {4,}(\S+)", prose(document), re.MULTILINE)
    assert not {"lowmem-npo", "python", "bash", "pip", "import", "from"} & set(indented), "an unchecked block of code"


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


# -- what is named exists ---------------------------------------------------------------------------------------------


@each_document
def test_every_option_exists(document):
    scripts = [*(ROOT / "benchmarks").glob("*.py"), ROOT / "kernels" / "lowmem_kernels" / "aot.py"]
    known = {"--fix"}.union(*map(options_of, COMMANDS), *map(options_of_script, scripts))  # --fix: of ruff
    for code in re.findall(r"`([^`\n]+)`", prose(document)):
        check_options([code], known, document.name)
        if match := re.match(r"lowmem-npo (\w+)", code):
            assert match[1] in {*COMMANDS, "COMMAND", "X"}, f"{document.name}: {code}"


@each_document
def test_links_resolve(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            file = (document.parent / path).resolve() if path else document
            assert file.exists(), f"{document.name}: there is no {path}"
            assert not anchor or anchor in anchors(file), f"{document.name}: {path} has no heading {anchor}"


def test_the_readme_is_short_and_leads_to_every_page():
    lines = read(README).splitlines()
    assert len(lines) <= 140
    for script in ("demo", "test"):
        assert any(line.startswith(f"bash scripts/{script}.sh") for line in lines[:25])
    assert set(re.findall(r"\(docs/([\w-]+\.md)", read(README))) == {page.name for page in DOCS.glob("*.md")}


def test_a_newcomers_questions_are_answered_by_the_files_that_are_named():
    rows = tables(DOCS / "architecture.md", "question")
    assert len(rows) == 13
    for question, links, symbols in rows:
        files = [read(DOCS / path) for path in re.findall(r"\]\(([^)]+)\)", links)]
        names = re.findall(r"`(\w+)`", symbols)
        assert names and all(name in file for name, file in zip(names, files, strict=True)), question


def test_the_messages_are_those_that_are_printed():
    known = {text for file in (ROOT / "lowmem_npo").rglob("*.py") for text in strings(file)}
    known |= {*re.findall(r'fail "(.+)"', read(ROOT / "scripts" / "setup_venv.sh"))}
    messages = re.findall(r"^> (.+)$", read(DOCS / "troubleshooting.md"), re.MULTILINE)
    assert len(messages) > 20
    assert not [message for message in messages if not any(same(message, text) for text in known)]


def strings(file: Path) -> Iterator[str]:
    """Every string of a module; what an f-string computes is shown as …."""
    for node in ast.walk(ast.parse(read(file))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)


def same(message: str, text: str) -> bool:
    """Whether one is the other with something definite in place of …."""
    return any(
        len(pattern.replace("…", "")) > 20 and matches(pattern, other)
        for pattern, other in ((text, message), (message, text))
    )


def matches(pattern: str, text: str) -> bool:
    """Whether `text` is `pattern` with anything in place of each …."""
    first, *parts = pattern.split("…")
    if not parts:
        return text == first
    if not (text.startswith(first) and text.endswith(parts[-1]) and len(text) >= len(first) + len(parts[-1])):
        return False
    at, end = len(first), len(text) - len(parts[-1])
    for part in parts[:-1]:
        if (at := text.find(part, at, end)) < 0:
            return False
        at += len(part)
    return True


# -- what is said elsewhere is said alike -----------------------------------------------------------------------------


def test_options_have_the_defaults_that_the_page_states():
    from lowmem_npo.config import SECTIONS

    stated = {option.strip("`"): default.strip("`") for option, default, _ in tables(DOCS / "options.md", "option")}
    fields = [field for section in SECTIONS.values() for field in dataclasses.fields(section)]
    assert list(stated) == [f"--{field.name.replace('_', '-')}" for field in fields]
    for field, text in zip(fields, stated.values(), strict=True):
        default = field.default
        if default is dataclasses.MISSING:
            assert text == "required"
        elif isinstance(default, bool):
            assert text == ("on" if default else "off"), field.name
        elif isinstance(default, int | float):
            assert float(text) == default, field.name
        else:
            assert text == ((default if isinstance(default, str) else " ".join(default or ())) or "–"), field.name


def test_every_leak_test_is_described_as_in_the_help():
    from lowmem_npo.evaluation.leaks.registry import LEAK_TESTS

    stated = {name.strip("`"): summary for name, summary, _ in tables(DOCS / "evaluation.md", "test")}
    assert list(stated.items()) == [(test.name, test.summary) for test in LEAK_TESTS]
    assert {row[0].strip("`") for row in tables(DOCS / "results.md", "test")} <= set(stated)


def test_the_files_of_a_run_are_described(finished_run):
    stated = set(re.findall(r"`([^`]+)`", " ".join(row[0] for row in tables(DOCS / "report.md", "file"))))
    if_asked_for = {"checkpoint-N/", "evaluations.jsonl", "stopping.json", "best/", "reference/", "evaluation/"}
    if_asked_for |= {"self_written.jsonl", "alternatives.jsonl"}
    files = {path.name for path in finished_run.iterdir() if path.is_file()}
    assert stated - if_asked_for <= files
    assert files - stated <= {"tokenizer.json", "tokenizer_config.json", "training_args.bin"}


def test_the_readme_repeats_figures_of_the_other_pages():
    known = {cell for line in read(DOCS / "memory.md").splitlines() for cell in line.split(" | ")}
    figures = re.findall(r"(\d+\.\d\d) GiB", read(README))
    assert figures and {f"{figure} |" for figure in figures} <= known
    rows = tables(README, "set")
    assert rows and all(row in tables(DOCS / "results.md", "set") for row in rows)


def test_the_errors_of_the_kernels_are_those_measured():
    results = json.loads(read(ROOT / "benchmarks" / "results" / "cpu" / "kernels-check.json"))["results"]
    measured = {(result["contender"], result["level"]): result.get("c.grad") for result in results if "level" in result}
    names = {"dense, bf16 logits": "dense", "dense, float32 logits": "dense, float32"}
    rows = tables(DOCS / "kernels.md", "KL gradient of")
    assert len(rows) == 5
    for name, *errors in rows:
        values = [100 * measured[names.get(name, name.strip("`")), level] for level in (1e-6, 1e-4, 1e-2, 1.0)]
        assert errors == [f"{value:.1f}%" if value < 10 else f"{value:.0f}%" for value in values], name


def test_citation_and_changelog_name_this_version():
    citation = yaml.safe_load(read(ROOT / "CITATION.cff"))
    assert citation["version"] == lowmem_npo.__version__
    assert f"\n## {lowmem_npo.__version__} - {citation['date-released']}" in read(ROOT / "CHANGELOG.md")
