"""Every memory switch, alone and with all others: the same gradients as without it, and nothing computed too often."""

from __future__ import annotations

import contextlib
import copy
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from helpers.dense_step import dense_step, make_trainer, random_rows, relative_error, step_gradients
from helpers.tiny_models import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, OlmoConfig, OPTConfig

from lowmem_npo.commands.arguments import parse_run
from lowmem_npo.config import AdapterConfig, MemoryConfig, ModelConfig
from lowmem_npo.data import RowBatch
from lowmem_npo.errors import UserError
from lowmem_npo.memory import float32, offload, prefix, switches, tiling
from lowmem_npo.memory.checkpointing import is_checkpointed
from lowmem_npo.memory.switches import apply_switches
from lowmem_npo.model import answer_hidden, attach_lora, load_model
from lowmem_npo.model.layers import decoder_layers

FORGET, RETAIN = random_rows(4, seed=1), random_rows(4, seed=2)
PLAIN = {"sliced_float32": False, "gradient_checkpointing": False}
ALL = {"tile_mlp": 5, "offload_checkpoints": True, "embedding_on_cpu": True}
SWITCHES = {
    "checkpointing": {"sliced_float32": False},
    "float32 slices": {"gradient_checkpointing": False},
    "both defaults": {},
    "tiles without checkpointing": {**PLAIN, "tile_mlp": 5},
    "tiles": {"sliced_float32": False, "tile_mlp": 5},
    "offload": {"sliced_float32": False, "offload_checkpoints": True},
    "embedding": {**PLAIN, "embedding_on_cpu": True},
    "all": ALL,
}
ADAPTER = {"lora_r": 3, "lora_targets": ("all-linear",)}


@pytest.fixture(autouse=True)
def slices_of_seven_rows(monkeypatch):
    """Small enough that even tiny batches are sliced."""
    monkeypatch.setattr(switches, "slice_float32", partial(float32.slice_float32, rows=7))


def trainer(architecture: str, folder: Path, memory: dict, adapter: dict | None = None, **settings):
    model = attach_lora(tiny_model(architecture), AdapterConfig(**{**ADAPTER, **(adapter or {})}))
    apply_switches(model, MemoryConfig(**memory))
    return make_trainer(model, folder, FORGET, RETAIN, **settings)


@lru_cache
def dense(architecture: str, layers: tuple[str, ...] = ()):
    with TemporaryDirectory() as folder:
        plain = trainer(architecture, Path(folder), PLAIN, {"lora_layers": layers})
        return dense_step(plain, FORGET, RETAIN)


@pytest.mark.parametrize("memory", SWITCHES.values(), ids=list(SWITCHES))
def test_each_switch_gives_the_dense_float64_gradients(memory, tmp_path):
    check("olmo", memory, tmp_path)


@pytest.mark.parametrize("architecture", ["olmo2", "llama", "gemma2", "granite"])
def test_all_together_on_other_architectures(architecture, tmp_path):
    tied = architecture in ("gemma2", "granite")
    check(architecture, {**ALL, "embedding_on_cpu": not tied}, tmp_path)


@pytest.mark.parametrize("memory", [PLAIN, ALL], ids=["plain", "all"])
def test_adapters_in_the_upper_layer_only(memory, tmp_path):
    check("olmo", memory, tmp_path, layers=("1",))


def check(architecture, memory, folder, layers=()):
    loss, expected = dense(architecture, layers)
    run = trainer(architecture, folder, memory, {"lora_layers": layers})
    assert relative_error(step_gradients(run), expected) < 1e-5
    assert run.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)


def _fetch_zeros(copy):
    if copy._on_device is None:
        copy._on_device = torch.zeros_like(copy._host)
    return copy._on_device


def _rows_change_places(slices, x, right=tiling.Slices._cut):
    return ((at, part.flip(1)) for at, part in right(slices, x))


def _not_undone(function, q, k, slices, right=float32._by_heads):
    return (q.clone(), k.clone()) if function.__name__ == "pull_back" else right(function, q, k, slices)


class _RowsChangePlaces(prefix.Memory):
    def in_place_of(self, forward, keeps):
        run = super().in_place_of(forward, keeps)

        def flipped(*args, **kwargs):
            reused, result = self.result is not None, run(*args, **kwargs)
            several = result.shape[1] > 8  # not the one row on which the model is tried
            return result.flip(1) if reused and several else result

        return flipped


