"""What merged weights say of the rows of the adapter's run, as they are and rounded to 4 bits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lowmem_npo.commands.arguments import parse_run
from lowmem_npo.commands.merge.options import DEQUANTIZED, WHOLE, MergeConfig
from lowmem_npo.commands.train.measuring import EVAL_SEED
from lowmem_npo.commands.train.plan import read_inputs
from lowmem_npo.config import ModelConfig, OutputConfig, StreamOptions
from lowmem_npo.console import silent
from lowmem_npo.data import TokenizedRow
from lowmem_npo.data.overlap import pieces_of_evidence
from lowmem_npo.data.self_written import self_rows
from lowmem_npo.endings import is_out_of_memory
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.answers import choose_rows, read_answers, summaries
from lowmem_npo.evaluation.figures import aligned, at, shares, side_by_side
from lowmem_npo.evaluation.leaks.attack import MARGIN, MUCH, STRENGTH, Attack, Whole
from lowmem_npo.evaluation.leaks.contract import UNKNOWN, beside_holdout
from lowmem_npo.evaluation.leaks.extraction import EXTRACTION, attack_of, beside_each_other
from lowmem_npo.evaluation.leaks.measure import read_leaks
from lowmem_npo.evaluation.scoring.batching import at_once
from lowmem_npo.evaluation.scoring.token_scores import token_scores
from lowmem_npo.files import expanded, file_sha256
from lowmem_npo.memory.host_room import check_room
from lowmem_npo.memory.release import release_memory
from lowmem_npo.memory.streaming import can_stream_to
from lowmem_npo.memory.switches import load_base, stream_layers
from lowmem_npo.model.checkpoint import find_checkpoint
from lowmem_npo.model.loading import DTYPES, resolve_device
from lowmem_npo.model.names import Base
from lowmem_npo.report.as_audited import of_another_base
from lowmem_npo.report.audit import read_audit, recorded_adapter
from lowmem_npo.run_directory import RunFiles, run_of_adapter
from lowmem_npo.training.forget_level import halved

MERGED_INTO = {WHOLE: "merged into whole weights", DEQUANTIZED: "merged into dequantised weights"}
WEIGHTS = {WHOLE: "the whole weights", DEQUANTIZED: "the dequantised weights"}
COLUMNS = ("forget NLL", "forget extraction", "retain NLL")
AS_FORGOTTEN = 0.1  # of what was forgotten: so much less counts as the same


@dataclass(frozen=True)
class RowFigures:
    """forget_nll, retain_nll, holdout_nll: nats per answer token. extraction, holdout_extraction:
    `extraction_strength` of the rows to forget, and of the holdout. by_chance: the p-value of their difference,
    least_p: the lowest that so few rows can have, whole: the share of answers that it recites. None where it is not
    known."""

    forget_nll: float | None = None
    extraction: float | None = None
    retain_nll: float | None = None
    holdout_nll: float | None = None
    holdout_extraction: float | None = None
    by_chance: float | None = None
    least_p: float | None = None
    whole: Whole | None = None

    @property
    def forgotten_nll(self) -> float:
        """How unlikely the forget answers are, up to what the model gives answers that it never saw: more than that is
        not better."""
        return min(_number(self.forget_nll), _number(self.holdout_nll))

    @property
    def standing_out(self) -> float:
        """How much more of the forget answers is extracted than of answers that the model never saw."""
        return max(0.0, _number(self.extraction) - (self.holdout_extraction or 0.0))

    @property
    def written(self) -> Attack:
        """What is extracted of the forget answers, beside the holdout's."""
        strength, level = _number(self.extraction), self.holdout_extraction
        return Attack(STRENGTH, strength, level, self.by_chance, {}, self.least_p, self.whole)

    @property
    def cells(self) -> list[float | None]:
        """In the order of `COLUMNS`."""
        return [self.forget_nll, self.extraction, self.retain_nll]


UNMEASURED = RowFigures()


