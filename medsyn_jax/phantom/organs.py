"""The healthy chest on the film: trunk, lungs, heart, vessels, diaphragm, airways, bones."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from medsyn_jax.phantom.film import BONE, Axes, Film, smooth_noise
from medsyn_jax.phantom.thorax import SIGN, TREES, Anatomy, Array, Point, Pose, dome_level, walls

TISSUE = 0.22  # share of a normal lung that is not air


def draw(film: Film, anatomy: Anatomy, rng: np.random.Generator) -> None:
    """Fill the maps of `film` with a chest without findings; `rng` draws the lung texture."""
    _trunk(film, anatomy)
    _lungs(film, anatomy)
    film.air = smooth_noise(rng, film.size, 24) * (-0.13 * TISSUE)
    # blood sinks, so the bases are denser; the side turned away from the tube is darker
    film.air += (1.0 - TISSUE) + 0.05 * (0.25 - film.y)
    film.air -= film.x * (0.10 * film.pose.rotation)
    np.clip(film.air, 0.4, 0.95, out=film.air)
    _vessels(film, anatomy)
    _airways(film, anatomy)
    _spine(film, anatomy)
    _ribs(film, anatomy)
    _shoulder(film, anatomy)


def _trunk(film: Film, anatomy: Anatomy) -> None:
    """Draw chest wall, neck, shoulders, arms and breasts, with soft tissue instead of lungs."""
    x, y, fat = np.abs(film.x), film.y, anatomy.habitus
    side = anatomy.width + 0.12 + 0.16 * fat
    half = side + (1.7 - side) * np.clip((-0.30 - y) / 0.34, 0.0, 1.0) ** 2
    half = half + 0.06 * fat * np.clip(y, 0, 1)
    trunk = np.maximum(1.0 - ((x / half) ** 2) ** 2, 0.0)
    neck = 0.20 + 0.05 * fat
    slope = np.maximum(x - neck, 0.0)
    top = (anatomy.apex - 0.26) + slope * (0.30 + 0.05 * slope)
    trunk *= np.minimum(np.maximum((y - top) * 2.6, 0.0), 1.0)
    np.sqrt(trunk, out=trunk)
    # the belly is thicker than the chest
    trunk *= 0.98 + 0.30 * fat + 0.10 * np.clip(y, 0, 1)
    film.body = trunk
    columns = film.window(0.0, 0.0, neck, 1.2)[1]
    pillar = np.sqrt(np.maximum(1.0 - (x[:, columns] / neck) ** 2, 0.0)) * (0.42 + 0.1 * fat)
    np.maximum(trunk[:, columns], pillar, out=trunk[:, columns])
    if anatomy.sex == "F":
        _breasts(film, 0.75 + 0.5 * fat, 0.20 + 0.12 * fat)
    if film.pose.arms_down:
        for sign in (-1, 1):
            arm = (sign * (side + 0.17), 0.3)
            film.add_ellipsoid(film.body, arm, (0.16 + 0.05 * fat, 1.1, 0.16))
            film.ellipsoid("bone", arm, (0.05, 1.1, 0.03))


def _breasts(film: Film, size: float, level: float) -> None:
    """Draw pendent breasts: a sharp lower fold, and no upper edge."""
    radius = 0.30 * size
    for sign in (-1, 1):
        rows, columns = film.window(sign * 0.39, level, radius, radius)
        across = (film.x[rows, columns] - sign * 0.39) / radius
        down = (film.y[rows] - level) / radius
        chord = np.maximum(1.0 - across * across - down * down, 0.0)
        np.sqrt(chord, out=chord)
        chord *= 0.17 * size * np.clip(0.62 + 0.6 * down, 0.0, 1.0) ** 2
        film.body[rows, columns] += chord


def _lungs(film: Film, anatomy: Anatomy) -> None:
    """Draw the depth of the lungs: an arched box per side, less mediastinum and abdomen."""
    abdomen, mediastinum = np.zeros_like(film.lung), np.zeros_like(film.lung)
    height = 0.52 * (0.75 if anatomy.hyperinflated else 1.0)
    borders = walls(anatomy, film.y)
    middle = 0.5 * (borders.inner + borders.outer)
    half = np.maximum(0.5 * (borders.outer - borders.inner), 1e-3)
    for side in SIGN:
        columns, x = film.half(side)
        across = ((x - middle) / half) ** 2
        chord = np.clip(1.0 - 0.45 * across - 0.55 * across * across, 0.0, 1.0)
        film.lung[:, columns] += np.sqrt(chord) * (0.80 * borders.depth)
        across = (x - 0.55 * anatomy.width) / (0.60 * anatomy.width)
        down = np.minimum(film.y - (dome_level(anatomy, film.pose, side) + height), 0.0) / height
        chord = np.clip(1.0 - across * across - down * down, 0.0, 1.0)
        abdomen[:, columns] += 1.9 * np.sqrt(chord)
    for centre, axes, angle in _mediastinum(anatomy, film.pose):
        film.add_ellipsoid(mediastinum, centre, axes, angle)
    film.masks["lungs"] = (film.lung > 0) & (mediastinum < 0.06) & (abdomen <= 0)
    film.lung -= 1.15 * mediastinum
    film.lung -= abdomen
    np.maximum(film.lung, 0.0, out=film.lung)
    level = dome_level(anatomy, film.pose, "left")
    film.ellipsoid("soft", (0.33, level + 0.14), (0.13, 0.075, -0.10), 0.15)  # the stomach's gas
    film.ellipsoid("soft", (0.12, level + 0.40), (0.12, 0.06, -0.06), -0.4)


def _mediastinum(anatomy: Anatomy, pose: Pose) -> list[tuple[Point, Axes, float]]:
    """Centre, axes and angle of each ellipsoid of heart and great vessels."""
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
        ((0.6 * turn + 0.7 * shift, -0.5), (0.12 * wide, 0.5, 0.15), 0.0),
        ((0.06 + shift, 0.1), (0.09 + 0.06 * anatomy.aorta, 0.75, 0.10), 0.0),
    ]


def _airways(film: Film, anatomy: Anatomy) -> None:
    """Draw trachea and main bronchi: air in the middle of the mediastinum."""
    pose = film.pose
    lean = 0.03 * pose.rotation + 0.9 * pose.push
    t = np.linspace(0, 1, 70)
    trachea = np.column_stack((0.012 + lean * t - 0.02 * t**3 * anatomy.aorta, -1.05 + 0.78 * t))
    film.stroke("soft", 2, trachea, -0.15)
    t = np.linspace(0, 1, 24)
    start = np.array([0.012 + lean - 0.02 * anatomy.aorta, -0.27])
    slopes = np.array([[-0.17, 0.16], [0.17, 0.11]])  # the right bronchus is the steeper one
    film.stroke("soft", 2, start + slopes[:, None] * t[:, None], -0.07 * (1 - 0.6 * t))


def _vessels(film: Film, anatomy: Anatomy) -> None:
    """Draw the pulmonary vessels: a tree on each side, mirrored on the right, and the hila."""
    for (side, sign), number in zip(SIGN.items(), anatomy.trees, strict=True):
        # the right hilum is lower; both move with the heart
        hilum = (sign * 0.145 + 0.3 * film.pose.push, -0.10 if side == "right" else -0.13)
        film.add_ellipsoid(film.vessels, hilum, (0.045, 0.10, 0.022), -0.3 * sign)
        for width, (path, volume) in enumerate(_tree(number)):
            film.queue(True, width, path * (sign, 1.0) + hilum, volume)


@lru_cache(maxsize=TREES)
def _tree(number: int) -> list[tuple[Array, Array]]:
    """Points [n, 2] around the left hilum and their volumes [n], for each stroke width.

    Curved branches leave the hilum like a fan, and twigs leave the branches.
    """
    rng = np.random.Generator(np.random.PCG64(number))
    trunks, twigs, steps = 13, 3, 36
    t = np.linspace(0, 1, steps)
    angle = np.linspace(-1.45, 1.40, trunks) + rng.normal(0, 0.10, trunks)
    bend = rng.normal(0, 0.35, trunks) + 0.25 * np.sign(angle)
    heading = angle[:, None] + bend[:, None] * t
    stride = rng.uniform(0.45, 0.75, (trunks, 1)) / steps
    x, y = (np.cumsum(f(heading) * stride, 1) for f in (np.cos, np.sin))
    bore = rng.uniform(0.022, 0.036, (trunks, 1)) * (1 - 0.8 * t)
    # each twig leaves its branch at a step of its own, bends back, and ends in the periphery
    leave = rng.integers(5, 28, (trunks, twigs))
    fork = rng.uniform(0.35, 0.85, leave.shape) * rng.choice((-1, 1), leave.shape)
    start_x, start_y, width, first = (
        np.take_along_axis(values, leave, 1)[..., None] for values in (x, y, bore, heading)
    )
    turned = first + fork[..., None] * (1 - 0.5 * t)
    short = rng.uniform(0.16, 0.36, (trunks, twigs, 1)) / steps
    twig_x = start_x + np.cumsum(np.cos(turned) * short, 2)
    twig_y = start_y + np.cumsum(np.sin(turned) * short, 2)
    twig_bore = 0.6 * width * (1 - 0.8 * t)
    path = np.column_stack([np.append(x, twig_x), np.append(y, twig_y)])
    # 4.2: so few vessels need more contrast than real ones
    volume = 4.2 * np.pi / 4 * np.append(bore**2 * stride, twig_bore**2 * short)
    bores = np.append(np.maximum(bore, 0.011), twig_bore)  # long strides need a wide stroke
    classes = np.searchsorted((0.0109, 0.021), bores)
    return [(path[classes == width], volume[classes == width]) for width in range(3)]


def _spine(film: Film, anatomy: Anatomy) -> None:
    """Draw vertebral bodies with paler discs, pedicles and spinous processes."""
    y, turn = film.y, film.pose.rotation
    # the spine bows, and moves against the sense of the rotation
    middle = anatomy.scoliosis * np.cos(np.pi * 0.75 * y) - 0.05 * turn
    columns = film.window(0.0, 0.0, 0.30, 1.0)[1]
    x = film.x[:, columns] - middle
    across = (x / (0.088 + 0.014 * (y + 1))) ** 2
    phase = 2 * np.pi * ((y + 0.3 * anatomy.ribs[0]) / anatomy.ribs[1] * 1.02)
    bone = np.maximum(1.0 - across * across * across, 0.0)
    bone *= 0.075 + 0.022 * np.tanh(3.0 * np.cos(phase) + 1.2)
    pedicle = (np.cos(phase + 0.9) > 0.55) * np.float32(0.018)
    bone += (np.abs(across - 0.42) < 0.16) * pedicle
    process = (np.cos(phase - 1.6) > 0.45) * np.float32(0.018)
    bone += (np.abs(x - 0.012 * turn) < 0.016) * process
    film.dense[:, columns] += BONE * bone


def _ribs(film: Film, anatomy: Anatomy) -> None:
    """Draw all ribs at once, as a periodic function of the level along a rib."""
    offset, spacing, drop = anatomy.ribs
    borders = walls(anatomy, film.y)
    u = np.abs(film.x) * (1.0 / np.maximum(borders.outer + 0.015, 1e-3))
    cage = (u < 1.0).astype(np.float32)
    below = np.clip((film.y - dome_level(anatomy, film.pose, "right")) * 3, 0.0, 0.5)
    cage *= (borders.depth > 0.02) * (1.0 - below)
    u2 = u * u
    u4 = u2 * u2
    cage *= 1.0 + 1.6 * u4 * u2  # the beam runs along the rib where it turns the corner
    fall = (drop + 0.05 * (1 - film.pose.breath)) / spacing
    back = film.y / spacing + offset - fall * (u4 + 0.5 * u2) + (0.12 / spacing) * u
    bone = _tube(back, spacing / 0.030)
    spacing *= 1.12
    front = film.y / spacing + offset + 0.37 + (0.42 / spacing) * u2 - (0.10 / spacing) * u
    bone += _tube(front, spacing / 0.034) * np.clip((u - 0.42) * 3.5, 0.0, 0.7)
    film.dense += (BONE * 0.035) * (bone * cage)


def _tube(phase: Array, width: float) -> Array:
    """Chord of a hollow rod at each whole phase: two bright edges and a paler core."""
    square = ((phase - np.rint(phase)) * width) ** 2
    return np.maximum(1.0 - square, 0.0) * (0.42 + 1.9 * square)


_STEPS = np.linspace(0, 6, 110)
BLADE = np.column_stack((  # outline of the left shoulder blade
    np.interp(_STEPS, range(7), (0.66, 0.60, 0.57, 0.60, 0.66, 0.74, 0.84)),
    np.interp(_STEPS, range(7), (-0.60, -0.42, -0.22, -0.06, -0.14, -0.34, -0.52)),
))  # fmt: skip


def _shoulder(film: Film, anatomy: Anatomy) -> None:
    """Draw clavicles, scapulae and humeral heads."""
    pose = film.pose
    lift = 0.0 if pose.view == "PA" else -0.05
    signs = np.array([[-1.0], [1.0]])
    t = np.linspace(0, 1, 70)
    start = 0.085 + signs * (0.075 * pose.rotation)
    level = anatomy.apex + 0.20 + lift - 0.17 * t + 0.035 * np.sin(2 * np.pi * t)
    x, y = signs * (start + (0.76 - start) * t), np.broadcast_to(level, (2, len(t)))
    film.stroke("bone", 2, np.stack((x, y), -1), 0.050)
    for edge in (-0.021, 0.021):
        film.stroke("bone", 0, np.stack((x, y + edge), -1), 0.028)
    out = 0.0 if pose.view == "AP" else 0.10  # the arms rolled forward clear the lungs
    blades = np.stack([np.add(BLADE, (out, 0.0)) * (sign, 1.0) for sign in (-1, 1)])
    film.stroke("bone", 1, blades, 0.022)
    for sign in (-1, 1):
        film.ellipsoid("bone", (sign * (0.69 + out), -0.33), (0.08, 0.28, 0.012), -0.28 * sign)
        head = (sign * (0.93 + 0.5 * out), anatomy.apex + 0.23)
        film.ellipsoid("bone", head, (0.115, 0.125, 0.035))
        if not pose.arms_down:
            arm = (head[0] + 0.16 * sign, head[1] + 0.30)
            film.ellipsoid("bone", arm, (0.06, 0.32, 0.03), -0.5 * sign)
    turn = 0.06 * pose.rotation
    film.ellipsoid("bone", (turn, anatomy.apex + 0.27), (0.10, 0.12, 0.012))
