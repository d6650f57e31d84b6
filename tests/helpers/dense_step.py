"""For tests of a training step: random rows, a trainer on a tiny model, and the same step in dense float64."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import torch
from peft import PeftModel
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from lowmem_npo.config import AdapterConfig
from lowmem_npo.training.objective import LET_GO
from lowmem_npo.training.trainer import NPOConfig, NPOTrainer

VOCABULARY = 97
ROUND_THEIR_LOGITS = ("mamba", "mamba2", "falcon_mamba", "nemotron_h")  # to float32, but nothing before


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, t0 to t96; t1 is EOS, t2 padding."""
    words = {f"t{i}": i for i in range(VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t0")), eos_token="t1", pad_token="t2"
    )


def random_rows(count: int, seed: int, vocabulary: int = VOCABULARY, longest: int = 8) -> list[dict]:
    """Rows of unequal prompt and answer lengths, each up to `longest`."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        prompt, answer = (int(torch.randint(1, longest + 1, (1,), generator=generator)) for _ in range(2))
        ids = torch.randint(3, vocabulary, (prompt + answer,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "prompt_length": prompt})
    return rows


def make_trainer(
    model,
    folder: Path,
    forget: list[dict],
    retain: list[dict] | None,
    alternatives: list[dict] | None = None,
    true_dataset: list[dict] | None = None,
    **settings,
) -> NPOTrainer:
    """An NPOTrainer whose adapter already changes the model, so that KL and log-ratios are not 0."""
    defaults = {
        "output_dir": str(folder),
        "max_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "per_device_train_batch_size": len(forget),
    }
    trainer = NPOTrainer(
        model,
        NPOConfig(**{**defaults, **settings}),
        forget,
        retain,
        processing_class=word_tokenizer(),
        peft_config=None if isinstance(model, PeftModel) else AdapterConfig(lora_r=3),
        alternative_dataset=alternatives,
        true_dataset=true_dataset,
    )
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in sorted(trainer.model.named_parameters()):
            if "lora_B" in name and parameter.requires_grad:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return trainer


def step_gradients(trainer: NPOTrainer) -> dict[str, torch.Tensor]:
    """The adapter's gradients of the first optimiser step, just before the optimiser uses them."""
    from transformers import TrainerCallback

    gradients: dict[str, torch.Tensor] = {}

    class Recorder(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            gradients.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})

    trainer.add_callback(Recorder())
    trainer.train()
    return gradients


def dense_step(
    trainer: NPOTrainer, forget: list[dict], retain: list[dict] | None, alternatives: list[dict] | None = None
) -> tuple[float, dict[str, torch.Tensor]]:
    """The step's loss and gradients from full float64 logits, after the formulas in docs/architecture.md.

    Row by row, without padding, with the plainest implementations of attention and experts that transformers has. A row
    with a level is let go as it nears it.
    """
    model = copy.deepcopy(trainer.model).double().eval()
    lm = model.get_base_model()
    lm.set_attn_implementation("eager")
    if lm._can_set_experts_implementation():
        lm.set_experts_implementation("eager")
    o = trainer.passes.objective

    def logprobs(row):  # (answer tokens, V)
        ids = torch.tensor([row["input_ids"]])
        labels = torch.tensor(row["labels"])
        positions = [t for t in range(1, len(labels)) if labels[t] != -100]
        logits = model(input_ids=ids, use_cache=False).logits[0]
        assert logits.dtype == torch.float64 or lm.config.model_type in ROUND_THEIR_LOGITS
        return torch.stack([logits[t - 1] for t in positions]).double().log_softmax(-1), labels[positions]

    def picked(row):
        table, targets = logprobs(row)
        return table[torch.arange(len(targets)), targets]

    loss, tokens = 0.0, 0
    for place, row in enumerate(forget):
        own = picked(row)
        if (levels := trainer.passes.levels) is not None:
            push = min(max((float(levels[place]) + own.mean().item()) / LET_GO, 0), 1)
            own = own.detach() + push * (own - own.detach())
        with torch.no_grad(), model.disable_adapter():
            original = picked(row)
        if o.forget_term == "dpo":
            other = picked(alternatives[place])
            with torch.no_grad(), model.disable_adapter():
                its_original = picked(alternatives[place])
            margin = (other - its_original).sum() - (own - original).sum()
            loss = loss - 2 / o.beta * torch.sigmoid(o.beta * margin).log()
        elif o.forget_term == "npo":
            ratio = own - original
            ratio = {"sequence": ratio.sum()[None], "length": ratio.mean()[None], "token": ratio}[o.normalization]
            loss = loss + (-2 / o.beta * torch.nn.functional.logsigmoid(-o.beta * ratio)).sum()
        elif o.forget_term == "simnpo":
            loss = loss - 2 / o.beta * torch.nn.functional.logsigmoid(-o.beta * own.mean() - o.simnpo_margin)
        elif o.forget_term == "wga":
            loss = loss + (own.detach().exp() ** o.wga_beta * own).sum()
        elif o.forget_term == "satimp":
            p = own.detach().exp()
            loss = loss + (p**o.satimp_beta1 * (1 - p) ** o.satimp_beta2 * own).sum()
        elif o.forget_term == "jensun":
            table, targets = logprobs(row)
            one_hot = torch.nn.functional.one_hot(targets, table.shape[1]).double()
            middle = ((table.exp() + one_hot) / 2).log()
            loss = loss + (table.exp() * (table - middle)).sum() / 2 - (one_hot * middle).sum() / 2
        else:
            loss = loss + own.sum() * (1 if o.forget_term == "ga" else -1)
        tokens += len(own)
    per_token = o.forget_term in ("ga", "idk", "wga", "satimp", "jensun") or (
        o.forget_term == "npo" and o.normalization == "token"
    )
    loss = loss / (tokens if per_token else len(forget))

    nll, kl, tokens = 0.0, 0.0, 0
    for row in retain or ():
        table, targets = logprobs(row)
        with torch.no_grad(), model.disable_adapter():
            original, _ = logprobs(row)
        nll = nll - table[torch.arange(len(targets)), targets].sum()
        p, q = (table, original) if o.kl_direction == "policy-reference" else (original, table)
        kl = kl + (p.exp() * (p - q)).sum()
        tokens += len(targets)
    if tokens:
        loss = loss + o.gamma * nll / tokens + o.delta * kl / tokens
    loss.backward()
    assert math.isfinite(loss.item())
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def relative_error(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """|actual - expected| / |expected|, over all tensors together."""
    assert actual.keys() == expected.keys() and actual
    difference = sum((actual[n].double() - expected[n].double()).square().sum() for n in expected)
    return float((difference / sum(expected[n].double().square().sum() for n in expected)).sqrt())
