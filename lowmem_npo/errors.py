"""The exceptions whose message is meant for the user."""

import re

BREAKS = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]+")  # what a terminal would not show on one line
MOST, KEPT = 300, 120  # characters of a word, and of either end of one that has more


class UserError(Exception):
    """Something the user can fix: bad data, a missing model, an impossible option.

    The message is one clear sentence on what is wrong, where (file and line or row), and what to do. It stays one line
    whatever of the user's it quotes, such as the name of a column that is a page long.
    The command line prints it without a traceback and exits with code 2.
    """

    def __init__(self, message: str = "") -> None:
        line = BREAKS.sub(" ", message)
        super().__init__(re.sub(rf"\S{{{MOST},}}", lambda word: f"{word[0][:KEPT]}…{word[0][-KEPT:]}", line))


class Vanished(OSError):
    """A directory that a command writes into has been removed since it began, or renamed: what it held moved
    with it."""

    def __init__(self, place: object) -> None:
        super().__init__(f"'{place}' has been removed or renamed since the command began")


def one_line(error: BaseException, most: int | None = None) -> str:
    """What another library says, on one line of at most so many characters."""
    return " ".join(str(error).split())[:most]
