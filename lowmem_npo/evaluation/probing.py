"""The leak tests as part of an evaluation: on which rows, on which models, written down where."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from lowmem_npo.config import ModelConfig
from lowmem_npo.data import Rows, Template, TokenizedRows, to_examples, tokenize
from lowmem_npo.data.overlap import find_overlap
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.answers import choose_rows
from lowmem_npo.evaluation.leaks.extraction import extraction_figures
from lowmem_npo.evaluation.leaks.measure import IN_MEMORY, TOKENS, run_tests, skipped
from lowmem_npo.evaluation.leaks.quantization import AS_EVALUATED, measure_forms, quantization
from lowmem_npo.evaluation.result import Evaluation
from lowmem_npo.evaluation.scoring.scorer import Measuring
from lowmem_npo.evaluation.settings import EvaluationConfig

NO_HOLDOUT = (
    "Leaks: without --holdout (rows like the forgotten ones that the model never saw) there is no membership attack, "
    "and what an untaught model would give is not known."
)


class Probed(NamedTuple):
    """Rows of a leak test, their places in their set, and how many rows that has."""

    rows: TokenizedRows
    places: list[int]
    rows_in_set: int


def probed_rows(
    config: EvaluationConfig, sources: Mapping[str, Rows], tokenizer: PreTrainedTokenizerBase, template: Template
) -> dict[str, Probed]:
    """The rows of the leak tests, whatever their kind: "forget", and "holdout" where there is one; none, no tests.

    Raises UserError for forget rows that stand in the holdout.
    """
    if not config.leaks:
        return {}
    examples = {part: to_examples(sources[part], **config.columns) for part in TOKENS if part in sources}
    if "holdout" in examples and (pairs := find_overlap(examples["forget"], examples["holdout"])):
        where = " is ".join(example.where for example in pairs[0])
        raise UserError(
            f"{len(pairs)} of the forget rows also stand in the holdout ({where}), which must hold only what the "
            "model was never taught: remove them from one of the two."
        )
    found = {}
    for part, of_part in examples.items():
        places = choose_rows(len(of_part), config.limit, config.seed)
        rows = tokenize([of_part[i] for i in places], tokenizer, max_length=config.max_length, template=template)
        found[part] = Probed(rows, places, len(of_part))
    return found


def probe(probed: Mapping[str, Probed], config: EvaluationConfig, measuring: Measuring, result: Evaluation) -> None:
    """The tests on the model in memory, into `result`."""
    holdout = probed["holdout"].rows if "holdout" in probed else None
    tests = [test for test in config.leaks if test in IN_MEMORY]
    result.leaks = run_tests(measuring, probed["forget"].rows, holdout, tests, config.leak_settings)
    for part, (rows, places, rows_in_set) in probed.items():
        by_place = {places[row]: scores for row, scores in result.leaks.rows.get(part, {}).items()}
        result.leaks.rows[part] = by_place
        result.rows.setdefault(part, {"scored": len(rows), "in_set": rows_in_set})
        if "quantization" in config.leaks:
            measuring.token_scores(TOKENS[part], rows)  # with which the other forms are compared
    if holdout is None:
        result.notes.append(NO_HOLDOUT)


def probe_other_forms(
    probed: Mapping[str, Probed],
    config: EvaluationConfig,
    base: ModelConfig,
    measuring: Measuring,
    directory: Path,
    result: Evaluation,
) -> None:
    """The test that loads models of its own, into `result`; `measuring` holds none, and knows what `probe` measured."""
    if config.adapter is None:
        result.leaks.tests["quantization"] = skipped("there is no --adapter to merge, or to set on a 4-bit base")
        return
    sets = {part: rows.rows for part, rows in probed.items()}
    forms, problem = measure_forms(
        base, config.adapter, measuring.tokenizer, sets, measuring.journal, config.batch_size, directory / "merged"
    )
    evaluated = {part: extraction_figures(measuring.token_scores(TOKENS[part], rows)) for part, rows in sets.items()}
    result.leaks.tests["quantization"] = quantization({AS_EVALUATED: evaluated, **forms}, problem)
