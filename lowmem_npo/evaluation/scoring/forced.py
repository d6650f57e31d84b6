"""Answers that are read off the likelihoods, where writing them would take too long: what the model finds most likely
after each true token. One pass for all of an answer, and not one for each of its tokens."""

from __future__ import annotations

from collections.abc import Sequence

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowmem_npo.data import TokenizedRow
from lowmem_npo.data.fit import Fit
from lowmem_npo.evaluation.scoring.batching import BATCH_SIZE
from lowmem_npo.evaluation.scoring.generation import stop_ids
from lowmem_npo.evaluation.scoring.likelihood import answer_batch, row_by_row
from lowmem_npo.evaluation.scoring.token_scores import most_likely
from lowmem_npo.model import answer_hidden, frozen_head
from lowmem_npo.model.layers import causal_lm


def forced_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TokenizedRow],
    lengths: Sequence[int],
    *,
    batch_size: int = BATCH_SIZE,
    description: str = "most likely tokens",
    progress: bool = True,
) -> list[list[int]]:
    """Of each row the token that the model finds most likely in the place of each of its last `lengths` tokens, after
    the true ones before it; up to the first that ends an answer. Of a row whose text is cut, so that nothing ends it,
    one token more: whether the model would end there.

    It is the greedy answer as far as that is the true one, and beyond it has the help of the true tokens: more of the
    true answer is in it than in what the model would write.
    """
    head, stops = frozen_head(model), stop_ids(model, tokenizer)
    positions = Fit.of(causal_lm(model)).positions
    lengths, rows = list(lengths), list(rows)
    for i, row in enumerate(rows):
        ids = row["input_ids"]
        if ids[-1] not in stops and (positions is None or len(ids) < positions):
            # What the model finds most likely in the place of a token does not depend on that token.
            rows[i] = TokenizedRow(**{**row, "input_ids": [*ids, ids[-1]]})
            lengths[i] += 1

    def read(chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Of each answer token the most likely one in its place, and the row that it is of."""
        answered = answer_hidden(model, answer_batch(model, [rows[i] for i in chosen]))
        return most_likely(answered.hidden, head).cpu(), answered.sequence.cpu()

    def of_row(i: int, place: int, result: tuple[Tensor, Tensor]) -> list[int]:
        tokens, sequence = result
        ids = tokens[sequence == place].tolist()[-lengths[i] :]
        return ids[: next((at for at, token in enumerate(ids) if token in stops), len(ids))]

    return row_by_row(model, rows, read, of_row, batch_size, description, progress)
