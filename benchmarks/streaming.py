"""Streamed weights beside resident ones: peak memory, seconds per step, and whether the losses are the same.

    python benchmarks/streaming.py              on a GPU: QLoRA on OLMo-7B (random weights), 4 + 4 rows of 512 tokens
    python benchmarks/streaming.py --model allenai/OLMo-2-0325-32B --tokens 2048
    python benchmarks/streaming.py --apart      forget and retain rows in passes of their own, which copy twice as much
    python benchmarks/streaming.py --quick      anywhere: a small model, to see that it runs; times mean nothing

The first step's loss comes from forward passes alone and must be the same number with the same other switches (a tiled
MLP multiplies in other shapes); later ones come after backward kernels, some of which sum in no fixed order on a GPU.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    import checkout  # noqa: F401

import torch
from transformers import PrinterCallback

from benchmarks.shared import record
from benchmarks.shared.arguments import bundled_or_small, count
from benchmarks.shared.random_model import SAVED, save_random_model
from benchmarks.shared.record import reason
from benchmarks.speed import random_rows
from benchmarks.speed_parts.clock import WARM_UP, Clock, Watch, blank_tokenizer
from lowmem_npo.config import AdapterConfig, MemoryConfig, ModelConfig
from lowmem_npo.libraries import expand_segments, quiet_libraries
from lowmem_npo.memory.streaming import weight_stream
from lowmem_npo.memory.switches import apply_switches, load_base
from lowmem_npo.model import attach_lora
from lowmem_npo.model.loading import resolve_device
from lowmem_npo.training.trainer import NPOConfig, NPOTrainer

FILLED = 4 * 2**20  # bytes of each tensor that are random: the others cost disk, and change no time
ROWS = 4  # forget rows and retain rows of a step
LEAN: dict = {"offload_checkpoints": True, "tile_mlp": 1024, "embedding_on_cpu": True}
CONFIGURATIONS: dict[str, dict] = {
    "resident": {"gradient_checkpointing": "on"},
    "streamed": {"gradient_checkpointing": "on", "stream_weights": True},
    "streamed from files": {"gradient_checkpointing": "on", "stream_weights": True, "stream_from": "cache"},
    "resident, all switches": LEAN,
    "streamed, all switches": {**LEAN, "stream_weights": True},
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=bundled_or_small, default="allenai/OLMo-7B-hf", help="a bundled configuration")
    parser.add_argument("--tokens", type=count, default=512, help="of each row")
    parser.add_argument("--steps", type=count, default=3, help="measured ones")
    parser.add_argument("--apart", action="store_true", help="not forget and retain rows in one pass")
    parser.add_argument("--only", nargs="+", default=[], help="configurations whose name begins so")
    parser.add_argument("--models", type=Path, help="where the random model is, or is written")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    if not (torch.cuda.is_available() or options.quick):
        print("No GPU here: streamed weights need one. With --quick everything runs once on a small model.")
        return 0
    quiet_libraries()
    name, tokens = ("small", 24) if options.quick else (options.model, options.tokens)
    path = options.out or record.device_folder() / f"streaming{'-quick' if options.quick else ''}.json"
    folder = Path(tempfile.mkdtemp(prefix="streaming-"))
    try:
        models = options.models or (folder if options.quick else SAVED)
        directory = save_random_model(name, models, None if options.quick else FILLED)
        results: list[dict] = []
        for label, memory in CONFIGURATIONS.items():
            if options.only and not label.startswith(tuple(options.only)):
                continue
            cache = str(folder / "cache") if "stream_from" in memory else None
            model = ModelConfig(str(directory), qlora=True, double_quant="on", quantized_cache=cache)
            joint = 0 if options.apart else 2 * ROWS * tokens
            results.append({"configuration": label, **measure(model, memory, tokens, options.steps, folder, joint)})
            gc.collect()  # the model before, which is gone by now, is in cycles
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            print(line(results[-1]), flush=True)
            setting = {"model": name, "rows": [ROWS, ROWS], "tokens": tokens, "joint_pass_tokens": joint}
            record.write(path, "streamed weights", results, **setting)
    finally:
        shutil.rmtree(folder)
    print(f"Written to {path}")
    return 0 if all_alike(results) else 1


def all_alike(results: Sequence[dict]) -> bool:
    """Whether all were measured, with the same first loss as those with the same other switches."""
    alike = {(r["configuration"].partition(", ")[2], r.get("first_loss")) for r in results}
    return len(alike) == len({others for others, _ in alike}) and not any("missing" in r for r in results)


def measure(config: ModelConfig, memory: dict, tokens: int, steps: int, folder: Path, joint_pass_tokens: int) -> dict:
    """Seconds per step, peak bytes on the GPU, bytes of weights copied in a step, losses; or why not."""
    try:
        switches = MemoryConfig(**memory)
        device = resolve_device(config.device)
        torch.manual_seed(0)
        begin = time.perf_counter()
        base = load_base(config, switches, print)
        loading = time.perf_counter() - begin
        model = attach_lora(base, AdapterConfig())
        apply_switches(model, switches, device)
        arguments = NPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=ROWS,
            max_steps=WARM_UP + steps,
            joint_pass_tokens=joint_pass_tokens,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
        )
        forget, retain = random_rows(tokens, seed=1), random_rows(tokens, seed=2)
        trainer = NPOTrainer(model, arguments, forget, retain, processing_class=blank_tokenizer())
        trainer.remove_callback(PrinterCallback)
        watch = Watch(Clock(device), WARM_UP + steps)
        trainer.add_callback(watch)
        stream = weight_stream(model)
        before = stream.copied_bytes if stream else 0
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        copied = (stream.copied_bytes - before) // len(losses) if stream else 0
        summary = watch.clock.summary(forget + retain)
        figures = {"copied_bytes_per_step": copied, "loading_seconds": loading}
        return {**summary, **figures, "first_loss": losses[0], "losses": losses}
    except Exception as error:
        return {"missing": reason(error)}


def line(result: dict) -> str:
    """For people."""
    if "missing" in result:
        return f"{result['configuration']:<24} {result['missing']}"
    text = f"{result['configuration']:<24} {result['seconds_per_step']:8.3f} s/step"
    text += f"  {result['peak_bytes'] / 2**30:6.2f} GiB" if result["peak_bytes"] else ""
    return f"{text}  {result['copied_bytes_per_step'] / 2**30:7.2f} GiB copied  loss {result['first_loss']!r}"


if __name__ == "__main__":
    expand_segments()
    sys.exit(main())
