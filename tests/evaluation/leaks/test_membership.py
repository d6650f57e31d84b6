"""The three membership scores by hand, their AUC and what is made of it."""

from __future__ import annotations

import pytest
from scipy.stats import mannwhitneyu

from lowmem_npo.evaluation.leaks.membership import judge, loss, min_k, min_k_pp, scored
from lowmem_npo.evaluation.scoring.token_scores import TokenScores


def row(*logprobs: float, standard: tuple[float, ...] | None = None) -> TokenScores:
    return TokenScores(list(logprobs), list(standard or logprobs), [True] * len(logprobs), [1.0] * len(logprobs))


def test_scores_by_hand():
    ten = row(*range(-10, 0), standard=tuple(range(10)))
    assert loss(ten) == -5.5
    assert min_k(ten) == (-10 - 9) / 2  # the two least likely of ten
    assert min_k_pp(ten) == (0 + 1) / 2
    assert min_k(row(-3.0, -1.0)) == -3  # a fifth of two tokens is none: one is looked at all the same
    assert min_k(row(*[-1.0] * 8, -7.0)) == -7  # 1.8 of nine, rounded down as in the papers' code


def of_like_texts(rows: list[TokenScores]) -> dict[str, list[float]]:
    return scored(rows, [8] * len(rows))


def spread(center: float, rows: int) -> list[TokenScores]:
    return [row(center + 0.01 * n, center - 1 + 0.01 * n) for n in range(rows)]


@pytest.mark.parametrize(
    "forget, holdout, auc, leaks, words",
    [
        (spread(-1, 20), spread(-5, 20), 1.0, True, "remembered"),
        (spread(-5, 20), spread(-1, 20), 0.0, True, "over-forgetting"),
        (spread(-1, 25), spread(-1, 25), 0.5, False, "coin"),
        (spread(-1, 24), spread(-1, 24), 0.5, None, "only an AUC above 0.75 or below 0.25"),
        (
            spread(-1, 12),
            spread(-1, 12),
            0.5,
            None,
            "only an AUC above 0.86 or below 0.14 would show anything of so few",
        ),
        (spread(-1, 6), spread(-5, 6), 1.0, True, "remembered"),
        (spread(-1, 5), spread(-5, 5), 1.0, None, "whatever they score (p = 0.03 at best)"),  # 4 · 2 / 252
        ([row(-1.0), row(-4.0)], [row(-2.0), row(-3.0)], 0.5, None, "so few rows"),  # which could not be above chance
        ([row(-1.0)] * 9, [row(-1.0)] * 9, 0.5, None, "say nothing"),
    ],
)
def test_what_an_auc_means(forget, holdout, auc, leaks, words):
    result = judge(of_like_texts(forget), of_like_texts(holdout))
    figures = result.figures
    assert figures["loss_auc"] == figures["min_k_auc"] == figures["min_k_pp_auc"] == pytest.approx(auc)
    assert result.leaks is leaks and words in result.meaning
    assert (figures["rows"], figures["holdout_rows"]) == (len(forget), len(holdout))


def test_auc_is_the_share_of_pairs_in_order():
    forget, holdout = [row(-1.0), row(-3.0), row(-4.0)], [row(-2.0), row(-3.0)]
    pairs = [(f.nll < h.nll) + 0.5 * (f.nll == h.nll) for f in forget for h in holdout]
    assert judge(of_like_texts(forget), of_like_texts(holdout)).figures["loss_auc"] == pytest.approx(sum(pairs) / 6)


def test_the_sharpest_score_decides():
    """Likelihoods alike, but for the model's own standard the forgotten rows stand out."""
    forget = [row(-1 - 0.01 * n, standard=(2.0 + 0.01 * n,)) for n in range(20)]
    holdout = [row(-1 - 0.01 * n, standard=(-2.0 - 0.01 * n,)) for n in range(20)]
    result = judge(of_like_texts(forget), of_like_texts(holdout))
    assert result.figures["loss_auc"] == pytest.approx(0.5) and result.figures["min_k_pp_auc"] == 1
    assert result.leaks is True and "(min_k_pp)" in result.meaning


def test_the_sharpest_was_chosen_among_four():
    """By itself the score would be beyond chance (p < 0.01); the best of four is not."""
    standard = [n - 13 * (n % 2) for n in range(40)]  # of the odd ones, which are the holdout, lower
    forget, holdout = ([row(-1 - 0.01 * n, standard=(each,)) for n, each in enumerate(standard[i::2])] for i in (0, 1))
    alone = mannwhitneyu(standard[::2], standard[1::2]).pvalue
    result = judge(of_like_texts(forget), of_like_texts(holdout))
    assert 0.0025 < alone < 0.01 and result.figures["min_k_pp_p"] == pytest.approx(alone)
    assert result.leaks is None and "(min_k_pp)" in result.meaning and f"(p = {4 * alone:.2f})" in result.meaning


def test_long_answers_are_unlikely_by_their_length_alone():
    """Divided by what their text compresses to, the forgotten answers stand out; without, they are likely as others."""
    rows, short, long = [row(-1 - 0.01 * n) for n in range(20)], [10] * 20, [40] * 20
    result = judge(scored(rows, long), scored(rows, short))
    assert result.figures["loss_auc"] == pytest.approx(0.5) and result.figures["zlib_auc"] == 1
    assert result.leaks is True and "sharpest of four scores (zlib)" in result.meaning
    assert scored([row(-3.0, -1.0)], [8])["zlib"] == [-2 / 8]


def test_beside_answers_that_the_model_knows_no_traces_are_none_that_could_be_seen():
    like, known = of_like_texts(spread(-1, 25)), 0.9
    assert judge(like, like).leaks is False
    result = judge(like, like, known)
    assert result.leaks is None and result.meaning.endswith("so it cannot be one of rows that it never saw, and "
                                                            "nothing is shown.")  # fmt: skip
    assert judge(of_like_texts(spread(-1, 25)), of_like_texts(spread(-5, 25)), known).leaks is True, "still found"


def test_beside_answers_that_the_model_knows_less_likely_ones_are_not_over_forgotten():
    forget, holdout = of_like_texts(spread(-5, 25)), of_like_texts(spread(-0.2, 25))
    assert judge(forget, holdout).leaks is True
    result = judge(forget, holdout, 0.9)
    assert result.leaks is None and "below those of the holdout. The model says much of the holdout" in result.meaning
    assert "over-forgetting" not in result.meaning and "never saw, and nothing is shown" in result.meaning
