"""audit.json: what went into a run and when, so that others can check it. It contains no text of any row.

A row is recorded as SHA-256(salt + its canonical form), with one salt per run. Whoever holds a row can show that it was
among the forgotten ones (`find_rows`); anybody else would have to guess all of it. A check needs the salt, so it is
stored with the hashes; the price is that very short or stereotyped rows can be guessed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, cast

from annotated_types import MinLen
from peft import PeftModel
from torch import Tensor
from transformers import AutoTokenizer

from lowmem_npo.config import DataConfig, RunConfig
from lowmem_npo.console import Say
from lowmem_npo.data import Example, PreparedData, TokenizedRows, bundled_rows, read_rows, to_examples
from lowmem_npo.data.conversations import system_prompts
from lowmem_npo.data.passages import Passages
from lowmem_npo.environment import processors, versions
from lowmem_npo.errors import UserError
from lowmem_npo.files import expanded, file_sha256, load_json, name_of, write_json
from lowmem_npo.model import resolve_name
from lowmem_npo.model.layers import causal_lm
from lowmem_npo.model.names import LOADED, Base, commit_of, digest_of
from lowmem_npo.model.saved_adapter import check_base, resolve_base
from lowmem_npo.ranges import Count
from lowmem_npo.records import Amount, check_record
from lowmem_npo.run_directory import AdapterFiles, RunFiles, from_here, run_of_adapter
from lowmem_npo.training.reference.identity import weights_fingerprint
from lowmem_npo.training.training_rows import planned_rows, used_alternatives

ALGORITHM = (
    "SHA-256 of the salt's bytes followed by the row as ASCII JSON with sorted keys and no spaces: "
    '{"answer":...,"prompt":...} (prompt null for plain text), or {"messages":[...]} for conversations'
)
FINGERPRINT = (
    "hash of the frozen weights as they were in memory: each tensor's name, shape, type, the sum of all its 32-bit "
    "words and 256 of them; it detects other weights, but does not hash every bit"
)

Audit = dict[str, Any]


def row_hash(example: Example, salt: str) -> str:
    """The row's hash; `salt` is hexadecimal."""
    if example.messages is not None:
        content: dict[str, Any] = {"messages": list(example.messages)}
    else:
        content = {"prompt": example.prompt, "answer": example.answer}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(bytes.fromhex(salt) + canonical.encode("ascii")).hexdigest()


def begin_audit(directory: Path, config: RunConfig, data: PreparedData, model: PeftModel) -> None:
    """Writes what is known when training starts; a resumed run keeps its salt and adds a session."""
    known = read_audit(directory) if config.output.resume else None
    salt = known["forget_rows"]["salt"] if known else secrets.token_hex(16)
    base, loaded = causal_lm(model), resolve_name(config.model.model, config.model.revision)
    parts = {part: (getattr(config.data, part), getattr(data, part)) for part in ("forget", "retain", "holdout")}
    audit = {
        "configuration": config.flat(),
        "seed": config.training.seed,
        "model": {
            "name": config.model.model,
            "loaded": loaded,
            "directory": name_of(loaded) if expanded(loaded).is_dir() else None,  # what "." is called is known here
            "revision": config.model.revision,
            "commit": commit_of(loaded, config.model.revision),
            "files": digest_of(loaded, patterns=LOADED) if expanded(loaded).is_dir() else None,  # a commit names them
            "class": type(base).__name__,
            "vocabulary": cast(Tensor, base.get_input_embeddings().weight).shape[0],
            "weights": "4-bit NF4" if config.model.qlora else config.model.dtype,
            "weights_fingerprint": weights_fingerprint(model),
            "weights_fingerprint_is": FINGERPRINT,
            "adapter": _continued(config),
        },
        "data": {part: _data_record(part, *used) for part, used in parts.items() if used[1] is not None},
        "level_rows": _level_rows(data, salt),
        "holdout_rows": _hashes(data.holdout, salt),
        "forget_rows": {
            "algorithm": ALGORITHM,
            "salt": salt,
            "sha256": [row_hash(example, salt) for example in data.forget.examples],
            "folds": planned_rows(config, data).folds,
            "alternatives": _alternatives(config, data),
            "paraphrases": _paraphrases(data, salt),
        },
        "sessions": [*(known["sessions"] if known else []), _session()],
        "adapter": None,
        "optimizer_steps": None,
    }
    _write(directory, audit)


