"""README, CONTRIBUTING and docs/ say what is so: every option, default, link, file and message exists.

Their commands and their Python run in test_documented_commands.py.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import yaml
from helpers.documents import (
    DOCS,
    README,
    ROOT,
    anchors,
    blocks,
    check_options,
    each_document,
    options_of,
    options_of_script,
    prose,
    read,
    tables,
)

import lowmem_npo
from lowmem_npo.cli import COMMANDS

# -- what is named exists ---------------------------------------------------------------------------------------------


@each_document
def test_every_block_is_of_a_kind_that_is_checked(document):
    for block in blocks(document):
        assert block.language in ("bash", "text", "python", "json"), block.where
        if block.language == "json":
            assert all(json.loads(line) for line in block.text.splitlines())
    indented = re.findall(r"^ {4,}(\S+)", prose(document), re.MULTILINE)
    assert not {"lowmem-npo", "python", "bash", "pip", "import", "from"} & set(indented), "an unchecked block of code"


@each_document
def test_every_option_exists(document):
    scripts = [*(ROOT / "benchmarks").glob("*.py"), ROOT / "kernels" / "lowmem_kernels" / "aot.py"]
    scripts.append(ROOT / "scripts" / "advisories.py")
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
