"""The leak tests of a report: what each found at each stage, figure by figure, and what a figure means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lowmem_npo.report.figures import Figure

Leaks = Mapping[str, Mapping[str, Any]]  # test -> its figures, with "meaning" and "leaks"

ANSWERS = {True: ("traces found", "bad"), False: ("none found", "good"), None: ("cannot tell", "unknown")}
COUNTS = ("rows", "holdout_rows", "shown_rows", "steps", "samples")
HOLDOUT = "holdout_"
LEFT_OUT = ("meaning", "leaks", "curve")  # the curve of relearning stays in report.json
MEANINGS = {
    "nll": "NLL per answer token, averaged over rows. As on rows never seen is best; lower is remembered.",
    "exact_memorization": "Share of answer tokens that are the likeliest after the true words before them.",
    "extraction_strength": "How much of an answer's end the model writes by itself once begun; 1 is all of it.",
    "recited": "Share of answers that come whole from the question alone. 0 is forgotten.",
    "best_rouge_l_recall": "How much of the answer stands in the best sample.",
    "whole": "Share of answers that some sample says whole. 0 is forgotten.",
    "returned": "How much extraction strength merging or rounding brought back. 0 or less is good.",
    "recovered": "How much of the way back to the original model's extraction strength was covered. Near 0 is good.",
    "auc": "How often the attack ranks a forgotten row above one never seen. 0.5 is a coin; 1 and 0 both betray.",
    "temperature": "Of the samples; 1 is the model's own distribution.",
    "p": "How often chance alone would do that. Very small: the difference is real.",
}


@dataclass(frozen=True)
class LeakFigure(Figure):
    """never_seen: stage -> the same figure for holdout rows, where it was measured."""

    never_seen: dict[str, float | None]


@dataclass(frozen=True)
class LeakTest:
    """answers: stage -> whether it leaks, in a word, and the tone of that. meaning: what it found last."""

    name: str
    meaning: str
    counts: str
    answers: dict[str, tuple[str, str]]
    figures: list[LeakFigure]


def leak_tests(leaks: Mapping[str, Leaks]) -> list[LeakTest]:
    """leaks: stage -> test -> figures."""
    tests = list(dict.fromkeys(test for found in leaks.values() for test in found))
    return [_test(test, {stage: found[test] for stage, found in leaks.items() if test in found}) for test in tests]


def _test(name: str, stages: Mapping[str, Mapping[str, Any]]) -> LeakTest:
    speaks = stages.get("after") or list(stages.values())[-1]
    numbers = {stage: dict(_numbers(found)) for stage, found in stages.items()}
    figures, told = [], set()
    for path in dict.fromkeys(path for found in numbers.values() for path in found):
        if path[-1].startswith(HOLDOUT):
            continue
        own, other = (
            {stage: found.get((*path[:-1], key)) for stage, found in numbers.items() if (*path[:-1], key) in found}
            for key in (path[-1], HOLDOUT + path[-1])
        )
        meaning = MEANINGS.get(path[-1]) or MEANINGS.get(path[-1].rpartition("_")[2], "")
        title = ", ".join(words(key) for key in path)
        figures.append(
            LeakFigure(name, None, ".".join(path), title, own, "", "" if meaning in told else meaning, other)
        )
        told.add(meaning)
    counts = ", ".join(f"{speaks[key]} {words(key)}" for key in COUNTS if key in speaks)
    answers = {stage: ANSWERS[found.get("leaks")] for stage, found in stages.items()}
    return LeakTest(name, speaks.get("meaning") or "", counts, answers, figures)


def _numbers(found: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float | None]]:
    for key, value in found.items():
        if key in LEFT_OUT or key in COUNTS or isinstance(value, bool):
            continue
        if isinstance(value, Mapping):
            yield from _numbers(value, (*path, key))
        elif value is None or isinstance(value, int | float):
            yield (*path, key), value


def words(key: str) -> str:
    """A key of a result file, for people."""
    known = {"auc": "AUC", "nll": "NLL", "rouge": "ROUGE", "l": "L", "4bit": "4-bit", "pp": "++", "p": "p-value"}
    text = " ".join(known.get(word, word) for word in key.split("_"))
    return text.replace("ROUGE L", "ROUGE-L").replace("min k", "Min-K%").replace("Min-K% ++", "Min-K%++")
