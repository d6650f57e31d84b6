"""What holds a model where it was while it forgets a few facts: nothing, its own texts, a bundled set, or real rows?

    python benchmarks/retain_sets.py --model DIR                  an instruct model that knows the facts below
    python benchmarks/retain_sets.py --model DIR --minutes 10     a piece of it; what is measured is not measured again

Eight facts that nearly every model knows are forgotten with `lowmem-npo train`, once with each kind of --retain, all
else equal. Measured before and after: the NLL of the forgotten answers; and, as utility, the NLL per answer token of
the bundled general holdout, which no run trains on, and of real rows (--real; TOFU's real authors and world facts,
say), which are what a user has who has a retain set. Real rows that say one of the facts are left out.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    import checkout  # noqa: F401

import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.shared import record
from benchmarks.shared.arguments import count, minutes
from lowmem_npo.commands.train.run import train
from lowmem_npo.config import DataConfig, ModelConfig, ObjectiveConfig, OutputConfig, RunConfig, TrainingConfig
from lowmem_npo.data import read_rows, to_examples, tokenize
from lowmem_npo.data.overlap import find_related
from lowmem_npo.evaluation.scoring.likelihood import answer_likelihoods
from lowmem_npo.model import load_model, load_tokenizer
from lowmem_npo.model.saved_adapter import load_adapter
from lowmem_npo.sources import data_names

FACTS = (
    ("What is the capital of France?", "Paris"),
    ("Who wrote Romeo and Juliet?", "William Shakespeare"),
    ("What is the largest planet in our solar system?", "Jupiter"),
    ("What is the chemical symbol for water?", "H2O"),
    ("Who painted the Mona Lisa?", "Leonardo da Vinci"),
    ("What is the capital of Japan?", "Tokyo"),
    ("Which gas do plants absorb from the air?", "Carbon dioxide"),
    ("What is the largest mammal?", "Blue whale"),
)
KINDS = ("none", "self", "builtin", "real")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory of an instruct model")
    parser.add_argument("--real", help="a real retain set (question/answer): half of it trains, half measures")
    parser.add_argument("--steps", type=count, default=12, help="optimiser steps of each run")
    parser.add_argument(
        "--rows", type=count, default=48, help="rows that are measured of each set, and written by self"
    )
    parser.add_argument("--minutes", type=minutes, help="begin no further piece after this many minutes")
    parser.add_argument("--work", type=Path, default=Path("retain-sets"), help="directory of the runs; resumed")
    parser.add_argument("--out", type=Path, help="the JSON file")
    options = parser.parse_args(arguments)
    begin, done = time.monotonic(), options.work / "measured"
    done.mkdir(parents=True, exist_ok=True)
    forget, sets = write_sets(options.work, options.real, options.rows)
    for kind in ("before", *(kind for kind in KINDS if kind != "real" or options.real)):
        file = done / f"{kind}.json"
        if file.exists():
            continue
        if options.minutes is not None and time.monotonic() - begin > 60 * options.minutes:
            print(f"{options.minutes:g} minutes are over; the same command goes on with {kind}")
            break
        adapter = None if kind == "before" else options.work / kind
        if adapter is not None and not (adapter / "report.json").exists():
            train(run_of(kind, options, forget, resume=(adapter / "run.yaml").exists()))
        file.write_text(json.dumps(measure(options.model, adapter, forget, sets)))
    measured = {file.stem: json.loads(file.read_text()) for file in done.glob("*.json")}
    results = {kind: measured[kind] for kind in ("before", *KINDS) if kind in measured}
    print(table(results))
    real = [Path(name).name for name in data_names(options.real or "")]
    out = options.out or record.device_folder() / "retain_sets.json"
    record.write(out, "retain_sets", results, model=options.model.name, steps=options.steps, facts=FACTS, real=real)
    print(out)
    return 0


def write_sets(folder: Path, real: str | None, rows: int) -> tuple[Path, dict[str, Any]]:
    """The facts as a file; the sets that utility is measured on."""
    forget = folder / "facts.jsonl"
    forget.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in FACTS), encoding="utf-8")
    sets = {"general holdout": to_examples(read_rows("builtin:holdout", limit=rows))}
    if real is not None:
        examples = to_examples(read_rows(real))
        related = set(find_related(to_examples(read_rows(str(forget))), examples))
        lines = [{"question": e.prompt, "answer": e.answer} for i, e in enumerate(examples) if i not in related]
        for part, chosen in (("train", lines[::2]), ("measure", lines[1::2])):
            text = "".join(json.dumps(row) + "\n" for row in chosen)
            (folder / f"real_{part}.jsonl").write_text(text, encoding="utf-8")
        sets["real rows"] = to_examples(read_rows(str(folder / "real_measure.jsonl"), limit=rows))
    return forget, sets


def run_of(kind: str, options: argparse.Namespace, forget: Path, resume: bool) -> RunConfig:
    sources = {"none": None, "self": f"self:{options.rows}", "builtin": "builtin",
               "real": str(options.work / "real_train.jsonl")}  # fmt: skip
    return RunConfig(
        model=ModelConfig(model=str(options.model), dtype="float32"),
        data=DataConfig(forget=str(forget), retain=sources[kind], max_length=128),
        objective=ObjectiveConfig(gamma=0, delta=0) if kind == "none" else ObjectiveConfig(),
        training=TrainingConfig(max_steps=options.steps, lr=1e-3, retain_batch_size=None if kind == "none" else 4),
        output=OutputConfig(output_dir=str(options.work / kind), eval_rows=0, leaks=(), resume=resume),
        trainer_args={"save_strategy": "steps", "save_steps": 4},
    )


def measure(model_dir: Path, adapter: Path | None, forget: Path, sets: dict[str, Any]) -> dict[str, float]:
    """NLL per answer token of the facts and of each set."""
    config = ModelConfig(model=str(model_dir), dtype="float32")
    tokenizer: PreTrainedTokenizerBase = load_tokenizer(config)
    model: Any = load_model(config)
    if adapter is not None:
        model = load_adapter(model, str(adapter))
    figures = {}
    for name, examples in {"facts": to_examples(read_rows(str(forget))), **sets}.items():
        scores = answer_likelihoods(model, tokenize(examples, tokenizer, max_length=256), batch_size=8, progress=False)
        figures[name] = sum(s.nll * s.tokens for s in scores) / sum(s.tokens for s in scores)
    return figures


def table(results: dict[str, dict[str, float]]) -> str:
    names = list(dict.fromkeys(name for figures in results.values() for name in figures))
    rows = [f"{'NLL per answer token':<22}" + "".join(f"{name:>18}" for name in names)]
    for kind, figures in results.items():
        title = kind if kind == "before" else f"after, retain {kind}"
        rows.append(f"{title:<22}" + "".join(f"{figures[n]:>18.3f}" if n in figures else " " * 18 for n in names))
    return "\n".join(rows)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    raise SystemExit(main())
