"""--stop-when in real runs of a tiny model that recites: when they end, and whose weights they leave."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.saved_adapters import same_adapter, weights
from helpers.taught_model import LIMIT, unlearning_config
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_npo.commands.train.run import train
from lowmem_npo.config import DataConfig
from lowmem_npo.console import silent
from lowmem_npo.data import prepare
from lowmem_npo.endings import Interrupted
from lowmem_npo.run_directory import AdapterFiles, RunFiles
from lowmem_npo.stop_conditions import StopEvaluation, parse_conditions
from lowmem_npo.training.early_stopping import Stopping, read_evaluations
from lowmem_npo.training.metrics import read_metrics
from lowmem_npo.training.preemption import Preemption

ROOT = Path(__file__).resolve().parents[2]
CONDITIONS = {
    "forget-at-holdout": lambda now, start: now.forget_nll >= start.holdout_nll,
    "mia-crosses": lambda now, start: now.membership_auc <= 0.5,
    "retain-loss+100%": lambda now, start: now.retain_nll >= 2 * start.retain_nll,
}


def evaluations(folder: Path) -> list[StopEvaluation]:
    return read_evaluations(RunFiles(folder).stop_evaluations)


@pytest.fixture(scope="module")
def whole(taught_model, tmp_path_factory) -> Path:
    """The run to its end: measured after every second step, never stopped, every measured adapter in a checkpoint."""
    folder = tmp_path_factory.mktemp("stopping") / "whole"
    result = train(unlearning_config(taught_model, folder, ("retain-loss+1000",)), say=silent)
    assert result.optimizer_steps == 30 and result.stopping.held == []
    return folder


def expected(whole: Path, text: str) -> tuple[int, int]:
    """Where the run must stop, and which step it must keep: by the definitions, on what the whole run measured."""
    start, *trained = evaluations(whole)
    stop = next(now for now in trained if CONDITIONS[text](now, start))
    earlier = [now for now in trained if now.step <= stop.step]
    if text == "forget-at-holdout":
        kept = min(earlier, key=lambda now: abs(now.forget_nll - start.holdout_nll))
    elif text == "mia-crosses":
        kept = min(earlier, key=lambda now: abs(now.membership_auc - 0.5))
    else:
        kept = earlier[-2]
    return stop.step, kept.step


def restored(folder: Path, checkpoints: Path) -> bool:
    """Whether the run in `folder` left the adapter that the whole run had at the step that was kept."""
    kept = json.loads(RunFiles(folder).stopping.read_text())["kept"]["step"]
    return same_adapter(folder, checkpoints / f"checkpoint-{kept}")


@pytest.mark.parametrize("text", CONDITIONS)
def test_it_stops_when_it_should_and_keeps_the_best(text, whole, taught_model, tmp_path):
    stop, kept = expected(whole, text)
    lines = []
    result = train(unlearning_config(taught_model, tmp_path / "run", (text,)), say=lines.append)
    assert result.optimizer_steps == result.stopping.last.step == stop <= 30
    assert result.stopping.kept.step == kept
    assert result.stopping.held == [text] and result.stopping.within_limits
    assert restored(tmp_path / "run", whole)
    assert evaluations(tmp_path / "run") == [e for e in evaluations(whole) if e.step <= stop]
    assert any(f"Stopped at step {stop}: {text}" in line and f"step {kept} is kept" in line for line in lines)
    assert f"step-{kept}.safetensors" in {file.name for file in RunFiles(tmp_path / "run").best.iterdir()}
    assert result.stopping.sentence in json.loads(RunFiles(tmp_path / "run").report_json.read_text())["notes"]
    assert json.loads(RunFiles(tmp_path / "run").audit.read_text())["adapter"]["of_step"] == kept
    assert result.after["forget"].summary.nll == pytest.approx(result.stopping.kept.forget_nll, rel=1e-6)


def test_why_it_stopped_is_told_in_figures_that_differ(tmp_path):
    """A model that recites has NLLs of which three decimals show nothing."""
    lines: list[str] = []
    conditions = parse_conditions(["retain-loss+10%"])
    stopping = Stopping(conditions, None, {}, tmp_path, say=lines.append)
    start, now = (StopEvaluation(step, step / 10, 0.5, retain_nll=nll) for step, nll in ((0, 0.00031), (1, 0.00036)))
    stopping._add(start)
    assert lines == ["before: forget NLL 0.500, retain NLL 3.1e-04"]
    assert "(retain NLL 3.6e-04, before 3.1e-04, limit 3.4e-04)" in stopping._sentence(now, now, conditions, True)
    stopping.evaluations = [replace(start, retain_nll=2.0)]
    now = replace(now, retain_nll=2.2004)
    assert "(retain NLL 2.2004, before 2.0000, limit 2.2000)" in stopping._sentence(now, now, conditions, True)


def test_a_run_that_does_not_restore_is_noticed(whole, taught_model, tmp_path, monkeypatch):
    """The check above with the bug planted: the adapter of the last step is left."""
    stop, kept = expected(whole, "forget-at-holdout")
    assert kept < stop, "or last and best are the same"
    monkeypatch.setattr(Stopping, "_restore", lambda self, evaluation: None)
    train(unlearning_config(taught_model, tmp_path / "run", ("forget-at-holdout",)), say=silent)
    assert not restored(tmp_path / "run", whole)


def test_what_it_measures_is_the_models_own_likelihood(whole, taught_model):
    """NLLs and AUC of the last step, from dense float64 logits and by counting pairs."""
    tokenizer = AutoTokenizer.from_pretrained(taught_model)
    data = prepare(tokenizer, DataConfig(limit=LIMIT))
    base = AutoModelForCausalLM.from_pretrained(taught_model, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(whole / "checkpoint-30")).double().eval()

    def nlls(rows) -> list[tuple[float, int]]:
        values = []
        for row in rows:
            ids, start = torch.tensor([row["input_ids"]]), row["prompt_length"]
            with torch.no_grad():
                table = model(ids).logits[0].log_softmax(-1)
            answer = row["input_ids"][start:]
            picked = table[torch.arange(start - 1, start - 1 + len(answer)), torch.tensor(answer)]
            values.append((-picked.sum().item(), len(answer)))
        return values

    last = evaluations(whole)[-1]
    sets = {name: nlls(getattr(data, name)) for name in ("forget", "retain", "holdout")}
    for name, values in sets.items():
        level = sum(total for total, _ in values) / sum(count for _, count in values)
        assert getattr(last, f"{name}_nll") == pytest.approx(level, rel=1e-4)
    pairs = [(f[0] / f[1], h[0] / h[1]) for f in sets["forget"] for h in sets["holdout"]]
    auc = sum((h > f) + 0.5 * (h == f) for f, h in pairs) / len(pairs)
    assert last.membership_auc == pytest.approx(auc, abs=1.5 / len(pairs))


def test_killed_and_resumed_it_keeps_the_same(whole, taught_model, tmp_path):
    """Cut off after the best step and before the stop; the evaluations after the checkpoint are made again."""
    stop, kept = expected(whole, "mia-crosses")
    config = unlearning_config(taught_model, tmp_path / "run", ("mia-crosses",), max_steps=stop - 4)
    train(config, say=silent)
    AdapterFiles(tmp_path / "run").weights.unlink()
    ahead = evaluations(tmp_path / "run")[-1]
    torn = {"step": stop - 2, "epoch": 0.0, "forget_nll": 99.0, "retain_nll": 99.0, "membership_auc": 0.5}
    with RunFiles(tmp_path / "run").stop_evaluations.open("a") as file:
        file.write(json.dumps(torn) + "\n")  # of a step after the last checkpoint
    training, output = replace(config.training, max_steps=30), replace(config.output, resume=True)
    longer = replace(config, training=training, output=output)
    result = train(longer, say=silent)
    assert ahead.step == stop - 4 and (result.stopping.last.step, result.stopping.kept.step) == (stop, kept)
    assert restored(tmp_path / "run", whole)
    again = train(longer, say=silent)  # a stopped run does not continue
    assert again.optimizer_steps == stop and restored(tmp_path / "run", whole)
    assert not (tmp_path / "run" / f"checkpoint-{stop + 2}").exists()


def test_stopped_between_two_checkpoints_it_can_be_resumed(whole, taught_model, tmp_path):
    stop, kept = expected(whole, "mia-crosses")
    saves = {"save_steps": stop - 1, "save_total_limit": 1}
    config = replace(unlearning_config(taught_model, tmp_path / "run", ("mia-crosses",)), trainer_args=saves)
    assert train(config, say=silent).stopping.kept.step == kept
    AdapterFiles(tmp_path / "run").weights.unlink()  # and killed before it was saved
    assert [file.name for file in RunFiles(tmp_path / "run").checkpoints()] == [f"checkpoint-{stop}"]
    lines = []
    result = train(replace(config, output=replace(config.output, resume=True)), say=lines.append)
    assert f"--resume: continues from checkpoint-{stop}." in lines
    assert (result.stopping.last.step, result.stopping.kept.step) == (stop, kept) and restored(tmp_path / "run", whole)


def test_a_goal_that_a_fold_reaches_ends_its_stage(taught_model, tmp_path):
    """Each stage's own rows decide, the next one begins with the next epoch, and only the last stage ends the run or is
    kept. Resumed from the second stage, it is the same."""
    config = unlearning_config(taught_model, tmp_path / "run", ("forget-at-holdout",), layered=2)
    config = replace(config, data=replace(config.data, group_column="person"))
    result = train(config, say=silent)
    start, *measured = evaluations(tmp_path / "run")
    first = [e for e in measured if e.stage == 1]
    assert first[-1].forget_nll >= start.holdout_nll and first[-1].step < 15  # before half of the steps
    assert all(e.forget_nll < start.holdout_nll for e in first if e.step <= 4 * ((first[-1].step - 1) // 4))
    second = [e for e in measured if e.stage == 2]
    assert second[0].step == 4 * math.ceil(first[-1].step / 4) + 2 and second[0].forget_nll < first[-1].forget_nll
    assert result.stopping.kept in second and result.stopping.last.step == measured[-1].step
    stages = [line["stage"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "stage" in line]
    assert stages == [1] * (second[0].step - 2) + [2] * (len(stages) - second[0].step + 2)

    again = tmp_path / "again"
    shutil.copytree(tmp_path / "run", again)
    AdapterFiles(again).weights.unlink()
    for checkpoint in RunFiles(again).checkpoints():
        if int(checkpoint.name.rpartition("-")[2]) > second[0].step:
            shutil.rmtree(checkpoint)
    output = replace(config.output, output_dir=str(again), resume=True)
    assert train(replace(config, output=output), say=silent).stopping.last == result.stopping.last
    assert evaluations(again) == evaluations(tmp_path / "run") and same_adapter(again, tmp_path / "run")


def test_a_stage_is_judged_in_the_form_in_which_the_holdout_is(taught_model, tmp_path):
    """Under `--template both` a fold has each row twice, and a row in its other form may be far less likely without
    having been forgotten."""
    model = tmp_path / "model"
    shutil.copytree(taught_model, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for turn in messages %}{{ turn['role'] }}: {{ turn['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(model)
    config = unlearning_config(model, tmp_path / "run", ("retain-loss+1000",), layered=2, lr=0.0, max_steps=8)
    for template in ("chat", "both"):
        output = replace(config.output, output_dir=str(tmp_path / template))
        data = replace(config.data, group_column="person", template=template)
        train(replace(config, data=data, output=output), say=silent)
    of_chat, of_both = ([(e.stage, e.forget_nll) for e in evaluations(tmp_path / run)] for run in ("chat", "both"))
    assert [stage for stage, _ in of_chat] == [None, 1, 1, 2, 2] and len({nll for _, nll in of_chat}) == 2
    assert of_both == of_chat


def test_each_epoch_is_the_default(taught_model, tmp_path):
    config = unlearning_config(taught_model, tmp_path / "run", ("retain-loss+1000",), max_steps=6, eval_every=None)
    result = train(config, say=silent)
    assert [e.step for e in evaluations(tmp_path / "run")] == [0, 4, 6]
    assert result.stopping.kept.step == 6


def test_a_checkpoint_has_been_measured_and_a_signal_adds_no_measurement(taught_model, tmp_path, monkeypatch):
    """Or a resumed run would lack what was due when it was killed, and decide by what no other run measures."""
    conditions, saves = ("retain-loss+1000",), {"save_steps": 4}
    config = unlearning_config(taught_model, tmp_path / "run", conditions, max_steps=6, eval_every=None)
    config, saved, heard = replace(config, trainer_args=saves), [], Preemption.on_step_end

    def on_save(self, args, state, control, **kwargs):
        saved.append((state.global_step, [e.step for e in evaluations(tmp_path / "run")]))

    def on_step_end(self, args, state, control, **kwargs):
        self.number = signal.SIGTERM if state.global_step == 2 else None
        heard(self, args, state, control, **kwargs)

    monkeypatch.setattr(Stopping, "on_save", on_save)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Preemption, "on_step_end", on_step_end)
        train(config, say=silent)
    train(replace(config, output=replace(config.output, resume=True)), say=silent)
    assert saved == [(2, [0]), (4, [0, 4]), (6, [0, 4, 6])]


@pytest.mark.slow
def test_two_processes_stop_together(whole, taught_model, tmp_path):
    """Step 10 is where one process stops; two must end there, both, with the same weights within rounding."""
    stop, kept = expected(whole, "forget-at-holdout")
    config = unlearning_config(taught_model, tmp_path / "run", ("forget-at-holdout",))
    file = tmp_path / "run.yaml"
    file.write_text(config.to_yaml())
    launched = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
        + ["-m", "lowmem_npo", "train", "--config", str(file), "--ddp-backend", "gloo"],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert launched.returncode == 0, launched.stderr[-3000:]
    outcome = json.loads(RunFiles(tmp_path / "run").stopping.read_text())
    assert (outcome["last"]["step"], outcome["kept"]["step"]) == (stop, kept)
    one, two = weights(whole / f"checkpoint-{kept}"), weights(tmp_path / "run")
    apart = math.sqrt(sum(float((one[n] - two[n]).double().square().sum()) for n in one))
    assert apart < 1e-3 * math.sqrt(sum(float(w.double().square().sum()) for w in one.values()))


def known_before(config, **objective):
    """The run with its rows in each other's places: those to forget were never taught, those of the holdout were."""
    bundled = ROOT / "lowmem_npo" / "data" / "bundled"
    files = {name: str(bundled / f"{of}.jsonl") for name, of in
             (("forget", "holdout"), ("retain", "retain"), ("holdout", "forget"))}  # fmt: skip
    return replace(config, data=replace(config.data, **files), objective=replace(config.objective, **objective))


