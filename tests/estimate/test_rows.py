"""The rows of a simulated step against those that a run's sampler draws."""

from __future__ import annotations

import pytest

from lowmem_npo.config import ModelConfig, ObjectiveConfig, RunConfig, TrainingConfig
from lowmem_npo.estimate.rows import StepRows, token_row
from lowmem_npo.training.layered import LayeredBatches, divide
from lowmem_npo.training.step_rows import StepBatches
from lowmem_npo.training.training_rows import Parts


@pytest.mark.parametrize(
    ("num_forget", "num_retain", "size", "retain", "layered", "attack_steps"),
    [
        (60, 120, 4, 4, None, 1),
        (12, 2, 4, 8, None, 1),  # each retain row four times
        (12, 30, 8, 8, None, 1),  # a step crosses from one pass to the next
        (12, 7, 5, 3, None, 1),
        (60, 120, 4, 8, None, 20),
        (60, 120, 8, 8, 3, 1),
        (60, 120, 4, 4, 2, 20),
        (12, 12, 4, 4, 2, 20),
        (20, 3, 4, 8, 2, 5),
    ],
)
def test_no_step_has_longer_rows(num_forget, num_retain, size, retain, layered, attack_steps):
    """Rank by rank, over many steps of several seeds; and without stages no row is planned for more often than a step
    has one."""
    forget_rows = [token_row(100 + row, 50) for row in range(num_forget)]
    retain_rows = [token_row(1000 + row, 50) for row in range(num_retain)]
    training = TrainingConfig(batch_size=size, retain_batch_size=retain, layered=layered)
    adversary = {"adversary": 1.0, "adversary_steps": attack_steps} if attack_steps > 1 else {}
    held = forget_rows if layered else []
    config = RunConfig(ModelConfig("known"), training=training, objective=ObjectiveConfig(**adversary))
    largest = StepRows.of_data(config, Parts(forget_rows, retain_rows + held))

    seen = {"forget": [0] * size, "retain": [0] * retain}
    often = {"forget": 0, "retain": 0}
    for seed in range(5):
        sizes = {"num_retain": num_retain, "batch_size": size, "retain_batch_size": retain, "seed": seed}
        batches = StepBatches(num_forget, **sizes)
        if layered or attack_steps > 1:
            folds = divide(num_forget, layered or 1, seed)
            batches = LayeredBatches(folds, 200, 0.2, attack_steps=attack_steps, **sizes)
        for step in range(200):
            for part, rows in zip(seen, batches.step_rows(step), strict=True):
                of = forget_rows if part == "forget" else retain_rows + held
                lengths = sorted((len(of[row]["input_ids"]) for row in rows), reverse=True)
                seen[part][: len(lengths)] = map(max, seen[part], lengths)
                often[part] = max(often[part], *map(rows.count, rows))
    for part, longest in seen.items():
        planned = [length for length, _ in getattr(largest, part)]
        assert len(planned) >= sum(length > 0 for length in longest)
        assert all(one >= other for one, other in zip(planned, longest, strict=False)), (part, planned, longest)
        assert layered or adversary or planned.count(planned[0]) == often[part]
