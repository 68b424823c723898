"""What ends a run on purpose: a user's mistake, a stop that all ranks agreed on, ranks that are gone."""


class UserError(Exception):
    """Bad input. The text is one line: what, the value, and what would work. Exit code 2.

    Names and values in it come from files and command lines: their control characters are escaped.
    """

    def __init__(self, line):
        super().__init__(printable(line))


class OutOfMemory(UserError):
    """One rank's own error: the others do not have it, and wait for that rank."""


def printable(text) -> str:
    """A text with its line breaks, control characters and lone surrogates escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


class Stop(BaseException):
    """All ranks agreed to end before the work is complete; what was computed is saved.

    Raised after a signal only, so plain python then dies of that signal (see `distributed`).
    No Exception: a library that retries or reports whatever fails must not catch it.
    """


class LostRanks(RuntimeError):
    """Another rank did not come to a reduction."""
