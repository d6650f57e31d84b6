"""Our measurements under the names, and by the definitions, of open-unlearning (https://github.com/locuslab/open-unlearning).

So that a table of a paper and one of ours can stand side by side. What differs from our own figures of like names:

    tokens   theirs leave out an answer's last token, its EOS, except in losses and probabilities
    extraction_strength   1 / tokens, not 0, where not even the last token would be written
    mia_min_k, mia_min_k_plus_plus   of the 40% least likely tokens; ours look at 20%
    mia_min_k_plus_plus   the variance of log p over the vocabulary is taken as 1e-6 where it is smaller
    mia_*    AUC, 1 where every forgotten answer is likelier than all of the holdout; mia_zlib: the loss divided by the
             bytes of the answer, compressed with zlib; mia_reference: the loss less that of a model that was never
             taught the forget set; mia_gradnorm: the norm of the gradient, the mean over the model's tensors
    privleak ((1 - mia_min_k) - (1 - r)) / (1 - r) in per cent, r being mia_min_k of a model that was never taught the
             forget set, or 0.5 where there is none (Shi et al. 2024, MUSE, section 3.1)
    *_PARA_Prob, *_PERT_Prob   the mean over rows of the probability of the answer in other words (the answer itself
             where there is none), and of wrong answers; *_PARA_ROUGE, *_PERT_ROUGE: of their ROUGE-L recall
    *_ROUGE of MUSE   between 0 and 1, of stemmed words; spaces are cleaned up in the true answers, too
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import exp
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lowmem_npo.evaluation.figures import at
from lowmem_npo.evaluation.ranking import auc, compressed, mean_of_lowest
from lowmem_npo.evaluation.rouge import rouge_l
from lowmem_npo.files import expanded, load_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lowmem_npo.data import TokenizedRow
    from lowmem_npo.evaluation.scoring.token_scores import TokenScores

K = 0.4
LEAST_DEVIATION = 1e-3  # the root of their least variance
TINY = 1e-10  # they add it to denominators
# What the benchmark MUSE measures -> its key.
MUSE_KEYS = {
    "MUSE verbmem": "forget_verbmem_ROUGE",
    "MUSE knowmem": "forget_knowmem_ROUGE",
    "MUSE knowmem, retain": "retain_knowmem_ROUGE",
}
CHANCE = 0.5  # the AUC of a model that was never taught the rows, where none is known


def token_figures(
    scores: Mapping[str, Sequence[TokenScores]],
    rows: Mapping[str, Sequence[TokenizedRow]],
    tokenizer: PreTrainedTokenizerBase,
    retained: float | None = None,
) -> dict[str, float]:
    """What comes from the likelihood of every token: memorisation of "forget" and, with a "holdout", membership.

    scores, rows: by set. retained: mia_min_k of a model that was never taught the forget set.
    """
    forget = scores["forget"]
    memorized = [value for one in forget if (value := exact_memorization(one)) is not None]
    figures = {"exact_memorization": fmean(memorized)} if memorized else {}
    figures["extraction_strength"] = fmean(map(extraction_strength, forget))
    if "holdout" not in scores:
        return figures
    figures["mia_loss"] = _auc(scores, lambda one: one.nll)
    figures["mia_min_k"] = min_k_auc = _auc(scores, lambda one: -_lowest(one.logprobs[:-1]))
    figures["mia_min_k_plus_plus"] = _auc(scores, lambda one: -_lowest(_standard(one)[:-1]))
    sizes: dict[int, int] = {}
    for name, of_set in scores.items():
        sizes |= {id(one): compressed(row, tokenizer) for one, row in zip(of_set, rows[name], strict=True)}
    figures["mia_zlib"] = _auc(scores, lambda one: one.nll / sizes[id(one)])
    figures["privleak"] = privleak(min_k_auc, CHANCE if retained is None else retained)
    return figures


def reference_figure(scores: Mapping[str, Sequence[TokenScores]], of_reference: Mapping[str, Sequence[float]]) -> float:
    """mia_reference. of_reference: set -> each row's mean NLL per token under the reference model."""
    return _auc_of({name: [one.nll - loss for one, loss in zip(of_set, of_reference[name], strict=True)]
                    for name, of_set in scores.items()})  # fmt: skip


def gradient_figure(norms: Mapping[str, Sequence[float | None]]) -> float | None:
    """mia_gradnorm, of the answers that have a token beside EOS; None where a set has none."""
    known = {name: [norm for norm in of_set if norm is not None] for name, of_set in norms.items()}
    return _auc_of(known) if all(known.values()) else None


def exact_memorization(row: TokenScores) -> float | None:
    """Share of the answer's tokens that are the likeliest after the true ones before them; None for EOS alone."""
    return fmean(row.greedy[:-1]) if row.greedy[:-1] else None