def finish_audit(
    directory: Path, optimizer_steps: int, adapter_step: int, training: Mapping[str, Any] | None = None
) -> None:
    """Adds the end of the session and the hash of the adapter, which must be saved already.

    adapter_step: the step whose adapter was kept; under --stop-when that need not be the last.
    training: what its steps took, beside what was predicted.
    """
    weights, audit = RunFiles(directory).weights, read_audit(directory)
    if audit is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(RunFiles(directory).audit))
    session = audit["sessions"][-1]
    session["ended"] = _now()
    session["training"] = dict(training or {})
    session["last_step"] = audit["optimizer_steps"] = optimizer_steps
    audit["adapter"] = {
        "file": weights.name,
        "sha256": file_sha256(weights),
        "bytes": weights.stat().st_size,
        "of_step": adapter_step,
    }
    _write(directory, audit)


RECORD = {
    "configuration": dict[str, Any], "model": dict[str, Any], "data": dict[str, dict[str, Any]],
    "forget_rows": dict[str, Any], "sessions": list[dict[str, Any]], "adapter": dict[str, Any] | None,
    "level_rows": list[str] | None, "holdout_rows": list[str] | None,
}  # fmt: skip
FORGET_ROWS = {"salt": str, "sha256": list[str]}
# What a report tells of it.
STEPS = {"seed": int, "sessions": Annotated[list[Any], MinLen(1)], "optimizer_steps": int | None}
MODEL = {
    "name": str, "loaded": str, "directory": str | None, "revision": str | None, "commit": str | None, "class": str,
    "vocabulary": Count, "weights": str, "weights_fingerprint": str, "weights_fingerprint_is": str,
    "adapter": dict[str, str] | None, "files": str | None,
}  # fmt: skip
DATA = {"source": str, "rows": Count, "tokenised": str, "sha256": str | None}
SESSION = {
    "started": str, "ended": str | None, "processors": list[str], "versions": dict[str, str | None],
    "training": dict[str, Any],
}  # fmt: skip
TRAINING = dict.fromkeys(
    ("seconds_per_step", "predicted_seconds_per_step", "peak_bytes", "predicted_peak_bytes", "micro_batch_parts"),
    Amount | None,
)
ADAPTER = {"file": str, "sha256": str, "bytes": int}
CONTINUED = {"directory": str, "sha256": str}  # an adapter that the run went on from


def check_reported(audit: Audit) -> None:
    """Raises ValueError unless `audit` holds what a report tells of it; TypeError where only one of two times has a
    time zone."""
    check_record(audit, STEPS)
    check_record(audit["model"], MODEL, optional=["adapter", "directory", "files"])
    for data in audit["data"].values():
        check_record(data, DATA)
    for session in audit["sessions"]:
        check_record(session, SESSION, optional=["training"])
        check_record(session.get("training", {}), TRAINING, optional=TRAINING)
        datetime.fromisoformat(session["started"])  # which `seconds` leaves alone where there is no end
        seconds([session])
    if audit["adapter"] is not None:
        check_record(audit, {"optimizer_steps": int})
    for adapter, types in ((audit["adapter"], ADAPTER), (audit["model"].get("adapter"), CONTINUED)):
        if adapter is not None:
            check_record(adapter, types)
    json.dumps(audit, allow_nan=False)


