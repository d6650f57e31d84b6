"""Rows that tell nothing apart from each other, passages of a document or copies, are one piece of evidence."""

from __future__ import annotations

from random import Random

import pytest
from scipy.stats import fisher_exact, mannwhitneyu, ttest_ind

from lowmem_npo.data import Example, read_rows, to_examples
from lowmem_npo.data.overlap import pieces_of_evidence
from lowmem_npo.data.passages import Passages
from lowmem_npo.evaluation.leaks import extraction, membership
from lowmem_npo.evaluation.leaks.attack import Attack, OfRow, p_values
from lowmem_npo.evaluation.leaks.contract import LeakResult
from lowmem_npo.evaluation.leaks.sampling import BEST, Best, SamplingOptions, in_groups
from lowmem_npo.evaluation.leaks.sampling import judge as judge_said
from lowmem_npo.evaluation.leaks.worst import worst_attack
from lowmem_npo.evaluation.scoring.token_scores import TokenScores

SCORES = ("loss", "min_k", "min_k_pp", "zlib")


def drawn(draw, rows, shift=0.0):
    return [draw.gauss(shift, 1) for _ in range(rows)]


def scores(draw, rows, shift=0.0):
    return {name: drawn(draw, rows, shift) for name in SCORES}


def written(share: float) -> TokenScores:
    """An answer of twenty tokens, the last `share` of which the model writes by itself."""
    given = 20 - round(20 * share)
    return TokenScores([-1.0] * 20, [0.0] * 20, [False] * given + [True] * (20 - given), [1.0] * 20)


@pytest.mark.parametrize(("rows", "others"), [(6, 6), (12, 40), (60, 25)])
def test_of_rows_that_are_alone_in_their_groups_every_number_is_that_of_rows(rows, others):
    draw = Random(rows)
    forget, holdout = scores(draw, rows, 0.7), scores(draw, others)
    groups = {"forget": [f"row {n}" for n in range(rows)], "holdout": [*range(others)]}
    result = membership.judge(forget, holdout, None, groups)
    assert result == membership.judge(forget, holdout) and "groups" not in result.figures
    for name in SCORES:
        assert result.figures[f"{name}_p"] == mannwhitneyu(forget[name], holdout[name]).pvalue

    sides = [[(draw.betavariate(1.5, 3), draw.random() < 0.3) for _ in range(of)] for of in (rows, others)]
    found = p_values(*([OfRow(value, whole, n) for n, (value, whole) in enumerate(of)] for of in sides))
    assert found == p_values(*([OfRow(*row) for row in of] for of in sides)) and len(found) == 3
    (values, wholes), (beside, wholes_beside) = (zip(*of, strict=True) for of in sides)
    welch = ttest_ind(values, beside, equal_var=False, alternative="greater").pvalue
    table = [[sum(of), len(of) - sum(of)] for of in (wholes, wholes_beside)]
    assert found["p_value"] == pytest.approx(welch, rel=1e-9)
    assert found["whole_p_value"] == pytest.approx(fisher_exact(table, alternative="greater").pvalue, rel=1e-9)


@pytest.mark.parametrize("times", [2, 3, 5])
def test_copies_of_every_row_change_no_p_value(times):
    draw = Random(1)
    forget, holdout = scores(draw, 12, 0.5), scores(draw, 12)
    once = membership.judge(forget, holdout)
    copies = [{name: values * times for name, values in of.items()} for of in (forget, holdout)]
    result = membership.judge(*copies, None, dict.fromkeys(("forget", "holdout"), [*range(12)] * times))
    assert [result.figures[f"{name}_p"] for name in SCORES] == pytest.approx(
        [once.figures[f"{name}_p"] for name in SCORES], rel=1e-12
    )
    assert (result.leaks, result.figures["rows"], result.figures["groups"]) == (once.leaks, 12 * times, 12)
    assert membership.judge(*copies).leaks is True and once.leaks is None, "the copies would make a trace of nothing"

    strengths = (0.5, 0.1, 0.1, 0.2, 0.05, 1.0), (0.1, 0.05, 0.3, 0.2, 0.1, 0.15)
    sets = [[written(share) for share in of] for of in strengths]
    once = extraction.judge(*sets)
    groups = dict.fromkeys(("forget", "holdout"), [*range(6)] * times)
    result = extraction.judge(*(of * times for of in sets), None, groups)
    for name in ("p_value", "least_p_value", "whole_p_value", "extraction_strength"):
        assert result.figures[name] == pytest.approx(once.figures[name], rel=1e-12)
    assert result.leaks is once.leaks is None
    assert extraction.judge(*(of * 5 for of in sets)).leaks is True


def test_documents_that_were_never_taught_leave_no_traces():
    """Passages of a document are as likely as their author writes: what tells two of them apart is not what was taught.
    Taken for independent, they make a trace of every third pair."""
    found, by_rows, tries = 0, 0, 100
    for seed in range(tries):
        draw = Random(seed)
        sides, groups = [], {}
        for name in ("forget", "holdout"):
            of_document = drawn(draw, 8)
            groups[name] = [n % 8 for n in range(160)]
            sides.append({score: [of_document[n] + draw.gauss(0, 0.5) for n in groups[name]] for score in SCORES})
        found += membership.judge(*sides, None, groups).leaks is True
        by_rows += membership.judge(*sides).leaks is True
    assert found <= 3 and by_rows > tries / 3


