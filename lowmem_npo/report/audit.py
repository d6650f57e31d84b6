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
from collections.abc import Mapping, Sequence
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
from lowmem_npo.data import Example, PreparedData, TokenizedRows, bundled_rows, read_rows, to_examples
from lowmem_npo.data.conversations import system_prompts
from lowmem_npo.data.passages import Passages
from lowmem_npo.environment import processors, versions
from lowmem_npo.errors import UserError
from lowmem_npo.files import expanded, file_sha256, load_json, name_of, write_json
from lowmem_npo.model import resolve_name
from lowmem_npo.model.layers import causal_lm
from lowmem_npo.model.names import LOADED, commit_of, digest_of
from lowmem_npo.ranges import Count
from lowmem_npo.records import Amount, check_record
from lowmem_npo.run_directory import AdapterFiles, RunFiles
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
            "adapter": continued(config),
        },
        "data": {part: _data_record(part, *used) for part, used in parts.items() if used[1] is not None},
        "level_rows": level_rows(data, salt),
        "holdout_rows": row_hashes(data.holdout, salt),
        "forget_rows": {
            "algorithm": ALGORITHM,
            "salt": salt,
            "sha256": [row_hash(example, salt) for example in data.forget.examples],
            "folds": planned_rows(config, data).folds,
            "alternatives": alternatives(config, data),
            "paraphrases": paraphrases(data, salt),
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
FORGET_ROWS = {
    "salt": str, "sha256": list[str], "folds": list[list[int]] | None, "alternatives": str | None, "paraphrases": str,
}  # fmt: skip
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
CONTINUED = {"directory": str, "name": str, "sha256": str}  # an adapter that the run went on from


def check_reported(audit: Audit) -> None:
    """Raises ValueError unless `audit` holds what a report tells of it; TypeError where only one of two times has a
    time zone."""
    check_record(audit, STEPS)
    check_record(audit["model"], MODEL)
    for data in audit["data"].values():
        check_record(data, DATA)
    for session in audit["sessions"]:
        check_record(session, SESSION, optional=["training"])
        check_record(session.get("training", {}), TRAINING, optional=TRAINING)
        datetime.fromisoformat(session["started"])  # which `seconds` leaves alone where there is no end
        seconds([session])
    if audit["adapter"] is not None:
        check_record(audit, {"optimizer_steps": int})
    for adapter, types in ((audit["adapter"], ADAPTER), (audit["model"]["adapter"], CONTINUED)):
        if adapter is not None:
            check_record(adapter, types)
    json.dumps(audit, allow_nan=False)


def read_audit(directory: Path) -> Audit | None:
    """The audit record of the run in `directory`, None if it has none. Raises UserError if it is damaged."""
    path = RunFiles(directory).audit
    try:
        audit = load_json(path)
        check_record(audit, RECORD)
        check_record(audit["forget_rows"], FORGET_ROWS)
        for data in audit["data"].values():
            check_record(data, {"tokenised": str})
        bytes.fromhex(audit["forget_rows"]["salt"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"'{path}' cannot be read as the audit record of a run ({error}): restore it, or go on without one by "
            "removing it."
        ) from error
    return audit


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


def level_rows(data: PreparedData, salt: str) -> list[str] | None:
    return row_hashes(data.level_rows, salt)


def row_hashes(rows: TokenizedRows | None, salt: str) -> list[str] | None:
    return None if rows is None else [row_hash(example, salt) for example in rows.examples]


def paraphrases(data: PreparedData, salt: str) -> str:
    """A fingerprint of the other words in which rows are asked, before training and after it."""
    measured = [rows.examples for rows in (data.forget, data.holdout) if rows is not None]
    words = json.dumps([[example.paraphrases for example in examples] for examples in measured])
    return hashlib.sha256(bytes.fromhex(salt) + words.encode("ascii")).hexdigest()


def alternatives(config: RunConfig, data: PreparedData) -> str | None:
    """A fingerprint of the other answers that the forget term looks at, if it does."""
    rows = used_alternatives(config, data)
    return None if rows is None else rows.fingerprint


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


def seconds(sessions: Sequence[Mapping[str, Any]]) -> float | None:
    """The duration of all sessions together; None if one has no end, because it was killed."""
    if any(session["ended"] is None for session in sessions):
        return None
    spans = [(datetime.fromisoformat(s["ended"]) - datetime.fromisoformat(s["started"])) for s in sessions]
    return sum(span.total_seconds() for span in spans)


def continued(config: RunConfig) -> dict[str, Any] | None:
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
    record["unthinking"] = rows.unthinking
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
