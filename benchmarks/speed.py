"""How long a training step takes: by default, with each memory switch, and done the plain way; and where time goes.

    python benchmarks/speed.py             on a GPU: QLoRA on OLMo-7B (random weights), 4 + 4 rows of 512 tokens
    python benchmarks/speed.py --rows      on a GPU: the same model on rows as long as LUME's and TOFU's, as a run would
                                           train on them and in other ways, beside the predicted seconds
    python benchmarks/speed.py --quick     anywhere: a small model, to see that it (or --rows) runs; times mean nothing
    python benchmarks/speed.py --cpu DIR --data lume|tofu
                                           a real model on real rows, side by side with the plain ways, on the processor

"dense logits" is benchmarks/shared/baselines.py: the same 4-bit model, one model with LoRA, all logits. Ours is timed
inside `NPOTrainer.train`, from one optimiser step to the next, with everything a run does there. Without real rows they
are random answer tokens throughout: the most work the head can get.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

if __name__ == "__main__":
    import checkout  # noqa: F401

import torch
from lowmem_kernels import IGNORE_INDEX
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback

from benchmarks.shared import record
from benchmarks.shared.arguments import bundled_or_small, count, minutes
from benchmarks.shared.baselines import Baseline
from benchmarks.shared.random_model import SAVED, save_random_model
from benchmarks.shared.record import reason
from benchmarks.speed_parts.clock import WARM_UP, Clock, Rows, Watch, blank_tokenizer
from benchmarks.speed_parts.real_rows import line, measure_real_rows
from benchmarks.speed_parts.side_by_side import FILES
from benchmarks.speed_parts.side_by_side import measure as measure_on_cpu
from benchmarks.speed_parts.step_profile import Sizes, breakdown, marked, profiled
from benchmarks.speed_parts.table import markdown
from lowmem_npo.config import AdapterConfig, MemoryConfig, ModelConfig
from lowmem_npo.libraries import quiet_libraries
from lowmem_npo.memory.switches import apply_switches
from lowmem_npo.model import attach_lora, load_model
from lowmem_npo.training.trainer import NPOConfig, NPOTrainer

DENSE = "one model, LoRA, dense logits"
SWITCHES: dict[str, dict] = {  # what says most comes first: time may run out
    "defaults": {},
    "+ cached reference": {"reference": "cached"},
    "+ all three": {"offload_checkpoints": True, "tile_mlp": 1024, "embedding_on_cpu": True},
    "without gradient_checkpointing": {"gradient_checkpointing": "off"},
    "+ offload_checkpoints": {"offload_checkpoints": True},
    "+ tile_mlp": {"tile_mlp": 1024},
    "+ embedding_on_cpu": {"embedding_on_cpu": True},
    "without sliced_float32": {"sliced_float32": False},
}
DATA = Path(os.environ.get("LOWMEM_NPO_TEST_DATA") or "../shared/data")
ROWS = 4  # forget rows and retain rows of a step


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.cpu:
        return main_on_cpu(options)
    gpu = torch.cuda.is_available()
    if not (gpu or options.quick):
        print("No GPU here: the times of a step need one. With --quick everything runs once on a small model.")
        return 0
    if options.rows:
        return main_on_real_rows(options)
    name, tokens = ("small", 24) if options.quick else (options.model, options.tokens)
    path = options.out or record.device_folder() / ("speed-quick.json" if options.quick else "speed.json")
    deadline = time.monotonic() + 60 * options.minutes
    folder = Path(tempfile.mkdtemp(prefix="speed-"))
    about = {"model": name, "rows": [ROWS, ROWS], "tokens": tokens, "steps": options.steps, "qlora": gpu}
    try:
        directory = save_random_model(name, options.models or (folder if options.quick else SAVED))
        base = load_model(ModelConfig(str(directory), qlora=gpu))
        runs: list[dict] = []
        first, *others = SWITCHES
        for label in (first, DENSE, *others):
            if time.monotonic() > deadline:
                run = {"missing": "not measured: the time limit was reached"}
            else:
                run = measure(label, base, tokens, options.steps, folder)
            runs.append({"configuration": label, **run})
            show(runs)
            record.write(path, "speed", runs, **about)
        for run in runs[:3]:  # last: once used, the profiler slows down what follows
            run |= measure(run["configuration"], base, tokens, 0, folder)
            show_profile(run)
            record.write(path, "speed", runs, **about)
    finally:
        shutil.rmtree(folder)
    print(f"Written to {path}")
    return 0


def main_on_real_rows(options: argparse.Namespace) -> int:
    name, qlora = ("small", False) if options.quick else (options.model, True)
    path = options.out or record.device_folder() / f"speed-rows{'-quick' if options.quick else ''}.json"
    folder = Path(tempfile.mkdtemp(prefix="speed-"))
    try:
        directory = save_random_model(name, options.models or (folder if options.quick else SAVED))
        model = ModelConfig(str(directory), qlora=qlora, double_quant="off")
        results: list[dict] = []
        for results in measure_real_rows(model, options.steps, folder, 60 * options.minutes):
            print(line(results[-1]), flush=True)
            record.write(path, "speed on real rows", results, model=name, rows=[ROWS, ROWS], steps=options.steps)
        print("\nBeside what is predicted:", *map(line, results), sep="\n")
    finally:
        shutil.rmtree(folder)
    print(f"Written to {path}")
    return 0


def main_on_cpu(options: argparse.Namespace) -> int:
    quiet_libraries()
    torch.set_num_threads(options.threads)
    folder = Path(tempfile.mkdtemp(prefix="speed-"))
    files = options.files or [options.folder / file for file in FILES[options.data]]
    try:
        result = measure_on_cpu(options.cpu, files, options.steps, folder, say=lambda line: print(line, flush=True))
    finally:
        shutil.rmtree(folder)
    path = options.out or record.RESULTS / "cpu" / f"speed-{options.data}.json"
    about = {"model": options.cpu.name, "rows": [ROWS, ROWS], "steps": options.steps, "threads": options.threads}
    record.write(path, "speed on a processor", result, data=options.data, **about)
    print(markdown(result))
    print(f"Written to {path}")
    return 0


def measure(label: str, base: PreTrainedModel, tokens: int, steps: int, folder: Path) -> dict:
    """Seconds per step, tokens per second and peak bytes on the GPU; of 0 steps a profile of one after the warm-up; or
    under "missing" why not."""
    try:
        model, forget, retain = copy.deepcopy(base), random_rows(tokens, seed=1), random_rows(tokens, seed=2)
        if label == DENSE:
            return _measure_dense(model, forget, retain, steps)
        memory = MemoryConfig(**SWITCHES[label])
        return _measure_ours(model, memory, forget, retain, steps, folder / label.replace(" ", "-") / str(steps))
    except Exception as error:
        return {"missing": reason(error)}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def random_rows(tokens: int, seed: int) -> Rows:
    """ROWS rows of `tokens` random tokens, all answer tokens but the first."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 500, (ROWS, tokens), generator=generator).tolist()
    return [{"input_ids": row, "labels": [IGNORE_INDEX, *row[1:]], "prompt_length": 1} for row in ids]


