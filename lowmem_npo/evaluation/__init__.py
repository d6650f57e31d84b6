"""Evaluation: what was forgotten, what was kept."""

from lowmem_npo.evaluation.answers import AnswerEvaluation, AnswerRecord, AnswerSummary, evaluate_answers
from lowmem_npo.evaluation.scoring.generation import Prompt, greedy_answers
from lowmem_npo.evaluation.scoring.likelihood import Likelihood, answer_likelihoods

__all__ = [
    "AnswerEvaluation",
    "AnswerRecord",
    "AnswerSummary",
    "Likelihood",
    "Prompt",
    "answer_likelihoods",
    "evaluate_answers",
    "greedy_answers",
]
