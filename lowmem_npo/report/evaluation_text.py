"""What `lowmem-npo evaluate` prints: notes that qualify the figures, a table per benchmark, the leak tests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from textwrap import fill
from typing import Any

from lowmem_npo.evaluation.answer_table import share_of
from lowmem_npo.evaluation.benchmarks.registry import BENCHMARKS
from lowmem_npo.evaluation.fluency import fluency_text
from lowmem_npo.evaluation.leaks.beside_before import TELLS_NOTHING, none_before
from lowmem_npo.evaluation.leaks.contract import LeakResults, leak_results


def evaluation_text(content: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """content: that of evaluation.json. before: that of an earlier one, to compare with; or empty."""
    rows = content["rows"]
    blocks = ["\n".join(f"Note: {note}" for note in content["notes"])] if content["notes"] else []
    for benchmark in BENCHMARKS:
        if now := content[benchmark.name]:
            share = _share(rows, benchmark.sets)
            heading = f"{benchmark.title} ({share})" if share else benchmark.title
            earlier = (before.get(benchmark.name) or benchmark.empty or {}) if before else None
            blocks.append(f"{heading}\n{benchmark.text(now, earlier)}")
    if figures := content.get("fluency"):
        blocks.append(f"What is said, to the original model\n{fluency_text(figures)}")
    if content["leaks"]:
        heading = f"What still leaks ({_share(rows, ('forget', 'holdout'))})"
        blocks.append(f"{heading}\n{leaks_text(_results(content), _results(before))}")
    return "\n\n".join(blocks)


def leaks_text(results: LeakResults, before: LeakResults) -> str:
    """Each test's verdict (with the one before) and what it means."""
    lines, passed_before = [], none_before(results, before)
    for name, result in results.items():
        was = f" (before: {before[name].verdict.words})" if name in before else ""
        lines.append(f"{name}: {result.verdict.words}{was}")
        meaning = f"{result.meaning} {TELLS_NOTHING}" if name in passed_before else result.meaning
        lines.append(fill(meaning, 100, initial_indent="    ", subsequent_indent="    "))
    return "\n".join(lines)


def _results(content: Mapping[str, Any]) -> LeakResults:
    return leak_results(content.get("leaks") or {})


def _share(rows: Mapping[str, Mapping[str, int]], parts: Iterable[str]) -> str:
    """How much was measured: scores of 40 rows must not be mistaken for those of 1112."""
    return ", ".join(share_of(part, rows[part]["scored"], rows[part]["in_set"]) for part in parts if part in rows)
