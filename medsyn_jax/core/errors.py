"""Errors that are the user's to mend. Everything else is a bug and keeps its traceback."""


class UserError(Exception):
    """A mistake in a flag, a file or a config: one line that says what, where and what to do.

    `main` prints it without a traceback and exits with status 2.
    """


class RejectedRecord(Exception):
    """One record of a source that cannot be used; its message is the reason in `rejects.csv`."""


class LeftOutRecord(RejectedRecord):
    """One sound record that a rule of selection leaves out; no sign that the source is faulty."""
