"""How much GPU memory NPO takes: as it is usually written, and with lowmem-npo, one switch more at a time.

    python benchmarks/memory.py                              # without a GPU: simulated, in some minutes
    python benchmarks/memory.py --tokens 2048 --cap 24GiB    # on a GPU: measured, and no more than 24 GiB is given out

On a GPU each contender runs in a process of its own, on random weights of the real shape that are loaded as any model
is; peak and step time are measured, and simulated beside it. Without one, every step is simulated
(`lowmem-npo estimate`), and the output, the JSON and the picture say so.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the checkout, not this folder: see kernels.py
    sys.path[:1] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "kernels")]

import torch

from benchmarks.shared import record
from benchmarks.memory_parts.contenders import CONTENDERS, Contender, real_step, simulate
from benchmarks.shared.random_model import save_random_model
from lowmem_npo.estimate import measured as meter
from lowmem_npo.estimate.step import CONTEXT_BYTES
from lowmem_npo.libraries import quiet_libraries
from lowmem_npo.model.known_configs import known_config
from lowmem_npo.sizes import gib, parse_size

WARM_UP = 2  # steps before the measured ones
FILLED = 2**16  # bytes of each tensor of a model that would not fit on most disks


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    quiet_libraries()
    if options.one:
        contender = next(c for c in CONTENDERS if c.name == options.one)
        run = _simulated if options.simulate else _measured
        print(json.dumps(run(contender, options.tokens[0], options)))
        return 0
    on_gpu = torch.cuda.is_available()
    out = options.out or (record.device_folder() if on_gpu else record.RESULTS / "simulated") / "memory.json"
    if not on_gpu:
        print("No GPU here: every number below is SIMULATED.")
    deadline = time.monotonic() + 60 * options.minutes
    about = {"model": options.model, "simulated": not on_gpu, "cap": options.cap, "rows": "4 forget + 4 retain"}
    order = [(tokens, c) for tokens in options.tokens for c in CONTENDERS if _asked_for(c, tokens, options.only)]
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for tokens, contender in sorted(order, key=lambda pair: pair[1].turn) if on_gpu else order:
        result = _on_gpu(contender, tokens, options, deadline) if on_gpu else _simulated(contender, tokens, options)
        flags, model = list(contender.flags), contender.model or options.model
        entry = {"name": contender.name, "tokens": tokens, "flags": flags, "model": model, **result}
        found[tokens, contender.name] = entry
        print(_line(entry), flush=True)
        record.write(out, "memory", [found[t, c.name] for t, c in order if (t, c.name) in found], **about)
    if not options.cap:
        from benchmarks.memory_parts.picture import draw

        draw(json.loads(out.read_text()), out.with_suffix(".png"))
    return 0


def _asked_for(contender: Contender, tokens: int, only: Sequence[str] | None) -> bool:
    named = not only or any(part in contender.name for part in only)
    return named and (not contender.lengths or tokens in contender.lengths)


def _simulated(contender: Contender, tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    found = simulate(contender, known_config(contender.model or options.model), tokens)
    return {"peak_bytes": found.peak_bytes, "by_kind": found.by_kind, "host_bytes": found.host_bytes}


def _on_gpu(contender: Contender, tokens: int, options: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """Measured in a process of its own; in another, which sees no GPU, simulated."""
    if time.monotonic() > deadline:
        return {"failed": "skipped: the time limit was reached"}
    command = [sys.executable, __file__, "--one", contender.name, "--model", options.model, "--tokens", str(tokens)]
    command += ["--steps", str(options.steps)]
    command += ["--weights", str(options.weights)] if options.weights else []
    command += ["--cap", options.cap] if options.cap else []
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    simulation = _begin([*command, "--simulate"], {**environment, "CUDA_VISIBLE_DEVICES": ""})
    measured = _end(_begin(command, environment), deadline)
    predicted = _end(simulation, deadline)
    return {
        "predicted_peak_bytes": predicted.get("peak_bytes"),
        "by_kind": predicted.get("by_kind", {}),
        "host_bytes": predicted.get("host_bytes"),
        **measured,
    }


def _begin(command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def _end(process: subprocess.Popen, deadline: float) -> dict[str, Any]:
    """What the process printed last, or under "failed" why there is nothing."""
    try:
        told, complaint = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {"failed": "skipped: the time limit was reached"}
    if process.returncode == 0:
        return json.loads(told.strip().splitlines()[-1])
    lines = complaint.strip().splitlines() or [f"exit code {process.returncode}"]
    return {"failed": "out of memory" if any("OutOfMemoryError" in line for line in lines) else lines[-1]}


def _measured(contender: Contender, tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    device, name = torch.device("cuda", 0), contender.model or options.model
    models = options.weights or Path(tempfile.gettempdir()) / "random-models"
    weights = save_random_model(name, models, FILLED if contender.model else None)
    torch.cuda.empty_cache()
    if options.cap:  # what a card of this size leaves beside CUDA itself
        room, total = parse_size(options.cap, "--cap") - CONTEXT_BYTES, torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, room / total), device)
    meter.restart_peak(device)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        step = real_step(contender, weights, tokens, Path(folder))
        loaded = time.perf_counter()
        loading = torch.cuda.max_memory_allocated(device)
        for _ in range(WARM_UP):
            step()
        torch.cuda.synchronize()
        meter.restart_peak(device)
        times = []
        for _ in range(options.steps):
            before = time.perf_counter()
            step()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - before)
        found = meter.measure(device)
    return {
        "peak_bytes": found.allocated,
        "reserved_bytes": found.reserved,
        "process_bytes": found.process,
        "loading_peak_bytes": loading,
        "loading_seconds": loaded - begin,
        "seconds_per_step": statistics.median(times),
    }


def _line(found: dict[str, Any]) -> str:
    line = f"{found['tokens']:>5} tokens  {found['name']:<36}"
    if "failed" in found:
        return f"{line} {found['failed']}"
    line += f"{gib(found['peak_bytes']):>11}"
    if predicted := found.get("predicted_peak_bytes"):
        line += f"  predicted {gib(predicted)} ({found['peak_bytes'] / predicted - 1:+.1%})"
    return line + (f"  {found['seconds_per_step']:.2f} s/step" if "seconds_per_step" in found else "")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="allenai/OLMo-7B-hf", help="a bundled configuration")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048], help="per row (512 2048)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="contenders whose name contains one of these")
    parser.add_argument("--cap", help="on a GPU: all memory that is given out, such as 24GiB, CUDA's own included")
    parser.add_argument("--steps", type=int, default=3, help="on a GPU: steps measured (3)")
    parser.add_argument("--minutes", type=float, default=8, help="on a GPU: what is not done by then is skipped (8)")
    parser.add_argument("--weights", type=Path, help="on a GPU: folder of the random weights, made if missing")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/simulated/memory.json, or the GPU's")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the process of one contender on a GPU
    parser.add_argument("--simulate", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
