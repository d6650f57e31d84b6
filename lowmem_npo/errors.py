"""The one exception whose message is meant for the user."""


class UserError(Exception):
    """Something the user can fix: bad data, a missing model, an impossible option.

    The message is one clear sentence on what is wrong, where (file and line or row), and what to do.
    The command line prints it without a traceback and exits with code 2.
    """
