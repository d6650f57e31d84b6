"""The terms of a report, explained for a reader who is not an engineer, and the links that lead to them."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

GLOSSARY = {
    "adapter": "A small file of numbers that is added to those of a model and changes what it says. Without it, the "
    "model is the original one.",
    "AUC": "Area under the curve: how often a score tells a forgotten row from one that the model never saw, if it "
    "is shown one of each. 0.5 is as good as tossing a coin; near 1, or near 0, the two are easily told apart.",
    "forget rows": "The examples that the model was to forget: questions with answers, or texts.",
    "gold standard": "A model taught in the same way that never saw the forget rows. Nothing can be forgotten better "
    "than by never having seen it.",
    "greedy": "Of all answers the one that the model finds likeliest, word by word. It is the same every time.",
    "holdout": "Rows of the same kind as the forget rows that the model never saw, to compare with.",
    "KL": "Kullback–Leibler divergence: how far what the model would say is from what the original model would say. "
    "0 is no difference.",
    "KS": "Kolmogorov–Smirnov test: whether the scores of two models on the same rows look alike. Its p-value is "
    "near 0 if they do not.",
    "leak test": "An attempt to get at what was forgotten in another way than by asking.",
    "LoRA": "Low-rank adaptation: the usual way to make an adapter.",
    "LOSS": "The simplest score for guessing whether a model was trained on a text: how unlikely the text is to it.",
    "LUME": "A published set of rows, and the rules by which forgetting them is scored (SemEval-2025 Task 4).",
    "MIA": "Membership inference attack: guessing from a model's figures whether it was trained on a text.",
    "Min-K%": "A score for guessing whether a model was trained on a text: how unlikely its least likely words are. "
    "Min-K%++ compares each of them with the other words that could have stood there.",
    "MMLU": "A published set of exam questions in many subjects, as a measure of what a model knows in general.",
    "nat": "The unit of NLL and KL. An answer token with an NLL of 1 nat has a probability of 37%, with 3 nats of 5%.",
    "NF4": "A way to store a model in 4 bits per number, so that it takes less memory.",
    "NLL": "Negative log-likelihood: how unlikely the true answer is to the model. 0 is certainty; the higher, the "
    "less likely it is to come.",
    "overdone": "Forgetting that has gone so far that the answers are less likely than by chance, or far less than "
    "to a model that never saw them. That shows what was removed.",
    "p-value": "How often chance alone would give such a result. Very small: it is hardly chance.",
    "retain rows": "The examples that the model was to keep.",
    "ROUGE-L": "Recall-oriented understudy for gisting evaluation, by longest common subsequence: how much of a text "
    "is in another in the same order. Its recall is how much of the true answer is in what the model says, from 0 "
    "(nothing) to 1 (all of it).",
    "SHA-256": "A fingerprint of a file or text. Whoever has the same file gets the same one; it does not give the "
    "content away.",
    "TOFU": "A published set of questions about invented authors, and the rules by which forgetting them is scored.",
    "token": "A word or a piece of one: what a model reads and writes, one after the other.",
    "zlib": "A score for guessing whether a model was trained on a text: how unlikely the text is to it, by the "
    "size to which it can be compressed.",
}
ABBREVIATIONS = [term for term in GLOSSARY if re.search("[A-Z]", term)]
_TERM = re.compile(rf"(?<![\w-])({'|'.join(map(re.escape, ABBREVIATIONS))})(?!\w)")


def anchor(term: str) -> str:
    """The id of the entry for `term`."""
    return "term-" + re.sub(r"\W+", "-", term.lower()).strip("-")


def linked(text: str) -> Markup:
    """`text`, escaped; each abbreviation leads to its entry where it first occurs."""
    seen: set[str] = set()

    def link(match: re.Match[str]) -> str:
        term = match[1]
        if term in seen:
            return term
        seen.add(term)
        return f'<a class="term" href="#{anchor(term)}">{term}</a>'

    return Markup(_TERM.sub(link, str(escape(text))))
