"""What a run is: typed, documented and validated once, whether it comes from flags, from YAML or from Python.

Each section below is one dataclass and one box of `lowmem-npo train --help-all`; a field's docstring is its help text.
`RunConfig` puts the sections together. The file that `--config` reads holds the same names as the flags, flat.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from annotated_types import Interval

from lowmem_npo.errors import UserError
from lowmem_npo.forget_terms import custom_term
from lowmem_npo.ranges import (
    MOST,
    Count,
    CountOrNone,
    Finite,
    Positive,
    PositiveOrZero,
    Probability,
    Seed,
    check_fields,
)
from lowmem_npo.sizes import parse_size
from lowmem_npo.sources import GENERAL_SET
from lowmem_npo.stop_conditions import Condition, parse_conditions

FORGET_TERMS = ("npo", "ga", "simnpo", "idk", "wga", "satimp", "jensun", "dpo")  # beside those that others bring
REFUSING_TERMS = ("idk", "jensun")  # which teach --refusal
Normalization = Literal["sequence", "token", "length"]
KLDirection = Literal["policy-reference", "reference-policy"]
ForgetLevel = Literal["none", "holdout"]
Recipe = Literal["paper", "lasting"]
PassageForm = Literal["both", "completion", "text"]
Automatic = Literal["auto", "on", "off"]  # auto is decided before the model is loaded, and recorded as what it became

TILE_ROWS = 1024  # tokens of a tile where --tile-mlp has no value
KEPT_CHECKPOINTS = 2  # unless --save-total-limit says otherwise


@dataclass
class Checked:
    """Options whose values are checked against their types when they are made."""

    def __post_init__(self) -> None:
        check_fields(self)


def on_or_off(value: Any) -> Any:
    """True and False, as YAML reads on and off, in words; any other value as it is."""
    return ("on" if value else "off") if isinstance(value, bool) else value


@dataclass
class ModelOptions(Checked):
    """Which model, and how it is loaded: for every command that loads one."""

    model: str | None = None
    """Hub name or local directory of a causal language model."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    qlora: bool = False
    """Load the frozen weights as 4-bit NF4 (bitsandbytes); without it they stay bf16."""
    double_quant: Automatic = "auto"
    """Whether the scales of 4-bit weights are quantised, too: 0.4 bits less per weight, and more work in every pass.
    auto: on, unless the run's GPU, or --memory-budget, has room without it."""
    attn: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"
    """Attention implementation. flash_attention_2 needs the extra: pip install 'lowmem-npo[flash]'."""
    dtype: Literal["bf16", "float32"] = "bf16"
    """Compute type, and type of the frozen weights that are not 4-bit."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is the GPU if there is one, else the CPU. CUDA_VISIBLE_DEVICES selects one of several GPUs."""
    quantized_cache: str | None = None
    """Directory in which the weights that --qlora has quantised are kept; the next run with the same weights and
    options reads them there."""


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
class AnswerOptions(Checked):
    """How a model is asked for its own answers: for every command that measures them."""

    max_new_tokens: Count | None = None
    """Tokens that a generated answer may have, where the model does not end it before. Default: 64, or 16 more than the
    longest true answer if that is more, but at most 256. The scores of LUME and TOFU have their own."""
    forms: Literal["all", "trained"] = "all"
    """How the forget rows are asked for. all: as they were trained, and, for a model with a chat template, in the chat
    form or the plain form, whichever was not trained, and in other words where a row has them (--paraphrase-column).
    The report goes by the form in which most is left. trained: as they were trained only."""
    generate_answers: Automatic = "auto"
    """Whether the model writes its answers when it is measured. off: they are read off the likelihoods, the most likely
    token after each true one, and leak tests that let the model write are left out. auto: on, unless --stream-weights
    is predicted to make it take more than an hour."""

    def __post_init__(self) -> None:
        self.generate_answers = on_or_off(self.generate_answers)
        super().__post_init__()


