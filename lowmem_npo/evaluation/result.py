"""What an evaluation measured, in memory and as the content of its files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lowmem_npo.evaluation.benchmarks.registry import BENCHMARKS
from lowmem_npo.evaluation.leaks.contract import LeakResults
from lowmem_npo.evaluation.leaks.worst import WORST_ATTACK, WorstAttack, worst_attack


@dataclass
class Evaluation:
    """Everything that was measured. What is absent was not measured, and `notes` say why where it was expected.

    rows: set -> how many were "scored" of how many "in_set". measured: benchmark -> set -> its measured rows. scores:
    benchmark -> its scores. leak_rows: set -> row -> its scores in the leak tests. fluency: set -> of what is said.
    open_unlearning: figures under its names. gold_leaks: what the leak tests gave of a model that never saw the rows.
    """

    rows: dict[str, dict[str, int]] = field(default_factory=dict)
    measured: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    leaks: LeakResults = field(default_factory=dict)
    leak_rows: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    fluency: dict[str, dict[str, Any]] = field(default_factory=dict)
    open_unlearning: dict[str, float] = field(default_factory=dict)
    gold_leaks: LeakResults = field(default_factory=dict)

    @property
    def worst_attack(self) -> WorstAttack | None:
        """Of all that the leak tests tried, beside the gold model's figure."""
        return worst_attack(self.leaks, self.gold_leaks)

    def to_json(self) -> dict[str, Any]:
        """evaluation.json: every figure, no text of any row."""
        benchmarks = {b.name: b.to_json(self.scores[b.name]) if b.name in self.scores else b.empty for b in BENCHMARKS}
        leaks = {name: result.to_json() for name, result in self.leaks.items()}
        ours = {"fluency": self.fluency, "open_unlearning": self.open_unlearning}
        worst = {WORST_ATTACK: self.worst_attack.to_json()} if self.worst_attack else {}
        return {"rows": self.rows, **benchmarks, "leaks": leaks, **worst, **ours, "notes": self.notes}

    def rows_to_json(self) -> list[dict[str, Any]]:
        """rows.jsonl: each row's prompt, the model's answer, its scores."""
        lines: list[dict[str, Any]] = []
        for benchmark in BENCHMARKS:
            for name, measured in self.measured.get(benchmark.name, {}).items():
                lines += [{"set": name, **line} for line in benchmark.rows_to_json(name, measured)]
        for name, rows in self.leak_rows.items():
            lines += [{"set": name, "row": row, "leaks": scores} for row, scores in rows.items()]
        return lines
