"""What auto becomes on a CPU, what a resumed run keeps of it, and how the options are spelled."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from helpers.tiny_models import CONFIGS, tiny_model

from lowmem_npo.commands.arguments import parse_run
from lowmem_npo.config import MemoryConfig, ModelConfig, ObjectiveConfig, OutputConfig, RunConfig, TrainingConfig
from lowmem_npo.data import TokenizedRows
from lowmem_npo.data.chat import today
from lowmem_npo.estimate import automatic
from lowmem_npo.estimate.automatic import SIMULATING, activations_at_most, as_begun, decide
from lowmem_npo.estimate.rows import StepRows, token_row
from lowmem_npo.training.arguments import npo_config

ROWS = TokenizedRows([token_row(20, 10)] * 8, [], 0)


def data(alternatives=None):
    rows = {"forget": ROWS, "forget_trained": ROWS, "forget_targets": ROWS, "retain": ROWS}
    return SimpleNamespace(**rows, alternatives=alternatives, alternatives_are_unwritten=False)


def run(folder, **sections) -> RunConfig:
    model = ModelConfig("tiny", device="cpu", dtype="float32")
    return RunConfig(model, output=OutputConfig(output_dir=str(folder / "run")), **sections)


def decided(config: RunConfig, alternatives=None) -> tuple[RunConfig, list[str]]:
    lines: list[str] = []
    return decide(config, data(alternatives), CONFIGS["llama"](97), lines.append)[0], lines


def test_shortened_rows_keep_what_the_adversary_is_taught():
    rows = StepRows(((8, 7),), ((8, 7),), (), ((8, 7),) * 3)
    assert rows.at_most(8, True) == StepRows(((4, 3),), ((4, 3),), (), rows.taught_again)


def test_a_small_run_on_a_cpu_recomputes_nothing_and_caches_its_reference(tmp_path):
    config, lines = decided(run(tmp_path))
    assert (config.memory.gradient_checkpointing, config.memory.reference) == ("off", "cached")
    assert (config.model.double_quant, config.memory.joint_pass_tokens) == ("on", 0)
    asked = run(tmp_path, memory=MemoryConfig(joint_pass_tokens=300))
    assert npo_config(decided(asked)[0]).joint_pass_tokens == 300
    assert [line.partition(":")[0] for line in lines if "Layers" in line] == ["Layers are not recomputed"]
    assert any(line.startswith("Reference cache in") for line in lines) and SIMULATING not in lines


@pytest.mark.parametrize(
    ("training", "memory", "reference"),
    [
        (TrainingConfig(epochs=1), {}, "live"),
        (TrainingConfig(max_steps=2), {}, "live"),
        (TrainingConfig(max_steps=3), {}, "cached"),
        (TrainingConfig(batch_size=3, max_steps=3), {}, "live"),  # one epoch, whose last step is short
        (TrainingConfig(epochs=1), {"reference_dir": "shared"}, "cached"),
        (TrainingConfig(epochs=1), {"reference": "cached"}, "cached"),
        (TrainingConfig(), {"reference": "live"}, "live"),
    ],
)
def test_the_reference_is_cached_where_it_is_read_again(training, memory, reference, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert decided(run(tmp_path, training=training, memory=MemoryConfig(**memory)))[0].memory.reference == reference


@pytest.mark.parametrize(("steps", "reference"), [(2, "live"), (4, "cached")])
def test_other_answers_do_not_lengthen_an_epoch(steps, reference, tmp_path):
    """Eight rows to forget, each with another answer: two steps of four are an epoch."""
    asked = run(tmp_path, training=TrainingConfig(max_steps=steps))
    data = replace(asked.data, alternative_column="other")
    asked = replace(asked, objective=ObjectiveConfig(forget_term="dpo"), data=data)
    config, _ = decided(asked, alternatives=ROWS)
    assert config.memory.reference == reference


def test_without_room_on_the_disk_the_reference_is_live(tmp_path, monkeypatch):
    monkeypatch.setattr("lowmem_npo.files.free_bytes", lambda directory: 100)
    config, lines = decided(run(tmp_path))
    assert config.memory.reference == "live"
    assert any("The reference runs in every step" in line and "100 bytes free" in line for line in lines)


def test_layers_are_recomputed_where_memory_is_short(tmp_path, monkeypatch):
    """The simulation says so: it runs in a process of its own."""
    monkeypatch.setattr(automatic, "available_memory", lambda: 2**20)
    tiny_model("llama").save_pretrained(tmp_path / "model")
    config = run(tmp_path)
    config, lines = decided(replace(config, model=replace(config.model, model=str(tmp_path / "model"))))
    assert config.memory.gradient_checkpointing == "on" and any("Layers are recomputed" in line for line in lines)
    assert lines[-2] == SIMULATING and lines.count(SIMULATING) == 1


def test_a_resumed_run_keeps_what_was_decided(tmp_path):
    config, _ = decided(run(tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text(config.to_yaml())
    fresh = run(tmp_path)
    begun = as_begun(fresh)  # not resumed
    assert begun == replace(fresh, data=replace(fresh.data, chat_date=today()))
    resumed = as_begun(replace(fresh, output=replace(fresh.output, resume=True)))
    assert (resumed.memory, resumed.model) == (config.memory, config.model)


@pytest.mark.parametrize(
    ("objective", "memory"),
    [
        ({"forget_term": "ga", "gamma": 1.0, "delta": 0.0}, {"reference_dir": "shared"}),  # needs none: it is live
        ({}, {"offload_checkpoints": True}),  # of a run that recomputed nothing
    ],
)
def test_a_resumed_run_decides_anew_what_an_option_rules_out(objective, memory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fresh = run(tmp_path, objective=ObjectiveConfig(**objective), memory=MemoryConfig(**memory))
    began = fresh if objective else run(tmp_path)
    config, _ = decided(began)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text(config.to_yaml())
    again = decided(as_begun(replace(fresh, output=replace(fresh.output, resume=True))))[0].memory
    assert again == decided(fresh)[0].memory
    assert (config.memory.reference, again.gradient_checkpointing) == (
        ("live", "off") if objective else ("cached", "on")
    )


def test_the_bound_is_above_what_a_simulated_step_keeps():
    from lowmem_npo.estimate.step import estimate

    architecture, rows = CONFIGS["llama"](97), StepRows(((64, 63),) * 4, ((64, 63),) * 4)
    off = MemoryConfig(gradient_checkpointing="off", sliced_float32=False)
    kept = estimate(RunConfig(ModelConfig("tiny", dtype="float32", attn="eager"), memory=off), architecture, rows)
    assert kept.by_kind["layer work"] < activations_at_most(architecture, rows)


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        ([], "auto"), (["--gradient-checkpointing"], "on"), (["--no-gradient-checkpointing"], "off"),
        (["--gradient-checkpointing", "off"], "off"), (["--gradient-checkpointing=true"], "on"),
        (["--gradient_checkpointing", "False"], "off"), (["--activation-checkpointing"], "on"),
        (["--gradient-checkpointing", "auto", "--qlora"], "auto"),
    ],
)  # fmt: skip
def test_the_old_spellings_still_work(flags, value, tmp_path):
    assert parse_run(["--model", "x", *flags], "train").memory.gradient_checkpointing == value
    (tmp_path / "run.yaml").write_text("model: x\ngradient_checkpointing: off\ndouble_quant: on\n")
    config = parse_run(["--config", str(tmp_path / "run.yaml")], "train")
    assert (config.memory.gradient_checkpointing, config.model.double_quant) == ("off", "on")
    assert parse_run(["--model", "x", "--no-double-quant"], "train").model.double_quant == "off"
