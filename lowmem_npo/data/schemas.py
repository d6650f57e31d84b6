"""From the rows of any recognised schema to one form, the `Example`.

Recognised by their columns, in this order:

| columns | known from | an example is |
|---|---|---|
| `messages` or `conversations` | chat data, ShareGPT | a conversation; its last turn, the assistant's, is the answer |
| `instruction`, `input`, `output` | Alpaca | prompt (the instruction, then the input if there is any) and answer |
| `instruction`, `context`, `response` | Dolly | the same |
| `input`, `output` | LUME, SemEval-2025 Task 4 | prompt and answer |
| `question`, `answer` | TOFU | prompt and answer |
| `prompt`, `completion` | TRL | prompt and answer, or both as lists of messages |
| `text` | language modelling | no prompt; the whole text is the answer |
"""

from __future__ import annotations

import json
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lowmem_npo.data.cells import check_json, label, no_value, optional, parsed_json, text_of, without_nan, without_none
from lowmem_npo.data.example import JOINED, PARAPHRASED, PASSAGE, Example
from lowmem_npo.data.other_columns import BESIDE, READERS, check_beside, paraphrases_of
from lowmem_npo.data.rows import Rows, is_text
from lowmem_npo.data.special_texts import check_marks
from lowmem_npo.data.turns import (
    CALLS,
    SYSTEM,
    TURNS,
    continued,
    is_turns,
    message,
    turn,
    turns_in_cell,
    turns_in_cells,
)
from lowmem_npo.errors import UserError
from lowmem_npo.sizes import first_of

CHAT = ("messages", "conversations")
INSTRUCTIONS = {"output": "input", "response": "context"}  # answer -> what may follow the instruction
PAIRS = (*(("instruction", answer) for answer in INSTRUCTIONS), ("input", "output"), ("question", "answer"),
         ("prompt", "completion"))  # fmt: skip
READ = ("id", "system", "history", "tools", "chat_template_kwargs", "text", "context")  # beside those above
TEXT = (None, "text")
MOST_LISTED = 20  # columns in a message, or in a line of the report
UNTRAINED = ("weight", "train", "training")  # how fine-tuning formats leave a turn out: OpenAI's 0, Axolotl's false


def to_examples(
    rows: Rows,
    *,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    alternative_column: str | None = None,
    group_column: str | None = None,
    paraphrase_column: str | None = None,
    or_recognised: bool = False,
) -> list[Example]:
    """One Example per row. Named columns take precedence; an answer column alone means text without a prompt. Columns
    are known whatever their case, in each file by itself. The rows of a mixed source have columns of their own, which
    need no names. NaN counts as missing.

    or_recognised: whether a file that has neither the prompt's nor the answer's named column is read by columns that
        are recognised: the names are given once for all sets of a run, of which each may have its own
        (`check_some_have`).

    Raises UserError, naming the columns, when no schema fits, and with file and line for a missing, empty or non-text
    field.
    """
    rows = replace(rows, rows=[without_nan(row) for row in rows.rows])
    named = prompt_column, answer_column
    beside = {"alternatives": alternative_column, "paraphrases": paraphrase_column, "group": group_column}
    examples = [one for file in rows.by_file() for one in _of_file(file, *named, or_recognised, beside)]
    for option, column in ((BESIDE["group"], group_column), (BESIDE["paraphrases"], paraphrase_column)):
        if column and not spelled_like(column, rows):
            raise UserError(f"{option}: {_has_no_column(rows, column)}")
    if paraphrase_column and not any(one.paraphrases for one in examples):
        raise UserError(f"{rows.name} has no value in {paraphrase_column}; name another --paraphrase-column, or none.")
    if group_column and all(one.group is None for one in examples):
        raise UserError(f"{rows.name} has no value in {group_column}; name another --group-column, or leave it out.")
    return examples


