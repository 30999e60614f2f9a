"""Metal and plastic on the film: medical devices and foreign objects."""

from __future__ import annotations

import numpy as np

from medsyn_jax.phantom.film import METAL, Film
from medsyn_jax.phantom.findings import FOREIGN, Device, Finding, Plan
from medsyn_jax.phantom.thorax import SIGN, Anatomy, Array, Point, dome_level, lung_point

TURN = np.linspace(0, 2 * np.pi, 80)
CIRCLE = np.column_stack((np.cos(TURN), np.sin(TURN)))


def draw(film: Film, plan: Plan) -> None:
    """Draw every device, and every foreign object with its box."""
    for device in plan.devices:
        DEVICES[device.kind](film, plan.anatomy, device, SIGN.get(device.side, 1.0))
    for f in plan.findings:
        if f.label != FOREIGN:
            continue
        if f.kind == "necklace":
            outline = _necklace(film, plan.anatomy, f)
        else:
            centre = lung_point(plan.anatomy, film.pose, f.side, *f.place)
            outline = OBJECTS[f.kind](film, centre, f.extent[0], f.angle)
        film.add_box(FOREIGN, outline)


def curve(knots: list[Point], points: int = 320) -> Array:
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


# ---- devices: `sign` is -1 on the patient's right, 1 on the left


def _wires(film: Film, anatomy: Anatomy, device: Device, sign: float) -> None:
    turn = np.linspace(0, 2 * np.pi, 40)
    for step in range(6):
        x = 0.05 * film.pose.rotation + 0.032 * np.cos(turn) + 0.006 * (-1) ** step
        y = -0.42 + 0.115 * step + 0.02 * np.sin(turn) + 0.006 * step
        film.stroke("metal", 0, np.column_stack((x, y)), 0.012)


def _pacemaker(film: Film, anatomy: Anatomy, device: Device, sign: float) -> None:
    x, y = sign * 0.44, anatomy.apex + 0.33
    film.ellipsoid("metal", (x, y), (0.088, 0.075, 0.02), 0.3 * sign)
    film.ellipsoid("metal", (x, y), (0.06, 0.05, 0.012), 0.3 * sign)
    middle, tip = film.pose.push, 0.18 + 0.06 * device.reach
    vein = [(x - 0.05 * sign, y - 0.06), (0.22 * sign, anatomy.apex + 0.17), (-0.05, -0.38)]
    vein.append((-0.085 + middle, -0.05))
    ventricle, atrium = [(-0.02, 0.20), (tip, 0.27)], [(-0.10, 0.08), (-0.04, 0.04)]
    for lead in (ventricle, atrium) if device.reach > 0.4 else (ventricle,):
        knots = vein + [(x + middle, y) for x, y in lead]
        film.stroke("metal", 0, curve(knots), 0.016)


def _endotracheal(film: Film, anatomy: Anatomy, device: Device, sign: float) -> None:
    lean = 0.012 + 0.02 * film.pose.rotation + 0.6 * film.pose.push
    tip = -0.52 + 0.20 * device.reach
    t = np.linspace(0, 1, 90)
    path = np.column_stack((lean * t + 0.012 * np.sin(3 * t), -1.1 + (tip + 1.1) * t))
    film.stroke("metal", 1, path, 0.008)


def _gastric(film: Film, anatomy: Anatomy, device: Device, sign: float) -> None:
    level = dome_level(anatomy, film.pose, "left")
    end = (0.20 + 0.2 * device.reach, level + 0.16 + 0.08 * device.reach)
    knots = [(0.0, -1.1), (0.03, -0.5), (0.05, 0.1), (0.10, level), end]
    film.stroke("metal", 0, curve(knots), 0.014)


def _cava(film: Film, device: Device, top: float) -> Point:
    """Tip of a catheter in the superior vena cava."""
    return (-0.085 + film.pose.push, top + 0.16 * device.reach)


def _jugular(film: Film, anatomy: Anatomy, device: Device, sign: float) -> None:
    right = [(-0.17, -1.05), (-0.15, -0.75), (-0.10, -0.45)]
    left = [(0.17, -1.05), (0.14, -0.75), (0.02, -0.52), (-0.08, -0.38)]
    knots = [*(right if device.side == "right" else left), _cava(film, device, -0.16)]
    film.stroke("metal", 0, curve(knots), 0.013)


def _picc(film: Film, anatomy: Anatomy, device: Device, sign: float) -> None:
    arm = [(1.05, -0.05), (0.86, anatomy.apex + 0.42), (0.55, anatomy.apex + 0.22)]
    arm.append((0.22, anatomy.apex + 0.20))
    knots = [*((sign * x, y) for x, y in arm), (-0.08, -0.40), _cava(film, device, -0.16)]
    film.stroke("metal", 0, curve(knots, 260), 0.010)