@dataclass
class ModelConfig(ModelOptions):
    """Model: the one that is to forget, and how it is loaded."""

    model: str = field()

    def __post_init__(self) -> None:
        self.double_quant = on_or_off(self.double_quant)
        super().__post_init__()
        if self.quantized_cache is not None and not self.qlora:
            raise UserError("--quantized-cache keeps 4-bit weights: give --qlora, or leave it out.")


@dataclass
class DataOptions(Checked):
    """Which rows, and how they are read and written as prompts: for every command that reads any."""

    forget: str | None = None
    """What to forget: rows in a .jsonl, .json, .csv, .tsv or .parquet file, documents (.txt, .md, .html, .pdf, or a
    folder of them), several files, or a hub name such as locuslab/TOFU:forget05. Without any data a small bundled set
    of invented biographies is used."""
    retain: str | None = None
    """What to keep, given in the same way, or builtin (general questions and texts, the default where only --forget is
    given), or self:N (N texts that the original model writes itself). self alone: 64 texts."""
    holdout: str | None = None
    """Rows like those to forget that the model was never taught, given in the same way: --stop-when and the leak tests
    compare the forget rows with them. They are never trained on. The bundled data has its own."""
    prompt_column: str | None = None
    """Column of the prompt. Not needed for input/output, question/answer, prompt/completion, messages and text."""
    answer_column: str | None = None
    """Column of the answer."""
    paraphrase_column: str | None = None
    """Column of the forget rows with the prompt in other words or another language, or a list of them, in which the
    rows are asked for as well (--forms). Default: paraphrased_question, or the like of another prompt column, if there
    is one."""
    template: str | None = None
    """How a prompt is written before its answer. chat: with the model's chat template. plain: 'Question:
    {prompt}\\nAnswer:' for question/answer columns, else the prompt as it is. auto: chat where the model has a chat
    template, but plain for input/output and prompt/completion columns. both: as auto, and what the chat template writes
    a second time as plain, so that it is forgotten in both forms: twice as many rows. Or a text such as '[INST]
    {prompt} [/INST]'."""
    prompt_template: str | None = None
    """Another spelling of --template with a text."""
    system: str | None = None
    """System prompt of rows that the chat template writes and that bring none."""
    passage_tokens: Annotated[int, Interval(ge=8, le=MOST)] | None = None
    """Tokens of a passage, of those into which documents are cut; each overlaps the next by half. Default: 128."""
    passages: PassageForm | None = None
    """What a passage of a document becomes: its second half as the completion of its first (completion), a text
    (text), or both, the default."""


@dataclass
class DataConfig(DataOptions):
    """Data: what to forget, what to keep, and how it is tokenised."""

    template: str = "auto"
    passage_tokens: Annotated[int, Interval(ge=8, le=MOST)] = 128
    passages: PassageForm = "both"
    max_length: Annotated[int, Interval(ge=2, le=MOST)] = 1024
    """Tokens per row, prompt and answer together; truncated rows are counted and reported."""
    tokens: Literal["answer", "all"] = "answer"
    """Which tokens count in the loss: the answer's (EOS included), or every non-padding token."""
    refusal: str = "I don't know."
    """The answer taught in place of the forgotten one by --forget-term idk and jensun."""
    alternative_column: str | None = None
    """Column of the forget rows with another answer, or a list of them, which --forget-term dpo prefers to the
    forgotten one."""
    alternatives: str | None = None
    """self: let the original model write the other answers that --forget-term dpo prefers (AltPO, Mekala et al. 2025),
    5 to each forget row, of which every epoch takes the next; self:N writes N."""
    group_column: str | None = None
    """Column of the forget rows that says what each is about, such as a person: --layered keeps those of a group
    together. Default: every row by itself."""
    allow_overlap: bool = False
    """Continue even if rows of the forget set are in the retain set as well."""
    limit: Count | None = None
    """Use only the first N rows of each set."""