def _measure_dense(model: PreTrainedModel, forget: Rows, retain: Rows, steps: int) -> dict:
    rank = AdapterConfig().lora_r
    batches = [_batch(rows, model.device) for rows in (forget, retain)]
    baseline = Baseline.build(lambda: model, two_models=False, lora=True, r=rank)
    clock = Clock(model.device)
    clock.tick()
    for _ in range(WARM_UP + steps):
        baseline.step(*batches)
        clock.tick()
    if steps:
        return clock.summary(forget + retain)
    with profiled() as trace:
        baseline.step(*batches)
    return {"profile": breakdown(trace, Sizes.of(model.config, rank))}


def _measure_ours(
    model: PreTrainedModel, memory: MemoryConfig, forget: Rows, retain: Rows, steps: int, folder: Path
) -> dict:
    adapter = AdapterConfig()
    adapted = attach_lora(model, adapter)
    apply_switches(adapted, memory)
    arguments = NPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=ROWS,
        max_steps=WARM_UP + (steps or 1),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=model.device.type == "cpu",
        reference_dir=str(folder / "reference") if memory.reference == "cached" else None,
    )
    trainer = NPOTrainer(adapted, arguments, forget, retain, processing_class=blank_tokenizer())
    trainer.remove_callback(PrinterCallback)
    watch = Watch(Clock(model.device), WARM_UP + steps)
    trainer.add_callback(watch)
    with nullcontext() if steps else marked(trainer):
        trainer.train()
    if steps:
        return watch.clock.summary(forget + retain)
    return {"profile": breakdown(watch.trace, Sizes.of(model.config, adapter.lora_r))}


