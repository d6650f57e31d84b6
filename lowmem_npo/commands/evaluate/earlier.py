"""The earlier evaluation that --before names, as far as it measured the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.answers import part_of
from lowmem_npo.evaluation.benchmarks.plain import PLAIN
from lowmem_npo.evaluation.benchmarks.registry import BENCHMARKS
from lowmem_npo.evaluation.directory import as_json, incomparable_sets, other_options, settings_of
from lowmem_npo.evaluation.leaks.contract import leak_results
from lowmem_npo.evaluation.leaks.registry import leak_tests
from lowmem_npo.evaluation.settings import EvaluationConfig
from lowmem_npo.files import expanded, load_json
from lowmem_npo.ranges import shortened


def read_earlier(
    config: EvaluationConfig, digests: Mapping[str, str]
) -> tuple[Mapping[str, Any], list[str], list[str]]:
    """What of its figures can be compared with those of `config`, the sets of which none can, and a note on each leak
    test that cannot. Of answers each set is judged by itself, of every other benchmark and of each leak test all or
    nothing. All are empty without --before.

    digests: a hash of each set.

    Raises:
        UserError: --before names no evaluation.
    """
    if config.before is None:
        return {}, [], []
    content, others = _content(config.before), incomparable_sets(config.before, config, digests)
    for benchmark in BENCHMARKS:
        if benchmark.name == PLAIN.name:
            of_sets = content.get(PLAIN.name) or {}
            content[PLAIN.name] = {name: of for name, of in of_sets.items() if part_of(name) not in others}
        elif set(benchmark.sets) & set(others):
            content.pop(benchmark.name, None)
    if {"forget", "holdout"} & set(others):
        content["leaks"] = {}
    notes, settings, now = [], settings_of(config.before) or {}, as_json(config)
    for test in leak_tests(config.leaks):
        another = other_options(settings, now, test, others)
        if another and content["leaks"].pop(test.name, None):
            notes.append(f"{test.name}: not compared with --before, which had another {', '.join(another)}.")
    return content, others, notes


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
