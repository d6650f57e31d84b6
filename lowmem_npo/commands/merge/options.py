"""What `lowmem-npo merge` can be asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lowmem_npo.ranges import Checked

WHOLE, DEQUANTIZED, AUTO = "whole", "dequantized", "auto"


@dataclass
class MergeConfig(Checked):
    """Merge an adapter into the weights of its base model, on the CPU, one file of the checkpoint at a time."""

    adapter: str
    """Directory of the adapter, as `lowmem-npo train` wrote it."""
    output_dir: str
    """Directory of the merged model; new or empty."""
    model: str | None = None
    """Hub name or local directory of the base model. Default: the model that the adapter was trained on."""
    revision: str | None = None
    """Branch, tag or commit of the base model on the hub. Default: the one that the adapter was trained on."""
    any_base: bool = False
    """Accept an adapter of another base model, or of one that is not known to have the same weights."""
    dtype: Literal["bf16", "stored"] = "bf16"
    """Type of the merged weights: bf16, or the type in which the base model is stored."""
    base_weights: Literal["auto", "whole", "dequantized"] = "auto"
    """What an adapter of a run with --qlora is merged into: the base's whole weights, or those that it was fitted to,
    quantised to NF4 and dequantised. auto: into both; each is measured on the rows of the adapter's run, and the better
    one is kept. Any other adapter is merged into the whole weights."""
    quantize_check: bool = False
    """Measure the merged model on the rows of the adapter's run, as it is and rounded to 4 bits (NF4): whether the
    forgetting survives such serving."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the merged model is measured: auto is the GPU if there is one, else the CPU."""
