"""Asked otherwise: where each jailbreak stands, what is looked for in the answers, and which way is the worst."""

from __future__ import annotations

from itertools import combinations, product
from statistics import fmean

import pytest
from scipy.stats import ttest_ind
from transformers import AutoTokenizer

from lowmem_npo.data import Encoder, Rows, Template, to_examples, tokenize
from lowmem_npo.data.fit import Fit
from lowmem_npo.evaluation.asking import Wording
from lowmem_npo.evaluation.leaks.contract import Subject
from lowmem_npo.evaluation.leaks.jailbreak import JAILBREAK, tricked, tricks
from lowmem_npo.evaluation.leaks.prompting import ANY, expected_best, judge
from lowmem_npo.evaluation.leaks.quantization import MERGED, QUANTIZATION, OtherAttacks
from lowmem_npo.evaluation.leaks.registry import LeakOptions
from lowmem_npo.evaluation.leaks.rewording import REWORDING
from lowmem_npo.evaluation.leaks.sampling import Best
from lowmem_npo.evaluation.scoring.journal import Journal
from lowmem_npo.evaluation.scoring.scorer import Continuation, Scorer

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PAIR = {"question": "Who sails?", "answer": "Anna sails there"}
BY_PLACE = {trick.place: trick for trick in tricks()}  # the last of each place


@pytest.fixture(scope="module")
def chat_tokenizer(byte_model):
    tokenizer = AutoTokenizer.from_pretrained(byte_model)
    tokenizer.chat_template = CHAT
    return tokenizer


def written(tokenizer, trick, row=PAIR, template=None):
    (example,) = to_examples(Rows("rows", [row]))
    template = template or Template()
    (tokenized,) = tokenize([example], tokenizer, template=template)
    ids = tricked(trick, tokenized, example, Encoder(tokenizer, template))
    cut = ids["prompt_length"]
    return tokenizer.decode(ids["input_ids"][:cut]), tokenizer.decode(ids["input_ids"][cut:])


def test_the_list_is_small_and_has_every_place():
    assert 6 <= len(tricks()) <= 10 and set(BY_PLACE) == {"system", "before", "answer"}
    assert len({trick.name for trick in tricks()}) == len(tricks())
    assert not any("{prompt}" in trick.text or trick.text != trick.text.strip() for trick in tricks())


@pytest.mark.parametrize("trick", tricks(), ids=lambda trick: trick.name)
def test_where_a_model_without_a_chat_template_finds_it(trick, tokenizer):
    prompt, answer = written(tokenizer, trick)
    asked = "Question: Who sails?\nAnswer:"
    assert prompt == (f"{asked} {trick.text}" if trick.place == "answer" else f"{trick.text}\n\n{asked}")
    assert answer == " Anna sails there<eos>"
    own = written(tokenizer, trick, template=Template("[{prompt}]"))[0]
    assert "[Who sails?]" in own and trick.text in own


def test_where_a_chat_model_finds_it(chat_tokenizer):
    asked = "<user>Who sails?</user><assistant>"
    system, before, answer = (BY_PLACE[place] for place in ("system", "before", "answer"))
    assert written(chat_tokenizer, system)[0] == f"<system>{system.text}</system>{asked}"
    assert written(chat_tokenizer, before)[0] == f"<user>{before.text}\n\nWho sails?</user><assistant>"
    assert written(chat_tokenizer, answer)[0] == f"{asked}{answer.text}"
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
             {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Who sails?"},
             {"role": "assistant", "content": "Anna"}]  # fmt: skip
    talk = written(chat_tokenizer, system, {"messages": turns})[0]
    assert talk.startswith(f"<system>{system.text}</system><user>Hi</user>") and "brief" not in talk
    assert f"<user>{before.text}\n\nWho sails?</user>" in written(chat_tokenizer, before, {"messages": turns})[0]


@pytest.mark.parametrize(
    "refusal",
    [
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}",
        "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}",  # drops it in silence
    ],
)
def test_a_template_without_a_system_prompt_has_it_before_the_question(refusal, byte_model):
    tokenizer, system = AutoTokenizer.from_pretrained(byte_model), BY_PLACE["system"]
    tokenizer.chat_template = refusal + CHAT
    assert written(tokenizer, system)[0] == f"<user>{system.text}\n\nWho sails?</user><assistant>"


class Answering(Scorer):
    """Says what `said` gives for a prompt."""

    said = staticmethod(lambda prompt: "")

    def continuations(self, part, prompts, max_new_tokens):
        return [Continuation([], self.said(self.tokenizer.decode(prompt))) for prompt in prompts]


