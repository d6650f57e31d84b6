"""The end of the network: answer tokens' hidden states, and the frozen head that would turn them into logits."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from lowmem_kernels import FrozenHead, token_logprobs
from lowmem_kernels.dispatch import has_values
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from lowmem_npo.data.batching import RowBatch
from lowmem_npo.errors import UserError
from lowmem_npo.model.layers import causal_lm, decoder
from lowmem_npo.model.modes import eval_mode
from lowmem_npo.model.packing import final_states
from lowmem_npo.model.precision import compute_autocast
from lowmem_npo.model.weights import not_finite

# As configurations name them.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
FACTORS = ("logit_scale", "lm_head_multiplier")
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")


class AnswerHidden(NamedTuple):
    """The predictions that count, one row per labelled token, in the order of the batch."""

    hidden: Tensor  # (N, d) final hidden state that predicts the token
    targets: Tensor  # (N,) int64 the token
    sequence: Tensor  # (N,) int64 its row in the batch

    def split(self, count: int) -> tuple[AnswerHidden, AnswerHidden]:
        """The first `count` predictions, and the others."""
        sizes = [count, len(self.targets) - count]
        first, second = zip(*(part.split(sizes) for part in self), strict=True)
        return AnswerHidden(*first), AnswerHidden(*second)


def frozen_head(model: PreTrainedModel | PeftModel) -> FrozenHead:
    """The model's output head as the kernels take it: a view of its weights, with softcap and logit scale.

    Supports a softcap (Gemma, RecurrentGemma, xLSTM), a scale (Cohere, Falcon H1, Granite, Inkling) and rows that stand
    for no token (Inkling); `check_head` detects whether a model does something else.
    """
    lm = causal_lm(model)
    layer = lm.get_output_embeddings()
    if layer is None or not hasattr(layer, "weight"):
        raise UserError(f"{type(lm).__name__} has no linear output head.")
    if not layer.weight.is_floating_point():
        raise UserError(f"The output head of this {type(lm).__name__} is stored quantised: the losses need it whole.")
    if isinstance(layer, (BaseTunerLayer, ModulesToSaveWrapper)):
        raise UserError("The output head has an adapter, but must stay frozen: leave it out of the LoRA targets.")
    config = lm.config.get_text_config()
    bias, tokens = getattr(layer, "bias", None), getattr(config, "unpadded_vocab_size", None)
    return FrozenHead(
        layer.weight.detach()[:tokens],
        bias=None if bias is None else bias.detach()[:tokens],
        softcap=next((cap for name in SOFTCAPS if (cap := getattr(config, name, None))), None),
        logit_scale=_logit_scale(config),
    )


def _logit_scale(config: PretrainedConfig) -> float:
    factors = [float(getattr(config, name, None) or 1) for name in FACTORS]
    divisors = [float(getattr(config, name, None) or 1) for name in DIVISORS]
    if config.model_type == "hyperclovax":  # whose logits_scaling is a factor
        return math.prod(factors + divisors)
    return math.prod(factors) / math.prod(divisors)


def answer_hidden(model: PreTrainedModel | PeftModel, batch: RowBatch) -> AnswerHidden:
    """One pass through the decoder, without its head; only the states that predict an answer's tokens leave it."""
    lm = causal_lm(model)
    with compute_autocast(lm):
        states = final_states(lm, batch)
    hidden = states.flatten(0, 1).index_select(0, batch.answer_index)
    hidden = hidden.to(lm.get_output_embeddings().weight.dtype)  # on CUDA, float32 after a LayerNorm
    return AnswerHidden(hidden, batch.targets, batch.sequence)


def few_tokens(lm: PreTrainedModel) -> Tensor:
    """(1, 8) int64: ids on which to try how a model computes."""
    return torch.arange(1, 9, device=lm.device).remainder(lm.config.get_text_config().vocab_size)[None]


@torch.no_grad()
def check_head(model: PreTrainedModel | PeftModel) -> None:
    """Compares eight tokens' log-probs with the model's own logits, so that an unsupported head is refused, not
    mistrained.

    Raises:
        UserError: this architecture changes its logits in a way that `frozen_head` does not support, or the weights
            give none.
    """
    lm = causal_lm(model)
    if not has_values(lm.get_output_embeddings().weight):
        return  # simulated: there are no logits to compare
    ids = few_tokens(lm)
    with eval_mode(lm):
        answers, head = answer_hidden(lm, RowBatch.whole(ids)), frozen_head(lm)
        if answers.hidden.shape[1] != head.weight.shape[1]:
            raise _has_layers_between(lm)
        ours = token_logprobs(answers.hidden, head, answers.targets)
        with compute_autocast(lm):
            logits = lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    if not logits.isfinite().all():
        dtype = str(logits.dtype).removeprefix("torch.")
        damaged = not_finite(lm)
        why = f"its weights are damaged ({damaged[0]})" if damaged else f"its weights are too large for {dtype}"
        raise UserError(f"{type(lm).__name__} computes no numbers but NaN or infinity: {why}.")
    theirs = logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    # The model rounds its logits, and some convert them afterwards, so log-probs agree within a step of the weights'
    # number type at the logits' size.
    rounding = torch.finfo(lm.get_output_embeddings().weight.dtype).eps
    step = max(rounding, 1e-3) * max(float(logits.abs().max()), 1.0)
    if not torch.allclose(ours, theirs, rtol=0.0, atol=2 * step):
        if _layers_of_the_head(lm):
            raise _has_layers_between(lm)
        raise UserError(
            f"{type(lm).__name__} changes its logits in a way that is not supported (log-probs differ by "
            f"{(ours - theirs).abs().max().item():.2g}): please report this architecture."
        )


def _has_layers_between(lm: PreTrainedModel) -> UserError:
    return UserError(
        f"{type(lm).__name__} has layers between its decoder and its output head ({_layers_of_the_head(lm)}), which is "
        "not supported: its logits are no product of the decoder's states and the head's weight."
    )


def _layers_of_the_head(lm: PreTrainedModel) -> str | None:
    """The name of a module that computes beside the output embeddings and outside of the decoder, if there is one."""
    of_decoder, head = {id(m) for m in decoder(lm).modules()}, lm.get_output_embeddings()
    for name, module in lm.named_modules():
        own = any(True for _ in module.parameters(recurse=False))
        if own and id(module) not in of_decoder and module is not head:
            return name
    return None


@torch.no_grad()
def check_causal(model: PreTrainedModel | PeftModel) -> None:
    """Compares the states of two rows that differ in their last token alone.

    Raises:
        UserError: each token sees those after it, so that the tokens to predict are given, and padding is read.
    """
    lm = causal_lm(model)
    weight = lm.get_output_embeddings().weight
    if not has_values(weight):
        return
    ids = few_tokens(lm).repeat(2, 1)
    ids[1, -1] = ids[1, 0]
    with eval_mode(lm), compute_autocast(lm):
        one, other = decoder(lm)(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].float()
    changed = ((one - other).norm(dim=-1) / one.norm(dim=-1)).mean()  # one token's rounding is no refusal
    if changed > 8 * max(torch.finfo(weight.dtype).eps, 1e-4):
        raise UserError(
            f"{type(lm).__name__} is not causal here: each token sees those after it. Give a model that generates text "
            "(in its config.json, is_causal is not false and use_bidirectional_attention not true)."
        )
