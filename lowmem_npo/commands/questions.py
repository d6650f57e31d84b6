"""What `lowmem-npo ask` asks: what is typed, the lines of a text, or the questions of a table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem_npo.console import Say
from lowmem_npo.errors import UserError
from lowmem_npo.files import expanded, read_at_most

if TYPE_CHECKING:
    from lowmem_npo.data import Example

QUESTIONS = "question/answer"
ANSWER = "."  # any: only what precedes it is used
MOST_BYTES = 10_000_000  # of a file of questions


def question(text: str, history: Sequence[dict[str, str]] = ()) -> Example:
    """history: the earlier turns of the conversation, if it is one."""
    from lowmem_npo.data import Example

    turns = (*history, {"role": "user", "content": text}, {"role": "assistant", "content": ANSWER})
    where = "The conversation" if history else "The question"
    return Example(text, ANSWER, where, QUESTIONS, messages=turns if history else None)


def questions_in(
    file: str, say: Say, prompt_column: str | None = None, answer_column: str | None = None
) -> list[Example]:
    """The questions of a file: of a table as the run would read it whose columns these are, else its lines.

    Raises:
        UserError: it cannot be read, or is a table without questions.
    """
    from lowmem_npo.data.tables import is_table

    path, columns = expanded(file), (prompt_column, answer_column)
    return _of_table(file, say, *columns) if path.is_file() and is_table(file, path) else _of_lines(path)


def _of_table(file: str, say: Say, prompt_column: str | None, answer_column: str | None) -> list[Example]:
    from lowmem_npo.data import read_rows, to_examples, with_answer
    from lowmem_npo.data.schemas import canonical, listed_columns, recognised_columns, spelled_like

    rows = read_rows(file, columns=[prompt_column, answer_column])
    has_own = prompt_column is not None and bool(spelled_like(prompt_column, rows))
    if not (rows.mixed or has_own) and recognised_columns(canonical(rows).columns) is None:
        raise UserError(
            f"--file: {file} has the columns {listed_columns(rows.columns) or '(none)'}, which are no questions with "
            "answers: name them question and answer, or give a text (.txt) with a question a line."
        )
    examples = to_examples(rows, prompt_column=prompt_column, answer_column=answer_column, or_recognised=True)
    if text := next((one for one in examples if one.is_passage), None):
        raise UserError(f"--file: {text.where} is a text, which holds no question; name a file with questions.")
    for note in rows.notes:
        say(f"{note}.")
    columns = list(dict.fromkeys(name for one in examples for name in one.schema.split("/")[:-1] or [one.schema]))
    named = f"column{'s' * (len(columns) > 1)} {' and '.join(columns)}"
    say(f"The questions are the {named} of {file}; the model is not shown the answers.")
    return with_answer(examples, ANSWER)


def _of_lines(path: Path) -> list[Example]:
    try:
        content = read_at_most(path, MOST_BYTES)
        if len(content) > MOST_BYTES:
            raise UserError(f"--file: '{path}' has more than {MOST_BYTES:,} bytes, which no questions have.")
        lines = re.split(r"\r\n|\r|\n", content.decode("utf-8-sig"))  # a text may hold U+2028 and its like
    except OSError as error:
        raise UserError(f"--file: '{path}' cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--file: '{path}' cannot be read as UTF-8 text: {error}.") from error
    return [question(line.strip()) for line in lines if line.strip()]