def check_some_have(columns: Collection[str], prompt_column: str | None, answer_column: str | None) -> None:
    """Raises UserError for a named column that is not among those of the tables of all sets."""
    for option, column in (("--prompt-column", prompt_column), ("--answer-column", answer_column)):
        if column and not _like(column, columns):
            raise UserError(
                f"{option} {column}: no file has such a column; they have {listed_columns([*columns]) or '(none)'}."
            )


def _of_file(
    rows: Rows,
    prompt_column: str | None,
    answer_column: str | None,
    or_recognised: bool,
    beside: Mapping[str, str | None],
) -> list[Example]:
    """The examples of one file. beside: what else they have, and the column that holds it, which every file must have
    of alternatives, and some file of the others."""
    own = {
        name: _named(column, rows, BESIDE[name])
        for name, column in beside.items()
        if column and (name == "alternatives" or spelled_like(column, rows))
    }
    if rows.mixed:
        check_beside(rows, own)
        examples = [_of_mixed(row, rows.where(index)) for index, row in enumerate(rows.rows)]
    else:
        spelled = canonical(rows)
        columns = _choose_columns(spelled, prompt_column, answer_column, or_recognised)
        prompts, answers = (column and _named(column, rows) for column in columns)  # as the rows spell them
        check_beside(rows, own, prompts, answers)
        examples = [_example(row, rows.where(index), *columns) for index, row in enumerate(spelled.rows)]
    for name, column in own.items():
        pairs = zip(examples, rows.rows, strict=True)
        examples = [replace(one, **{name: READERS[name](row, column, one)}) for one, row in pairs]
    return examples


def _of_mixed(row: dict[str, Any], where: str) -> Example:
    example = _example(row, where, *recognised_columns(row) or TEXT)
    schema = PASSAGE if example.schema == "input/output" else example.schema
    return replace(example, schema=schema, continues=bool(row.get("continues")))


def canonical(rows: Rows) -> Rows:
    """The same rows, with known columns spelled as they are known: `Question` and ` ANSWER` become question and answer.

    Raises UserError where two columns would become one.
    """
    pairs = {column for pair in PAIRS for column in pair}
    known = {*CHAT, *INSTRUCTIONS.values(), *pairs, *READ, *(PARAPHRASED + column for column in pairs)}
    columns = rows.columns
    spelled: dict[str, str] = {}
    for column in columns:
        name = column.strip().casefold()
        if name in known and name not in columns:
            if twice := next((other for other, as_ in spelled.items() if as_ == name), None):
                raise UserError(f"{rows.name} has the columns {twice!r} and {column!r}; rename one of the two.")
            spelled[column] = name
    if not spelled:
        return rows
    return replace(rows, rows=[{spelled.get(column, column): row[column] for column in row} for row in rows.rows])


def with_answer(examples: Sequence[Example], refusal: str) -> list[Example]:
    """The same prompts, each answered by `refusal`: what the forget terms `idk` and `jensun` teach.

    Raises UserError for a row without a prompt: there is no question to refuse.
    """
    if not is_text(refusal):
        raise UserError("--refusal is not UTF-8 text; write it as UTF-8.")
    check_marks("--refusal", refusal)
    if not refusal.strip():
        raise UserError("The refusal is empty; give --refusal the sentence that the model is to answer instead.")
    for example in examples:
        if example.prompt is None:
            raise UserError(
                f"{example.where} is text without a question, so there is nothing to refuse; "
                "use a forget term that teaches no refusal, or rows with a prompt."
            )
    return [replace(_answered(one, refusal), continues=False) for one in examples]  # nothing comes after a refusal


def with_alternatives(examples: Sequence[Example]) -> list[Example]:
    """The same prompts answered by the first alternative of each, then by the second of each, and so on; a row with
    fewer than another begins anew. Every example must have one."""
    most = max(len(one.alternatives) for one in examples)
    return [_answered(one, one.alternatives[n % len(one.alternatives)]) for n in range(most) for one in examples]


