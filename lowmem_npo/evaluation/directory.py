"""The directory of an evaluation: which evaluation may go on there, and what it leaves."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, cast

from lowmem_npo.claim import make_directory
from lowmem_npo.data.chat import today
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.benchmarks.registry import BENCHMARKS
from lowmem_npo.evaluation.leaks.registry import LEAK_TESTS
from lowmem_npo.evaluation.options import BESIDE
from lowmem_npo.evaluation.result import Evaluation
from lowmem_npo.evaluation.scoring.journal import Journal
from lowmem_npo.evaluation.settings import EvaluationConfig, EvaluationOptions, names_data, path_of
from lowmem_npo.files import expanded, file_sha256, load_json, write_atomically, write_json
from lowmem_npo.model.names import Base, resolve_name
from lowmem_npo.ranges import check_values, field_types
from lowmem_npo.records import check_record
from lowmem_npo.run_directory import EvaluationFiles, check_empty, from_here, remember_start

# Among the digests of settings.json, beside the sets. Of the base there are its weights alone, wherever they lie, and
# its architecture and size in words; of the holdout also the rows that leak tests measure, where they are those by
# which a run with --forget-level is judged.
THE_MODEL, THE_TOKENIZER, THE_ADAPTER, THE_BASE = "the model", "the tokenizer", "the adapter", "the base"
THE_SIZE = "the architecture and size"
THE_JUDGES = "the part of the holdout that is measured"
OTHERS = THE_MODEL, THE_TOKENIZER, THE_ADAPTER, THE_BASE, THE_SIZE, THE_JUDGES
DECIDED = ("chat_date", "generate_answers")  # where auto is recorded as what it became, and stays so
COMPARED = ("before", "retained_log")  # settings that name the evaluation.json of another model
ADDED = ("leaks", "lm_eval")  # of which a resumed evaluation measures those that it began with, too
# In settings.json beside the options: whether the forget rows, and the holdout of leak tests, were others than those of
# the adapter's run, whether data was named, and which sets were the run's.
OTHER_ROWS, OTHER_HOLDOUT = "other_rows", "other_holdout"
DATA_NAMED, FROM_RUN = "data_named", "from_run"
# The digests of all that the journal has measurements of, and the leak tests, also where they have been left out since.
IN_JOURNAL, TESTS_IN_JOURNAL = "digests_in_journal", "leaks_in_journal"
BESIDE_OPTIONS = {
    OTHER_ROWS: bool, OTHER_HOLDOUT: bool, DATA_NAMED: bool, FROM_RUN: list[str], IN_JOURNAL: dict[str, str],
    TESTS_IN_JOURNAL: list[str],
}  # fmt: skip
# what is read of settings.json
SETTINGS = {"digests": dict[str, str], "leaks": list[str], **dict.fromkeys(DECIDED, str), **BESIDE_OPTIONS}


class EvaluationDirectory(EvaluationFiles):
    """The directory of the evaluation that `config` describes.

    digests: a hash of everything that is read (data, adapter), so that no evaluation goes on with something else.
    other_rows, other_holdout: whether the forget rows, and the holdout of leak tests, are others than those of the
    adapter's run. data_named: whether any are. from_run: the sets that are the run's.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        digests: Mapping[str, str],
        other_rows: bool = False,
        data_named: bool = True,
        other_holdout: bool = False,
        from_run: Sequence[str] = (),
    ) -> None:
        super().__init__(config.path)
        self.config, self.digests = config, dict(digests)
        self.beside_options = {
            OTHER_ROWS: other_rows, OTHER_HOLDOUT: other_holdout, DATA_NAMED: data_named, FROM_RUN: list(from_run)
        }  # fmt: skip

    def begin(self) -> Journal:
        """From here on the directory is this evaluation's; the journal knows what it had measured.

        Raises UserError as `check` does.
        """
        self.check()
        settings = {**as_json(self.config), **self.beside_options, "digests": self.digests}
        began = settings_to_resume(self) if self.config.resume else {"digests": {}}
        settings[IN_JOURNAL] = {**_in_journal(began), **_in_journal(settings)}
        settings[TESTS_IN_JOURNAL] = sorted({*_tests_in_journal(began), *self.config.leaks})
        try:
            make_directory(self.path)
            write_json(self.settings, settings, indent=2, ensure_ascii=False)
            remember_start(self)
        except OSError as error:
            raise UserError(f"--output-dir '{self.path}' cannot be written: {error.strerror or error}.") from error
        return Journal(self.journal)

    def check(self) -> None:
        """Raises UserError where the directory holds another evaluation or other files; writes nothing."""
        if self.config.resume:
            self._check_resume()
        elif self.settings.exists():
            raise UserError(
                f"--output-dir '{self.path}' holds an evaluation: continue it with --resume, "
                "choose another directory, or remove it."
            )
        else:
            check_empty(self.path, self.settings.name)

    def _check_resume(self) -> None:
        began, now = settings_to_resume(self), as_json(self.config)
        digests = _in_journal({**now, "digests": self.digests})
        for name, value in _in_journal(began).items():
            if digests.get(name, value) != value:
                raise has_changed(name, self.path)
        may_change, may_be_added = self.config.may_change() | _unused(began), _known_by_digests()
        changed = [
            f"{name} was {value!r}, is {now.get(name)!r}"
            for name, value in began.items()
            if name not in ("digests", *BESIDE_OPTIONS)  # the digests tell
            and not _is_same(name, value, now.get(name))
            and name not in may_change
            and not (value is None and name in may_be_added)
        ]
        if changed:
            raise UserError(
                f"--resume: the evaluation in '{self.path}' began with other settings ({'; '.join(changed)}): "
                "use those, or start anew."
            )

    def save(self, evaluation: Evaluation) -> None:
        """evaluation.json, the scored rows, and what benchmarks write by themselves."""
        rows = evaluation.rows_to_json()
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(self.rows, lines, private=True)
        for benchmark in BENCHMARKS:
            if benchmark.name in evaluation.scores:
                benchmark.save(evaluation.scores[benchmark.name], self)
        write_json(self.result, evaluation.to_json(), indent=2, ensure_ascii=False, allow_nan=False)


