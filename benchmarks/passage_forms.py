"""What forgets a document best: its passages as completions, as texts, or as both? On a small scale.

    python benchmarks/passage_forms.py           about 10 minutes on 2 cores
    python benchmarks/passage_forms.py --quick   a few steps, to see that it runs

A small model is taught two documents, made of the bundled biographies, until it recites them. Then `lowmem-npo train`
makes it forget one and keep the other, with each --passages and each of several --passage-tokens, in as many optimiser
steps of as many tokens. Measured at windows all over each document: extraction, the part of 24 tokens that the model
goes on with correctly, given the 24 before; their NLL; and the NLL of 24 tokens given nothing.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

if __name__ == "__main__":
    import checkout  # noqa: F401

import torch
from lowmem_kernels import IGNORE_INDEX

from benchmarks.shared import record
from lowmem_npo.commands.demo.recipe import Teaching
from lowmem_npo.commands.demo.teaching import make_tokenizer, taught_model
from lowmem_npo.commands.train.run import train
from lowmem_npo.config import (
    AdapterConfig,
    DataConfig,
    MemoryConfig,
    ModelConfig,
    ObjectiveConfig,
    OutputConfig,
    PassageForm,
    RunConfig,
    TrainingConfig,
)
from lowmem_npo.data import TokenizedRow, bundled_rows
from lowmem_npo.evaluation.scoring.generation import Prompt, greedy_answers
from lowmem_npo.evaluation.scoring.likelihood import answer_likelihoods
from lowmem_npo.model import load_model
from lowmem_npo.model.saved_adapter import load_adapter

FORMS: tuple[PassageForm, ...] = ("completion", "text", "both")
TOKENS = (32, 64, 128)
PEOPLE = {"forget": 4, "retain": 6}
QUICK_PEOPLE = {"forget": 2, "retain": 2}
HALF, STRIDE = 24, 12  # tokens of a prompt, and of what follows it; tokens between two windows
TOKENS_OF_A_STEP = 256
TEACHING = Teaching(vocabulary=400, layers=2, width=96, heads=4, epochs=60, batch_size=8, lr=4e-3)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, help="the JSON file")
    options = parser.parse_args(arguments)
    steps, lengths, people = (2, TOKENS[:1], QUICK_PEOPLE) if options.quick else (100, TOKENS, PEOPLE)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        documents = {part: document(part, count) for part, count in people.items()}
        for part, text in documents.items():
            (work / f"{part}.txt").write_text(text, encoding="utf-8")
        tokenizer = make_tokenizer(list(documents.values()), TEACHING.vocabulary)
        ids = {part: list(tokenizer(text).input_ids) for part, text in documents.items()}
        rows = [row(part[at : at + 96], 1) for part in ids.values() for at in range(0, len(part) - 8, 16)]
        device = torch.device("cpu")
        taught_model(work / "base", tokenizer, rows, TEACHING, seed=0, device=device, description="teaching")
        results: list[dict[str, Any]] = [{"passages": None, **measure(work, None, tokenizer, ids)}]
        print(results[-1], flush=True)
        for tokens in lengths:
            for form in FORMS:
                train(run_of(work, form, tokens, steps), lambda line: None)
                measured = measure(work, work / f"{form}-{tokens}", tokenizer, ids)
                results.append({"passages": form, "passage_tokens": tokens, **measured})
                print(results[-1], flush=True)
    if not options.quick or options.out:
        out = options.out or record.device_folder() / "passage_forms.json"
        record.write(out, "passage_forms", results, steps=steps, tokens_of_a_step=TOKENS_OF_A_STEP)
        print(out)
    return 0


def document(part: str, count: int) -> str:
    """A paragraph about each of the first `count` invented people."""
    people: dict[str, list[str]] = {}
    for one in bundled_rows(part).rows:
        people.setdefault(one["person"], []).append(f"{one['question']} {one['answer']}.")
    return "\n\n".join(" ".join(sentences) for sentences in list(people.values())[:count])


def row(ids: Sequence[int], prompt: int) -> TokenizedRow:
    """A row whose first `prompt` tokens are given."""
    labels = [IGNORE_INDEX] * prompt + list(ids[prompt:])
    return TokenizedRow(input_ids=list(ids), labels=labels, prompt_length=prompt if prompt > 1 else 0)


def run_of(work: Path, form: PassageForm, tokens: int, steps: int) -> RunConfig:
    forget, retain = (str(work / f"{part}.txt") for part in ("forget", "retain"))
    return RunConfig(
        model=ModelConfig(model=str(work / "base"), dtype="float32", device="cpu"),
        data=DataConfig(forget=forget, retain=retain, passages=form, passage_tokens=tokens, max_length=160),
        objective=ObjectiveConfig(beta=0.2),
        adapter=AdapterConfig(lora_r=8, lora_alpha=8, lora_targets=("all-linear",)),
        memory=MemoryConfig(gradient_checkpointing="off"),
        training=TrainingConfig(batch_size=TOKENS_OF_A_STEP // tokens, max_steps=steps, lr=5e-3),
        output=OutputConfig(output_dir=str(work / f"{form}-{tokens}"), eval_rows=0, leaks=()),
        trainer_args={"save_strategy": "no"},
    )


def measure(work: Path, adapter: Path | None, tokenizer: Any, ids: dict[str, list[int]]) -> dict[str, float]:
    model: Any = load_model(ModelConfig(model=str(work / "base"), dtype="float32", device="cpu"))
    if adapter is not None:
        model = load_adapter(model, str(adapter))
    figures: dict[str, float] = {}
    for part, of_part in ids.items():
        starts = range(0, len(of_part) - 2 * HALF, STRIDE)
        given = [row(of_part[at : at + 2 * HALF], HALF) for at in starts]
        nothing = [row(of_part[at : at + HALF], 1) for at in starts]
        prompts = [Prompt(window["input_ids"][:HALF], HALF) for window in given]
        answers = greedy_answers(model, tokenizer, prompts, batch_size=16, progress=False)
        right = [
            sum(said == true for said, true in zip(answer, window["input_ids"][HALF:], strict=False)) / HALF
            for answer, window in zip(answers, given, strict=True)
        ]
        figures[f"{part}_extraction"] = round(fmean(right), 3)
        for name, windows in (("nll", given), ("nll_given_nothing", nothing)):
            scores = answer_likelihoods(model, windows, batch_size=16, progress=False)
            figures[f"{part}_{name}"] = round(fmean(score.nll for score in scores), 3)
    return figures


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(main())
