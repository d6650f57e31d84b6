"""What `sweep --teach` makes: whole models, one at a time, where they fit."""

from __future__ import annotations

import pytest
import torch
from helpers.loaded_models import loads_watched
from helpers.taught_model import TEACHING
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from lowmem_npo.commands.sweep import taught_models
from lowmem_npo.commands.sweep.options import TeachingOptions
from lowmem_npo.commands.sweep.taught_models import check_teaching, teach_models
from lowmem_npo.commands.train.plan import Inputs, read_inputs
from lowmem_npo.config import DataConfig, MemoryConfig, ModelConfig, RunConfig
from lowmem_npo.console import silent
from lowmem_npo.data import prepare
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.answers import evaluate_answers


def test_full_teaching_that_cannot_fit_is_refused_by_what_it_takes(desk, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(desk / "base")
    config = RunConfig(model=ModelConfig(model="m", device="cpu"))
    large = LlamaConfig(hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128)
    inputs = Inputs(large, tokenizer, prepare(tokenizer, DataConfig(limit=4)))
    with pytest.raises(UserError, match=r"--teach full takes at least \d+\.\d GiB, and the machine has .* lora takes"):
        check_teaching(config, TeachingOptions(teach="full"), inputs, tmp_path)


@pytest.mark.parametrize("teach", ["lora", "full"])
def test_a_taught_model_is_gone_before_the_next_one_is_loaded(teach, desk, tmp_path):
    """Its memory switches make cycles."""
    sources = {part: str(desk / f"{part}.jsonl") for part in ("forget", "retain")}
    model, memory = ModelConfig(str(desk / "base"), dtype="float32", device="cpu"), MemoryConfig(tile_mlp=8)
    config = RunConfig(model, DataConfig(**sources), memory=memory)
    inputs = read_inputs(config, silent)
    with loads_watched(taught_models) as still_there:
        teach_models(config, TeachingOptions(teach, 1, 1e-3, 4), inputs, tmp_path, silent)
    assert still_there == [0, 0]


def test_lora_teaching_leaves_a_whole_model(desk, tmp_path):
    sources = {part: str(desk / f"{part}.jsonl") for part in ("forget", "retain")}
    config = RunConfig(ModelConfig(str(desk / "base"), dtype="float32", device="cpu"), DataConfig(**sources))
    inputs = read_inputs(config, silent)
    teach_models(config, TeachingOptions("lora", 10, 1e-2, 4), inputs, tmp_path, silent)
    base, taught = (AutoModelForCausalLM.from_pretrained(folder) for folder in (desk / "base", tmp_path / "taught"))
    weights = dict(base.named_parameters())
    changed = {name for name, weight in taught.named_parameters() if not torch.equal(weight, weights[name])}
    assert len(changed) == 7 * TEACHING.layers and all("_proj" in name for name in changed)
    nll = [evaluate_answers(model, inputs.tokenizer, inputs.data.forget).summary.nll for model in (base, taught)]
    assert nll[1] < nll[0] - 0.3
    assert not (tmp_path / "taught" / "adapter").exists() and (tmp_path / "taught" / "tokenizer.json").exists()
