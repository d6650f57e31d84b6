"""Long runs take no more memory and no more file handles than short ones."""

from __future__ import annotations

import gc
import os

import psutil
import pytest
import torch
from helpers.dense_step import make_trainer, random_rows, word_tokenizer
from helpers.tiny_models import tiny_model
from transformers import TrainerCallback

from lowmem_npo.evaluation.answers import evaluate_answers

MIB = 2**20


class Watch(TrainerCallback):
    """Memory and handles of the process, twelve times in so many steps."""

    def __init__(self, steps: int) -> None:
        self.every = steps // 12
        self.resident: list[int] = []
        self.handles: list[int] = []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            self.look()

    def look(self) -> None:
        gc.collect()
        process = psutil.Process()
        self.resident.append(process.memory_info().rss)
        self.handles.append(process.num_fds())


def grown(watch: Watch) -> float:
    """MiB by which the last third is above the third before it: allocators are warm by then."""
    third = len(watch.resident) // 3
    later, earlier = watch.resident[-third:], watch.resident[-2 * third : -third]
    return (sum(later) - sum(earlier)) / third / MIB


@pytest.mark.parametrize("reference", ["live", "cached"])
def test_steps(reference, tmp_path, full, capsys):
    """With some checkpoints, and every step logged."""
    steps = 2000 if full else 96
    watch = Watch(steps)
    settings = {"reference_dir": str(tmp_path / "reference")} if reference == "cached" else {}
    trainer = make_trainer(
        tiny_model("olmo"), tmp_path / "run", random_rows(8, seed=1), random_rows(8, seed=2), max_steps=steps,
        per_device_train_batch_size=2, save_strategy="steps", save_steps=steps // 8, save_total_limit=2, **settings,
    )  # fmt: skip
    trainer.add_callback(watch)
    trainer.train()
    with capsys.disabled():
        print(f"{steps} steps, {reference} reference: {grown(watch):+.2f} MiB, handles {set(watch.handles)}")
    assert max(watch.handles[1:]) <= watch.handles[1] and grown(watch) < 4


def test_rows(tmp_path, full, capsys):
    """Generated and scored, again and again."""
    model, tokenizer, watch = tiny_model("olmo").eval(), word_tokenizer(), Watch(12)
    times, rows = 12, random_rows(250 if full else 16, seed=1)
    for _ in range(times):
        evaluate_answers(model, tokenizer, rows, progress=False)
        watch.look()
    with capsys.disabled():
        print(f"{len(rows) * times} rows evaluated: {grown(watch):+.2f} MiB, handles {set(watch.handles)}")
    assert max(watch.handles[1:]) <= watch.handles[1] and grown(watch) < 4


def test_what_is_kept_would_be_noticed(tmp_path):
    """8 MiB a step, which no memory that was freed before has room for."""
    kept, watch = [], Watch(48)

    class Keeps(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            kept.append((torch.ones(2 * 2**20), os.open(os.devnull, os.O_RDONLY)))

    trainer = make_trainer(tiny_model("olmo"), tmp_path, random_rows(2, seed=1), random_rows(2, seed=2), max_steps=48)
    trainer.add_callback(Keeps())
    trainer.add_callback(watch)
    trainer.train()
    for _, handle in kept:
        os.close(handle)
    assert grown(watch) > 4 and watch.handles[-1] > watch.handles[1]
