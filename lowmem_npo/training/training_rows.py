"""All rows that a trainer draws from: those to forget with other answers to them, those to keep with what is held."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

from lowmem_npo.config import PREFERRING_TERMS, REFUSING_TERMS, RunConfig, may_prefer
from lowmem_npo.data import PreparedData, TokenizedRow, TokenizedRows
from lowmem_npo.data.tokenized_rows import IGNORE_INDEX, KnownByIds
from lowmem_npo.errors import UserError
from lowmem_npo.sizes import first_of
from lowmem_npo.training.groups import divided, groups_of

MOST_NAMED = 8  # rows of a part


class Parts(NamedTuple):
    """The rows to forget, those to retain with what is held, the other answers, and what an adversary teaches."""

    forget: Sequence[TokenizedRow]
    retain: Sequence[TokenizedRow] | None
    alternatives: Sequence[TokenizedRow] = ()
    taught_again: Sequence[TokenizedRow] = ()


class Shown(NamedTuple):
    """What steps show of the rows to retain: how many of them, with how many answer tokens."""

    rows: int
    tokens: int


@dataclass(frozen=True)
class TrainingRows:
    """What `ForgetRetain` holds.

    forget: the rows to forget, then `alternatives` times as many other answers to them.
    retain: the rows to keep; under layered unlearning, the true forget rows after them. None: no term looks at any.
    num_forget, num_retain: without what comes after them.
    folds: the places in `forget` of each fold, in the order in which they are forgotten; None: all at once.
    taught_again: the forget rows with their true answers, if there is an adversary that teaches them.
    names: part -> what the user calls each of its rows, such as "facts.csv, line 3"; None of rows without a name.
    """

    forget: Sequence[TokenizedRow]
    retain: Sequence[TokenizedRow] | None
    num_forget: int
    num_retain: int
    alternatives: int = 0
    folds: list[list[int]] | None = None
    taught_again: Sequence[TokenizedRow] = ()
    names: Mapping[str, Sequence[str] | None] = field(default_factory=dict)

    @property
    def parts(self) -> Parts:
        number = self.num_forget
        return Parts(self.forget[:number], self.retain, self.forget[number:], self.taught_again)

    def place(self, part: str, row: int) -> tuple[str, int]:
        """Where the user gave what is in `row` of `part`: another answer belongs to a row to forget, and what is held
        under layered unlearning is one."""
        if part == "retain" and row >= self.num_retain:
            return "forget", row - self.num_retain
        return part, row % self.num_forget if part == "forget" else row

    def shown(self, places: Sequence[int]) -> Shown:
        """Of what a step shows of `retain`."""
        own = [place for place in places if place < self.num_retain]
        labels = [self.retain[place]["labels"][1:] for place in own] if self.retain is not None else []
        return Shown(len(own), sum(label != IGNORE_INDEX for of_row in labels for label in of_row))

    def named(self, part: str, places: Iterable[int]) -> str:
        """Rows of `part` as the user knows them: by file and line, once each, in however many forms they are; by their
        numbers, from 1, where they came without."""
        names = self.names.get(part)
        listed = [str(place + 1) if names is None else names[place] for place in sorted(places)]
        listed = list(dict.fromkeys(listed))
        if names is not None:
            return f"{part}: {first_of(listed, MOST_NAMED)}"
        return f"{part} row{'s' if len(listed) > 1 else ''} {first_of(listed, MOST_NAMED, ', ')}"

    @property
    def cache_names(self) -> dict[str, str]:
        """What the files of a cached reference are called: runs with other rows, such as those of a sweep, may share
        its directory."""
        names = {"forget": "preferences"} if self.alternatives else {}
        return names | ({"retain": "layered"} if self.folds else {})


def training_rows(
    forget: Any,
    retain: Any,
    alternatives: Any,
    true: Any,
    tokenized: Callable[..., Sequence[TokenizedRow]],
    *,
    term: str,
    layered: int | None,
    adversary: bool,
    seed: int,
    teaching: dict[str, Any],
) -> TrainingRows:
    """The rows of `NPOTrainer`'s arguments.

    tokenized: makes tokenised rows of what may be raw, by name. teaching: its further arguments for rows to forget.

    Raises:
        UserError: no rows where there must be some, other answers that do not fit, or rows that cannot be divided.
    """
    to_forget = tokenized(forget, "forget_dataset", **teaching)
    to_keep = None if retain is None else tokenized(retain, "retain_dataset")
    number, kept = len(to_forget), len(to_keep or ())
    if alternatives is None and term in PREFERRING_TERMS:
        raise UserError(f"{term} prefers another answer to the forgotten one: give alternative_dataset.")
    others = () if alternatives is None else tokenized(alternatives, "alternative_dataset")
    if others and not may_prefer(term):
        raise UserError(f"{term} has no use for alternative_dataset: leave it out, or take dpo.")
    if len(others) % number:
        raise UserError(f"alternative_dataset has {len(others)} rows: give one for each of {number} forget rows.")
    if isinstance(to_forget, TokenizedRows) and isinstance(others, TokenizedRows):
        _check_same_prompts(to_forget, others)
    names = {"forget": names_of(to_forget), "retain": names_of(to_keep)}
    known = to_forget  # with the true answers
    if term in REFUSING_TERMS and (layered is not None or adversary):
        known = tokenized(forget if true is None else true, "true_dataset")
        if true is None and known is forget:
            reader = "layered holds" if layered is not None else "adversary teaches"
            raise UserError(f"{reader} the true answers, and {term} has refusals: give true_dataset.")
        if len(known) != number:
            raise UserError(f"true_dataset has {len(known)} rows: give one for each of {number} forget rows.")
    folds = None
    known = known if isinstance(known, TokenizedRows) else KnownByIds(known)
    if layered is not None:
        if to_keep is None:
            raise UserError("layered holds what is not yet forgotten with the retain terms: give gamma or delta.")
        folds = divided(len(to_forget), layered, seed, partial(groups_of, to_forget, known))
        to_keep = [*to_keep, *known]
    rows = [*to_forget, *others] if others else to_forget
    taught_again = known if adversary else ()
    return TrainingRows(rows, to_keep, number, kept, len(others) // number, folds, taught_again, names)


def _check_same_prompts(rows: TokenizedRows, others: TokenizedRows) -> None:
    """Raises UserError for another answer that is not one to the prompt of its row."""
    for place, (other, row) in enumerate(zip(others, cycle(rows), strict=False)):
        length = row["prompt_length"]
        if other["prompt_length"] != length or other["input_ids"][:length] != row["input_ids"][:length]:
            raise UserError(
                f"alternative_dataset, row {place + 1}, has another prompt than forget_dataset, row "
                f"{place % len(rows) + 1}: give other answers to the same prompts, in the same order."
            )


def planned_rows(config: RunConfig, data: PreparedData) -> TrainingRows:
    """The rows of the run that `config` describes, as its trainer will have them.

    Raises:
        UserError: rows that cannot be divided into the folds of --layered.
    """
    term, keeps = config.objective.forget_term, config.objective.needs_retain
    return training_rows(
        data.forget_targets,
        data.retain if keeps else None,
        used_alternatives(config, data),
        data.forget_trained,
        lambda rows, name, **teaching: rows,
        term=term,
        layered=config.training.layered,
        adversary=config.objective.adversary is not None,
        seed=config.training.seed if (seed := config.trainer_args.get("data_seed")) is None else seed,
        teaching={},
    )


def rows_read(config: RunConfig, data: PreparedData) -> list[TokenizedRows | None]:
    """All rows of a run that its model reads. Answers that it is yet to write are left out: they may be shorter than
    what stands in for them."""
    others = None if data.alternatives_are_unwritten else used_alternatives(config, data)
    return [data.forget_trained, data.forget_targets, data.retain, data.holdout, data.level_rows, others]


def used_alternatives(config: RunConfig, data: PreparedData) -> TokenizedRows | None:
    """The other answers, if the forget term may look at any."""
    return data.alternatives if may_prefer(config.objective.forget_term) else None


def names_of(rows: Sequence[TokenizedRow] | None) -> list[str] | None:
    """Where each row comes from: the two forms of `--template both` are from one place. None if that is not known."""
    return [example.where for example in rows.examples] if isinstance(rows, TokenizedRows) else None
