"""Streamed weights: bit for bit what resident ones give, from slots that are read only between copy and reuse."""

from __future__ import annotations

import contextlib
import gc
import inspect
import os
import sys
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pytest
import torch
from helpers.architectures import random_model, tiny_config
from helpers.dense_step import make_trainer, random_rows, step_gradients, word_tokenizer
from helpers.recording_bus import RecordingBus
from helpers.tiny_models import SIZES, tiny_model
from torch import Tensor
from transformers import LlamaConfig, Olmo2Config

from lowmem_npo.config import AdapterConfig, MemoryConfig, ModelConfig
from lowmem_npo.data import RowBatch
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.leaks.fine_tuning import fine_tune
from lowmem_npo.evaluation.scoring.generation import Prompt, greedy_answers
from lowmem_npo.evaluation.scoring.token_scores import token_scores
from lowmem_npo.memory import float32, streaming, switches
from lowmem_npo.memory.streaming import check_device, stream_weights, weight_stream
from lowmem_npo.memory.streaming.bus import StagedBus
from lowmem_npo.memory.streaming.stream import WeightStream
from lowmem_npo.memory.switches import apply_switches
from lowmem_npo.model import answer_hidden, attach_lora, load_model
from lowmem_npo.model.adapters import extra_adapter
from lowmem_npo.training.reference.identity import weights_fingerprint

FORGET, RETAIN = random_rows(4, seed=1), random_rows(4, seed=2)
CPU = torch.device("cpu")
DEEP = {**SIZES, "num_hidden_layers": 5}
ADAPTER = AdapterConfig(lora_r=3, lora_targets=("all-linear",))
OTHERS = {
    "alone": {},
    "no recomputation": {"gradient_checkpointing": "off"},
    "all": {"tile_mlp": 9, "offload_checkpoints": True, "embedding_on_cpu": True},
}


@pytest.fixture(autouse=True)
def slices_of_seven_rows(monkeypatch):
    monkeypatch.setattr(switches, "slice_float32", partial(float32.slice_float32, rows=7))


def llama(layers: int = 5) -> LlamaConfig:
    return LlamaConfig(vocab_size=97, tie_word_embeddings=False, **{**SIZES, "num_hidden_layers": layers})


def adapted(architecture=None, adapter: AdapterConfig = ADAPTER, **memory):
    model = attach_lora(tiny_model(architecture or llama()), adapter)
    apply_switches(model, MemoryConfig(**memory))
    return model


class Steps(NamedTuple):
    """What two optimiser steps give."""

    losses: list[float]
    gradients: dict[str, Tensor]
    adapter: dict[str, Tensor]


def two_steps(model, folder: Path, **settings) -> Steps:
    trainer = make_trainer(model, folder, FORGET, RETAIN, max_steps=2, **settings)
    gradients = step_gradients(trainer)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return Steps(losses, gradients, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad})


def same(one: Steps, other: Steps) -> bool:
    tensors = zip((one.gradients, one.adapter), (other.gradients, other.adapter), strict=True)
    return one.losses == other.losses and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in tensors
    )


@lru_cache
def resident(others: str = "alone", layers: int = 5, adapter: AdapterConfig | None = None, **settings) -> Steps:
    with TemporaryDirectory() as folder:
        return two_steps(adapted(llama(layers), adapter or ADAPTER, **OTHERS[others]), Path(folder), **settings)


@contextlib.contextmanager
def checked(bus: RecordingBus, model):
    with bus.watching(weight_stream(model).slots):
        yield
    assert not bus.violations and bus.reads["forward"]


# -- the same results -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("others", OTHERS)
def test_the_same_step_to_the_bit(others, recorded, tmp_path):
    model = adapted(stream_weights=True, **OTHERS[others])
    with checked(recorded, model):
        streamed = two_steps(model, tmp_path)
    assert same(streamed, resident(others)) and recorded.reads["backward"]


