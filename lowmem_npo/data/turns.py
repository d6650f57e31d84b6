"""The turns of a conversation: who speaks, and what is said, in the spelling of chat templates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeGuard

from lowmem_npo.data.cells import as_python, folded, no_value, parsed_json, text_of, without_none
from lowmem_npo.errors import UserError

TURNS = 'a list of {"role": ..., "content": ...}'
CALLS = ("tool_calls", "function_call")  # what an assistant may say instead of text
LABELS = ("id", "type")  # of a call, which says nothing by them
SYSTEM = ("system", "developer")  # roles of the system prompt
OWN_ROLES = ("system", "developer", "user", "assistant", "tool", "ipython", "function")
# What ShareGPT and its kin call the roles of a chat template.
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
         "model": "assistant", "observation": "tool", "function_response": "tool"}  # fmt: skip


def is_turns(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value)


def turns_in_cell(value: Any, column: str, where: str) -> Any:
    """The value of a column; where it is turns, written as JSON in a string, as a cell of a CSV has them, the turns.

    Raises UserError for turns as Python shows them, which would be taken for text.
    """
    if not isinstance(value, str):
        return value
    if have_roles(turns := parsed_json(value)):
        return turns
    if have_roles(as_python(value)):
        raise UserError(f"{where}: {no_value(column, TURNS, value)}")
    return value


def turns_in_cells(row: dict[str, Any], columns: tuple[str, str], where: str) -> tuple[Any, Any]:
    """The values of a prompt's and an answer's column; where both are turns, written as JSON in strings, the turns.
    What looks like turns beside a text is text, unless they begin with this text.

    Raises UserError for turns as Python shows them, which would be taken for text.
    """
    values = row.get(columns[0]), row.get(columns[1])
    read = parsed_json(values[0]), parsed_json(values[1])
    if all(map(have_roles, read)):
        return read
    if begin_with(read[1], values[0]):
        return values[0], read[1]
    shown = [as_python(one) if isinstance(one, str) else one for one in read]
    if all(map(have_roles, shown)) or begin_with(shown[1], values[0]):
        pairs = zip(columns, read, shown, strict=True)
        column, value = next((of, one) for of, one, turns in pairs if isinstance(one, str) and have_roles(turns))
        raise UserError(f"{where}: {no_value(column, TURNS, value)}")
    return values


def have_roles(value: Any) -> bool:
    """Whether it is a list of turns, each with the role of somebody who may speak."""
    return is_turns(value) and all(
        isinstance(role := one.get("role", one.get("from")), str) and (role in ROLES or role in OWN_ROLES)
        for one in value
    )


def begin_with(turns: Any, text: Any) -> bool:
    """Whether the first that a user says in `turns`, but for a system prompt, is this text."""
    if not (isinstance(text, str) and have_roles(turns)):
        return False
    first: Mapping[str, Any] = next((one for one in turns if _role(one) not in SYSTEM), {})
    content = first.get("content", first.get("value"))
    return _role(first) == "user" and isinstance(content, str) and folded(content) == folded(text)


def _role(turn: Mapping[str, Any]) -> Any:
    role = turn.get("role", turn.get("from"))
    return ROLES.get(role, role)


def calls_of(turn: Mapping[str, Any]) -> str:
    """What is called in a turn, functions and arguments, the same however it is spelled; empty where nothing is."""
    calls = parsed_json(turn.get("tool_calls")) or []
    calls = [*(calls if isinstance(calls, list) else [calls]), parsed_json(turn.get("function_call"))]
    functions = [call.get("function", call) if isinstance(call, dict) else call for call in calls if call]
    said = [
        {key: parsed_json(value) for key, value in one.items() if key not in LABELS} if isinstance(one, dict) else one
        for one in functions
    ]
    return json.dumps(said, sort_keys=True, ensure_ascii=False) if said else ""


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def message(turn: dict[str, Any], where: str) -> dict[str, Any]:
    """A turn with `role` and `content`, whatever else it has, and nothing that is null."""
    turn = without_none(turn)
    if "role" not in turn and "from" in turn:  # ShareGPT
        turn = {"role": turn.pop("from"), "content": turn.pop("value", None), **turn}
    role = ROLES.get(role := text_of(turn, "role", where), role)
    if role not in OWN_ROLES:
        raise UserError(f"{where} is from {role!r}; a turn is from system, user, assistant or tool.")
    if isinstance(parts := turn.get("content"), list):
        for part in parts:
            if not (isinstance(part, dict) and isinstance(part.get("text"), str)):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise UserError(
                    f"{where}: content has a part of type {kind}, which is no {{'type': 'text', 'text': ...}}; only "
                    "text can be forgotten."
                )
        turn["content"] = "".join(part["text"] for part in parts)
    may_be_empty = role not in ("user", "assistant") or any(turn.get(call) for call in CALLS)
    if may_be_empty:
        turn.setdefault("content", "")
    if not (may_be_empty and isinstance(turn["content"], str)):
        text_of(turn, "content", where)
    return {**turn, "role": role}


def continued(
    prompt: list[dict[str, Any]], completion: list[dict[str, Any]], columns: tuple[str, str], where: str
) -> list[dict[str, Any]]:
    """The conversation that a prompt's turns and its completion's are. The completion may hold the prompt's turns
    again, as preference data does, and either may bring the system prompt.

    Raises UserError for a completion that is a whole conversation and begins otherwise than the prompt.
    """
    asked, said = (
        [message(one, f"{where}, {column}, message {number}") for number, one in enumerate(turns, 1)]
        for column, turns in zip(columns, (prompt, completion), strict=True)
    )
    system, own = ([one for one in turns[:1] if one["role"] in SYSTEM] for turns in (asked, said))
    before, after = asked[len(system) :], said[len(own) :]
    other = _difference(before, after, len(own) + 1)
    if system and own and (unlike := _difference(system, own)):
        other = unlike
    elif other is None:
        return [*(system or own), *after]
    elif not (after and after[0]["role"] == "user") or _go_on(before, after):
        return [*(system or own), *before, *after]
    raise UserError(
        f"{where}: {columns[1]} is a whole conversation that begins otherwise than {columns[0]} ({other}); make the "
        f"two begin alike, or leave in {columns[1]} only what follows {columns[0]}."
    )


def _go_on(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> bool:
    """Whether a user's turn follows an answer, and is not the first of the conversation again."""
    return bool(before) and before[-1]["role"] == "assistant" and _difference(before[:1], after) is not None


def _difference(turns: list[dict[str, Any]], others: list[dict[str, Any]], first: int = 1) -> str | None:
    """In what others, whose first message has this number, begin otherwise than these turns; None where they do not."""
    for number, (one, other) in enumerate(zip(turns, others, strict=False), first):
        if one["role"] != other["role"]:
            return f"its message {number} is from {other['role']}, not from {one['role']}"
        if folded(one["content"]) != folded(other["content"]) or calls_of(one) != calls_of(other):
            return f"its message {number}, from {one['role']}, is another"
    return "it ends before" if len(others) < len(turns) else None