PLANTED = {
    "rows of a slice change places": (tiling.Slices, "_cut", _rows_change_places),
    "another layer's input comes back": (offload.HostCopy, "fetch", _fetch_zeros),
    "a rotation is not undone": (float32, "_by_heads", _not_undone),
    "rows of the prefix change places": (prefix, "Memory", _RowsChangePlaces),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_noticed(bug, tmp_path, monkeypatch):
    where, name, broken = PLANTED[bug]
    monkeypatch.setattr(where, name, broken)
    monkeypatch.setattr("lowmem_npo.training.trainer.check_causal", lambda model: None)  # notices some by itself
    monkeypatch.setattr(offload, "IN_FLIGHT", 1)  # two layers: otherwise both inputs would stay on the device
    layers = ("1",) if "prefix" in bug else ()
    _, expected = dense("olmo", layers)
    gradients = step_gradients(trainer("olmo", tmp_path, ALL, {"lora_layers": layers}))
    assert relative_error(gradients, expected) > 1e-3


# -- how often things run -----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture, passes", [("olmo", 2), ("olmo2", 2), ("llama", 2), ("gemma2", 2)])
def test_a_tiled_mlp_runs_forward_twice_not_three_times(architecture, passes):
    """Under checkpointing: once in the forward pass, once in the backward pass; the recomputation leaves it out."""
    model = attach_lora(tiny_model(architecture), AdapterConfig(**ADAPTER))
    apply_switches(model, MemoryConfig(tile_mlp=5))
    rows = []
    lm = model.get_base_model()
    lm.model.layers[1].mlp.act_fn.register_forward_hook(lambda m, args, out: rows.append(out.shape[1]))
    ids = torch.arange(3, 27).view(2, 12)
    model.train()
    states = lm.model(input_ids=ids, use_cache=False).last_hidden_state
    assert sum(rows) == ids.numel() and max(rows) <= 5
    states.square().sum().backward()
    assert sum(rows) == passes * ids.numel()


def test_an_unknown_module_after_the_mlp_costs_a_third_pass_and_stays_exact():
    """It needs the MLP's output, so the recomputation runs the MLP too."""
    torch.manual_seed(0)
    mlp, after = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)), torch.nn.Tanh()
    x = torch.randn(2, 6, 4, requires_grad=True)
    after(mlp(x)).sum().backward()
    expected = [x.grad.clone(), *(p.grad.clone() for p in mlp.parameters())]
    x.grad = None
    mlp.zero_grad()
    rows = []
    mlp[1].register_forward_hook(lambda m, args, out: rows.append(out.shape[1]))
    tiling.tile(mlp, 5)
    torch.utils.checkpoint.checkpoint(lambda x: after(mlp(x)), x, use_reentrant=False).sum().backward()
    assert sum(rows) == 3 * 12
    torch.testing.assert_close([x.grad, *(p.grad for p in mlp.parameters())], expected)


def test_layers_below_the_adapters_run_once_for_both_passes(tmp_path, monkeypatch):
    run = trainer("olmo", tmp_path, {}, {"lora_layers": ("1",)})
    calls = []
    lm = run.model.get_base_model()
    for name, module in (("below", lm.model.layers[0]), ("above", lm.model.layers[1])):
        module.self_attn.q_proj.register_forward_hook(lambda m, args, out, name=name: calls.append(name))
    shared = step_gradients(run)
    # forget and retain: below once each; above for the reference, the policy and its recomputation
    assert (calls.count("below"), calls.count("above")) == (2, 6)

    monkeypatch.setattr(prefix.SharedPrefix, "shared", lambda self: contextlib.nullcontext())
    apart = trainer("olmo", tmp_path / "apart", {}, {"lora_layers": ("1",)})
    for name, gradient in step_gradients(apart).items():
        assert torch.equal(gradient, shared[name])
    assert apart.state.log_history[0]["loss"] == run.state.log_history[0]["loss"]  # to the bit


def test_the_prefix_leaves_the_layers_as_they_were(tmp_path):
    run = trainer("olmo", tmp_path, ALL, {"lora_layers": ("1",)})
    before = [vars(module).get("forward") for module in run.passes.prefix.modules]
    with pytest.raises(RuntimeError, match="inside"), run.passes.prefix.shared():
        raise RuntimeError("inside")
    assert [vars(module).get("forward") for module in run.passes.prefix.modules] == before
    assert len(run.passes.prefix.modules) == 2  # embedding and layer 0


