"""Which model, and how it is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from lowmem_npo.errors import UserError
from lowmem_npo.ranges import Automatic, Checked, on_or_off


@dataclass
class ModelOptions(Checked):
    """Which model, and how it is loaded: for every command that loads one."""

    model: str | None = None
    """Hub name or local directory of a causal language model."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    qlora: bool = False
    """Load the frozen weights as 4-bit NF4 (bitsandbytes); without it they stay as --dtype says."""
    double_quant: Automatic = "auto"
    """Whether the scales of 4-bit weights are quantised, too: 0.4 bits less per weight, and more work in every pass.
    auto: on, unless the run's GPU, or --memory-budget, has room without it; on in a sweep, whose runs have one base."""
    attn: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"
    """Attention implementation. flash_attention_2 needs the extra: pip install 'lowmem-npo[flash]'."""
    dtype: Literal["bf16", "float32"] = "bf16"
    """Compute type, and type of the frozen weights that are not 4-bit."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is the GPU if there is one, else the CPU. CUDA_VISIBLE_DEVICES selects one of several GPUs."""
    quantized_cache: str | None = None
    """Directory in which the weights that --qlora has quantised are kept; the next run with the same weights and
    options reads them there."""

    def model_config(self, **others: Any) -> ModelConfig:
        """The same options, with `others` in place of some, for a model that is named by then."""
        return ModelConfig(**{f.name: getattr(self, f.name) for f in fields(ModelOptions)} | others)


@dataclass
class ModelConfig(ModelOptions):
    """Model: the one that is to forget, and how it is loaded."""

    model: str = field()

    def __post_init__(self) -> None:
        self.double_quant = on_or_off(self.double_quant)
        super().__post_init__()
        if self.quantized_cache is not None and not self.qlora:
            raise UserError("--quantized-cache keeps 4-bit weights: give --qlora, or leave it out.")
