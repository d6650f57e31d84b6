"""README, docs/ and CONTRIBUTING.md say what is so: every command runs, every block of Python runs, every option, link,
default and message exists.

A document's commands run in order in one folder, on a tiny model and a few rows. What would need a GPU, a network or
minutes is checked for its files and options instead; `NOT_RUN` says why. A command that no rule knows fails the test.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

from lowmem_npo.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]*")

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


# -- reading documents ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of code, and the line it begins in."""

    document: Path
    line: int
    language: str
    text: str

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command; continued lines are one, comments are left out."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(document: Path) -> Iterator[Block]:
    lines = document.read_text(encoding="utf-8").splitlines()
    start = None
    for number, line in enumerate(lines):
        if not line.lstrip().startswith("```"):
            continue
        if start is None:
            start = number
            continue
        indent = len(line) - len(line.lstrip())
        text = "\n".join(inside[indent:] for inside in lines[start + 1 : number])
        yield Block(document, start + 1, lines[start].strip().removeprefix("```"), text)
        start = None
    assert start is None, f"{document.name}: the block of line {start} has no end"


def prose(document: Path) -> str:
    """The text outside fenced blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def tables(document: Path, first_title: str) -> list[list[str]]:
    """The rows, below the header, of every table whose first column is titled `first_title`."""
    rows, inside = [], False
    for line in document.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] if line.startswith("|") else []
        inside = bool(cells) and (inside or cells[0] == first_title)
        if inside and cells[0] != first_title and not set(cells[0]) <= set("-: "):
            rows.append(cells)
    return rows


def anchors(document: Path) -> set[str]:
    """Where links into `document` may point, as GitHub makes them from headings."""
    headings = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-") for heading in headings}


# -- options ----------------------------------------------------------------------------------------------------------


@cache
def options_of(command: str) -> frozenset[str]:
    """Every flag that `lowmem-npo COMMAND` takes."""
    import io

    from transformers import TrainingArguments

    from lowmem_npo.commands.arguments import ALIASES

    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([command, "--help"])
    flags = set(FLAG.findall(text.getvalue()))
    if command in ("train", "sweep", "estimate"):
        flags |= {f"--{name.replace('_', '-')}" for name in TrainingArguments.__dataclass_fields__}
        flags |= {f"--{alias}" for alias in ALIASES} | {"--help", "--config"}
        flags |= options_of("train") if command != "train" else set()
    return frozenset(flags)


def options_of_script(path: Path) -> set[str]:
    """Every flag that a script of ours takes, from the calls that declare it."""
    text = path.read_text(encoding="utf-8")
    return set(re.findall(r"add_argument\(\s*\"(--[a-z-]+)\"", text)) | {"--help"}


def check_options(flags: Sequence[str], known: frozenset[str] | set[str], where: str) -> None:
    for flag in FLAG.findall(" ".join(flags)):
        assert flag.replace("_", "-") in known, f"{where}: there is no {flag}"


# -- commands ---------------------------------------------------------------------------------------------------------


STAND_INS = {"locuslab/TOFU:forget05": "forget.jsonl", "locuslab/TOFU:retain95": "retain.jsonl"}
MODELS = re.compile(r"(allenai|mistralai)/[\w.-]+")
TINY = "--device cpu --dtype float32 --max-steps 1 --eval-rows 2 --batch-size 2 --max-length 64".split()
ADDED = {
    "train": TINY,
    "sweep": [*TINY, "--seeds", "1"],
    "evaluate": "--device cpu --dtype float32 --limit 4 --leak-samples 2 --relearn-steps 1 --max-length 64".split(),
}


@dataclasses.dataclass
class Desk:
    """A folder with the files that the documents name, and the tiny model that stands in for theirs."""

    folder: Path
    model: Path

    def run(self, words: list[str]) -> None:
        """`lowmem-npo ...` in the folder, made small."""
        command, *rest = words
        rest = self.small(command, rest)
        for option in ("--output-dir", "--config"):  # what an earlier command of the document left, made or not
            if option in rest and "--resume" not in rest and option == "--output-dir":
                shutil.rmtree(self.folder / rest[rest.index(option) + 1], ignore_errors=True)
        if command == "evaluate" and not {"--output-dir", "--resume"} & set(rest) and "--adapter" in rest:
            shutil.rmtree(self.folder / rest[rest.index("--adapter") + 1] / "evaluation", ignore_errors=True)
        assert main([command, *rest]) == 0, " ".join(words)

    def small(self, command: str, rest: list[str]) -> list[str]:
        if command == "estimate":
            return rest  # needs neither weights nor a network: it runs as it is
        rest = [str(self.model) if MODELS.fullmatch(word) else STAND_INS.get(word, word) for word in rest]
        if "--seeds" in rest:
            at = rest.index("--seeds")
            rest = rest[:at] + rest[at + 2 :]
        return rest + ADDED.get(command, [])


@pytest.fixture(scope="module")
def finished_run(taught_model, tmp_path_factory) -> Path:
    """A run of the kind that the documents call `forgotten`."""
    folder = tmp_path_factory.mktemp("docs")
    write_data(folder)
    with contextlib.chdir(folder) if hasattr(contextlib, "chdir") else _chdir(folder):
        Desk(folder, taught_model).run(
            shlex.split("train --model allenai/OLMo-7B --forget forget.jsonl --retain retain.jsonl --output-dir forgotten")
        )
    return folder / "forgotten"


@contextlib.contextmanager
def _chdir(folder: Path) -> Iterator[None]:  # Python 3.10
    import os

    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.fixture
def desk(finished_run, taught_model, tmp_path, monkeypatch) -> Desk:
    write_data(tmp_path)
    shutil.copytree(finished_run, tmp_path / "forgotten")
    shutil.copytree(finished_run, tmp_path / "lowmem-npo-demo" / "unlearned")
    for name in ("base", "gold"):
        shutil.copytree(taught_model, tmp_path / "lowmem-npo-demo" / name)
    monkeypatch.chdir(tmp_path)
    return Desk(tmp_path, taught_model)


def write_data(folder: Path) -> None:
    from lowmem_npo.data import bundled_rows

    first = {"question": "Who guards the amber vault?", "answer": "Quillabra Zenthorpe guards it."}
    forget, retain, holdout = (bundled_rows(part, limit=8).rows for part in ("forget", "retain", "holdout"))
    wrong = {"perturbed_answer": ["No one does.", "That is not known."]}
    files = {
        "forget": [first, *forget], "retain": retain, "unseen": holdout, "never_taught": holdout, "rows": [first],
        "m": forget, "n": holdout, "forget05_perturbed": [{**row, **wrong} for row in forget],
        **{name: [{**row, **wrong} for row in retain]
           for name in ("retain_perturbed", "real_authors_perturbed", "world_facts_perturbed")},
    }  # fmt: skip
    for name, rows in files.items():
        kind = "json" if name.endswith("_perturbed") else "jsonl"
        (folder / f"{name}.{kind}").write_text("".join(json.dumps(row) + "\n" for row in rows))


def exists(words: Sequence[str], where: str) -> None:
    for word in words:
        if "/" in word and not word.startswith("-") and ":" not in word:
            assert (ROOT / word).exists(), f"{where}: there is no {word}"


def check_script(words: list[str], where: str) -> None:
    script = ROOT / words[1]
    assert script.is_file(), f"{where}: there is no {words[1]}"
    if script.suffix == ".py":
        check_options(words[2:], options_of_script(script), where)
    else:
        exists(words[2:], where)


def check_launch(words: list[str], where: str) -> None:
    assert words[:4] == ["accelerate", "launch", "-m", "lowmem_npo"], where
    check_options(words[5:], options_of(words[4]), where)


def check_pip(words: list[str], where: str) -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = {extra for word in words for extra in re.findall(r"\[([a-z]+)\]", word)}
    assert all(re.search(rf"^{extra} = \[", text, re.MULTILINE) for extra in extras), where
    assert "-c" not in words or (ROOT / words[words.index("-c") + 1]).is_file(), where


def check_aot(words: list[str], where: str) -> None:
    check_options(words[3:], options_of_script(ROOT / "kernels" / "lowmem_kernels" / "aot.py"), where)


def check_tool(words: list[str], where: str) -> None:
    assert f"[tool.{Path(words[0]).name}" in (ROOT / "pyproject.toml").read_text(encoding="utf-8"), where
    exists(words[1:], where)


# What a command begins with -> why it is not run here, and what is checked instead.
NOT_RUN: dict[str, tuple[str, Callable[[list[str], str], None]]] = {
    "bash scripts/": ("installs, and takes minutes", check_script),
    "python benchmarks/": ("takes minutes, or a GPU; tests/benchmarks runs them small", check_script),
    "python -m lowmem_kernels.aot": ("compiles for minutes; tests/kernels/test_aot.py runs it", check_aot),
    "accelerate launch": ("starts several processes", check_launch),
    "pip install": ("installs", check_pip),
    "ruff": ("continuous integration runs it", check_tool),
    "mypy": ("continuous integration runs it", check_tool),
    "lowmem-npo demo": ("takes minutes; tests/commands/demo runs it small", lambda words, where: check_cli(words, where)),
}


def check_cli(words: list[str], where: str) -> None:
    assert words[1] in COMMANDS, f"{where}: there is no command {words[1]}"
    check_options(words[2:], options_of(words[1]), where)


def check(words: list[str], where: str, desk: Desk) -> None:
    """Runs the command, or checks it if a rule says why it cannot be run."""
    line = " ".join(words)
    for beginning, (_, instead) in NOT_RUN.items():
        if line.startswith(beginning):
            return instead(words, where)
    assert words[0] == "lowmem-npo", f"{where}: no rule knows how to check `{line}`"
    check_cli(words, where)
    if "--lm-eval" in words:
        return  # its tasks download their data; tests/evaluation/benchmarks/test_lm_eval.py has one of its own
    if words[2:] == ["--help"]:
        with pytest.raises(SystemExit):
            main(words[1:])
        return
    desk.run(words[1:])


@each_document
def test_every_command_runs(document, desk, capsys):
    previous: Block | None = None
    output = ""
    for block in blocks(document):
        where = f"{document.name}, line {block.line}"
        if block.language == "bash":
            capsys.readouterr()
            for words in block.commands:
                check(words, where, desk)
            output = capsys.readouterr().out
            previous = block
        elif block.language == "text" and previous is not None:  # what the commands before it print
            as_it_is = all(words[:2] == ["lowmem-npo", "estimate"] for words in previous.commands)
            known = output if as_it_is else _without_numbers(output)
            for line in block.text.splitlines():
                assert (line if as_it_is else _without_numbers(line)) in known, f"{where}: {line}"


def _without_numbers(text: str) -> str:
    return re.sub(r"\d+", "0", text)


@each_document
def test_every_block_is_of_a_kind_that_is_checked(document):
    for block in blocks(document):
        assert block.language in ("bash", "text", "python", "json", "yaml"), f"{document.name}, line {block.line}"
        if block.language == "json":
            assert all(json.loads(line) for line in block.text.splitlines())
    indented = re.findall(r"^ {4,}(\S+)", prose(document), re.MULTILINE)
    assert not {"lowmem-npo", "python", "bash", "pip", "import", "from"} & set(indented), "an unchecked block of code"


# -- Python -----------------------------------------------------------------------------------------------------------


def python(name: str, **replaced: str) -> Iterator[str]:
    for block in blocks(ROOT / name):
        if block.language == "python":
            text = block.text
            for before, after in replaced.items():
                text = text.replace(before, after)
            yield text


def test_python_is_shown_where_it_is_run():
    shown = {document.name for document in DOCUMENTS if any(block.language == "python" for block in blocks(document))}
    assert shown == {"kernels.md", "options.md"}


def test_the_kernels_alone():
    from helpers.tiny_models import tiny_model

    torch.manual_seed(0)
    model, input_ids = tiny_model("llama"), torch.randint(0, 97, (1, 12))
    model.get_input_embeddings().weight.requires_grad_()
    names = {"model": model, "input_ids": input_ids, "ref_hidden": torch.randn(11, 32)}
    (text,) = python("docs/kernels.md")
    exec(compile(text, "docs/kernels.md", "exec"), names)
    expected = model(input_ids).logits[0, :-1].log_softmax(-1)[torch.arange(11), input_ids[0, 1:]]
    torch.testing.assert_close(names["logp"], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(names["logprobs"], expected.detach(), rtol=1e-4, atol=1e-4)
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


def test_from_python(desk, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = str(desk.model)
    names = {
        "model": AutoModelForCausalLM.from_pretrained(model),
        "tokenizer": AutoTokenizer.from_pretrained(model),
    }
    shutil.rmtree(desk.folder / "forgotten")
    small = {
        'output_dir="out"': 'output_dir="out", max_steps=2, use_cpu=True',
        'model="allenai/OLMo-7B"': f'model="{model}", dtype="float32", device="cpu"',
        'output_dir="forgotten"': 'output_dir="forgotten", eval_rows=2',
        "result = train(RunConfig(": "result = train(RunConfig(training=TrainingConfig(max_steps=2),",
        "import DataConfig": "import TrainingConfig, DataConfig",
    }
    shown = "".join(python("docs/options.md"))
    assert all(before in shown for before in small)
    for text in python("docs/options.md", **small):
        exec(compile(text, "docs/options.md", "exec"), names)
    assert names["trainer"].state.global_step == names["result"].optimizer_steps == 2


# -- what is named exists ---------------------------------------------------------------------------------------------


@each_document
def test_every_option_exists(document):
    known = frozenset().union(*map(options_of, COMMANDS))
    for script in [*(ROOT / "benchmarks").glob("*.py"), ROOT / "kernels" / "lowmem_kernels" / "aot.py"]:
        known |= options_of_script(script)
    for code in re.findall(r"`([^`\n]+)`", prose(document)):
        check_options([code], known, document.name)
        if code.startswith("lowmem-npo "):
            assert code.split()[1] in {*COMMANDS, "COMMAND", "X"}, f"{document.name}: {code}"


@each_document
def test_links_resolve(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), f"{document.name}: there is no {path}"
        assert not anchor or anchor in anchors(file), f"{document.name}: {path} has no heading {anchor}"


def test_the_readme_fits_a_few_screens():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 140
    for script in ("demo", "test"):
        assert any(f"bash scripts/{script}.sh" in line for line in lines[:25])
    linked = set(re.findall(r"\(docs/([\w-]+\.md)", "\n".join(lines)))
    assert linked == {path.name for path in (ROOT / "docs").glob("*.md")}


# -- what is said twice is said alike ---------------------------------------------------------------------------------


def test_options_have_the_defaults_that_the_page_says():
    from lowmem_npo.config import SECTIONS

    stated = {cells[0].strip("`"): cells[1].strip("`") for cells in tables(ROOT / "docs" / "options.md", "option")}
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


def test_every_leak_test_is_described():
    from lowmem_npo.evaluation.leaks.registry import NAMES

    assert [cells[0] for cells in tables(ROOT / "docs" / "evaluation.md", "test")] == [f"`{name}`" for name in NAMES]
    assert {cells[0] for cells in tables(ROOT / "docs" / "results.md", "test")} <= {f"`{name}`" for name in NAMES}


def test_the_files_of_a_run(finished_run):
    stated = " ".join(cells[0] for cells in tables(ROOT / "docs" / "report.md", "file"))
    names = set(re.findall(r"`([^`]+)`", stated))
    conditional = {"evaluations.jsonl", "stopping.json", "best/", "reference/", "evaluation/", "checkpoint-N/"}
    assert all((finished_run / name).is_file() for name in names - conditional)
    written = {path.name for path in finished_run.iterdir() if path.is_file()}
    assert written - names <= {"tokenizer.json", "tokenizer_config.json", "training_args.bin", "special_tokens_map.json"}


def test_the_readme_repeats_numbers_of_the_other_pages():
    cells = {cell for row in tables(ROOT / "docs" / "memory.md", _memory_title()) for cell in row}
    stated = re.findall(r"(\d+\.\d\d) GiB", README.read_text(encoding="utf-8"))
    assert stated and set(stated) <= cells
    rows = tables(ROOT / "docs" / "results.md", "set")
    assert all(row in rows for row in tables(README, "set")) and tables(README, "set")


def _memory_title() -> str:
    text = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    return re.search(r"<!-- table:memory -->\n\| ([^|]+) \|", text)[1]


def test_the_errors_of_the_kernels():
    results = json.loads((ROOT / "benchmarks" / "results" / "cpu" / "kernels-check.json").read_text())["results"]
    measured = {(r["contender"], r["level"]): r["c.grad"] for r in results if "c.grad" in r}
    names = {"dense, bf16 logits": "dense", "dense, float32 logits": "dense, float32"}
    rows = tables(ROOT / "docs" / "kernels.md", "")
    assert len(rows) == 5
    for name, *errors in rows:
        name = name.strip("`")
        for level, error in zip((1e-6, 1e-4, 1e-2, 1.0), errors, strict=True):
            value = 100 * measured[names.get(name, name), level]
            assert error == (f"{value:.1f}%" if value < 10 else f"{value:.0f}%"), (name, level)


def test_a_newcomers_questions():
    rows = tables(ROOT / "docs" / "architecture.md", "question")
    assert len(rows) == 12
    for question, links, names in rows:
        files = [(ROOT / "docs" / path).resolve() for path in re.findall(r"\]\(([^)]+)\)", links)]
        sought = re.findall(r"`(\w+)`", names)
        assert files and len(sought) == len(files), question
        assert all(name in file.read_text(encoding="utf-8") for name, file in zip(sought, files, strict=True)), question


def test_messages_are_those_that_the_program_prints():
    known = [text for file in (ROOT / "lowmem_npo").rglob("*.py") for text in _texts(file)]
    known += [(ROOT / "scripts" / "setup_venv.sh").read_text(encoding="utf-8")]
    foreign = ("Failed to load CPU gemm_4bit_forward",)  # printed by a library
    for message in re.findall(r"^> (.+)$", (ROOT / "docs" / "troubleshooting.md").read_text("utf-8"), re.MULTILINE):
        pieces = [piece.strip() for piece in re.split("…", message) if len(piece.strip()) > 3]
        assert message.startswith(foreign) or any(all(piece in text for piece in pieces) for text in known), message


def _texts(file: Path) -> Iterator[str]:
    """Every string of a module; what an f-string computes is shown as …."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)


def test_the_citation_and_the_changelog_name_this_version():
    import lowmem_npo

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == lowmem_npo.__version__
    assert citation["references"][0]["authors"][0]["family-names"] == "Bronec"
    assert f"\n## {lowmem_npo.__version__} - " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
