"""Steps whose loss or gradient is no number are not taken; three in a row end the run. A run that loses what it should
keep says so."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from helpers.dense_step import make_trainer, random_rows
from helpers.processes import in_processes
from helpers.tiny_models import tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from lowmem_npo.cli import main
from lowmem_npo.data import Example, TokenizedRow, TokenizedRows
from lowmem_npo.training.divergence import Divergence
from lowmem_npo.training.finite import FiniteSteps, NotFinite
from lowmem_npo.training.metrics import read_metrics
from lowmem_npo.training.training_rows import Shown, training_rows

DAMAGED = 96  # a token whose embedding is no number


class States(TrainerCallback):
    """The adapter and the optimizer's state after every step."""

    def __init__(self) -> None:
        self.after: list[tuple[dict, dict]] = []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        self.after.append((weights, copy.deepcopy(optimizer.state_dict()["state"])))


def damaged_trainer(folder, part, optim="adamw_torch_fused", settings=None):
    """One row a step, six in an epoch; the third of `part` has a token that gives no numbers."""
    rows = {"forget": random_rows(6, seed=1, vocabulary=90), "retain": random_rows(6, seed=2, vocabulary=90)}
    rows[part][2]["input_ids"][0] = DAMAGED
    model = tiny_model("olmo")
    with torch.no_grad():
        model.get_input_embeddings().weight[DAMAGED] = torch.nan
    usual = {"per_device_train_batch_size": 1, "max_steps": 6, "learning_rate": 1e-2, "optim": optim}
    return make_trainer(model, folder, rows["forget"], rows["retain"], **(usual | (settings or {})))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("part", ["forget", "retain"])
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "sgd"])
def test_a_step_that_is_not_finite_is_not_taken(part, optim, tmp_path, capsys):
    trainer, states = damaged_trainer(tmp_path, part, optim), States()
    trainer.add_callback(states)
    trainer.train()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "not taken" in line]
    (bad,) = [i for i, logged in enumerate(trainer.state.log_history[:6]) if logged["loss"] != logged["loss"]]
    assert line == (f"Step {bad + 1} is not taken: its loss or its gradient is no finite number ({part} row 3).")
    assert bad > 0 and len(states.after) == 6
    assert all(torch.isfinite(weight).all() for weights, _ in states.after for weight in weights.values())
    moved = [not same(states.after[i - 1][0], states.after[i][0]) for i in range(1, 6)]
    assert [i for i, moves in enumerate(moved, 1) if not moves] == [bad]
    if optim != "sgd":
        (_, before), (_, after) = states.after[bad - 1 : bad + 1]
        assert all(same(before[i], after[i]) for i in before)  # moments and count of steps


@pytest.mark.parametrize("part", ["forget", "retain"])
def test_no_process_takes_a_step_that_is_not_finite_in_one(part, tmp_path):
    """Two processes with a row each: only one of them has the row that gives no numbers."""

    def run(rank: int):
        trainer, states = damaged_trainer(tmp_path, part, settings={"ddp_backend": "gloo", "max_steps": 3}), States()
        trainer.add_callback(states)
        said: list[str] = []
        next(c for c in trainer.callback_handler.callbacks if isinstance(c, FiniteSteps)).say = said.append
        trainer.train()
        return states.after, said, [trainer.step_batches.step_rows(step) for step in range(3)]

    (first, said, rows), (second, silent, _) = in_processes(run, tmp_path)
    (bad,) = [step for step, of_step in enumerate(rows) if 2 in of_step[part == "retain"]]
    assert said == [f"Step {bad + 1} is not taken: its loss or its gradient is no finite number ({part} row 3)."]
    assert silent == [] and len(first) == len(second) == 3
    for step, ((weights, moments), (other, others)) in enumerate(zip(first, second, strict=True)):
        assert same(weights, other) and all(torch.isfinite(weight).all() for weight in weights.values())
        assert all(same(moments[i], others[i]) for i in moments) and moments.keys() == others.keys()
        if step > 0:
            assert same(weights, first[step - 1][0]) == (step == bad)


