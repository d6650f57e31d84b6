"""The figures of a sweep: those of every run, and each configuration's mean and standard deviation over the seeds."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from textwrap import fill
from typing import Any

from lowmem_npo.commands.sweep.grid import SweepRun
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.answer_table import FORGET, MEASURES, NOT_GENERATED
from lowmem_npo.evaluation.answers import AnswerEvaluation, part_of, read_answers
from lowmem_npo.evaluation.figures import aligned
from lowmem_npo.files import load_json, write_atomically, write_json
from lowmem_npo.report.kept import hardly_in_full
from lowmem_npo.run_directory import EvaluationFiles, RunDirectory, RunFiles


@dataclass(frozen=True)
class Spread:
    """A figure over the seeds. `sd` is the sample standard deviation (n - 1), None for a single seed. values: in the
    order of the seeds; None where a leak test could not tell, which mean and `sd` leave out."""

    mean: float
    sd: float | None
    values: list[float | None]

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Spread:
        known = [value for value in values if value is not None]
        return cls(fmean(known), stdev(known) if len(known) > 1 else None, list(values))

    @property
    def known(self) -> list[float]:
        return [value for value in self.values if value is not None]

    @property
    def unknown(self) -> int:
        """How many values are not known."""
        return self.values.count(None)

    def text(self, digits: int | None = 3) -> str:
        """digits: None: of values that are 0 or 1, how many are 1."""
        if digits is None:
            rest = f", {self.unknown} unknown" if self.unknown else ""
            return f"{sum(self.known):.0f} of {len(self.known)}{rest}"
        small = 0 < abs(self.mean) < 10**-digits
        write = "{:.1e}".format if small else f"{{:.{digits}f}}".format
        return write(self.mean) + ("" if self.sd is None else f" ± {write(self.sd)}")


@dataclass(frozen=True)
class Column:
    """A figure as the tables show it.

    group: what measured it, "" for the runs themselves; the figures of a group are a table. None: for files only.
    digits: None: of a verdict, 1 or 0.
    main: whether pictures show it.
    """

    key: str
    title: str
    digits: int | None = 3
    group: str | None = ""
    main: bool = False


COLUMNS = (
    Column("forget_nll", "forget NLL", main=True),
    Column("forget_appears", "forget says"),
    Column("forget_worst_appears", "in any form"),
    Column("forget_exact_match", "forget exact"),
    Column("retain_nll", "retain NLL", main=True),
    Column("retain_appears", "retain says"),
    Column("retain_exact_match", "retain exact"),
    Column("kept_step", "kept step", 0),
)
BEFORE, GOLD = "before", "gold"
GAP = 2  # spaces between the columns of a table


@dataclass(frozen=True)
class Configuration:
    """One point of the grid, over the seeds whose runs are finished."""

    name: str
    settings: dict[str, str]
    seeds: list[int]
    figures: dict[str, Spread]
    names: dict[str, list[str | None]] = field(default_factory=dict)
    """What a figure is of where that may differ between the seeds, in their order: the attack that was the worst."""


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep; sweep.json holds the same."""

    configurations: list[Configuration]
    baselines: dict[str, dict[str, Any]]
    """The figures of the models that the runs are compared with: "before" (one for each model and data of the grid),
    and "gold", which was never taught the forget rows."""
    runs: list[dict[str, Any]] = field(default_factory=list)
    """An entry per run: its settings, seed, directory, and figures and names or `error`."""
    columns: list[Column] = field(default_factory=lambda: list(COLUMNS))
    """What the figures are called."""
    generated: bool = True
    """Whether the models wrote their answers; else these were read off the likelihoods."""
    hardly_said: list[str] = field(default_factory=list)
    """The baselines that hardly say what their runs are to forget, however they are asked."""

    @property
    def failed(self) -> list[dict[str, Any]]:
        return [run for run in self.runs if run["status"] != "done"]