def _batch(rows: Rows, device: torch.device) -> dict[str, Tensor]:
    ids = torch.tensor([row["input_ids"] for row in rows], device=device)
    labels = torch.tensor([row["labels"] for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def show(runs: list[dict]) -> None:
    """Prints the last run."""
    run = runs[-1]
    if "missing" in run:
        print(f"{run['configuration']:<34} {run['missing']}", flush=True)
        return
    dense = next((r for r in runs if r["configuration"] == DENSE and "missing" not in r), None)
    line = f"{run['configuration']:<34} {run['seconds_per_step']:8.3f} s/step {run['tokens_per_second']:9.0f} tokens/s"
    line += f"  {run['seconds_per_step'] / dense['seconds_per_step']:5.2f} x dense" if dense else ""
    line += f"  {run['peak_bytes'] / 2**30:6.2f} GiB" if run["peak_bytes"] else ""
    print(line, flush=True)


def show_profile(run: dict) -> None:
    """Prints where the time of a step goes."""
    if "profile" not in run:
        print(f"{run['configuration']:<34} {run['missing']}", flush=True)
        return
    print(run["configuration"])
    profile = run["profile"]
    parts = sorted(profile["parts"].items(), key=lambda part: -part[1])
    for name, seconds in (*parts, ("idle between kernels", profile["idle"])):
        print(f"    {name:<36} {1e3 * seconds:9.1f} ms {seconds / profile['span']:7.1%}")
    if profile["reference"]:
        print(f"    {'of all this, the reference pass':<36} {1e3 * profile['reference']:9.1f} ms", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, also without a GPU")
    parser.add_argument("--rows", action="store_true", help="rows as long as real ones, beside the predicted seconds")
    parser.add_argument(
        "--model", type=bundled_or_small, default="allenai/OLMo-7B-hf", help="a model whose configuration is bundled"
    )
    parser.add_argument("--tokens", type=count, default=512, help="per row (512)")
    parser.add_argument("--steps", type=count, default=8, help="measured steps of each configuration (8)")
    parser.add_argument("--minutes", type=minutes, default=7, help="skip whatever is not begun by then (7)")
    parser.add_argument("--models", type=Path, help="folder for the random model, kept; default: that of memory.py")
    parser.add_argument("--cpu", type=Path, metavar="DIR", help="a real model: measure side by side on the processor")
    parser.add_argument("--data", choices=FILES, default="lume", help="with --cpu: which rows (lume)")
    parser.add_argument("--folder", type=Path, default=DATA, help="with --cpu: where LUME and TOFU are")
    parser.add_argument("--files", type=Path, nargs=2, help="with --cpu: other rows, to forget and to retain")
    parser.add_argument("--threads", type=count, default=1, help="with --cpu: threads of a step (1)")
    parser.add_argument("--out", type=Path, help="the JSON file (default: benchmarks/results/<gpu>/speed.json)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
