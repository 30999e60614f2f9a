"""Errors that are the user's to mend. Everything else is a bug and keeps its traceback."""

import re

_LINE = 1000  # characters of a message at the most
_INTERNAL = re.compile(r"could not convert|invalid literal|<class |object (?:is|has|cannot)")


def shortened(text: str, most: int = 80) -> str:
    """One line of at most `most` characters that any terminal can print: the middle of a longer
    text is left out, line breaks are spaces, and what no terminal shows as it is (other control
    characters, bytes that were no UTF-8) is escaped."""
    line = re.sub(r"\s*[\t\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*", " ", text)
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    half = (most - 5) // 2
    return line if len(line) <= most else f"{line[:half]} ... {line[-half:]}"


def reason(error: Exception, most: int = 300) -> str:
    """Why a library refused a file, in words that say nothing of Python."""
    if isinstance(error, RecursionError):
        return "nested too deep"
    if isinstance(error, TypeError | AttributeError | LookupError) or _INTERNAL.search(str(error)):
        return "a value is missing or of the wrong kind"
    return shortened(str(error).strip() or type(error).__name__, most)


class _OneLine(Exception):
    """Whatever a message quotes from a file, `str` gives one line of it."""

    def __str__(self) -> str:
        return shortened(super().__str__(), _LINE)


class UserError(_OneLine):
    """A mistake in a flag, a file or a config: one line that says what, where and what to do.

    `main` prints it without a traceback and exits with status 2.
    """


class RejectedRecord(_OneLine):
    """One record of a source that cannot be used; its message is the reason in `rejects.csv`."""


class LeftOutRecord(RejectedRecord):
    """One sound record that a rule of selection leaves out; no sign that the source is faulty."""
