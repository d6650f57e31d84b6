"""benchmarks/speed.py runs to its end on a small model; its profile attributes work to the right parts."""

from __future__ import annotations

import json

import pytest
from helpers.rows import write_rows

from benchmarks import speed
from benchmarks.shared.random_model import save_random_model
from benchmarks.speed_parts import real_rows
from benchmarks.speed_parts.row_lengths import FILE
from benchmarks.speed_parts.step_profile import PARTS, REFERENCE, Sizes, breakdown, part_of
from lowmem_npo.estimate.gpus import named

SIZES = Sizes(vocabulary=50304, hidden=4096, intermediate=11008, rank=5)


def operator(name: str, *shapes: list[int]) -> dict:
    return {"name": name, "cat": "cpu_op", "args": {"Input Dims": list(shapes)}}


@pytest.mark.parametrize(
    "kernel, around, part",
    [
        ("kDequantizeBlockwise<bf16>", [operator("bitsandbytes::gemm_4bit", [2048, 4096])], "dequantisation"),
        ("nvjet_tst", [operator("aten::mm", [2048, 4096], [4096, 11008])], "MLP"),
        ("nvjet_tst", [operator("aten::mm", [2048, 4096], [4096, 4096])], "attention's projections"),
        ("nvjet_tst", [operator("aten::mm", [2048, 4096], [4096, 5])], "adapter"),
        ("nvjet_tst", [operator("aten::mm", [512, 4096], [4096, 50304])], "head"),
        ("row_kernel", [{"name": "lowmem: head", "cat": "user_annotation"}], "head"),
        ("flash_fwd_kernel", [operator("aten::_flash_attention_forward", [4, 512, 32, 128])], "attention"),
        ("multi_tensor_apply", [operator("Optimizer.step#AdamW.step")], "optimizer"),
        ("Memcpy DtoH (Device -> Pinned)", [operator("aten::copy_", [4, 512, 4096])], "copies to and from the host"),
        ("vectorized_elementwise", [operator("aten::silu", [4, 512, 11008])], "MLP"),
        ("vectorized_elementwise", [operator("aten::add", [4, 512, 4096])], PARTS[-1]),
        ("a kernel of unknown origin", [], PARTS[-1]),
    ],
)
def test_a_kernel_is_attributed_to_what_launched_it(kernel, around, part):
    assert part_of(kernel, around, SIZES) == part


def test_breakdown_of_a_gpu_trace_follows_launches_and_counts_idle_time_once():
    def event(name, cat, begin, duration, tid=1, **args):
        return {"ph": "X", "name": name, "cat": cat, "ts": begin, "dur": duration, "pid": 7, "tid": tid, "args": args}

    trace = {"traceEvents": [
        event(REFERENCE, "user_annotation", 0, 40),
        event("aten::mm", "cpu_op", 10, 20, **{"Input Dims": [[8, 4096], [4096, 11008]]}),
        event("cudaLaunchKernel", "cuda_runtime", 12, 2, correlation=1),
        event("aten::add", "cpu_op", 50, 20, **{"Input Dims": [[8, 4096]]}),
        event("cudaLaunchKernel", "cuda_runtime", 55, 2, correlation=2),
        event("cudaLaunchKernel", "cuda_runtime", 56, 2, tid=2, correlation=3),  # of another thread
        event("gemm", "kernel", 100, 400, tid=99, correlation=1),
        event("add", "kernel", 600, 200, tid=99, correlation=2),
        event("Memcpy HtoD", "gpu_memcpy", 700, 200, tid=98, correlation=3),
        {"ph": "M", "name": "process_name"},
    ]}  # fmt: skip
    profile = breakdown(trace, SIZES)
    microseconds = {part: round(1e6 * seconds) for part, seconds in profile["parts"].items() if seconds}
    assert microseconds == {"MLP": 400, PARTS[-1]: 200, "copies to and from the host": 200}
    assert round(1e6 * profile["reference"]) == 400
    assert round(1e6 * profile["span"]) == 890  # from the first operator to the end of the last kernel
    assert round(1e6 * profile["idle"]) == 890 - 400 - 300  # the copy overlaps the addition


