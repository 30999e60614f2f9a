"""Puts the healthy chest on the film: trunk, lungs, heart and vessels, diaphragm, airways, skeleton."""

from __future__ import annotations

import numpy as np

from medsyn_jax.data.film import Array, Film, add_ellipsoid, smooth_noise
from medsyn_jax.data.thorax import SIGN, Anatomy, Pose, dome_level, walls

TISSUE = 0.22  # share of a normal lung that is not air


def draw(film: Film, anatomy: Anatomy, rng: np.random.Generator) -> None:
    """Fills the maps of `film` with a chest without findings. `rng` is drawn alike at each size."""
    texture = smooth_noise(rng, film.size, 24)
    _trunk(film, anatomy)
    _lungs(film, anatomy)
    film.air = 1.0 - TISSUE * (1.0 + 0.22 * texture)
    film.air += 0.05 * (0.25 - film.y)  # blood sinks, so the bases are denser
    turn = film.pose.rotation * 0.05
    film.air += np.clip(-film.x * (2 * turn), -0.03, 0.03)
    np.clip(film.air, 0.4, 0.95, out=film.air)
    _vessels(film, anatomy)
    _spine(film, anatomy)
    _ribs(film, anatomy)
    _shoulder(film, anatomy)


def _trunk(film: Film, anatomy: Anatomy) -> None:
    """Chest wall, neck, shoulders, arms, breasts: everything soft, before the lungs are taken out."""
    x, y, fat = np.abs(film.x), film.y, anatomy.habitus
    side = anatomy.width + 0.12 + 0.16 * fat
    half = side + (1.7 - side) * np.clip((-0.30 - y) / 0.34, 0.0, 1.0) ** 2
    half = half + 0.06 * fat * np.clip(y, 0, 1)
    across = x / half
    across *= across
    trunk = np.sqrt(np.clip(1.0 - across * across, 0.0, 1.0))
    neck = 0.20 + 0.05 * fat
    slope = np.maximum(x - neck, 0.0)
    top = anatomy.apex - 0.26 + 0.30 * slope + 0.05 * slope * slope
    rise = np.clip((y - top) * 2.6, 0.0, 1.0)
    trunk *= np.sqrt(rise)
    pillar = np.sqrt(np.clip(1.0 - (x / neck) ** 2, 0.0, 1.0)) * (0.42 + 0.1 * fat)
    depth = 0.98 + 0.30 * fat
    # belly and shoulders are thicker than the ribs' middle
    film.body = np.maximum(trunk * (depth + 0.10 * np.clip(y, 0, 1)), pillar)
    if anatomy.sex == "F":
        size = 0.75 + 0.5 * fat
        for sign in (-1, 1):
            film.ellipsoid(
                "body", (sign * 0.40, 0.20 + 0.12 * fat), (0.30 * size, 0.30 * size, 0.085 * size)
            )
    if film.pose.arms_down:
        for sign in (-1, 1):
            film.ellipsoid("body", (sign * (side + 0.17), 0.3), (0.16 + 0.05 * fat, 1.1, 0.16))
            film.ellipsoid("bone", (sign * (side + 0.18), 0.3), (0.05, 1.1, 0.03))