# -- what is in memory ----------------------------------------------------------------------------------------


class LargeFloat32(TorchDispatchMode):
    """Collects float32 results with at least `elements` elements."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.results = elements, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float32 and leaf.numel() >= self.elements:
                self.results.append((str(function), tuple(leaf.shape)))
        return result


def small_olmo(**sizes) -> OlmoConfig:
    return OlmoConfig(num_attention_heads=4, pad_token_id=0, eos_token_id=1, **sizes)


@pytest.mark.parametrize("memory, clean", [({"tile_mlp": 20}, True), (PLAIN, False)], ids=["slices", "plain"])
def test_no_hidden_state_is_copied_to_float32(memory, clean, monkeypatch):
    monkeypatch.setattr(switches, "slice_float32", partial(float32.slice_float32, rows=20))
    config = small_olmo(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16)
    model = attach_lora(model.requires_grad_(False), AdapterConfig(**ADAPTER))
    apply_switches(model, MemoryConfig(**memory))
    ids = torch.randint(3, 50, (4, 40))
    model.train()
    with LargeFloat32(ids.numel() * 32) as large:
        answer_hidden(model, RowBatch.whole(ids)).hidden.sum().backward()
    assert bool(large.results) != clean, large.results


def test_a_copy_of_a_model_with_switches_is_independent(tmp_path):
    run = trainer("olmo", tmp_path, {"tile_mlp": 5})
    double = copy.deepcopy(run.model).double()
    ids = torch.arange(3, 15)[None]
    states = answer_hidden(double, RowBatch.whole(ids)).hidden
    assert states.dtype == torch.float64  # float32 weights of the original would not multiply


# -- 4-bit, bf16, dropout --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_on_disk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = small_olmo(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def four_bit_gradients(model_on_disk, folder, memory, dtype):
    torch.manual_seed(5)
    model = attach_lora(
        load_model(ModelConfig(model_on_disk, qlora=True, dtype=dtype, device="cpu")), AdapterConfig(**ADAPTER)
    )
    apply_switches(model, MemoryConfig(**memory))
    return step_gradients(make_trainer(model, folder, FORGET, RETAIN))


def test_real_four_bit_layers(model_on_disk, tmp_path):
    """bitsandbytes' own layers: with float32 arithmetic the switches change nothing, with bf16 nothing but rounding."""
    exact = four_bit_gradients(model_on_disk, tmp_path / "a", PLAIN, "float32")
    assert relative_error(four_bit_gradients(model_on_disk, tmp_path / "b", ALL, "float32"), exact) < 1e-5
    rounding = relative_error(four_bit_gradients(model_on_disk, tmp_path / "c", PLAIN, "bf16"), exact)
    with_switches = relative_error(four_bit_gradients(model_on_disk, tmp_path / "d", ALL, "bf16"), exact)
    assert 1e-4 < rounding < 0.1 and with_switches < 1.5 * rounding


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "lost"])
def test_dropout_in_a_tiled_mlp_draws_the_same_numbers_twice(kept, monkeypatch):
    """The output is linear in lora_B, so with the same draws in both passes L(2B) - L(B) = <dL/dB, B>."""
    if not kept:
        monkeypatch.setattr(tiling.Slices, "_same_randomness", lambda self, device: contextlib.nullcontext())
    model = attach_lora(tiny_model("olmo"), AdapterConfig(lora_r=3, lora_targets=("down_proj",), lora_dropout=0.5))
    mlp = model.get_base_model().model.layers[0].mlp.train()
    tiling.tile(mlp, 5)
    b = next(p for n, p in mlp.named_parameters() if "lora_B" in n)
    torch.manual_seed(1)
    x, weight = torch.randn(2, 6, 32), torch.randn(2, 6, 32)
    with torch.no_grad():
        b.normal_()

    def loss(seed=3):
        torch.manual_seed(seed)
        return (mlp(x) * weight).sum()

    first = loss()
    (gradient,) = torch.autograd.grad(first, b)
    with torch.no_grad():
        predicted = float((gradient * b).sum())
        b.mul_(2)
        moved = float(loss() - first)
    assert (moved == pytest.approx(predicted, rel=1e-4)) == kept


# -- what does not fit ----------------------------------------------------------------------------------------


