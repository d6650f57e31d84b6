"""benchmarks/kernels.py: its inputs and its truth, that it notices wrong kernels, and that it runs to its picture."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import kernels
from benchmarks.kernels_parts import check, layers, peers, picture
from benchmarks.kernels_parts.cases import CE_WEIGHT, KL_WEIGHT, Shape, make_cases, truth
from benchmarks.kernels_parts.tasks import TASKS, errors
from benchmarks.kernels_parts.timing import take_turns

ROOT = Path(__file__).resolve().parents[2]
SHAPE = Shape(tokens=9, vocabulary=211, hidden=48)


@pytest.mark.parametrize("level", [1e-5, 1e-2, 1.0])
def test_inputs_have_the_requested_kl(level):
    cases = make_cases(Shape(tokens=64, vocabulary=500, hidden=256), level, 2, "cpu")
    for case in cases:
        assert truth(case).kl.mean() == pytest.approx(level, rel=0.3)
    assert cases[0].weight is cases[1].weight and not torch.equal(cases[0].hidden, cases[1].hidden)


def test_truth_agrees_with_autograd_in_dense_float64():
    (case,) = make_cases(SHAPE, 0.1, 1, "cpu")
    hidden = case.hidden.detach().double().requires_grad_()
    z, z_ref = hidden @ case.weight.double().T, case.ref_hidden.double() @ case.weight.double().T
    p = torch.softmax(z, 1)
    kl = (p * (p / torch.softmax(z_ref, 1)).log()).sum(1)
    logprobs = -torch.nn.functional.cross_entropy(z, case.targets, reduction="none")
    exact = truth(case)
    for ours, value, gradient in ((exact.logprobs, logprobs, exact.logprob_grad), (exact.kl, kl, exact.kl_grad)):
        assert torch.allclose(ours, value.detach(), rtol=1e-9)
        assert torch.allclose(gradient, torch.autograd.grad(value.sum(), hidden, retain_graph=True)[0], atol=1e-12)
    some = truth(case, rows=3)
    assert torch.equal(some.rows, torch.tensor([0, 3, 6])) and torch.equal(some.kl, exact.kl[::3])


class Wrong(peers.DenseFloat32):
    """Right but for one thing."""

    def __init__(self, mistake: str) -> None:
        self.mistake = mistake

    def logits(self, hidden, weight):
        z = super().logits(hidden, weight)
        if self.mistake == "bf16 logits":
            return z.bfloat16().float()
        if self.mistake == "vocabulary tile dropped":
            return torch.cat([z[:, :16], z[:, 16:32] - 100, z[:, 32:]], 1)
        return z

    def retain(self, case):
        loss = super().retain(case)
        return loss if self.mistake != "kl left out" else loss - KL_WEIGHT * self.kl(case).mean()


@pytest.mark.parametrize(
    "mistake, noticed",
    [
        ("none", set()),
        ("bf16 logits", {"b.logprob", "c.kl_token", "c.grad"}),
        ("vocabulary tile dropped", {"b.logprob", "b.grad", "c.kl", "c.kl_token", "c.grad", "d.grad"}),
        ("kl left out", {"d.grad"}),
    ],
)
def test_errors_show_a_mistake_and_nothing_else(mistake, noticed):
    (case,) = make_cases(SHAPE, 1e-2, 1, "cpu")
    exact, limit = truth(case), check.CONTRACT | {"b.grad": 5e-3}
    measured = {}
    for task in TASKS[1:]:
        value, grad = task.run(Wrong(mistake), case)
        measured |= {f"{task.key}.{name}": error for name, error in errors(task, value, grad, exact, case).items()}
    too_large = {name for name, error in measured.items() if error > limit[name]}
    assert too_large >= noticed and (mistake != "none" or not too_large), measured
    if mistake == "kl left out":
        assert too_large == noticed


def test_the_value_of_the_joint_task_is_the_weighted_sum():
    (case,) = make_cases(SHAPE, 0.1, 1, "cpu")
    exact = truth(case)
    loss = KL_WEIGHT * exact.kl.mean() - CE_WEIGHT * exact.logprobs.mean()
    for contender in (peers.Ours("torch"), peers.DenseFloat32()):
        assert float(TASKS[3].run(contender, case)[0]) == pytest.approx(float(loss), rel=1e-4)


def test_contract_is_checked_for_our_engines_only_and_a_nan_breaks_it():
    good = dict.fromkeys(check.CONTRACT, 1e-6)
    rows = [{"contender": "torch", "level": 1e-4, **good}, {"contender": "dense", "level": 1e-4, **good, "c.kl": 9.0}]
    assert check.violations(rows) == []
    for bad in (0.0051, math.nan):
        (line,) = check.violations([{**rows[0], "c.kl": bad}, *rows])
        assert line.startswith("torch at KL 1e-04: c.kl off by")


@pytest.mark.slow
def test_check_runs_from_anywhere_and_writes_what_it_printed(tmp_path):
    """The real command, as a user types it, without the peers that are compiled or interpreted at length."""
    path = tmp_path / "check.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "kernels.py"), "--check", "--quick", "--kl", "1e-4",
               "--without", "torch.compile", "liger", "--out", str(path)]  # fmt: skip
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No GPU here: only errors and memory are checked" in done.stdout
    assert "Within the contract" in done.stdout and "cce: not available here" in done.stdout
    written = json.loads(path.read_text())
    rows = {row["contender"]: row for row in written["results"]}
    assert rows["torch"]["c.grad"] < 1e-2 < rows["dense"]["c.grad"]  # bf16 logits are no good for a KL of 1e-4
    assert written["machine"]["gpu"] == "cpu" and written["machine"]["versions"]["torch"] == torch.__version__
    assert written["command"] == "python benchmarks/kernels.py " + " ".join(command[2:-1]) + " check.json"
    workspace = {row["contender"]: row for row in written["simulated_workspace"]}
    assert workspace["dense"]["b"] > 8192 * 128256 * 4  # all logits in float32, at least


def test_measuring_runs_to_the_end_without_a_gpu(tmp_path, monkeypatch):
    """The part that needs a GPU, with a wall clock in place of CUDA events: what is measured is written and drawn."""
    broken = peers.Dense()
    broken.name, broken.kl = "broken", None
    known = [peers.Ours("torch"), peers.Dense(), broken]
    monkeypatch.setattr(kernels, "contenders", lambda device: (known, {"cce": "needs a GPU"}))
    runs = kernels.measure(SHAPE, "cpu", seconds=0.3, deadline=math.inf)  # five turns fit, also on a busy machine
    by_key = {(run["task"], run["contender"]): run for run in runs}
    for task in "abcd":
        for name in ("floor", "torch", "dense"):
            seconds = by_key[task, name]["seconds"]
            assert 0 < seconds["low"] <= seconds["median"] <= seconds["high"] and seconds["count"] >= 5
        assert by_key[task, "cce"]["missing"] == "needs a GPU"
    assert "NoneType" in by_key["c", "broken"]["missing"] and "seconds" in by_key["d", "broken"]
    assert by_key["b", "torch"]["errors"]["grad"] < 1e-2
    late = kernels.measure(replace(SHAPE, tokens=4), "cpu", 0.01, deadline=0)
    assert {run["task"] for run in late} == set("abcd") and all("time limit" in run["missing"] for run in late)
    path = tmp_path / "kernels.png"
    picture.draw(runs, path, "a CPU")
    assert path.stat().st_size > 10_000


def test_goals_are_judged_by_the_worst_shape():
    def run(task, contender, vocabulary, milliseconds, mib=100):
        return {"task": task, "contender": contender, "tokens": 8192, "vocabulary": vocabulary, "hidden": 64,
                "seconds": {"median": milliseconds / 1e3}, "workspace_bytes": mib * 2**20}  # fmt: skip

    runs = [run("b", "floor", 100, 10), run("b", "chunks", 100, 11), run("b", "trl", 100, 30)]
    runs += [run("b", "floor", 200, 20), run("b", "chunks", 200, 24, mib=300), run("b", "trl", 200, 23)]
    goals = {goal["goal"]: goal for goal in kernels.goals(runs)}
    floor = goals["b: chunks at most 1.15 x the time of its 2 products"]
    assert floor["value"] == pytest.approx(1.2) and not floor["met"] and "V 200" in floor["found"]
    assert goals["b: chunks at most 256 MiB of workspace"]["value"] == 300
    assert goals["b: faster than every peer"]["value"] == pytest.approx(24 / 23)
    assert kernels.goals(runs[:3])[0]["met"] and kernels.goals([]) == []


def test_turns_are_taken_and_a_failure_stays_with_its_own():
    calls = []

    def works(argument):
        calls.append(argument)

    def fails_later(argument):
        if len(calls) > 4:
            raise RuntimeError("out of luck")

    results = take_turns({"works": works, "fails": fails_later}, ["x", "y"], 1000.0, "cpu")
    assert results["fails"] == "RuntimeError: out of luck"
    turns = results["works"]["count"]
    assert turns >= 5 and calls[2:] == ["x", "y"] * (turns // 2) + ["x"] * (turns % 2)
    assert take_turns({"slow": lambda argument: time.sleep(0.05)}, ["x"], 1e-4, "cpu")["slow"]["count"] == 2


def test_layers_without_a_gpu(tmp_path, capsys):
    """Simulated: fewer operators, one for each result, and less kept."""
    path = tmp_path / "layers.json"
    assert kernels.main(["--layers", "--quick", "--out", str(path)]) == 0
    assert "simulated, nothing is timed" in capsys.readouterr().out
    rows = {(row["part"], row["form"]): row for row in json.loads(path.read_text())["results"]}
    results = {"RMSNorm": 3, "LayerNorm": 3, "rotary": 6, "SwiGLU": 4}  # and the upstream gradients, detached
    assert {part for part, _ in rows} == set(results)
    for part, count in results.items():
        ours, plain = rows[part, "ours"], rows[part, "plain"]
        assert ours["operators"] == count < plain["operators"] and ours["peak_bytes"] < plain["peak_bytes"]
        assert ours["kept_bytes"] <= plain["kept_bytes"]


def test_the_plain_layers_are_the_same_functions():
    for part in layers.PARTS:
        inputs, constants = layers.make_inputs(part, 3, "cpu")
        ours, plain = (layers.both_ways(form, inputs, constants) for form in (part.ours, part.plain))
        for a, b in zip(ours, plain, strict=True):
            assert layers.relative(a.double(), b.double()) < 1e-2