@dataclass
class ObjectiveConfig(Checked):
    """Objective: L = L_forget + gamma * NLL(retain) + delta * KL(retain)."""

    forget_term: str = "npo"
    """npo (Zhang et al. 2024), ga (gradient ascent), simnpo (Fan et al. 2024), idk (NLL of a refusal), wga (weighted
    gradient ascent, Wang et al. 2025), satimp (Yang et al. 2025), jensun (Jensen-Shannon divergence to a refusal, Singh
    et al. 2025), dpo (another answer is preferred, see --alternative-column), or one that an installed package
    brings."""
    beta: Annotated[float, Interval(ge=1e-6, le=1e6)] = 0.5
    """Inverse temperature of npo, simnpo and dpo: smaller is closer to gradient ascent."""
    gamma: PositiveOrZero = 1.0
    """Weight of the retain cross-entropy. 0: not computed."""
    delta: PositiveOrZero = 0.5
    """Weight of the KL to the original model on retain answers, over the whole vocabulary. 0: not computed."""
    normalization: Normalization = "sequence"
    """npo on the sum over the answer's tokens (sequence), on each token (token), or on its mean (length)."""
    kl_direction: KLDirection = "policy-reference"
    """KL(policy || reference), or the reverse as in TOFU and open-unlearning."""
    forget_level: ForgetLevel = "none"
    """holdout: a forget row is pushed no further than a row of the holdout of its rank, by NLL per token under the
    original model. Half of the holdout sets the levels, the other half is what the run is measured by."""
    sam: Positive | None = None
    """Sharpness-aware forgetting (Fan et al. 2025): take the forget gradient at the distance RHO from the weights where
    the forget loss is worst, such as 0.05. A second pass over the forget rows in every step."""
    adversary: Positive | None = None
    """Adversarial forgetting: before each step an attacker, a LoRA of rank 16 on every linear layer, takes one step of
    length RHO, such as 1, to learn six other forget rows again, and the forget term is computed with it in place. A
    pass over six more rows in every step."""
    adversary_steps: Count | None = None
    """How many of these steps an attacker takes, one before each optimiser step, until a fresh one begins (default: 1).
    With more than 1 it is taught rows of one half, and those of the other half are forgotten meanwhile; then the halves
    change places. It costs no further pass; what an attacker has learnt is kept in float32, and in checkpoints. Fewer
    where a run, or a stage of --layered, is too short for two attackers."""
    simnpo_margin: Finite = 0.0
    """Reward margin of simnpo (its paper's gamma)."""
    wga_beta: PositiveOrZero = 1.0
    """wga weighs each token's ascent by its probability to this power: larger spares what is unlikely already."""
    satimp_beta1: PositiveOrZero = 5.0
    """satimp weighs each token's ascent by p^beta1 (1 - p)^beta2: how much it spares what is unlikely already."""
    satimp_beta2: PositiveOrZero = 1.0
    """How much satimp spares what the model is sure of: words that any answer would have there."""

    def __post_init__(self) -> None:
        check_fields(self, ObjectiveConfig)
        custom_term(self.forget_term, FORGET_TERMS)  # raises if there is none
        if self.forget_level != "none" and self.forget_term in REFUSING_TERMS:
            raise UserError(
                f"--forget-level is a level of the forgotten answers, and {self.forget_term} trains on a refusal: "
                "leave one of them out."
            )

    @property
    def needs_retain(self) -> bool:
        """Whether any term looks at retain rows."""
        return self.gamma > 0 or self.delta > 0

    @property
    def attack_steps(self) -> int:
        """How many steps an attacker takes; 0: there is none."""
        return 0 if self.adversary is None else self.adversary_steps or 1


