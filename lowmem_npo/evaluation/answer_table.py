"""The before/after table: for people in a terminal and in Markdown, for machines as JSON.

A set may stand in it more than once: "forget, plain" are the forget rows, asked in another form than they were trained.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import fill
from typing import cast

from lowmem_npo.claim import make_directory
from lowmem_npo.evaluation.answers import AnswerSummary, part_of
from lowmem_npo.evaluation.figures import Figure, finite, side_by_side
from lowmem_npo.files import write_atomically, write_json
from lowmem_npo.run_directory import RunFiles
from lowmem_npo.sizes import counted

Stages = Mapping[str, Mapping[str, AnswerSummary]]
"""Stage ("before", "after", "gold", ...) -> set ("forget", "retain") -> its summary. The first stage is the start."""


FORGET, RETAIN = "forget", "retain"
GENERAL = "general"  # rows that nothing is trained on, where the user names none to keep: as retain rows


@dataclass(frozen=True)
class Measure:
    """A figure of AnswerSummary as readers meet it. wishes, meanings: by set."""

    field: str
    title: str
    digits: int
    wishes: Mapping[str, str]
    meanings: Mapping[str, str]

    def wish(self, data_set: str, has_gold: bool) -> str:
        """What is wished for in `data_set`; a gold standard is the better yardstick where there is one.

        Raises KeyError for a set of which nothing is known.
        """
        part = part_of(data_set)
        return "as gold" if has_gold and part == FORGET else self.wishes[RETAIN if part == GENERAL else part]

    def meaning(self, data_set: str) -> str:
        """Raises KeyError for a set of which nothing is known."""
        if data_set == GENERAL:
            return (
                "The same for general questions and texts that nothing was trained on; a change to the worse is damage."
            )
        return self.meanings[part_of(data_set)]

    def value(self, summary: AnswerSummary | None) -> float | None:
        """None where it was not measured."""
        return None if summary is None else getattr(summary, self.field)

    @property
    def heading(self) -> str:
        """The title as it begins a line."""
        return self.title[0].upper() + self.title[1:]


NOT_GENERATED = (
    "No answer was written: in place of each stands the token that the model finds most likely after each true one, so "
    "that recall is higher than that of answers it would write. An answer in a sentence of the model's own does not "
    "appear; one that it would write with other punctuation or case may."
)
MEASURES = (
    Measure("nll", "NLL per answer token", 3, {FORGET: "higher", RETAIN: "as before"}, {
        FORGET: "How unlikely each token of the true answers is to the model, in nats; 0 is certainty. Higher is "
        "forgotten. Far higher than for a model that never saw the rows is not better: it marks what was removed.",
        RETAIN: "The same for rows that must be kept. It should stay where it was; a rise is damage.",
    }),
    Measure("probability", "answer probability", 3, {FORGET: "lower", RETAIN: "as before"}, {
        FORGET: "The geometric mean of an answer's token probabilities, averaged over answers. Near 0 is forgotten; "
        "near the value before, the answers are still there even if they are not said.",
        RETAIN: "Should stay where it was; a fall means that answers to be kept have become less sure.",
    }),
    Measure("rouge_l_recall", "ROUGE-L recall", 3, {FORGET: "lower", RETAIN: "as before"}, {
        FORGET: "How much of the true answer is anywhere in the model's own, in order. Lower is forgotten, but hardly "
        "0: answers to the same question share words by chance.",
        RETAIN: "Should stay where it was; a fall means that answers to be kept have changed.",
    }),
    Measure("appears", "answer appears", 3, {FORGET: "lower", RETAIN: "as before"}, {
        FORGET: "Share of true answers that come in one piece somewhere in what the model says. 0 is forgotten.",
        RETAIN: "Should stay where it was; a fall means that answers to be kept were lost.",
    }),
    Measure("exact_match", "exact match", 3, {FORGET: "lower", RETAIN: "as before"}, {
        FORGET: "Share of true answers that are all the model says, word for word. 0 is forgotten.",
        RETAIN: "The same for rows that must be kept. It should stay where it was.",
    }),
)  # fmt: skip


def answer_figures(sets: Mapping[str, AnswerSummary], has_gold: bool = False) -> list[Figure]:
    """A figure per set and measure. Raises KeyError for a set of which nothing is known."""
    return [
        Figure(
            part,
            measure.field,
            measure.title,
            finite(measure.value(summary)),
            measure.wish(part, has_gold),
            measure.meaning(part),
        )
        for part, summary in sets.items()
        for measure in MEASURES
    ]


def table_rows(stages: Stages) -> list[list[str]]:
    """Header and cells of the table: a line per set and measure, a column per stage, and what is wished for.

    With exactly two stages there is a column for the change; with a gold standard the wish for forget is its value. A
    dash is a figure that was not measured.
    """
    names = list(stages)
    changes = len(names) == 2
    rows = [["set", "measure", *names, *(["change"] if changes else []), "wished"]]
    for data_set in dict.fromkeys(name for sets in stages.values() for name in sets):
        for measure in MEASURES:
            values = [measure.value(stages[name].get(data_set)) for name in names]
            cells = side_by_side(values, decimals=measure.digits)
            if changes:
                cells.append(_change(values, measure.digits))
            rows.append([data_set, measure.title, *cells, measure.wish(data_set, "gold" in names)])
    return rows


def _change(values: list[float | None], decimals: int) -> str:
    if None in values:
        return "–"
    difference = cast(float, values[1]) - cast(float, values[0])
    return ("" if difference < 0 else "+") + side_by_side([difference], decimals=decimals)[0]


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
    """Writes NAME.json (full precision) and NAME.md into `folder`; returns their paths."""
    make_directory(folder)
    as_json, as_markdown = (RunFiles(folder).table(suffix, name) for suffix in ("json", "md"))
    write_json(as_json, stages_to_json(stages), indent=2)
    write_atomically(as_markdown, markdown_table(stages))
    return [as_json, as_markdown]


def stages_to_json(stages: Stages) -> dict[str, dict[str, dict[str, float]]]:
    return {stage: {name: asdict(summary) for name, summary in sets.items()} for stage, sets in stages.items()}


def scope(stages: Stages) -> str:
    """How much was measured: a table of 64 rows must not be read as one of 1112, nor one of other rows than before as
    one of the same."""
    first = next(iter(stages.values()))
    same = all(same_rows(s, first[name]) for sets in stages.values() for name, s in sets.items() if name in first)
    on = "; ".join(f"{stage}, on {_measured(sets)}" for stage, sets in stages.items())
    text = f"Measured on {_measured(first)}." if same else f"Measured {on}."
    written = all(summary.generated for sets in stages.values() for summary in sets.values())
    return text if written else f"{text} {NOT_GENERATED}"


def same_rows(one: AnswerSummary, other: AnswerSummary) -> bool:
    """Whether both seem to be of the same rows, with answers as long and written alike: else their figures cannot be
    compared."""
    measured = ((s.rows, s.rows_in_set, s.tokens, s.max_new_tokens, s.generated) for s in (one, other))
    return len(set(measured)) == 1


def _measured(sets: Mapping[str, AnswerSummary]) -> str:
    parts = []
    for name, summary in sets.items():
        if part_of(name) != name:
            continue
        whole = share_of(name, summary.rows, summary.rows_in_set)
        parts.append(f"{whole} ({counted(summary.tokens, 'answer token')})")
    if not all(summary.generated for summary in sets.values()):
        return " and ".join(parts)
    lengths = sorted({summary.max_new_tokens for summary in sets.values()})
    limit = f" of up to {' and '.join(map(str, lengths))} tokens"
    if cut := sum(summary.cut for name, summary in sets.items() if part_of(name) == name):
        limit += f", compared with the beginning of {counted(cut, 'longer true answer')}"
    return f"{' and '.join(parts)}, greedy answers{limit}"


def share_of(name: str, rows: int, rows_in_set: int) -> str:
    """How many rows of a set were measured, of how many."""
    share = f"all {rows}" if rows == rows_in_set else f"{rows} of {rows_in_set}"
    return f"the only {name} row" if rows_in_set == 1 else f"{share} {name} rows"
