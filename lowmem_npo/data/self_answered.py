"""`--alternatives self`: other answers to the forget rows, which the original model writes itself.

Mekala et al. 2025, "Alternate Preference Optimization for Unlearning Factual Knowledge in Large Language Models"
(AltPO): shown a question with its answer, the model makes up another answer of the same kind, and DPO prefers that to
the one to forget, so that what is said in its place is in the model's own words. Here it is asked for, and, before it
is written, stood in for by rows of the greatest length; `lowmem_npo.commands.train.own_texts` lets the model write.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import regex

from lowmem_npo.data.example import Example
from lowmem_npo.data.templates import Template
from lowmem_npo.data.tokenized_rows import IGNORE_INDEX, TokenizedRow, TokenizedRows
from lowmem_npo.data.tokenizing import Encoder
from lowmem_npo.data.words import appears, tokens
from lowmem_npo.errors import UserError
from lowmem_npo.files import read_json_lines
from lowmem_npo.sources import SELF

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWERS, MOST_ANSWERS = 5, 100  # to each row; 5 as in the authors' code
SHORTEST, LONGEST = 32, 256  # tokens that one may have at least, and at most; between them, twice as many as the answer

OF_CHAT = (
    "{question}Answer: {answer}\n\nWrite another answer in place of this one: in the same form and about as long, but "
    "with other facts. Write the answer and nothing else."
)
OF_BASE = (
    "Question: Where was the old bridge built?\nAnswer: It was built in Oslo.\nAnother answer, with other facts: It "
    "was built in Turin.\n\n{question}Answer: {answer}\nAnother answer, with other facts:"
)


def answers_number(source: str | None) -> int | None:
    """How many answers the model is to write to each row; None where it is to write none.

    Raises UserError for what is neither self nor self:N.
    """
    if source is None:
        return None
    match = SELF.fullmatch(source)
    if match is None:
        raise UserError(
            f"--alternatives {source}: give self, or self:N for N other answers to each row; those that rows have are "
            "named by --alternative-column."
        )
    if not 1 <= (number := int(match["rows"] or ANSWERS)) <= MOST_ANSWERS:
        raise UserError(
            f"--alternatives {source}: give at least 1 answer and at most {MOST_ANSWERS}, as in self:{ANSWERS}."
        )
    return number


def most_tokens(row: TokenizedRow) -> int:
    """That another answer to `row` may have."""
    return min(max(SHORTEST, 2 * (len(row["input_ids"]) - row["prompt_length"])), LONGEST)


def asking(example: Example, tokenizer: PreTrainedTokenizerBase, template: Template) -> list[int]:
    """The ids after which the model writes another answer: a request, or a pattern if it has no chat template."""
    chats = bool(tokenizer.chat_template)
    question = "" if example.prompt is None else f"Question: {example.prompt.strip()}\n"
    text = (OF_CHAT if chats else OF_BASE).format(question=question, answer=example.answer.strip())
    if not chats:
        return Encoder(tokenizer, template).text_ids(text, whole=False)
    asked = Example(text, ".", example.where, "question/answer")
    return Encoder(tokenizer, replace(template, text="chat")).encode(asked)[0]


def other_answer(text: str, example: Example, cut: bool = False) -> str | None:
    """The answer in what the model has written; None if that is nothing, or tells what is to be forgotten.

    cut: whether the model had more to say; then what follows the last sentence is left out, if there is a sentence.
    """
    end = "\n\n" if "\n" in example.answer.strip() else "\n"
    answer, ended, _ = text.strip().removeprefix("Answer:").strip().partition(end)
    if cut and not ended and (sentences := regex.match(r".*\p{STerm}", answer, regex.DOTALL)):
        answer = sentences[0]
    answer = answer.strip()
    words, true = tokens(answer), tokens(example.answer)
    says_little = len("".join(true)) == 1  # a character is in many a sentence
    told = words == true or (appears(example.answer, answer) and not says_little)
    return None if not words or told else answer


def stand_in(rows: TokenizedRows, number: int, limit: int) -> TokenizedRows:
    """`number` times as many rows as `rows`, as long as the longest that can be written, at most `limit` tokens."""
    made = []
    for row in list(rows) * number:
        prompt = row["input_ids"][: row["prompt_length"]]
        ids = [*prompt, *[row["input_ids"][-1]] * (most_tokens(row) + 1)][:limit]
        start = max(len(prompt), 1)
        labels = [IGNORE_INDEX] * start + ids[start:]
        made.append(TokenizedRow(input_ids=ids, labels=labels, prompt_length=row["prompt_length"]))
    return TokenizedRows(made, list(rows.examples) * number, limit)


def with_own_answers(path: Path, examples: Sequence[Example]) -> list[Example]:
    """`examples` with the answers that the file has for each of them.

    Raises UserError for a file that is not of these rows.
    """
    try:
        lines = [line["alternatives"] for line in read_json_lines(path)]
        whole = all(isinstance(line, list) and line and all(isinstance(text, str) for text in line) for line in lines)
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole or len(lines) != len(examples):
        raise UserError(f"'{path}' is damaged or of other rows: remove it, and the model writes other answers anew.")
    return [replace(one, alternatives=tuple(line)) for one, line in zip(examples, lines, strict=True)]
