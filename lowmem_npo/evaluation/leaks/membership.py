"""Whether the answers' likelihoods tell that the model was taught them: four membership scores.

    loss      mean log p over the answer's tokens (Yeom et al. 2018)
    min_k     mean log p of its 20% least likely tokens (Min-K%, Shi et al. 2024)
    min_k_pp  the same of (log p - mean) / std of log p over the vocabulary (Min-K%++, Zhang et al. 2024)
    zlib      the first, divided by the bytes of the answer's text, compressed (Carlini et al. 2021)

The AUC of a score is the probability that a forgotten answer scores above one of the holdout. 0.5 is what a model gives
that saw neither; towards 1 the forgotten answers are still known; towards 0 they are less likely than answers that were
never seen, which gives them away as well. Forget and holdout rows must be alike in all but what the model was taught.

Without a holdout there is no such test; what is said then is how far the scores fell: the AUC of the forgotten answers
before against the same answers now. 0.5: nothing has changed; 1: every one is less likely than any was.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import TYPE_CHECKING, Any

from lowmem_npo.evaluation.chance import group_means, of_several
from lowmem_npo.evaluation.figures import shares, side_by_side
from lowmem_npo.evaluation.leaks.attack import GROUPS, HOLDOUT, MARGIN, known_of, known_remark, of_groups
from lowmem_npo.evaluation.leaks.contract import A_YARDSTICK, NO_HOLDOUT, LeakResult, LeakTest, Meaning, Subject
from lowmem_npo.evaluation.leaks.extraction import extraction_figures, original_scores
from lowmem_npo.evaluation.options import Options, free
from lowmem_npo.evaluation.ranking import SIGNIFICANT, auc, compressed, mean_of_lowest, p_of_auc, tells_nothing

if TYPE_CHECKING:
    from lowmem_npo.evaluation.scoring.token_scores import TokenScores

K = 0.2  # share of the tokens that Min-K% looks at
FALLEN = 0.75  # half of the way from 0.5, no change, to 1


def loss(row: TokenScores) -> float:
    return -row.nll


def min_k(row: TokenScores) -> float:
    return mean_of_lowest(row.logprobs, K)


def min_k_pp(row: TokenScores) -> float:
    return mean_of_lowest(row.standard, K)


SCORES: dict[str, Callable[[TokenScores], float]] = {"loss": loss, "min_k": min_k, "min_k_pp": min_k_pp}
ZLIB = "zlib"
TITLES = {"loss": "loss", "min_k": "Min-K%", "min_k_pp": "Min-K%++", ZLIB: "zlib"}
AUC = "How often the score ranks a forgotten row above one never seen. 0.5 is chance; 1 and 0 both give it away."
P_VALUE = (
    "How often chance alone would do that, by this score. The verdict goes by four times the sharpest one's, which was "
    "chosen among four; below 0.01, the difference is real."
)
FELL = (
    "How often the score ranks a forgotten answer as it was before above one as it is now. 0.5: nothing has changed; "
    "1: every one is less likely than any was."
)


@dataclass
class MembershipOptions(Options):
    mia_gradnorm: bool = free(False)
    """Measure open-unlearning's mia_gradnorm as well: a backward pass of every row of the leak tests, its layers
    recomputed, with memory for the gradient of one tensor at a time and for the logits of one answer."""


class Membership(LeakTest[MembershipOptions]):
    name = "membership"
    summary = "AUC of the sharpest of LOSS, Min-K%, Min-K%++, zlib against the holdout"
    in_words = "looking at how likely the answers are to the model, without letting it say them"
    needs = (A_YARDSTICK,)
    options = MembershipOptions
    main = "loss_auc"
    figures = (
        {f"{score}_auc": Meaning(f"{title} AUC", AUC, "0.5") for score, title in TITLES.items()}
        | {f"{score}_p": Meaning(f"{title} p-value", P_VALUE, "") for score, title in TITLES.items()}
        | {f"{score}_fell": Meaning(f"{title}, before against now", FELL, "higher") for score, title in TITLES.items()}
    )

    def run(self, subject: Subject, options: MembershipOptions) -> LeakResult:
        tokenizer = subject.scorer.tokenizer
        sizes = {name: [compressed(row, tokenizer) for row in rows] for name, rows in subject.sets.items()}
        scores = subject.token_scores()
        measured = {name: scored(rows, sizes[name]) for name, rows in scores.items()}
        if (before := original_scores(subject)) is not None:
            recited = extraction_figures(before)["extraction_strength"]
            result = judge_against_before(measured["forget"], scored(before, sizes["forget"]), recited)
        else:
            of_holdout = extraction_figures(scores["holdout"])
            known = known_of([of_holdout["extraction_strength"], of_holdout["recited"]])
            result = judge(measured["forget"], measured["holdout"], known, subject.groups)
        result.rows = {
            name: [dict(zip(of, values, strict=True)) for values in zip(*of.values(), strict=True)]
            for name, of in measured.items()
        }
        return result


MEMBERSHIP = Membership()


def scored(rows: Sequence[TokenScores], sizes: Sequence[int]) -> dict[str, list[float]]:
    """Score -> its value of each row. sizes: bytes of each answer's text, `compressed`."""
    values = {name: [score(row) for row in rows] for name, score in SCORES.items()}
    return values | {ZLIB: [loss(row) / size for row, size in zip(rows, sizes, strict=True)]}


