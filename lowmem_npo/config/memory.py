"""What keeps a step small: the memory switches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lowmem_npo.config.model import ModelOptions
from lowmem_npo.errors import UserError
from lowmem_npo.ranges import Automatic, Checked, Count, CountOrNone, on_or_off
from lowmem_npo.sizes import parse_size

TILE_ROWS = 1024  # tokens of a tile where --tile-mlp has no value


@dataclass
class StreamOptions(Checked):
    """Where the frozen weights are while they are computed with: for every command that loads a large model."""

    stream_weights: bool = False
    """Keep the frozen weights of the decoder layers in the host's memory; the GPU holds two layers, and the next one is
    copied while one computes."""
    stream_from: Literal["auto", "memory", "cache"] = "auto"
    """Where --stream-weights keeps them. memory: in pinned memory. cache: in the files of --quantized-cache, which are
    read in every pass, at the speed of the disk. auto: in the cache, if the memory that is available is too small."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stream_from != "auto" and not self.may_stream:
            raise UserError("--stream-from says where --stream-weights keeps the weights: give both, or none.")

    @property
    def may_stream(self) -> bool:
        return self.stream_weights

    def check_source(self, model: ModelOptions) -> None:
        """Raises UserError for files that are not named."""
        if self.stream_from == "cache" and model.quantized_cache is None:
            raise UserError("--stream-from cache reads the weights from the files of --quantized-cache DIR: give one.")


@dataclass
class MemoryConfig(StreamOptions):
    """Memory: what keeps the step small. The loss and its gradients stay the same, but for rounding."""

    gradient_checkpointing: Automatic = "auto"
    """Whether each layer is recomputed in the backward pass instead of keeping its activations. auto: unless they fit
    into the memory that is free, or into --memory-budget."""
    sliced_float32: bool = True
    """Keep no float32 copy of hidden states: norms, rotary embeddings and gated activations are fused kernels on a GPU;
    where no kernel does it, norms and rotary embeddings work on a slice of the tokens at a time."""
    offload_checkpoints: bool = False
    """Keep the layers' inputs, from which they are recomputed, in the host's memory; copied while the GPU computes."""
    tile_mlp: Count | None = None
    """Run each MLP on N tokens at a time, forward and backward (--tile-mlp alone: 1024). More tokens are faster, fewer
    take less memory."""
    joint_pass_tokens: CountOrNone | Literal["auto"] = "auto"
    """Let the forget and retain rows of a micro-batch share one pass if together they have at most N tokens: half of
    the passes, but what both parts keep is in memory at once. 0: never, as under --adversary or --sam. auto: on a GPU,
    as many as fit into the memory that is free, or into --memory-budget, if that is predicted to be faster; else 0."""
    embedding_on_cpu: bool = False
    """Keep the input embedding in the host's memory and copy the rows that a batch needs."""
    reference: Literal["auto", "live", "cached"] = "auto"
    """live: run the reference pass in every step. cached: store its results when a row is first seen and read them from
    then on, in later runs too. auto: cached if there is more than one epoch and the disk has room."""
    reference_dir: str | None = None
    """Directory of the cached reference. Default: reference/ in --output-dir."""
    memory_budget: str | None = None
    """GPU memory that the run may take, CUDA's own included, such as 24GiB: the fastest combination of these switches
    and --micro-batch-size that fits is found by simulation and used."""

    def __post_init__(self) -> None:
        self.gradient_checkpointing = on_or_off(self.gradient_checkpointing)
        super().__post_init__()
        _ = self.budget_bytes  # a malformed one raises here
        if self.offload_checkpoints and not self.recomputes_layers:
            raise UserError(
                "--offload-checkpoints moves what gradient checkpointing keeps: leave out --no-gradient-checkpointing."
            )
        if self.reference_dir is not None and self.reference == "live":
            raise UserError("--reference-dir is where the cached reference is kept: leave out --reference live, or it.")

    @property
    def may_stream(self) -> bool:
        """A budget may choose it."""
        return self.stream_weights or self.memory_budget is not None

    @property
    def recomputes_layers(self) -> bool:
        """Whether layers are checkpointed: what is not decided is counted, and done, as if it were."""
        return self.gradient_checkpointing != "off"

    @property
    def budget_bytes(self) -> int | None:
        """`memory_budget` in bytes."""
        return None if self.memory_budget is None else parse_size(self.memory_budget, "--memory-budget")
