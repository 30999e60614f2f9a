"""The film: maps of path lengths on a pixel grid, and the exposure that turns them into grey.

Lengths are in half film widths (about 20 cm), across the film and along the beam alike.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TypeVar

import numpy as np

from medsyn_jax.phantom.thorax import SIGN, Array, Point, Pose

Number = TypeVar("Number", float, np.ndarray)
Axes = tuple[float, float, float]  # across, down, along the beam
Box = tuple[str, float, float, float, float]  # label, x0, y0, x1, y1 in pixels
WIDTHS = (0.0045, 0.010, 0.019)  # Gaussian widths of the strokes: fine, medium, broad
# attenuation per unit length: soft tissue, what bone adds to it, plastic or thin metal
SOFT, BONE, METAL = 3.4, 5.0, 40.0
MATERIALS = {"soft": SOFT, "bone": BONE, "metal": METAL}
SCATTER = 0.25  # scattered over primary radiation behind the grid
EQUALIZE = 0.30  # share of the wide changes that the display takes away


class Film:
    """The maps of one exposure, float32 [size, size] unless said otherwise.

    Attributes:
      scale: pixels to a unit of body length.
      x, y: body coordinates, [size, size] and [size, 1].
      body: length in the body, lungs included.
      lung: length in the lungs.
      air: share of air in the lungs, 0..1.
      vessels: length in vessels of the lungs.
      dense: attenuation by everything that is added on top.
      engorged: how much thicker than normal the vessels are.
      masks: bool; 'lungs' as a reader would outline them, 'pneumothorax' and 'effusion'.
      boxes: of the findings that have one.
      strokes: points [n, 3] (x, y, volume) that wait for `draw_strokes`, by (vessel, width).
    """

    def __init__(self, size: int, pose: Pose) -> None:
        self.size, self.pose, self.scale = size, pose, size / 2 / pose.zoom
        step = np.arange(size, dtype=np.float32) * np.float32(2 / size)
        centre = step + np.float32(1 / size - 1)
        v = centre[:, None]
        self.y = pose.zoom * v - pose.shift[1]
        self.x = pose.zoom * (centre[None, :] - pose.tilt * v) - pose.shift[0]
        maps: list[Array] = [np.zeros((size, size), np.float32) for _ in range(5)]
        self.body, self.lung, self.air, self.vessels, self.dense = maps
        names = ("lungs", "pneumothorax", "effusion")
        self.masks = {name: np.zeros((size, size), bool) for name in names}
        self.boxes: list[Box] = []
        self.engorged = 1.0
        self.strokes: dict[tuple[bool, int], list[Array]] = {}

    def pixels(self, x: Number, y: Number) -> tuple[Number, Number]:
        """Body coordinates to (column, row), pixel centres at whole numbers."""
        v = (y + self.pose.shift[1]) / self.pose.zoom
        u = (x + self.pose.shift[0]) / self.pose.zoom + self.pose.tilt * v
        return (u + 1) * (self.size / 2) - 0.5, (v + 1) * (self.size / 2) - 0.5

    def window(self, x: float, y: float, across: float, down: float) -> tuple[slice, slice]:
        """Rows and columns that hold the box x +- across, y +- down."""
        tilted = across + abs(self.pose.tilt) * down
        low, high = self.pixels(x - tilted, y - down), self.pixels(x + tilted, y + down)
        columns, rows = (
            slice(max(0, math.floor(first)), max(0, math.ceil(last) + 1))
            for first, last in zip(low, high, strict=True)
        )
        return rows, columns

    def half(self, side: str) -> tuple[slice, Array]:
        """Columns that hold one side of the body, and x in them, > 0 on this side."""
        middle = float(self.pixels(0.0, 0.0)[0])
        slack = abs(self.pose.tilt) * self.size / 2 + 1
        columns = slice(min(self.size - 1, max(0, math.floor(middle - slack))), self.size)
        if side == "right":
            columns = slice(0, max(1, min(self.size, math.ceil(middle + slack))))
        return columns, self.x[:, columns] * SIGN[side]

    def add_ellipsoid(
        self, target: Array, centre: Point, axes: Axes, angle: float = 0.0, weight: float = 1.0
    ) -> None:
        """Add the chord of an ellipsoid, 2 c sqrt(1 - r^2), to a map [size, size]."""
        cos, sin = math.cos(angle), math.sin(angle)
        a, b, c = axes
        across, down = math.hypot(a * cos, b * sin), math.hypot(a * sin, b * cos)
        rows, columns = self.window(*centre, across, down)
        x, y = self.x[rows, columns] - centre[0], self.y[rows] - centre[1]
        if x.size == 0:
            return
        if angle:
            x, y = x * cos + y * sin, y * cos - x * sin
        x, y = x * (1 / a), y * (1 / b)
        chord = np.maximum(1.0 - x * x - y * y, 0.0)
        np.sqrt(chord, out=chord)
        chord *= 2 * c * weight
        target[rows, columns] += chord

    def ellipsoid(self, material: str, centre: Point, axes: Axes, angle: float = 0.0) -> None:
        """Add an ellipsoid of 'soft', 'bone' or 'metal' on top; a negative depth takes away."""
        self.add_ellipsoid(self.dense, centre, axes, angle, MATERIALS[material])

    def stroke(self, material: str, width: int, path: Array, amount: Array | float) -> None:
        """Queue lines on top: path [..., n, 2], `amount` [..., n] their length along the beam.

        Neighbouring points of a line lie at most 1.5 of its `WIDTHS` apart.
        """
        step = path[..., 1:, :] - path[..., :-1, :]
        gaps = np.hypot(step[..., 0], step[..., 1])
        amount = np.broadcast_to(amount, path.shape[:-1])[..., 1:]
        volume = gaps * amount * (WIDTHS[width] * math.sqrt(2 * math.pi) * MATERIALS[material])
        self.queue(False, width, path[..., 1:, :].reshape(-1, 2), volume.ravel())

    def queue(self, vessel: bool, width: int, path: Array, volume: Array) -> None:
        """Queue points [n, 2], each with its volume: for `vessels`, or else for `dense`."""
        points = np.column_stack((path, volume * self.scale**2)).astype(np.float32)
        self.strokes.setdefault((vessel, width), []).append(points)

    def add_box(self, label: str, path: Array) -> None:
        """Keep the box, cut at the edge of the film, around body coordinates [n, 2]."""
        column, row = self.pixels(path[:, 0], path[:, 1])
        edges = (column.min(), row.min(), column.max() + 1, row.max() + 1)
        x0, y0, x1, y1 = (float(np.clip(edge, 0, self.size)) for edge in edges)
        self.boxes.append((label, x0, y0, x1, y1))

    def draw_strokes(self) -> None:
        """Add the queued lines to `vessels` and `dense`, with one blur for each map and width."""
        for (vessel, width), batches in self.strokes.items():
            image = self._splat(np.concatenate(batches))
            # sharing among four pixels has already blurred a point a little
            sigma = math.sqrt(max(0.0, (WIDTHS[width] * self.scale) ** 2 - 0.15))
            if sigma > 0.3:
                image = _blur(_blur(image, sigma).T, sigma).T
            target = self.vessels if vessel else self.dense
            target += image
        self.strokes.clear()

    def _splat(self, points: Array) -> Array:
        """Share each point [x, y, volume] among its four pixels: [size, size]."""
        size = self.size + 2  # a margin catches what falls off the film
        column, row = self.pixels(points[:, 0], points[:, 1])
        column = np.minimum(np.maximum(column + 1, 0), size - 1.001)
        row = np.minimum(np.maximum(row + 1, 0), size - 1.001)
        left, top = column.astype(np.int64), row.astype(np.int64)
        column -= left
        row -= top
        low = points[:, 2] * row
        high = points[:, 2] - low
        image = np.zeros((size, size), np.float32)
        pixels, place = image.ravel(), top * size + left
        for mass, corner in ((high, place), (low, place + size)):
            right = mass * column
            np.add.at(pixels, corner, mass - right)
            np.add.at(pixels, corner + 1, right)
        return image[1:-1, 1:-1]


def _blur(image: Array, sigma: float) -> Array:
    """Gaussian blur down the rows by shifted sums: for short kernels faster than scipy's."""
    reach = math.ceil(2.2 * sigma)
    kernel = np.exp(-0.5 * (np.arange(reach + 1, dtype=np.float32) / np.float32(sigma)) ** 2)
    kernel /= 2 * kernel.sum() - 1
    out = image * kernel[0]
    for shift in range(1, reach + 1):
        part = image * kernel[shift]
        out[shift:] += part[:-shift]
        out[:-shift] += part[shift:]
    return out


