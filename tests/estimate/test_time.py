"""Predicted time: the formula by hand, the table of GPUs, and what a step of a 7B model is counted as."""

from __future__ import annotations

import json

import pytest

from lowmem_npo.cli import main
from lowmem_npo.config import DataConfig, MemoryConfig, ModelConfig, RunConfig, TrainingConfig
from lowmem_npo.errors import UserError
from lowmem_npo.estimate.gpus import GPUS, named, of_device_name
from lowmem_npo.estimate.report import Workload
from lowmem_npo.estimate.rows import StepRows, token_row
from lowmem_npo.estimate.simulator.work import VIEW, Operation
from lowmem_npo.estimate.step import Estimate, estimate
from lowmem_npo.estimate.time import CALL, SHORTEST, RunTime, Seconds, seconds, step_seconds
from lowmem_npo.estimate.time import VIEW as VIEW_SECONDS
from lowmem_npo.model.known_configs import known_config
from lowmem_npo.training.training_rows import Parts

A100 = named("a100-40gb").model
LINEAR = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)  # parameters of OLMo-7B's linear layers, without the head


def product(seconds: float) -> Operation:
    """One that takes this long."""
    return Operation("kernel", flops=int(seconds * 0.9 * 0.84 * 312e12), part="product")


def test_the_slower_of_arithmetic_and_memory_bounds_a_kernel_and_the_host_those_that_are_short():
    assert seconds([product(2.0)], A100).total == pytest.approx(2.0, rel=1e-3)
    moves = Operation("kernel", bytes=int(3 * 0.8 * 1555e9))
    assert seconds([moves], A100).total == pytest.approx(3.0, rel=1e-3)
    both = product(2.0)._replace(bytes=moves.bytes)
    assert seconds([both], A100).total == pytest.approx(3.0, rel=1e-3)
    single = product(2.0)._replace(half=False)  # without tensor cores
    assert seconds([single], A100).total == pytest.approx(2.0 * 0.84 * 312 / 19.5, rel=1e-3)
    attention = product(2.0)._replace(part="attention")
    assert seconds([attention], A100).total == pytest.approx(2.0 * 0.9 * 0.84 / 0.4, rel=1e-3)
    small = [Operation("kernel", bytes=8)] * 1000
    assert seconds(small, A100) == pytest.approx((1000 * CALL + SHORTEST, 1000 * SHORTEST, 1000 * CALL, 0.0), rel=1e-6)
    assert seconds([VIEW] * 1000, A100).total == pytest.approx(1000 * VIEW_SECONDS)


def test_the_host_runs_ahead_until_it_waits():
    calls = round(1 / CALL)
    small = [Operation("kernel", bytes=8)] * calls  # a second of the host
    ahead = seconds([product(1.0), *small], A100).total
    waiting = seconds([product(1.0), Operation("kernel", waits=True), *small], A100).total
    assert ahead == pytest.approx(1.0 + calls * SHORTEST, rel=0.01)
    assert waiting == pytest.approx(2.0, rel=0.01)


def test_copies_run_beside_the_kernels():
    copy = Operation("copy", bytes=int(0.8 * 32e9))  # a second of the bus
    assert seconds([copy, product(3.0)], A100).total == pytest.approx(3.0, rel=0.01)
    assert seconds([copy] * 4 + [product(3.0)], A100).total == pytest.approx(4.0, rel=0.01)
    assert seconds([copy._replace(waits=True), product(3.0)], A100).total == pytest.approx(4.0, rel=0.01)


def test_micro_batches_repeat_all_but_the_optimizer():
    work = [("policy", [product(1.0)]), ("reference", [product(0.5)]), ("optimizer", [product(0.25)])]
    assert step_seconds(work, 3, A100).total == pytest.approx(4.75, rel=1e-3)


def test_the_hours_of_a_run_count_its_first_epoch_apart():
    run = RunTime(Seconds(4.0, 4.0, 0.5), Seconds(3.0, 3.0, 0.4), steps=(100, 900))
    assert run.hours == pytest.approx(3100 / 3600) and run.mean(0, 1000) == pytest.approx(3.1)
    assert run.mean(500, 1000) == 3.0 and run.mean(0, 50) == run.mean(50, 50) == 4.0  # resumed, stopped, and neither
    assert run.mean(50, 150) == pytest.approx(3.5)
    text = " ".join(run.lines("rtx-3090"))
    assert "4.00 s, 3.00 s once the reference is cached" in text and "all 1000 steps: 51.7 minutes" in text
    assert "checked on two GPUs" in text


DEVICES = {
    "NVIDIA GeForce RTX 3090": "rtx-3090", "NVIDIA GeForce RTX 4090": "rtx-4090", "NVIDIA GeForce RTX 5090": "rtx-5090",
    "NVIDIA A100-SXM4-40GB": "a100-40gb", "A100-PCIE-40GB": "a100-40gb", "NVIDIA A100 80GB PCIe": "a100-80gb",
    "NVIDIA A100-SXM4-80GB": "a100-80gb", "NVIDIA H100 80GB HBM3": "h100-sxm", "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H200": "h200", "NVIDIA L4": "l4", "Tesla T4": "t4",
}  # fmt: skip
OTHERS = (
    "NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA L40S",
    "NVIDIA L40", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H100 NVL", "NVIDIA GH200 480GB", "NVIDIA A10", "",
)  # fmt: skip