def _answered(example: Example, answer: str) -> Example:
    """The space before the answer stays where rows are joined as they are: a text of ours begins without one."""
    if example.schema in JOINED and not answer[:1].isspace():
        answer = example.answer[: len(example.answer) - len(example.answer.lstrip())] + answer
    return replace(example, answer=answer, messages=_with_last_turn(example.messages, answer))


def _with_last_turn(messages: tuple[dict[str, Any], ...] | None, content: str) -> tuple[dict[str, Any], ...] | None:
    return messages and (*messages[:-1], {"role": "assistant", "content": content})


def _choose_columns(
    rows: Rows, prompt_column: str | None, answer_column: str | None, or_recognised: bool
) -> tuple[str | None, str]:
    """The prompt column (None for text) and the answer column; the same one twice for conversations."""
    columns = rows.columns
    if prompt_column and not answer_column:
        raise UserError(f"The answer column of {rows.name} is missing; name it with --answer-column.")
    named = list(filter(None, (prompt_column, answer_column)))
    if answer_column and (not or_recognised or any(_like(column, columns) for column in named)):
        return prompt_column and _named(prompt_column, rows), _named(answer_column, rows)
    if chosen := recognised_columns(columns):
        return chosen
    known = f"({'; '.join('/'.join(pair) for pair in PAIRS)}; {'; '.join(CHAT)}; text)"
    listed = listed_columns(columns) or "(none)"
    if named:
        options = "--prompt-column and --answer-column" if prompt_column else "--answer-column"
        raise UserError(
            f"{rows.name} has the columns {listed}: neither {' nor '.join(named)}, named by {options} for all files, "
            f"nor a recognised pair {known}; rename them as in the other files."
        )
    raise UserError(
        f"{rows.name} has the columns {listed}, none of which is a recognised pair {known}; name yours with "
        "--prompt-column and --answer-column."
    )


def _named(column: str, rows: Rows, option: str | None = None) -> str:
    """The column as the rows spell it: as named, else the only one that differs in case."""
    alike = spelled_like(column, rows)
    if column in alike:
        return column
    if len(alike) != 1:
        raise UserError((f"{option}: " if option else "") + _has_no_column(rows, column))
    return alike[0]


def _has_no_column(rows: Rows, column: str) -> str:
    return f"{rows.name} has no column {column}; it has {listed_columns(rows.columns)}."


def spelled_like(column: str, rows: Rows) -> list[str]:
    """The columns of the rows that have this name, whatever its case."""
    return _like(column, rows.columns)


def _like(column: str, columns: Iterable[str]) -> list[str]:
    return [other for other in columns if other.strip().casefold() == column.strip().casefold()]


def having(columns: Mapping[str, str | None], rows: Rows) -> dict[str, str]:
    """Of what holds paraphrases (`paraphrase_column`), or what a row is about (`group_column`), and is named, the
    columns in which some row has any."""

    def read(option: str, row: dict[str, Any], name: str, where: str) -> Any:
        return paraphrases_of(row, name, where) if option == "paraphrase_column" else label(row.get(name))

    return {
        option: column
        for option, column in columns.items()
        if column is not None
        and any(
            read(option, without_nan(row), name, rows.where(index))
            for name in spelled_like(column, rows)
            for index, row in enumerate(rows.rows)
        )
    }


def listed_columns(columns: Sequence[str]) -> str:
    """The first of those that have a name, for a line: a header that ends in a separator has one more column."""
    return first_of([column for column in columns if column.strip()], MOST_LISTED, ", ")


def recognised_columns(columns: Container[str]) -> tuple[str | None, str] | None:
    """Those of a known schema, of prompt and answer, if there is one."""
    for column in CHAT:
        if column in columns:
            return column, column
    for prompt, answer in PAIRS:
        if prompt in columns and answer in columns:
            return prompt, answer
    return TEXT if "text" in columns else None