def collect(
    runs: Sequence[SweepRun],
    ledger: Mapping[str, Mapping[str, Any]],
    root: Path,
    evaluated: Callable[[EvaluationFiles], Mapping[Column, float | str]] = lambda files: {},
) -> SweepResult:
    """Reads the results in the runs' directories, and those of the baselines in `root`.

    ledger: directory -> the run's seconds, or its error. evaluated: the figures in the directory of an evaluation.
    """
    entries, baselines = [], dict[str, dict[str, Any]]()
    columns, generated = {column.key: column for column in COLUMNS}, True
    hardly: dict[str, None] = {}  # in order

    def add_evaluated(figures: dict[str, Any], files: EvaluationFiles) -> None:
        measured = evaluated(files)
        for column, value in measured.items():
            columns.setdefault(column.key, column)
            figures[column.key] = value

    for run in runs:
        entry = _entry(run, ledger)
        if entry["status"] == "done":
            of_start = baselines.setdefault(before_of(run), {})
            of_start |= entry.pop("before") | of_start  # a run that keeps nothing has no retain rows
            generated &= entry.pop("generated")
            if entry.pop("hardly_said"):
                hardly[before_of(run)] = None
            try:
                add_evaluated(entry, RunFiles(run.directory).evaluation)
            except UserError as error:  # no error of one run must end the others
                entry |= {"status": "failed", "error": str(error)}
        entries.append(entry)
    if gold := read_answers(baseline(root, GOLD).answers(GOLD)):
        baselines[GOLD] = answer_figures(gold)
    for name, figures in baselines.items():
        add_evaluated(figures, baseline(root, name).evaluation)
    configurations = []
    for point in dict.fromkeys(run.point for run in runs):
        done = [e for run, e in zip(runs, entries, strict=True) if run.point == point and e["status"] == "done"]
        if done:
            more = [k for k in done[0] if k.startswith(("forget_", "retain_", "general_")) and k not in columns]
            keys = [*columns, *more]
            spreads, names = {}, {}
            for key in keys:
                if any(isinstance(e.get(key), str) for e in done):
                    names[key] = [e.get(key) for e in done]
                    continue
                values, is_verdict = [e.get(key) for e in done], key in columns and columns[key].digits is None
                # a mean over some of the seeds would not be that of the configuration; verdicts are counted
                if (any if is_verdict else all)(value is not None for value in values):
                    spreads[key] = Spread.of(values)
            seeds = [e["seed"] for e in done]
            configurations.append(Configuration(point.name, dict(point.settings), seeds, spreads, names))
    return SweepResult(configurations, baselines, entries, list(columns.values()), generated, list(hardly))


def before_of(run: SweepRun) -> str:
    """The name of the baseline that the run begins with: a model, measured on the run's rows."""
    start = run.point.start
    return f"{BEFORE}, {start.name}" if start.settings else BEFORE


def baseline(root: Path, name: str) -> RunFiles:
    """Where the measurements of a baseline are."""
    return RunFiles(root / "baselines" / name.replace(", ", "_"))


