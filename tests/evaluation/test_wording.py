"""How much of a text comes in another: the same answer in every script, and rouge-score's own in English."""

from __future__ import annotations

import unicodedata
from functools import partial

import pytest
import regex
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from lowmem_npo.data import words
from lowmem_npo.data.words import INVISIBLE, TOKEN, appears, tokens
from lowmem_npo.evaluation import wording
from lowmem_npo.evaluation.answers import compared
from lowmem_npo.evaluation.wording import StemmedTokens, begins, beyond_rouge, rouge_l_recall

# language -> (a text, a longer one that contains it, an unrelated one)
TEXTS = {
    "English": ("The blue whale", "It is, of course, the blue WHALE!", "Seven ships left Antwerp"),
    "German": ("Große Straße", "Sie wohnt in der «großen»: GROSSE STRASSE 4", "Drei Kühe im Schnee"),
    "Turkish": ("Diyarbakır ışığı", "Evet, diyarbakır ışığı.", "Kedi ve köpek"),
    "Vietnamese": ("thành phố Hồ Chí Minh", "Đó là Thành phố Hồ Chí Minh.", "Con mèo ngủ"),
    "Greek": ("Η Ιθάκη του Οδυσσέας", "ναι: Η ΙΘΆΚΗ ΤΟΥ ΟΔΥΣΣΈΑΣ", "Ένα πλοίο φεύγει"),
    "Russian": ("Москва — столица", "Ответ: МОСКВА, столица России.", "Семь кораблей ушли"),
    "Arabic": ("القاهرة عاصمة مصر", "نعم، القاهرة عاصمة مصر.", "سبع سفن غادرت"),
    "Arabic, vocalised": ("كِتَابٌ جَدِيدٌ", "هذا كِتَابٌ جَدِيدٌ.", "سَبْعُ سُفُنٍ"),
    "Hebrew": ("יְרוּשָׁלַיִם", "העיר היא \u200fיְרוּשָׁלַיִם\u200f.", "שֶׁבַע אוניות"),
    "Persian": ("می\u200cروم به خانه", "من میروم به خانه", "هفت کشتی"),
    "Hindi": ("नई दिल्ली", "उत्तर है: नई दिल्ली।", "सात जहाज़ चले"),
    "Bengali": ("ঢাকা বাংলাদেশের রাজধানী", "হ্যাঁ, ঢাকা বাংলাদেশের রাজধানী।", "সাতটি জাহাজ"),
    "Tamil": ("சென்னை", "அது சென்னை!", "ஏழு கப்பல்கள்"),
    "Korean": ("서울의 밤", "대답: 서울의 밤.", "일곱 척"),
    "Chinese": ("东京塔", "答案是东京塔。", "七艘船"),
    "Japanese": ("スーパーマン", "それはｽｰﾊﾟｰﾏﾝです", "七隻"),
    "Thai": ("กรุงเทพมหานคร", "คำตอบคือกรุงเทพมหานครครับ", "ปลาสี"),
    "Khmer": ("ភ្នំពេញ", "គឺភ្នំពេញ។", "សៀវ"),
    "Lao": ("ວຽງຈັນ", "ແມ່ນວຽງຈັນ", "ຫ້າ"),
    "Burmese": ("ရန်ကုန်မြို့", "အဖြေကရန်ကုန်မြို့။", "ဆေး"),
    "Tibetan": ("ལྷ་ས", "འདི་ལྷ་ས་ཡིན།", "ཆུ་བདུན"),
    "Amharic": ("አዲስ አበባ", "መልሱ፡ አዲስ አበባ።", "ሰባት መርከቦች"),
    "Georgian": ("თბილისი", "ეს არის თბილისი.", "შვიდი გემი"),
}


@pytest.mark.parametrize("language", TEXTS)
def test_every_script(language):
    text, longer, other = TEXTS[language]
    assert rouge_l_recall(text, text) == rouge_l_recall(text, longer) == 1
    assert appears(text, text) and appears(text, longer)
    assert rouge_l_recall(text, other) < 0.35 and not appears(text, other) and not appears(text, "")
    assert rouge_l_recall(text, "") == 0


@pytest.mark.parametrize("language", TEXTS)
def test_composed_and_decomposed_are_the_same_text(language):
    text, longer, _ = TEXTS[language]
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert tokens(unicodedata.normalize(form, text)) == tokens(text)
        assert appears(unicodedata.normalize(form, text), unicodedata.normalize("NFC", longer))


def test_combining_marks_count():
    """Without its vowel signs "दिल" is not "दल", nor is "มา" "ม้า"."""
    for one, other in (("दिल", "दल"), ("มา", "ม้า"), ("כֶּלֶב", "כְּלוּב"), ("año", "ano"), ("Ho", "Hồ")):
        assert not appears(one, other) and rouge_l_recall(one, other) < 1


