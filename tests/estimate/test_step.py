"""The simulated step allocates what the real step allocates, to the byte; CUDA's own kernels are counted as such."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from lowmem_kernels import glu
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, OPTConfig

from lowmem_npo.config import AdapterConfig, MemoryConfig, ModelConfig, ObjectiveConfig, RunConfig
from lowmem_npo.estimate.rows import StepRows, token_row
from lowmem_npo.estimate.simulator.gpu import GPU, fake_gpu, with_values
from lowmem_npo.estimate.simulator.model import fake_model
from lowmem_npo.estimate.simulator.storages import StorageCounter
from lowmem_npo.estimate.step import KINDS, estimate, first_optimizer_step
from lowmem_npo.memory.streaming import weight_stream
from lowmem_npo.memory.switches import apply_switches
from lowmem_npo.model import attach_lora, load_model, packing
from lowmem_npo.model.known_configs import known_config, known_names
from lowmem_npo.training.trainer import NPOConfig, NPOTrainer

SIZES = {
    "vocab_size": 997, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
LLAMA = LlamaConfig(**SIZES, tie_word_embeddings=False)
ROWS = StepRows(forget=((48, 20), (30, 10), (48, 47), (20, 5)), retain=((40, 20), (30, 10), (40, 7)))


@pytest.fixture
def torch_engine(monkeypatch):
    """The head's engine that a CPU runs, for both sides of a comparison with a CPU; and on both sides the fused kernels
    of the layers, which allocate their results, and here only copy their inputs."""
    results = {"x_ptr": "out_ptr", "q_ptr": "q_out_ptr", "k_ptr": "k_out_ptr", "gate_ptr": "out_ptr"}

    def launch(kernel, grid, **arguments):
        for name in results.keys() & arguments.keys():
            arguments[results[name]].copy_(arguments[name])

    monkeypatch.setattr("lowmem_kernels.dispatch.choose_engine", lambda *_: "torch")
    monkeypatch.setattr("lowmem_npo.memory.fused.ENGINE", "triton")
    monkeypatch.setattr("lowmem_kernels.rowwise.check_triton", lambda *_: None)
    for module in ("norm", "rotary_embedding", "gated_activation"):
        monkeypatch.setattr(f"lowmem_kernels.{module}.launch", launch)


def run(memory: dict | None = None, **sections) -> RunConfig:
    model = ModelConfig("tiny", dtype="float32", attn="eager")
    return RunConfig(model, memory=MemoryConfig(**(memory or {})), **sections)


def real_peak(config: RunConfig, rows: StepRows, architecture=LLAMA) -> int:
    """Bytes that the step allocates at most on the CPU, with real tensors."""
    model = AutoModelForCausalLM.from_config(architecture, attn_implementation="eager").requires_grad_(False)
    model.config.use_cache = False
    with StorageCounter("cpu") as counter, tempfile.TemporaryDirectory() as folder:
        model = attach_lora(model, config.adapter)
        apply_switches(model, config.memory)
        arguments = NPOConfig(
            **vars(config.objective), output_dir=folder, use_cpu=True, report_to="none",
            step_batch_size=len(rows.forget), per_device_train_batch_size=len(rows.forget),
            retain_batch_size=len(rows.retain) or None, max_steps=1,
        )  # fmt: skip
        trainer = NPOTrainer(
            model, arguments,
            [*(token_row(*row) for row in rows.forget), *(token_row(*row, token=1) for row in rows.taught_again)],
            [token_row(*row) for row in rows.retain], processing_class=SimpleNamespace(pad_token_id=0),
        )  # fmt: skip
        trainer.step_batches.step_rows = lambda step: (range(len(rows.forget)), range(len(rows.retain)))
        trainer.step_batches.spared = lambda step: range(len(rows.forget))
        trainer.create_optimizer()
        first_optimizer_step(trainer.optimizer)
        batches, totals = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
        counter.mark([batches, trainer.forget_point.lesson, *model.parameters(), *model.buffers()], "before")
        counter.restart_peak()
        trainer.training_step(model, batches[0], totals)
        trainer.optimizer.step()
        stream = weight_stream(model)  # whose blocks are not on the device
        return counter.peak - sum(-(-len(block) // 512) * 512 for block in (stream.blocks if stream else ()))


CASES = {
    "defaults": run(),
    "tiled": run({"tile_mlp": 64}),
    "whole float32": run({"sliced_float32": False}),
    "no checkpointing": run({"gradient_checkpointing": False}),
    "upper layers": run(adapter=AdapterConfig(lora_layers=("2-3",), lora_r=8, lora_targets=("all-linear",))),
    "sharpness-aware": run(objective=ObjectiveConfig(sam=0.05)),
    "adversary": run(objective=ObjectiveConfig(adversary=1.0)),
    "adversary below the adapter": run(
        objective=ObjectiveConfig(adversary=1.0, adversary_steps=4, sam=0.05),
        adapter=AdapterConfig(lora_layers=("2-3",)),
    ),
    "only forget": run(objective=ObjectiveConfig(gamma=0, delta=0)),
    "streamed weights": run({"stream_weights": True}),
    "dora": run(adapter=AdapterConfig(use_dora=True, use_rslora=True, lora_targets=("all-linear",))),
    "modules trained whole": run(adapter=AdapterConfig(modules_to_save=("norm", "embed_tokens"))),
    "other objective": run(objective=ObjectiveConfig(normalization="token", kl_direction="reference-policy")),
}


@pytest.mark.parametrize("config", CASES.values(), ids=list(CASES))
def test_the_simulated_step_is_the_real_one_to_the_byte(config, torch_engine):
    rows = ROWS if config.objective.needs_retain else StepRows(ROWS.forget, ())
    if config.objective.adversary is not None:
        rows = replace(rows, taught_again=((48, 47), (48, 20)))  # in one pass
    result = estimate(config, LLAMA, rows)
    assert result.peak_bytes - result.by_kind["cuBLAS"] == real_peak(config, rows)
    assert sum(result.by_kind.values()) == result.peak_bytes and set(result.by_kind) == set(KINDS)


def test_an_embedding_that_is_the_head_too_is_counted_once(torch_engine):
    tied = LlamaConfig(**SIZES, tie_word_embeddings=True)
    for config in (CASES["defaults"], CASES["streamed weights"]):
        result = estimate(config, tied, ROWS)
        assert result.peak_bytes - result.by_kind["cuBLAS"] == real_peak(config, ROWS, tied)


def test_experts_in_float32_are_counted(torch_engine):
    mixtral = MixtralConfig(**SIZES, num_local_experts=4)
    result = estimate(run(), mixtral, ROWS)
    assert result.peak_bytes - result.by_kind["cuBLAS"] == real_peak(run(), ROWS, mixtral)


def test_four_bit_layers_beside_the_streamed_ones_come_to_the_gpu():
    """OPT's projections of a narrower embedding: with their statistics, and counted as what they are."""
    opt = OPTConfig(
        vocab_size=997, hidden_size=128, word_embed_proj_dim=64, ffn_dim=256, num_hidden_layers=2, num_attention_heads=4
    )
    model = ModelConfig("tiny", qlora=True)
    with fake_gpu() as gpu:
        _made = fake_model(opt, model)
        there = gpu.live
    with fake_gpu() as gpu:
        moved = fake_model(opt, model, on_host=True).to(GPU)
        assert gpu.live == there and moved.model.decoder.project_in.weight.quant_state.absmax.device == GPU
    runs = (RunConfig(model, memory=MemoryConfig(stream_weights=streamed)) for streamed in (False, True))
    plain, streamed = (estimate(config, opt, ROWS).by_kind["adapter"] for config in runs)
    assert streamed == plain