@dataclass
class AdapterConfig(Checked):
    """Adapter: the LoRA weights, the only ones that are trained."""

    adapter: str | None = None
    """Directory of an adapter to go on from: a second request to forget. The original model is then the base with that
    adapter, and the one that is saved holds both. Without --model, the base is the one that it was trained on."""
    any_base: bool = False
    """Accept an --adapter that names another base model (the same weights in another place)."""
    lora_r: Annotated[int, Interval(ge=1, le=2**16)] = 5
    """Rank."""
    lora_alpha: Positive = 5.0
    """Scale: the update is multiplied by alpha / r."""
    lora_dropout: Probability = 0.0
    """Dropout on the adapter's input."""
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Names of the linear layers that get an adapter, or all-linear, or one regular expression that the full names
    match, such as '.*layers\\.[0-7]\\..*_proj'."""
    lora_layers: tuple[str, ...] = ()
    """Decoder layers, counted from 0, that get an adapter, such as 16-31 or 0 4 8-11. Default: all. Layers below the
    lowest of them need no gradient and run once for policy and reference together."""
    use_rslora: bool = False
    """Rank-stabilised LoRA: the update is multiplied by alpha / sqrt(r)."""
    use_dora: bool = False
    """DoRA: the magnitude of each row of a weight is trained beside its direction. Takes more memory."""
    modules_to_save: tuple[str, ...] = ()
    """Names of modules that are trained whole, in float32, such as norm; any but the output head."""

    def __post_init__(self) -> None:
        self.lora_targets = (self.lora_targets,) if isinstance(self.lora_targets, str) else tuple(self.lora_targets)
        layers = (self.lora_layers,) if isinstance(self.lora_layers, (str, int)) else self.lora_layers
        self.lora_layers = tuple(str(layer) for layer in layers)
        saved = self.modules_to_save
        self.modules_to_save = (saved,) if isinstance(saved, str) else tuple(saved)
        super().__post_init__()
        _ = self.layers  # malformed ones raise here
        if not self.lora_targets:
            raise UserError("--lora-targets is empty: name at least one linear layer, or all-linear.")
        if self.target_pattern is not None and self.lora_layers:
            raise UserError("--lora-layers goes with names: write the layers into the pattern of --lora-targets.")
        if self.adapter is not None and self.use_dora:
            raise UserError(
                "--use-dora scales the base's own weights, to which --adapter has added: merge that adapter "
                "(`lowmem-npo merge`), and train on the merged model."
            )
        if self.any_base and self.adapter is None:
            raise UserError("--any-base is about the base of an --adapter: give both, or none.")

    @property
    def may_name_layers(self) -> bool:
        """Whether what is adapted may depend on the number of layers."""
        return bool(self.lora_layers or self.target_pattern or self.modules_to_save or self.adapter)

    @property
    def target_pattern(self) -> str | None:
        """`lora_targets`, if it is a regular expression: what no name of a module can be."""
        patterns = [target for target in self.lora_targets if not re.fullmatch(r"[\w.-]+", target)]
        if not patterns:
            return None
        if len(self.lora_targets) > 1:
            raise UserError(f"--lora-targets {patterns[0]}: a regular expression stands alone; alternatives are (a|b).")
        try:
            re.compile(patterns[0])
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(f"--lora-targets {patterns[0][:200]} is no regular expression: {error}.") from error
        return patterns[0]

    @property
    def layers(self) -> list[int] | None:
        """`lora_layers` as numbers, each once, lowest first; None: all."""
        numbers: set[int] = set()
        for spec in (part for given in self.lora_layers for part in given.replace(",", " ").split()):
            first, dash, last = spec.partition("-")
            last = last if dash else first
            if not (re.fullmatch(r"\d{1,4}", first) and re.fullmatch(r"\d{1,4}", last) and int(first) <= int(last)):
                raise UserError(f"--lora-layers {spec}: give layer numbers from 0, or ranges such as 16-31.")
            numbers.update(range(int(first), int(last) + 1))
        return sorted(numbers) or None


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
    the passes, but what both parts keep is in memory at once. 0: never. auto: on a GPU, as many as fit into the memory
    that is free, or into --memory-budget, if that is predicted to be faster; else 0."""
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