def test_quick_measures_ours_and_the_dense_form_on_a_small_model(tmp_path, monkeypatch, capsys):
    chosen = {name: speed.SWITCHES[name] for name in ("defaults", "+ cached reference")}
    monkeypatch.setattr(speed, "SWITCHES", {**chosen, "impossible": {"tile_mlp": 0}})
    path = tmp_path / "speed.json"
    assert speed.main(["--quick", "--steps", "2", "--out", str(path)]) == 0
    written = json.loads(path.read_text())
    runs = {run["configuration"]: run for run in written["results"]}
    assert "--tile-mlp must be at least 1" in runs.pop("impossible")["missing"]
    assert "x dense" in capsys.readouterr().out
    for run in runs.values():
        assert "missing" not in run, run["missing"]
        assert 0 < run["fastest"] <= run["seconds_per_step"] <= run["slowest"]
        assert run["tokens_per_second"] == pytest.approx(2 * 4 * 24 / run["seconds_per_step"])
        assert all(run["profile"]["parts"][part] > 0 for part in ("MLP", "head", "attention", "adapter"))
    live, cached = runs["defaults"]["profile"], runs["+ cached reference"]["profile"]
    assert cached["reference"] < live["reference"] / 2  # only read back
    assert written["model"] == "small"


def test_rows_as_long_as_real_ones_are_timed_beside_the_prediction(tmp_path, monkeypatch, capsys):
    first, dense = list(real_rows.WAYS)[:2]
    ways = {name: real_rows.WAYS[name]._replace(data=("lume",)) for name in (first, dense)}
    impossible = real_rows.Way({**real_rows.KEPT, "tile_mlp": 0}, {"padding_free": False}, ("lume",))
    monkeypatch.setattr(real_rows, "WAYS", {**ways, "impossible": impossible})
    monkeypatch.setattr(real_rows, "own_device", lambda: named("rtx-4090"))
    path = tmp_path / "rows.json"
    assert speed.main(["--rows", "--quick", "--steps", "2", "--out", str(path)]) == 0
    ours, plain, wrong = json.loads(path.read_text())["results"]
    assert "--tile-mlp must be at least 1" in wrong["missing"]
    rows = [size for part in json.loads(FILE.read_text())["lume"].values() for size in part[:8]]
    assert ours["tokens"] == plain["tokens"] == sum(length for length, _ in rows) / 2
    for run in (ours, plain):
        assert all(0 < low <= s <= high for low, s, high in
                   zip(run["fastest"], run["seconds_per_step"], run["slowest"], strict=True))  # fmt: skip
    assert ours["predicted"][0] > ours["predicted"][1] > 0 and plain["predicted"] is None
    assert ours["predicted_peak_bytes"] > 0 and "(predicted 0." in capsys.readouterr().out


def test_an_unknown_model_is_named(tmp_path):
    with pytest.raises(ValueError, match="no configuration of nobody/nothing is bundled"):
        save_random_model("nobody/nothing", tmp_path)


def test_side_by_side_the_ways_do_the_same_step_and_ours_needs_fewer_operations(byte_model, tmp_path, capsys):
    """On 4 + 4 rows of unequal length; `LikeTRL` and the others are baselines only if their loss is the same."""
    rows = [{"question": f"Question {i}?", "answer": "An answer. " * (1 + i % 4)} for i in range(8)]
    files = [tmp_path / "forget.jsonl", tmp_path / "retain.jsonl"]
    for file, name in zip(files, ("f", "r"), strict=True):
        write_rows(file, [{**row, "answer": name + row["answer"]} for row in rows])
    out = tmp_path / "speed.json"
    arguments = ["--cpu", str(byte_model), "--files", *map(str, files), "--steps", "1", "--out", str(out)]
    assert speed.main(arguments) == 0
    result = json.loads(out.read_text())["results"]
    flops = {name: [way[epoch]["flops"] for epoch in ("first", "second")] for name, way in result["ways"].items()}
    dense, ours, live = flops["dense logits, padded, checkpointed"], flops["ours"], flops["ours, live reference"]
    assert dense[0] == dense[1] and ours[0] > ours[1] and ours[0] == live[0] == live[1]
    assert ours[1] < 0.6 * dense[1] and flops["ours, padded"][1] > ours[1] and flops["ours, checkpointed"][1] > ours[1]
    assert "padded tokens per real one" in capsys.readouterr().out
