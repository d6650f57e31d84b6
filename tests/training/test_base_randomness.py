"""Dropout and router noise of the base model are off; the adapter's own dropout is on, and replayed exactly."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from helpers.dense_step import VOCABULARY, dense_step, make_trainer, random_rows, relative_error, step_gradients
from helpers.tiny_models import SIZES, tiny_model
from transformers import GPT2Config, GPTNeoXConfig, MixtralConfig, OPTConfig, PhiConfig, Starcoder2Config

from lowmem_npo.config import AdapterConfig, MemoryConfig
from lowmem_npo.memory.switches import apply_switches
from lowmem_npo.model import attach_lora
from lowmem_npo.training.trainer import NPOTrainer

GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
NOISY = {  # as published, or noisier
    "gpt2": lambda: GPT2Config(vocab_size=VOCABULARY, **GPT2),
    "opt": lambda: OPTConfig(vocab_size=VOCABULARY, ffn_dim=48, word_embed_proj_dim=32, **SIZES),
    "phi": lambda: PhiConfig(vocab_size=VOCABULARY, resid_pdrop=0.1, embd_pdrop=0.1, attention_dropout=0.1, **SIZES),
    "gpt_neox": lambda: GPTNeoXConfig(vocab_size=VOCABULARY, attention_dropout=0.1, hidden_dropout=0.1, **SIZES),
    "starcoder2": lambda: Starcoder2Config(
        vocab_size=VOCABULARY, residual_dropout=0.2, attention_dropout=0.2, embedding_dropout=0.2, **SIZES
    ),
    "mixtral": lambda: MixtralConfig(
        vocab_size=VOCABULARY,
        num_local_experts=4,
        router_jitter_noise=0.3,
        attention_dropout=0.2,
        experts_implementation="eager",  # the other one has no float64
        **SIZES,
    ),
}
MEMORY = {
    "plain": {"sliced_float32": False, "gradient_checkpointing": False},
    "checkpointed": {},
    "tiled": {"tile_mlp": 5, "offload_checkpoints": True},
}
SPLIT = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
FORGET, RETAIN = random_rows(4, seed=1), random_rows(4, seed=2)


def trainer(architecture, folder, memory, identity=False, **settings) -> NPOTrainer:
    memory = {name: value for name, value in MEMORY[memory].items() if name != "tile_mlp" or architecture != "opt"}
    adapter = AdapterConfig(lora_r=3, lora_targets=("all-linear",), lora_dropout=settings.pop("lora_dropout", 0.0))
    model = attach_lora(tiny_model(NOISY[architecture]()), adapter)
    apply_switches(model, MemoryConfig(**memory))
    run = make_trainer(model, folder, FORGET, RETAIN, step_batch_size=4, **settings)
    if identity:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.zeros_(parameter)
    return run


@lru_cache
def dense(architecture):
    with TemporaryDirectory() as folder:
        return dense_step(trainer(architecture, Path(folder), "plain"), FORGET, RETAIN)


@pytest.mark.parametrize("memory, split", [("plain", {}), ("checkpointed", SPLIT), ("tiled", SPLIT)])
@pytest.mark.parametrize("architecture", NOISY)
def test_the_base_computes_as_in_eval_mode_however_a_step_is_split(architecture, memory, split, tmp_path):
    loss, expected = dense(architecture)
    run = trainer(architecture, tmp_path, memory, **split)
    assert relative_error(step_gradients(run), expected) < 2e-5
    assert run.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("architecture", NOISY)
def test_the_first_step_of_an_identity_adapter(architecture, tmp_path):
    run = trainer(architecture, tmp_path, "checkpointed", identity=True)
    run.train()
    log = run.state.log_history[0]
    assert log["forget_loss"] == pytest.approx(2 / run.passes.objective.beta * math.log(2), rel=1e-5)
    assert log["forget_log_ratio"] == pytest.approx(0, abs=1e-5) and log["retain_kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("memory", ["checkpointed", "tiled"])
def test_the_adapters_own_dropout_is_on_and_replayed_exactly(memory, tmp_path):
    """The same draws in the forward pass and in every recomputation: the directional derivative is the gradient's."""
    run = trainer("starcoder2", tmp_path, memory, lora_dropout=0.5, gamma=0.0, delta=0.0, forget_term="ga")
    batch = run.data_collator([run.train_dataset[pick] for pick in next(iter(run.step_batches))])
    _, totals = run.get_batch_samples(iter([batch]), 1, torch.device("cpu"))

    def loss(seed=3, shift=0.0):
        torch.manual_seed(seed)
        run.model.zero_grad()
        with torch.no_grad():
            for parameter, value, gradient in start:
                parameter.copy_(value + shift * gradient)
        return float(run.training_step(run.model, batch, totals))

    start = []
    assert loss(3) != loss(4)
    loss()
    start += [(p, p.detach().clone(), p.grad.clone()) for p in run.model.parameters() if p.requires_grad]
    squares = sum(float(gradient.square().sum()) for _, _, gradient in start)
    epsilon = 1e-2 / math.sqrt(squares)
    assert (loss(shift=epsilon) - loss(shift=-epsilon)) / (2 * epsilon) == pytest.approx(squares, rel=1e-2)