def _lungs(film: Film, anatomy: Anatomy) -> None:
    """Lung depth: an arched box per side, less what heart, great vessels and abdomen take."""
    pose = film.pose
    inside = np.zeros((film.size, film.size), bool)
    for side, sign in SIGN.items():
        columns = film.half(side)
        x = film.x[:, columns] * sign
        borders = walls(anatomy, film.y)
        middle = 0.5 * (borders.inner + borders.outer)
        half = np.maximum(0.5 * (borders.outer - borders.inner), 1e-3)
        across = (x - middle) / half
        across *= across
        chord = np.clip(1.0 - 0.45 * across - 0.55 * across * across, 0.0, 1.0)
        np.sqrt(chord, out=chord)
        chord *= 0.80 * borders.depth
        film.lung[:, columns] += chord
        inside[:, columns] |= chord > 0
    middle = np.zeros_like(film.lung)
    for centre, axes, angle in _mediastinum(anatomy, pose):
        add_ellipsoid(film, middle, centre, axes, angle)
    abdomen = np.zeros_like(film.lung)
    flat = 0.75 if anatomy.hyperinflated else 1.0
    for side, sign in SIGN.items():
        level = dome_level(anatomy, pose, side)
        middle_x, low = sign * 0.55 * anatomy.width, level + 0.52 * flat
        across = (film.x[:, film.half(side)] - middle_x) / (0.60 * anatomy.width)
        down = np.minimum(film.y - low, 0.0) / (0.52 * flat)
        chord = np.clip(1.0 - across * across - down * down, 0.0, 1.0)
        abdomen[:, film.half(side)] += 1.9 * np.sqrt(chord)
    film.field_mask = inside & (middle < 0.06) & (abdomen <= 0)
    film.lung -= 1.15 * middle
    film.lung -= abdomen
    np.maximum(film.lung, 0.0, out=film.lung)
    level = dome_level(anatomy, pose, "left")
    film.ellipsoid("body", (0.33, level + 0.14), (0.13, 0.075, 0.10), 0.15, -1.0)
    film.ellipsoid("body", (0.12, level + 0.40), (0.12, 0.06, 0.06), -0.4, -1.0)
    _airways(film, anatomy)


Ellipsoid = tuple[tuple[float, float], tuple[float, float, float], float]


def _mediastinum(anatomy: Anatomy, pose: Pose) -> list[Ellipsoid]:
    """Centre, axes and angle of each ball of heart and great vessels."""
    turn, shift = pose.rotation * 0.05, pose.push
    wide = 1.10 if pose.view == "AP" else 1.0
    ratio = anatomy.ratio * wide * (1.06 - 0.08 * min(pose.breath, 1.0))
    reach = ratio * anatomy.width  # half the transverse diameter
    low = min(dome_level(anatomy, pose, s) for s in SIGN)
    middle = low + 0.06 - 0.52 * reach
    centre = 0.30 * reach + turn + shift
    knob = (0.075 + 0.05 * anatomy.aorta) * wide
    lift = 0.05 * anatomy.aorta
    aorta = (0.085 + 0.05 * anatomy.aorta) * wide
    return [
        ((centre, middle), (1.10 * reach, 0.76 * reach, 0.30), 0.50),
        ((centre - 0.55 * reach, middle - 0.03), (0.42 * reach, 0.66 * reach, 0.20), 0.0),
        ((0.075 + 0.5 * knob + turn + shift, -0.37 - lift), (knob, 1.15 * knob, 0.14), 0.0),
        ((0.08 + turn + shift, -0.16), (0.12 * wide, 0.20, 0.13), 0.15),
        ((-0.055 + turn + shift, -0.25), (aorta, 0.40, 0.16), 0.0),
        ((0.0 + 0.6 * turn + 0.7 * shift, -0.5), (0.12 * wide, 0.5, 0.15), 0.0),
        ((0.06 + shift, 0.1), (0.09 + 0.06 * anatomy.aorta, 0.75, 0.10), 0.0),
    ]


def _airways(film: Film, anatomy: Anatomy) -> None:
    """Trachea and main bronchi: air in the middle of the mediastinum."""
    pose = film.pose
    lean = 0.03 * pose.rotation + 0.9 * pose.push
    t = np.linspace(0, 1, 70)
    trachea = np.column_stack((0.012 + lean * t - 0.02 * t**3 * anatomy.aorta, -1.05 + 0.78 * t))
    film.stroke("soft", 2, trachea + [0.014, 0], -0.085)
    film.stroke("soft", 2, trachea - [0.014, 0], -0.085)
    t = np.linspace(0, 1, 24)
    for sign, steep in ((-1, 0.16), (1, 0.11)):
        path = np.column_stack(
            (0.012 + lean - 0.02 * anatomy.aorta + sign * 0.17 * t, -0.27 + steep * t)
        )
        film.stroke("soft", 2, path, -0.07 * (1 - 0.6 * t))


