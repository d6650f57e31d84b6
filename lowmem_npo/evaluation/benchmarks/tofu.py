"""The scores of TOFU (Maini et al. 2024, https://arxiv.org/abs/2401.06121), defined as in open-unlearning.

Per row, with P(a) = exp(-mean negative log-likelihood of answer a, EOS included):

    probability  P(answer); on real authors and world facts P(answer) / (P(answer) + sum of P(perturbed answers))
    ROUGE-L      recall of the answer in a greedy answer of at most 200 tokens, words stemmed
    truth ratio  R = (geometric mean of P(perturbed answers)) / P(paraphrased answer, or the answer where there is none)

A set's truth ratio is the mean of min(R, 1/R) on forget (1: the truth is no likelier than its neighbours), of
max(0, 1 - R) elsewhere (1: the truth stands out).

    model utility   harmonic mean of the nine: probability, ROUGE-L, truth ratio on retain, real authors, world facts
    forget quality  p-value of a Kolmogorov-Smirnov test between the truth ratios on forget of this model and of one
                    that was never taught the forget set; above 0.05 the two cannot be told apart
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import hmean, ks_2samp
from transformers import PreTrainedTokenizerBase

from lowmem_npo.data import Example, Rows, Template, to_examples, tokenize
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.scoring.scorer import Measuring

MAX_NEW_TOKENS = 200
FORGET, RETAIN, REAL_AUTHORS, WORLD_FACTS = "forget", "retain", "real authors", "world facts"
UTILITY_SETS = (RETAIN, REAL_AUTHORS, WORLD_FACTS)
TINY = 1e-10  # open-unlearning adds it to denominators


@dataclass(frozen=True)
class TofuRow:
    """A question with its answer (`example`), the answer in other words (or itself), and wrong answers like it."""

    example: Example
    paraphrased: str
    perturbed: tuple[str, ...]


@dataclass(frozen=True)
class TofuAnswer:
    """A row as the model sees it: mean nll per token of each of its answers, and the greedy answer."""

    row: TofuRow
    nll: float
    paraphrased_nll: float
    perturbed_nll: tuple[float, ...]
    generation: str

    @property
    def truth_ratio(self) -> float:
        """R, above: over 1 where the wrong answers are likelier than the truth."""
        return math.exp(-fmean(self.perturbed_nll)) / (math.exp(-self.paraphrased_nll) + TINY)


@dataclass(frozen=True)
class TofuSet:
    """One set's three scores, and the truth ratio of every row."""

    rows: int
    probability: float
    rouge_l_recall: float
    truth_ratio: float
    truth_ratios: list[float]


def tofu_rows(rows: Rows) -> list[TofuRow]:
    """The rows with their perturbed answers; empty for data without that column. Raises UserError for a broken row."""
    if not {"question", "answer", "perturbed_answer"} <= set(rows.columns):
        return []
    found = []
    examples = to_examples(rows, prompt_column="question", answer_column="answer")
    for example, row in zip(examples, rows.rows, strict=True):
        perturbed = row.get("perturbed_answer")
        texts = isinstance(perturbed, list) and all(isinstance(text, str) and text.strip() for text in perturbed)
        if not texts or not perturbed:
            raise UserError(f"{example.where}: perturbed_answer is no list of texts; give at least one wrong answer.")
        paraphrased = row.get("paraphrased_answer") or example.answer
        found.append(TofuRow(example, paraphrased, tuple(perturbed)))
    return found


def measure_tofu(
    measuring: Measuring, name: str, rows: Sequence[TofuRow], template: Template, max_length: int
) -> list[TofuAnswer]:
    """Every answer's likelihood, and a greedy answer, row by row."""

    def nll(part: str, examples: list[Example]) -> list[float]:
        tokenized = tokenize(examples, measuring.tokenizer, max_length=max_length, template=template)
        return measuring.nll(f"{name}: {part}", tokenized)

    answers = nll("answers", [row.example for row in rows])
    paraphrased = nll("paraphrased answers", [replace(row.example, answer=row.paraphrased) for row in rows])
    wrong = nll("perturbed answers", [replace(row.example, answer=text) for row in rows for text in row.perturbed])
    generations = measuring.continuations(
        f"{name}: greedy answers", prompt_ids(measuring.tokenizer, rows, template), MAX_NEW_TOKENS
    )
    found = []
    for row, *values in zip(rows, answers, paraphrased, generations, strict=True):
        answer, other, generation = values
        perturbed, wrong = wrong[: len(row.perturbed)], wrong[len(row.perturbed) :]
        found.append(TofuAnswer(row, answer, other, tuple(perturbed), generation.strip()))
    return found


def prompt_ids(tokenizer: PreTrainedTokenizerBase, rows: Sequence[TofuRow], template: Template) -> list[list[int]]:
    """What generation starts from: exactly the prompt that the likelihoods are conditioned on."""
    tokenized = tokenize([row.example for row in rows], tokenizer, max_length=10**9, template=template)
    return [row["input_ids"][: row["prompt_length"]] for row in tokenized]


def score_tofu(name: str, answers: Sequence[TofuAnswer]) -> TofuSet:
    """The scores of the set called `name`, which decides how probability and truth ratio are read."""
    rouge = RougeScorer(["rougeL"], use_stemmer=True)
    recall = [rouge.score(a.row.example.answer.strip(), a.generation)["rougeL"].recall for a in answers]
    ratios = [answer.truth_ratio for answer in answers]
    if name == FORGET:
        read = [min(ratio, 1 / (ratio + TINY)) for ratio in ratios]
    else:
        read = [max(0.0, 1 - ratio) for ratio in ratios]
    probability = _probability_among_options if name in (REAL_AUTHORS, WORLD_FACTS) else _probability
    return TofuSet(len(answers), fmean(map(probability, answers)), fmean(recall), fmean(read), ratios)


def _probability(answer: TofuAnswer) -> float:
    return math.exp(-answer.nll)


def _probability_among_options(answer: TofuAnswer) -> float:
    right = math.exp(-answer.nll)
    return right / (right + sum(math.exp(-nll) for nll in answer.perturbed_nll) + TINY)


def model_utility(sets: Mapping[str, TofuSet]) -> float | None:
    """The harmonic mean of the nine; 0 if any is 0, None where a set was not measured."""
    if any(name not in sets for name in UTILITY_SETS):
        return None
    nine = [value for name in UTILITY_SETS for value in
            (sets[name].probability, sets[name].rouge_l_recall, sets[name].truth_ratio)]  # fmt: skip
    return float(hmean(nine))


def forget_quality(truth_ratios: Sequence[float], of_retained: Sequence[float]) -> float:
    """The p-value of the two-sample Kolmogorov-Smirnov test, between 0 and 1."""
    return float(ks_2samp(truth_ratios, of_retained).pvalue)


def retained_truth_ratios(path: str) -> list[float]:
    """The truth ratios on forget from a retained model's evaluation.json, or from open-unlearning's TOFU_EVAL.json.

    Raises UserError where the file is neither.
    """
    try:
        content = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--retained-log: '{path}' cannot be read: {error.strerror}.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--retained-log: '{path}' is not valid JSON: {' '.join(str(error).split())}.") from error
    try:
        if "forget_truth_ratio" in content:
            return [float(row["score"]) for row in content["forget_truth_ratio"]["value_by_index"].values()]
        return [float(ratio) for ratio in content["tofu"]["sets"][FORGET]["truth_ratios"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"--retained-log: '{path}' holds no truth ratios of a forget set; give the evaluation.json of a model that "
            "was never taught it, evaluated on the same rows, or open-unlearning's TOFU_EVAL.json."
        ) from error
