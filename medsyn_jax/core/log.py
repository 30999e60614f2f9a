"""The terminal: lines, costs, tables and progress bars, from the first process only."""

import math
import resource
import sys
import time
from collections.abc import Sequence

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

_STARTED = time.monotonic()
UNDEFINED = "undefined"
# Paths and names are shown unchanged: no [markup], no :emoji:.
console = Console(stderr=True, highlight=False, markup=False, emoji=False)


def say(text: str) -> None:
    """Print one line on stderr, without line breaks of the terminal's width."""
    if jax.process_index() == 0:
        console.print(text, soft_wrap=True)


def say_cost(event: str) -> None:
    """Print the time since the start of the program and its peak host memory.

    The memory of child processes, such as the workers of an ingestion, is left out.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    mib = peak / (2**20 if sys.platform == "darwin" else 2**10)
    cost = f"{time.monotonic() - _STARTED:.1f} s; peak host memory {mib:.0f} MiB (this process)"
    say(f"{event} after {cost}")


def number(value: float | None, form: str = ".4g") -> str:
    """A figure as text; `UNDEFINED` for None, NaN and infinity, 0 for what rounding leaves."""
    if value is None or not math.isfinite(value):
        return UNDEFINED
    return format(value if abs(value) > 1e-12 else 0.0, form)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows of text below `head` on stdout: first column left-aligned, others right."""
    if jax.process_index():
        return
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for first, *others in (head, *rows):
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join((first.ljust(widths[0]), *cells)))


def progress_bar(*columns: ProgressColumn) -> Progress:
    """A bar with a text to its left, `columns` to its right and the time left; on a terminal."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *columns,
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal or jax.process_index() > 0,
    )


class ImagesBar:
    """Progress in images: a bar on a terminal, elsewhere a line about every `every_s` seconds.

    Args:
        title: names the work.
        total: number of images.
        done: images of earlier runs, which do not count for the rate.
        every_s: seconds between lines.
    """

    def __init__(self, title: str, total: int, done: int, every_s: float = 10.0):
        self.title, self.total, self.first, self.shown = title, total, done, done
        self.every_s, self.start = every_s, time.monotonic()
        self.shown_at = self.start
        self.bar = progress_bar(
            MofNCompleteColumn(), TextColumn("{task.fields[rate]:.1f} images/s")
        )
        self.task = self.bar.add_task(title, total=total, completed=done, rate=0.0)

    def __enter__(self) -> "ImagesBar":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, done: int) -> None:
        """Show that `done` of the images are finished."""
        now = time.monotonic()
        rate = (done - self.first) / max(now - self.start, 1e-9)
        self.bar.update(self.task, completed=done, rate=rate)
        due = now - self.shown_at > self.every_s or done == self.total
        if due and done != self.shown and not console.is_terminal:
            self.shown_at, self.shown = now, done
            left = (self.total - done) / max(rate, 1e-9)
            say(f"{self.title}: {done}/{self.total} images, {rate:.1f} images/s, {left:.0f} s left")
