"""Of open-unlearning's figures on membership those that take more than the likelihoods of the model itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from lowmem_npo.evaluation.benchmarks.tofu import TofuOptions
from lowmem_npo.evaluation.directory import differences
from lowmem_npo.evaluation.leaks.contract import Subject
from lowmem_npo.evaluation.leaks.membership import MembershipOptions
from lowmem_npo.evaluation.open_unlearning import gradient_figure, reference_figure
from lowmem_npo.evaluation.settings import EvaluationConfig
from lowmem_npo.run_directory import EvaluationFiles


def further_membership(
    config: EvaluationConfig, digests: Mapping[str, str], places: Mapping[str, Sequence[int]], subject: Subject
) -> tuple[dict[str, float], list[str]]:
    """The figures, and why one is missing that could have been expected; none without a holdout.

    digests: a hash of each set. places: set -> where in it the rows of the leak tests are.
    """
    figures: dict[str, float] = {}
    notes: list[str] = []
    if not subject.holdout:
        return figures, notes
    log = cast(TofuOptions, config).retained_log
    if log is not None and (of_log := losses(log)):
        others = differences(log, config, digests, of_leaks=False)
        known = {part: [of_log.get(part, {}).get(place) for place in of_set] for part, of_set in places.items()}
        if others == [] and all(loss is not None for of_set in known.values() for loss in of_set):
            figures["mia_reference"] = reference_figure(subject.token_scores(), cast(dict[str, list[float]], known))
        else:
            had = f"the evaluation of --retained-log had {' and '.join(others or ['other rows'])}"
            why = had if others is not None else "the settings of --retained-log are not beside it"
            notes.append(f"mia_reference is not measured: {why}.")
    elif log is not None and EvaluationFiles(Path(log).expanduser().parent).rows.exists():
        notes.append("mia_reference is not measured: the evaluation of --retained-log had no --leaks membership.")
    if cast(MembershipOptions, config).mia_gradnorm:
        sets = subject.sets.items()
        norms = {part: subject.scorer.gradient_norms(f"leaks: {part} gradients", rows) for part, rows in sets}
        if (figure := gradient_figure(norms)) is not None:
            figures["mia_gradnorm"] = figure
    return figures, notes


def losses(result: str) -> dict[str, dict[int, float]]:
    """Set -> row -> mean NLL per answer token, as the evaluation at `result` wrote it into rows.jsonl; empty where none
    can be read."""
    by_set: dict[str, dict[int, float]] = {}
    try:
        for line in EvaluationFiles(Path(result).expanduser().parent).rows.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if (loss := row.get("leaks", {}).get("loss")) is not None:  # a likelihood: the larger, the likelier
                by_set.setdefault(row["set"], {})[row["row"]] = -loss
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}
    return by_set
