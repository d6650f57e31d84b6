"""NPO as the papers' own code runs it: a second model as the reference, every logit of both. The rows of each step, the
objective, the adapter and the optimiser are those of `lowmem-npo train` with the same settings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lowmem_kernels import IGNORE_INDEX
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.shared.baselines import Baseline, Batch
from lowmem_npo.config import RunConfig
from lowmem_npo.data import PreparedData, TokenizedRow
from lowmem_npo.files import PARTIAL, put_in_place
from lowmem_npo.model import attach_lora, compute_autocast, load_model
from lowmem_npo.training.step_rows import StepBatches


class TwoModels(Baseline):
    """As `Baseline`, with products in the type of the weights."""

    def _logits(self, batch: Batch) -> Tensor:
        with compute_autocast(self.policy):
            return self.policy(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits


def forget_with_two_models(config: RunConfig, data: PreparedData) -> None:
    """Trains an adapter and saves it in the run's output directory. Nothing of it can be resumed."""
    assert data.retain is not None
    objective, training = config.objective, config.training
    torch.manual_seed(training.seed)
    policy = attach_lora(load_model(config.model), config.adapter)
    reference = load_model(config.model).eval()
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=training.lr, weight_decay=0.0)
    weights = {"beta": objective.beta, "gamma": objective.gamma, "delta": objective.delta}
    step = TwoModels(policy, reference, optimizer, together=False, **weights)
    rows = StepBatches(
        len(data.forget), len(data.retain), training.batch_size, training.retain_rows, seed=training.seed
    )
    for number in range(round(training.epochs * rows.steps_per_epoch)):
        forget, retain = rows.step_rows(number)
        step.step(_batch(data.forget, forget, policy.device), _batch(data.retain, retain, policy.device))
    partial = config.output_dir.with_name(config.output_dir.name + PARTIAL)
    policy.save_pretrained(str(partial))
    put_in_place(partial, config.output_dir)


def _batch(rows: Sequence[TokenizedRow], places: Sequence[int], device: torch.device) -> Batch:
    """Padded on the right."""
    chosen = [rows[place] for place in places]
    ids, labels = ([torch.tensor(row[name]) for row in chosen] for name in ("input_ids", "labels"))
    mask = [torch.ones_like(row) for row in ids]
    fills = {"input_ids": (ids, 0), "labels": (labels, IGNORE_INDEX), "attention_mask": (mask, 0)}
    return {
        name: pad_sequence(parts, batch_first=True, padding_value=fill).to(device)
        for name, (parts, fill) in fills.items()
    }
