"""`lowmem-npo evaluate` on small files of LUME's form, as a user runs it."""

from __future__ import annotations

import json

from helpers.rows import write_rows
from lowmem_npo.cli import main

NAMES = ("Ada", "Bo", "Cy")


def lume_file(path, who):
    """One completion and one question of every task."""
    rows = []
    for task, name in zip(("Task1", "Task2", "Task3"), NAMES, strict=True):
        rows.append({"id": f"{name}sc1", "input": f"{who} {name} went", "output": "o to the o d sea", "task": task})
        rows.append({"id": f"{name}qa0", "input": f"Where is {who} {name}?", "output": "Rome", "task": task})
    return write_rows(path, rows)


def lume_files(folder):
    """A forget and a retain set of LUME's, and its documents of members and others; returns the folder."""
    lume_file(folder / "forget.jsonl", "Miss")
    lume_file(folder / "retain.jsonl", "Mister")
    write_rows(folder / "members.jsonl", [{"id": str(n), "document": f"A member named {n}"} for n in range(4)])
    write_rows(folder / "others.jsonl", [{"id": str(n), "document": f"{n}{n} somebody else"} for n in range(3)])
    return folder


def evaluate(files, model, *more, sets=("forget", "retain"), output="out"):
    data = [word for name in sets for word in (f"--{name}", str(files / f"{name}.jsonl"))]
    return main(["evaluate", "--model", str(model), "--dtype", "float32", "--device", "cpu", *data,
                 "--output-dir", str(files / output), *more])  # fmt: skip


def result(files, output="out", name="evaluation.json"):
    return json.loads((files / output / name).read_text())


def fails(capsys, code, *messages):
    out, err = capsys.readouterr()
    assert code == 2, out
    line = err.strip().splitlines()[-1]
    assert line.startswith("lowmem-npo evaluate: ") and "Traceback" not in err
    assert all(message in line for message in messages), line
