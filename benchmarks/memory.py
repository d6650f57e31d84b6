"""How much GPU memory NPO takes: as it is usually written, and with lowmem-npo, one more switch at a time.

    python benchmarks/memory.py                              # without a GPU: simulated, in a few minutes
    python benchmarks/memory.py --tokens 2048 --cap 24GiB    # on a GPU: measured, with at most 24 GiB

On a GPU each contender runs in a process of its own, on random weights of the real shape, loaded like any model; peak
and step time are measured, and the simulated peak is recorded beside them. Without a GPU every step is simulated (as in
`lowmem-npo estimate`), and the output, the JSON and the picture say so.
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

if __name__ == "__main__":
    import checkout  # noqa: F401

import torch

from benchmarks.memory_parts.contenders import CONTENDERS, Contender, real_step, simulate
from benchmarks.shared import record
from benchmarks.shared.arguments import bundled_model, count, minutes
from benchmarks.shared.random_model import SAVED, save_random_model
from lowmem_npo.estimate.measured import measure, restart_peak
from lowmem_npo.estimate.simulator.gpu import CAPABILITY
from lowmem_npo.estimate.step import CONTEXT_BYTES
from lowmem_npo.libraries import quiet_libraries
from lowmem_npo.model.known_configs import known_config
from lowmem_npo.sizes import gib, parse_size

WARM_UP = 2  # steps before the measured ones
FILLED = 2**16  # random bytes per tensor of a model that most disks could not hold


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
    order = [(tokens, c) for tokens in options.tokens for c in CONTENDERS if _selected(c, tokens, options.only)]
    entries: dict[tuple[int, str], dict[str, Any]] = {}
    for tokens, contender in sorted(order, key=lambda pair: pair[1].turn) if on_gpu else order:
        result = _on_gpu(contender, tokens, options, deadline) if on_gpu else _simulated(contender, tokens, options)
        flags, model = list(contender.flags), contender.model or options.model
        entry = {"name": contender.name, "tokens": tokens, "flags": flags, "model": model, **result}
        entries[tokens, contender.name] = entry
        print(_line(entry), flush=True)
        record.write(out, "memory", [entries[t, c.name] for t, c in order if (t, c.name) in entries], **about)
    if not options.cap:
        from benchmarks.memory_parts.picture import draw

        draw(json.loads(out.read_text()), out.with_suffix(".png"))
    return 0


def _selected(contender: Contender, tokens: int, only: Sequence[str] | None) -> bool:
    named = not only or any(part in contender.name for part in only)
    return named and (not contender.lengths or tokens in contender.lengths)


def _simulated(contender: Contender, tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    architecture = known_config(contender.model or options.model)
    assert architecture is not None, "only bundled ones are named"
    step = simulate(contender, architecture, tokens, tuple(options.capability))
    return {name: getattr(step, name) for name in ("peak_bytes", "needed_bytes", "by_kind", "host_bytes")}


def _on_gpu(contender: Contender, tokens: int, options: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """Measured in one process, simulated in another, which sees no GPU."""
    if time.monotonic() > deadline:
        return {"failed": "skipped: the time limit was reached"}
    command = [sys.executable, __file__, "--one", contender.name, "--model", options.model, "--tokens", str(tokens)]
    command += ["--steps", str(options.steps)]
    command += ["--weights", str(options.weights)] if options.weights else []
    command += ["--cap", options.cap] if options.cap else []
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    simulate = [*command, "--simulate", "--capability", *map(str, torch.cuda.get_device_capability())]
    simulation = _begin(simulate, {**environment, "CUDA_VISIBLE_DEVICES": ""})
    measured = _end(_begin(command, environment), deadline)
    predicted = _end(simulation, deadline)
    return {
        "predicted_peak_bytes": predicted.get("peak_bytes"),
        "predicted_needed_bytes": predicted.get("needed_bytes"),
        "by_kind": predicted.get("by_kind", {}),
        "host_bytes": predicted.get("host_bytes"),
        **measured,
    }


def _begin(command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def _end(process: subprocess.Popen, deadline: float) -> dict[str, Any]:
    """The JSON on the last line that the process printed, or under "failed" why there is none."""
    try:
        output, errors = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {"failed": "skipped: the time limit was reached"}
    if process.returncode == 0:
        return json.loads(output.strip().splitlines()[-1])
    lines = errors.strip().splitlines() or [f"exit code {process.returncode}"]
    return {"failed": "out of memory" if any("OutOfMemoryError" in line for line in lines) else lines[-1]}


def _measured(contender: Contender, tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    device, name = torch.device("cuda", 0), contender.model or options.model
    weights = save_random_model(name, options.weights or SAVED, FILLED if contender.model else None)
    torch.cuda.empty_cache()
    if options.cap:  # what a card of this size has beside CUDA's context
        room, total = parse_size(options.cap, "--cap") - CONTEXT_BYTES, torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, room / total), device)
    restart_peak(device)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        step = real_step(contender, weights, tokens, Path(folder))
        loaded = time.perf_counter()
        loading = torch.cuda.max_memory_allocated(device)
        for _ in range(WARM_UP):
            step()
        torch.cuda.synchronize()
        restart_peak(device)
        times = []
        for _ in range(options.steps):
            before = time.perf_counter()
            step()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - before)
        peak = measure(device)
    return {
        "peak_bytes": peak.allocated,
        "reserved_bytes": peak.reserved,
        "process_bytes": peak.process,
        "loading_peak_bytes": loading,
        "loading_seconds": loaded - begin,
        "seconds_per_step": statistics.median(times),
    }


def _line(entry: dict[str, Any]) -> str:
    line = f"{entry['tokens']:>5} tokens  {entry['name']:<36}"
    if "failed" in entry:
        return f"{line} {entry['failed']}"
    line += f"{gib(entry['peak_bytes']):>11}"
    if predicted := entry.get("predicted_peak_bytes"):
        line += f"  predicted {gib(predicted)} ({entry['peak_bytes'] / predicted - 1:+.1%})"
    return line + (f"  {entry['seconds_per_step']:.2f} s/step" if "seconds_per_step" in entry else "")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=bundled_model, default="allenai/OLMo-7B-hf", help="a bundled configuration")
    parser.add_argument("--tokens", type=count, nargs="+", default=[512, 2048], help="per row (512 2048)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="contenders whose name contains one of these")
    parser.add_argument("--cap", help="on a GPU: use at most this much memory, such as 24GiB, CUDA's own included")
    parser.add_argument("--steps", type=count, default=3, help="on a GPU: measured steps (3)")
    parser.add_argument("--minutes", type=minutes, default=8, help="on a GPU: skip whatever is not done by then (8)")
    parser.add_argument("--weights", type=Path, help="on a GPU: folder of the random weights, written if missing, kept")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/simulated/memory.json, or the GPU's")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the process of one contender on a GPU
    parser.add_argument("--simulate", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--capability", type=int, nargs=2, default=CAPABILITY, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
