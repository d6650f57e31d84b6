"""Sentences on a mistyped option or value, with what was meant."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence

from lowmem_npo.files import expanded
from lowmem_npo.ranges import shortened

HELP = "--help"  # of every command
LISTED = 16  # choices that a sentence names


def no_such_option(flag: str, known: Sequence[str], listing: str) -> str:
    """flag: as typed. listing: the command that prints what there is."""
    name = flag.partition("=")[0]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.75) or [k for k in known if k.startswith(f"{name}-")]
    hint = f"did you mean {near[0]}? " if near else ""
    return f"There is no option {shortened(flag)}: {hint}`lowmem-npo {listing}` lists them."


def one_of(flag: str, value: str, choices: Sequence[str]) -> str:
    """The value of `flag` is none of its choices: which they are, or where there are many, which are near."""
    near = difflib.get_close_matches(value, choices, n=3, cutoff=0.6)
    meant = f"; did you mean {' or '.join(near[: 1 if len(choices) <= LISTED else 3])}?" if near else "."
    if len(choices) <= LISTED:
        return f"{flag} must be one of {', '.join(choices)}, not '{shortened(value)}'{meant}"
    some = "" if near else f"; there are {', '.join(choices[:LISTED])} and others"
    return f"{flag} has no such value as '{shortened(value)}'{some}{meant}"


def _as_value(word: str, flags: Sequence[str]) -> str:
    """The option that a directory without one may have been meant for, a clause."""
    folder = expanded(word)
    flag = "--model" if os.path.isfile(folder / "config.json") else "--adapter"  # not of Path: a word may be long
    return f": did you mean {flag} {shortened(word)}?" if os.path.isdir(folder) and flag in flags else ";"


def _is_no_flag(word: str, flags: Sequence[str]) -> bool:
    flag = word.partition("=")[0].replace("_", "-")
    return flag.startswith("--") and not {flag, flag.replace("--no-", "--", 1)} & {*flags}


def explained(box: str, flags: Sequence[str], command: str, arguments: Sequence[str]) -> str:
    """What tyro says in a box (a title, then parts between rules), as a sentence.

    flags: all that there are; none if others may be given. arguments: what was typed.
    """
    parts = re.split(r"^[│| ]*(?:[─-]{4,}|╰).*$", box.partition("\n")[2], flags=re.MULTILINE)
    parts = [part for part in parts if part.strip("│| \n")]
    texts = [" ".join(line.strip("│| ") for line in part.splitlines()).strip() for part in parts]
    for text in texts:
        if flags and text.startswith("Unrecognized options:"):
            words = re.split("[ ,]+", text.partition(": ")[2])
            if [*flags] == [HELP]:
                return f"'{shortened(words[0])}' belongs to no option; {command} takes none."
            if wrong := [word for word in words if word.startswith("--")]:
                return no_such_option(wrong[0], flags, f"{command} --help")
            meant = _as_value(words[0], flags)
            return f"'{shortened(words[0])}' belongs to no option{meant} `lowmem-npo {command} --help` lists them."
    sentence = texts[0] if texts else "the options cannot be read"
    if sentence.startswith("Missing from"):
        names = re.findall(r"^[│|]? {5,6}(?! )(\S+)", parts[0], re.MULTILINE)
        sentence = f"{' and '.join(names)} must be given"
    elif match := re.match(r"Missing value for argument '[('\"]*([\w-]+)", sentence):
        sentence = f"{match[1]} needs a value"
        if not match[1].startswith("-"):  # known by its place, which tyro says, too, where what precedes it is mistyped
            if flags and (wrong := [word for word in arguments if _is_no_flag(word, flags)]):
                return no_such_option(wrong[0], flags, f"{command} --help")
            sentence = f"{match[1].upper()} must be given"
    elif match := re.match(r"invalid choice '(.*)' for argument '(\S+)'\. Expected one of \((.*)\)", sentence):
        choices = match[3].replace("'", "").rstrip(",").split(", ")
        if "None" in choices:  # of an option that may be left out, in no order
            choices = sorted({*choices} - {"None"})
        return one_of(match[2], match[1], choices)
    elif match := re.match(r"Error parsing (\S+): no type matching INT\|\{(\w+)\} .*from \['(.*?)'\]", sentence):
        sentence = f"{match[1]} must be a whole number or {match[2]}, not '{match[3]}'"
    elif match := re.match(r"Error parsing (\S+): .*\b(int|float)\b[^']*'(.*)'$", sentence):
        sentence = f"{match[1]} must be {'a whole number' if match[2] == 'int' else 'a number'}, not '{match[3]}'"
    return f"{shortened(sentence.rstrip('.'))}; `lowmem-npo {command} --help` explains the options."