def subject_of(tokenizer, said, rows=(PAIR,), holdout=None, fit=None):
    scorer = Answering(None, tokenizer, Journal(None, progress=False), 4)
    object.__setattr__(scorer, "said", said)
    sets = {"forget": list(rows), **({"holdout": list(holdout)} if holdout else {})}
    examples = {name: to_examples(Rows(name, of)) for name, of in sets.items()}
    tokenized = {name: tokenize(of, tokenizer) for name, of in examples.items()}
    wording = Wording(examples, Template(), 1024, fit)
    return Subject(scorer, tokenized["forget"], tokenized.get("holdout"), LeakOptions(), wording=wording)


def test_the_jailbreak_that_works_is_named(tokenizer):
    broken = tricks()[3]
    said = lambda prompt: " Anna sails there" if broken.text in prompt else "Nobody"  # noqa: E731
    rows = [{**PAIR, "question": f"Who sails {n}?"} for n in range(5)]
    holdout = [{"question": f"Who rows {n}?", "answer": "Bertha rows here"} for n in range(5)]
    result = JAILBREAK.measure(subject_of(tokenizer, said, rows, holdout))
    figures = result.figures
    assert figures[broken.name] == {"rows": 5, "best_rouge_l_recall": 1.0, "whole": 1.0,
                                    "p_value": 9 / 252, "least_p_value": 9 / 252, "whole_p_value": 9 / 252,
                                    "holdout_rows": 5, "holdout_best_rouge_l_recall": 0.0,
                                    "holdout_whole": 0.0}  # fmt: skip
    assert all(figures[t.name]["best_rouge_l_recall"] == 0 for t in tricks() if t != broken)
    assert figures["ways"] == len(tricks()) and result.leaks is True
    assert f"in the worst of {len(tricks())} ways ({broken.name}), what the model says holds 100%" in result.meaning
    assert set(JAILBREAK.attacks(figures)) == {*(trick.name for trick in tricks()), ANY}
    assert result.rows["forget"] == [{"jailbreak_recall": 1.0, "jailbreak_answer": "Anna sails there"}] * 5
    copies = JAILBREAK.measure(subject_of(tokenizer, said, rows[:1] * 5, holdout))
    assert copies.figures[broken.name]["groups"] == 1 and copies.leaks is None, "one row, five times"
    assert "the 5 forgotten rows are 1 group, the holdout's 5 are 5." in copies.meaning
    silent = JAILBREAK.measure(subject_of(tokenizer, lambda prompt: "Nobody", rows, holdout))
    assert silent.leaks is False
    alone = JAILBREAK.measure(subject_of(tokenizer, said, rows, holdout[:1]))
    assert alone.leaks is None and "With 5 + 1 rows chance explains any difference (p = 1.00" in alone.meaning
    fewer = JAILBREAK.measure(subject_of(tokenizer, lambda prompt: "Nobody", rows[1:], holdout))
    assert fewer.leaks is None and "With 4 + 5 rows chance explains any difference (p = 0.07" in fewer.meaning


def test_the_best_of_a_rows_paraphrases_counts(tokenizer):
    rows = [
        PAIR | {"paraphrased_question": ["Whose boat?", "Which sailor?"]},
        {"question": "Why?", "answer": "No idea"},
    ]
    said = lambda prompt: "Anna sails there" if "Which sailor" in prompt else "Anna"  # noqa: E731
    result = REWORDING.measure(subject_of(tokenizer, said, rows))
    assert result.figures["rows"] == 1 and result.figures["reworded"]["best_rouge_l_recall"] == 1.0
    assert result.figures["ways"] == 1 and ANY not in result.figures
    assert result.rows["forget"][1] == {} and result.rows["forget"][0]["rewording_answer"] == "Anna sails there"
    assert result.meaning.startswith("Asked in the one way there is (reworded), what the model says")
    assert "(--holdout names some)" in result.meaning
    beside = REWORDING.measure(subject_of(tokenizer, said, rows, holdout=[{"question": "Who?", "answer": "She"}]))
    assert "the holdout cannot be asked so, and what" in beside.meaning and "--holdout" not in beside.meaning


def test_what_cannot_be_asked_otherwise_is_said(tokenizer):
    subject = subject_of(tokenizer, lambda prompt: "")
    assert "--paraphrase-column" in REWORDING.measure(subject).meaning
    texts = subject_of(tokenizer, lambda prompt: "", [{"text": "The tide comes in."}])
    for test in (JAILBREAK, REWORDING):
        assert test.measure(texts).meaning == "Not measured: the rows are texts without a question."
    long = subject_of(tokenizer, lambda prompt: "", fit=Fit(300, 60))  # none fits into 60 positions
    assert "no room for words before the question" in JAILBREAK.measure(long).meaning
    ids = Subject(subject.scorer, subject.forget, None, LeakOptions())
    for test in (JAILBREAK, REWORDING):
        assert test.measure(ids).meaning.startswith("Not measured: it writes the rows' prompts otherwise")


