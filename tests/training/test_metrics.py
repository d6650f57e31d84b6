"""metrics.jsonl as a real Trainer writes it: straight through, killed, resumed."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from lowmem_npo.training.metrics import MetricsWriter, read_metrics


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, y):
        return {"loss": ((self.slope * x - y) ** 2).mean()}


class Killed(RuntimeError):
    pass


class KillAt(TrainerCallback):
    """Dies in the middle of a step, after the log and before the checkpoint of the step before have been written."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def trainer(folder, *callbacks, steps=10, **settings) -> Trainer:
    data = [{"x": torch.tensor([float(i)]), "y": torch.tensor([2.0 * i])} for i in range(8)]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, logging_steps=1, save_steps=4,
        use_cpu=True, report_to="none", disable_tqdm=True, **settings,
    )  # fmt: skip
    return Trainer(Line(), arguments, train_dataset=data, callbacks=[MetricsWriter(folder / "m.jsonl"), *callbacks])


def steps(folder) -> list[int]:
    return [line["step"] for line in read_metrics(folder / "m.jsonl")]


def test_every_step_has_one_line_with_all_its_numbers(tmp_path):
    trainer(tmp_path).train()
    lines = read_metrics(tmp_path / "m.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert all({"step", "epoch", "loss", "learning_rate", "grad_norm"} <= set(line) for line in lines)
    assert lines[-1]["epoch"] == 2.5 and "train_runtime" in lines[-1]  # the run's summary shares the last step's line
    assert "train_runtime" not in lines[-2]


def test_a_resumed_run_repeats_no_step(tmp_path):
    with pytest.raises(Killed):
        trainer(tmp_path, KillAt(7)).train()
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7]  # the checkpoint is of step 4
    trainer(tmp_path).train(resume_from_checkpoint=True)
    assert steps(tmp_path) == list(range(1, 11))

    whole = tmp_path / "whole"
    trainer(whole).train()
    losses = [[line["loss"] for line in read_metrics(folder / "m.jsonl")] for folder in (tmp_path, whole)]
    assert losses[0] == losses[1]


def test_appending_alone_would_repeat_steps(tmp_path, monkeypatch):
    """The test above catches a writer that only appends."""
    monkeypatch.setattr(MetricsWriter, "on_train_begin", lambda self, *args, **kwargs: self.path.touch())
    with pytest.raises(Killed):
        trainer(tmp_path, KillAt(7)).train()
    trainer(tmp_path).train(resume_from_checkpoint=True)
    assert steps(tmp_path) != list(range(1, 11))


def test_a_longer_run_continues_after_the_shorter_one(tmp_path):
    trainer(tmp_path, steps=4).train()
    trainer(tmp_path, steps=6).train(resume_from_checkpoint=True)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_a_torn_last_line_is_dropped(tmp_path):
    with pytest.raises(Killed):
        trainer(tmp_path, KillAt(6)).train()
    with (tmp_path / "m.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    trainer(tmp_path).train(resume_from_checkpoint=True)
    assert steps(tmp_path) == list(range(1, 11))


def test_a_loss_that_blows_up_is_still_json(tmp_path):
    trainer(tmp_path, steps=8, learning_rate=1e38, optim="sgd", max_grad_norm=0.0, logging_nan_inf_filter=False).train()
    raw = (tmp_path / "m.jsonl").read_text()
    assert "NaN" not in raw and "Infinity" not in raw
    assert json.loads(raw.splitlines()[-1])["loss"] is None


@pytest.mark.parametrize("line", ["{", "3", '{"loss": 1}', '{"step": "x"}', "[" * 100_000, "\x00\ufffd", ""])
def test_a_damaged_line_is_named_and_costs_only_itself(line, tmp_path, capsys):
    with pytest.raises(Killed):
        trainer(tmp_path, KillAt(6)).train()
    lines = (tmp_path / "m.jsonl").read_text().splitlines()
    (tmp_path / "m.jsonl").write_text("\n".join([lines[0], line, *lines[2:]]) + "\n")
    with pytest.raises(ValueError, match="m.jsonl, line 2 is not one of metrics"):
        read_metrics(tmp_path / "m.jsonl")
    trainer(tmp_path).train(resume_from_checkpoint=True)
    assert "m.jsonl is damaged: of 6 lines 1 are lost." in capsys.readouterr().out
    assert steps(tmp_path) == [1, *range(3, 11)]


def test_lines_that_cannot_be_written_do_not_end_training(tmp_path, capsys):
    """The disk is full, or the file has become something else."""
    (tmp_path / "m.jsonl").mkdir()
    done = trainer(tmp_path, steps=3)
    done.train()
    assert done.state.global_step == 3
    assert capsys.readouterr().out.count("m.jsonl cannot be written") == 1


def test_no_file_no_lines(tmp_path):
    assert read_metrics(tmp_path / "none.jsonl") == []