def refused(match, model, memory, **adapter):
    with pytest.raises(UserError, match=match):
        apply_switches(attach_lora(model, AdapterConfig(**adapter)), MemoryConfig(**memory))


def test_a_tied_embedding_stays():
    refused("--embedding-on-cpu: Gemma2ForCausalLM shares", tiny_model("gemma2"), {"embedding_on_cpu": True})


def test_a_model_without_mlp_modules_is_not_tiled():
    config = OPTConfig(
        vocab_size=50, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16
    )
    refused(
        "--tile-mlp: the decoder layers of OPTForCausalLM have no MLP",
        AutoModelForCausalLM.from_config(config),
        {"tile_mlp": 5},
    )


def test_a_norm_that_does_not_follow_its_mlp_is_noticed():
    mlp, norm = torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)
    tiling.tile(mlp, 5, followed_by=norm)
    x = torch.randn(1, 6, 4)
    norm(mlp(x))
    with pytest.raises(UserError, match="LayerNorm does not follow Linear directly"):
        norm(mlp(x) + 1)


@pytest.mark.parametrize(
    "memory, message",
    [
        ({"tile_mlp": 0}, "--tile-mlp must be at least 1"),
        ({"offload_checkpoints": True, "gradient_checkpointing": False}, "--offload-checkpoints"),
        ({"reference_dir": "x", "reference": "live"}, "--reference-dir"),
        ({"reference": "warm"}, "--reference must be"),
        ({"gradient_checkpointing": "sometimes"}, "--gradient-checkpointing must be one of auto, on, off"),
    ],
)
def test_contradictory_switches(memory, message):
    with pytest.raises(UserError, match=message):
        MemoryConfig(**memory)


def test_an_embedding_on_the_host_is_not_a_parameter_and_does_not_move():
    model = tiny_model("olmo")
    weight = model.get_input_embeddings().weight
    apply_switches(attach_lora(model, AdapterConfig()), MemoryConfig(embedding_on_cpu=True))
    assert model.get_input_embeddings().weight is weight
    assert all(p is not weight for p in model.parameters())
    model.to(torch.bfloat16)
    assert model.get_input_embeddings().weight.dtype == torch.float32


# -- which layers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, layers",
    [((), None), (("16-18",), [16, 17, 18]), (("0", "4", "8-9"), [0, 4, 8, 9]), (("3,1-2,2",), [1, 2, 3]), (7, [7])],
)
def test_layers_as_ranges_and_lists(given, layers):
    assert AdapterConfig(lora_layers=given).layers == layers


@pytest.mark.parametrize("given", ["5-3", "-1", "1-", "top", "1.5", "1-2-3"])
def test_malformed_layers(given):
    with pytest.raises(UserError, match=f"--lora-layers {given}: give layer numbers"):
        AdapterConfig(lora_layers=(given,))


def test_layers_that_the_model_does_not_have():
    with pytest.raises(UserError, match="--lora-layers names layer 2, but the model's layers are 0-1"):
        attach_lora(tiny_model("olmo"), AdapterConfig(lora_layers=("0-2",)))


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("all-linear",)])
def test_only_the_named_layers_get_adapters(targets):
    model = attach_lora(tiny_model("olmo"), AdapterConfig(lora_layers=("1",), lora_targets=targets))
    trained = {name.split("layers.")[1][0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"1"}


@pytest.mark.parametrize(
    "flags, rows",
    [
        (["--tile-mlp"], 1024),
        (["--tile-mlp", "--qlora"], 1024),
        (["--tile-mlp", "96"], 96),
        (["--tile_mlp=96"], 96),
        ([], None),
    ],
)
def test_tile_mlp_needs_no_value(flags, rows):
    assert parse_run(["--model", "x", *flags], "train").memory.tile_mlp == rows


@pytest.mark.parametrize(
    ("adapter", "recomputed"),
    [
        ({"lora_layers": ("1",)}, [False, True]),
        ({}, [True, True]),
        ({"lora_layers": ("1",), "modules_to_save": ("embed_tokens",)}, [True, True]),
    ],
    ids=["upper", "both", "with the embedding"],
)
def test_layers_are_recomputed_from_the_lowest_adapter_up(adapter, recomputed):
    model = attach_lora(tiny_model("llama"), AdapterConfig(**{**ADAPTER, **adapter}))
    apply_switches(model, MemoryConfig(gradient_checkpointing="on"))
    assert [is_checkpointed(layer) for layer in decoder_layers(model)] == recomputed
