"""The film: maps of path lengths on a pixel grid, and the exposure that turns them into grey.

Lengths are in half film widths (about 20 cm), across the film and along the beam alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from scipy.ndimage import gaussian_filter1d

from medsyn_jax.data.thorax import SIGN, Pose

Array = np.ndarray
WIDTHS = (0.0045, 0.010, 0.019)  # Gaussian widths of the strokes: fine, medium, broad
SOFT, BONE, METAL = 3.4, 5.0, 40.0  # attenuation per unit length: soft tissue, bone's excess, metal
SCATTER = 0.25  # scattered over primary radiation behind the grid
EQUALIZE = 0.35  # share of the wide changes that the display takes away


@dataclass
class Film:
    """The maps of one exposure, all float32 [size, size]: path lengths, unless said otherwise."""

    size: int
    pose: Pose
    x: Array = field(init=False)  # body coordinates
    y: Array = field(init=False)  # [size, 1]
    body: Array = field(init=False)
    lung: Array = field(init=False)
    air: Array = field(init=False)  # share of air in the lung, 0..1
    vessels: Array = field(init=False)
    soft: Array = field(init=False)
    bone: Array = field(init=False)
    metal: Array = field(init=False)
    field_mask: Array = field(init=False)  # bool: the lungs as a reader would outline them
    shade: Array | None = None  # 0 where no vessel can be, 1 elsewhere; None: 1 all over
    engorged: float = 1.0  # how much thicker than normal the vessels are
    strokes: list[tuple[str, int, Array]] = field(default_factory=list)

    def __post_init__(self) -> None:
        step = np.arange(self.size, dtype=np.float32) * np.float32(2 / self.size)
        centre = step + np.float32(1 / self.size - 1)
        v = centre[:, None]
        self.y = self.pose.zoom * v - self.pose.shift[1]
        self.x = self.pose.zoom * (centre[None, :] - self.pose.tilt * v) - self.pose.shift[0]
        for name in ("lung", "vessels", "soft", "bone", "metal"):
            setattr(self, name, np.zeros((self.size, self.size), np.float32))

    def pixels(self, x: Array | float, y: Array | float) -> tuple[Array | float, Array | float]:
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
        name: str,
        centre: tuple[float, float],
        axes: tuple[float, float, float],
        angle: float = 0.0,
        weight: float = 1.0,
    ) -> None:
        """Adds `weight` times the chord of an ellipsoid, turned in the plane of the film."""
        add_ellipsoid(self, getattr(self, name), centre, axes, angle, weight)

    def stroke(self, name: str, width: int, path: Array, amount: Array | float) -> None:
        """Queues a line: path [n, 2] in body coordinates, `amount` the length along the beam.

        The points may lie 0.01 apart at the most.
        """
        gaps = np.hypot(*np.diff(path, axis=0, append=path[-2:-1]).T)
        mass = amount * gaps * WIDTHS[width] * math.sqrt(2 * math.pi) * (self.size / 2) ** 2
        self.queue(name, width, path, mass / self.pose.zoom**2)

    def queue(self, name: str, width: int, path: Array, mass: Array) -> None:
        """Queues points [n, 2] of the given mass (length along the beam times pixels)."""
        self.strokes.append((name, width, np.column_stack((path, mass))))

    def draw_strokes(self) -> None:
        """Adds the queued lines to their maps, one blur for each map and width."""
        for name in ("vessels", "soft", "bone", "metal"):
            for width, spread in enumerate(WIDTHS):
                points = [p for n, w, p in self.strokes if n == name and w == width]
                if points:
                    target = getattr(self, name)
                    target += self._splat(np.concatenate(points), spread)
        self.strokes.clear()

    def _splat(self, points: Array, spread: float) -> Array:
        column, row = self.pixels(points[:, 0], points[:, 1])
        size = self.size + 2  # a margin catches what falls off the film
        column = np.clip(column + 1, 0, size - 1.001)
        row = np.clip(row + 1, 0, size - 1.001)
        left, top = column.astype(np.int32), row.astype(np.int32)
        right_share, low_share = column - left, row - top
        place = top * size + left
        mass = points[:, 2]
        weights = np.concatenate(
            (
                mass * (1 - right_share) * (1 - low_share),
                mass * right_share * (1 - low_share),
                mass * (1 - right_share) * low_share,
                mass * right_share * low_share,
            )
        )
        places = np.concatenate((place, place + 1, place + size, place + size + 1))
        total = np.bincount(places, weights, size * size + size + 2)[: size * size]
        image = total.reshape(size, size).astype(np.float32)
        # a point that fell off the film lies on the margin; its neighbours must not see it
        image[[0, -1], :] = 0.0
        image[:, [0, -1]] = 0.0
        sigma = math.sqrt(max(0.0, (spread * self.size / 2 / self.pose.zoom) ** 2 - 0.15))
        if sigma > 0.3:
            for axis in (0, 1):
                image = gaussian_filter1d(image, sigma, axis, mode="constant", truncate=2.6)
        return image[1:-1, 1:-1]


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


def smooth_noise(rng: np.random.Generator, size: int, cells: int) -> Array:
    """Smooth noise [size, size] of about unit spread, the same at each size."""
    coarse = rng.standard_normal((cells, cells), np.float32)
    weights = _spline(size, cells)
    return (weights @ coarse @ weights.T) * 2.1


@lru_cache(maxsize=8)
def _scatter_weights(size: int) -> tuple[Array, Array]:
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
    """Beer-Lambert attenuation, scatter, quantum noise and the display curve: uint8 [size, size]."""
    pose, size = film.pose, film.size
    tissue = film.body + film.soft - film.lung * film.air
    np.maximum(tissue, 0.0, out=tissue)
    # a vessel is seen where air surrounds it
    vessels = film.vessels * film.air * np.minimum(film.lung * 6, 1.0)
    if film.shade is not None:
        vessels *= film.shade
    tissue += vessels * (1.3 * film.engorged)
    depth = SOFT * tissue + BONE * film.bone + METAL * film.metal
    beam = np.exp(-depth)
    down, up = _scatter_weights(size)
    beam += SCATTER * (up @ (down @ beam @ down.T) @ up.T)
    grain = rng.standard_normal((size, size), np.float32)
    # the same dose spread over fewer pixels is less noisy: the grain is that of a 256-pixel film
    beam += grain * np.sqrt(beam) * (0.0030 * pose.noise * min(1.0, size / 256) ** 0.5)
    np.maximum(beam, 1e-5, out=beam)
    value = -np.log(beam)
    # the equalization of a digital film: less of the wide changes, more of the fine detail
    value -= EQUALIZE * (up @ (down @ value @ down.T) @ up.T)
    step = max(1, size // 64)
    centre = np.sort(value[size // 8 : -size // 8 : step, size // 8 : -size // 8 : step], axis=None)
    dark, pale = centre[int(0.06 * centre.size)], centre[int(0.95 * centre.size)]
    span = max(0.9, float(pale - dark)) / pose.contrast
    level = 0.16 - 0.07 * pose.exposure
    grey = (value - dark) * np.float32(0.74 / span) + np.float32(level)
    np.maximum(grey, 0.0, out=grey)
    # a shoulder instead of a hard stop: what is whiter than white is only a little whiter
    grey = np.where(grey > 0.8, 0.8 + 0.2 * np.tanh((grey - 0.8) * 3.0), grey)
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
