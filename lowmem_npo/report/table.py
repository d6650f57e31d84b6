"""The before/after table: for people in a terminal and in Markdown, for machines as JSON."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import fill

from lowmem_npo.evaluation.answers import AnswerSummary

Stages = Mapping[str, Mapping[str, AnswerSummary]]
"""Stage ("before", "after", "gold", ...) -> set ("forget", "retain") -> its summary. The first stage is the start."""


@dataclass(frozen=True)
class Measure:
    """A figure of AnswerSummary as readers meet it."""

    field: str
    title: str
    digits: int
    forget_wish: str
    retain_wish: str

    def wish(self, data_set: str, stages: Stages) -> str:
        """What is wished for in `data_set`; a gold standard is the better yardstick where there is one."""
        if data_set != "forget":
            return self.retain_wish
        return "as gold" if "gold" in stages else self.forget_wish


MEASURES = (
    Measure("nll", "NLL per answer token", 3, "higher", "as before"),
    Measure("probability", "answer probability", 3, "lower", "as before"),
    Measure("rouge_l_recall", "ROUGE-L recall", 3, "lower", "as before"),
    Measure("exact_match", "exact match", 3, "lower", "as before"),
)


def table_rows(stages: Stages) -> list[list[str]]:
    """Header and cells of the table: a line per set and measure, a column per stage, and what is wished for.

    With exactly two stages there is a column for the change; with a gold standard the wish for forget is its value.
    """
    names = list(stages)
    changes = len(names) == 2
    rows = [["set", "measure", *names, *(["change"] if changes else []), "wished"]]
    for data_set in stages[names[0]]:
        for measure in MEASURES:
            values = [getattr(stages[name][data_set], measure.field) for name in names]
            cells = [f"{value:.{measure.digits}f}" for value in values]
            if changes:
                cells.append(f"{values[1] - values[0]:+.{measure.digits}f}")
            rows.append([data_set, measure.title, *cells, measure.wish(data_set, stages)])
    return rows


def text_table(stages: Stages) -> str:
    """Aligned plain text, at most 80 columns wide for up to four stages."""
    header, *body = table_rows(stages)
    numeric = range(2, len(header) - 1)
    widths = [max(len(row[column]) for row in [header, *body]) for column in range(len(header))]
    widths = [max(width, 8) if column in numeric else width for column, width in enumerate(widths)]

    def line(cells: list[str]) -> str:
        aligned = (
            cell.rjust(width) if column in numeric else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(aligned).rstrip()

    rule = "-" * len("  ".join(" " * width for width in widths))
    lines = [line(header)]
    previous = None
    for row in body:
        if row[0] != previous:
            lines.append(rule)
        lines.append(line([row[0] if row[0] != previous else "", *row[1:]]))
        previous = row[0]
    return "\n".join([*lines, rule, fill(scope(stages), 80)])


def markdown_table(stages: Stages) -> str:
    """The same table for a README or a pull request."""
    header, *body = table_rows(stages)
    aligns = ["---", "---", *["---:"] * (len(header) - 3), "---"]
    lines = ["| " + " | ".join(row) + " |" for row in [header, aligns, *body]]
    return "\n".join([*lines, "", scope(stages)]) + "\n"


def save_table(stages: Stages, folder: Path, name: str = "before_after") -> list[Path]:
    """Write NAME.json (full precision) and NAME.md into `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    as_json, as_markdown = folder / f"{name}.json", folder / f"{name}.md"
    as_json.write_text(json.dumps(stages_to_json(stages), indent=2) + "\n", encoding="utf-8")
    as_markdown.write_text(markdown_table(stages), encoding="utf-8")
    return [as_json, as_markdown]


def stages_to_json(stages: Stages) -> dict[str, dict[str, dict[str, float]]]:
    return {stage: {name: asdict(summary) for name, summary in sets.items()} for stage, sets in stages.items()}


def stages_from_json(content: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, AnswerSummary]]:
    """The inverse of `stages_to_json`."""
    return {stage: {name: AnswerSummary(**values) for name, values in sets.items()} for stage, sets in content.items()}


def scope(stages: Stages) -> str:
    """How much was measured: a table of 64 rows must not be read as one of 1112."""
    first = next(iter(stages.values()))
    parts = []
    for name, summary in first.items():
        rows, rows_in_set = summary.rows, summary.rows_in_set
        share = f"all {rows}" if rows == rows_in_set else f"{rows} of {rows_in_set}"
        parts.append(f"{share} {name} rows ({summary.tokens:,} answer tokens)")
    return "Measured on " + " and ".join(parts) + ", greedy answers."
