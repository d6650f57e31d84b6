"""Writes the tables of docs/ from the JSON that the benchmarks wrote, so that no number in it is typed by hand.

    python benchmarks/tables.py            replaces what is between <!-- table:NAME --> and <!-- /table -->
    python benchmarks/tables.py --check    only reports whether anything would change; exit code 1 if so

Measurements on a GPU, once they are in benchmarks/results, replace simulations, which are then shown beside them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    import checkout  # noqa: F401

from benchmarks.speed_parts.table import markdown
from lowmem_npo.commands.sweep.figures import Spread

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (ROOT / "docs" / "memory.md", ROOT / "docs" / "results.md")
MARKED = re.compile(r"(<!-- table:([a-z-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("documents", type=Path, nargs="*", default=DOCUMENTS, help="default: those of docs/")
    options = parser.parse_args(arguments)
    different = False
    for document in options.documents:
        before = document.read_text(encoding="utf-8")
        after = written(before)
        if options.check and after != before:
            print(f"{document.name} differs: run python benchmarks/tables.py")
            different = True
        elif not options.check:
            document.write_text(after, encoding="utf-8")
    return int(different)


def written(text: str) -> str:
    """`text` with every marked table made from the results. A KeyError names a table that is not in TABLES."""
    return MARKED.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", text)


def memory(results: Path = RESULTS) -> str:
    """Peak GPU memory of every contender: measured if there is a measurement, else simulated."""
    records = [json.loads(path.read_text()) for path in sorted(results.glob("*/memory*.json"))]
    records = [result for result in records if result["benchmark"] == "memory"]  # not the status of an evidence piece
    measured = [result for result in records if not result["simulated"] and not result["cap"]]
    chosen = measured or [result for result in records if result["simulated"]]
    entries = {(e["name"], e["tokens"]): e for result in chosen for e in result["results"]}
    names = list(dict.fromkeys(name for name, _ in entries))
    lengths = sorted({tokens for _, tokens in entries})
    how = f"measured on {chosen[0]['machine']['gpu']} (predicted)" if measured else "**simulated**"
    header = f"{chosen[0]['model'].rpartition('/')[2].removesuffix('-hf')}, {chosen[0]['rows']} rows; peak GiB, {how}"
    rows = [[_with_code(name), *(_peak(entries.get((name, tokens), {})) for tokens in lengths)] for name in names]
    return _markdown([header, *(f"{tokens} tokens" for tokens in lengths)], rows)


def quality(name: str = "quality", results: Path = RESULTS) -> str:
    """What `quality.py` wrote beside the JSON of that name."""
    path = results / "cpu" / f"{name}.md"
    return path.read_text(encoding="utf-8").strip() if path.exists() else "Not yet measured."


def demo(results: Path = RESULTS) -> str:
    """The demo's figures before and after, and gold's, over the seeds that all three were measured with."""
    results_of = json.loads((results / "cpu" / "quality-lasting.json").read_text())["results"]
    measures = {"nll": "NLL per answer token", "rouge_l_recall": "ROUGE-L recall", "exact_match": "exact match"}
    rows = []
    for of_set in ("forget", "retain"):
        for place, (key, title) in enumerate(measures.items()):
            figures = [results_of[model][f"{of_set}_{key}"] for model in ("taught", "lasting", "gold")]
            seeds = set.intersection(*(set(figure["seeds"]) for figure in figures))
            stages = [Spread.of(_of_seeds(figure, seeds)).text() for figure in figures]
            rows.append([of_set if place == 0 else "", title, *stages])
    lines = [["set", "measure", "before", "after", "gold"], ["---"] * 2 + ["---:"] * 3, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines).replace("|  |", "| |")


def _of_seeds(figure: Any, seeds: set[int]) -> list[float]:
    return [value for value, seed in zip(figure["values"], figure["seeds"], strict=True) if seed in seeds]


def speed(results: Path = RESULTS) -> str:
    """A step on the rows of LUME and of TOFU, on a processor, side by side."""
    parts = []
    for path in sorted((results / "cpu").glob("speed-*.json")):
        record = json.loads(path.read_text())
        if record["benchmark"] != "speed on a processor":
            continue
        kind, model = record["data"].upper(), record["model"]
        parts.append(
            f"{kind}, {model}, 4 + 4 rows, medians of {record['steps']} steps:\n\n{markdown(record['results'])}"
        )
    return "\n\n".join(parts)


def gpu_memory(results: Path = RESULTS) -> str:
    """Steps that were measured on a GPU one by one, beside what was simulated of them."""
    rows = []
    for path, record in _on_gpus("memory", results):
        if path.stem.startswith("memory"):
            continue  # it has a table of its own
        for entry in record["results"]:
            if "peak_bytes" not in entry:
                continue
            name = f"{entry['model'].rpartition('/')[2].removesuffix('-hf')}, {_with_code(entry['name'])}"
            peaks = [f"{entry[key] / 2**30:.3f}" for key in ("peak_bytes", "predicted_peak_bytes")]
            step = f"{entry['seconds_per_step']:.2f} s"
            rows.append([name, str(entry["tokens"]), _gpu(record), *peaks, step])
    header = ["4 + 4 rows", "tokens a row", "GPU", "peak GiB, measured", "simulated", "a step"]
    return _markdown(header, rows)


def gpu_kernels(results: Path = RESULTS) -> str:
    """Milliseconds, MiB of workspace and relative error of every contender at every task, one table a shape."""
    parts = []
    for _, record in _on_gpus("kernels", results):
        timed = [run for run in record["results"] if "seconds" in run]
        shapes = dict.fromkeys((run["tokens"], run["vocabulary"], run["hidden"]) for run in timed)
        for shape in shapes:
            runs = {
                (r["contender"], r["task"]): r for r in timed if (r["tokens"], r["vocabulary"], r["hidden"]) == shape
            }
            names, tasks = (list(dict.fromkeys(key[i] for key in runs)) for i in (0, 1))
            rows = [[name, *(_kernel(runs.get((name, task))) for task in tasks)] for name in names]
            titles = [KERNEL_TASKS[task] for task in tasks]
            about = "{} tokens, V {}, d {}, on an {}".format(*shape, _gpu(record))
            parts.append(f"{about}:\n\n{_markdown(['', *titles], rows)}")
    return "\n\n".join(parts)


def gpu_rows(results: Path = RESULTS) -> str:
    """Seconds of a step on rows as long as real ones, in both epochs, beside the predicted ones."""
    parts = []
    for _, record in _on_gpus("speed on real rows", results):
        rows = []
        for run in record["results"]:
            if "seconds_per_step" in run:
                pairs = [run["seconds_per_step"], run["predicted"] or []]
                cells = [", ".join(f"{s:.2f}" for s in pair) or "–" for pair in pairs]
                rows.append([f"{run['data'].upper()}, {run['way']}", f"{run['tokens']:.0f}", *cells])
        header = [f"{record['model'].rpartition('/')[2].removesuffix('-hf')}, QLoRA, 4 + 4 rows, on an {_gpu(record)}"]
        parts.append(_markdown([*header, "tokens a step", "seconds of a step", "predicted then"], rows))
    return "\n\n".join(parts)


def gpu_streaming(results: Path = RESULTS) -> str:
    """A step with the weights on the GPU and with streamed ones."""
    parts = []
    for _, record in _on_gpus("streamed weights", results):
        rows = [
            [
                run["configuration"], f"{run['peak_bytes'] / 2**30:.3f}", f"{run['seconds_per_step']:.2f} s",
                f"{run['copied_bytes_per_step'] / 2**30:.1f} GiB", f"{run['loading_seconds']:.0f} s",
            ]
            for run in record["results"] if "seconds_per_step" in run
        ]  # fmt: skip
        model = record["model"].rpartition("/")[2].removesuffix("-hf")
        about = f"{model}, QLoRA, 4 + 4 rows of {record['tokens']} tokens, on an {_gpu(record)}"
        about += "" if record.get("joint_pass_tokens") else ", in passes apart"
        parts.append(_markdown([about, "peak GiB", "a step", "copied in a step", "loading"], rows))
    return "\n\n".join(parts)


def _on_gpus(benchmark: str, results: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Every record of a benchmark that was made on a GPU."""
    records = [(path, json.loads(path.read_text())) for path in sorted(results.glob("nvidia-*/*.json"))]
    return [(path, record) for path, record in records if record["benchmark"] == benchmark]