SETTINGS = {
    "padded rows": {"padding_free": False},
    "one pass for both parts": {"joint_pass_tokens": 10_000},
    "micro-batches": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "sharpness-aware": {"sam": 0.05},
    "adversary": {"adversary": 1.0, "per_device_train_batch_size": 2},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
def test_with_the_ways_of_passing_rows(settings, late, tmp_path):
    assert same(two_steps(adapted(stream_weights=True), tmp_path, **settings), resident(**settings))


@pytest.mark.parametrize("layers", [4, 2, 1])
def test_any_number_of_layers(layers, late, tmp_path):
    assert same(two_steps(adapted(llama(layers), stream_weights=True), tmp_path), resident(layers=layers))


def test_with_a_prefix_that_policy_and_reference_share(late, tmp_path):
    upper = AdapterConfig(lora_r=3, lora_targets=("q_proj", "down_proj"), lora_layers=("2-4",))
    streamed = two_steps(adapted(adapter=upper, stream_weights=True), tmp_path)
    with TemporaryDirectory() as folder:
        assert same(streamed, two_steps(adapted(adapter=upper), Path(folder)))


def test_with_a_cached_reference_that_resident_weights_made(late, tmp_path):
    before = two_steps(adapted(), tmp_path, reference_dir=str(tmp_path / "reference"))
    streamed = two_steps(adapted(stream_weights=True), tmp_path, reference_dir=str(tmp_path / "reference"))
    assert same(streamed, before)


KINDS = ["gpt2", "jamba", "zamba", "gemma3n_text"]


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_differ_share_weights_or_hold_experts(kind, late):
    """Slots are of the largest layer; what two layers share stays on the device."""
    config = tiny_config(kind, 97)
    gradients = []
    for streams in (False, True):
        model = attach_lora(random_model(config).requires_grad_(False), ADAPTER)
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                if parameter.requires_grad and "lora_B" in name:
                    parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
        apply_switches(model, MemoryConfig(stream_weights=streams, gradient_checkpointing="on"))
        for _ in range(2):
            answer_hidden(model, RowBatch.whole(torch.arange(3, 15)[None])).hidden.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0] and all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    sizes = {**SIZES, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    tiny_model(Olmo2Config(vocab_size=97, tie_word_embeddings=False, **sizes)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("double_quant", "others"), [("on", "all"), ("off", "no recomputation")])
def test_four_bit_weights_with_their_statistics(double_quant, others, on_disk, late, tmp_path):
    steps = []
    for streams in (False, True):
        config = ModelConfig(on_disk, qlora=True, double_quant=double_quant, dtype="bf16", device="cpu")
        torch.manual_seed(0)
        model = attach_lora(load_model(config, on_host=streams), ADAPTER)
        apply_switches(model, MemoryConfig(stream_weights=streams, **OTHERS[others]))
        steps.append(two_steps(model, tmp_path))
    assert same(*steps)
    of_layer = {p.dtype for p in model.parameters() if streaming.is_streamed(p)}
    assert of_layer == {torch.uint8}  # norms and adapters are not among them


# -- weights that stay in their files -------------------------------------------------------------------------------


def in_file(on_disk: str, cache: Path, **memory):
    config = ModelConfig(on_disk, qlora=True, double_quant="on", device="cpu", quantized_cache=str(cache))
    torch.manual_seed(0)
    model = attach_lora(load_model(config, lambda line: None, on_host=True, in_file=True), ADAPTER)
    apply_switches(model, MemoryConfig(stream_weights=True, stream_from="cache", **memory))
    return model


def mapped_files() -> str:
    return Path("/proc/self/maps").read_text()


def test_weights_that_are_read_from_the_cache(on_disk, late, tmp_path):
    config = ModelConfig(on_disk, qlora=True, double_quant="on", device="cpu")
    torch.manual_seed(0)
    resident = attach_lora(load_model(config), ADAPTER)
    apply_switches(resident, MemoryConfig(**OTHERS["all"]))
    expected = two_steps(resident, tmp_path)
    for _ in ("the run that writes it", "the next"):
        model = in_file(on_disk, tmp_path / "cache", **OTHERS["all"])
        assert str(tmp_path / "cache") in mapped_files()
        with checked(late, model):
            streamed = two_steps(model, tmp_path)
        assert same(streamed, expected) and late.copies > 20
    assert weights_fingerprint(model) == weights_fingerprint(resident)


def test_a_buffer_that_is_read_into_too_early_is_caught(on_disk, late, tmp_path, monkeypatch):
    read = StagedBus._copy

    def waits_for_nothing(self, *args):
        self._left = [None, None]
        return read(self, *args)

    monkeypatch.setattr(StagedBus, "_copy", waits_for_nothing)
    model = in_file(on_disk, tmp_path / "cache")
    with late.watching(weight_stream(model).slots):
        two_steps(model, tmp_path)
    assert "what is copied is overwritten before" in late.violations


def test_a_file_that_can_be_read_no_more_ends_the_pass_with_a_sentence(on_disk, tmp_path):
    """Not the process, by a signal: nothing that computes is mapped, the embedding on the host included."""
    model = in_file(on_disk, tmp_path / "cache", embedding_on_cpu=True)
    batch = RowBatch.whole(torch.arange(3, 15)[None])
    answer_hidden(model, batch)
    for file in (tmp_path / "cache").glob("*/*.safetensors"):
        os.truncate(file, 100)
    for _ in range(2):
        with pytest.raises(UserError, match=r"'.*-0000\d.safetensors' can be read no more \(it has become shorter\)"):
            answer_hidden(model, batch)
    assert model.get_input_embeddings()(torch.arange(97)).isfinite().all()
    gc.collect()  # until then, what PyTorch 2.11's checkpoint hooked in for the passes that failed stays in place


def test_scores_answers_and_relearning(late):
    """What is measured before and after training, and an adapter that comes and goes."""
    results = []
    for streams in (False, True):
        model = adapted(stream_weights=streams)
        scores = token_scores(model, FORGET, progress=False)
        with extra_adapter(model, 4, seed=0):
            for _ in fine_tune(model, FORGET, steps=3, lr=1e-2, batch_size=2, seed=0, progress=False):
                pass
            after = token_scores(model, FORGET, progress=False)
        prompts = [Prompt(row["input_ids"][:4], 6) for row in FORGET]
        answers = greedy_answers(model, word_tokenizer(), prompts, progress=False)
        again = token_scores(model, FORGET, progress=False)
        results.append((scores, after, answers, again))
    for one, other in zip(*results, strict=True):
        assert repr(one) == repr(other)
    assert repr(results[0][0]) != repr(results[0][1])


# -- what is in memory, and what is copied --------------------------------------------------------------------------


def test_the_weights_lie_in_blocks_and_the_slots_are_of_the_largest():
    model = adapted(stream_weights=True)
    stream = weight_stream(model)
    streamed = [p for p in model.parameters() if streaming.is_streamed(p)]
    slots = {slot.untyped_storage()._cdata for slot in stream.slots}
    assert len(stream.blocks) == 5 and {p.untyped_storage()._cdata for p in streamed} == slots
    assert [len(slot) for slot in stream.slots] == [max(map(len, stream.blocks))] * 2
    assert not any(p.requires_grad or p.ndim < 2 for p in streamed)


APART = (
    2 + 4 + 2
) * 2  # of each part: the policy pass begins with the first layers, after the last ones: none is there


@pytest.mark.parametrize(
    ("layers", "settings", "copies"),
    [(4, {}, (2 + 2) * 2), (5, {"joint_pass_tokens": 10**6}, 3 + 3), (2, {}, 0), (4, {"reference": "apart"}, APART)],
    ids=["both parts", "in one pass", "two layers", "not in lock-step"],
)
def test_copies_of_a_step(layers, settings, copies, tmp_path, monkeypatch):
    """Two traversals, one forward and one backward: the former finds the first two layers, which the backward pass
    before has left, and the latter the last two. On the host, what is the same in every step is not looked for again:
    a GPU waits for it in each layer."""
    model = adapted(llama(layers), stream_weights=True)
    apart = settings.pop("reference", None)
    trainer = make_trainer(model, tmp_path, FORGET, RETAIN, **settings)
    trainer.passes.lock_step = None if apart else trainer.passes.lock_step
    stream, counts = weight_stream(model), []
    batches, totals = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, CPU)
    for _ in range(3):
        trainer.training_step(trainer.model, batches[0], totals)
        monkeypatch.setattr(torch.nn.Module, "named_modules", _as_in_every_step)
        monkeypatch.setattr(inspect, "signature", _of_pytorch_alone)
        counts.append(stream.copied_bytes // len(stream.blocks[0]))
    assert counts[2] - counts[1] == counts[1] - counts[0] == copies


def _as_in_every_step(*_args, **_options):
    pytest.fail("PyTorch's slow walk through all modules, or a signature's inspection, within a step")


def _of_pytorch_alone(*args, signature=inspect.signature, **options):
    """Version 2.11 inspects one of its own in each checkpoint."""
    if not sys._getframe(1).f_globals["__name__"].startswith("torch."):
        _as_in_every_step()
    return signature(*args, **options)


@pytest.mark.parametrize(
    "where", [{"device": torch.device("cpu", 0)}, {"dtype": torch.float64}], ids=["cpu:0", "float64"]
)
def test_a_model_that_is_moved_takes_its_slots_along(where):
    """ "cpu:0", to which accelerate moves in several processes, is another device than "cpu" for `Module.to`."""
    model = adapted(stream_weights=True)
    slots = {slot.untyped_storage()._cdata for slot in weight_stream(model).slots}
    names = [name for name, _ in model.named_parameters()]
    model.to(**where)
    streamed = [p for p in model.parameters() if streaming.is_streamed(p)]
    assert {p.untyped_storage()._cdata for p in streamed} == slots and len(streamed) == 5 * 7
    assert [name for name, _ in model.named_parameters()] == names
    norm = model.get_base_model().model.norm.weight
    assert norm.dtype == where.get("dtype", torch.float32)


def test_fingerprints_do_not_depend_on_where_the_weights_are():
    assert weights_fingerprint(adapted(stream_weights=True)) == weights_fingerprint(adapted())
    other = adapted(stream_weights=True)
    weight_stream(other).blocks[4][17] += 1
    assert weights_fingerprint(other) != weights_fingerprint(adapted())


# -- orderings ------------------------------------------------------------------------------------------------------


def test_a_pass_that_ends_in_its_middle_does_no_harm(recorded, tmp_path):
    """In a forward pass, in the recomputation of a layer, and before a backward pass: the steps that follow are
    right."""
    model = adapted(stream_weights=True)
    ids = torch.arange(3, 15)[None]
    fails: list[int] = []

    def fail(module, args, output):
        fails.append(1)
        if len(fails) in (1, 4):
            raise RuntimeError("out of memory")

    handle = model.get_base_model().model.layers[2].self_attn.register_forward_hook(fail)
    with checked(recorded, model):
        for _ in range(3):
            with contextlib.suppress(RuntimeError):
                hidden = answer_hidden(model, RowBatch.whole(ids)).hidden
                if len(fails) > 2:
                    hidden.sum().backward()
        assert len(fails) == 4
        handle.remove()
        answer_hidden(model, RowBatch.whole(ids))  # whose graph is dropped
        model.zero_grad()
        streamed = two_steps(model, tmp_path)
    assert same(streamed, resident())


def _forgets_to_wait(stream, layer, right=WeightStream.visit):
    stream._arriving = [None, None]
    bus, stream.bus = stream.bus, _WaitsForNothing(stream.bus)
    try:
        right(stream, layer)
    finally:
        stream.bus = bus


class _WaitsForNothing:
    def __init__(self, bus) -> None:
        self.computed, self.copy = bus.computed, bus.copy

    def wait(self, copied) -> None:
        pass


def _copies_at_once(stream, layer, right=WeightStream._bring):
    """Without an event of the reads before."""
    bus, stream.bus = stream.bus, _KnowsNoReads(stream.bus)
    try:
        right(stream, layer)
    finally:
        stream.bus = bus


class _KnowsNoReads:
    def __init__(self, bus) -> None:
        self.copy = lambda host, slot, after: bus.copy(host, slot, 0)
        self.computed = bus.computed


def _copies_into_its_own_slot(stream, layer, right=WeightStream.visit):
    right(stream, layer)
    if layer + 2 < len(stream.blocks):
        stream._bring(layer + 2)


def _knows_no_way_back(stream, gradient):
    """The gradient arrives, and the layer above is still there."""


PLANTED = {
    "a layer computes before its copy has arrived": (WeightStream, "visit", _forgets_to_wait),
    "a copy does not wait for the last read": (WeightStream, "_bring", _copies_at_once),
    "the next layer but one comes while a layer computes": (WeightStream, "visit", _copies_into_its_own_slot),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_orderings_are_caught(bug, recorded, tmp_path, monkeypatch):
    where, name, broken = PLANTED[bug]
    monkeypatch.setattr(where, name, broken)
    monkeypatch.setattr("lowmem_npo.training.trainer.check_head", lambda model: None)  # which sees the NaN
    monkeypatch.setattr("lowmem_npo.training.trainer.check_causal", lambda model: None)
    model = adapted(stream_weights=True)
    with recorded.watching(weight_stream(model).slots), contextlib.suppress(Exception):
        two_steps(model, tmp_path)
    assert recorded.violations


def test_a_backward_pass_without_its_visits_reads_what_is_not_there(late, tmp_path, monkeypatch):
    """Not an ordering, but another layer's weights: only the numbers show it."""
    monkeypatch.setattr(streaming.StreamedForward, "_gradient_arrives", _knows_no_way_back)
    model = adapted(stream_weights=True, gradient_checkpointing="off")
    assert not same(two_steps(model, tmp_path), resident("no recomputation"))


# -- what does not fit ----------------------------------------------------------------------------------------------


def test_a_cpu_has_its_weights_in_memory_anyway():
    with pytest.raises(UserError, match="--stream-weights copies weights to a GPU, and this run computes on the CPU"):
        check_device(CPU)


def test_a_model_without_frozen_weights_in_its_layers():
    model = tiny_model("llama").requires_grad_(True)
    with pytest.raises(UserError, match="--stream-weights: the layers of LlamaForCausalLM have no frozen weights"):
        stream_weights(model, CPU)
