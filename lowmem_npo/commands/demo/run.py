"""The whole job in small: teach a model to recite, make it forget a part, compare it with one that never saw that."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import fill, indent

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowmem_npo.claim import claimed
from lowmem_npo.commands.demo.checks import Check, examples, judge
from lowmem_npo.commands.demo.recipe import LEAKS, Device, Recipe
from lowmem_npo.commands.demo.teaching import make_tokenizer, taught_model
from lowmem_npo.commands.train.run import train
from lowmem_npo.config import DataConfig
from lowmem_npo.console import Say
from lowmem_npo.data import PreparedData, Template, TokenizedRow, bundled_rows, prepare, to_examples
from lowmem_npo.data.fit import Fit
from lowmem_npo.evaluation.answer_table import save_table, stages_to_json, text_table
from lowmem_npo.evaluation.answers import AnswerSummary, Evaluations, evaluate_answers, save_answers, summaries
from lowmem_npo.evaluation.asking import Wording
from lowmem_npo.evaluation.leaks.contract import LeakResults
from lowmem_npo.evaluation.leaks.measure import measure_leaks, read_leaks, write_leaks
from lowmem_npo.files import expanded, write_json
from lowmem_npo.model.loading import resolve_device
from lowmem_npo.report.files import write_report
from lowmem_npo.report.picture import draw_picture
from lowmem_npo.run_directory import RunFiles
from lowmem_npo.training.metrics import read_metrics

PARTS = ("forget", "retain")
BATCH_SIZE = 32  # rows evaluated together
REPLACEMENT = (
    "What replaces a forgotten answer need not make sense: NPO takes answers away and teaches no others. "
    "(`lowmem-npo train --forget-term idk` teaches a refusal.)"
)


@dataclass(frozen=True)
class DemoResult:
    """The demo's figures; demo.json holds the same."""

    directory: Path
    stages: dict[str, dict[str, AnswerSummary]]
    """Stage (before, after, gold) -> set (forget, retain) -> figures."""
    checks: list[Check]
    seconds: dict[str, float]
    """Wall time of each part."""

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


