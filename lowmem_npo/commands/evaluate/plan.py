"""What is evaluated, and on which rows: all that is read and checked before the weights, where nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple, cast

from transformers import PreTrainedTokenizerBase

from lowmem_npo.commands.evaluate.streaming import with_streaming
from lowmem_npo.config import ModelConfig
from lowmem_npo.console import Say
from lowmem_npo.data import Example, Rows, Template, TokenizedRow, bundled_rows, read_rows, to_examples, tokenize
from lowmem_npo.data.fit import known_fit
from lowmem_npo.data.general_rows import bundled_general, general_rows, is_general
from lowmem_npo.data.overlap import find_overlap, is_also
from lowmem_npo.data.passages import Passages
from lowmem_npo.data.schemas import check_some_have, having
from lowmem_npo.data.tokenized_rows import KnownByText
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.asking import Wording
from lowmem_npo.evaluation.benchmarks.contract import Benchmark, Context, Selection
from lowmem_npo.evaluation.benchmarks.documents import DOCUMENTS
from lowmem_npo.evaluation.benchmarks.registry import BENCHMARKS
from lowmem_npo.evaluation.directory import (
    THE_ADAPTER,
    THE_BASE,
    THE_JUDGES,
    THE_MODEL,
    THE_SIZE,
    THE_TOKENIZER,
    EvaluationDirectory,
    as_begun,
    as_json,
    begun_from_run,
)
from lowmem_npo.evaluation.earlier import Earlier
from lowmem_npo.evaluation.gold import Gold
from lowmem_npo.evaluation.leaks.registry import leak_tests
from lowmem_npo.evaluation.leaks.retuning import RETUNING
from lowmem_npo.evaluation.scoring.batching import at_once
from lowmem_npo.evaluation.settings import EvaluationConfig
from lowmem_npo.files import expanded, file_sha256, json_sha256
from lowmem_npo.model import load_tokenizer, resolve_name
from lowmem_npo.model.loading import load_config
from lowmem_npo.model.names import Base, digest_of
from lowmem_npo.model.notes import model_notes
from lowmem_npo.model.saved_adapter import settings_of_run
from lowmem_npo.model.size import size_of
from lowmem_npo.model.stop_tokens import stop_tokens
from lowmem_npo.report.as_audited import are_others, is_other_holdout, judging, recorded_base
from lowmem_npo.run_directory import AdapterFiles, run_of_adapter
from lowmem_npo.sizes import first_of
from lowmem_npo.sources import data_names
from lowmem_npo.training.forget_level import halves

# Tells tokenizers apart, but not two of which one knows more special tokens.
PROBE = "The 3 quick-brown foxes' café: 12,345.67 –\t東京の猫, кошка, हिन्दी, العربية 🙂\n\n    return x**2  # naïve"
NOT_QUANTIZED = "The adapter was trained on the 4-bit base and is measured on the unquantised one (no --qlora)."

Examples = Callable[[str], list[Example]]  # of each set

OF_OTHER_ROWS = "The forget rows are others than those of the adapter's run, whose report leaves these leak tests out."


@dataclass
class EvaluationPlan:
    """A validated evaluation. directory: where it is measured. selected: what each benchmark measures. leak_rows: set
    -> rows of the leak tests. gold: what it is compared with. base: the weights of the base model, as far as they are
    known before it is loaded."""

    directory: EvaluationDirectory
    model_config: ModelConfig
    context: Context
    sources: dict[str, Rows]
    selected: list[tuple[Benchmark, str, Selection]]
    leak_rows: dict[str, Selection]
    attacker: Attacker
    gold: Gold
    base: str | None

    @property
    def config(self) -> EvaluationConfig:
        return self.directory.config

    @property
    def digests(self) -> dict[str, str]:
        """A hash of each set, of the model, the tokenizer and the adapter."""
        return self.directory.digests

    def know_base(self, weights: str) -> None:
        """Compares anew with --before, where the weights of the base model were not there yet when that was done."""
        if weights != self.base:
            earlier = Earlier.of(settings_with(self.config, self.digests, weights))
            self.context.before, self.context.incomparable = earlier.content, earlier.incomparable
            self.context.notes += [note for note in earlier.notes if note not in self.context.notes]

    @property
    def rows_at_once(self) -> int:
        """Rows per batch."""
        sets = (*(chosen for _, _, chosen in self.selected), *self.leak_rows.values())
        most = max((len(chosen.rows) for chosen in sets), default=0)
        return at_once(self.config.batch_size, most, self.config.stream_weights)


@dataclass
class Attacker:
    """What a leak test may use beside the rows that it asks for. retain, general: rows that it may teach the model.
    wording: how forget and holdout rows were written."""

    retain: Sequence[TokenizedRow] | None = None
    general: Sequence[TokenizedRow] | None = None
    wording: Wording | None = None


def plan_evaluation(
    config: EvaluationConfig, say: Say, *, first: int | None = None, only: Collection[str] | None = None
) -> EvaluationPlan:
    """Reads and checks all but the weights; writes nothing.

    first: read only so many rows of each set; None: of a set of the adapter's run as many as that did, else all.
    only: names of the benchmarks that are measured; None: all whose rows there are.

    Raises:
        UserError: as for `evaluate`.
    """
    model_config = _model_config(config, say)
    run = settings_of_run(config.adapter) if config.adapter else {}
    if model_config.double_quant == "auto":  # the base is quantised as the adapter's run had it
        model_config = replace(model_config, double_quant=run.get("double_quant", "auto"))
    from_run = [*dict.fromkeys([*begun_from_run(config), *config.from_run(run)])]
    of_run = first or run.get("limit")
    limits = {part: of_run if config.bundled or part in from_run else first for part in config.sources().values()}
    asked = config.named_columns if only is None else (None, None)  # a sweep's are its runs', of their rows
    data_named = not config.bundled
    config = as_begun(config.completed(run))
    config.check_sets()
    architecture = load_config(model_config)
    for line in model_notes(architecture, model_config):
        say(line)
    stops = stop_tokens(model_config, architecture)
    tokenizer = load_tokenizer(model_config)
    template = Template.of(config, stops)
    sources = _read(config, limits, from_run, tokenizer, template, say)
    if only is not None and "forget" in sources:  # a sweep's column is its runs'; --evaluate-forget may not have it
        group = having({"group_column": config.group_column}, sources["forget"])
        config = replace(config, group_column=group.get("group_column"))
    met = dict.fromkeys(of for rows in sources.values() if not rows.mixed for of in rows.columns)
    check_some_have(met, *asked)
    examples = cache(lambda part: to_examples(sources[part], **config.columns_of(part, sources[part])))
    judges = _judges(config, examples("holdout")) if config.leaks and "holdout" in sources else None
    digests = _digests(config, sources, judges, model_config, tokenizer) | {THE_SIZE: size_of(architecture)}
    base = Base.here(str(model_config.model), model_config.revision).weights
    settings = settings_with(config, digests, base)
    earlier, gold = Earlier.of(settings), Gold.of(settings)
    notes = [*earlier.notes, *gold.notes]
    if run.get("qlora") and not config.qlora:
        notes.insert(0, NOT_QUANTIZED)
    if (dtype := run.get("dtype", config.dtype)) != config.dtype:
        notes.append(
            f"The adapter was trained on the {dtype} base and is measured on the {config.dtype} one (--dtype)."
        )
    if (others := _are_others(config, sources, examples)) and config.leaks:
        notes.append(OF_OTHER_ROWS)
    fit = known_fit(architecture)
    context = Context(config, tokenizer, template, earlier.content, notes, fit, earlier.incomparable, gold.log)
    if context.fit is not None:
        context.fit.check_padding(tokenizer)
    for benchmark in BENCHMARKS:
        benchmark.check(config)
    selected = [chosen for chosen in _select(sources, context) if only is None or chosen[0].name in only]
    leak_rows, attacker = _select_for_leaks(sources, examples, judges, context, run.get("allow_overlap", False))
    if leak_rows:
        for test in leak_tests(config.leaks):
            test.check_rows(config, {part: len(selection.rows) for part, selection in leak_rows.items()})
    for line in _forms(selected, sources, examples, leak_rows, context):
        say(line)
    if context.fit is not None and (remark := context.fit.remark(context.longest)) is not None:
        say(remark)
    config = context.config = with_streaming(config, model_config, architecture, selected, context, say)
    other_holdout = _is_other_holdout(config, judges)
    directory = EvaluationDirectory(config, digests, others, data_named, other_holdout, from_run)
    return EvaluationPlan(directory, model_config, context, sources, selected, leak_rows, attacker, gold, base)


def settings_with(config: EvaluationConfig, digests: Mapping[str, str], base: str | None) -> dict[str, Any]:
    """What settings.json will hold. base: the weights of the base model, where they are known."""
    return {**as_json(config), "digests": {**digests, **({THE_BASE: base} if base else {})}}


def _model_config(config: EvaluationConfig, say: Say) -> ModelConfig:
    """How the base model is loaded: the one of --model, or the one that the adapter was trained on."""
    if config.adapter:
        name, revision = recorded_base(config.adapter, config.model, config.revision, config.any_base, say)
        return config.model_config(model=name, revision=revision)
    assert config.model is not None, "EvaluationConfig requires a model or an adapter"
    return config.model_config(model=resolve_name(config.model, config.revision, say))


def _read(
    config: EvaluationConfig,
    limits: Mapping[str, int | None],
    from_run: Collection[str],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    say: Say,
) -> dict[str, Rows]:
    """The rows of each set. limits: set -> only the first N. from_run: the sets that are said to be the run's."""
    if config.bundled:
        say("No data named: using the bundled biographies of invented people.")
        parts = ("forget", "retain", "holdout") if config.leaks else ("forget", "retain")
        return {part: bundled_rows(part, limit=limits[part]) for part in parts}
    named = config.named_data
    if named:
        shown = {part: f"{part} {first_of(data_names(source), separator=', ')}" for part, source in named.items()}
        given = ", ".join(text for part, text in shown.items() if part not in from_run)
        of_run = ", ".join(text for part, text in shown.items() if part in from_run)
        say("Data: " + "; ".join(filter(None, [given, of_run and f"of the adapter's run {of_run}"])))
    passages = Passages.of(config, tokenizer)
    whole = replace(passages, form="text")  # of a document whose loss is measured, each passage once
    columns = config.named_columns
    sources = {
        part: read_rows(
            source, limit=limits[part], passages=whole if part in DOCUMENTS.sets else passages, columns=columns
        )
        for part, source in named.items()
    }
    for part, rows in sources.items():
        for note in rows.notes:
            say(f"{part}: {note}")
    if "forget" in sources and is_general(named.get("retain")):  # as in training
        forget = to_examples(sources["forget"], **config.columns)
        sources["retain"], lines = general_rows(sources["retain"], forget, tokenizer, template, config.tokens_per_row)
        for line in lines:
            say(f"retain: {line}")
    return sources


