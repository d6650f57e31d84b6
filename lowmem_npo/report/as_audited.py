"""Whether what is here now is what a run's audit record tells of: its rows, its base, the adapter that it wrote."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lowmem_npo.config import RunConfig
from lowmem_npo.console import Say
from lowmem_npo.data import Example, PreparedData
from lowmem_npo.errors import UserError
from lowmem_npo.files import expanded, file_sha256
from lowmem_npo.model import resolve_name
from lowmem_npo.model.names import LOADED, Base, digest_of
from lowmem_npo.model.saved_adapter import check_base, resolve_base
from lowmem_npo.report.audit import (
    Audit,
    alternatives,
    continued,
    level_rows,
    paraphrases,
    read_audit,
    recorded_adapter,
    row_hash,
)
from lowmem_npo.run_directory import RunFiles, from_here, run_of_adapter
from lowmem_npo.training.training_rows import planned_rows


def judging(directory: Path, holdout: Sequence[Example]) -> list[int]:
    """Places of the holdout rows that the run in `directory` can be judged by: of those that did not set the levels up
    to which it forgot. All of them where nothing is recorded."""
    try:
        audit = read_audit(directory) or {}
    except UserError:  # damaged, of which the report tells
        audit = {}
    known = {*(audit.get("level_rows") or [])}
    salt = audit["forget_rows"]["salt"] if known else ""
    return [place for place, row in enumerate(holdout) if not known or row_hash(row, salt) not in known]


def of_another_adapter(directory: Path) -> str | None:
    """What to say of a run whose `directory` holds other weights than those that it wrote and measured; None where it
    does not, or where that is not recorded."""
    files = RunFiles(directory)
    try:
        if recorded_adapter(directory) in (None, file_sha256(files.weights)):
            return None
    except (UserError, OSError):
        return None
    return (
        f"{files.weights.name} is not the file that the run in its directory wrote (its hash is not the one in "
        f"{files.audit.name}): the run's figures are of another adapter."
    )


def of_another_base(directory: Path, base: Base) -> str | None:
    """What to say where the adapter in `directory` is put on `base`, another model than its run trained it on; None
    where it is not known to be one."""
    try:
        if not base.is_other_than(base_of_run(run_of_adapter(directory).path)):
            return None
    except UserError:  # a damaged record, of which the report tells
        return None
    return "The base is another model than the one that the adapter was trained on: the run's figures are not of it."


def base_of_run(directory: Path) -> Base:
    """The model that the run in `directory` was trained on, as far as that is recorded. Raises UserError if its audit
    record is damaged."""
    if (audit := read_audit(directory)) is None or "loaded" not in audit["model"]:
        return Base()
    loaded, weights, commit = (audit["model"].get(key) for key in ("loaded", "files", "commit"))
    name = from_here(RunFiles(directory), audit["configuration"], loaded)
    return Base.here(name, commit) if commit and not weights else Base(name, weights)


def check_same_rows(directory: Path, config: RunConfig, data: PreparedData) -> None:
    """Raises UserError, naming what has changed, if the run in `directory`, which is to be resumed, began with other
    rows, other groups of the forget rows, or other answers to them: what it has forgotten may be what it now keeps."""
    audit = read_audit(directory)
    if audit is None:
        return
    for what, then, now in _compared(audit, config, data):
        if then != now:
            raise UserError(f"--resume: the {what} have changed since the run in '{directory}' began; start anew.")


def _compared(audit: Audit, config: RunConfig, data: PreparedData) -> Iterator[tuple[str, Any, Any]]:
    """What a run goes on with: its name, as the audit record has it, and as it is now. Texts and answers that the model
    is yet to write are left out."""
    record, options = audit["forget_rows"], config.data
    yield "forget rows", record["sha256"], [row_hash(example, record["salt"]) for example in data.forget.examples]
    for part in ("forget", "retain", "holdout"):
        unread = part == "retain" and (data.retain_is_unwritten or not config.objective.needs_retain)
        if (rows := getattr(data, part)) is not None and not unread:
            yield f"{part} rows", audit["data"].get(part, {}).get("tokenised"), rows.fingerprint
    yield "holdout rows that set levels", audit["level_rows"], level_rows(data, record["salt"])
    yield "paraphrases", record["paraphrases"], paraphrases(data, record["salt"])
    by = "" if options.group_column is None else f", by --group-column {options.group_column}"
    yield f"folds of the forget rows (--layered{by})", record["folds"], planned_rows(config, data).folds
    if not data.alternatives_are_unwritten:
        column = options.alternative_column
        source = f"--alternatives {options.alternatives}" if column is None else f"--alternative-column {column}"
        yield f"other answers to the forget rows ({source})", record["alternatives"], alternatives(config, data)


def check_same_adapter(directory: Path, config: RunConfig) -> None:
    """Raises UserError if the run in `directory`, which is to be resumed, went on from another adapter."""
    audit, now = read_audit(directory), continued(config)
    if audit is not None and now is not None and (audit["model"].get("adapter") or now)["sha256"] != now["sha256"]:
        raise UserError(
            f"--resume: the adapter in '{config.adapter.adapter}' has changed since the run in '{directory}' began; "
            "start anew."
        )


def check_same_model(directory: Path, config: RunConfig) -> None:
    """Raises UserError if the run in `directory`, which is to be resumed, began with other weights of its base."""
    if _changed(directory, resolve_name(config.model.model, config.model.revision)):
        raise UserError(
            f"--resume: the model in '{config.model.model}' has changed since the run in '{directory}' began; start "
            "anew."
        )


def recorded_base(
    adapter: str, model: str | None, revision: str | None, any_base: bool, say: Say
) -> tuple[str, str | None]:
    """As `resolve_base`; raises a UserError also where that is another model than the adapter was trained on."""
    name, revision = resolve_base(adapter, model, revision, any_base, say)
    if not any_base:
        check_recorded_base(adapter, name, revision)
    return name, revision


def check_recorded_base(adapter: str, name: str, revision: str | None) -> None:
    """Raises UserError if the model that `name` gives now is not the one that the adapter in the directory `adapter`
    was trained on: by the weights, wherever they lie; where those are not known, by what the adapter names."""
    run = run_of_adapter(adapter).path
    try:
        weights, changed = base_of_run(run).weights, _changed(run, name)
    except UserError:  # a damaged record, of which the report tells
        weights, changed = None, False
    if weights is not None and weights == Base.here(name, revision).weights:
        return
    check_base(adapter, name)
    if changed:
        raise UserError(
            f"The model in '{name}' has changed since the adapter in '{adapter}' was trained on it: give --model the "
            "one that it was, or --any-base if this one is meant."
        )


def _changed(run: Path, name: str) -> bool:
    """Whether other weights are in the place of those that the run's base was loaded from, as far as that is recorded:
    of directories."""
    recorded = (read_audit(run) or {}).get("model", {}).get("files")
    return bool(recorded and expanded(name).is_dir() and digest_of(name, patterns=LOADED) != recorded)


def are_others(directory: Path, forget: Sequence[Example]) -> bool:
    """Whether most of these forget rows are known not to be those of the run in `directory`."""
    if (audit := read_audit(directory)) is None:
        return False
    known, salt = set(audit["forget_rows"]["sha256"]), audit["forget_rows"]["salt"]
    return 2 * sum(row_hash(example, salt) in known for example in forget) < len(forget)


def is_other_holdout(directory: Path, holdout: Sequence[Example] | None) -> bool:
    """Whether these holdout rows, of which `judging` has left out what set levels, are known not to be those that the
    run in `directory` was judged by; without any, whether it had some.

    A few other rows make another holdout, and so do fewer: either may be easier.
    """
    if (audit := read_audit(directory)) is None or (known := audit["holdout_rows"]) is None:
        return False
    salt = audit["forget_rows"]["salt"]
    return holdout is None or sorted(known) != sorted(row_hash(example, salt) for example in holdout)
