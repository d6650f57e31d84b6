"""A few steps of plain fine-tuning on a model under test: what an attacker who relearns does."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from lowmem_kernels import token_logprobs
from peft import PeftModel
from transformers import PreTrainedModel

from lowmem_npo.data import TokenizedRow
from lowmem_npo.evaluation.scoring.eval_mode import progress_bar
from lowmem_npo.evaluation.scoring.likelihood import answer_batch
from lowmem_npo.memory.checkpointing import checkpointing
from lowmem_npo.model import answer_hidden, frozen_head
from lowmem_npo.model.layers import causal_lm
from lowmem_npo.model.modes import eval_mode


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
    with progress_bar(steps, "leaks: relearning, steps", progress) as bar:
        for step in range(1, steps + 1):
            batch = [rows[next(order)] for _ in range(min(batch_size, len(rows)))]
            with eval_mode(model), checkpointing(causal_lm(model)):
                answers = answer_hidden(model, answer_batch(model, batch))
                loss = -token_logprobs(answers.hidden, head, answers.targets).mean()
                loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            bar.update()
            yield step


def _shuffled(rows: int, shuffle: random.Random) -> Iterator[int]:
    while True:
        yield from shuffle.sample(range(rows), rows)