@dataclass(frozen=True)
class RunRows:
    """The rows that a run measured, and what it found of them.

    sets: "forget", and "retain" and "holdout" where there are any. model: how it is loaded to be asked. before, after:
    the original model, and the adapter beside it, as the run measured them. streaming: --stream-weights, as the run had
    it, where there is a GPU. groups: "forget" and "holdout" -> of each row (`pieces_of_evidence`); None: each is one.
    """

    sets: Mapping[str, Sequence[TokenizedRow]]
    model: ModelConfig
    batch_size: int
    before: RowFigures
    after: RowFigures
    streaming: StreamOptions = field(default_factory=StreamOptions)
    groups: Mapping[str, Sequence[int]] | None = None

    @property
    def rows_at_once(self) -> int:
        """Rows per batch."""
        most = max(map(len, self.sets.values()), default=0)
        return at_once(self.batch_size, most, self.streaming.stream_weights)


def rows_of_run(config: MergeConfig, name: str, revision: str | None) -> RunRows:
    """The rows of the run that trained the adapter. name, revision: of its base.

    Raises UserError if there is no run, or its data cannot be read as it was.
    """
    run = run_of_adapter(config.adapter)
    if not run.run_yaml.is_file():
        raise UserError(f"there is no run.yaml in '{run.path}', which would name the rows to measure")
    flags = ["--config", str(run.run_yaml), "--model", name, "--device", config.device]
    settings = parse_run([*flags, *(["--revision", revision] if revision else [])], "merge")
    own_texts = self_rows(settings.data.retain) is not None
    if own_texts:
        settings.data = replace(settings.data, retain=str(run.self_written))
    data = read_inputs(settings, silent).data
    if settings.objective.forget_level == "holdout":  # the other half is what the run was judged by
        data = halved(data)
    sets = {
        "forget": data.forget,
        "retain": data.retain if data.retain is not None else data.general,
        "holdout": data.holdout,
    }
    known = (read_audit(run.path) or {}).get("data", {})
    for part in ("forget", "holdout", *([] if own_texts else ["retain"])):
        then, rows = known.get(part, {}).get("tokenised"), getattr(data, part)
        if rows is not None and then not in (None, rows.fingerprint):
            raise UserError(f"the {part} rows have changed since the run in '{run.path}', or are read otherwise now")
    limit = settings.output.eval_rows or OutputConfig.eval_rows
    places = {part: choose_rows(len(rows), limit, EVAL_SEED) for part, rows in sets.items() if rows is not None}
    chosen = {part: [rows[i] for i in places[part]] for part, rows in sets.items() if rows is not None}
    groups = {
        part: pieces_of_evidence([rows.examples[i] for i in places[part]])
        for part, rows in (("forget", data.forget), ("holdout", data.holdout))
        if rows is not None
    }
    weights = RunFiles(expanded(config.adapter)).weights
    onto = Base.here(name, revision, of_adapter=not config.any_base)
    own = of_another_base(run.path, onto) is None
    stages = {stage: figures_of_run(run, stage, weights) if own else RowFigures() for stage in ("before", "after")}
    streams = settings.memory.stream_weights and can_stream_to(resolve_device(config.device))
    figures = stages["before"], stages["after"]
    streaming = StreamOptions(streams)
    return RunRows(chosen, settings.model, settings.output.eval_batch_size, *figures, streaming, groups)