def _is_same(name: str, value: Any, other: Any) -> bool:
    """Whether an option names the same: of rows and of an adapter the digests tell, wherever they are named from."""
    if value == other or value is None or other is None:
        return bool(value == other)
    if name == "model" and isinstance(value, str):
        return os.path.realpath(value) == os.path.realpath(other) and os.path.exists(value)
    return name == "adapter" or name in _known_by_digests()


def _known_by_digests() -> set[str]:
    """Options that name rows, or what is read beside them."""
    return {*EvaluationConfig.sources(), *(f.name for f in fields(EvaluationConfig) if BESIDE in f.metadata)}


def settings_to_resume(files: EvaluationFiles) -> dict[str, Any]:
    """The settings of the evaluation in `files`, what they name found from here. Raises UserError where there are none,
    or where they are damaged."""
    if not files.settings.exists():
        raise UserError(f"--resume: there is no evaluation in '{files.path}'; start it without --resume.")
    try:
        settings = _read(files, SETTINGS, needed=["digests"])
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
        check_values(values, field_types(EvaluationConfig))
    except (ValueError, UserError) as error:
        raise UserError(f"--resume: '{files.settings}' is damaged: start the evaluation anew.") from error
    return _places_from_here(files, settings, {"model", "adapter", "lm_eval_path", *COMPARED, *_known_by_digests()})


def kept_options(options: EvaluationOptions) -> dict[str, Any]:
    """The options with which the evaluation that `options` resume began, for those that are not given now: all that
    decide what is measured, or stands beside it. Data, where none is named, is that of the adapter's run once more,
    unless other data was named.

    Raises UserError as `settings_to_resume` does.
    """
    settings = settings_to_resume(EvaluationFiles(path_of(options)))
    kept = {f.name for f in fields(EvaluationConfig)} - EvaluationConfig.of_invocation()
    if not names_data(options) and not settings.get(DATA_NAMED, False):
        kept -= EvaluationConfig.sources().keys()
    values = {name: settings[name] for name in kept if name in settings}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def joined(began: Sequence[str], named: Sequence[str]) -> tuple[str, ...]:
    """What a resumed evaluation measures: what is named now joins what it `began` with, unless that is "none"."""
    return tuple(named) if "none" in named else tuple(dict.fromkeys([*began, *named]))


def begun_from_run(config: EvaluationConfig) -> list[str]:
    """The sets that were the run's when the evaluation that `config` resumes began; none of any other."""
    began = settings_of(str(EvaluationFiles(config.path).result)) or {} if config.resume else {}
    return list(began.get(FROM_RUN, ()))


def as_begun(config: EvaluationConfig) -> EvaluationConfig:
    """`config` with the date of its chat template, and, of an evaluation that is to be resumed, with what was decided
    when it began."""
    began = settings_of(str(EvaluationFiles(config.path).result)) or {} if config.resume else {"chat_date": today()}
    decided: dict[str, Any] = {
        name: began[name] for name in DECIDED if began.get(name) and getattr(config, name) == "auto"
    }
    return replace(config, **decided)


def as_json(config: EvaluationConfig) -> dict[str, Any]:
    """The options as settings.json holds them."""
    return cast(dict[str, Any], json.loads(json.dumps(asdict(config))))


