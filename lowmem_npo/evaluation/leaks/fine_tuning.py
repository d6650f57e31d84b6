"""Fine-tuning as an attack: a model under test is taught something for a few steps, and asked what it should not know.

The weights that are trained are those of an adapter of its own, which is thrown away afterwards; the model's weights,
its adapter and the caller's random numbers are left as they were.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from time import monotonic

import torch
from lowmem_kernels import token_logprobs
from peft import PeftModel
from transformers import PreTrainedModel

from lowmem_npo.data import TokenizedRow
from lowmem_npo.evaluation.leaks.contract import Subject
from lowmem_npo.evaluation.leaks.extraction import beside_each_other, extraction_figures, original_scores
from lowmem_npo.evaluation.leaks.tuned import Figures, Outcome, Tuned, Tuning
from lowmem_npo.evaluation.scoring.likelihood import answer_batch
from lowmem_npo.evaluation.scoring.token_scores import NotFinite, TokenScores, token_scores
from lowmem_npo.memory.checkpointing import checkpointing
from lowmem_npo.memory.exhausted import as_fits, if_fits
from lowmem_npo.model import answer_hidden, frozen_head
from lowmem_npo.model.adapters import extra_adapter, original_model
from lowmem_npo.model.layers import causal_lm
from lowmem_npo.model.modes import eval_mode
from lowmem_npo.progress import Progress

BATCH_SIZE = 4
RANK = 16


def tune(subject: Subject, tuning: Tuning) -> Outcome:
    """What the rows asked for (and the holdout) give: one run of as many steps as the most, measured after each number
    of them, until it diverges or memory runs out. The journal knows what was measured before, but for the latter, which
    may not happen again."""
    journal, key = subject.scorer.journal, tuning.key(subject)
    if tuning.steps_left(subject):
        curve = dict[int, Tuned]()
        if if_fits(lambda: _tune(subject, tuning, curve)) is None:
            return Outcome(curve, too_large=True)
        journal.write(key, [0], [{str(step): asdict(tuned) for step, tuned in curve.items()}])
    return Outcome({int(step): Tuned(**tuned) for step, tuned in journal.known(key)[0].items()})


def _tune(subject: Subject, tuning: Tuning, tuned: dict[int, Tuned]) -> dict[int, Tuned]:
    """Adds to `tuned` what there is after so many steps."""
    scorer = subject.scorer
    _, taught, asked, steps, lr, groups = tuning
    of_set = {"forget": groups or range(len(asked)), "holdout": subject.groups.get("holdout", ())}
    model = scorer.loaded_model

    def scores_of(rows: Sequence[TokenizedRow]) -> list[TokenScores]:
        return token_scores(model, rows, batch_size=scorer.batch_size, progress=False)

    def measure() -> Figures:
        return beside_each_other(scores_of(asked), scores_of(subject.holdout) if subject.holdout else None, of_set)

    original = None
    if isinstance(model, PeftModel):
        with original_model(model):
            original = extraction_figures(scores_of(asked))
    elif subject.form and (of_all := original_scores(subject)):  # a merged model, which cannot be asked
        scores = {id(row): score for row, score in zip(subject.forget, of_all, strict=True)}
        original = extraction_figures([scores[id(row)] for row in asked])
    none = Tuned(len(taught), 0, before := measure(), before, original)
    with extra_adapter(model, RANK, subject.seed):
        for step in fine_tune(
            model,
            taught,
            steps=max(steps),
            lr=lr,
            batch_size=BATCH_SIZE,
            seed=subject.seed,
            progress=scorer.journal.progress,
        ):
            if step in steps:
                try:
                    tuned[step] = replace(none, steps=step, after=measure())
                except NotFinite:  # the attack went too far; the model itself was measured before it
                    break
    return tuned


def fine_tune(
    model: PreTrainedModel | PeftModel,
    rows: Sequence[TokenizedRow],
    *,
    steps: int,
    lr: float,
    batch_size: int,
    seed: int,
    progress: bool,
) -> Iterator[int]:
    """Minimises the mean NLL of the answers' tokens; yields the number of steps done after each."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    head, order = frozen_head(model), _shuffled(len(rows), random.Random(seed))

    def add_gradients(batch: Sequence[TokenizedRow], at_once: int) -> None:
        optimizer.zero_grad()
        parts = [answer_batch(model, batch[start : start + at_once]) for start in range(0, len(batch), at_once)]
        tokens = sum(part.num_answers for part in parts)
        for part in parts:
            answers = answer_hidden(model, part)
            loss = -token_logprobs(answers.hidden, head, answers.targets).mean() * (part.num_answers / tokens)
            loss.backward()

    with Progress(steps, "leaks: fine-tuning", "step", wanted=progress) as bar:
        for step in range(1, steps + 1):
            batch = [rows[next(order)] for _ in range(min(batch_size, len(rows)))]
            with eval_mode(model), checkpointing(causal_lm(model)):
                as_fits(model, len(batch), partial(add_gradients, batch))
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            bar.update()
            yield step


def seconds_per_step(model: PreTrainedModel | PeftModel, rows: Sequence[TokenizedRow]) -> float:
    """What a step on `rows` takes here: the second of two, which are thrown away."""
    with extra_adapter(model, RANK, seed=0):
        steps = fine_tune(model, rows, steps=2, lr=1e-6, batch_size=BATCH_SIZE, seed=0, progress=False)
        next(steps)
        finish(model.device)
        began = monotonic()
        next(steps)
        finish(model.device)
        return monotonic() - began


def finish(device: torch.device) -> None:
    """Waits for what a GPU has still to do: it is only enqueued when a call returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _shuffled(rows: int, shuffle: random.Random) -> Iterator[int]:
    while True:
        yield from shuffle.sample(range(rows), rows)
