"""What leaves the decoder, and the heads of every architecture."""

import dataclasses

import pytest
import torch
import transformers
from helpers.architectures import ARCHITECTURES
from helpers.tiny_models import CONFIGS, SIZES, tiny_model
from transformers import AutoConfig, ElectraConfig, Gemma3TextConfig, GPTNeoXConfig, LlamaConfig, PhiConfig, XLNetConfig

from lowmem_npo.data import RowBatch, TokenizedRow
from lowmem_npo.errors import UserError
from lowmem_npo.model import answer_hidden, check_causal, check_head, packs_rows
from lowmem_npo.model import head as head_module


def test_answer_hidden_gives_what_predicts_labelled_tokens():
    model = tiny_model()
    rows = [
        TokenizedRow(input_ids=[5, 6, 7, 8, 9], labels=[-100, -100, 7, 8, 9], prompt_length=2),
        TokenizedRow(input_ids=[10, 11, 12], labels=[-100, 11, 12], prompt_length=1),
    ]
    alone = model.model(torch.tensor([rows[1]["input_ids"]])).last_hidden_state[0, :2]
    for pack in (False, packs_rows(model)):
        answers = answer_hidden(model, RowBatch.of(rows, pack=pack))
        assert answers.targets.tolist() == [7, 8, 9, 11, 12] and answers.sequence.tolist() == [0, 0, 0, 1, 1]
        torch.testing.assert_close(answers.hidden[3:], alone)


def test_hidden_states_have_the_type_of_the_head_where_autocast_norms_in_float32():
    """As on CUDA, where it does this to every nn.LayerNorm."""
    model = tiny_model(GPTNeoXConfig(vocab_size=97, **SIZES), dtype=torch.bfloat16)
    plain = answer_hidden(model, RowBatch.whole(torch.arange(3, 15)[None])).hidden
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.register_forward_hook(lambda module, args, output: output.float())
    hidden = answer_hidden(model, RowBatch.whole(torch.arange(3, 15)[None])).hidden
    assert hidden.dtype == torch.bfloat16
    torch.testing.assert_close(hidden, plain, rtol=0.05, atol=0.05)
    check_head(model)


def test_a_large_offset_of_all_logits_is_no_other_head():
    """The model's bf16 logits of 1000 and more are rounded to multiples of 4 or 8; the kernels' are not."""
    model = tiny_model(PhiConfig(vocab_size=97, **SIZES), dtype=torch.bfloat16)
    model.lm_head.bias.data.fill_(1000)
    check_head(model)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_head_is_supported(architecture):
    check_head(tiny_model(architecture))
    check_head(tiny_model(architecture, dtype=torch.bfloat16))


SCALES = {
    "cohere": {"logit_scale": 0.25},
    "falcon_h1": {"lm_head_multiplier": 0.25},
    "hyperclovax": {"logits_scaling": 0.25},  # a factor; Granite's is a divisor
    "inkling_text": {"logits_mup_width_multiplier": 4.0, "unpadded_vocab_size": 90},
}


@pytest.mark.parametrize("architecture", SCALES)
def test_every_scale_is_supported(architecture):
    if architecture not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {architecture}")
    options = {**SIZES, **ARCHITECTURES.get(architecture, {}), **SCALES[architecture]}
    check_head(tiny_model(AutoConfig.for_model(architecture, vocab_size=97, **options)))


def test_layers_between_decoder_and_head_are_refused():
    config = ElectraConfig(vocab_size=97, embedding_size=16, is_decoder=True, **SIZES)
    with pytest.raises(UserError, match="has layers between its decoder and its output head"):
        check_head(tiny_model(config))


@pytest.mark.parametrize("architecture, change", [("gemma2", {"softcap": None}), ("granite", {"logit_scale": 1.0})])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_unsupported_head_is_refused(architecture, change, dtype, monkeypatch):
    right = head_module.frozen_head
    monkeypatch.setattr(head_module, "frozen_head", lambda model: dataclasses.replace(right(model), **change))
    with pytest.raises(UserError, match="logits"):
        check_head(tiny_model(architecture, dtype=dtype))


def test_weights_that_give_no_numbers_are_refused():
    model = tiny_model(dtype=torch.bfloat16)
    model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="computes no numbers but NaN or infinity: its weights are damaged"):
        check_head(model)


BIDIRECTIONAL = [
    (LlamaConfig(vocab_size=97, is_causal=False, **SIZES), torch.bfloat16),
    (Gemma3TextConfig(vocab_size=97, head_dim=8, use_bidirectional_attention=True, **SIZES), torch.bfloat16),
    (XLNetConfig(vocab_size=97, d_model=32, n_layer=2, n_head=4, d_inner=48), torch.float32),
]


@pytest.mark.parametrize("config, dtype", BIDIRECTIONAL)
def test_a_model_in_which_tokens_see_those_after_them_is_refused(config, dtype):
    with pytest.raises(UserError, match="is not causal here"):
        check_causal(tiny_model(config, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_causal_models_are(architecture, dtype):
    check_causal(tiny_model(architecture, dtype=dtype))