def read_audit(directory: Path) -> Audit | None:
    """The audit record of the run in `directory`, None if it has none. Raises UserError if it is damaged."""
    path = RunFiles(directory).audit
    try:
        audit = load_json(path)
        check_record(audit, RECORD, optional=["level_rows", "holdout_rows"])
        check_record(audit["forget_rows"], FORGET_ROWS)
        bytes.fromhex(audit["forget_rows"]["salt"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"'{path}' cannot be read as the audit record of a run ({error}): restore it, or go on without one by "
            "removing it."
        ) from error
    return audit


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


def recorded_adapter(directory: Path) -> str | None:
    """The SHA-256 of the weights that the run in `directory` wrote; None where it has not, or that is not recorded.
    Raises UserError if its audit record is damaged."""
    return ((read_audit(directory) or {}).get("adapter") or {}).get("sha256")


def recorded_prompts(directory: Path) -> int:
    """How many different system prompts the rows brought that the run in `directory` forgot; 0 where that is not
    recorded."""
    try:
        number = ((read_audit(directory) or {}).get("data") or {}).get("forget", {}).get("system_prompts")
    except UserError:
        return 0
    return number if isinstance(number, int) else 0


def recorded_schema(directory: Path) -> str | None:
    """The schema of the rows that the run in `directory` forgot, by which their questions were written; None where they
    are texts, or that is not recorded."""
    try:
        return ((read_audit(directory) or {}).get("data") or {}).get("forget", {}).get("schema")
    except UserError:
        return None


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
        if then is not None and then != now:
            raise UserError(f"--resume: the {what} have changed since the run in '{directory}' began; start anew.")


def _compared(audit: Audit, config: RunConfig, data: PreparedData) -> Iterator[tuple[str, Any, Any]]:
    """What a run goes on with: its name, as the audit record has it (None where an earlier version recorded nothing),
    and as it is now. Texts and answers that the model is yet to write are left out."""
    record, options = audit["forget_rows"], config.data
    yield "forget rows", record["sha256"], [row_hash(example, record["salt"]) for example in data.forget.examples]
    for part in ("forget", "retain", "holdout"):
        unread = part == "retain" and (data.retain_is_unwritten or not config.objective.needs_retain)
        if (rows := getattr(data, part)) is not None and not unread:
            yield f"{part} rows", audit["data"].get(part, {}).get("tokenised"), rows.fingerprint
    yield "holdout rows that set levels", audit.get("level_rows"), _level_rows(data, record["salt"])
    yield "paraphrases", record.get("paraphrases"), _paraphrases(data, record["salt"])
    by = "" if options.group_column is None else f", by --group-column {options.group_column}"
    yield f"folds of the forget rows (--layered{by})", record.get("folds"), planned_rows(config, data).folds
    if not data.alternatives_are_unwritten:
        column = options.alternative_column
        source = f"--alternatives {options.alternatives}" if column is None else f"--alternative-column {column}"
        yield f"other answers to the forget rows ({source})", record.get("alternatives"), _alternatives(config, data)


def _level_rows(data: PreparedData, salt: str) -> list[str] | None:
    return _hashes(data.level_rows, salt)


def _hashes(rows: TokenizedRows | None, salt: str) -> list[str] | None:
    return None if rows is None else [row_hash(example, salt) for example in rows.examples]


def _paraphrases(data: PreparedData, salt: str) -> str:
    """A fingerprint of the other words in which rows are asked, before training and after it."""
    measured = [rows.examples for rows in (data.forget, data.holdout) if rows is not None]
    words = json.dumps([[example.paraphrases for example in examples] for examples in measured])
    return hashlib.sha256(bytes.fromhex(salt) + words.encode("ascii")).hexdigest()


def _alternatives(config: RunConfig, data: PreparedData) -> str | None:
    """A fingerprint of the other answers that the forget term looks at, if it does."""
    rows = used_alternatives(config, data)
    return None if rows is None else rows.fingerprint


def check_same_adapter(directory: Path, config: RunConfig) -> None:
    """Raises UserError if the run in `directory`, which is to be resumed, went on from another adapter."""
    audit, now = read_audit(directory), _continued(config)
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


def find_rows(directory: Path, source: str) -> list[tuple[str, int | None]]:
    """Where each row of `source` is, and its place (from 1) among the forget rows of the run in `directory`, or None.
    `source` is read as the run read its forget rows.

    Raises UserError if there is no audit record, or if `source` cannot be read.
    """
    audit = read_audit(directory)
    if audit is None:
        raise UserError(
            f"There is no audit record in '{directory}' (no audit.json): give the directory of a training run."
        )
    configuration, known = audit["configuration"], audit["forget_rows"]
    columns = {}
    if configuration["forget"] is not None:  # the columns of the bundled rows are known
        columns = {name: configuration[name] for name in ("prompt_column", "answer_column")}
    places = {digest: place for place, digest in reversed(list(enumerate(known["sha256"], 1)))}
    data = DataConfig(**{f.name: configuration[f.name] for f in fields(DataConfig) if f.name in configuration})
    passages = Passages.of(data, AutoTokenizer.from_pretrained(directory))  # the run has saved its tokenizer
    rows = read_rows(source, passages=passages, columns=columns.values())
    examples = to_examples(rows, **columns, or_recognised=True)
    return [(example.where, places.get(row_hash(example, known["salt"]))) for example in examples]


def are_others(directory: Path, forget: Sequence[Example]) -> bool:
    """Whether most of these forget rows are known not to be those of the run in `directory`."""
    if (audit := read_audit(directory)) is None:
        return False
    known, salt = set(audit["forget_rows"]["sha256"]), audit["forget_rows"]["salt"]
    return 2 * sum(row_hash(example, salt) in known for example in forget) < len(forget)


def is_other_holdout(directory: Path, holdout: Sequence[Example] | None, source: str | None) -> bool:
    """Whether these holdout rows, of which `judging` has left out what set levels, are known not to be those that the
    run in `directory` was judged by; without any, whether it had some. source: what names them.

    A few other rows make another holdout, and so do fewer: either may be easier. An earlier version recorded no rows,
    and of a holdout that was one file the hash of that.
    """
    if (audit := read_audit(directory)) is None or (record := audit["data"].get("holdout")) is None:
        return False
    if holdout is None:
        return True
    if (known := audit.get("holdout_rows")) is not None:
        return sorted(known) != sorted(row_hash(example, audit["forget_rows"]["salt"]) for example in holdout)
    known_file = record.get("sha256")
    is_file = source is not None and os.path.isfile(expanded(source))
    return bool(known_file and source is not None and is_file and file_sha256(expanded(source)) != known_file)


def seconds(sessions: Sequence[Mapping[str, Any]]) -> float | None:
    """The duration of all sessions together; None if one has no end, because it was killed."""
    if any(session["ended"] is None for session in sessions):
        return None
    spans = [(datetime.fromisoformat(s["ended"]) - datetime.fromisoformat(s["started"])) for s in sessions]
    return sum(span.total_seconds() for span in spans)


def _continued(config: RunConfig) -> dict[str, Any] | None:
    """The adapter that the run goes on from, as it is now."""
    if config.adapter.adapter is None:
        return None
    files = AdapterFiles(expanded(config.adapter.adapter))
    return {"directory": str(files.path), "name": name_of(files.path), "sha256": file_sha256(files.weights)}


def _data_record(part: str, source: str | None, rows: TokenizedRows) -> dict[str, Any]:
    schema = next((example.schema for example in rows.examples if not example.is_passage), None)
    record = {"source": source, "rows": len(rows), "schema": schema}
    record |= {"answer_tokens": rows.num_labels, "tokenised": rows.fingerprint}
    record["system_prompts"] = len(system_prompts(rows.examples))  # that the rows bring
    if source is None:
        bundled = (resources.files("lowmem_npo.data.bundled") / f"{part}.jsonl").read_bytes()
        sha256 = hashlib.sha256(bundled).hexdigest()
        return {**record, "source": bundled_rows(part, limit=1).name, "sha256": sha256}
    path = expanded(source)
    return {**record, "sha256": file_sha256(path) if os.path.isfile(path) else None}  # of a hub name, or several files


def _session() -> dict[str, Any]:
    return {"started": _now(), "ended": None, "last_step": None, "processors": processors(), "versions": versions()}


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _write(directory: Path, audit: Audit) -> None:
    write_json(RunFiles(directory).audit, audit, ensure_ascii=False)