def test_rows_are_named_as_their_file_numbers_them():
    """Not by where they are among those trained: in both forms, without those left out, with other answers."""

    def of_file(name, lines):
        examples = [Example("Who?", f"Anna {line}", f"{name}, line {line}", "question/answer") for line in lines]
        rows = [TokenizedRow(input_ids=[1, 2], labels=[1, 2], prompt_length=1) for _ in lines]
        return TokenizedRows(rows, examples, 8)

    forget, retain = of_file("f.csv", [2, 3, 5, 2, 3, 5]), of_file("r.csv", range(7, 27))
    how = {"term": "dpo", "layered": 2, "adversary": False, "seed": 0, "teaching": {}}
    rows = training_rows(forget, retain, forget, None, lambda rows, *_: rows, **how)
    assert rows.named("forget", [5, 2, 0]) == "forget: f.csv, line 2; f.csv, line 5"
    places = {rows.place(*row) for row in [("forget", 7), ("retain", 24), ("retain", 1)]}
    assert places == {("forget", 1), ("forget", 4), ("retain", 1)}
    assert rows.named("retain", [1]) == "retain: r.csv, line 8"
    assert rows.named("retain", range(20)).endswith("; r.csv, line 14 and 12 more")


def test_without_the_check_the_adapter_would_be_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(FiniteSteps, "on_pre_optimizer_step", lambda *args, **kwargs: None)
    trainer = damaged_trainer(tmp_path, "forget")
    trainer.train()
    assert any(p.isnan().any() for p in trainer.model.parameters() if p.requires_grad)


