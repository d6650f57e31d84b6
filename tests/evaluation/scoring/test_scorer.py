"""What a scorer refuses: likelihoods that are no finite numbers, by the row that gets one."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.dense_step import random_rows, word_tokenizer
from helpers.tiny_models import tiny_model

from lowmem_npo.evaluation.directory import EvaluationDirectory
from lowmem_npo.evaluation.result import Evaluation
from lowmem_npo.evaluation.scoring.journal import Journal
from lowmem_npo.evaluation.scoring.scorer import Scorer
from lowmem_npo.evaluation.scoring.token_scores import NotFinite
from lowmem_npo.evaluation.settings import EvaluationConfig

DAMAGED = 95  # a token that gives no numbers
ASK = {
    "nll": lambda scorer, rows: scorer.nll("forget: x", rows),
    "token_scores": lambda scorer, rows: scorer.token_scores("forget: x", rows),
    "answers": lambda scorer, rows: scorer.answers("forget: x", rows, range(len(rows)), 4),
}


@pytest.mark.parametrize("kind", ASK)
@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_row_without_a_finite_likelihood_is_named(kind, batch_size):
    model, rows = tiny_model("olmo"), random_rows(6, seed=1, vocabulary=90)
    scorer = Scorer(model, word_tokenizer(), Journal(None, progress=False), batch_size)
    assert len(ASK[kind](scorer, rows)) == 6
    with torch.no_grad():
        model.get_input_embeddings().weight[DAMAGED] = torch.nan
    rows[4]["input_ids"][0] = DAMAGED
    scorer = Scorer(model, word_tokenizer(), Journal(None, progress=False), batch_size)
    with pytest.raises(NotFinite, match="The model gives row 5 of 'forget: x.*' no finite likelihood; the weights or"):
        ASK[kind](scorer, rows)


def test_one_that_the_journal_holds_is_refused_too():
    journal = Journal(None, progress=False)
    journal.write("forget: x", range(3), [1.0, math.nan, 2.0])
    with pytest.raises(NotFinite, match="row 2 of 'forget: x'"):
        Scorer(None, word_tokenizer(), journal, 4).nll("forget: x", random_rows(3, seed=1))


def test_no_result_file_holds_nan(tmp_path):
    """Which is no JSON: whatever else should give one must not get there."""
    directory = EvaluationDirectory(EvaluationConfig(model="m", output_dir=str(tmp_path)), {})
    with pytest.raises(ValueError, match="not JSON compliant"):
        directory.save(Evaluation(open_unlearning={"mia_loss": math.nan}))
    assert not directory.result.exists()
