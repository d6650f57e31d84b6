"""Seconds of a training step on rows as long as LUME's and TOFU's, beside those that `lowmem-npo estimate` predicts.

Each way trains two epochs on the same rows, after a few steps that do not count: the first fills the cached reference,
the second reads it. The predictions are made afterwards, by processes that see no GPU: beside them, the host takes up
to twice as long to call what the GPU is to do.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PrinterCallback

from benchmarks.shared import record
from benchmarks.shared.baselines import Baseline
from benchmarks.speed_parts.clock import WARM_UP, Clock, Rows, Watch, blank_tokenizer
from benchmarks.speed_parts.row_lengths import real_rows
from benchmarks.speed_parts.side_by_side import DENSE, FILES, ROWS, padded
from lowmem_npo.config import AdapterConfig, MemoryConfig, ModelConfig, RunConfig, TrainingConfig
from lowmem_npo.estimate.background import Simulation
from lowmem_npo.estimate.gpus import Device, own_device
from lowmem_npo.estimate.report import Workload
from lowmem_npo.memory.switches import apply_switches
from lowmem_npo.model import attach_lora, load_model
from lowmem_npo.training.step_rows import StepBatches
from lowmem_npo.training.trainer import NPOConfig, NPOTrainer
from lowmem_npo.training.training_rows import Parts


class Way(NamedTuple):
    """A way to train: with which switches, which arguments of the trainer, and on rows of which data."""

    memory: dict[str, Any] | None  # None: the plain way
    arguments: dict[str, Any]
    data: tuple[str, ...] = tuple(FILES)


KEPT = {"gradient_checkpointing": "off", "reference": "cached", "joint_pass_tokens": 10**6}
APART = {**KEPT, "joint_pass_tokens": 0}
WAYS = {  # what says most comes first: time may run out
    "as a run decides where memory is plenty": Way(KEPT, {}),
    DENSE: Way(None, {}),
    "layers recomputed, live reference": Way({**APART, "gradient_checkpointing": "on", "reference": "live"}, {}),
    "forget and retain rows apart": Way(APART, {}, ("lume",)),
    "padded": Way(KEPT, {"padding_free": False}, ("lume",)),
}


def measure_real_rows(model: ModelConfig, steps: int, folder: Path, limit: float) -> Iterator[list[dict[str, Any]]]:
    """What each way takes for `steps` steps in each epoch, and what is predicted; those that are not begun within
    `limit` seconds are missing.

    Yields what there is by now, after each measurement and at last with the predictions. Of each way and data: "data",
    "way", "tokens" (real ones of a step), "seconds_per_step" and "predicted" (of the first epoch and of the second;
    None where nothing is predicted), "fastest" and "slowest", "peak_bytes" and "predicted_peak_bytes" (for the longest
    rows in one step); or "missing".
    """
    deadline, device = time.monotonic() + limit, own_device()
    rows = {data: real_rows(data, ROWS * steps) for data in FILES}
    tasks = [(data, way) for way in WAYS for data in WAYS[way].data]
    base = load_model(model)
    resident = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    results = []
    for number, (data, way) in enumerate(tasks):
        result: dict[str, Any] = {"data": data, "way": way}
        results.append(result)
        if time.monotonic() > deadline:
            result["missing"] = "not measured: the time limit was reached"
            yield results
            continue
        try:
            clock = _train(copy.deepcopy(base), WAYS[way], *rows[data], steps, folder / str(number))
            result |= _summary(clock, rows[data], steps)
            if result["peak_bytes"]:
                result["peak_bytes"] -= resident  # of the model that all are copies of
        except Exception as error:
            result["missing"] = record.reason(error)
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        yield results
    predictions = [_prediction(model, WAYS[way], rows[data], device) for data, way in tasks]
    for result, prediction in zip(results, predictions, strict=True):
        if "missing" not in result:
            result |= _predicted(prediction)
    yield results


def line(result: dict[str, Any]) -> str:
    """For people."""
    name = f"{result['data']:<5} {result['way']:<42}"
    if "missing" in result:
        return f"{name} {result['missing']}"
    seconds = " then ".join(f"{s:.3f}" for s in result["seconds_per_step"])
    text = f"{name} {result['tokens']:5.0f} tokens  {seconds} s/step"
    if result.get("predicted"):
        text += f" (predicted {' then '.join(f'{s:.3f}' for s in result['predicted'])})"
    if result["peak_bytes"]:
        text += f"  {result['peak_bytes'] / 2**30:.2f} GiB"
    return text


def _prediction(model: ModelConfig, way: Way, rows: tuple[Rows, Rows], device: Device | None) -> Simulation | None:
    if way.memory is None or not way.arguments.get("padding_free", True):
        return None
    config = RunConfig(model, memory=MemoryConfig(**way.memory), training=TrainingConfig(batch_size=ROWS, epochs=2))
    return Simulation(config, Workload.of_data(config, Parts(*rows)), device)


def _predicted(simulation: Simulation | None) -> dict[str, Any]:
    if simulation is None:
        return {"predicted": None, "predicted_peak_bytes": None}
    report = simulation.report()
    seconds = None if report.time is None else [report.time.first.total, report.time.later.total]
    return {"predicted": seconds, "predicted_peak_bytes": report.estimate.peak_bytes}


def _train(model: PreTrainedModel, way: Way, forget: Rows, retain: Rows, steps: int, folder: Path) -> Clock:
    """Two epochs."""
    if way.memory is None:
        return _train_plainly(model, forget, retain, steps)
    adapted = attach_lora(model, AdapterConfig())
    apply_switches(adapted, MemoryConfig(**way.memory))
    clock = Clock(model.device, warm_up=0)
    for part, count in (("warm-up", WARM_UP), ("run", 2 * steps)):
        cache = str(folder / part / "reference") if way.memory["reference"] == "cached" else None
        arguments = NPOConfig(
            output_dir=str(folder / part), per_device_train_batch_size=ROWS, max_steps=count, reference_dir=cache,
            joint_pass_tokens=way.memory["joint_pass_tokens"], save_strategy="no", report_to="none",
            disable_tqdm=True, use_cpu=model.device.type == "cpu", **way.arguments,
        )  # fmt: skip
        trainer = NPOTrainer(adapted, arguments, forget, retain, processing_class=blank_tokenizer())
        trainer.remove_callback(PrinterCallback)
        if part == "run":
            trainer.add_callback(Watch(clock, count))
        trainer.train()
    return clock


def _train_plainly(model: PreTrainedModel, forget: Rows, retain: Rows, steps: int) -> Clock:
    device = model.device
    baseline = Baseline.build(lambda: model, two_models=False, lora=True, r=AdapterConfig().lora_r)
    order = StepBatches(len(forget), len(retain), ROWS, ROWS, seed=TrainingConfig.seed)
    clock = Clock(device, WARM_UP)
    clock.tick()
    for step in [*range(WARM_UP), *range(2 * steps)]:
        parts = zip((forget, retain), order.step_rows(step), strict=True)
        baseline.step(*({k: v.to(device) for k, v in padded([rows[i] for i in own]).items()} for rows, own in parts))
        clock.tick()
    return clock


def _summary(clock: Clock, rows: tuple[Rows, Rows], steps: int) -> dict[str, Any]:
    epochs = [clock.seconds[:steps], clock.seconds[steps:]]
    return {
        "tokens": sum(len(row["input_ids"]) for part in rows for row in part) / steps,
        "seconds_per_step": [mean(epoch) for epoch in epochs],
        "fastest": [min(epoch) for epoch in epochs],
        "slowest": [max(epoch) for epoch in epochs],
        "peak_bytes": clock.peak_bytes,
    }
