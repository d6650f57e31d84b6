"""The earlier evaluation that --before names, as far as it measured the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.answers import part_of
from lowmem_npo.evaluation.benchmarks.contract import Benchmark
from lowmem_npo.evaluation.benchmarks.plain import PLAIN
from lowmem_npo.evaluation.benchmarks.registry import BENCHMARKS
from lowmem_npo.evaluation.comparing import changed_options, differences, measured_leaks, other_options, other_sets
from lowmem_npo.evaluation.directory import OTHERS, compared_with, settings_of
from lowmem_npo.evaluation.leaks.contract import LeakResults, leak_results
from lowmem_npo.evaluation.options import BESIDE, FREE, SET
from lowmem_npo.evaluation.other_models import another_base, another_size
from lowmem_npo.files import expanded, load_json
from lowmem_npo.ranges import shortened
from lowmem_npo.run_directory import EvaluationFiles


class Earlier(NamedTuple):
    """content: what of its evaluation.json can be compared. incomparable: sets of which no figure can. notes: what was
    measured otherwise, and the leak tests that cannot be compared."""

    content: Mapping[str, Any]
    incomparable: list[str]
    notes: list[str]

    @classmethod
    def of(cls, settings: Mapping[str, Any], content: Mapping[str, Any] | None = None) -> Earlier:
        """As far as it can be compared with the evaluation that has these settings, those of its settings.json: of
        answers each set is judged by itself, of every other benchmark and of each leak test all or nothing. All is
        empty without --before.

        content: of the evaluation.json, where it has been read.

        Raises:
            UserError: --before names no evaluation.
        """
        if (before := settings.get("before")) is None:
            return cls({}, [], [])
        content = dict(_content(before) if content is None else content)
        earlier = settings_of(before) or {"digests": {}}
        if models := another_base(earlier, settings):
            every_set = [name for name in settings["digests"] if name not in OTHERS]
            note = f"The earlier evaluation is of another model, {models}: nothing is compared with it."
            return cls({}, every_set, [note])
        others = other_sets(earlier, settings)
        notes = []
        if models := another_size(earlier, settings):
            notes.append(f"The earlier evaluation is of a model of another architecture or size, {models}.")
        if differ := differences(earlier, settings):
            notes.append(f"The earlier evaluation had {' and '.join(differ)}: the two are not comparable.")
        for benchmark in BENCHMARKS:
            if benchmark.name == PLAIN.name:
                of_sets = content.get(PLAIN.name) or {}
                content[PLAIN.name] = {name: of for name, of in of_sets.items() if part_of(name) not in others}
            elif {*benchmark.sets, *benchmark.takes_in} & set(others) or changed_options(
                earlier, settings, _deciding(benchmark)
            ):
                content.pop(benchmark.name, None)
        content["leaks"] = {} if {"forget", "holdout"} & set(others) else dict(content.get("leaks") or {})
        for test in measured_leaks(settings):
            another = other_options(earlier, settings, test, others)
            if another and content["leaks"].pop(test.name, None):
                notes.append(f"{test.name}: not compared with --before, which had another {', '.join(another)}.")
        return cls(content, others, notes)


def leaks_before(files: EvaluationFiles) -> LeakResults:
    """What the leak tests gave of the model before it forgot, as far as the evaluation in `files` was compared with it;
    none where that is not there any more. Raises ValueError where its settings are damaged, and UserError where the
    earlier evaluation is."""
    settings = compared_with(files)
    if not (before := settings.get("before")) or not expanded(before).is_file():
        return {}
    return leak_results(Earlier.of({"digests": {}, **settings}).content.get("leaks") or {})


def _deciding(benchmark: Benchmark[Any, Any]) -> list[str]:
    """The options that decide a benchmark's figures, beside its sets, the files read beside them, which digests tell
    apart, and what decides the figures of all sets."""
    own = [f.name for f in fields(benchmark.options) if not {FREE, SET, BESIDE} & set(f.metadata)]
    return own if benchmark.sets else [*own, "limit"]


def _content(path: str) -> dict[str, Any]:
    try:
        content = load_json(expanded(path))
    except (OSError, ValueError) as error:
        raise UserError(f"--before: '{path}' cannot be read as an earlier evaluation.json.") from error
    if not isinstance(content, dict) or not {"rows", "leaks", "notes"} <= set(content):
        raise UserError(f"--before: '{path}' is no evaluation.json of `lowmem-npo evaluate`.")
    try:
        leak_results(content["leaks"])
        for benchmark in BENCHMARKS:
            if figures := content.get(benchmark.name):
                benchmark.figures(figures)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--before: '{path}' is damaged ({shortened(str(error))}): measure it anew.") from error
    return content