def _gpu(record: dict[str, Any]) -> str:
    return record["machine"]["gpu"].removeprefix("NVIDIA ").split()[0]


def _kernel(run: dict[str, Any] | None) -> str:
    if run is None:
        return ""
    text = f"{1e3 * run['seconds']['median']:.1f} ms"
    if "errors" in run:
        text += f", {run['workspace_bytes'] / 2**20:.0f} MiB, {_percent(max(run['errors'].values()))}"
    return text


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%" if share >= 1 else f"{100 * share:.2g}%"


def _with_code(name: str) -> str:
    """Marks flags as code."""
    return re.sub(r"--[a-z0-9-]+( (?!\*)[a-z0-9-]+)?", lambda flag: f"`{flag[0]}`", name).replace("*", r"\*")


def _peak(entry: dict[str, Any]) -> str:
    if "peak_bytes" not in entry:
        return entry.get("failed", "")
    predicted = entry.get("predicted_peak_bytes")
    return f"{entry['peak_bytes'] / 2**30:.2f}" + (f" ({predicted / 2**30:.2f})" if predicted else "")


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


QUALITY = ("quality", "quality-lasting", "quality-baselines", "quality-tofu", "quality-lume")
KERNEL_TASKS = {
    "a": "log-probs",
    "b": "log-probs and their gradient",
    "c": "KL and its gradient",
    "d": "cross-entropy, KL and their gradient",
}
TABLES: dict[str, Callable[..., str]] = {
    "memory": memory,
    "demo": demo,
    "speed": speed,
    "gpu-memory": gpu_memory,
    "gpu-kernels": gpu_kernels,
    "gpu-rows": gpu_rows,
    "gpu-streaming": gpu_streaming,
} | {name: partial(quality, name) for name in QUALITY}


if __name__ == "__main__":
    sys.exit(main())
