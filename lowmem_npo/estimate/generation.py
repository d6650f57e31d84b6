"""How long the measured answers take to write while weights are streamed: a pass through all layers for each token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from transformers import PretrainedConfig

from lowmem_npo.config import RunConfig
from lowmem_npo.data import PreparedData, TokenizedRow
from lowmem_npo.data.self_answered import answers_number, most_tokens
from lowmem_npo.data.self_written import TOKENS
from lowmem_npo.estimate.report import Report
from lowmem_npo.estimate.time import duration
from lowmem_npo.evaluation.answers import answer_length, choose_rows, question
from lowmem_npo.evaluation.scoring.batching import batches, cached_at_once
from lowmem_npo.model.loading import DTYPES

MOST_HOURS = 1.0  # that answers may take to be written, of which there is a half before and a half after training
TIMES = 2  # that each set is measured
REQUEST = 64  # tokens, about, by which another answer is asked for


class Generation(NamedTuple):
    """What writing the measured answers takes."""

    passes: int  # through all layers, before and after training
    pass_seconds: float  # of copying or reading the weights

    @property
    def hours(self) -> float:
        return self.passes * self.pass_seconds / 3600

    @property
    def is_too_long(self) -> bool:
        return self.hours > MOST_HOURS

    @property
    def took(self) -> str:
        """For people."""
        return f"{duration(self.hours)} ({self.passes} passes of {self.pass_seconds:.2g} s)"

    def line(self, generates: bool) -> str:
        """For people."""
        if generates:
            return f"Writing the measured answers takes about {self.took}."
        return (
            f"Writing the measured answers would take about {self.took}: they are read off the likelihoods instead "
            "(--generate-answers on writes them)."
        )


def generation(config: RunConfig, data: PreparedData, architecture: PretrainedConfig, report: Report) -> Generation:
    """Of all measured sets, those to forget in as many forms as there may be. Leak tests come on top."""
    output, forms = config.output, 1
    if output.forms == "all":
        forms += 1 + max((len(example.paraphrases) for example in data.forget.examples), default=0)
    sets = [(data.forget, forms), (data.retain, 1), (data.general, 1)]
    room = cache_room(architecture, config.model.dtype)
    measured = [(rows, times) for rows, times in sets if rows is not None and output.eval_rows]
    passes = sum(
        times * written_passes(_lengths(rows, output.eval_rows, output.max_new_tokens), room)
        for rows, times in measured
    )
    return Generation(TIMES * passes, report.pass_seconds)


def own_writing(config: RunConfig, data: PreparedData, architecture: PretrainedConfig, report: Report) -> Iterator[str]:
    """How long the original model takes to write what it is then trained on, in lines for people."""
    room, rounds = cache_room(architecture, config.model.dtype), answers_number(config.data.alternatives)
    parts = list[tuple[str, str, int, list[tuple[int, int]]]]()
    if data.retain_is_unwritten and data.retain is not None:  # of which the rows are as long as can be
        lengths = [(max(1, len(row["input_ids"]) - TOKENS), TOKENS) for row in data.retain]
        parts.append((f"texts of --retain {config.data.retain}", "a file (--retain FILE)", 1, lengths))
    if data.alternatives_are_unwritten and rounds is not None:
        lengths = [(len(row["input_ids"]) + REQUEST, most_tokens(row)) for row in data.forget]
        what = f"answers of --alternatives {config.data.alternatives}"
        parts.append((what, "a column (--alternative-column)", rounds, lengths))
    for what, instead, times, lengths in parts:
        written = Generation(times * written_passes(lengths, room), report.pass_seconds)
        yield (
            f"Writing the {what} takes about {written.took}, once: later runs of the same model read them. Given as "
            f"{instead}, none is written."
        )


def written_passes(lengths: Sequence[tuple[int, int]], room: int) -> int:
    """Passes through all layers that it takes to write answers: those of a batch, as many as their keys and values
    allow, are written in the same ones.

    lengths: tokens of each prompt, and of its answer at most. room: `cache_room`.
    """
    return sum(max(lengths[i][1] for i in batch) for batch in batches(lengths, len(lengths), room))


def cache_room(architecture: PretrainedConfig, dtype: str) -> int:
    """Tokens whose keys and values are kept at once; dtype: of `DTYPES`."""
    return cached_at_once(architecture, DTYPES[dtype].itemsize)


def _lengths(rows: Sequence[TokenizedRow], limit: int, wanted: int | None) -> list[tuple[int, int]]:
    chosen = [rows[i] for i in choose_rows(len(rows), limit, 0)]
    length = answer_length(chosen, wanted)
    return [(len(question(row)[0]), length) for row in chosen]