def extraction_strength(row: TokenScores) -> float:
    """1 - k / tokens, after k of which the rest is the likeliest; they stop looking at the last token."""
    greedy = row.greedy[:-1]
    missed = [place for place, is_greedy in enumerate(greedy[:-1]) if not is_greedy]
    return 0.0 if not greedy else 1 - (missed[-1] + 1 if missed else 0) / len(greedy) if greedy[-1] else 1 / len(greedy)


def privleak(auc: float, retained: float) -> float:
    """In per cent; 0: as the model that was never taught the rows, -100: all are recognised."""
    score, reference = 1 - auc, 1 - retained
    return (score - reference) / (reference + TINY) * 100


def tofu_figures(
    scores: Any, measured: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase
) -> dict[str, float]:
    """TOFU's, of the sets that were measured. scores: `TofuScores`, or None. measured: set -> its `TofuAnswer`s."""
    if scores is None:
        return {}
    figures = {}
    for name, prefix in (("forget", "forget"), ("retain", "retain"), ("real authors", "ra"), ("world facts", "wf")):
        if (of_set := scores.sets.get(name)) is not None:
            normalised = "" if prefix in ("forget", "retain") else "_normalised"  # among the wrong answers
            figures[f"{prefix}_Q_A_Prob{normalised}"] = of_set.probability
            figures[f"{prefix}_Q_A_ROUGE"] = of_set.rouge_l_recall
            figures |= _probabilities(prefix, measured.get(name, ()))
            ratio = "forget_truth_ratio" if prefix == "forget" else f"{prefix}_Truth_Ratio"
            figures[ratio] = of_set.truth_ratio
    if answers := measured.get("forget"):
        reworded = [a.recall(a.row.paraphrased or [a.row.example.answer], tokenizer) for a in answers]
        figures["forget_Q_A_PARA_ROUGE"] = fmean(reworded)
        figures["forget_Q_A_PERT_ROUGE"] = fmean(a.recall(a.row.perturbed, tokenizer) for a in answers)
    totals = {"model_utility": scores.model_utility, "forget_quality": scores.forget_quality}
    return figures | {name: value for name, value in totals.items() if value is not None}


def _probabilities(prefix: str, answers: Sequence[Any]) -> dict[str, float]:
    """Of the other answers that a row has, each to the power 1 / tokens; of wrong ones the mean over a row's first."""
    if not answers:
        return {}
    figures = {f"{prefix}_Q_A_PERT_Prob": _probability(a.perturbed_nll for a in answers)}
    if prefix in ("ra", "wf"):  # which it has no paraphrases of
        return {f"{prefix}_Q_A_Prob": fmean(exp(-a.nll) for a in answers), **figures}
    return {f"{prefix}_Q_A_PARA_Prob": _probability(a.paraphrased_nll for a in answers), **figures}


def _probability(of_rows: Iterable[Sequence[float]]) -> float:
    """of_rows: the NLL of each of a row's answers."""
    return fmean(fmean(exp(-nll) for nll in of_row) for of_row in of_rows)


def muse_figures(measured: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """MUSE's ROUGE-L (F) of whole answers, their words stemmed; MUSE itself does neither. measured: set -> its
    `MuseAnswer`s."""
    clean = tokenizer.clean_up_tokenization
    return {
        key: fmean(rouge_l(clean(a.whole), a.generation).fmeasure for a in measured[name])
        for name, key in MUSE_KEYS.items()
        if measured.get(name)
    }


def retained_min_k(path: str) -> float | None:
    """mia_min_k in a retained model's evaluation.json or in open-unlearning's TOFU_EVAL.json; None if it has none."""
    try:
        content: Any = load_json(expanded(path))
    except (OSError, ValueError):  # TOFU's own check says what is wrong with it
        return None
    ours, theirs = at(content, "open_unlearning", "mia_min_k"), at(content, "mia_min_k", "agg_value")
    return theirs if ours is None else ours


def _auc(scores: Mapping[str, Sequence[TokenScores]], score: Callable[[TokenScores], float]) -> float:
    return _auc_of({name: [*map(score, of_set)] for name, of_set in scores.items()})


def _auc_of(values: Mapping[str, Sequence[float]]) -> float:
    """How often a forgotten answer has the lower value of a pair: the likelier."""
    return auc(values["holdout"], values["forget"])


def _lowest(values: Sequence[float]) -> float:
    return mean_of_lowest(values, K) if values else 0.0


def _standard(row: TokenScores) -> list[float]:
    pairs = zip(row.above_mean, row.deviation, strict=True)
    return [above_mean / max(deviation, LEAST_DEVIATION) for above_mean, deviation in pairs]
