"""Curves on a plot, in pixels."""

from collections.abc import Sequence
from typing import NamedTuple

_WIDE, _LEFT = 560, 44  # pixels of a plot, and of its left margin


class Line(NamedTuple):
    """A curve of the page: its color is that of the arm, its dashes are those of the method."""

    label: str
    color: str
    dashes: str
    points: list[tuple[float, float]]  # in the units of the axes; of `plot`, in pixels


class Curves(NamedTuple):
    """A plot in pixels: ticks (place, text), and curves; `dots` marks their points."""

    title: str
    width: int
    height: int
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[Line]
    dots: bool


def plot(
    title: str,
    lines: Sequence[Line],
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[float],
    height: int = 260,
    dots: bool = False,
) -> Curves:
    """Lines on axes from the first tick to the last one; ticks are (value, text) or values."""
    start, low, high = x_ticks[0][0], y_ticks[0], y_ticks[-1]
    width = max(x_ticks[-1][0] - start, 1e-3)

    def x(value: float) -> float:
        return round(_LEFT + 10 + (_WIDE - _LEFT - 50) * (value - start) / width, 1)

    def y(value: float) -> float:
        return round(10 + (height - 50) * (high - value) / (high - low), 1)

    placed = [line._replace(points=[(x(a), y(b)) for a, b in line.points]) for line in lines]
    columns = [(x(value), text) for value, text in x_ticks]
    rows = [(y(value), f"{value:.2f}") for value in y_ticks]
    return Curves(title, _WIDE, height, columns, rows, placed, dots)
