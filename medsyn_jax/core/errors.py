"""Errors that the user can correct. Everything else is a bug and keeps its traceback."""

import re

_LINE = 1000  # characters of a message at most
_INTERNAL = re.compile(r"could not convert|invalid literal|<class |object (?:is|has|cannot)")


def shortened(text: str, most: int = 80) -> str:
    """One line of at most `most` characters that any terminal can print: without the middle of a
    longer text, with spaces for line breaks, and with other control characters and bytes that were
    no UTF-8 escaped."""
    line = re.sub(r"\s*[\t\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*", " ", text)
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    half = (most - 5) // 2
    return line if len(line) <= most else f"{line[:half]} ... {line[-half:]}"


def reason(error: Exception, most: int = 300) -> str:
    """Why a library refused a file, in words without Python's types."""
    if isinstance(error, RecursionError):
        return "nested too deep"
    if isinstance(error, TypeError | AttributeError | LookupError) or _INTERNAL.search(str(error)):
        return "a value is missing or of the wrong kind"
    return shortened(str(error).strip() or type(error).__name__, most)


class _OneLine(Exception):
    """`str` is one line, whatever a message quotes from a file."""

    def __str__(self) -> str:
        return shortened(super().__str__(), _LINE)


class UserError(_OneLine):
    """A mistake in a flag, a file or a config: one line that says what, where and what to do.

    `main` prints it without a traceback and exits with status 2.
    """


class RejectedRecord(_OneLine):
    """A record of a source cannot be used; the message is the reason in `rejects.csv`."""


class LeftOutRecord(RejectedRecord):
    """A rule of selection leaves out a sound record; no sign of a faulty source."""
