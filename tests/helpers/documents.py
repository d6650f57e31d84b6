"""README, CONTRIBUTING, CHANGELOG and docs/: their blocks, tables and headings, and the options that they may name."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import shlex
from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path

import pytest

from lowmem_npo.cli import main

ROOT = Path(__file__).resolve().parents[2]
DOCS, README = ROOT / "docs", ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]*")

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


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
    result, text = [], read(document)
    for match in re.finditer(r"^( *)```(\w*)\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE):
        indent, language, code = match.groups()
        line = text.count("\n", 0, match.start()) + 1
        code = re.sub(f"^{indent}", "", code, flags=re.MULTILINE)
        result.append(Block(f"{document.name}, line {line}", language, code))
    assert text.count("```") == 2 * len(result), f"{document.name}: a block has no end"
    return result


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


@cache
def options_of(command: str) -> frozenset[str]:
    """Every flag that `lowmem-npo COMMAND` takes."""
    from transformers import TrainingArguments

    from lowmem_npo.commands.spellings import ALIASES

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
