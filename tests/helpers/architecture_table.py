"""docs/architectures.md as a table of cells, read and written."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import transformers

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
START = "| architecture |"


@dataclass(frozen=True)
class Cell:
    """How one architecture fares in one column; notes: why it is refused, or what does not go with it."""

    state: str  # ok, refused, or fails: an error that no user should see
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, state: str, notes: list[str], config: transformers.PretrainedConfig) -> Cell:
        """The notes with … for what differs from model to model: its names, paths, sizes."""
        kind = type(config).__name__.removesuffix("TextConfig").removesuffix("Config")
        names = rf"{kind}\w*|\b{config.model_type}\b|(?<=')/[^']+(?=')|(?<=\()\d+\.\d+ GiB(?=\))"
        return cls(state, tuple(re.sub(names, "…", note) for note in notes))


Table = dict[str, dict[str, Cell]]  # architecture -> column -> cell


def read_table() -> Table:
    text = PAGE.read_text(encoding="utf-8")
    if START not in text:
        return {}
    sentences = dict(re.findall(r"^\[\^(\d+)\]: (.+)$", text, re.MULTILINE))
    lines = text[text.index(START) :].splitlines()
    titles, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    table: Table = {}
    for name, *cells in rows:
        parsed = [(re.sub(r"\[.*", "", cell), re.findall(r"\[\^(\d+)\]", cell)) for cell in cells]
        by_column = zip(titles[1:], parsed, strict=True)
        table[name.strip("`")] = {
            title: Cell(state, tuple(sentences[n] for n in numbers)) for title, (state, numbers) in by_column
        }
    return table


def version_of_table() -> str:
    """Of transformers, with which it was written."""
    return re.search(r"transformers (\d\S*\d)", PAGE.read_text(encoding="utf-8"))[1]


def write_table(table: Table, columns: list[str]) -> None:
    """Replaces the table and its notes; what stands above stays, but for the version of transformers."""
    text = PAGE.read_text(encoding="utf-8")
    above = text[: text.index(START)] if START in text else text
    above = re.sub(r"transformers \d\S*\d", f"transformers {transformers.__version__}", above)
    numbers: dict[str, int] = {}

    def written(cell: Cell) -> str:
        return cell.state + "".join(f"[^{numbers.setdefault(note, len(numbers) + 1)}]" for note in cell.notes)

    rows = [[f"`{name}`", *(written(cells[column]) for column in columns)] for name, cells in sorted(table.items())]
    lines = [["architecture", *columns], ["---"] * (1 + len(columns)), *rows]
    body = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    notes = "".join(f"\n[^{number}]: {note}\n" for note, number in numbers.items())
    PAGE.write_text(above + body + notes, encoding="utf-8")
