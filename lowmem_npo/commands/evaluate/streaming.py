"""What an evaluation leaves open where weights are streamed, decided before they are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from transformers import PretrainedConfig

from lowmem_npo.config import ModelConfig
from lowmem_npo.console import Say
from lowmem_npo.errors import UserError
from lowmem_npo.estimate.generation import Generation, cache_room, written_passes
from lowmem_npo.estimate.streamed_model import decide_streaming
from lowmem_npo.evaluation.benchmarks.contract import Benchmark, Context, Selection
from lowmem_npo.evaluation.benchmarks.lm_eval import LM_EVAL, LmEvalOptions
from lowmem_npo.evaluation.settings import EvaluationConfig


def with_streaming(
    config: EvaluationConfig,
    model_config: ModelConfig,
    architecture: PretrainedConfig,
    selected: Sequence[tuple[Benchmark, str, Selection]],
    context: Context,
    say: Say,
) -> EvaluationConfig:
    """`config` with what streamed weights leave open decided, after saying what they take.

    Raises UserError where they cannot be streamed, or where a benchmark lacks the answers that the model is not to
    write.
    """
    matters = config.stream_weights or not config.lets_write  # else no prompt is made to be counted
    written = {(b, name): b.written(name, chosen, context) for b, name, chosen in selected if matters}
    needed = next((b.title for (b, _), lengths in written.items() if lengths and not b.reads_likelihoods), None)
    if not config.lets_write and needed is not None:
        raise UserError(f"--generate-answers off: '{needed}' goes by what the model writes: let it, or leave them out.")
    streamed = decide_streaming(model_config, config, architecture, say)
    if streamed is None:
        return replace(config, generate_answers="on" if config.lets_write else "off")
    room = cache_room(architecture, model_config.dtype)
    answers = Generation(sum(written_passes(lengths, room) for lengths in written.values()), streamed.pass_seconds)
    if config.generate_answers == "auto":
        writes = needed is not None or not answers.is_too_long
        config = replace(config, generate_answers="on" if writes else "off")
    if answers.passes:
        say(answers.line(config.lets_write))
    uncounted = ["leak tests"] if config.leaks else []
    uncounted += [LM_EVAL.title] if LM_EVAL.own_sets(cast(LmEvalOptions, config)) else []
    if uncounted:
        say(f"How long {' and '.join(uncounted)} will take is not predicted.")
    return replace(config, stream_from=streamed.stream_from)
