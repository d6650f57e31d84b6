"""The figures of a sweep: those of every run, and each configuration's mean and standard deviation over the seeds."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from lowmem_npo.commands.sweep.grid import SweepRun
from lowmem_npo.evaluation.answer_table import FORGET, MEASURES
from lowmem_npo.evaluation.answers import AnswerEvaluation, part_of, read_answers
from lowmem_npo.files import write_atomically
from lowmem_npo.run_directory import RunDirectory


@dataclass(frozen=True)
class Spread:
    """A figure over the seeds. `sd` is the sample standard deviation (n - 1), None for a single seed."""

    mean: float
    sd: float | None
    values: list[float]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(fmean(values), stdev(values) if len(values) > 1 else None, list(values))

    def text(self, digits: int = 3) -> str:
        return f"{self.mean:.{digits}f}" + ("" if self.sd is None else f" ± {self.sd:.{digits}f}")


@dataclass(frozen=True)
class Column:
    """A figure as the table shows it."""

    key: str
    title: str
    digits: int = 3


COLUMNS = (
    Column("forget_nll", "forget NLL"),
    Column("forget_appears", "forget says"),
    Column("forget_worst_appears", "in any form"),
    Column("forget_exact_match", "forget exact"),
    Column("retain_nll", "retain NLL"),
    Column("retain_appears", "retain says"),
    Column("retain_exact_match", "retain exact"),
    Column("kept_step", "kept step", 0),
)


@dataclass(frozen=True)
class Configuration:
    """One point of the grid, over the seeds whose runs are finished."""

    name: str
    settings: dict[str, str]
    seeds: list[int]
    figures: dict[str, Spread]


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep; sweep.json holds the same."""

    configurations: list[Configuration]
    before: dict[str, float]
    """The original model's figures, from the first run."""
    runs: list[dict[str, Any]] = field(default_factory=list)
    """An entry per run: its settings, seed, directory, and figures before and after or `error`."""

    @property
    def failed(self) -> list[dict[str, Any]]:
        return [run for run in self.runs if run["status"] != "done"]


def collect(runs: Sequence[SweepRun], ledger: Mapping[str, Mapping[str, Any]]) -> SweepResult:
    """Reads the results in the runs' directories. `ledger`: directory -> the run's seconds, or its error."""
    entries = [_entry(run, ledger) for run in runs]
    configurations = []
    for point in dict.fromkeys(run.point for run in runs):
        done = [e for run, e in zip(runs, entries, strict=True) if run.point == point and e["status"] == "done"]
        if done:
            keys = [column.key for column in COLUMNS if all(column.key in e for e in done)]
            keys += [key for key in done[0] if key.startswith(("forget_", "retain_", "general_")) and key not in keys]
            figures = {key: Spread.of([e[key] for e in done]) for key in keys}
            configurations.append(Configuration(point.name, dict(point.settings), [e["seed"] for e in done], figures))
    before: dict[str, float] = next((e["before"] for e in entries if e["status"] == "done"), {})
    return SweepResult(configurations, before, entries)


def _entry(run: SweepRun, ledger: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    files, output = RunDirectory(run.config), run.config.output
    before, after = (read_answers(files.answers(stage), output) for stage in ("before", "after"))
    place = f"{run.directory.parent.name}/{run.directory.name}"
    entry = {"configuration": run.point.name, **dict(run.point.settings), "seed": run.seed, "directory": place}
    error = ledger.get(place, {}).get("error")
    if error or not (files.is_trained and before and after):
        return {**entry, "status": "failed", "error": error or "not finished"}
    if not all(map(math.isfinite, _figures(after).values())):
        return {**entry, "status": "failed", "error": "the training diverged: its figures are not finite numbers"}
    entry |= {"status": "done", "seconds": ledger.get(place, {}).get("seconds")}
    entry |= _figures(after)
    if files.stopping.exists():
        outcome = json.loads(files.stopping.read_text(encoding="utf-8"))
        entry |= {"kept_step": outcome["kept"]["step"], "stopped_by": " ".join(outcome["held"])}
    return {**entry, "before": _figures(before)}


def _figures(evaluations: Mapping[str, AnswerEvaluation]) -> dict[str, float]:
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


def table(result: SweepResult) -> list[list[str]]:
    """The header, a line for the original model, and one per configuration: mean ± standard deviation."""
    columns = [c for c in COLUMNS if any(c.key in configuration.figures for configuration in result.configurations)]
    lines = [["configuration", "seeds", *(column.title for column in columns)]]
    original = [f"{result.before[c.key]:.{c.digits}f}" if c.key in result.before else "–" for c in columns]
    lines.append(["before", "–", *original])
    for configuration in result.configurations:
        cells = [
            configuration.figures[c.key].text(c.digits) if c.key in configuration.figures else "–" for c in columns
        ]
        lines.append([configuration.name, str(len(configuration.seeds)), *cells])
    return lines


def text_table(result: SweepResult) -> str:
    lines = table(result)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    header, *body = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    note = (
        "Mean ± standard deviation (n - 1) over seeds. NLL: nats per answer token; says: share of true answers that "
        "appear in greedy ones; exact: share that are all of them."
    )
    return "\n".join([header, "-" * len(header), *body, "", note])


def markdown_table(result: SweepResult) -> str:
    header, *lines = table(result)
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *lines])


def write_results(result: SweepResult, root: Path) -> None:
    """sweep.json (everything), sweep.csv (a line per run), sweep.md (the table)."""
    write_atomically(root / "sweep.json", json.dumps(asdict(result), indent=1) + "\n")
    write_atomically(root / "sweep.md", markdown_table(result) + "\n")
    flat = [{k: v for k, v in run.items() if k != "before"} for run in result.runs]
    names = list(dict.fromkeys(name for run in flat for name in run))
    with (root / "sweep.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