def test_a_second_adapter_is_counted_with_the_first(torch_engine, tmp_path):
    """The first is frozen: its weights, without gradients and moments."""
    base = AutoModelForCausalLM.from_config(LLAMA)
    first = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules=["v_proj", "down_proj"]))
    first.save_pretrained(tmp_path)
    config = run(adapter=AdapterConfig(adapter=str(tmp_path), lora_targets=("q_proj", "down_proj")))
    result = estimate(config, LLAMA, ROWS)
    assert result.peak_bytes - result.by_kind["cuBLAS"] == real_peak(config, ROWS)
    alone = estimate(run(adapter=AdapterConfig(lora_targets=("q_proj", "down_proj"))), LLAMA, ROWS)
    frozen = sum(parameter.nbytes for parameter in first.parameters() if parameter.requires_grad)
    assert 0.9 * frozen <= result.by_kind["adapter"] - alone.by_kind["adapter"] <= 1.1 * frozen


@pytest.mark.parametrize("options", [{"use_dora": True}, {"modules_to_save": ("norm", "embed_tokens")}])
def test_other_kinds_of_adapter_on_four_bit_layers(options):
    with fake_gpu():
        model = attach_lora(fake_model(LLAMA, ModelConfig("tiny", qlora=True)), AdapterConfig(**options))
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    lora = 4 * 5 * (64 + 64 + 64 + 32)
    assert trained == lora + (4 * (64 + 32) if "use_dora" in options else (2 * 4 + 1) * 64 + 997 * 64)
    config = RunConfig(ModelConfig("tiny", qlora=True), adapter=AdapterConfig(**options))
    assert estimate(config, LLAMA, ROWS).by_kind["adapter"] >= 4 * 4 * trained  # with gradients and moments