def _select(sources: Mapping[str, Rows], context: Context) -> list[tuple[Benchmark, str, Selection]]:
    """What is measured by which benchmark: each set by the first benchmark that recognises it."""
    selected: list[tuple[Benchmark, str, Selection]] = []
    for name, rows in sources.items():
        for benchmark in BENCHMARKS:
            selection = benchmark.select(name, rows, context) if name in benchmark.sets else None
            if selection is not None:
                selected.append((benchmark, name, selection))
                break
    for benchmark in BENCHMARKS:
        selected += [(benchmark, name, own) for name, own in benchmark.own_sets(context.config).items()]
    return selected


def _select_for_leaks(
    sources: Mapping[str, Rows], read: Examples, judges: Judges | None, context: Context, allow_overlap: bool
) -> tuple[dict[str, Selection], Attacker]:
    """The rows of the leak tests, whatever their benchmark: "forget", and the judges of "holdout" if there is one; and
    what else they may use. Empty if there are no leak tests.

    Raises UserError if the holdout has rows of the forget or the retain set, unless the run was allowed to.
    """
    config = cast(EvaluationConfig, context.config)
    if not config.leaks:
        return {}, Attacker()
    examples = {part: read(part) for part in ("forget", "holdout") if part in sources}
    to_keep = read("retain") if "retain" in sources else []
    for part, taught in (("forget", examples["forget"]), ("retain", to_keep)):
        if pairs := find_overlap(taught, examples.get("holdout", [])):
            first = is_also(*pairs[0])
            shared = f"{len(pairs)} of the {part} rows are in the holdout as well ({first}), which must hold only rows"
            if not allow_overlap:
                raise UserError(f"{shared} that the model was never taught: remove them from one of the two.")
            context.notes.append(f"{shared} that the model was never taught (the run had --allow-overlap).")
    if judges and judges.note:
        context.notes.append(judges.note)
    selected, measured = {}, dict[str, list[Example]]()
    for part, of_part in examples.items():
        among = judges.places if judges and part == "holdout" else [*range(len(of_part))]
        places = [among[i] for i in context.choose(len(among))]
        measured[part] = chosen = [of_part[i] for i in places]
        selected[part] = Selection(context.tokenized(part, chosen), len(among), places)
    wording = Wording(measured, context.template, config.tokens_per_row, context.fit)
    attacker, tokenizer, template = Attacker(wording=wording), context.tokenizer, context.template
    if RETUNING.name in config.leaks:
        attacker.general = bundled_general("general", examples["forget"], tokenizer, template, wording.longest)
        if "retain" in sources:
            kept = [to_keep[i] for i in context.choose(len(to_keep))]
            rows = tokenize(kept, tokenizer, max_length=wording.longest, template=template, drop_too_long=True)
            attacker.retain = rows.apart_from(examples["forget"])
    return selected, attacker