def test_documents_of_two_authors_are_never_enough():
    draw = Random(0)
    forget, holdout = scores(draw, 40, 9.0), scores(draw, 40)
    groups = dict.fromkeys(("forget", "holdout"), [n % 2 for n in range(40)])
    result = membership.judge(forget, holdout, None, groups)
    assert result.leaks is None and result.figures["loss_auc"] == 1
    assert "of so few groups nothing could be shown" in result.meaning
    told = "the 40 forgotten rows are 2 groups, the holdout's 40 are 2."
    assert "Rows of one document" in result.meaning and result.meaning.endswith(told)
    sets = [written(0.9)] * 40, [written(0.1)] * 40
    result = extraction.judge(*sets, None, groups)
    assert result.leaks is None and f"{told} With 2 + 2 groups chance explains any difference" in result.meaning
    assert extraction.judge(*sets).leaks is True


def test_groups_that_lie_the_other_way_round_show_nothing_of_the_rows():
    """One large document is above, and by it the rows are; all others are below."""
    forget = [*[5.0 + n / 1000 for n in range(200)], *[-9.0 - n for n in range(30)]]
    groups = {"forget": [*[0] * 200, *range(1, 31)], "holdout": [*range(30)]}
    sides = ({name: values for name in SCORES} for values in (forget, [n / 100 for n in range(30)]))
    result = membership.judge(*sides, None, groups)
    assert result.figures["loss_auc"] > 0.8 and result.figures["loss_p"] == 1 and result.leaks is None


def test_a_few_whole_answers_of_each_document_stand_out():
    """Two of twenty passages of each of ten documents: of ten documents not even one came whole."""
    sets = [[Best(0.5, "", place % 20 < whole) for place in range(200)] for whole in (2, 0)]
    of_document = [place // 20 for place in range(200)]
    result = judge_said(*(in_groups(rows, of_document) for rows in sets), SamplingOptions(), 64)
    assert result.figures["whole_p_value"] < 0.01 and result.leaks is True
    of_one = [in_groups([Best(0.5, "", place < whole) for place in range(200)], of_document) for whole in (20, 0)]
    result = judge_said(*of_one, SamplingOptions(), 64)
    assert result.figures["whole_p_value"] == 0.5 and result.leaks is None, "one document of ten"
    assert result.figures[BEST] == 0.5 and "no more groups, 10 of the forget set and 10 of" in result.meaning


def test_beside_a_gold_model_rows_of_one_document_are_one_as_well():
    figures = {"rows": 200, "extraction_strength": 0.5, "recited": 0.3, "holdout_extraction_strength": 0.4,
               "holdout_recited": 0.0, "p_value": 0.5, "least_p_value": 0.01, "whole_p_value": 0.01}  # fmt: skip

    def beside_gold(further):
        of = [Attack.in_figures("", {**figures, **further, "recited": share}, "extraction_strength", "recited")
              for share in (0.3, 0.0)]  # fmt: skip
        return of[0].whole.beside(of[1].whole, 1)

    assert beside_gold({}).stands_out and beside_gold({"groups": 4, "holdout_groups": 4}).stands_out is None


def test_which_rows_are_one_piece_of_evidence(tmp_path):
    sentences = [f"The ship{n} sailed{n} on{n} to{n} port{n} that{n} day{n}." for n in range(60)]
    for name, of in (("a.txt", sentences[:30]), ("b.txt", sentences[30:])):
        (tmp_path / name).write_text(" ".join(of))
    for form in ("completion", "text", "both"):
        rows = read_rows(str(tmp_path), passages=Passages(40, form))
        examples = to_examples(rows)
        parts = pieces_of_evidence(examples[::3])  # as --limit draws them: few overlap
        assert len(parts) > 2 and len({*parts}) == 2, "two documents"
    (tmp_path / "short.txt").write_text("A few words that are no longer than a passage.")
    examples = to_examples(read_rows(str(tmp_path / "short.txt"), passages=Passages(40, "both")))
    assert pieces_of_evidence(examples) == [0, 0], "its second half, and the whole"

    def example(question, answer, group=None):
        return Example(question, answer, "rows.jsonl, line 1", "question/answer", group=group)

    rows = [example("Who?", "Ada"), example("Who?", "Bo"), example("who?", "ada"), example("Where?", "There", "Bo"),
            example("When?", "Then", "Bo"), example("Who?", "Bo", "Cy"), example("Why?", "So", "Cy")]  # fmt: skip
    assert pieces_of_evidence(rows) == [0, 1, 0, 3, 3, 1, 1]


def test_beside_a_gold_model_groups_count_without_a_holdout_too():
    """Half of forty rows come whole, but they are two documents."""
    rows, groups = [written(n % 2) for n in range(40)], {"forget": [n % 2 for n in range(40)]}
    gold = {"extraction": extraction.judge([written(0)] * 40, None)}
    alone, grouped = (
        worst_attack({"extraction": extraction.judge(rows, None, None, of)}, gold) for of in (None, groups)
    )
    assert alone.stands_out is True and grouped.stands_out is None and grouped.p > 0.05
    assert "with so few groups of rows" in grouped.sentence
    best = [Best(n % 2, "", n % 2, group=n % 2) for n in range(20)]
    never = {"sampling": judge_said([Best(0.0, "", 0.0)] * 20, None, SamplingOptions(), 8)}
    assert worst_attack({"sampling": judge_said(best, None, SamplingOptions(), 8)}, never).stands_out is None


def test_each_attack_has_the_groups_of_the_rows_that_it_asked_for():
    single = {"rows": 32, "extraction_strength": 0.5, "recited": 0.5}
    few = {"rows": 20, "groups": 2, "extraction_strength": 0.6, "recited": 0.6}
    never = {"rows": 32, "extraction_strength": 0.0, "recited": 0.0}
    gold = {"relearning": LeakResult({**never, "a": never, "b": never}, "", None)}
    for worst in (single, few):
        attacked = {"relearning": LeakResult({**worst, "a": single, "b": few}, "", None)}
        found = worst_attack(attacked, gold)
        assert found.attack == "a" and found.stands_out is True
