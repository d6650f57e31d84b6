"""The rows of a simulated step, which are but lengths: the largest that can occur, or typical ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lowmem_kernels import IGNORE_INDEX

from lowmem_npo.config import PREFERRING_TERMS, RunConfig
from lowmem_npo.data import TokenizedRow
from lowmem_npo.training.adversary import ROWS
from lowmem_npo.training.training_rows import Parts


@dataclass(frozen=True)
class StepRows:
    """The largest rows that can occur in one optimiser step, largest first: (tokens, answer tokens) of each."""

    forget: tuple[tuple[int, int], ...]
    retain: tuple[tuple[int, int], ...]
    alternatives: tuple[tuple[int, int], ...] = ()  # one of which goes with each of `forget`, if there are any
    taught_again: tuple[tuple[int, int], ...] = ()  # what the adversary learns before the step, if there is one

    @classmethod
    def of_length(cls, config: RunConfig) -> StepRows:
        """Rows of --max-length tokens, all of them answer: the worst case, for data that are not known."""
        row = (config.data.max_length, config.data.max_length - 1)
        forget, paired = (row,) * config.training.batch_size, config.objective.forget_term in PREFERRING_TERMS
        taught_again = (row,) * ROWS if config.objective.adversary is not None else ()
        return cls(forget, (row,) * config.training.retain_rows, forget if paired else (), taught_again)

    @classmethod
    def of_data(cls, config: RunConfig, rows: Parts, typical: bool = False) -> StepRows:
        """The longest rows, with the longest answers, each as often as a step can hold it.

        typical: rows of all lengths that there are instead, evenly, as many tokens as a step has on average. Those of
        about the mean length come first, so that a micro-batch has its share.
        """
        size, num_retain = config.training.batch_size, config.training.retain_rows
        forget, retain = (1, 1) if typical else _occurrences(config, rows)
        chosen = _spread if typical else _largest
        return cls(
            chosen(rows.forget, size, forget),
            chosen(rows.retain or (), num_retain, retain),
            chosen(rows.alternatives, size, forget),
            chosen(rows.taught_again, min(ROWS, max(len(rows.taught_again) - size, 0)), 1),
        )

    def tokens(self, padding_free: bool) -> int:
        """Of all of them in one pass."""
        lengths = [length for part in (self.forget, self.alternatives, self.retain) for length, _ in part]
        return sum(lengths) if padding_free else len(lengths) * max(lengths, default=0)

    def at_most(self, tokens: int, padding_free: bool) -> StepRows:
        """As many rows, each shortened by the same share, that have at most so many tokens in one pass."""
        share = tokens / self.tokens(padding_free)

        def of(part: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
            lengths = [max(2, int(length * share)) for length, _ in part]
            return tuple((length, min(a, length - 1)) for length, (_, a) in zip(lengths, part, strict=True))

        return StepRows(of(self.forget), of(self.retain), of(self.alternatives), self.taught_again)

    def micro_batch(self, config: RunConfig) -> StepRows:
        """The largest rows that go through the model at once."""
        micro_batches = config.training.micro_batches()
        retain = -(-config.training.retain_rows // micro_batches) if config.objective.needs_retain else 0
        forget = -(-config.training.batch_size // micro_batches)
        return StepRows(self.forget[:forget], self.retain[:retain], self.alternatives[:forget], self.taught_again)


def token_row(length: int, answers: int, token: int = 0) -> TokenizedRow:
    """A row of so many tokens, all of them the same: rows of another one say something else."""
    prompt, ids = length - answers, [token] * length
    return {"input_ids": ids, "labels": [IGNORE_INDEX] * prompt + ids[prompt:], "prompt_length": prompt}


def _occurrences(config: RunConfig, rows: Parts) -> tuple[int, int]:
    """How often a row to forget, and one to retain, can be among those of one step.

    A step takes what is left of a pass over the rows, then begins the next, in another order; without stages and
    halves, an epoch's last step ends with its forget rows instead. In stages, a row of a later fold comes twice in a
    pass over the retain rows; that both passes then have it twice is too rare to plan for.
    """
    training, objective = config.training, config.objective
    folds, halves = training.layered or 1, 2 if objective.attack_steps > 1 else 1
    passes, num_retain = len(rows.forget) // (folds * halves), len(rows.retain or ())
    forget = 1 if folds * halves == 1 else _of_passes(passes, training.batch_size)
    if training.layered is None:
        return forget, _of_passes(num_retain, training.retain_rows, aligned=True)
    return forget, max(2, _of_passes(num_retain - len(rows.forget), training.retain_rows))  # alone in the last stage


def _of_passes(rows: int, count: int, aligned: bool = False) -> int:
    """How many passes over `rows` rows `count` draws in turn can belong to.

    aligned: the draws before were so many, too, each time.
    """
    rows = max(rows, 1)
    first = rows - (math.gcd(rows, count) if aligned else 1)  # the latest place in a pass at which they begin
    return max(1, math.ceil((first + count) / rows))


def _spread(rows: Sequence[TokenizedRow], count: int, _: int) -> tuple[tuple[int, int], ...]:
    sizes = sorted(map(row_size, rows))
    chosen = [sizes[(2 * i + 1) * len(sizes) // (2 * count)] for i in range(count if sizes else 0)]
    mean = sum(length for length, _ in chosen) / max(len(chosen), 1)
    return tuple(sorted(chosen, key=lambda row: (abs(row[0] - mean), row)))


def _largest(rows: Sequence[TokenizedRow], count: int, times: int) -> tuple[tuple[int, int], ...]:
    lengths = sorted((len(row["input_ids"]) for row in rows), reverse=True)
    answers = sorted((sum(label != IGNORE_INDEX for label in row["labels"]) for row in rows), reverse=True)
    return tuple(
        (lengths[i // times], min(answers[i // times], lengths[i // times] - 1))
        for i in range(min(count, times * len(rows)))
    )


def row_size(row: TokenizedRow) -> tuple[int, int]:
    """Its tokens, and how many of them are predicted answer tokens."""
    length = len(row["input_ids"])
    return length, min(sum(label != IGNORE_INDEX for label in row["labels"]), length - 1)