def _entry(run: SweepRun, ledger: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    files, output = RunDirectory(run.config), run.config.output
    before, after = (read_answers(files.answers(stage), output) for stage in ("before", "after"))
    place = f"{run.directory.parent.name}/{run.directory.name}"
    entry = {"configuration": run.point.name, **dict(run.point.settings), "seed": run.seed, "directory": place}
    error = ledger.get(place, {}).get("error")
    if error or not (files.is_trained and before and after):
        return {**entry, "status": "failed", "error": error or "not finished"}
    if not all(map(math.isfinite, answer_figures(after).values())):
        return {**entry, "status": "failed", "error": "the training diverged: its figures are not finite numbers"}
    entry |= {"status": "done", "seconds": ledger.get(place, {}).get("seconds")}
    entry |= answer_figures(after)
    if files.stopping.exists():
        try:
            outcome = load_json(files.stopping)
            entry |= {"kept_step": outcome["kept"]["step"], "stopped_by": " ".join(outcome["held"])}
        except (ValueError, KeyError, TypeError):
            return {**entry, "status": "failed", "error": f"'{files.stopping}' is damaged: restore or remove it"}
    generated = all(of.summary.generated for sets in (before, after) for of in sets.values())
    hardly = all(hardly_in_full(of.summary) for name, of in before.items() if part_of(name) == FORGET)
    return {**entry, "before": answer_figures(before), "generated": generated, "hardly_said": hardly}


def answer_figures(evaluations: Mapping[str, AnswerEvaluation]) -> dict[str, float]:
    """`forget_nll` and the like; `forget_plain_nll` of the forget rows in another form, `forget_worst_appears` of the
    form in which the model says most."""
    figures: dict[str, float] = {
        f"{name.replace(', ', '_')}_{measure.field}": getattr(evaluation.summary, measure.field)
        for name, evaluation in evaluations.items()
        for measure in MEASURES
    }
    forms = [figures[f"{name.replace(', ', '_')}_appears"] for name in evaluations if part_of(name) == FORGET]
    return figures | ({"forget_worst_appears": max(forms)} if len(forms) > 1 else {})


# -- tables and files -------------------------------------------------------------------------------------------------


def tables(result: SweepResult) -> dict[str, list[list[str]]]:
    """Group -> its table: a header, a line for each baseline, and one per configuration, mean ± standard deviation.
    The runs' own figures, whose group is "", come first."""
    measured = {key for c in result.configurations for key in (*c.figures, *c.names)}
    measured |= {key for figures in result.baselines.values() for key in figures}
    groups: dict[str, list[Column]] = {}
    for column in result.columns:
        if column.group is not None and column.key in measured:
            groups.setdefault(column.group, []).append(column)
    return {group: _table(result, columns) for group, columns in groups.items()}


def _table(result: SweepResult, columns: Sequence[Column]) -> list[list[str]]:
    lines = [["configuration", "seeds", *(column.title for column in columns)]]
    for name, figures in result.baselines.items():
        lines.append([name, "–", *(_baseline_cell(figures.get(column.key), column) for column in columns)])
    for configuration in result.configurations:
        cells = [_cell(configuration, column) for column in columns]
        lines.append([configuration.name, str(len(configuration.seeds)), *cells])
    return lines


def _baseline_cell(value: float | str | None, column: Column) -> str:
    return value if isinstance(value, str) else "–" if value is None else Spread.of([value]).text(column.digits)


def _cell(configuration: Configuration, column: Column) -> str:
    """A mean, or a name; of several names, in how many seeds each."""
    if (names := configuration.names.get(column.key)) is not None:
        return _named(names)
    spread = configuration.figures.get(column.key)
    return "–" if spread is None else spread.text(column.digits)


def _named(names: Sequence[str | None]) -> str:
    counts = Counter(name or "none" for name in names)
    return "; ".join(counts if len(counts) == 1 else (f"{name} ({count})" for name, count in counts.items()))


def text_tables(result: SweepResult, width: int) -> str:
    """All tables; one that is wider than `width` characters goes on below, with its first column again."""
    parts = []
    for group, lines in tables(result).items():
        blocks = "\n\n".join(aligned(header, body, header[1:]) for header, *body in _narrow(lines, width))
        parts.append(f"{group}\n{blocks}" if group else blocks)
    return "\n\n".join([*parts, fill(_note(result), width)])


def _note(result: SweepResult) -> str:
    """What the figures are."""
    given = "greedy ones" if result.generated else "those read off the likelihoods"
    note = (
        "Mean ± standard deviation (n - 1) over seeds. NLL: nats per answer token; says: share of true answers that "
        f"appear in {given}; exact: share that are all of them."
    )
    if not result.generated:
        note += f" {NOT_GENERATED}"
    for name in result.hardly_said:
        note += f" In the line '{name}' hardly an answer to forget is said: its runs can hardly show forgetting."
    return note


def _narrow(lines: list[list[str]], width: int) -> list[list[list[str]]]:
    """The table, cut into some that fit where that is possible."""
    widths = [max(map(len, column)) + GAP for column in zip(*lines, strict=True)]
    blocks: list[list[int]] = [[]]
    for column in range(1, len(widths)):
        if blocks[-1] and widths[0] + sum(widths[i] for i in blocks[-1]) + widths[column] > width + GAP:
            blocks.append([])
        blocks[-1].append(column)
    return [[[line[0], *(line[i] for i in block)] for line in lines] for block in blocks]


def markdown_tables(result: SweepResult) -> str:
    parts = []
    for group, (header, *lines) in tables(result).items():
        rule = ["---", *["---:"] * (len(header) - 1)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *lines])
        parts.append(f"**{group}**\n\n{table}" if group else table)
    return "\n\n".join(parts)


def write_results(result: SweepResult, root: Path) -> None:
    """sweep.json (everything), sweep.csv (a line per run), sweep_means.csv (a line per baseline and configuration),
    sweep.md (the tables, and what they hold)."""
    write_json(root / "sweep.json", asdict(result))
    write_atomically(root / "sweep.md", f"{markdown_tables(result)}\n\n{_note(result)}\n")
    _write_csv(root / "sweep.csv", result.runs)
    lines: list[dict[str, Any]] = [{"configuration": name, **figures} for name, figures in result.baselines.items()]
    for c in result.configurations:
        means = dict[str, Any]()
        means |= {key: _named(names) for key, names in c.names.items()}
        for key, s in c.figures.items():
            means |= {key: s.mean, f"{key}_sd": s.sd} | ({f"{key}_unknown": s.unknown} if s.unknown else {})
        lines.append({"configuration": c.name, **c.settings, "seeds": len(c.seeds), **means})
    _write_csv(root / "sweep_means.csv", lines)


def _write_csv(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for line in lines for name in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_atomically(path, text.getvalue())
