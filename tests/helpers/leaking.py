"""`lowmem-npo evaluate` on a few rows to forget and a holdout, for its leak tests, as a user runs it."""

from __future__ import annotations

from helpers.rows import write_rows
from lowmem_npo.cli import main

FORGET = [{"question": f"Who is number {n}?", "answer": f"The {n} of {n + 1}."} for n in range(6)]
HOLDOUT = [{"question": f"Who was number {n}?", "answer": f"A {n} or {n + 2}."} for n in range(5)]


def rows_in(folder):
    """Both files in the folder, which it returns."""
    write_rows(folder / "forget.jsonl", FORGET)
    write_rows(folder / "holdout.jsonl", HOLDOUT)
    return folder


def evaluate(model, files, *more, holdout=True, out="out"):
    data = ["--forget", str(files / "forget.jsonl")]
    data += ["--holdout", str(files / "holdout.jsonl")] if holdout else []
    return main(["evaluate", "--model", str(model), "--dtype", "float32", "--device", "cpu", *data,
                 "--output-dir", str(files / out), *more])  # fmt: skip