def _port(film: Film, anatomy: Anatomy, device: Device, sign: float) -> None:
    x, y = sign * 0.40, anatomy.apex + 0.40
    film.ellipsoid("metal", (x, y), (0.045, 0.045, 0.010))
    film.ellipsoid("metal", (x, y), (0.025, 0.025, -0.006))
    knots = [(x, y), (sign * 0.30, y - 0.25), (sign * 0.15, y - 0.22), (-0.08, -0.36)]
    film.stroke("metal", 0, curve([*knots, _cava(film, device, -0.14)]), 0.012)


def _chest_tube(film: Film, anatomy: Anatomy, device: Device, sign: float) -> None:
    knots = [(1.0, 0.35), (0.70, 0.22), (0.52, -0.05), (0.36, -0.30 - 0.15 * device.reach)]
    path = curve([(sign * x, y) for x, y in knots])
    for edge in (-0.012, 0.012):
        film.stroke("metal", 0, np.add(path, (edge, 0.0)), 0.008)


DEVICES = {
    "wires": _wires,
    "pacemaker": _pacemaker,
    "ett": _endotracheal,
    "ngt": _gastric,
    "jugular": _jugular,
    "picc": _picc,
    "port": _port,
    "chest tube": _chest_tube,
}


# ---- foreign objects: each function draws one and returns its outline [n, 2]


def _turned(points: Array, centre: Point, angle: float) -> Array:
    cos, sin = np.cos(angle), np.sin(angle)
    return points @ np.array([[cos, sin], [-sin, cos]]) + centre


def _disc(film: Film, centre: Point, radius: float, depth: float) -> Array:
    """A metal disc of even depth."""
    chord = np.zeros_like(film.dense)
    film.add_ellipsoid(chord, centre, (radius, radius, 1.0))
    film.dense += (METAL * depth) * np.minimum(2 * chord, 1.0)
    return CIRCLE * radius + centre


def _coin(film: Film, centre: Point, size: float, angle: float) -> Array:
    return _disc(film, centre, size, 0.03)


def _button(film: Film, centre: Point, size: float, angle: float) -> Array:
    outline = _disc(film, centre, size, 0.009)
    holes = _turned(np.array([[1, 0], [-1, 0], [0, 1], [0, -1]]) * 0.32 * size, centre, angle)
    for x, y in holes:
        film.ellipsoid("metal", (x, y), (0.2 * size, 0.2 * size, -0.004))
    film.stroke("metal", 0, 0.93 * (outline - centre) + centre, 0.006)
    return outline


def _pin(film: Film, centre: Point, size: float, angle: float) -> Array:
    knots = [(-1.0, 0.1), (0.8, 0.12), (1.05, 0.0), (0.8, -0.14), (-0.7, -0.30), (-1.0, -0.2)]
    path = _turned(curve([*knots, knots[0]], 120) * size, centre, angle)
    film.stroke("metal", 0, path, 0.025)
    x, y = _turned(np.array([[-1.0, -0.05]]) * size, centre, angle)[0]
    film.ellipsoid("metal", (x, y), (0.024, 0.024, 0.02))  # the clasp
    return path


def _bullet(film: Film, centre: Point, size: float, angle: float) -> Array:
    film.ellipsoid("metal", centre, (1.5 * size, 0.75 * size, 0.05), angle)
    return _turned(CIRCLE * (1.5, 0.75) * size, centre, angle)


def _key(film: Film, centre: Point, size: float, angle: float) -> Array:
    ring = 0.33 * CIRCLE - (0.65, 0.0)
    shaft = curve([(-0.32, 0.0), (0.3, 0.0), (0.9, 0.0)], 50)
    teeth = [(0.9, 0.0), (0.9, 0.22), (0.72, 0.22), (0.72, 0.0), (0.6, 0.22), (0.5, 0.0)]
    paths = [_turned(part * size, centre, angle) for part in (ring, shaft, curve(teeth, 60))]
    for width, path in zip((1, 1, 0), paths, strict=True):
        film.stroke("metal", width, path, 0.03)
    return np.concatenate(paths)


def _necklace(film: Film, anatomy: Anatomy, f: Finding) -> Array:
    turn = np.linspace(-np.pi / 2, np.pi / 2, 240)
    top = anatomy.apex - 0.12
    path = np.column_stack((0.21 * np.sin(turn) + 0.02, top + (0.25 + f.extent[0]) * np.cos(turn)))
    film.stroke("metal", 0, path, 0.014 * (1 + np.cos(np.arange(240) * 1.2)))  # beads
    x, y = path[120]
    film.ellipsoid("metal", (x, y + 0.02), (0.022, 0.034, 0.012))
    return np.concatenate((path, [(x, y + 0.054)]))


OBJECTS = {"coin": _coin, "button": _button, "pin": _pin, "bullet": _bullet, "key": _key}
