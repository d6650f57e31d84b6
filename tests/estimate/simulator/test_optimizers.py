"""Every optimiser that a run may have keeps in the estimate what it keeps itself."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import GlobalPageManager
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer
from transformers.training_args import OptimizerNames

from lowmem_npo.config import AdapterConfig, ModelConfig, RunConfig
from lowmem_npo.errors import UserError
from lowmem_npo.estimate.rows import StepRows
from lowmem_npo.estimate.simulator.gpu import GPU, fake_gpu
from lowmem_npo.estimate.simulator.storages import StorageCounter
from lowmem_npo.estimate.step import estimate, first_optimizer_step
from lowmem_npo.model import attach_lora
from lowmem_npo.training.arguments import check_trainer_args, npo_config
from lowmem_npo.training.honoured import is_unsupported

LLAMA = LlamaConfig(
    vocab_size=997, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
    tie_word_embeddings=False,
)  # fmt: skip
RUN = RunConfig(ModelConfig("tiny", device="cpu"), adapter=AdapterConfig(lora_r=64, lora_targets=("all-linear",)))
ROWS = StepRows(forget=((48, 20),), retain=((40, 20),))
OPTIMIZERS = [name.value for name in OptimizerNames if not is_unsupported("optim", name.value)]


def run(name: str) -> RunConfig:
    return replace(RUN, trainer_args={"optim": name})


@cache
def estimated(name: str) -> int:
    """With the adapter; on the GPU and, where some optimisers count their steps, on the host."""
    result = estimate(run(name), LLAMA, ROWS)
    return result.by_kind["adapter"] + result.host_bytes


@cache
def real(name: str) -> int:
    """With the adapter's parameters; on the CPU."""
    model = attach_lora(AutoModelForCausalLM.from_config(LLAMA), RUN.adapter)
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kind, options = Trainer.get_optimizer_cls_and_kwargs(npo_config(run(name)))
    with StorageCounter("cpu") as counter:
        counter.mark(adapter, "adapter")
        optimizer = kind(adapter, **options)
        first_optimizer_step(optimizer)
        return counter.live


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_an_optimiser_keeps_is_counted(name):
    try:
        check_trainer_args(run(name))
    except UserError as error:
        pytest.skip(str(error))
    assert estimated(name) - estimated("sgd") == real(name) - real("sgd")  # which keeps nothing


@pytest.mark.parametrize(
    ("kind", "paged", "on_gpu"),
    [
        ("PagedAdamW32bit", 8, 0), ("PagedAdamW8bit", 2, 8 / 256), ("PagedLion8bit", 1, 4 / 256),
        ("AdamW8bit", 0, 2 + 8 / 256),
    ],
)  # fmt: skip
def test_large_states_of_a_paged_optimiser_need_no_gpu_memory(kind, paged, on_gpu):
    """Bytes per element of the adapter; those on the GPU are the largest value of each block of 256."""
    size = 2**20
    with fake_gpu() as gpu:
        parameter = torch.nn.Parameter(torch.empty(size, device=GPU))
        before, on_host = gpu.live, gpu.off_device
        optimizer = getattr(bnb.optim, kind)([parameter])
        first_optimizer_step(optimizer)
        tables = 2 * 1024
        assert 0 <= gpu.off_device - on_host - paged * size <= tables
        assert 0 <= gpu.live - before - on_gpu * size <= tables
    assert not GlobalPageManager.get_instance().paged_tensors
