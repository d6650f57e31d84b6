"""The rows of `quality.py --real`: a part of TOFU or of LUME to forget, a part to retain, and a part never taught.

TOFU: three authors of forget05 to forget, six of retain95 to retain, three others of forget05 held out, with the
paraphrased and wrong answers that its scores need. LUME: whole documents of each of its three tasks, a third of the
rows each, the holdout from the files of its validation split. Each row gets the columns `subject`, the author or the
document, and `refusal`, which DPO prefers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from lowmem_npo.config import ModelConfig, RunConfig
from lowmem_npo.data import read_rows
from lowmem_npo.errors import UserError

Kind = Literal["tofu", "lume"]
KINDS: tuple[Kind, ...] = ("tofu", "lume")
SIZES = {"forget": 60, "retain": 120, "holdout": 60}
REFUSAL = RunConfig(ModelConfig("any")).data.refusal
ROWS_PER_AUTHOR = 20  # of TOFU, one author after another
TASKS = ("Task1", "Task2", "Task3")
SUFFIX = 3  # characters of "sc1" or "qa0", which follow the document's name in an id of LUME
UTILITY = {"real_authors": "tofu/real_authors_perturbed.json", "world_facts": "tofu/world_facts_perturbed.json"}
Row = dict[str, Any]


def write_rows(kind: Kind, data: Path, folder: Path, sizes: dict[str, int] = SIZES) -> dict[str, Path]:
    """Writes the sets of `kind` into `folder`; set -> its file.

    data: the folder that holds lume/ and tofu/. Raises UserError where a file is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.jsonl" for name in sizes}
    for name, rows in SELECTIONS[kind](data, sizes).items():
        lines = [json.dumps({**row, "refusal": REFUSAL}) for row in rows]
        paths[name].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


def tofu_rows(data: Path, sizes: dict[str, int]) -> dict[str, list[Row]]:
    forget = _by_author(_read(data / "tofu" / "forget05_perturbed.json"))
    retain = _by_author(_read(data / "tofu" / "retain_perturbed.json"))
    return {
        "forget": forget[: sizes["forget"]],
        "retain": retain[: sizes["retain"]],
        "holdout": forget[len(forget) - sizes["holdout"] :],  # of the same file: nearest to those to forget
    }


def lume_rows(data: Path, sizes: dict[str, int]) -> dict[str, list[Row]]:
    files = {"forget": "forget_train", "retain": "retain_train", "holdout": "retain_validation"}
    return {name: _of_each_task(_read(data / "lume" / f"{files[name]}.jsonl"), sizes[name]) for name in files}


def _by_author(rows: list[Row]) -> list[Row]:
    return [{**row, "subject": f"author {place // ROWS_PER_AUTHOR + 1}"} for place, row in enumerate(rows)]


def _of_each_task(rows: list[Row], size: int) -> list[Row]:
    """The first documents of each task, whole but for the last one."""
    return [
        {**row, "subject": row["id"][:-SUFFIX].strip('"')}
        for task in TASKS
        for row in [row for row in rows if row["task"] == task][: size // len(TASKS)]
    ]


def _read(path: Path) -> list[Row]:
    if not path.is_file():
        raise UserError(f"--real: there is no {path}; --data names the folder that holds lume/ and tofu/.")
    return read_rows(str(path)).rows


SELECTIONS: dict[Kind, Callable[[Path, dict[str, int]], dict[str, list[Row]]]] = {"tofu": tofu_rows, "lume": lume_rows}