def measure(folder: Path, rows: RunRows, four_bits: bool = False) -> RowFigures:
    """What the merged model in `folder` says of them; four_bits: rounded to NF4 as it is loaded.

    Raises UserError if it does not fit into memory, or gives no finite numbers.
    """
    device, streaming = resolve_device(rows.model.device), rows.streaming
    if device.type == "cpu" or streaming.stream_weights:
        check_room(folder, four_bits)
    merged: dict[str, Any] = {"model": str(folder), "revision": None, "quantized_cache": None}
    if not find_checkpoint(str(folder)).is_in(DTYPES[rows.model.dtype]):  # bf16 would round what --dtype stored wrote
        merged["dtype"] = "float32"
    loaded = replace(rows.model, **merged, qlora=four_bits, attn="sdpa")
    try:
        model = load_base(loaded, streaming, silent)
        stream_layers(model, streaming, device)
        scores = {
            part: token_scores(model, of_set, batch_size=rows.rows_at_once, description=f"{part} rows, merged")
            for part, of_set in rows.sets.items()
        }
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError("the merged model does not fit into the GPU's memory (--device cpu)") from error
    finally:
        model = None  # type: ignore[assignment]
        release_memory()

    def nll(part: str) -> float | None:
        own = [logprob for row in scores.get(part, ()) for logprob in row.logprobs]
        return -math.fsum(own) / len(own) if own else None

    forget, holdout = scores.get("forget"), scores.get("holdout")
    written = beside_each_other(forget, holdout, rows.groups) if forget else {}
    figures = RowFigures(nll("forget"), None, nll("retain"), nll("holdout"))
    if (attack := attack_of(written)) is None:
        return figures
    figures = replace(figures, extraction=attack.value, holdout_extraction=attack.level, whole=attack.whole)
    return replace(figures, by_chance=attack.p, least_p=attack.least_p)


