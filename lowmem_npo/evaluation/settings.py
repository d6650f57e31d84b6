"""What `lowmem-npo evaluate` measures, on what. A field's docstring is its help text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Interval

from lowmem_npo.config import AnswerOptions, DataConfig, DataOptions, ModelOptions, StreamOptions
from lowmem_npo.config.objective import ForgetLevel
from lowmem_npo.data.chat import TODAY
from lowmem_npo.data.rows import Rows
from lowmem_npo.data.schemas import having
from lowmem_npo.data.self_written import self_rows
from lowmem_npo.data.templates import form_of
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.benchmarks.registry import BENCHMARKS, BenchmarkOptions
from lowmem_npo.evaluation.leaks.registry import LEAK_TESTS, NAMES, LeakOptions, leak_tests
from lowmem_npo.evaluation.options import FREE, SET
from lowmem_npo.evaluation.scoring.batching import BATCH_SIZE
from lowmem_npo.files import expanded
from lowmem_npo.ranges import MOST, Count, Seed
from lowmem_npo.run_directory import RunFiles, run_around

DATA_SETS = ("forget", "retain", "holdout")
DEFAULT_DIRECTORY = "lowmem-npo-evaluation"


@dataclass
class EvaluationOptions(AnswerOptions, DataOptions, StreamOptions, ModelOptions):
    """What `evaluate` shares with `train`, and its own options; each benchmark and each leak test adds some."""

    model: str | None = None
    """Hub name or local directory of the base model. Default: the model that --adapter was trained on."""
    forget: str | None = None
    """What should be forgotten: rows or documents, in files, a folder or on the hub. Without any data and any
    --lm-eval: what the run of --adapter forgot and kept, else the bundled biographies. Where --leaks has no --forget,
    each set that is not named is that of the run."""
    retain: str | None = None
    """What should be kept."""
    holdout: str | None = None
    """Rows like those to forget that the model was never taught, with which the leak tests compare."""
    adapter: str | None = None
    """Directory of the adapter, as `lowmem-npo train` wrote it. Without it the base model is measured."""
    any_base: bool = False
    """Accept an adapter of another base model, or of one that is not known to have the same weights."""
    max_length: Annotated[int, Interval(ge=2, le=MOST)] | None = None
    """Tokens per row, prompt and answer together, whose likelihood is measured. Default: as in the run of --adapter,
    else 1024."""
    limit: Count | None = None
    """Measure N rows of each set, drawn with --seed (of LUME, equally many of every task and kind)."""
    seed: Seed = 42
    """Seed of all that is random: the rows of --limit, the samples, relearning."""
    group_column: str | None = None
    """Column of the forget rows, and of the holdout where it has it, that says what each is about, such as a person: to
    leak tests rows of one group are one piece of evidence, as the passages of a document are. Default: as in the run of
    --adapter, of its rows."""
    leaks: tuple[str, ...] = ()
    """Tests of what the model still gives away of the forget rows; all, or none, the default. They compare with
    --holdout. With --resume they join those of the evaluation; none leaves these out."""
    forget_level: ForgetLevel = "none"
    """holdout: the leak tests compare with that half of --holdout by which a run of `train --forget-level holdout` is
    judged, so that a base or gold model can be compared with the run. Its --adapter is judged by that half anyway."""
    before: str | None = None
    """evaluation.json of the model before unlearning: the tables then show both, and MMLU is checked against it. With
    --resume, none leaves out the one that the evaluation has."""
    output_dir: str | None = None
    """Directory of the results. Default: `evaluation` inside --adapter, else lowmem-npo-evaluation."""
    resume: bool = False
    """Continue the evaluation in --output-dir, or add to it (members, lm-eval tasks, leak tests). What is not given
    stays as it began, but for --device, --batch-size and where weights are kept."""
    batch_size: Count = BATCH_SIZE
    """Rows per batch (fewer if they are long)."""
    dry_run: bool = False
    """Check data, adapter and options, print what would be measured, and stop."""


@dataclass
class EvaluationConfig(LeakOptions, BenchmarkOptions, EvaluationOptions):  # type: ignore[valid-type, misc]
    """Measure what a model (with an adapter) has forgotten and what it has kept.

    Without any data, that of the run of --adapter is evaluated, with its columns and its prompt template.
    """

    def __post_init__(self) -> None:
        if self.model is None and self.adapter is None:
            raise UserError("Nothing to evaluate: name a model with --model, or an adapter with --adapter.")
        self.leaks = () if tuple(self.leaks) == ("none",) else NAMES if "all" in self.leaks else tuple(self.leaks)
        for name, nothing in {"lm_eval": (), "before": None, "retained_log": None}.items():
            if getattr(self, name) in ("none", ("none",)):  # instead of what a resumed evaluation has
                setattr(self, name, nothing)
        super().__post_init__()
        leak_tests(self.leaks)
        if self.adapter is None:  # else its run may name them
            self.check_sets()
        if not self.leaks and not self.resume:  # which keeps both, whatever is left out
            if self.forget_level != "none":
                raise UserError("--forget-level says which holdout rows the leak tests compare with: add --leaks.")
            if self.mia_gradnorm:
                raise UserError("--mia-gradnorm is measured on the rows of the leak tests: add --leaks membership.")
        for options in {*(test.options for test in LEAK_TESTS), *(benchmark.options for benchmark in BENCHMARKS)}:
            options.check(self)

    def check_sets(self) -> None:
        """Raises UserError for leak tests without forget rows, and for a half of no holdout."""
        if not self.leaks or self.bundled:
            return
        if self.forget is None:
            raise UserError("--leaks looks for what is left of the forget rows: name them with --forget.")
        if self.forget_level != "none" and self.holdout is None:
            raise UserError("--forget-level holdout compares with a half of the holdout: name it with --holdout.")

    def from_run(self, run: Mapping[str, Any]) -> list[str]:
        """The sets that are those of `run`: all where no data is named, and those that are not where leak tests need
        forget rows and none are named. Who names forget rows gets the sets that he names."""
        if not run.get("forget") or not (self.bundled or (self.leaks and self.forget is None)):
            return []
        sets = ("forget", "retain", *(["holdout"] if self.leaks else []))
        return [name for name in sets if getattr(self, name) is None and run.get(name) is not None]

    def completed(self, run: Mapping[str, Any]) -> EvaluationConfig:
        """What was left open, as `run` had it (run.yaml of the adapter's run, or nothing)."""
        known: dict[str, Any] = {"max_length": self.max_length or run.get("max_length") or DataConfig.max_length}
        known["max_new_tokens"] = self.max_new_tokens or run.get("max_new_tokens")
        known["template"], known["system"] = form_of(self.template, self.system, run)
        if self.chat_date == TODAY:
            known["chat_date"] = run.get("chat_date", TODAY)
        for name in ("passage_tokens", "passages"):
            known[name] = getattr(self, name) or run.get(name) or getattr(DataConfig, name)
        if of_run := self.from_run(run):
            known |= {name: run[name] for name in of_run}
            if self_rows(known.get("retain")) is not None and self.adapter is not None:
                known["retain"] = str(run_around(expanded(self.adapter)).self_written)
            known |= {name: getattr(self, name) or run.get(name) for name in ("prompt_column", "answer_column")}
            known |= {name: getattr(self, name) or run.get(name) for name in ("paraphrase_column", "group_column")}
        return replace(self, **known)

    @classmethod
    def sources(cls) -> dict[str, str]:
        """Every option that names a file of rows, and the name of the set that these are."""
        own = {f.name: f.metadata[SET] for f in fields(cls) if SET in f.metadata}
        return {name: name for name in DATA_SETS} | own

    @classmethod
    def may_change(cls) -> set[str]:
        """Options that a resumed evaluation may change; what would change a figure must stay as it was: of the holdout
        the digests tell."""
        own = {f.name for f in fields(cls) if FREE in f.metadata}
        return {"before", "any_base", "leaks", "forget_level", "forms"} | cls.of_invocation() | own

    @classmethod
    def of_invocation(cls) -> set[str]:
        """Options that decide no figure, so that a resumed evaluation has its own."""
        of_device = {"batch_size", "device", "quantized_cache", *(f.name for f in fields(StreamOptions))}
        return {"output_dir", "resume", "dry_run"} | of_device

    @classmethod
    def compared(cls) -> list[str]:
        """Options that must be the same in two evaluations whose figures are compared, besides the rows themselves;
        how answers are made is compared set by set, and the options of leak tests test by test."""
        of_rows = {*cls.sources(), "chat_date", "passages", "passage_tokens", "max_new_tokens", "generate_answers"}
        of_rows |= {"group_column"}  # no figure but p-values goes by it
        of_model = {"model", "revision", "adapter", "attn", "dtype"}
        of_leaks = {f.name for f in fields(LeakOptions)}
        return [f.name for f in fields(cls) if f.name not in cls.may_change() | of_rows | of_model | of_leaks]

    @property
    def named_data(self) -> dict[str, str]:
        """Set -> the file or hub name of its rows, for those that are named."""
        return {of: getattr(self, name) for name, of in self.sources().items() if getattr(self, name) is not None}

    @property
    def bundled(self) -> bool:
        """Whether no data is named, so that the bundled biographies are measured."""
        return not names_data(self)

    @property
    def named_columns(self) -> tuple[str | None, str | None]:
        """Those of prompts and answers, where the user has named any."""
        return (None, None) if self.bundled else (self.prompt_column, self.answer_column)

    @property
    def columns(self) -> dict[str, Any]:
        """The columns, as `to_examples` takes them."""
        prompt, answer = self.named_columns
        return {"prompt_column": prompt, "answer_column": answer, "or_recognised": True}

    def columns_of(self, name: str, rows: Rows) -> dict[str, Any]:
        """The columns of the set `name`: the forget rows must have those of --paraphrase-column and --group-column, the
        holdout may."""
        columns = {"paraphrase_column": self.paraphrase_column, "group_column": self.group_column}
        named = {option: column for option, column in columns.items() if column is not None}
        own = named if name == "forget" else having(named, rows) if name == "holdout" else {}
        return {**self.columns, **own}

    @property
    def tokens_per_row(self) -> int:
        return self.max_length or DataConfig.max_length

    @property
    def path(self) -> Path:
        """Where the results go."""
        return path_of(self)


def names_data(options: EvaluationOptions) -> bool:
    """Whether any rows are named, or a benchmark that brings its own."""
    named = (getattr(options, name) is not None for name in EvaluationConfig.sources())
    return any(named) or any(benchmark.own_sets(options) for benchmark in BENCHMARKS)


def path_of(options: EvaluationOptions) -> Path:
    """Where the results go."""
    if options.output_dir is not None:
        return expanded(options.output_dir)
    return RunFiles(expanded(options.adapter)).evaluation.path if options.adapter else Path(DEFAULT_DIRECTORY)