AT_HOLDOUT, CROSSES = ("forget-at-holdout",), ("mia-crosses", "retain-loss+100000")


@pytest.mark.parametrize(
    "layered, conditions",
    [
        (2, AT_HOLDOUT),
        (None, CROSSES),
        pytest.param(2, CROSSES, marks=pytest.mark.slow),
        pytest.param(None, AT_HOLDOUT, marks=pytest.mark.slow),
    ],
)
def test_a_goal_that_held_before_training_ends_neither_run_nor_stage(layered, conditions, taught_model, tmp_path):
    """It said that the run was finished, after nothing."""
    changes = {"max_steps": 8, "layered": layered, "lr": 1e-4}
    lines, config = [], unlearning_config(taught_model, tmp_path / "run", conditions, **changes)
    config = known_before(config)
    result = train(config, say=lines.append)
    assert result.optimizer_steps == result.stopping.kept.step == 8 and result.stopping.held == []
    assert result.stopping.held_before == [conditions[0]]
    sentence = result.stopping.sentence
    assert sentence.startswith("Trained to its end, step 8") and "Stopped" not in sentence
    assert f"{conditions[0]} held before training already, and decided nothing." in sentence
    assert ("retain-loss+100000 did not hold" in sentence) == (len(conditions) > 1)
    said = [line for line in lines if line.startswith(f"--stop-when {conditions[0]}") and "holds before" in line]
    assert len(said) == (layered or 1) and all("cannot tell when enough is forgotten" in line for line in said)
    measured = [one for one in evaluations(tmp_path / "run") if one.step > 0]
    assert [(one.step, one.stage) for one in measured] == [(step, layered and 1 + (step > 4)) for step in (2, 4, 6, 8)]
    begun = [one.stage for one in evaluations(tmp_path / "run") if one.step == 0]
    assert begun == ([None, 1] if layered else [None])

    for checkpoint in RunFiles(tmp_path / "run").checkpoints():
        if int(checkpoint.name.rpartition("-")[2]) > 4:
            shutil.rmtree(checkpoint)
    AdapterFiles(tmp_path / "run").weights.unlink()
    again = train(replace(config, output=replace(config.output, resume=True)), say=silent)
    assert again.stopping == result.stopping