def table(rows: RunRows, measured: Mapping[str, RowFigures]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: the run's own figures, and those of merged weights by what they are called."""
    by_name = {"before forgetting, by the run": rows.before, "after, by the run": rows.after}
    by_name = {name: of for name, of in by_name.items() if of.forget_nll is not None} | dict(measured)
    columns = [side_by_side(column) for column in zip(*(of.cells for of in by_name.values()), strict=True)]
    return ["weights", *COLUMNS], [list(line) for line in zip(by_name, *columns, strict=True)]


def as_text(rows: RunRows, measured: Mapping[str, RowFigures]) -> str:
    """The table for a terminal."""
    return aligned(*table(rows, measured), COLUMNS)


def better(forms: Mapping[str, RowFigures], before: RowFigures) -> tuple[str, str]:
    """The base weights that an adapter is better merged into, and a sentence that says why.

    Of forms that forget as well, but for a tenth, the one whose retain rows are likelier; the whole weights if that
    decides nothing.
    """
    most, least = max(of.forgotten_nll for of in forms.values()), min(of.standing_out for of in forms.values())
    start = min(before.forget_nll or 0.0, most)
    forgetful = [
        name
        for name in MERGED_INTO
        if most - forms[name].forgotten_nll <= AS_FORGOTTEN * (most - start)
        and forms[name].standing_out <= least + MARGIN
    ]
    if not forgetful:  # one is better by the one figure, the other by the other
        forgetful = [min(MERGED_INTO, key=lambda name: forms[name].standing_out)]
    best = min(forgetful, key=lambda name: _number(forms[name].retain_nll))  # the first of equal ones
    other = next(name for name in MERGED_INTO if name != best)
    advice = f"Advised: {WEIGHTS[best]} (--base-weights {best})"
    if other in forgetful:
        own, others = side_by_side([forms[best].retain_nll, forms[other].retain_nll])
        keeps = "" if forms[best].retain_nll is None else f", and the answers to keep have NLL {own}, not {others}"
        return best, f"{advice}: as much is forgotten in them as in {WEIGHTS[other]}{keeps}."
    own, others = side_by_side([forms[best].forget_nll, forms[other].forget_nll])
    share, more = shares(_number(forms[best].extraction), _number(forms[other].extraction))
    return best, (
        f"{advice}: more is forgotten in them than in {WEIGHTS[other]}; the forget answers have NLL {own}, not "
        f"{others}, and the model finishes {share} of them by itself, not {more}."
    )


def still_held(merged: RowFigures, before: RowFigures, after: RowFigures) -> str | None:
    """A warning, where much of what was to be forgotten can be had from the merged weights that are kept."""
    if not _are_held(merged, before, after):
        return None
    own, beside = beside_holdout(_number(merged.extraction), merged.holdout_extraction, before.extraction, UNKNOWN)
    known = {"before forgetting": before.forget_nll, "beside its base": after.forget_nll}
    known = {stage: nll for stage, nll in known.items() if nll is not None}
    nll, *others = side_by_side([merged.forget_nll, *known.values()])
    stages = "".join(f", {stage} {of}" for stage, of in zip(known, others, strict=True))
    return (
        f"WARNING: forgotten text is in the merged weights: they write the last {own} of a forgotten answer by "
        f"themselves; {beside}. The NLL of the forget answers is {nll}{stages}."
    )


def _are_held(merged: RowFigures, before: RowFigures, after: RowFigures) -> bool | None:
    """`_holds` of merged weights, measured by what the adapter beside its base has forgotten, where that is known: no
    more than makes an answer like one that the model never saw."""
    forgotten = after.forget_nll if after.forget_nll is not None else merged.forget_nll
    return _holds(merged, before, RowFigures(min(_number(forgotten), _number(merged.holdout_nll))))


def survival(merged: RowFigures, rounded: RowFigures, before: RowFigures, after: RowFigures = UNMEASURED) -> str:
    """Whether what the merged weights have forgotten stays so in 4 bits, in words and figures. after: the adapter
    beside its base."""
    from_merged, from_rounded = _are_held(merged, before, after), _holds(rounded, before, merged)
    verdict = {
        True: "WARNING: forgetting does not survive 4 bits",
        False: "Forgetting survives 4 bits",
        None: "It cannot be told whether forgetting survives 4 bits",
    }[from_rounded]
    known = before.forget_nll
    if known is not None and _number(merged.forget_nll) - known < AS_FORGOTTEN * known:
        verdict = "So little is forgotten that it cannot be told whether it survives 4 bits"
    if from_merged:
        verdict = "WARNING: forgotten text is in the merged weights already, whether or not they are rounded"
    own, whole = shares(_number(rounded.extraction), _number(merged.extraction))
    extraction, level = _number(rounded.extraction), rounded.holdout_extraction
    beside = beside_holdout(extraction, level, before.extraction, UNKNOWN)[1]  # the rows are those of the run
    parts = {"forget": (merged.forget_nll, rounded.forget_nll), "retain": (merged.retain_nll, rounded.retain_nll)}
    courses = [
        f"of the {part} answers from {' to '.join(side_by_side(course))}"
        for part, course in parts.items()
        if None not in course
    ]
    return (
        f"{verdict}. Rounded to NF4, the merged model writes the last {own} of a forgotten answer by itself, unrounded "
        f"{whole}; {beside}. Rounding takes the NLL {', '.join(courses)}."
    )


def _holds(figures: RowFigures, before: RowFigures, merged: RowFigures) -> bool | None:
    """Whether much of what was to be forgotten can be had from `figures`: by extraction, or since the answers are more
    than half as likely again as before."""
    level = figures.holdout_extraction
    signs = [figures.written.leaks(before.extraction)]
    if before.forget_nll is not None and before.forget_nll < _number(merged.forget_nll):
        lost = _number(merged.forget_nll) - before.forget_nll
        signs.append(_number(merged.forget_nll) - _number(figures.forget_nll) > MUCH * lost)
    if True not in signs and signs[0] is None and level is not None:  # above the holdout's, maybe by chance
        return None
    return True if True in signs else (False if False in signs else None)


def _number(value: float | None) -> float:
    return math.inf if value is None else value


def figures_of_run(run: RunFiles, stage: str, weights: Path) -> RowFigures:
    """The run's own figures; of after only if they are of the adapter in the file `weights`."""
    try:
        if stage == "after" and recorded_adapter(run.path) != file_sha256(weights):
            return RowFigures()
        sets: Any = summaries(read_answers(run.answers(stage)))
        leaks = read_leaks(run.leaks).get(stage, {})
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return RowFigures()
    kept = sets.get("retain") or sets.get("general")
    strength = at(leaks[EXTRACTION.name].figures, "extraction_strength") if EXTRACTION.name in leaks else None
    return RowFigures(sets["forget"].nll if "forget" in sets else None, strength, kept.nll if kept else None)
