"""What was other in one evaluation than in another, by what their settings.json hold, and which figures that parts."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, fields
from typing import Any

from lowmem_npo.evaluation.benchmarks.registry import BenchmarkOptions
from lowmem_npo.evaluation.directory import OTHER_HOLDOUT, OTHERS, THE_JUDGES, THE_TOKENIZER, has_changed, settings_of
from lowmem_npo.evaluation.leaks.contract import LeakTest
from lowmem_npo.evaluation.leaks.measure import repeated
from lowmem_npo.evaluation.leaks.registry import LEAK_TESTS, LeakOptions
from lowmem_npo.evaluation.leaks.retuning import RETUNING
from lowmem_npo.evaluation.options import FREE
from lowmem_npo.evaluation.settings import EvaluationConfig
from lowmem_npo.run_directory import EvaluationFiles

ANOTHER_TOKENIZER = "another tokenizer or chat template"


def differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What was other in one evaluation than in another, by what their settings.json hold, in words, as far as that is
    known. Of the options of leak tests `other_options` tells."""
    differ = [f"{name} {earlier[name]!r}" for name in changed_options(earlier, now, EvaluationConfig.compared())]
    if another_tokenizer(earlier, now):
        differ.append(ANOTHER_TOKENIZER)
    return differ + [f"other {part} rows" for part in _other_rows(earlier, now)]


def other_sets(earlier: Mapping[str, Any], now: Mapping[str, Any], but: Iterable[str] = ()) -> list[str]:
    """The sets of which two evaluations' figures cannot be compared, by what their settings.json hold: those that had
    other rows; all, where the tokenizer or a setting that decides them was another. `but`: options that may differ."""
    of_benchmarks = {f.name for f in fields(BenchmarkOptions)}
    names = set(EvaluationConfig.compared()) - of_benchmarks - set(but)
    digests = now.get("digests", {})
    if another_tokenizer(earlier, now) or changed_options(earlier, now, names):
        return _sets(digests)
    return _other_rows(earlier, now)


def another_tokenizer(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two evaluations are known to have split or written their rows differently: no figure per token says the
    same then."""
    return changed(THE_TOKENIZER, earlier, now.get("digests", {}))


def other_options(
    earlier: Mapping[str, Any], now: Mapping[str, Any], test: LeakTest, others: Collection[str], by_attack: bool = False
) -> list[str]:
    """The flags because of which the results of a leak test in two evaluations cannot be compared, by what their
    settings.json hold: its own, and those of the tests that both let it repeat, as far as both have them; that of rows
    which it teaches; and that of how long answers may be.

    others: sets with other rows. by_attack: attacks are compared one by one, with a look at the length of answers; what
    their names tell does not count.
    """
    repeats = [repeated(measured_leaks(of)) if test.loads_models else [] for of in (earlier, now)]
    tests = [test, *(one for one in repeats[0] if one in repeats[1])]
    tests = [one for one in tests if not (by_attack and one.named_by_options)]
    names = dict.fromkeys(f.name for one in tests for f in fields(one.options) if FREE not in f.metadata)
    if not by_attack and any("max_new_tokens" in one.counts for one in tests):
        names["max_new_tokens"] = None
    flags = [f"--{name.replace('_', '-')}" for name in changed_options(earlier, now, names)]
    taught = ["--retain"] if RETUNING in tests and "retain" in others else []
    return flags + taught + ([] if by_attack or repeats[0] == repeats[1] else ["--leaks"])


def measured_otherwise(run: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, list[str]]:
    """Leak test -> the flags with which an evaluation, by its settings.json, measured otherwise than the run of its
    adapter, by its run.yaml; tests that were measured alike are left out."""
    own = {**json.loads(json.dumps(asdict(LeakOptions()))), **run}
    if own.get("max_new_tokens") is None or settings.get("max_new_tokens") is None:  # what that became is not known
        own.pop("max_new_tokens", None)
    levels = [of.get("forget_level", "none") for of in (run, settings)]
    holdout = "--forget-level" if levels == ["none", "holdout"] else "--holdout"
    flags = loaded_otherwise(run, settings) + ([holdout] if settings.get(OTHER_HOLDOUT) else [])
    others = {test.name: flags + other_options(own, settings, test, ()) for test in measured_leaks(settings)}
    return {name: of_test for name, of_test in others.items() if of_test}


def loaded_otherwise(run: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """The flags with which an evaluation wrote rows, or loaded the model, otherwise than a run, as far as is known."""
    template, other = (of.get("template") or "auto" for of in (run, settings))
    flags = [
        f"--{name.replace('_', '-')}"
        for name in changed_options(run, settings, ("dtype", "qlora", "system", "max_length"))
    ]
    return flags + (["--template"] if template != other and "auto" not in (template, other) else [])


def measured_leaks(settings: Mapping[str, Any]) -> list[LeakTest]:
    """The leak tests of the evaluation whose settings.json holds `settings`."""
    named = settings.get("leaks") or ()
    return [test for test in LEAK_TESTS if test.name in named or "all" in named]


def changed_options(earlier: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Those of the options `names` that one settings.json has otherwise than another, as far as both have them."""
    return [name for name in names if name in earlier and name in now and earlier[name] != now[name]]


def check_same_sets(files: EvaluationFiles, digests: Mapping[str, str]) -> None:
    """Raises UserError where the evaluation in `files` is known to be of other sets than those that `digests` tell,
    whichever of their rows it measured."""
    earlier = settings_of(str(files.result)) or {"digests": {}}
    for part in _sets(digests):
        if changed(part, earlier, digests):
            raise has_changed(part, files.path)


def _other_rows(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The sets that are known to have had other rows: of the holdout by those that leak tests measured, if both did."""
    then, digests = earlier["digests"], now.get("digests", {})
    if earlier.get("leaks") and now.get("leaks"):
        then, digests = of_measured_rows(then), of_measured_rows(digests)
    return [part for part in _sets(digests) if changed(part, {"digests": then}, digests)]


def of_measured_rows(digests: Mapping[str, str]) -> dict[str, str]:
    """The same, of the holdout that of the rows that leak tests measured."""
    return {**digests, **({"holdout": digests[THE_JUDGES]} if THE_JUDGES in digests else {})}


def _sets(digests: Mapping[str, str]) -> list[str]:
    return [name for name in digests if name not in OTHERS]


def changed(name: str, earlier: Mapping[str, Any], digests: Mapping[str, str]) -> bool:
    """Whether `name` is known to have been another."""
    known = earlier["digests"]
    return name in known and name in digests and known[name] != digests[name]