class Judges(NamedTuple):
    """The holdout rows that leak tests compare with, by their places. note: on those that are left out, if any are."""

    places: list[int]
    examples: list[Example]
    note: str | None


def _judges(config: EvaluationConfig, holdout: Sequence[Example]) -> Judges:
    """Those that did not set the levels of the adapter's run; where none of them did, all, or, under --forget-level,
    the half by which a run is judged.

    Raises UserError where there are none.
    """
    places, what = [*range(len(holdout))], "set the levels of the run (--forget-level) and"
    if config.adapter:
        places = judging(run_of_adapter(config.adapter).path, holdout)
    if not places:
        raise UserError(
            "--holdout: all of its rows set the levels of the run (--forget-level): name others to judge by."
        )
    if config.forget_level == "holdout" and len(places) == len(holdout):
        (_, places), what = halves(KnownByText(holdout)), "would set the levels of a run with --forget-level, and"
    left_out = len(holdout) - len(places)
    note = f"{left_out} of {len(holdout)} holdout rows {what} are left out." if left_out else None
    return Judges(places, [holdout[place] for place in places], note)


def _forms(
    selected: Sequence[tuple[Benchmark, str, Selection]],
    sources: Collection[str],
    examples: Examples,
    leak_rows: Mapping[str, Selection],
    context: Context,
) -> list[str]:
    """How the rows of each set are written, where no benchmark has a form of its own."""
    named = {name for benchmark, name, _ in selected if benchmark.uses_template} | set(leak_rows)
    return [
        f"{name}: {context.template.describe(examples(name)[0], context.tokenizer)}"
        for name in sources
        if name in named
    ]


