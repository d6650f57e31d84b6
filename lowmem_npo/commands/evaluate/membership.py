"""Of open-unlearning's figures on membership those that take more than the likelihoods of the model itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from lowmem_npo.evaluation.gold import Gold
from lowmem_npo.evaluation.leaks.contract import TOO_LARGE, Subject
from lowmem_npo.evaluation.leaks.membership import MembershipOptions
from lowmem_npo.evaluation.open_unlearning import gradient_figure, reference_figure
from lowmem_npo.evaluation.settings import EvaluationConfig
from lowmem_npo.files import expanded
from lowmem_npo.memory.exhausted import if_fits
from lowmem_npo.run_directory import EvaluationFiles


def further_membership(
    config: EvaluationConfig, gold: Gold, places: Mapping[str, Sequence[int]], subject: Subject
) -> tuple[dict[str, float], list[str]]:
    """The figures, and why one is missing that could have been expected; none without a holdout.

    places: set -> where in it the rows of the leak tests are.
    """
    figures: dict[str, float] = {}
    notes: list[str] = []
    if not subject.holdout:
        return figures, notes
    if gold.log is not None and EvaluationFiles(expanded(gold.log).parent).rows.exists():
        known = gold.losses()
        of_gold = {part: [known.get(part, {}).get(place) for place in of_set] for part, of_set in places.items()}
        if not gold.same_rows:
            notes.append("mia_reference is not measured: the settings of --retained-log are not beside it.")
        elif missing := [part for part, of_set in of_gold.items() if None in of_set]:
            rows = f"--leaks membership of these {' and '.join(missing)} rows"
            notes.append(f"mia_reference is not measured: the evaluation of --retained-log has no {rows}.")
        else:
            figures["mia_reference"] = reference_figure(subject.token_scores(), cast(dict[str, list[float]], of_gold))
    if cast(MembershipOptions, config).mia_gradnorm:
        sets = subject.sets.items()
        norms = if_fits(
            lambda: {part: subject.scorer.gradient_norms(f"leaks: {part} gradients", rows) for part, rows in sets}
        )
        if norms is None:
            notes.append(f"mia_gradnorm is not measured: {TOO_LARGE}.")
        elif (figure := gradient_figure(norms)) is not None:
            figures["mia_gradnorm"] = figure
    return figures, notes