def _vessels(film: Film, anatomy: Anatomy) -> None:
    """Pulmonary vessels as a tree of curved paths from each hilum, splatted as points."""
    rng = np.random.Generator(np.random.PCG64(anatomy.tree))
    trunks, twigs, steps = 11, 3, 60
    t = np.linspace(0, 1, steps)
    for side, sign in SIGN.items():
        hilum = (0.15 + 0.3 * sign * film.pose.push, -0.10 if side == "right" else -0.13)
        film.ellipsoid("vessels", (sign * hilum[0], hilum[1]), (0.05, 0.09, 0.035), -0.3 * sign)
        angle = np.linspace(-1.45, 1.40, trunks) + rng.normal(0, 0.10, trunks)
        length = rng.uniform(0.42, 0.72, trunks)
        bend = rng.normal(0, 0.35, trunks) + 0.25 * np.sign(angle)
        heading = angle[:, None] + bend[:, None] * t
        stride = (length / steps)[:, None]
        px = hilum[0] + np.cumsum(np.cos(heading) * stride, 1)
        py = hilum[1] + np.cumsum(np.sin(heading) * stride, 1)
        bore = 0.030 * (1 - 0.8 * t) * rng.uniform(0.7, 1.2, trunks)[:, None]
        _branch(film, sign, px, py, stride, bore)
        starts = rng.integers(8, 46, (trunks, twigs))
        fork = rng.uniform(0.35, 0.85, (trunks, twigs)) * rng.choice((-1, 1), (trunks, twigs))
        rows = np.arange(trunks)[:, None]
        first = heading[rows, starts] + fork
        turn = first[..., None] - 0.5 * fork[..., None] * t
        stride = (rng.uniform(0.16, 0.36, (trunks, twigs)) / steps)[..., None]
        tx = px[rows, starts][..., None] + np.cumsum(np.cos(turn) * stride, 2)
        ty = py[rows, starts][..., None] + np.cumsum(np.sin(turn) * stride, 2)
        bore = 0.55 * bore[rows, starts][..., None] * (1 - 0.8 * t)
        _branch(film, sign, tx, ty, stride, bore)


def _branch(film: Film, sign: float, x: Array, y: Array, stride: Array, bore: Array) -> None:
    """Queues the points of a set of branches; each goes to the stroke width nearest to its bore."""
    mass = (np.pi / 4 * bore * bore * stride * (film.size / 2 / film.pose.zoom) ** 2).ravel()
    width = np.digitize(bore.ravel(), (0.011, 0.021))
    points = np.column_stack((sign * x.ravel(), y.ravel()))
    for step in range(3):
        chosen = width == step
        film.queue("vessels", step, points[chosen], 3.6 * mass[chosen])


def _spine(film: Film, anatomy: Anatomy) -> None:
    """Vertebral bodies with paler discs, pedicles and spinous processes."""
    y = film.y
    middle = spine_line(anatomy, film.pose, y)
    across = (film.x - middle) / (0.088 + 0.014 * (y + 1))
    across *= across
    profile = np.clip(1.0 - across * across * across, 0.0, 1.0)
    phase = (y + 0.3 * anatomy.ribs[0]) / anatomy.ribs[1] * 1.02
    body = 0.075 + 0.022 * np.tanh(3.0 * np.cos(2 * np.pi * phase) + 1.2)
    film.bone += profile * body
    knots = np.abs(across - 0.42) < 0.16
    film.bone += 0.018 * (knots & (np.cos(2 * np.pi * phase + 0.9) > 0.55))
    process = np.abs(film.x - middle - 0.012 * film.pose.rotation) < 0.016
    film.bone += 0.018 * (process & (np.cos(2 * np.pi * phase - 1.6) > 0.45))


def spine_line(anatomy: Anatomy, pose: Pose, y: Array | float) -> Array | float:
    """Where the middle of the spine runs: a bow, and against the sense of the rotation."""
    return anatomy.scoliosis * np.cos(np.pi * 0.75 * np.asarray(y)) - 0.05 * pose.rotation