def test_a_tensor_held_too_long_would_be_noticed(torch_engine, monkeypatch):
    """The comparison fails if only the simulated step keeps one layer's output."""
    real = real_peak(run(), ROWS)
    kept = []
    monkeypatch.setattr("lowmem_npo.memory.fused.glu", lambda *a, **k: kept.append(glu(*a, **k)) or kept[-1])
    result = estimate(run(), LLAMA, ROWS)
    assert kept and result.peak_bytes - result.by_kind["cuBLAS"] > real


def test_the_kinds_are_what_they_say(torch_engine):
    by_kind = estimate(run(), LLAMA, ROWS).by_kind
    checkpoints = sum(tokens for tokens, _ in ROWS.forget) * 64 * 4  # tokens x hidden size x float32, of each layer
    assert by_kind["checkpoints"] == LLAMA.num_hidden_layers * checkpoints
    offloaded = estimate(run({"offload_checkpoints": True}), LLAMA, ROWS)
    assert offloaded.by_kind["checkpoints"] <= 2 * checkpoints
    assert offloaded.host_bytes >= LLAMA.num_hidden_layers * checkpoints
    on_host = estimate(run({"embedding_on_cpu": True}), LLAMA, ROWS)
    assert by_kind["frozen weights"] - on_host.by_kind["frozen weights"] == -(-997 * 64 * 4 // 512) * 512


def test_the_optimizer_is_the_runs_own(torch_engine):
    adam, sgd = (estimate(run(trainer_args=args), LLAMA, ROWS) for args in ({}, {"optim": "sgd", "max_steps": 3}))
    assert sgd.by_kind["adapter"] < adam.by_kind["adapter"] / 2  # no moments


def test_a_fake_nf4_model_takes_the_bytes_of_the_loaded_one(tmp_path):
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    real = load_model(ModelConfig(str(tmp_path), qlora=True, device="cpu"))
    tensors = [*real.parameters(), *real.buffers()]
    for module in real.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    with StorageCounter("cpu") as counter:
        counter.mark(tensors, "weights")
        expected = counter.live
    with fake_gpu() as gpu:
        model = fake_model(config, ModelConfig("tiny", qlora=True))
        assert gpu.live == expected
        dense = model.model.layers[0].mlp.gate_proj
        assert isinstance(dense, bnb.nn.Linear4bit) and dense.weight.dtype == torch.uint8
        before = gpu.live
        gpu.restart_peak()
        dense(torch.empty(2048, 128, dtype=torch.bfloat16, device=GPU))
        assert gpu.peak - before >= 128 * 384 * 2 + 2 * 2048 * 384  # the dequantised weight and the result


def test_attention_is_the_one_a_gpu_runs():
    """Nothing of S x S without a mask; the backward's float32 accumulator; a mask makes its bias, and no more."""
    shape, scores = (2, 4, 512, 64), 2 * 4 * 512 * 512 * 2
    attention = torch.nn.functional
    with fake_gpu() as gpu:
        q, k, v = (torch.empty(shape, dtype=torch.bfloat16, device=GPU, requires_grad=True) for _ in range(3))
        gpu.restart_peak()
        before = gpu.live
        out = attention.scaled_dot_product_attention(q, k, v, is_causal=True)
        assert gpu.peak - before < scores / 2
        out.backward(torch.empty_like(out))
        assert gpu.peak - before >= 4 * q.numel() + 4 * 2 * q.numel()  # dQ in float32; out, dQ, dK, dV in bf16
        assert gpu.peak - before < scores
        gpu.restart_peak()
        before = gpu.live
        smaller = attention.scaled_dot_product_attention(q, k, v[..., :32], is_causal=True)  # as DeepSeek's values
        assert smaller.shape == (*shape[:3], 32) and gpu.peak - before < scores / 2
        smaller.backward(torch.empty_like(smaller))
        assert gpu.peak - before < 2 * scores  # the accumulators of another kernel
        del smaller
        gpu.restart_peak()
        before = gpu.live
        mask = torch.ones(2, 1, 512, 512, dtype=torch.bool, device=GPU)
        attention.scaled_dot_product_attention(q.detach(), k.detach(), v.detach(), attn_mask=mask)
        assert 2 * 512 * 512 * 3 <= gpu.peak - before < scores


def test_key_heads_that_pytorchs_own_call_cannot_share_are_counted(monkeypatch):
    """Before PyTorch 2.12, attention to rows of any length keeps keys and values once for every query head."""
    model, memory = ModelConfig("known"), MemoryConfig(gradient_checkpointing="off", joint_pass_tokens=0)
    needed = []
    for shared in (True, False):
        monkeypatch.setattr(packing, "SHARES_HEADS", shared)
        needed.append(estimate(RunConfig(model, memory=memory), LLAMA, ROWS).peak_bytes)
    monkeypatch.setattr(packing, "flash", None)  # row by row
    assert estimate(RunConfig(model, memory=memory), LLAMA, ROWS).peak_bytes == needed[0]
    # two more heads of keys and values, in each layer; a micro-batch has one row of either part
    repeated = 2 * 2 * (48 + 40) * 16 * 2
    assert needed[1] - needed[0] >= (LLAMA.num_hidden_layers - 1) * repeated


def test_values_of_the_batch_decide_shapes():
    labels = torch.full((3, 20), -100)
    labels[0, 4:9], labels[2, 19] = 1, 2
    with fake_gpu():
        fake = with_values(labels).to(GPU)
        counts = fake[:, 1:] != -100
        hidden = torch.empty(3, 20, 8, device=GPU)
        assert hidden[:, :-1][counts].shape == (6, 8)
        assert counts.nonzero(as_tuple=True)[0].shape == (6,) and bool(counts.any()) and int(counts.sum()) == 6
        fake.fill_(1)
        assert int((fake == 1).sum()) == 60


def test_the_fake_gpu_leaves_nothing_behind():
    before = torch.nn.functional.scaled_dot_product_attention, torch.nn.Module._apply, torch.cuda.is_bf16_supported
    with pytest.raises(ZeroDivisionError), fake_gpu():
        raise ZeroDivisionError
    after = torch.nn.functional.scaled_dot_product_attention, torch.nn.Module._apply, torch.cuda.is_bf16_supported
    assert before == after
    x = torch.ones(3, requires_grad=True)
    torch.nn.functional.silu(x).sum().backward()  # the operator whose CUDA kernel was declared
    assert x.grad is not None and torch.ones(2).to("cpu").sum() == 2


PARAMETERS = {  # billions, as published
    "allenai/OLMo-1B-hf": 1.18, "allenai/OLMo-7B-hf": 6.89, "allenai/OLMo-7B-0724-hf": 6.89,
    "allenai/OLMo-2-0425-1B": 1.48, "allenai/OLMo-2-1124-7B": 7.30, "allenai/OLMo-2-1124-13B": 13.7,
    "allenai/OLMo-2-0325-32B": 32.2, "meta-llama/Llama-3.1-8B": 8.03, "meta-llama/Llama-3.1-70B": 70.6,
    "meta-llama/Llama-3.2-1B": 1.24,
    "mistralai/Mistral-7B-v0.1": 7.24, "mistralai/Mistral-7B-v0.3": 7.25, "Qwen/Qwen3-8B": 8.19, "Qwen/Qwen3-32B": 32.8,
}  # fmt: skip


@pytest.mark.parametrize("name", known_names())
def test_bundled_configurations_have_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(known_config(name))
    billions = sum(p.numel() for p in model.parameters()) / 1e9
    assert billions == pytest.approx(PARAMETERS[name], rel=0.005)


def test_instruct_models_share_their_base_models_configuration():
    assert known_config("allenai/OLMo-7B-Instruct-hf").to_dict() == known_config("allenai/OLMo-7B-hf").to_dict()
    assert known_config("meta-llama/Llama-3.1-8B-Instruct").num_hidden_layers == 32
    assert known_config("somebody/else-7B") is None