@lru_cache(maxsize=32)
def _spline(size: int, cells: int) -> Array:
    """Cubic B-spline weights [size, cells] of a coarse noise field along one side of the film."""
    place = (np.arange(size) + 0.5) / size * (cells - 3) + 1
    base = np.floor(place).astype(int)
    t = place - base
    weights = np.zeros((size, cells), np.float32)
    rows = np.arange(size)
    splines = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
    for offset, spline in enumerate(splines, -1):
        weights[rows, np.clip(base + offset, 0, cells - 1)] += spline / 6
    return weights


def product(a: Array, b: Array) -> Array:
    """a @ b in strips so narrow that BLAS starts no threads beside a pool of workers."""
    width = max(2, 2**18 // a.size)
    out = np.empty((a.shape[0], b.shape[1]), np.float32)
    for start in range(0, b.shape[1], width):
        np.matmul(a, b[:, start : start + width], out=out[:, start : start + width])
    return out


def smooth_noise(rng: np.random.Generator, size: int, cells: int) -> Array:
    """Smooth noise [size, size] of about unit spread, the same at each size."""
    coarse = rng.standard_normal((cells, cells), np.float32)
    weights = _spline(size, cells)
    return product(weights, 2.1 * (coarse @ weights.T))


def _wide(image: Array) -> Array:
    """The image, blurred widely by way of 16 x 16 cells."""
    down, up = _wide_weights(len(image))
    return product(up, (product(down, image) @ down.T) @ up.T)


@lru_cache(maxsize=8)
def _wide_weights(size: int) -> tuple[Array, Array]:
    """Matrices [16, size] and [size, 16] that blur an image widely by way of 16 x 16 cells."""
    fine = (np.arange(size) + 0.5) / size
    coarse = (np.arange(16) + 0.5) / 16
    gap = (coarse[:, None] - fine[None, :]) / 0.09
    down = np.exp(-0.5 * gap * gap)
    up = np.exp(-0.5 * (gap * 0.09 / 0.05) ** 2).T
    down /= down.sum(1, keepdims=True)
    up /= up.sum(1, keepdims=True)
    return down.astype(np.float32), up.astype(np.float32)


def expose(film: Film, rng: np.random.Generator) -> Array:
    """Apply attenuation, scatter, quantum noise and the display curve: uint8 [size, size]."""
    pose, size = film.pose, film.size
    # a vessel is visible where air surrounds it
    vessels = film.vessels * film.air * np.minimum(film.lung * 6, 1.0)
    vessels[film.masks["pneumothorax"]] = 0.0
    tissue = film.body - film.lung * film.air
    np.maximum(tissue, 0.0, out=tissue)
    tissue += vessels * film.engorged
    depth = SOFT * tissue + film.dense
    np.maximum(depth, 0.0, out=depth)
    beam = np.exp(-depth)
    beam += SCATTER * _wide(beam)
    grain = rng.standard_normal((size, size), np.float32)
    # the same dose spread over fewer pixels is less noisy: the grain is that of a 256-pixel film
    beam += grain * np.sqrt(beam) * (0.0030 * pose.noise * min(1.0, size / 256) ** 0.5)
    np.maximum(beam, 1e-5, out=beam)
    value = -np.log(beam)
    # equalization of a digital film: less of the wide changes, more of the fine detail
    value -= EQUALIZE * _wide(value)
    middle, step = slice(size // 8, size - size // 8), max(1, size // 48)
    sample = value[middle, middle][::step, ::step].ravel()
    low, high = int(0.06 * sample.size), int(0.95 * sample.size)
    dark, pale = np.partition(sample, (low, high))[[low, high]]
    span = max(0.9, float(pale - dark)) / pose.contrast
    level = 0.16 - 0.07 * pose.exposure
    grey = (value - dark) * np.float32(0.74 / span) + np.float32(level)
    np.maximum(grey, 0.0, out=grey)
    # a shoulder instead of a hard stop at white
    over = np.maximum(grey - 0.8, 0.0)
    grey -= over
    grey += over / (1.0 + 4.0 * over)
    _collimate(grey, pose)
    _stamp(grey, pose)
    return np.clip(grey * 255 + 0.5, 0, 255).astype(np.uint8)


def _collimate(grey: Array, pose: Pose) -> None:
    """Darken the margin behind the shutters of the tube."""
    size = len(grey)
    left, top, right, bottom = (round(margin * size) for margin in pose.collimation)
    for shutter in (grey[:top], grey[size - bottom :], grey[:, :left], grey[:, size - right :]):
        shutter *= 0.12


LETTERS = {"L": "1000 1000 1000 1000 1111", "R": "1110 1001 1110 1010 1001"}


def _stamp(grey: Array, pose: Pose) -> None:
    """Stamp the lead letter that marks a side of the patient."""
    if not pose.marker:
        return
    size = len(grey)
    dots = np.array([[int(dot) for dot in row] for row in LETTERS[pose.marker].split()], bool)
    cell = max(1, round(size / 85))
    letter = np.kron(dots, np.ones((cell, cell), bool))
    left, top, right, _ = pose.collimation
    row, column = round(0.06 * size + top * size), round(0.045 * size + left * size)
    if pose.marker == "L":  # the patient's left is on the right of the film
        column = round(0.955 * size - right * size) - letter.shape[1]
    grey[row : row + letter.shape[0], column : column + letter.shape[1]][letter] = 1.0