@contextmanager
def _one_thread() -> Iterator[None]:
    """A model this small gains little from a second thread, and waits for it when the cores are busy. With one thread
    the figures do not depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def run_demo(
    output_dir: str | Path, *, seed: int = 0, recipe: Recipe | None = None, device: Device = "auto", say: Say = print
) -> DemoResult:
    """Teaches, unlearns and compares. Writes base/, gold/, unlearned/ (with the report), demo.json,
    before_after_gold.{json,md} and demo.png.

    A second run in the same directory reuses base/ and gold/, and only unlearns again.

    Raises:
        UserError: `output_dir` holds something else.
    """
    directory = expanded(output_dir)
    with claimed(directory, say):
        return _demo(directory, recipe or Recipe(), seed, device, say)


def _demo(directory: Path, recipe: Recipe, seed: int, device: Device, say: Say) -> DemoResult:
    seconds: dict[str, float] = {}
    tokenizer = make_tokenizer(_texts(recipe.limit), recipe.teaching.vocabulary)
    data = prepare(tokenizer, DataConfig(limit=recipe.limit))
    assert data.retain is not None, "the bundled data has retain rows"
    people = {part: len({row["person"] for row in bundled_rows(part, limit=recipe.limit).rows}) for part in PARTS}
    say(
        f"{len(data.forget)} invented facts about {people['forget']} people are to be forgotten, "
        f"{len(data.retain)} about {people['retain']} others kept."
    )

    say("\n1/4  A small OLMo learns them all by heart, from random weights.")
    with _timed(seconds, "base"):
        _teach("base", directory, tokenizer, [*data.forget, *data.retain], recipe, seed, device, say)

    say("\n2/4  The gold standard: the same weights taught the same way, without the rows to forget.")
    with _timed(seconds, "gold"):
        gold = _teach("gold", directory, tokenizer, [*data.retain], recipe, seed, device, say)
        never_saw = _evaluate(gold, tokenizer, data)
        gold_leaks = _leaks(gold, tokenizer, data, seed)

    run = directory / "unlearned"
    files = RunFiles(run)
    again = f"`lowmem-npo train --config {shlex.quote(str(files.run_yaml))} --output-dir again`"
    say(f"\n3/4  The first model forgets, as with {again}.")
    if files.run_yaml.is_file():
        shutil.rmtree(run)  # of an earlier demo; `train` refuses if anything else is there
    config = recipe.run(directory / "base", run, seed, device)
    with _timed(seconds, "unlearning"):
        result = train(config, say=_indented(say))
    assert result is not None, "neither a preview nor a dry run"

    evaluations = {"before": result.before, "after": result.after, "gold": never_saw}
    stages = {stage: summaries(parts) for stage, parts in evaluations.items()}
    leaks = {**read_leaks(files.leaks), "gold": gold_leaks}
    demo = DemoResult(directory, stages, judge(stages, leaks), seconds)
    _save(demo, seed, recipe)
    title = f"A small OLMo forgets {people['forget']} of {sum(people.values())} people"
    draw_picture(directory / "demo.png", read_metrics(files.metrics), stages, title)
    save_answers(files.answers("gold"), never_saw)
    write_leaks(files.leaks, leaks)
    write_report(run)  # again, now with the gold standard

    say("\n4/4  Before, after, and the gold standard, which never saw the forget rows:\n")
    say(text_table(stages) + "\n")
    say(examples(evaluations, {"forget": 2, "retain": 1}))
    say(fill(REPLACEMENT, 96) + "\n")
    for check in demo.checks:
        sign = "ok    " if check.passed else "FAILED"
        say(fill(check.meaning, 96, initial_indent=f"{sign}  {check.name:<13} ", subsequent_indent=" " * 22))
    say(f"\nReport:  {files.report_html}")
    say(f"Picture: {directory / 'demo.png'}\nNumbers: {directory / 'demo.json'}\nAdapter: {run}")
    return demo


def _texts(limit: int | None) -> list[str]:
    """Every text of the bundled data as the model will see it, to train the tokenizer on."""
    parts = (to_examples(bundled_rows(part, limit=limit)) for part in PARTS)
    return ["".join(Template().render(example)) for examples in parts for example in examples]


def _teach(
    name: str,
    directory: Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[TokenizedRow],
    recipe: Recipe,
    seed: int,
    device: Device,
    say: Say,
) -> PreTrainedModel:
    model, reused = taught_model(
        directory / name,
        tokenizer,
        rows,
        recipe.teaching,
        seed=seed,
        device=resolve_device(device),
        description=f"     learning {len(rows)} rows",
    )
    origin = "Reused from an earlier run" if reused else "Saved"
    say(f"     {origin}: {directory / name} ({model.num_parameters() / 1e6:.1f} million parameters)")
    return model


def _evaluate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: PreparedData) -> Evaluations:
    return {
        part: evaluate_answers(model, tokenizer, getattr(data, part), name=f"     gold, {part}", batch_size=BATCH_SIZE)
        for part in PARTS
    }


def _leaks(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: PreparedData, seed: int) -> LeakResults:
    """The leak tests as `train` makes them, so that attacks learn the same rows again."""
    sets = {"forget": data.forget, "holdout": data.holdout}
    written = {part: rows.examples for part, rows in sets.items() if rows is not None}
    return measure_leaks(
        model,
        tokenizer,
        data.forget,
        holdout_rows=data.holdout,
        wording=Wording(written, Template(), DataConfig.max_length, Fit.of(model)),
        tests=LEAKS,
        seed=seed,
        batch_size=BATCH_SIZE,
    )


def _save(demo: DemoResult, seed: int, recipe: Recipe) -> None:
    content = {
        "passed": demo.passed,
        "checks": [asdict(check) for check in demo.checks],
        "stages": stages_to_json(demo.stages),
        "seconds": {name: round(value, 1) for name, value in demo.seconds.items()},
        "seed": seed,
        "recipe": asdict(recipe),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    write_json(demo.directory / "demo.json", content)
    save_table(demo.stages, demo.directory, name="before_after_gold")


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[name] = time.monotonic() - started


def _indented(say: Say) -> Say:
    return lambda text: say(indent(text, "     "))
