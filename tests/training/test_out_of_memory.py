"""A step for which there is no memory is repeated in smaller passes, to the same gradient. The GPU is simulated: passes
of more than so many tokens fail as they do there."""

from __future__ import annotations

import contextlib
from functools import partial

import pytest
import torch
from helpers.dense_step import dense_step, make_trainer, random_rows, relative_error
from helpers.processes import in_processes
from helpers.small_gpu import SmallGPU
from helpers.tiny_models import tiny_model
from transformers import TrainerCallback

from lowmem_npo.cli import main
from lowmem_npo.config import AdapterConfig, MemoryConfig
from lowmem_npo.memory.switches import apply_switches
from lowmem_npo.model import attach_lora
from lowmem_npo.run_directory import RunFiles
from lowmem_npo.training.checkpoints import resume_point
from lowmem_npo.training.metrics import read_metrics
from lowmem_npo.training.passes import Passes

FORGET, RETAIN, OTHERS = (random_rows(8, seed=seed) for seed in (1, 2, 3))


def gradients_of(trainer, checkpoint: str | None = None) -> list[dict]:
    """Those of every step, after the checkpoint, as the optimiser has them."""
    steps: list[dict] = []

    class Recorder(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            steps.append({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})

    trainer.add_callback(Recorder())
    trainer.train(resume_from_checkpoint=checkpoint)
    return steps


def dropping(folder, **settings):
    """A trainer whose adapter has dropout, from the same random state each time."""
    torch.manual_seed(5)
    model = attach_lora(tiny_model("olmo"), AdapterConfig(lora_r=3, lora_dropout=0.5))
    return make_trainer(model, folder, FORGET, RETAIN, max_steps=3, learning_rate=1e-2, **settings)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("micro_batches, first", [(1, 1), (2, 3)])
def test_the_repeated_step_has_the_dense_float64_gradient(where, micro_batches, first, tmp_path, capsys):
    """The retain pass fails, of the last micro-batch: what the step has added by then must not count twice."""
    split = {"per_device_train_batch_size": 8 // micro_batches, "gradient_accumulation_steps": micro_batches}
    trainer = make_trainer(tiny_model("olmo"), tmp_path, FORGET, RETAIN, max_steps=2, learning_rate=0.0, **split)
    loss, expected = dense_step(trainer, FORGET, RETAIN)
    gpu = SmallGPU(trainer, 64 // micro_batches, where, first)
    steps = gradients_of(trainer)
    assert [relative_error(step, expected) < 2e-5 for step in steps] == [True, True]
    for logged in trainer.state.log_history[:2]:
        assert logged["loss"] == pytest.approx(loss, rel=1e-5) and logged["micro_batch_parts"] == 2
    assert len(gpu.passes) == 2 * micro_batches + 2 * 4 * micro_batches  # the second step is not tried whole
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "memory" in line]
    assert said == (
        "The GPU ran out of memory in step 1: the step is repeated, to the same gradient, with each micro-batch in 2 "
        f"parts, and later steps stay so; --micro-batch-size {4 // micro_batches} begins so."
    )


def test_what_is_not_dropped_would_be_noticed(tmp_path, monkeypatch):
    trainer = make_trainer(tiny_model("olmo"), tmp_path, FORGET, RETAIN)
    monkeypatch.setattr(trainer, "_restart_step", lambda: None)
    _, expected = dense_step(trainer, FORGET, RETAIN)
    SmallGPU(trainer, 64, "forward", 1)
    assert relative_error(gradients_of(trainer)[0], expected) > 1e-2


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_run_goes_on_as_one_that_began_with_smaller_passes(where, tmp_path):
    """In the same bits, dropout included: the repeated step draws the random numbers that it would have drawn."""
    smaller = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    expected = gradients_of(dropping(tmp_path, **smaller))
    trainer = dropping(tmp_path)
    SmallGPU(trainer, 60, where)
    steps = gradients_of(trainer)
    assert trainer.divided.parts == 2
    assert all(torch.equal(own[n], other[n]) for own, other in zip(steps, expected, strict=True) for n in other)
    assert not all(torch.equal(own[n], expected[0][n]) for own in gradients_of(dropping(tmp_path))[:1] for n in own)


def test_down_to_single_rows(tmp_path, capsys):
    """Three times; and a batch whose rows do not divide evenly."""
    trainer = make_trainer(tiny_model("olmo"), tmp_path, FORGET[:7], RETAIN[:5], retain_batch_size=5)
    _, expected = dense_step(trainer, FORGET[:7], RETAIN[:5])
    gpu = SmallGPU(trainer, max(len(row["input_ids"]) for row in FORGET[:7] + RETAIN[:5]))
    assert relative_error(gradients_of(trainer)[0], expected) < 2e-5
    lines = [line for line in capsys.readouterr().out.splitlines() if "memory" in line]
    assert [line.partition(" parts")[0][-1] for line in lines] == ["2", "4", "8"]
    assert gpu.passes[-12:] == [len(row["input_ids"]) for row in in_order(trainer)] and trainer.divided.parts == 8


def in_order(trainer) -> list[dict]:
    """The first step's rows, in passes of one row each."""
    parts = trainer.divided.divided(trainer._step_rows[0])
    return [rows[i] for one in parts for rows, part in ((FORGET, "forget"), (RETAIN, "retain")) for i in one[part].rows]


def test_a_single_row_that_does_not_fit_ends_training(tmp_path):
    """However PyTorch reports it."""
    trainer = make_trainer(tiny_model("olmo"), tmp_path, FORGET, RETAIN)
    SmallGPU(trainer, 3, error=RuntimeError("CUDA error: out of memory"))
    with pytest.raises(torch.OutOfMemoryError, match="CUDA error: out of memory"):
        trainer.train()
    assert trainer.divided.parts == 8


def test_other_errors_are_not_taken_for_it(tmp_path, monkeypatch):
    trainer = make_trainer(tiny_model("olmo"), tmp_path, FORGET, RETAIN)

    def fails(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(trainer.passes, "retain", fails)
    with pytest.raises(RuntimeError, match="shapes"):
        trainer.train()


def test_the_command_says_it_once_and_its_report_too(byte_model, tmp_path, capsys, monkeypatch):
    whole = Passes.retain

    def retain_pass(self, batch, totals):
        if len(batch) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(self, batch, totals)

    monkeypatch.setattr(Passes, "retain", retain_pass)
    options = ["--device", "cpu", "--max-steps", "2", "--limit", "8", "--eval-rows", "2", "--leaks", "none"]
    arguments = ["train", "--model", str(byte_model), *options, "--output-dir"]
    most = 2
    assert main([*arguments, str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.count("The GPU ran out of memory in step 1") == 1
    assert [line["micro_batch_parts"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [2, 2]
    assert "each micro-batch went through the model in 2 parts" in (tmp_path / "run" / "report.html").read_text()
    most = 0
    assert main([*arguments, str(tmp_path / "none")]) == 2
    assert "the GPU ran out of memory: give a smaller batch" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["preferred answers", "sam", "joint pass", "memory switches", "cached reference"])
def test_every_kind_of_step_divides(kind, tmp_path):
    """A row and its other answer stay together; the neighbour is looked for in halves; forget and retain rows that
    share a pass are parted; what offloads or recomputes can be given up half-way."""
    settings = {
        "preferred answers": {"forget_term": "dpo"},
        "sam": {"sam": 0.05},
        "joint pass": {"joint_pass_tokens": 10**6},
        "cached reference": {"reference_dir": str(tmp_path / "cache")},
    }.get(kind, {})
    others = OTHERS if kind == "preferred answers" else None

    def trainer(folder):
        model = attach_lora(tiny_model("olmo"), AdapterConfig(lora_r=3))
        if kind == "memory switches":
            apply_switches(model, MemoryConfig(offload_checkpoints=True, tile_mlp=5, embedding_on_cpu=True))
        return make_trainer(model, tmp_path / folder, FORGET, RETAIN, others, max_steps=2, **settings)

    expected = gradients_of(trainer("whole"))
    for where in ("forward", "backward"):
        divided = trainer(where)
        gpu = SmallGPU(divided, 110 if others or kind == "joint pass" else 60, where)
        steps = gradients_of(divided)
        assert divided.divided.parts > 1 and max(gpu.passes[-4:]) <= gpu.most
        assert all(relative_error(own, other) < 1e-5 for own, other in zip(steps, expected, strict=True))


def test_each_process_divides_for_itself(tmp_path):
    """The second of two runs out of memory; both have the gradient of one process."""
    expected = gradients_of(make_trainer(tiny_model("olmo"), tmp_path, FORGET, RETAIN, max_steps=2))

    def run(rank: int):
        trainer = make_trainer(
            tiny_model("olmo"), tmp_path, FORGET, RETAIN, per_device_train_batch_size=4, max_steps=2, ddp_backend="gloo"
        )
        SmallGPU(trainer, 30 if rank else 10**9)
        return gradients_of(trainer), trainer.divided.parts

    (first, whole), (second, divided) = in_processes(run, tmp_path)
    assert (whole, divided) == (1, 2)
    for of_process in (first, second):
        assert all(relative_error(own, other) < 1e-5 for own, other in zip(of_process, expected, strict=True))


def test_a_resumed_run_divides_as_before(tmp_path):
    """Memory runs out in its first step; the second and third are those of a run that was never interrupted."""
    more = {"per_device_train_batch_size": 4, "step_batch_size": 4, "save_strategy": "steps", "save_steps": 1}
    more["save_total_limit"] = 9
    trainer = dropping(tmp_path / "run", **more)
    gpu = SmallGPU(trainer, 30)
    expected = gradients_of(trainer)
    assert trainer.divided.parts == 2 and max(gpu.passes) > 30

    def resumed(**changed):
        again = dropping(tmp_path / "run", **more | changed)
        return gradients_of(again, str(tmp_path / "run" / "checkpoint-1")), again.divided.parts

    steps, parts = resumed()
    assert parts == 2
    assert all(torch.equal(own[n], other[n]) for own, other in zip(steps, expected[1:], strict=True) for n in other)
    assert resumed(per_device_train_batch_size=2, gradient_accumulation_steps=2)[1] == 1  # other micro-batches
    newest = RunFiles(tmp_path / "run").checkpoints()[0]
    (newest / "micro_batch_parts.json").write_text("{")
    lines: list[str] = []
    assert resume_point(RunFiles(tmp_path / "run"), trainer, 9, lines.append).endswith("checkpoint-2")
    assert "micro_batch_parts.json is damaged" in lines[0]
    (tmp_path / "run" / "checkpoint-1" / "micro_batch_parts.json").unlink()
    assert not all(torch.equal(resumed()[0][0][n], expected[1][n]) for n in expected[1])


@pytest.mark.parametrize("where", ["sam", "adversary"])
def test_what_the_processes_have_summed_is_not_summed_again(where, tmp_path, monkeypatch):
    """Memory that runs out between the sum and its use ends the run: the other processes would wait for ever."""
    trainer = make_trainer(tiny_model("olmo"), tmp_path, FORGET, RETAIN, per_device_train_batch_size=4, **{where: 0.1})
    find = trainer.forget_point.neighbour.find if where == "sam" else partial(trainer.passes.adversary.relearn, 0)

    def add_gradients(summed: bool) -> bool:
        for parameter in trainer.model.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        return summed

    def runs_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    for summed in (False, True):
        with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError, match="CUDA"):
            patch.setattr(torch, "stack", runs_out)
            find(partial(add_gradients, summed))
        refused = pytest.raises(torch.OutOfMemoryError, match="what the processes had summed")
        before = [parameter.grad for parameter in trainer.model.parameters()]
        with refused if summed else contextlib.nullcontext():
            trainer._restart_step()
        after = [parameter.grad for parameter in trainer.model.parameters()]
        assert all(a is (b if summed else None) for a, b in zip(after, before, strict=True))
    find(partial(add_gradients, True))
    trainer._restart_step()