def settings_of(result: str) -> dict[str, Any] | None:
    """The settings of the evaluation.json at `result`, its digests among them; None where they cannot be read."""
    try:
        earlier = _read(EvaluationFiles(expanded(result).parent), SETTINGS)
    except (OSError, ValueError):
        return None
    return {**earlier, "digests": dict(earlier.get("digests", {}))}


def compared_with(files: EvaluationFiles) -> dict[str, Any]:
    """The settings of the evaluation in `files`, what it was compared with found from here; empty where there are none.
    Raises ValueError where they are damaged."""
    if not files.settings.is_file():
        return {}
    settings = _read(files, {OTHER_ROWS: bool, OTHER_HOLDOUT: bool, **dict.fromkeys(COMPARED, str | None)})
    return _places_from_here(files, settings, COMPARED)


def has_other_judges(began: Mapping[str, Any], leaks: Collection[str], digests: Mapping[str, str]) -> bool:
    """Whether leak tests measured another part of the same holdout in the evaluation whose settings.json holds `began`
    than these would."""
    then, now = _in_journal(began), _in_journal({"leaks": leaks, "digests": digests})
    if then.get("holdout") != now.get("holdout") or THE_JUDGES not in then or THE_JUDGES not in now:
        return False
    return then[THE_JUDGES] != now[THE_JUDGES]


def _in_journal(settings: Mapping[str, Any]) -> dict[str, str]:
    """A digest of all that the journal may have measurements of, by what settings.json holds; of the holdout also that
    of the rows that leak tests measured, and be it all of them: the journal, which knows rows by their places, cannot
    tell."""
    known = {**settings.get(IN_JOURNAL, {}), **settings["digests"]}
    if settings.get("leaks") and "holdout" in settings["digests"]:
        known[THE_JUDGES] = settings["digests"].get(THE_JUDGES, settings["digests"]["holdout"])
    return known


def _tests_in_journal(settings: Mapping[str, Any]) -> set[str]:
    """The leak tests of which the journal may have measurements, by what settings.json holds."""
    return {*settings.get(TESTS_IN_JOURNAL, ()), *settings.get("leaks", ())}


def _unused(began: Mapping[str, Any]) -> set[str]:
    """The options of leak tests and benchmarks alone that have measured nothing, by what settings.json holds."""
    tests, digests = _tests_in_journal(began), _in_journal(began)
    by_use: dict[bool, set[str]] = {True: set(), False: set()}
    for test in LEAK_TESTS:
        by_use[test.name in tests] |= {f.name for f in fields(test.options)}
    for benchmark in BENCHMARKS:
        names = {f.name for f in fields(benchmark.options)}
        own = benchmark.own_sets(benchmark.options(**{name: began[name] for name in names & began.keys()}))
        by_use[bool(own) or not digests.keys().isdisjoint(benchmark.sets)] |= names
    return by_use[False] - by_use[True]


def has_changed(name: str, directory: Path) -> UserError:
    return UserError(f"--resume: {name} has changed since '{directory}' was begun; start anew.")


def is_of_adapter(files: EvaluationFiles, weights: Path) -> bool:
    """Whether the evaluation in `files` measured the adapter whose weights are in the file `weights` now.

    Raises UserError where its settings are damaged.
    """
    try:
        settings = _read(files, {"digests": dict[str, str]}, needed=["digests"])
    except ValueError as error:
        raise UserError(f"'{files.settings}' is damaged: remove '{files.path}', and measure anew.") from error
    return bool(settings["digests"].get(THE_ADAPTER) == file_sha256(weights))


def base_of(files: EvaluationFiles) -> Base:
    """The model that the evaluation in `files` measured an adapter on. Raises ValueError where its settings are
    damaged."""
    types = {"digests": dict[str, str], "model": str | None, "revision": str | None, "any_base": bool}
    settings = _read(files, types, needed=["digests"])
    digests, name, revision = settings["digests"], settings.get("model"), settings.get("revision")
    if name is None or not settings.get("any_base"):
        return Base(weights=digests.get(THE_BASE))
    return Base(resolve_name(from_here(files, settings, name), revision), digests.get(THE_BASE))


def _read(files: EvaluationFiles, types: Mapping[str, Any], needed: Collection[str] = ()) -> dict[str, Any]:
    """What settings.json holds. Raises OSError, and ValueError where values are not of these types, or a needed one is
    missing."""
    settings = load_json(files.settings)
    check_record(settings, types, optional=types.keys() - set(needed))
    return cast(dict[str, Any], settings)


def _places_from_here(files: EvaluationFiles, settings: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The settings, what those called `names` name as it is found from here."""
    named = {name: settings[name] for name in names if settings.get(name)}
    return {**settings, **{name: from_here(files, settings, value) for name, value in named.items()}}