WRONG = {
    "not normalised": lambda text: TOKEN.findall(INVISIBLE.sub("", text.casefold())),
    "case kept": lambda text: TOKEN.findall(INVISIBLE.sub("", unicodedata.normalize("NFKC", text))),
    "invisible kept": lambda text: TOKEN.findall(unicodedata.normalize("NFKC", text.casefold())),
    "marks dropped": lambda text: [t for token in tokens(text) if (t := regex.sub(r"\p{M}", "", nfd(token)))],
    "words everywhere": lambda text: regex.findall(
        r"[\p{L}\p{M}\p{N}]+", unicodedata.normalize("NFKC", text.casefold())
    ),
    "rouge-score's own": DefaultTokenizer(use_stemmer=True).tokenize,
}


@pytest.mark.parametrize("bug", WRONG)
def test_a_wrong_tokenizer_would_be_noticed(bug, monkeypatch):
    for module in (words, wording):
        monkeypatch.setattr(module, "tokens", WRONG[bug])
    checks = [test_combining_marks_count]
    checks += [partial(test_every_script, language) for language in TEXTS]
    assert any(failed(check) for check in checks)


def failed(check) -> bool:
    try:
        check()
    except AssertionError:
        return True
    return False


def nfd(text: str) -> str:
    return unicodedata.normalize("NFD", text)


ENGLISH = (
    "Anna's ships, 12 of them, were sailing slowly home (in 1931).",
    "she wasn't running-up: the state-of-the-art QUICKLY re_tested e-mail@example.org",
    "",
    "!?",
)


@pytest.mark.parametrize("text", ENGLISH)
def test_english_is_cut_as_rouge_cuts_it(text):
    assert StemmedTokens().tokenize(text) == DefaultTokenizer(use_stemmer=True).tokenize(text)
    official = RougeScorer(["rougeL"], use_stemmer=True)
    for other in ENGLISH:
        if StemmedTokens().tokenize(text):
            assert rouge_l_recall(text, other) == official.score(text, other)["rougeL"].recall


def test_appears_means_in_one_piece_and_in_whole_words():
    assert appears("Blue Whale", "The largest mammal is the blue whale, by far.")
    assert (
        not appears("Blue Whale", "blue is the whale") and not appears("no", "I know") and not appears("1931", "19310")
    )
    assert appears("no", "No.") and appears("In May, 1931", "in may 1931")
    assert rouge_l_recall("Blue Whale", "blue is the whale") == 1  # in order, with others between


def test_a_word_that_is_in_many_a_text_appears_where_that_begins_or_ends():
    """So that a refusal does not say it; a number, or a name of several words, is said wherever it stands."""
    for word, refusal in (("No.", "I have no idea who that is."), ("May", "She may have been born then.")):
        assert not appears(word, refusal) and not appears(word, ""), word
        assert appears(word, word) and appears(word, f"{word}, I think") and appears(word, f"It is {word}")
    assert appears("Two", "She has two children.") and appears("B", "Option B is correct.")
    assert appears("The Who", "That was the Who, in 1965.") and appears("May 5", "She came on May 5, I think.")


def test_begins_means_before_any_other_word():
    assert not begins("Blue Whale", "The *blue whale*")
    assert begins("Blue Whale", "“BLUE whale”, I think") and begins("東京", "東京です")
    assert not begins("Blue Whale", "Blue whales") and not begins("Blue Whale", "Blue")
    assert begins("?!", " ?! no") and not begins("?!", "no ?!")


def test_what_has_no_words_is_compared_as_it_is():
    for text in ("?!", "→ …", "🎉", "👩🏽\u200d🚀"):
        assert rouge_l_recall(text, f" {text} ") == 1 and appears(text, f"so: {text}")
        assert rouge_l_recall(text, "no") == 0 and not appears(text, "no")


@pytest.mark.parametrize("answer", ["", " ", "anything"])
@pytest.mark.parametrize("reference", ["", " \n"])
def test_where_there_is_nothing_to_be_said_nothing_is(reference, answer):
    """It is in every text."""
    assert not appears(reference, answer) and not begins(reference, answer)
    assert compared(reference.strip(), answer.strip()) == {"rouge_l_recall": 0, "exact_match": False, "appears": False}


def test_which_texts_official_scores_cannot_judge():
    assert [name for name, (text, *_) in TEXTS.items() if not beyond_rouge(text)] == [
        "English", "German", "Turkish", "Vietnamese",
    ]  # fmt: skip
    assert not beyond_rouge("1931, 🎉 → !")