def test_a_gpu_is_known_by_its_whole_name():
    assert {name: of_device_name(name).name for name in DEVICES} == DEVICES
    assert set(DEVICES.values()) == {gpu.name for gpu in GPUS}
    assert [of_device_name(name) for name in OTHERS] == [None] * len(OTHERS)


def test_gpus_are_named_in_the_usual_spellings():
    for spelling in ("rtx-4090", "RTX 4090", "4090", "NVIDIA GeForce RTX 4090", "rtx_4090"):
        assert named(spelling).name == "rtx-4090"
    assert named("H100").name == "h100-sxm" and named("a100-80").capability == (8, 0)
    for unknown in ("rtx-1080", "mi300x", "", "409"):
        with pytest.raises(UserError, match="nothing is known of this GPU.* known: rtx-3090"):
            named(unknown)


@pytest.fixture(scope="module")
def step() -> dict[str, Estimate]:
    """OLMo-7B, QLoRA, 4 x 512 + 4 x 512 tokens, all of them answer: with and without recomputation."""
    model = ModelConfig("allenai/OLMo-7B", qlora=True, double_quant="off")
    runs = {value: MemoryConfig(gradient_checkpointing=value) for value in ("on", "off")}
    architecture, data = known_config("allenai/OLMo-7B-hf"), DataConfig(max_length=512)
    return {v: estimate(RunConfig(model, data, memory=m), architecture, later=True) for v, m in runs.items()}


def operations(work) -> list[Operation]:
    return [operation for _, some in work for operation in some]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recomputed", "reference", "passes"), [("on", "work", 8), ("on", "later_work", 6), ("off", "work", 6),
                                            ("off", "later_work", 4)],
)  # fmt: skip
def test_a_token_costs_as_many_passes_as_there_must_be(step, recomputed, reference, passes):
    """2N in each pass: policy, its backward, and where they are, reference and recomputation (which ends before a
    layer's last product). Head and attention come on top: 1 product of the head for the reference's log-probs, 2 for
    the policy's, and 3 for the retain part."""
    counted = operations(getattr(step[recomputed], reference))
    tokens = 4 * 512
    head = 2 * 50304 * 4096 * 4 * 511 * (2 + 3 + (1 if reference == "work" else 0))
    flops = sum(operation.flops for operation in counted if operation.part == "product")
    spared = 2 * 32 * 11008 * 4096 * 2 * tokens if recomputed == "on" else 0
    assert flops - head == pytest.approx(passes * LINEAR * 2 * tokens - spared, rel=0.01)
    attention = sum(operation.flops for operation in counted if operation.part == "attention")
    assert 0 < attention < 0.03 * flops  # at 512 tokens


def test_the_host_calls_few_operators_and_rarely_waits(step):
    """17,900 calls and 28 waits before."""
    for recomputed, reference, most in (("on", "work", 11_000), ("off", "work", 9_000), ("off", "later_work", 7_000)):
        counted = operations(getattr(step[recomputed], reference))
        assert 1_000 < sum(operation.kind != "view" for operation in counted) <= most, (recomputed, reference)
        assert sum(operation.waits for operation in counted) <= 1


def test_the_predicted_seconds_are_those_of_a_roofline_by_hand(step):
    """8N FLOP a token at what such products reach, elementwise work and dequantisation: 4.2 s, 2.0 s, 0.54 s."""
    by_hand = {"rtx-3090": 4.2, "rtx-4090": 2.0, "h100-sxm": 0.54}
    for name, expected in by_hand.items():
        assert step_seconds(step["on"].work, 1, named(name).model).total == pytest.approx(expected, rel=0.35)


def test_a_typical_step_has_as_many_tokens_as_steps_have_on_average():
    config = RunConfig(ModelConfig("known"), training=TrainingConfig(batch_size=4, epochs=3))
    lengths = [8, 10, 12, 14, 16, 18, 20, 200]
    rows = [token_row(length, length // 2) for length in lengths]
    load = Workload.of_data(config, Parts(rows, rows[:2]))
    assert load.largest.forget == ((200, 100), (20, 10), (18, 9), (16, 8))
    assert sum(length for length, _ in load.typical.forget) / 4 == pytest.approx(sum(lengths) / 8, rel=0.8)
    assert len(load.typical.retain) == 4 and (load.steps, load.epoch_steps) == (6, 2)
    assert Workload.of_length(config).typical == StepRows.of_length(config)


def test_the_command_predicts_time_for_a_gpu_that_is_named(capsys):
    small = ["estimate", "--model", "allenai/OLMo-2-0425-1B", "--max-length", "16", "--batch-size", "1"]
    assert main([*small, "--gpu", "rtx-4090", "--max-steps", "100", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["gpu"] == "rtx-4090" and result["compute_capability"] == [8, 9] and result["flags"]
    assert (
        result["time"]["steps"] == 100
        and result["time"]["hours"] > 0
        and "checked on two GPUs" in result["time"]["error"]
    )
    assert main(small) == 0
    assert "--gpu NAME predicts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "t4"], "t4 has no bf16 arithmetic (it needs compute capability 8.0): use --dtype float32"),
        (["--gpu", "voodoo2"], "--gpu voodoo2: nothing is known of this GPU"),
        (["--gpu"], "--gpu needs a value"),
    ],
)
def test_gpus_without_a_prediction_are_refused_in_a_sentence(arguments, message, capsys):
    assert main(["estimate", "--model", "allenai/OLMo-2-0425-1B", *arguments]) == 2
    assert message in capsys.readouterr().err
