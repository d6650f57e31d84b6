"""The directory of an evaluation: what lies where, and which evaluation may go on there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.scoring.journal import Journal
from lowmem_npo.evaluation.settings import EvaluationConfig
from lowmem_npo.files import file_sha256, write_atomically

# A resumed evaluation may measure more; what would change a figure must stay as it was.
MAY_CHANGE = (
    "output_dir", "resume", "batch_size", "device", "before", "lm_eval", "lm_eval_path", "any_base", "retained_log",
    "leaks",
)  # fmt: skip
MAY_BE_ADDED = ("forget", "retain", "members", "nonmembers", "holdout", "real_authors", "world_facts")


class EvaluationDirectory:
    """`path` holds settings.json, measured.jsonl (as it comes), evaluation.json, rows.jsonl, evaluation_results.jsonl.

    digests: a hash of everything that is read (data, adapter), so that no evaluation goes on with something else.
    """

    def __init__(self, config: EvaluationConfig, digests: Mapping[str, str]) -> None:
        self.config, self.digests, self.path = config, dict(digests), config.path
        self._settings = self.path / "settings.json"

    def begin(self) -> Journal:
        """From here on the directory is this evaluation's; the journal knows what it had measured.

        Raises UserError where another evaluation or other files stand there.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--output-dir '{self.path}' is a file: choose a directory.")
        if self.config.resume:
            self._check_resume()
        elif self._settings.exists():
            raise UserError(
                f"--output-dir '{self.path}' holds an evaluation: continue it with --resume, "
                "choose another directory, or remove it."
            )
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise UserError(f"--output-dir '{self.path}' holds other files: choose an empty or a new directory.")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._write("settings.json", json.dumps(self._now(), indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"--output-dir '{self.path}' cannot be written: {error.strerror}.") from error
        return Journal(self.path / "measured.jsonl")

    def _now(self) -> dict[str, Any]:
        return {**json.loads(json.dumps(asdict(self.config))), "digests": self.digests}

    def _check_resume(self) -> None:
        if not self._settings.exists():
            raise UserError(f"--resume: there is no evaluation in '{self.path}'; start it without --resume.")
        began, now = json.loads(self._settings.read_text(encoding="utf-8")), self._now()
        for name, value in began.pop("digests").items():
            if name in self.digests and self.digests[name] != value:
                raise UserError(f"--resume: {name} has changed since '{self.path}' was begun; start anew.")
        changed = [
            f"{name} was {value!r}, is {now.get(name)!r}"
            for name, value in began.items()
            if value != now.get(name) and name not in MAY_CHANGE and not (value is None and name in MAY_BE_ADDED)
        ]
        if changed:
            raise UserError(
                f"--resume: the evaluation in '{self.path}' began with other settings ({'; '.join(changed)}): "
                "use those, or start anew."
            )

    def save(self, result: Mapping[str, Any], rows: Iterable[Mapping[str, Any]], official: Mapping | None) -> None:
        """evaluation.json, the scored rows, and the official result file where there are LUME scores."""
        self._write("rows.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        if official is not None:
            self._write("evaluation_results.jsonl", json.dumps(official) + "\n")
        self._write("evaluation.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")

    def _write(self, name: str, text: str) -> None:
        write_atomically(self.path / name, text)


def digest(content: Any) -> str:
    """A hash of data that JSON can hold, or of a file's bytes."""
    if isinstance(content, Path):
        return file_sha256(content)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
