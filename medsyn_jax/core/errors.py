"""Errors that are the user's to mend. Everything else is a bug and keeps its traceback."""

import re

_LINE = 1000  # characters of a message at the most


def shortened(text: str, most: int = 80) -> str:
    """One line of at most `most` characters that any terminal can print: the middle of a longer
    text is left out, control characters are spaces, and bytes that were no UTF-8 are escaped."""
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", text)
    text = text.encode("utf-8", "backslashreplace").decode()
    half = (most - 5) // 2
    return text if len(text) <= most else f"{text[:half]} ... {text[-half:]}"


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
