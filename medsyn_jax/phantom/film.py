"""The film: maps of path lengths on a pixel grid, and the exposure that turns them into grey.

Lengths are in half film widths (about 20 cm), across the film and along the beam alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeVar

import numpy as np

from medsyn_jax.phantom.thorax import SIGN, Pose

Array = np.ndarray
Number = TypeVar("Number", float, np.ndarray)
Box = tuple[str, float, float, float, float]  # label, x0, y0, x1, y1 in pixels
WIDTHS = (0.0045, 0.010, 0.019)  # Gaussian widths of the strokes: fine, medium, broad
# attenuation per unit length: soft tissue, what bone adds to it, plastic or thin metal, lead
SOFT, BONE, METAL = 3.4, 5.0, 40.0
MATERIALS = {"soft": SOFT, "bone": BONE, "metal": METAL}
SCATTER = 0.25  # scattered over primary radiation behind the grid
EQUALIZE = 0.30  # share of the wide changes that the display takes away


@dataclass
class Film:
    """The maps of one exposure, float32 [size, size] unless said otherwise."""

    size: int
    pose: Pose
    x: Array = field(init=False)  # body coordinates
    y: Array = field(init=False)  # [size, 1]
    body: Array = field(init=False)  # length in the body, lungs included
    lung: Array = field(init=False)  # length in the lungs
    air: Array = field(init=False)  # share of air in the lungs, 0..1
    vessels: Array = field(init=False)  # length in vessels of the lungs
    dense: Array = field(init=False)  # attenuation by all that is put on top
    field_mask: Array = field(init=False)  # bool: the lungs as a reader would outline them
    shade: Array | None = None  # 0 where no vessel can be, 1 elsewhere; None: 1 all over
    engorged: float = 1.0  # how much thicker than normal the vessels are
    strokes: dict[tuple[bool, int], list[Array]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        step = np.arange(self.size, dtype=np.float32) * np.float32(2 / self.size)
        centre = step + np.float32(1 / self.size - 1)
        v = centre[:, None]
        self.y = self.pose.zoom * v - self.pose.shift[1]
        self.x = self.pose.zoom * (centre[None, :] - self.pose.tilt * v) - self.pose.shift[0]
        for name in ("lung", "vessels", "dense"):
            setattr(self, name, np.zeros((self.size, self.size), np.float32))

    @property
    def scale(self) -> float:
        """Pixels to a unit of body length."""
        return self.size / 2 / self.pose.zoom

    def pixels(self, x: Number, y: Number) -> tuple[Number, Number]:
        """Body coordinates to (column, row), pixel centres at whole numbers."""
        v = (y + self.pose.shift[1]) / self.pose.zoom
        u = (x + self.pose.shift[0]) / self.pose.zoom + self.pose.tilt * v
        return (u + 1) * (self.size / 2) - 0.5, (v + 1) * (self.size / 2) - 0.5

    def window(self, x: float, y: float, across: float, down: float) -> tuple[slice, slice]:
        """Rows and columns that hold the box x +- across, y +- down."""
        tilted = across + abs(self.pose.tilt) * down
        low = self.pixels(x - tilted, y - down)
        high = self.pixels(x + tilted, y + down)
        rows = slice(max(0, math.floor(low[1])), max(0, math.ceil(high[1]) + 1))
        columns = slice(max(0, math.floor(low[0])), max(0, math.ceil(high[0]) + 1))
        return rows, columns

    def half(self, side: str) -> slice:
        """The columns that hold one side of the body."""
        middle = float(self.pixels(0.0, 0.0)[0])
        slack = abs(self.pose.tilt) * self.size / 2 + 1
        if side == "right":
            return slice(0, max(1, min(self.size, math.ceil(middle + slack))))
        return slice(min(self.size - 1, max(0, math.floor(middle - slack))), self.size)

    def ellipsoid(
        self,
        material: str,
        centre: tuple[float, float],
        axes: tuple[float, float, float],
        angle: float = 0.0,
    ) -> None:
        """Puts an ellipsoid of 'soft', 'bone' or 'metal' on top; a negative depth takes away."""
        add_ellipsoid(self, self.dense, centre, axes, angle, MATERIALS[material])

    def stroke(self, material: str, width: int, path: Array, amount: Array | float) -> None:
        """Queues lines on top: path [..., n, 2], `amount` [..., n] their length along the beam.

        The points of a line may lie 1.5 of its `WIDTHS` apart at the most.
        """
        step = path[..., 1:, :] - path[..., :-1, :]
        gaps = np.hypot(step[..., 0], step[..., 1])
        amount = np.broadcast_to(amount, path.shape[:-1])[..., 1:]
        volume = gaps * amount * (WIDTHS[width] * math.sqrt(2 * math.pi) * MATERIALS[material])
        self.queue(False, width, path[..., 1:, :].reshape(-1, 2), volume.ravel())

    def queue(self, vessel: bool, width: int, path: Array, volume: Array) -> None:
        """Queues points [n, 2], each with its volume: in `vessels`, or in `dense` if not vessel."""
        points = np.column_stack((path, volume * self.scale**2)).astype(np.float32)
        self.strokes.setdefault((vessel, width), []).append(points)

    def frame(self, label: str, path: Array) -> Box:
        """The box, cut at the edge of the film, around body coordinates [n, 2]."""
        column, row = self.pixels(path[:, 0], path[:, 1])
        edges = (column.min(), row.min(), column.max() + 1, row.max() + 1)
        x0, y0, x1, y1 = (float(np.clip(v, 0, self.size)) for v in edges)
        return label, x0, y0, x1, y1

    def draw_strokes(self) -> None:
        """Adds the queued lines to `vessels` and `dense`, with one blur for each and width."""
        for (vessel, width), batches in self.strokes.items():
            image = self._splat(np.concatenate(batches))
            # a splatted point is spread over its pixel and the next already
            sigma = math.sqrt(max(0.0, (WIDTHS[width] * self.scale) ** 2 - 0.15))
            if sigma > 0.3:
                image = _blur(_blur(image, sigma).T, sigma).T
            target = self.vessels if vessel else self.dense
            target += image
        self.strokes.clear()

    def _splat(self, points: Array) -> Array:
        """Shares each point [x, y, volume] among its four pixels: [size, size]."""
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


def add_ellipsoid(
    film: Film,
    target: Array,
    centre: tuple[float, float],
    axes: tuple[float, float, float],
    angle: float = 0.0,
    weight: float = 1.0,
) -> None:
    """Adds the chord of an ellipsoid, 2 c sqrt(1 - r^2), to a map [size, size]."""
    cos, sin = math.cos(angle), math.sin(angle)
    a, b, c = axes
    rows, columns = film.window(*centre, math.hypot(a * cos, b * sin), math.hypot(a * sin, b * cos))
    x, y = film.x[rows, columns] - centre[0], film.y[rows] - centre[1]
    if x.size == 0:
        return
    if angle:
        p, q = (x * cos + y * sin) * (1 / a), (y * cos - x * sin) * (1 / b)
    else:
        p, q = x * (1 / a), y * (1 / b)
    inside = 1.0 - p * p - q * q
    np.maximum(inside, 0.0, out=inside)
    np.sqrt(inside, out=inside)
    inside *= 2 * c * weight
    target[rows, columns] += inside


@lru_cache(maxsize=32)
def _spline(size: int, cells: int) -> Array:
    """Cubic B-spline weights [size, cells] of a coarse noise field along one side of the film."""
    place = (np.arange(size) + 0.5) / size * (cells - 3) + 1
    base = np.floor(place).astype(int)
    t = place - base
    weights = np.zeros((size, cells), np.float32)
    rows = np.arange(size)
    for offset, value in zip(
        (-1, 0, 1, 2),
        ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3),
        strict=True,
    ):
        weights[rows, np.clip(base + offset, 0, cells - 1)] += value / 6
    return weights


def product(a: Array, b: Array) -> Array:
    """a @ b in strips so narrow that BLAS starts no threads, which a pool of workers must not."""
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
    """Beer-Lambert attenuation, scatter, quantum noise, display curve: uint8 [size, size]."""
    pose, size = film.pose, film.size
    # a vessel is seen where air surrounds it
    vessels = film.vessels * film.air * np.minimum(film.lung * 6, 1.0)
    if film.shade is not None:
        vessels *= film.shade
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
    # the equalization of a digital film: less of the wide changes, more of the fine detail
    value -= EQUALIZE * _wide(value)
    middle, step = slice(size // 8, size - size // 8), max(1, size // 48)
    sample = value[middle, middle][::step, ::step].ravel()
    low, high = int(0.06 * sample.size), int(0.95 * sample.size)
    dark, pale = np.partition(sample, (low, high))[[low, high]]
    span = max(0.9, float(pale - dark)) / pose.contrast
    level = 0.16 - 0.07 * pose.exposure
    grey = (value - dark) * np.float32(0.74 / span) + np.float32(level)
    np.maximum(grey, 0.0, out=grey)
    # a shoulder instead of a hard stop: what is whiter than white is only a little whiter
    over = np.maximum(grey - 0.8, 0.0)
    grey -= over
    grey += over / (1.0 + 4.0 * over)
    _collimate(grey, pose)
    _stamp(grey, pose)
    return np.clip(grey * 255 + 0.5, 0, 255).astype(np.uint8)


def _collimate(grey: Array, pose: Pose) -> None:
    """The shutters of the tube leave a dark margin."""
    size = len(grey)
    left, top, right, bottom = (round(m * size) for m in pose.collimation)
    grey[:top] *= 0.12
    grey[size - bottom :] *= 0.12
    grey[:, :left] *= 0.12
    grey[:, size - right :] *= 0.12


_LETTERS = {"L": "1000 1000 1000 1000 1111", "R": "1110 1001 1110 1010 1001"}


@lru_cache(maxsize=16)
def _letter(name: str, cell: int) -> Array:
    bits = np.array([[int(c) for c in row] for row in _LETTERS[name].split()], bool)
    return np.kron(bits, np.ones((cell, cell), bool))


def _stamp(grey: Array, pose: Pose) -> None:
    """The lead letter that says which side is which."""
    if not pose.marker:
        return
    size = len(grey)
    glyph = _letter(pose.marker, max(1, round(size / 85)))
    row = round(0.06 * size + pose.collimation[1] * size)
    column = round(0.045 * size + pose.collimation[0] * size)
    if SIGN["left" if pose.marker == "L" else "right"] > 0:
        column = round(0.955 * size - pose.collimation[2] * size) - glyph.shape[1]
    place = grey[row : row + glyph.shape[0], column : column + glyph.shape[1]]
    place[glyph] = 1.0
