"""What `lowmem-npo evaluate` prints: one small table per benchmark, with what each figure should be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

from lowmem_npo.evaluation.answers import AnswerSummary
from lowmem_npo.evaluation.benchmarks.lume import KINDS
from lowmem_npo.evaluation.result import Evaluation
from lowmem_npo.report.table import text_table

MISSING = "missing"
LEAKS = {True: "LEAKS", False: "no leak found", None: "cannot be told"}


def evaluation_text(result: Evaluation, before: Mapping[str, Any] | None = None) -> str:
    """All tables, then the notes. `before` is the content of an earlier evaluation.json: its figures stand beside."""
    before = before or {}
    blocks = []
    if result.summaries:
        blocks.append(_answers(result, before))
    if result.lume:
        blocks.append(_lume(result, before))
    if result.membership:
        blocks.append(_membership(result, before))
    if result.tofu:
        blocks.append(_tofu(result, before))
    if result.leaks.tests:
        head = f"What still leaks ({_share(result, ('forget', 'holdout'))})"
        blocks.append(f"{head}\n{leaks_text(result.leaks.tests, before.get('leaks') or {})}")
    if result.lm_eval:
        blocks.append(_lm_eval(result, before))
    if result.notes:
        blocks.append("\n".join(f"Note: {note}" for note in result.notes))
    return "\n\n".join(blocks)


def _answers(result: Evaluation, before: Mapping[str, Any]) -> str:
    earlier = {name: AnswerSummary(**values) for name, values in before.get("answers", {}).items()}
    if set(result.summaries) <= set(earlier):
        return text_table({"before": {name: earlier[name] for name in result.summaries}, "after": result.summaries})
    return text_table({"now": result.summaries})


def _lume(result: Evaluation, before: Mapping[str, Any]) -> str:
    now, earlier = result.lume.official(), before.get("lume") or {}
    lines = []
    for part, wish in (("forget", "lower"), ("retain", "as before")):
        block = now[f"{part}-set"]
        for task in [*(name for name in block if not name.startswith("overall-")), "overall"]:
            for kind in KINDS.values():
                path = (f"{part}-set", f"overall-{kind}") if task == "overall" else (f"{part}-set", task, kind)
                lines.append([part, task, kind.removesuffix("-score"), *_values(path, now, earlier, before), wish])
    table = _aligned(["set", "task", "score", *_stages(before), "wished"], lines)
    totals = [
        ["task aggregate", "harmonic-mean-task-aggregate", "higher; 1 is best"],
        ["MIA score", "mia_final_score", "1: the loss betrays no member" if result.membership else "needs --members"],
        ["MMLU", "mmlu_average", "as before" if result.lume.mmlu is not None else "needs --lm-eval mmlu"],
        ["final score", "aggregate-score", "mean of the three" if result.lume.final is not None else "needs all three"],
    ]
    summary = _aligned(
        ["", *_stages(before), ""],
        [[name, *_values((key,), now, earlier, before), meaning] for name, key, meaning in totals],
    )
    return f"LUME, SemEval-2025 Task 4 ({_share(result, ('forget', 'retain'))})\n{table}\n\n{summary}"


def _membership(result: Evaluation, before: Mapping[str, Any]) -> str:
    score = result.membership
    was = (before.get("membership") or {}).get("auc")
    earlier = f" (before: {was:.3f})" if was is not None else ""
    head = f"Membership, LOSS attack ({_share(result, ('members', 'nonmembers'))})"
    return f"{head}\nAUC {score.auc:.3f}{earlier}: {score.meaning}."


def _tofu(result: Evaluation, before: Mapping[str, Any]) -> str:
    now, earlier = result.to_json()["tofu"], before.get("tofu") or {}
    lines = []
    for part in result.tofu:
        forgets = part == "forget"
        for key, title, wish in (
            ("probability", "probability", "lower" if forgets else "higher"),
            ("rouge_l_recall", "ROUGE-L recall", "lower" if forgets else "higher"),
            ("truth_ratio", "truth ratio", "as retained model" if forgets else "higher"),
        ):
            lines.append([part, title, *_values(("sets", part, key), now, earlier, before), wish])
    table = _aligned(["set", "score", *_stages(before), "wished"], lines)
    utility = "higher" if result.model_utility is not None else "needs retain, --real-authors and --world-facts"
    quality = "above 0.05: like a model never taught" if result.forget_quality is not None else "needs --retained-log"
    summary = _aligned(
        ["", *_stages(before), ""],
        [
            ["model utility", *_values(("model_utility",), now, earlier, before), utility],
            ["forget quality", *_values(("forget_quality",), now, earlier, before), quality],
        ],
    )
    return f"TOFU ({_share(result, tuple(result.tofu))})\n{table}\n\n{summary}"


def leaks_text(tests: Mapping[str, Mapping[str, Any]], before: Mapping[str, Any]) -> str:
    """Test by test whether it leaks (now, and in `before`) and what was found."""
    lines = []
    for test, found in tests.items():
        was = f" (before: {LEAKS[before[test]['leaks']]})" if test in before else ""
        lines.append(f"{test}: {LEAKS[found['leaks']]}{was}")
        lines.append(fill(found["meaning"], 100, initial_indent="    ", subsequent_indent="    "))
    return "\n".join(lines)


def _lm_eval(result: Evaluation, before: Mapping[str, Any]) -> str:
    now, earlier = result.lm_eval, before.get("lm_eval", {})
    lines = [
        [task, metric, *_values((task, metric), now, earlier, before)]
        for task, metrics in now.items()
        for metric in metrics
    ]
    return "lm-eval\n" + _aligned(["task", "metric", *_stages(before)], lines)


def _stages(before: Mapping[str, Any]) -> list[str]:
    return ["before", "after"] if before else ["now"]


def _values(path: Sequence[str], now: Mapping, earlier: Mapping, before: Mapping[str, Any]) -> list[str]:
    """The figure at `path`, before (where there is a before) and now."""
    return [_figure(path, content) for content in ([earlier, now] if before else [now])]


def _figure(path: Sequence[str], content: Any) -> str:
    for key in path:
        content = content.get(key) if isinstance(content, Mapping) else None
    if content is None:
        return MISSING
    return f"{content:.3f}" if content == 0 or abs(content) >= 0.001 else f"{content:.1e}"


def _share(result: Evaluation, parts: Sequence[str]) -> str:
    """How much was measured: scores of 40 rows must not be read as those of 1112."""
    told = []
    for part in parts:
        if part in result.rows:
            scored, in_set = result.rows[part]["scored"], result.rows[part]["in_set"]
            told.append(f"all {in_set} {part} rows" if scored == in_set else f"{scored} of {in_set} {part} rows")
    return ", ".join(told)


def _aligned(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Plain text; a first cell that repeats the one above is left blank, figures stand on the right."""
    table = [list(header), *map(list, lines)]
    widths = [max(len(line[column]) for line in table) for column in range(len(header))]
    numeric = {column for column, title in enumerate(header) if title in ("before", "after", "now")}
    shown, previous = [], None
    for line in table:
        cells = [line[0] if line[0] != previous else "", *line[1:]]
        places = enumerate(zip(cells, widths, strict=True))
        aligned = [cell.rjust(width) if i in numeric else cell.ljust(width) for i, (cell, width) in places]
        shown.append("  ".join(aligned).rstrip())
        previous = line[0]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([shown[0], rule, *shown[1:]])
