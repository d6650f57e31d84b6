"""Which linear layers get an adapter: all whose output is their product, on no other."""

from __future__ import annotations

import re

import bitsandbytes as bnb
import pytest
import torch
from helpers.architectures import random_model, tiny_config
from helpers.dense_step import make_trainer, random_rows, step_gradients
from peft.tuners.lora import LoraLayer
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, LongcatFlashConfig, LongcatFlashForCausalLM

from lowmem_npo.config import AdapterConfig, ModelConfig
from lowmem_npo.errors import UserError
from lowmem_npo.model import attach_lora, load_model
from lowmem_npo.model.adapters import check_lora, extra_adapter, note_on_experts
from lowmem_npo.model.layers import all_linear, decoder_layers, linear_layers, read_as_weights

ALL = ("all-linear",)
LAYERS = {  # architecture: the last parts of the names, and what is left out
    "llama": ("down_proj gate_proj k_proj o_proj q_proj up_proj v_proj", ""),
    "gpt2": ("c_attn c_fc c_proj", ""),
    "falcon": ("dense dense_4h_to_h dense_h_to_4h query_key_value", ""),
    "llama4_text": ("down_proj gate_proj k_proj o_proj q_proj up_proj v_proj", "router"),
    "phimoe": ("k_proj o_proj q_proj v_proj", "router"),
    "mamba": ("in_proj x_proj", "dt_proj out_proj"),
    "falcon_mamba": ("in_proj x_proj", "dt_proj out_proj"),
    "mamba2": ("in_proj", "out_proj"),
    "falcon_h1": ("down_proj gate_proj in_proj k_proj o_proj q_proj up_proj v_proj", "out_proj"),
    "jamba": ("down_proj gate_proj in_proj k_proj o_proj out_proj q_proj up_proj v_proj x_proj", "dt_proj"),
}


def names(model) -> set[str]:
    return {name.rpartition(".")[2] for name in linear_layers(model)}


@pytest.mark.parametrize("architecture", LAYERS)
def test_every_layer_that_can_have_an_adapter_gets_one_that_is_trained(architecture, tmp_path):
    model = random_model(tiny_config(architecture, 97)).requires_grad_(False)
    adapted, left_out = (set(part.split()) for part in LAYERS[architecture])
    assert adapted <= names(model) and not left_out & names(model)
    linear = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert linear - names(model) - {"lm_head"} <= left_out | {"gate"}
    trainer = make_trainer(
        attach_lora(model, AdapterConfig(lora_targets=ALL)), tmp_path, random_rows(4, 1), random_rows(4, 2)
    )
    gradients = step_gradients(trainer)
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert gradients.keys() == trained and all(g.any() for g in gradients.values())


MIXTURES = {  # whether linear layers beside the experts are called as those were
    **dict.fromkeys(("deepseek_v3", "glm4_moe", "qwen3_next", "afmoe"), True),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "mixtral", "llama4_text"), False),
}