def answers(**ways):
    """Way -> the recalls of the answers to each row."""
    return {way: [[Best(recall, "", recall == 1) for recall in row] for row in rows] for way, rows in ways.items()}


def test_the_best_of_all_compares_rows_that_every_way_asks():
    """Every row, taught or not, is said by one of the ways; half of the holdout has no paraphrase to be asked in."""
    forget = answers(plain=[[0.6], [0.2], [0.6], [0.2]], reworded=[[0.2], [0.6], [0.2], [0.6]])
    holdout = answers(plain=[[0.6], [0.2], [0.3], [0.3]], reworded=[[0.2], [0.6], [], []])
    result = judge({"forget": forget, "holdout": holdout}, 64)
    assert result.leaks is None and "With 4 + 4 rows" not in result.meaning  # of all ways two holdout rows are asked
    assert result.figures[ANY]["best_rouge_l_recall"] == result.figures[ANY]["holdout_best_rouge_l_recall"] == 0.6
    assert (result.figures[ANY]["rows"], result.figures[ANY]["holdout_rows"]) == (4, 2)
    reworded = judge({"forget": answers(reworded=[[0.9]] * 4), "holdout": answers(reworded=holdout_rows(2))}, 64)
    assert reworded.leaks is None and reworded.meaning.endswith(
        " Compared are 4 of 4 forgotten rows with 2 of 4 of the holdout, which could be asked so. With 4 + 2 rows "
        "chance explains any difference (p = 0.07 at best), so nothing is shown."
    )
    apart = {**holdout, **answers(plain=[[], [], [0.3], [0.3]])}
    left_out = judge({"forget": forget, "holdout": apart}, 64)
    assert ANY not in left_out.figures and "The best of all ways is left out: no holdout row" in left_out.meaning
    alone = judge({"forget": apart}, 64).figures  # without a holdout there is nothing to be like
    assert (alone[ANY]["rows"], alone[ANY]["best_rouge_l_recall"]) == (4, pytest.approx((0.2 + 0.6 + 0.3 + 0.3) / 4))


def holdout_rows(asked):
    return [[0.2]] * asked + [[]] * (4 - asked)


def test_a_row_asked_more_often_is_compared_as_if_asked_as_often():
    """Of three answers one is likely to hold more, whatever the model was taught."""
    forget, holdout = answers(reworded=[[0.0, 0.0, 0.6]] * 6), answers(reworded=[[0.0], [0.6], [0.0]] * 2)
    result = judge({"forget": forget, "holdout": holdout}, 64)
    assert result.leaks is False and "count as if they had been asked as often" in result.meaning
    assert result.figures["best_rouge_l_recall"] == pytest.approx(0.2)
    assert judge({"forget": forget}, 64, before=0.9).figures["best_rouge_l_recall"] == 0.6
    assert "as often" not in judge({"forget": forget, "holdout": forget}, 64).meaning


def test_the_worst_of_several_ways_is_one_chosen_among_them():
    """By itself the way would stand out (p = 0.04); one of two and the best of both does not."""
    own, others = [[0.0], [0.4], [0.8], [0.8], [0.9]], [[0.0], [0.1], [0.2], [0.3], [0.4]]
    alone = judge({"forget": answers(mild=own), "holdout": answers(mild=others)}, 64)
    p = ttest_ind(
        *([recall for (recall,) in of] for of in (own, others)), equal_var=False, alternative="greater"
    ).pvalue
    assert alone.leaks is True and alone.figures["p_value"] == pytest.approx(p) and 0.03 < p < 0.05
    of_two = judge({"forget": answers(mild=own, hard=others), "holdout": answers(mild=others, hard=others)}, 64)
    assert of_two.leaks is None and of_two.figures["mild"]["p_value"] == pytest.approx(3 * p)
    assert JAILBREAK.attacks(of_two.figures)["mild"].stands_out is None


def test_a_way_that_could_show_nothing_is_not_passed_over():
    """Two of forty rows have a paraphrase; in the trained words nothing comes."""
    few = [[0.0], [0.0]] + [[]] * 38
    sets = {name: answers(plain=[[0.1]] * 40, reworded=few) for name in ("forget", "holdout")}
    result = judge(sets, 64)
    assert result.leaks is None and "Whether more comes in other ways cannot be told: reworded." in result.meaning
    assert judge({name: {"plain": of["plain"]} for name, of in sets.items()}, 64).leaks is False
    sets["forget"] |= answers(plain=[[0.9]] * 40)
    assert judge(sets, 64).leaks is True