def _are_others(config: EvaluationConfig, sources: Mapping[str, Rows], examples: Examples) -> bool:
    """Whether the forget rows are known to be others than those of the run of --adapter."""
    if config.adapter is None or "forget" not in sources:
        return False
    try:
        forget = examples("forget")
    except UserError:  # rows of a benchmark that no run could forget
        return True
    try:
        return are_others(run_of_adapter(config.adapter).path, forget)
    except UserError:  # the record is damaged, as the report says
        return False


def _is_other_holdout(config: EvaluationConfig, judges: Judges | None) -> bool:
    """Whether leak tests compare with a holdout that is known to be another than that of the run of --adapter."""
    if config.adapter is None or not config.leaks:
        return False
    try:
        return is_other_holdout(run_of_adapter(config.adapter).path, judges and judges.examples)
    except UserError:  # the record is damaged, as the report says
        return False


def _digests(
    config: EvaluationConfig,
    sources: Mapping[str, Rows],
    judges: Judges | None,
    model: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, str]:
    """A hash of each set, with what is read beside it, of the holdout rows that leak tests compare with, where they are
    not all of them, of how the tokenizer splits texts and writes conversations, of the base model's files, and of the
    adapter."""
    digests = {}
    for part, rows in sources.items():
        beside = [text for one in BENCHMARKS if part in one.sets and (text := one.read_beside(part, config))]
        digests[part] = json_sha256([rows.rows, *beside] if beside else rows.rows)
    if judges and len(judges.places) < len(sources["holdout"].rows):
        digests[THE_JUDGES] = json_sha256([sources["holdout"].rows[place] for place in judges.places])
    ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    digests[THE_TOKENIZER] = json_sha256([ids, tokenizer.chat_template])
    digests[THE_MODEL] = digest_of(str(model.model), model.revision)
    if config.adapter:
        digests[THE_ADAPTER] = file_sha256(AdapterFiles(expanded(config.adapter)).weights)
    return digests