def _ribs(film: Film, anatomy: Anatomy) -> None:
    """All ribs at once: a periodic function of the level that each pixel has along a rib."""
    offset, spacing, drop = anatomy.ribs
    breath = film.pose.breath
    borders = walls(anatomy, film.y)
    outer = np.maximum(borders.outer + 0.015, 1e-3)
    u = np.abs(film.x - 0.35 * spine_line(anatomy, film.pose, film.y)) / outer
    reach = (u < 1.0) & (borders.depth > 0.02)
    u = np.minimum(u, 1.0)
    u2 = u * u
    tangent = 1.0 / np.sqrt(1.06 - u2 * u2)  # the beam runs along the rib where it turns the corner
    fall = drop + 0.05 * (1 - breath)
    back = film.y - (fall * u2 * u2 + 0.5 * fall * u2 - 0.12 * u)
    z = np.mod(back / spacing + offset, 1.0) - 0.5
    film.bone += _tube(z * (spacing / 0.030)) * np.minimum(tangent, 2.4) * reach * 0.030
    steep = 0.42
    front = film.y + steep * u2 - 0.1 * u
    z = np.mod(front / (1.12 * spacing) + offset + 0.37, 1.0) - 0.5
    fade = np.clip((u - 0.42) * 5.0, 0.0, 1.0) * reach
    film.bone += _tube(z * (1.12 * spacing / 0.034)) * np.minimum(tangent, 2.0) * fade * 0.021


def _tube(z: Array) -> Array:
    """Chord of a hollow rod across its width, z = -1..1: two bright edges and a paler core."""
    z2 = z * z
    shell = np.sqrt(np.clip(1.0 - z2, 0.0, 1.0))
    return shell - 0.55 * np.sqrt(np.clip(1.0 - 1.7 * z2, 0.0, 1.0)) + 0.25 * (z2 < 1)


def _shoulder(film: Film, anatomy: Anatomy) -> None:
    """Clavicles, scapulae and humeral heads."""
    pose = film.pose
    lift = 0.0 if pose.view == "PA" else -0.05
    t = np.linspace(0, 1, 90)
    for sign in (-1, 1):
        start = 0.085 + sign * 0.075 * pose.rotation
        x = start + (0.76 - start) * t
        y = anatomy.apex + 0.20 + lift - 0.17 * t + 0.035 * np.sin(2 * np.pi * t)
        path = np.column_stack((sign * x, y))
        film.stroke("bone", 2, path, 0.030)
        for edge in (-0.020, 0.020):
            film.stroke("bone", 0, path + [0, edge * 1.05], 0.016)
        out = 0.0 if pose.view == "AP" else 0.10  # the arms rolled forward clear the lungs
        blade = np.array(
            [
                [0.66 + out, -0.60],
                [0.60 + out, -0.42],
                [0.57 + out, -0.22],
                [0.60 + out, -0.06],
                [0.66 + out, -0.14],
                [0.74 + out, -0.34],
                [0.84 + out, -0.52],
            ]
        )
        edge = np.column_stack(
            [np.interp(np.linspace(0, 6, 110), np.arange(7), blade[:, k]) for k in (0, 1)]
        )
        film.stroke("bone", 1, edge * [sign, 1.0], 0.014)
        film.ellipsoid("bone", (sign * (0.69 + out), -0.33), (0.08, 0.28, 0.008), -0.28 * sign)
        head = (sign * (0.93 + 0.5 * out), anatomy.apex + 0.23)
        film.ellipsoid("bone", head, (0.115, 0.125, 0.035))
        if not pose.arms_down:
            film.ellipsoid(
                "bone", (head[0] + 0.16 * sign, head[1] + 0.30), (0.06, 0.32, 0.03), -0.5 * sign
            )
    turn = 0.06 * pose.rotation
    film.ellipsoid("bone", (turn, anatomy.apex + 0.27), (0.10, 0.12, 0.012))