@pytest.mark.parametrize("architecture", MIXTURES)
def test_all_linear_is_linear_layers_and_says_which_it_leaves_out(architecture):
    """PEFT would adapt the experts in place of layers that are called as those were: a factor for each of hundreds."""
    config = tiny_config(architecture, 97)
    adapted = check_lora(config, every := AdapterConfig(lora_targets=ALL))
    base = adapted.get_base_model()
    with_adapter = {name for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    assert with_adapter == set(all_linear(base)) and not [name for name in with_adapter if "experts" in name.split(".")]
    note = note_on_experts(adapted, every)
    kind = type(base).__name__
    assert MIXTURES[architecture] is (len(with_adapter) < len(linear_layers(base)))
    assert note_on_experts(check_lora(tiny_config("llama", 97), AdapterConfig(lora_targets=ALL)), every) is None
    if not MIXTURES[architecture]:
        assert note == f"LoRA on all-linear leaves out the experts of a {kind}, which are no linear layers."
    else:
        assert re.match("LoRA on all-linear leaves out down_proj, (gate, )?gate_proj, up_proj: PEFT takes", note)
        assert note.endswith(f"the experts of a {kind}, which are no linear layers and have no adapter either.")
        named = AdapterConfig(lora_targets=("gate_proj", "up_proj", "down_proj"))
        assert "is an adapter on each of the experts of a" in note_on_experts(check_lora(config, named), named)
        with extra_adapter(model := random_model(config), rank=2, seed=0):
            assert not [name for name, _ in model.named_parameters() if "lora_" in name and ".experts." in name]


@pytest.mark.parametrize(
    ("architecture", "target"),
    [("mamba", "dt_proj"), ("jamba", "dt_proj"), ("llama4_text", "router"), ("phimoe", "router")],
)
def test_a_target_without_effect_is_refused_before_weights_are_loaded(architecture, target):
    with pytest.raises(UserError, match=f"--lora-targets {target}: no adapter can be there, .* linear layers are: "):
        check_lora(tiny_config(architecture, 97), AdapterConfig(lora_targets=(target,)))


def test_all_linear_of_some_layers_is_what_is_inside_them():
    """Zamba2 has linear layers that are called 0 and 1, as its decoder layers are."""
    model = random_model(tiny_config("zamba2", 97))
    adapted = attach_lora(model, AdapterConfig(lora_targets=ALL, lora_layers=("3",)))
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all(".layers.3." in name for name in trained)


@pytest.mark.parametrize("architecture", ["llama4_text", "mamba"])
def test_the_relearning_adapter_leaves_the_same_layers_alone_and_nothing_behind(architecture):
    model = random_model(tiny_config(architecture, 97))
    ids = torch.arange(3, 20)[None]
    before = model(ids, use_cache=False).logits
    with extra_adapter(model, rank=2, seed=0):
        assert torch.equal(model(ids, use_cache=False).logits, before)
        assert not [n for n, _ in model.named_parameters() if "lora" in n and ("router" in n or "dt_proj" in n)]
    assert torch.equal(model(ids, use_cache=False).logits, before)


def test_a_weight_that_the_model_multiplies_itself_is_not_quantised(tmp_path):
    config = tiny_config("mamba", 97)
    random_model(config).save_pretrained(tmp_path)
    model = load_model(ModelConfig(str(tmp_path), qlora=True, device="cpu"), lambda line: None)
    kinds = {name.rpartition(".")[2]: type(m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert kinds.pop("dt_proj") is torch.nn.Linear and kinds.pop("lm_head") is torch.nn.Linear
    assert set(kinds.values()) == {bnb.nn.Linear4bit}
    assert model(torch.arange(9)[None], use_cache=False).logits.isfinite().all()


def test_a_router_that_reads_a_linear_layers_weight_is_recognised():
    config = LongcatFlashConfig(
        vocab_size=97, hidden_size=32, ffn_hidden_size=48, expert_ffn_hidden_size=24, num_layers=1,
        num_attention_heads=4, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
        n_routed_experts=4, zero_expert_num=1, moe_topk=2,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert {name.rpartition(".")[2] for name in read_as_weights(model)} == {"classifier"}


def test_the_layers_of_a_decoder_are_not_the_parts_of_one():
    """LongCat Flash counts each of its layers twice, and lists two attentions, MLPs and norms in each."""
    latent = dict(kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, head_dim=4)
    experts = dict(n_routed_experts=4, moe_topk=2, expert_ffn_hidden_size=16, ffn_hidden_size=16)
    sizes = dict(hidden_size=32, num_attention_heads=4, vocab_size=97)
    for layers in (1, 3):
        with torch.device("meta"):
            model = LongcatFlashForCausalLM(LongcatFlashConfig(num_layers=layers, **sizes, **latent, **experts))
        assert model.config.num_hidden_layers == 2 * layers
        assert decoder_layers(model) is model.model.layers and len(model.model.layers) == layers


def test_layers_in_several_stacks_are_refused_before_weights_are_loaded():
    """HRM's two take turns: nothing is below an adapter of one of them, and each runs several times."""
    if "hrm_text" not in CONFIG_MAPPING:
        pytest.skip("this release of transformers has no hrm_text")
    sizes = dict(hidden_size=32, num_attention_heads=4, head_dim=8, intermediate_size=48, vocab_size=97)
    config = AutoConfig.for_model("hrm_text", num_layers_per_stack=2, **sizes)
    with pytest.raises(UserError, match="The decoder layers of HrmTextForCausalLM are in 2 stacks"):
        check_lora(config, AdapterConfig(lora_targets=ALL))