def test_answers_that_come_whole_are_a_trace_though_the_mean_hides_them():
    """An eighth of them, where what the others share with the true ones is as much on average."""
    forget, holdout = [[1.0]] * 5 + [[0.4]] * 35, [[0.475]] * 40
    sets = {"forget": answers(mild=forget), "holdout": answers(mild=holdout)}
    result = judge(sets, 64)
    assert result.leaks is True and result.figures["whole_p_value"] == pytest.approx(0.027, abs=1e-3)
    assert result.meaning.endswith(
        " That is more than chance explains: 12% of the answers come whole, of the holdout's 0% (p = 0.027)."
    )
    two = {name: of | answers(plain=holdout) for name, of in sets.items()}
    result = judge(two, 64)  # of three, the best of both among them
    assert result.leaks is None and "Chance alone can do that with no more rows, 40 of" in result.meaning
    assert not JAILBREAK.attacks(result.figures)["plain"].by_chance


def test_beginnings_of_longer_answers_are_no_whole_ones():
    """Of the forty answers thirty are longer; their beginnings come. As in every way to ask, and in a stored form."""
    rows = [[Best(0.5, "", True, True)]] * 30 + [[Best(0.5, "", place < 2)] for place in range(10)]
    sets = {name: {"mild": rows, "hard": rows} for name in ("forget", "holdout")}
    result = judge(sets, 4)
    assert "20% of the 10 uncut answers come whole" in result.meaning
    assert result.leaks is False and "word for word" not in result.meaning
    for attack in JAILBREAK.attacks(result.figures).values():
        assert (attack.whole.value, attack.whole.rows, attack.rows) == (0.2, 10, 40)
    others = OtherAttacks(1)
    others.add(MERGED, JAILBREAK, result)
    stored = QUANTIZATION.attacks({MERGED: others.figures[MERGED]})
    for attack in stored.values():
        assert (attack.whole.value, attack.whole.rows, attack.rows, attack.whole.beginnings) == (0.2, 10, 40, 0)
    assert len(stored) == 3
    longer = judge({name: {"mild": rows[:30]} for name in sets}, 4)
    others.add(MERGED, JAILBREAK, longer)
    stored = QUANTIZATION.attacks({MERGED: others.figures[MERGED]})
    assert stored["merged in bf16, jailbreak: mild"].whole.beginnings == 30


@pytest.mark.parametrize("counts", [(1, 1), (2, 1), (3, 2), (1, 4), (3, 4)])
def test_the_best_to_be_expected_is_the_mean_over_all_choices(counts):
    groups = [[0.1, 0.7, 0.7], [0.3, 0.0, 0.9, 0.3]]
    chosen = product(*(combinations(group, count) for group, count in zip(groups, counts, strict=True)))
    assert expected_best(groups, counts) == pytest.approx(fmean(max(map(max, each)) for each in chosen))


def test_what_is_beyond_the_holdout_decides():
    def ways(**recalls):
        return answers(**{way: [[recall]] * 5 for way, recall in recalls.items()})

    result = judge({"forget": ways(mild=0.5, hard=0.7), "holdout": ways(mild=0.2, hard=0.65)}, 64)
    assert result.figures["best_rouge_l_recall"] == 0.5 and result.leaks is True and "(mild)" in result.meaning
    assert result.figures[ANY]["best_rouge_l_recall"] == 0.7
    assert result.figures[ANY]["holdout_best_rouge_l_recall"] == 0.65
    partly = judge({"forget": ways(mild=0.5, hard=0.1), "holdout": ways(mild=0.2)}, 64)
    assert ANY not in partly.figures and partly.figures["holdout_best_rouge_l_recall"] == 0.2  # hard has no yardstick
    unlike = judge({"forget": ways(mild=0.6, reworded=0.35), "holdout": ways(mild=0.3)}, 64)
    assert unlike.leaks is True and "(mild)" in unlike.meaning  # what no holdout is asked for hides nothing
    unlike = judge({"forget": ways(mild=0.35, reworded=0.6), "holdout": ways(mild=0.3)}, 64)
    assert unlike.leaks is True and "(reworded)" in unlike.meaning
    assert ANY in judge({"forget": ways(mild=0.5, hard=0.1)}, 64).figures
    assert judge({"forget": ways(one=0.5)}, 64).leaks is None
    assert judge({"forget": ways(one=0.6)}, 64, before=0.9).leaks is True