def _example(row: dict[str, Any], where: str, prompt_column: str | None, answer_column: str) -> Example:
    identity = label(row.get("id"))
    if prompt_column is None:
        value = row.get(answer_column)
        value = value if answer_column == TEXT[1] else turns_in_cell(value, answer_column, where)
        if is_turns(value):  # preference data without a prompt of its own
            return _conversation(value, row, where, answer_column, identity)
        return Example(None, text_of(row, answer_column, where), where, answer_column, identity)
    if prompt_column == answer_column and prompt_column in CHAT:
        return _conversation(row.get(prompt_column), row, where, prompt_column, identity)
    prompt, answer = turns_in_cells(row, (prompt_column, answer_column), where)
    schema = f"{prompt_column}/{answer_column}"
    if is_turns(prompt) or is_turns(answer):  # TRL's conversational form
        turns = prompt if is_turns(prompt) else [turn("user", text_of(row, prompt_column, where))]
        last = answer if is_turns(answer) else [turn("assistant", text_of(row, answer_column, where))]
        return _conversation(
            continued(turns, last, (prompt_column, answer_column), where), row, where, schema, identity
        )
    prompt, answer = text_of(row, prompt_column, where), text_of(row, answer_column, where)
    if prompt_column != "instruction":
        return Example(
            prompt, answer, where, schema, identity, paraphrases=paraphrases_of(row, PARAPHRASED + prompt_column, where)
        )
    beside = [INSTRUCTIONS.get(answer_column, "input")]
    if answer_column in INSTRUCTIONS:  # Alpaca's also before a response, Dolly's also before an output
        beside += INSTRUCTIONS.values()
    if more := next((column for column in beside if column != answer_column and optional(row, column)), None):
        prompt, schema = f"{prompt}\n{text_of(row, more, where)}", f"instruction/{more}/{answer_column}"
    history = parsed_json(optional(row, "history")) or []
    if not (history or optional(row, "system")):
        return Example(prompt, answer, where, schema, identity)
    if not isinstance(history, list) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in history):
        raise UserError(f"{where}: {no_value('history', 'a list of [question, answer]', history)}")
    turns = [turn(role, text) for pair in history for role, text in zip(("user", "assistant"), pair, strict=True)]
    return _conversation([*turns, turn("user", prompt), turn("assistant", answer)], row, where, schema, identity)


def _conversation(messages: Any, row: dict[str, Any], where: str, schema: str, identity: str | None) -> Example:
    messages = parsed_json(messages)
    if messages is None or messages == []:
        raise UserError(f"{where} has no {schema}; fill the field or remove the row.")
    if not is_turns(messages):
        raise UserError(f"{where}: {no_value(schema, TURNS, messages)}")
    turns = [message(turn, f"{where}, message {number}") for number, turn in enumerate(messages, 1)]
    if optional(row, "system") and turns[0]["role"] not in SYSTEM:
        turns.insert(0, turn("system", text_of(row, "system", where)))
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise UserError(
            f"{where}: the conversation does not end with an assistant's answer to an earlier message; "
            "remove the row, or what follows the answer."
        )
    for mark in UNTRAINED:
        if (value := turns[-1].get(mark, 1)) != 1:
            raise UserError(
                f"{where}: the answer has {mark} {value!r}, which keeps it out of training; remove the row, or the "
                f"{mark}."
            )
    options = without_none(parsed_json(optional(row, "chat_template_kwargs")) or {})
    if not isinstance(options, dict):
        raise UserError(f"{where}: {no_value('chat_template_kwargs', 'an object', options)}")
    if tools := without_none(parsed_json(optional(row, "tools"))):
        if not isinstance(tools, list):
            raise UserError(f"{where}: {no_value('tools', 'a list', tools)}")
        options = {**options, "tools": tools}
    check_json(where, [turns, options])
    said = turns[-1]["content"]
    answer = said if said.strip() else json.dumps([turns[-1].get(call) for call in CALLS])
    return Example(turns[-2]["content"], answer, where, schema, identity, tuple(turns), options)