def judge(
    forget: Mapping[str, Sequence[float]],
    holdout: Mapping[str, Sequence[float]],
    known: float | None = None,
    groups: Mapping[str, Sequence[Hashable]] | None = None,
) -> LeakResult:
    """The AUC of every score, with the p-value of the Mann-Whitney test that it is 0.5.

    forget, holdout: of `scored`. known: `known_of` the holdout; to be no likelier than what the model knows by heart,
    or less likely, is a sign neither of having been forgotten nor of over-forgetting. groups: set -> that of each row,
    of those that are one piece of evidence; None: each row is one.
    """
    rows, unseen_rows = len(forget["loss"]), len(holdout["loss"])
    figures: dict[str, Any] = {"rows": rows, "holdout_rows": unseen_rows}
    of_rows = groups or {"forget": range(rows), "holdout": range(unseen_rows)}
    number, beside = (len({*of_rows[name]}) for name in ("forget", "holdout"))
    if grouped := (number, beside) != (rows, unseen_rows):
        figures |= {GROUPS: number, HOLDOUT + GROUPS: beside}
    for name, taught in forget.items():
        unseen = holdout[name]
        figures[f"{name}_auc"] = auc(taught, unseen)
        means = group_means(taught, of_rows["forget"]), group_means(unseen, of_rows["holdout"])
        figures[f"{name}_p"] = p_of_auc(figures[f"{name}_auc"], *means)
        figures[f"{name}_all_equal"] = len({*taught, *unseen}) == 1
    sharpest = max(forget, key=lambda name: abs(figures[f"{name}_auc"] - 0.5))
    value, p = figures[f"{sharpest}_auc"], of_several(figures[f"{sharpest}_p"], len(forget))
    # Where every forgotten answer is above every other.
    least_p = of_several(2 / comb(number + beside, number), len(forget))
    little = tells_nothing(number, beside, len(forget))
    all_equal = all(figures[f"{name}_all_equal"] for name in forget)
    evidence = GROUPS if grouped else "rows"
    leaks, words = _verdict(value, p, least_p, little, all_equal, known is not None, evidence)
    (shown,) = side_by_side([value], decimals=2)
    result = LeakResult(figures, f"The sharpest of four scores ({sharpest}) has an AUC of {shown}: {words}.", leaks)
    if grouped:
        result.add(of_groups(figures))
    if known is not None and (leaks is False or (leaks and value < 0.5)):
        result.leaks = None
        result.add(known_remark(known))
    return result


def judge_against_before(
    forget: Mapping[str, Sequence[float]], before: Mapping[str, Sequence[float]], recited: float
) -> LeakResult:
    """How far the score that has changed least has fallen.

    before: of the same answers, before the model forgot. recited: their extraction strength then.
    """
    fell = {name: auc(before[name], values) for name, values in forget.items()}
    least = min(fell, key=lambda name: fell[name])
    meaning = (
        f"In {shares(fell[least])[0]} of pairs of a forgotten answer before and one now, the former is the likelier, "
        f"by the score of four that changed least ({least}); membership itself is not tested, since {NO_HOLDOUT}."
    )
    figures = {"rows": len(forget["loss"]), **{f"{name}_fell": fall for name, fall in fell.items()}}
    leaks: bool | None = fell[least] <= FALLEN
    if leaks and recited <= MARGIN:
        meaning += " Before, the model hardly wrote these answers: there was little that could have fallen."
        leaks = None
    return LeakResult(figures, meaning, leaks, against_before=True)


def _verdict(
    auc: float, p: float, least_p: float, little: str | None, all_equal: bool, known: bool, evidence: str
) -> tuple[bool | None, str]:
    if all_equal:
        return None, "every answer has the same score, so they say nothing about the model"
    if least_p >= SIGNIFICANT:
        return None, f"of so few {evidence} nothing could be shown, whatever they score (p = {least_p:.2f} at best)"
    if abs(auc - 0.5) <= MARGIN:
        coin = "they tell forgotten answers hardly better from others than a coin does"
        return (False, coin) if little is None else (None, f"{coin}, but {little} {evidence}")
    if p >= SIGNIFICANT:
        return None, f"chance alone can do that with so few {evidence} (p = {p:.2f}), so nothing is shown"
    if auc > 0.5:
        return True, "forgotten answers still score above answers that the model never saw: they are remembered"
    if known:
        return True, "forgotten answers score below those of the holdout"
    return True, (
        "forgotten answers now score below answers that the model never saw: over-forgetting, which tells them "
        "apart as well"
    )