class LosesItself(TrainerCallback):
    """Weights so large that no later step has finite numbers."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 4:
            with torch.no_grad():
                for p in model.parameters():
                    if p.requires_grad:
                        p.fill_(1e38)


def test_three_in_a_row_end_the_run_and_the_last_finite_checkpoint_is_left(tmp_path, capsys):
    rows = random_rows(4, seed=1), random_rows(4, seed=2)
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    trainer = make_trainer(tiny_model("olmo"), tmp_path, *rows, max_steps=9, **saving)
    trainer.add_callback(LosesItself())
    with pytest.raises(NotFinite, match="steps 5 to 7 is no finite number, the last time of forget rows 1, 2, 3, 4"):
        trainer.train()
    left = sorted(path.name for path in tmp_path.glob("*checkpoint-*"))
    assert left == ["checkpoint-3", "damaged-checkpoint-4"]  # none of a step that was not taken
    assert all(torch.isfinite(w).all() for w in load_file(tmp_path / left[0] / "adapter_model.safetensors").values())
    assert capsys.readouterr().out.count("is not taken") == 3


def test_the_command_ends_with_an_error(byte_model, tmp_path, capsys):
    run = ["--max-steps", "8", "--save-steps", "1", "--limit", "8", "--batch-size", "4", "--eval-rows", "0"]
    huge = ["--lr", "1e6", "--lora-alpha", "1e6"]
    where = ["--model", str(byte_model), "--dtype", "float32", "--output-dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(main(["train", *where, *run, *huge]))
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert "The training diverged: the loss or the gradient of steps 2 to 4 is no finite number" in printed.err
    assert "the same command with --resume starts it again." in printed.err
    assert "the last time of forget: bundled forget.jsonl, line " in printed.err
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


def diverging(byte_model, folder, capsys, *settings):
    """What `train` prints of a model whose logits are far from uniform, so that there is something to lose."""
    model = AutoModelForCausalLM.from_pretrained(byte_model)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    model.save_pretrained(folder / "base")
    for file in byte_model.glob("tokenizer*"):
        (folder / "base" / file.name).write_bytes(file.read_bytes())
    options = ["--max-steps", "12", "--limit", "8", "--batch-size", "4", "--eval-rows", "4", "--leaks", "none"]
    where = ["--model", str(folder / "base"), "--dtype", "float32", "--output-dir", str(folder / "run")]
    assert main(["train", *where, *options, "--forget-term", "ga", "--gamma", "1e-6", *settings]) == 0
    return capsys.readouterr().out.splitlines(), read_metrics(folder / "run" / "metrics.jsonl")


def test_a_run_that_loses_what_it_should_keep_says_so_once_and_at_its_end(byte_model, tmp_path, capsys):
    lines, metrics = diverging(byte_model, tmp_path, capsys, "--lr", "0.3")
    said = [i for i, line in enumerate(lines) if line.startswith("The model loses what it should keep: at step ")]
    assert len(said) == 2 and said[1] == len(lines) - 1
    logged = [line["retain_nll"] for line in metrics if "retain_nll" in line][-10:]
    said = float(re.search("at step 12 the retain NLL is ([0-9.]+) nats per token", lines[-1])[1])
    assert min(logged) < said < max(logged) and said == pytest.approx(sum(logged) / 10, rel=0.1)  # a mean over tokens


def test_a_run_that_keeps_it_does_not(byte_model, tmp_path, capsys):
    lines, _ = diverging(byte_model, tmp_path, capsys, "--lr", "1e-5")
    assert not any("loses" in line for line in lines)


def test_the_rule_of_divergence():
    class State:
        is_world_process_zero, global_step = True, 0
        log_history: list = []

    def after(*retain_nll, before, shown=lambda step: Shown(50, 500), num_retain=50):
        said, state = [], State()
        rule = Divergence(before, shown, num_retain, said.append)
        for step, value in enumerate(retain_nll, 1):
            line = {"step": step, "loss": 1.0, **({} if value is None else {"retain_nll": value})}
            state.global_step, state.log_history = step, [*state.log_history, line]
            rule.on_log(None, state, None)
        return said, rule.sentence

    assert after(2.0, 3.1, 3.1, before=2.0) == ([], None)  # of two steps nothing is said
    said, last = after(2.0, 3.1, 3.1, 3.1, 3.1, before=2.0)
    assert len(said) == 1 and "at step 4 the retain NLL is 3.10" in said[0] and "at step 5" in last
    assert after(2.0, 2.9, 2.9, 2.9, before=2.0) == ([], None)
    assert after(2.0, 3.1, 3.1, 3.1, before=2.5) == ([], None)
    assert "was 2.00 before" in after(2.0, 3.1, 3.1, 3.1, before=None)[1]
    assert after(2.0, float("nan"), 3.1, 3.1, before=None) == ([], None)  # a step that is not taken does not count
    said, last = after(2.0, *[9.0] * 3, *[2.0] * 10, before=2.0)
    assert len(said) == 1 and last is None  # it has come back

    few = {"shown": lambda step: Shown(1, 10), "num_retain": 234}
    assert after(2.0, *[9.0] * 99, before=2.0, **few) == ([], None)  # 99 rows are few, of which some are hard
    said, last = after(2.0, *[2.0] * 20, *[9.0] * 100, before=2.0, **few)
    assert len(said) == 1 and "the retain NLL is 9.00 nats" in last  # of the last 100 rows
    assert "was 2.00 before" in after(*[1.5, 2.5] * 50, *[9.0] * 100, before=None, **few)[1]
    uneven = {"shown": lambda step: Shown(25, 100 if step % 2 else 900), "num_retain": 234}
    assert after(*[2.0, 7.0] * 10, before=2.0, **uneven) == ([], None)  # a mean over tokens, as before training: 2.5
    held = [None] * 9  # steps of held rows alone
    assert after(2.0, 9.0, *held, before=2.0) == ([], None)  # still of two steps
    assert len(after(2.0, 9.0, *held, 9.0, *held, 9.0, before=2.0)[0]) == 1


def test_train_loss_is_of_all_steps_after_a_resume(tmp_path):
    def trained(folder, resume, **settings):
        rows = random_rows(4, seed=1), random_rows(4, seed=2)
        saving = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
        trainer = make_trainer(tiny_model("olmo"), folder, *rows, **saving, **settings)
        output = trainer.train(resume_from_checkpoint=resume)
        assert output.training_loss == trainer.state.log_history[-1]["train_loss"]
        return trainer

    whole = trained(tmp_path / "whole", None, max_steps=5)
    trained(tmp_path / "cut", None, max_steps=2)
    resumed = trained(tmp_path / "cut", True, max_steps=5)
    losses = [line["loss"] for line in whole.state.log_history if "loss" in line]
    assert whole.state.log_history[-1]["train_loss"] == pytest.approx(sum(losses) / 5, rel=1e-12)
    assert resumed.state.log_history[-1]["train_loss"] == whole.state.log_history[-1]["train_loss"]
    assert sum(losses[2:]) / 3 != pytest.approx(sum(losses) / 5, rel=1e-4)  # that of the resumed steps alone