@dataclass
class TrainingConfig(Checked):
    """Training: one optimiser step takes --batch-size forget rows and --retain-batch-size retain rows."""

    recipe: Recipe = "paper"
    """Options that belong together; one that is given itself wins. paper: the defaults. lasting: --layered 3 and
    --adversary 1, so that what is forgotten comes back less when a part of it is taught again, in about twice the
    time."""
    batch_size: Count = 4
    """Forget rows per optimiser step, over all micro-batches and processes."""
    retain_batch_size: Count | None = None
    """Retain rows per optimiser step. Default: as many as forget rows."""
    micro_batch_size: Count | None = None
    """Forget rows that go through the model at once. A smaller value needs less memory and gives the same gradient.
    Default: the whole batch."""
    epochs: Positive = 20.0
    """Passes over the forget set."""
    max_steps: Count | None = None
    """Stop after N optimiser steps, regardless of --epochs."""
    layered: Annotated[int, Interval(ge=2, le=MOST)] | None = None
    """Layered unlearning (Qian et al. 2025): the forget rows are divided into N folds and forgotten in N stages of
    equal length, the first one fold, then two, while the folds to come are still retained. What is forgotten so comes
    back far less when some of it is taught again."""
    layered_weight: Annotated[float, Interval(ge=0, le=1)] = 0.2
    """How often --layered shows the rows of earlier folds, for one showing of the newest fold's, until the last stage
    shows all alike; 0 to 1."""
    lr: PositiveOrZero = 1e-4
    """Learning rate of AdamW, constant unless --lr-scheduler-type says otherwise."""
    seed: Seed = 42
    """Seed of the adapter, of the order of the rows, and of everything else that is random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.micro_batch_size is not None:
            self.micro_batch_size = min(self.micro_batch_size, self.batch_size)

    @property
    def retain_rows(self) -> int:
        """Retain rows per optimiser step."""
        return self.batch_size if self.retain_batch_size is None else self.retain_batch_size

    def micro_batches(self, world_size: int = 1) -> int:
        """Micro-batches per optimiser step on each of `world_size` processes."""
        return max(1, math.ceil(self.batch_size / ((self.micro_batch_size or self.batch_size) * world_size)))


@dataclass
class StoppingConfig(Checked):
    """Stopping: measure while training, stop in time, keep the best adapter."""

    stop_when: tuple[str, ...] = ()
    """Stop as soon as one of these holds. forget-at-holdout: the forget answers are as unlikely as the holdout's were
    before training. mia-crosses: the loss no longer distinguishes forget rows from the holdout's (AUC 0.5).
    retain-loss+10%: the retain answers' NLL is 10% above that before training (retain-loss+0.05: 0.05 nats per token
    above). Of the adapters within the limit on the retain loss, the one nearest to the first of the former two is kept;
    with that limit alone, the last one."""
    stop_patience: Count = 1
    """Consecutive measurements at which a condition must hold. With more than 1 a run gets past the rise of the retain
    loss that NPO may begin with, and that the retain terms undo."""
    eval_every: Count | None = None
    """Optimiser steps between the measurements for --stop-when. Default: one after every epoch."""

    def __post_init__(self) -> None:
        self.stop_when = (self.stop_when,) if isinstance(self.stop_when, str) else tuple(self.stop_when)
        super().__post_init__()
        _ = self.conditions  # malformed ones raise here
        if (self.eval_every is not None or self.stop_patience > 1) and not self.stop_when:
            given = "--stop-patience" if self.eval_every is None else "--eval-every"
            raise UserError(f"{given} says how --stop-when measures: give both, or none.")

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """`stop_when`, understood."""
        return parse_conditions(self.stop_when)


@dataclass
class OutputConfig(AnswerOptions):
    """Output: where results go and how much is measured."""

    output_dir: str = "lowmem-npo-output"
    """Directory of the adapter, the configuration, the metrics, the before/after table and the report."""
    resume: bool = False
    """Continue the run in --output-dir from its last checkpoint."""
    eval_rows: CountOrNone = 64
    """Rows of each set measured before and after (the same ones for every --seed); 0 measures nothing."""
    eval_batch_size: Count = 8
    """Rows per batch when measuring."""
    leaks: tuple[str, ...] = ("extraction", "membership")
    """Tests of what the model still gives away of the forget rows, before and after, on --eval-rows rows; all of
    them, or none."""
    preview: Count | None = None
    """Print N tokenised examples of each set, with the labelled tokens marked, and stop."""
    report_examples: CountOrNone = 3
    """Rows of each set whose text is in report.html, with the model's answers; 0 for none. No other part of the report
    ever contains text of a row."""
    dry_run: bool = False
    """Print the resolved configuration, check data, model and disk, and stop."""

    def __post_init__(self) -> None:
        self.leaks = (self.leaks,) if isinstance(self.leaks, str) else tuple(self.leaks)
        self.leaks = () if self.leaks == ("none",) else self.leaks
        super().__post_init__()


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "objective": ObjectiveConfig,
    "adapter": AdapterConfig,
    "memory": MemoryConfig,
    "training": TrainingConfig,
    "stopping": StoppingConfig,
    "output": OutputConfig,
}
# What one invocation does, not what the run is: never written to the run's configuration.
INVOCATION_ONLY = ("resume", "preview", "dry_run")


@dataclass
class RunConfig:
    """One run of `lowmem-npo train`."""

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    stopping: StoppingConfig = field(default_factory=StoppingConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    trainer_args: dict[str, Any] = field(default_factory=dict)
    """Further fields of `transformers.TrainingArguments`, by their own names (warmup_steps, logging_steps, ...)."""
    explicit: frozenset[str] = field(default=frozenset(), compare=False, repr=False)
    """Options that were given, on the command line or in a file: a recipe leaves them alone, default value or not."""

    def __post_init__(self) -> None:
        if self.data.retain is not None and self.data.forget is None:
            raise UserError(
                "--retain is given but --forget is not: give both, only --forget (then a bundled general set is kept), "
                "or neither (then the bundled biographies are used)."
            )
        if self.data.forget is not None and self.data.retain is None and self.objective.needs_retain:
            self.data = dataclasses.replace(self.data, retain=GENERAL_SET)
        term, other = self.objective.forget_term, self.data.alternatives
        if term == "dpo" and self.data.alternative_column is None and other is None:
            raise UserError(
                "--forget-term dpo prefers another answer to the forgotten one: name its column, --alternative-column, "
                "or let the model write it, --alternatives self."
            )
        if other is not None and self.data.alternative_column is not None:
            raise UserError("--alternatives and --alternative-column both say what dpo prefers: leave one of them out.")
        if other is not None and term in FORGET_TERMS and term != "dpo":
            raise UserError(f"--alternatives are what --forget-term dpo prefers, and {term} prefers none: take dpo.")
        self.memory.check_source(self.model)
        if self.objective.forget_level == "holdout" and self.data.forget is not None and self.data.holdout is None:
            raise UserError("--forget-level holdout pushes rows to where rows never taught are: name some, --holdout.")
        if self.objective.forget_level == "holdout" and self.data.tokens == "all":
            raise UserError("--forget-level is a level of answers, and --tokens all takes prompts too: leave one out.")
        if self.training.layered is not None and not self.objective.needs_retain:
            raise UserError(
                "--layered holds the folds whose turn has not come with the retain terms: give a positive --gamma or "
                "--delta."
            )
        for condition in self.stopping.conditions:
            needed = condition.needs
            if self.data.forget is not None and getattr(self.data, needed) is None:
                raise UserError(f"--stop-when {condition.text} measures {needed} rows: give --{needed}.")
        if self.stopping.stop_when and self.output.eval_rows < 1:
            raise UserError("--stop-when measures up to --eval-rows rows of each set: give at least 1.")

    @property
    def output_dir(self) -> Path:
        return Path(self.output.output_dir)

    def flat(self) -> dict[str, Any]:
        """All settings under their flags' names; what differs per invocation only (resume, preview) left out."""
        settings: dict[str, Any] = {}
        for section in SECTIONS:
            settings.update(dataclasses.asdict(getattr(self, section)))
        settings = {name: value for name, value in settings.items() if name not in INVOCATION_ONLY}
        settings["lora_targets"] = list(settings["lora_targets"])
        settings["lora_layers"] = list(settings["lora_layers"]) or None
        settings["modules_to_save"] = list(settings["modules_to_save"]) or None
        settings["stop_when"] = list(settings["stop_when"]) or None
        settings["leaks"] = list(settings["leaks"]) or ["none"]
        return {**settings, **self.trainer_args}

    def to_yaml(self) -> str:
        """The whole run as YAML that `--config` accepts back."""
        return yaml.safe_dump(self.flat(), sort_keys=False, allow_unicode=True)
