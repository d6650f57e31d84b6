"""A model that is asked, not trained, while its weights are streamed: what that takes, before they are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transformers import PretrainedConfig

from lowmem_npo.config import ModelConfig, StreamOptions
from lowmem_npo.console import Say
from lowmem_npo.estimate.gpus import own_device
from lowmem_npo.estimate.host import streaming_host
from lowmem_npo.estimate.simulator.gpu import CAPABILITY
from lowmem_npo.estimate.step import estimate_streamed
from lowmem_npo.memory.streaming import check_device
from lowmem_npo.model.loading import local_cache_entry, resolve_device
from lowmem_npo.sizes import gib


@dataclass(frozen=True)
class StreamedModel:
    """What was decided of it."""

    stream_from: Literal["memory", "cache"]
    pass_seconds: float  # of copying or reading the weights: a pass through all layers takes no less


def decide_streaming(
    model: ModelConfig, options: StreamOptions, architecture: PretrainedConfig, say: Say
) -> StreamedModel | None:
    """Where the weights are streamed from, after saying what they take of host and GPU; None if they are not.

    Raises:
        UserError: there is no GPU, too little host memory, or a --quantized-cache that can be neither read nor written.
    """
    options.check_source(model)
    local_cache_entry(model, architecture)
    if not options.stream_weights:
        return None
    device = resolve_device(model.device)
    check_device(device)
    gpu = own_device() if device.type == "cuda" else None
    figures = estimate_streamed(model, architecture, gpu.capability if gpu else CAPABILITY)
    host = streaming_host(model, options.stream_from, figures, figures.streamed_bytes, unit="pass")
    for line in host.lines():
        say(line)
    host.check()
    say(f"The GPU holds {gib(figures.peak_bytes)} of weights at a time, besides what a pass computes.")
    return StreamedModel(
        "cache" if host.in_file else "memory", host.pass_seconds(figures.streamed_bytes, gpu.model if gpu else None)
    )
