"""`--forget-level holdout`: how far each row to forget is pushed, and no further.

NPO slows down but never ends, and answers less likely than any that was never taught give themselves away. Here a row
has a level, a mean NLL per token at which it is let go: that of a row which the model was never taught, in whose place
it stands. Rows to forget and rows of the holdout are ranked by their NLL under the original model, and a row's level is
the quantile of the holdout that belongs to its rank, so that the forgotten rows end as spread out as unseen ones are.
Under `--template both` each form is ranked by itself: the same answer is more or less likely in another one.

One half of the holdout sets the levels, the other is what the run is judged by. Rows of the same text are in one half,
or the run would be judged by the very rows that it was fitted to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from peft import PeftModel

from lowmem_npo.console import Say, silent
from lowmem_npo.data import PreparedData, TokenizedRows
from lowmem_npo.data.tokenized_rows import KnownByText
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.scoring.likelihood import answer_likelihoods
from lowmem_npo.files import load_json, write_json
from lowmem_npo.model import reference_mode
from lowmem_npo.training.groups import divided, runs_of, split_texts

SEED = 0  # the halves do not depend on --seed, so that runs with several seeds can be compared


def halved(data: PreparedData, say: Say = silent) -> PreparedData:
    """`data` with half of its holdout in `level_rows`, and the other half as its holdout. How many rows share text with
    one of the other half is said.

    Raises UserError as `halves` does.
    """
    rows = data.holdout
    sets_levels, judges = halves(rows)
    assert rows is not None, "checked by `halves`"
    if shared := split_texts(rows, (sets_levels, judges)):
        say(
            f"--forget-level holdout: {shared} of {len(rows)} holdout rows share text with one of the other half, "
            "since a document had to be cut; of several of about one length none has to be."
        )
    level_rows = _of(rows, sets_levels)
    if (forms := data.holdout_in_forms) is not None:
        where = {example.where for example in level_rows.examples}
        also = [at for at, example in enumerate(forms.examples) if example.plain and example.where in where]
        level_rows = _of(forms, [*sets_levels, *also])
    return replace(data, level_rows=level_rows, holdout=_of(rows, judges))


def halves(rows: KnownByText | None) -> list[list[int]]:
    """The places of the holdout rows that set levels, the smaller half, and of those that judge: by their texts alone,
    so that `evaluate` divides them as training does. What shares text stays together; a document is cut only where the
    halves would not be even else.

    Raises:
        UserError: fewer than two rows that say different things.
    """
    number = 0 if rows is None else len(rows.facts)
    if rows is None or len({*rows.facts}) < 2:
        few = "is none" if not number else "is one" if number == 1 else f"are {number} that say the same"
        raise UserError(f"--forget-level holdout needs rows for its levels and others to be judged by; there {few}.")
    groups = partial(runs_of, rows)
    if len({*groups(2)}) < number:
        return sorted(divided(number, 2, SEED, groups), key=len)
    order, half = np.random.default_rng(SEED).permutation(number).tolist(), number // 2
    return [sorted(order[:half]), sorted(order[half:])]


def _of(rows: TokenizedRows, places: Sequence[int]) -> TokenizedRows:
    return TokenizedRows([rows[i] for i in places], [rows.examples[i] for i in places], rows.max_length)


def levels_of(forget_nll: Sequence[float], unseen_nll: Sequence[float]) -> list[float]:
    """The level of each row to forget, in nats per token.

    forget_nll, unseen_nll: mean NLL per token of each row, under the original model.
    """
    ranks = np.argsort(np.argsort(forget_nll, kind="stable"), kind="stable")
    return np.quantile(unseen_nll, (ranks + 0.5) / len(ranks)).tolist()


def run_levels(
    path: Path, model: PeftModel, data: PreparedData, batch_size: int, *, fresh: bool, say: Say = silent
) -> list[float]:
    """The levels of a run, measured once and kept in `path`, from which a resumed run reads them; measured again if the
    file is damaged. When they are measured, it is said how many rows are there already.

    Raises:
        UserError: the model gives no finite numbers.
    """
    if not fresh and (kept := _kept_levels(path, len(data.forget_trained))) is not None:
        return kept
    assert data.level_rows is not None
    with reference_mode(model):
        sets = {"forget": data.forget_trained, "holdout": data.level_rows}
        nll = {
            name: [
                one.nll for one in answer_likelihoods(model, rows, batch_size=batch_size, description=f"{name} level")
            ]
            for name, rows in sets.items()
        }
    if not np.isfinite([*nll["forget"], *nll["holdout"]]).all():
        raise UserError("The model gives answers no finite likelihood; its weights are damaged.")
    levels = _levels_by_form(data.forget_trained, nll["forget"], data.level_rows, nll["holdout"])
    write_json(path, {"levels": levels}, indent=None)
    if (remark := there_already(nll["forget"], levels)) is not None:
        say(remark)
    return levels


def there_already(forget_nll: Sequence[float], levels: Sequence[float]) -> str | None:
    """A remark on the rows that training will not push; None if there are none."""
    number, of = sum(nll >= level for nll, level in zip(forget_nll, levels, strict=True)), len(levels)
    if not number:
        return None
    remark = f"--forget-level holdout: {number} of {of} forget rows are at their level before training, and not pushed."
    if 2 * number <= of:
        return remark
    return (
        f"{remark} That is most of them, so that little will be forgotten: the model knows them no better than the "
        "holdout. Is the holdout like the rows to forget, and was it never taught?"
    )


def _levels_by_form(
    forget: TokenizedRows, forget_nll: Sequence[float], unseen: TokenizedRows, unseen_nll: Sequence[float]
) -> list[float]:
    """The level of each row to forget, by the unseen rows in its form; by all where none of them has that form."""
    levels = [0.0] * len(forget)
    for plain in (False, True):
        places = [at for at, example in enumerate(forget.examples) if example.plain is plain]
        alike = [nll for nll, example in zip(unseen_nll, unseen.examples, strict=True) if example.plain is plain]
        if places:
            of_form = levels_of([forget_nll[at] for at in places], alike or unseen_nll)
            for at, level in zip(places, of_form, strict=True):
                levels[at] = level
    return levels


def _kept_levels(path: Path, number: int) -> list[float] | None:
    """The levels in a file; None where there are none for `number` rows."""
    try:
        levels = load_json(path)["levels"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    whole = isinstance(levels, list) and len(levels) == number
    return levels if whole and all(isinstance(one, float) and math.isfinite(one) for one in levels) else None
