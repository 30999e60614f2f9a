"""Puts metal and plastic on the film: medical devices, and objects that do not belong there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medsyn_jax.phantom.film import METAL, Array, Box, Film, add_ellipsoid
from medsyn_jax.phantom.findings import FOREIGN, Device, Finding
from medsyn_jax.phantom.thorax import SIGN, Anatomy, dome_level, lung_point


def curve(knots: Sequence[tuple[float, float]], points: int = 320) -> Array:
    """A smooth path [points, 2] through the knots (Catmull-Rom)."""
    k = np.asarray(knots, float)
    k = np.concatenate((2 * k[:1] - k[1:2], k, 2 * k[-1:] - k[-2:-1]))
    place = np.linspace(0, len(knots) - 1, points)
    i = np.minimum(place.astype(int), len(knots) - 2)
    t = (place - i)[:, None]
    a, b, c, d = k[i], k[i + 1], k[i + 2], k[i + 3]
    return 0.5 * (
        2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3
    )


def draw(film: Film, anatomy: Anatomy, devices: Sequence[Device]) -> None:
    """Queues or draws every device."""
    for device in devices:
        sign = SIGN.get(device.side, 1.0)
        DRAWS[device.kind](film, anatomy, device, sign)


def _wires(film: Film, anatomy: Anatomy, device: Device, sign: float) -> None:
    turn = np.linspace(0, 2 * np.pi, 40)
    middle = 0.05 * film.pose.rotation
    for step in range(6):
        y = -0.42 + 0.115 * step
        path = np.column_stack(
            (
                middle + 0.032 * np.cos(turn) + 0.006 * (-1) ** step,
                y + 0.02 * np.sin(turn) + 0.006 * step,
            )
        )
        film.stroke("metal", 0, path, 0.012)


def _pacemaker(film: Film, anatomy: Anatomy, device: Device, sign: float) -> None:
    x, y = sign * 0.44, anatomy.apex + 0.33
    film.ellipsoid("metal", (x, y), (0.088, 0.075, 0.02), 0.3 * sign)
    film.ellipsoid("metal", (x, y), (0.06, 0.05, 0.012), 0.3 * sign)
    middle = film.pose.push
    tip = 0.18 + 0.06 * device.reach
    knots = [
        (x - 0.05 * sign, y - 0.06),
        (0.22 * sign, anatomy.apex + 0.17),
        (-0.05, -0.38),
        (-0.085 + middle, -0.05),
        (-0.02 + middle, 0.20),
        (tip + middle, 0.27),
    ]
    film.stroke("metal", 0, curve(knots), 0.016)
    if device.reach > 0.4:
        knots = [*knots[:4], (-0.10 + middle, 0.08), (-0.04 + middle, 0.04)]
        film.stroke("metal", 0, curve(knots), 0.016)


def _tube(film: Film, anatomy: Anatomy, device: Device, sign: float) -> None:
    lean = 0.012 + 0.02 * film.pose.rotation + 0.6 * film.pose.push
    tip = -0.52 + 0.20 * device.reach
    t = np.linspace(0, 1, 90)
    path = np.column_stack((lean * t + 0.012 * np.sin(3 * t), -1.1 + (tip + 1.1) * t))
    film.stroke("metal", 1, path, 0.008)


def _gastric(film: Film, anatomy: Anatomy, device: Device, sign: float) -> None:
    level = dome_level(anatomy, film.pose, "left")
    end = (0.20 + 0.2 * device.reach, level + 0.16 + 0.08 * device.reach)
    film.stroke(
        "metal", 0, curve([(0.0, -1.1), (0.03, -0.5), (0.05, 0.1), (0.10, level), end]), 0.014
    )


def _jugular(film: Film, anatomy: Anatomy, device: Device, sign: float) -> None:
    tip = (-0.085 + film.pose.push, -0.16 + 0.16 * device.reach)
    if device.side == "right":
        knots = [(-0.17, -1.05), (-0.15, -0.75), (-0.10, -0.45), tip]
    else:
        knots = [(0.17, -1.05), (0.14, -0.75), (0.02, -0.52), (-0.08, -0.38), tip]
    film.stroke("metal", 0, curve(knots), 0.013)


def _picc(film: Film, anatomy: Anatomy, device: Device, sign: float) -> None:
    tip = (-0.085 + film.pose.push, -0.16 + 0.16 * device.reach)
    top = anatomy.apex
    knots = [
        (sign * 1.05, -0.05),
        (sign * 0.86, top + 0.42),
        (sign * 0.55, top + 0.22),
        (sign * 0.22, top + 0.20),
        (-0.08, -0.40),
        tip,
    ]
    film.stroke("metal", 0, curve(knots, 260), 0.010)


def _port(film: Film, anatomy: Anatomy, device: Device, sign: float) -> None:
    x, y = sign * 0.40, anatomy.apex + 0.40
    film.ellipsoid("metal", (x, y), (0.045, 0.045, 0.010))
    film.ellipsoid("metal", (x, y), (0.025, 0.025, -0.006))
    tip = (-0.085 + film.pose.push, -0.14 + 0.16 * device.reach)
    knots = [(x, y), (sign * 0.30, y - 0.25), (sign * 0.15, y - 0.22), (-0.08, -0.36), tip]
    film.stroke("metal", 0, curve(knots), 0.012)


def _chest_tube(film: Film, anatomy: Anatomy, device: Device, sign: float) -> None:
    knots = [
        (sign * 1.0, 0.35),
        (sign * 0.70, 0.22),
        (sign * 0.52, -0.05),
        (sign * 0.36, -0.30 - 0.15 * device.reach),
    ]
    path = curve(knots)
    for edge in (-0.012, 0.012):
        film.stroke("metal", 0, path + np.array([edge, 0.0]), 0.008)


DRAWS = {
    "wires": _wires,
    "pacemaker": _pacemaker,
    "ett": _tube,
    "ngt": _gastric,
    "jugular": _jugular,
    "picc": _picc,
    "port": _port,
    "chest tube": _chest_tube,
}


def draw_foreign(film: Film, anatomy: Anatomy, findings: Sequence[Finding]) -> list[Box]:
    """Draws the foreign objects; their boxes in pixels."""
    boxes = []
    for f in findings:
        if f.label != FOREIGN:
            continue
        if f.kind == "necklace":
            path = _necklace(film, anatomy, f)
        else:
            x, y = lung_point(anatomy, film.pose, f.side, *f.place)
            path = OBJECTS[f.kind](film, (x, y), f.extent[0], f.angle)
        boxes.append(film.frame(FOREIGN, path))
    return boxes


def _turned(points: Array, centre: tuple[float, float], angle: float) -> Array:
    cos, sin = np.cos(angle), np.sin(angle)
    return points @ np.array([[cos, sin], [-sin, cos]]) + centre


def _disc(film: Film, centre: tuple[float, float], radius: float, depth: float) -> Array:
    """A metal disc of even depth, and its outline."""
    chord = np.zeros_like(film.dense)
    add_ellipsoid(film, chord, centre, (radius, radius, 1.0))
    film.dense += (METAL * depth) * np.minimum(2 * chord, 1.0)
    turn = np.linspace(0, 2 * np.pi, 80)
    return np.column_stack((np.cos(turn), np.sin(turn))) * radius + centre


def _coin(film: Film, centre: tuple[float, float], size: float, angle: float) -> Array:
    return _disc(film, centre, size, 0.03)


def _button(film: Film, centre: tuple[float, float], size: float, angle: float) -> Array:
    outline = _disc(film, centre, size, 0.009)
    holes = _turned(np.array([[1, 0], [-1, 0], [0, 1], [0, -1]]) * 0.32 * size, centre, angle)
    for hole in holes:
        film.ellipsoid("metal", (hole[0], hole[1]), (0.2 * size, 0.2 * size, -0.004))
    film.stroke("metal", 0, 0.93 * (outline - centre) + centre, 0.006)
    return outline


def _pin(film: Film, centre: tuple[float, float], size: float, angle: float) -> Array:
    knots = [
        (-1.0, 0.1),
        (0.8, 0.12),
        (1.05, 0.0),
        (0.8, -0.14),
        (-0.7, -0.30),
        (-1.0, -0.2),
        (-1.0, 0.1),
    ]
    path = _turned(curve(knots, 120) * size, centre, angle)
    film.stroke("metal", 0, path, 0.025)
    clasp = _turned(np.array([[-1.0, -0.05]]) * size, centre, angle)[0]
    film.ellipsoid("metal", (clasp[0], clasp[1]), (0.024, 0.024, 0.02))
    return path


def _bullet(film: Film, centre: tuple[float, float], size: float, angle: float) -> Array:
    film.ellipsoid("metal", centre, (1.5 * size, 0.75 * size, 0.05), angle)
    return _turned(np.column_stack((1.5 * np.cos(_T), 0.75 * np.sin(_T))) * size, centre, angle)


def _key(film: Film, centre: tuple[float, float], size: float, angle: float) -> Array:
    ring = np.column_stack((0.33 * np.cos(_T) - 0.65, 0.33 * np.sin(_T)))
    head = _turned(ring * size, centre, angle)
    shaft = [(-0.32, 0.0), (0.3, 0.0), (0.9, 0.0)]
    teeth = [(0.9, 0.0), (0.9, 0.22), (0.72, 0.22), (0.72, 0.0), (0.6, 0.22), (0.5, 0.0)]
    film.stroke("metal", 1, head, 0.03)
    bar = _turned(curve(shaft, 50) * size, centre, angle)
    comb = _turned(curve(teeth, 60) * size, centre, angle)
    film.stroke("metal", 1, bar, 0.03)
    film.stroke("metal", 0, comb, 0.03)
    return np.concatenate((head, bar, comb))


def _necklace(film: Film, anatomy: Anatomy, f: Finding) -> Array:
    turn = np.linspace(-np.pi / 2, np.pi / 2, 240)
    top = anatomy.apex - 0.12
    path = np.column_stack((0.21 * np.sin(turn) + 0.02, top + (0.25 + f.extent[0]) * np.cos(turn)))
    beads = 0.014 * (1 + np.cos(np.arange(240) * 1.2))
    film.stroke("metal", 0, path, beads)
    low = path[120]
    film.ellipsoid("metal", (low[0], low[1] + 0.02), (0.022, 0.034, 0.012))
    return np.concatenate((path, [low + np.array([0.0, 0.054])]))


_T = np.linspace(0, 2 * np.pi, 80)
OBJECTS = {"coin": _coin, "button": _button, "pin": _pin, "bullet": _bullet, "key": _key}
