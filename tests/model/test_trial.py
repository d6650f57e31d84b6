"""Small copies of architectures, and what is refused on them before any weights are loaded."""

import json

import pytest
import torch
import transformers
from helpers.architectures import ARCHITECTURES, tiny_config
from packaging import version
from transformers import AutoConfig, AutoTokenizer, LlamaConfig

from lowmem_npo.cli import main
from lowmem_npo.errors import UserError
from lowmem_npo.model import head
from lowmem_npo.model.known_configs import known_config, known_names
from lowmem_npo.model.trial import LARGEST, check_architecture, trial_model

LARGE = {
    "llama": {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8},
    "deepseek_v3": {},
    "falcon": {},  # 71 heads
    "gemma3": {},
    "gemma3n_text": {},
    "gpt2": {},
    "jamba": {},
    "nemotron_h": {"layers_block_type": ["mamba", "mlp", "mamba", "mlp", "attention", "mlp"] * 9},
    "olmo3": {},
    "qwen2": {"hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4},
    "qwen3_next": {},
    "zamba": {},
}


def known(architecture):
    if architecture not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {architecture}")
    if architecture == "doge" and version.parse(transformers.__version__) < version.parse("5.23"):
        pytest.skip("its tokens see those after them in older releases (5.17.0)")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_supported_architecture_is_refused(architecture):
    known(architecture)
    assert trial_model(tiny_config(architecture, 258)) is not None
    check_architecture(tiny_config(architecture, 258))


@pytest.mark.parametrize("architecture", [*LARGE, *known_names()])
def test_a_copy_of_a_large_model_is_small(architecture):
    if architecture in LARGE:
        known(architecture)
        config = AutoConfig.for_model(architecture, **LARGE[architecture])
    else:
        config = known_config(architecture)
    before = config.to_dict()
    model = trial_model(config)
    assert sum(p.numel() for p in model.parameters()) <= LARGEST
    assert {p.dtype for p in model.parameters()} == {torch.float32} and not model.training
    assert model.get_input_embeddings().num_embeddings == 128
    assert config.to_dict() == before
    text, small = config.get_text_config(), model.config.get_text_config()
    for name in ("head_dim", "max_position_embeddings", "rope_parameters", "hidden_act"):
        assert getattr(small, name, None) == getattr(text, name, None)
    for kinds in ("layer_types", "layers_block_type"):
        assert set(getattr(small, kinds, None) or ()) == set(getattr(text, kinds, None) or ())
    shares = [bool(getattr(one, "num_kv_shared_layers", None)) for one in (small, text)]
    assert shares[0] == shares[1], "upper layers read the keys of lower ones"
    check_architecture(config)


def test_a_copy_is_the_same_each_time_and_leaves_the_random_state_alone():
    state = torch.random.get_rng_state()
    one, other = (trial_model(LlamaConfig(vocab_size=50000)) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_tokens_lie_within_the_vocabulary_of_the_copy():
    config = LlamaConfig(vocab_size=128256, bos_token_id=128000, eos_token_id=[128001, 128009], pad_token_id=128004)
    model = trial_model(config)
    assert model.config.pad_token_id == 127 and model.config.eos_token_id == [127, 127]


def test_what_cannot_be_built_is_not_refused_here():
    config = LlamaConfig(hidden_act="unknown")
    assert trial_model(config) is None
    check_architecture(config)


def test_a_head_of_an_unknown_scale_is_refused(monkeypatch):
    config = AutoConfig.for_model("cohere", logit_scale=0.25)
    check_architecture(config)
    monkeypatch.setattr(head, "FACTORS", ())
    with pytest.raises(UserError, match="CohereForCausalLM changes its logits in a way that is not supported"):
        check_architecture(config)


REFUSED = {
    "bert": (
        {"is_decoder": True},
        "BertLMHeadModel",
        "has layers between its decoder and its output head (cls.predictions",
    ),
    "electra": ({"is_decoder": True}, "ElectraForCausalLM", "has layers between its decoder and its output head"),
    "gemma3_text": ({"use_bidirectional_attention": True}, "Gemma3ForCausalLM", "is not causal"),
    "llama": ({"is_causal": False}, "LlamaForCausalLM", "is not causal"),
    "roberta": (
        {"is_decoder": True},
        "RobertaForCausalLM",
        "has layers between its decoder and its output head (lm_head",
    ),
    "xlnet": ({}, "XLNetLMHeadModel", "is not causal here: each token sees those after it"),
}


@pytest.fixture
def dry_run(tmp_path, byte_model):
    """architecture -> the command that tries a run on it; there are no weights."""
    AutoTokenizer.from_pretrained(byte_model).save_pretrained(tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "ab", "answer": "cd"}))

    def command(architecture):
        settings, name, _ = REFUSED[architecture]
        config = AutoConfig.for_model(architecture, vocab_size=512, architectures=[name], **settings)
        config.save_pretrained(tmp_path)
        rows = str(tmp_path / "rows.jsonl")
        data = ["--forget", rows, "--retain", rows.replace("rows", "other"), "--output-dir", str(tmp_path / "out")]
        (tmp_path / "other.jsonl").write_text(json.dumps({"question": "ef", "answer": "gh"}))
        return ["train", "--model", str(tmp_path), *data, "--device", "cpu", "--dry-run"]

    return command


@pytest.mark.parametrize("architecture", REFUSED)
def test_a_dry_run_refuses_what_loading_would(architecture, dry_run, capsys):
    assert main(dry_run(architecture)) == 2
    assert REFUSED[architecture][2] in capsys.readouterr().err


@pytest.mark.parametrize("command", [["ask", "MODEL", "ab"], ["data", "MODEL/rows.jsonl", "--model", "MODEL"]])
def test_so_does_whatever_asks_the_model(command, dry_run, tmp_path, capsys):
    dry_run("xlnet")
    assert main([word.replace("MODEL", str(tmp_path)) for word in command]) == 2
    assert capsys.readouterr().err.count("is not causal here") == 1
