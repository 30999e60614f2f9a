"""The subject and the pose: all sizes, levels and angles of the phantom thorax, but no pixel.

Lengths are in half film widths (about 20 cm), across the film and along the beam alike. Film and
body coordinates run right (towards the patient's left) and down. No random draw depends on the
size of the film, so one study looks the same at each size.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import numpy as np

Array = np.ndarray
Point = tuple[float, float]  # body coordinates x, y
SIGN = {"right": -1.0, "left": 1.0}  # the patient's right is on the left of the film
WIDEST = 0.25  # level at which the rib cage is widest
TREES = 64  # number of different vessel trees


@dataclass(frozen=True)
class Anatomy:
    """Traits of a subject, the same in each study."""

    sex: str
    age: int
    habitus: float  # 0 thin .. 1 obese
    width: float  # half the inner width of the rib cage
    apex: float  # level of the lung apices
    ratio: float  # cardiothoracic ratio on a full breath, postero-anterior
    aorta: float  # 0 small aortic knob .. 1 tortuous and wide
    scoliosis: float  # sideways bow of the spine; > 0 convex to the patient's left
    hyperinflated: bool
    right_dome: float  # extra height of the right hemidiaphragm over the left
    ribs: tuple[float, float, float]  # offset, spacing, drop towards the side
    trees: tuple[int, int]  # numbers of the vessel trees, right and left
    sternotomy: bool
    pacemaker: str  # side of the generator, or ''


@dataclass(frozen=True)
class Pose:
    """Conditions of one exposure."""

    view: str  # 'PA' | 'AP'
    breath: float  # 0 expiration .. 1 full inspiration
    rotation: float  # -1 .. 1; > 0 turned to the patient's left
    tilt: float
    zoom: float
    shift: tuple[float, float]
    exposure: float  # -1 underexposed (pale) .. 1 overexposed (dark)
    contrast: float
    noise: float
    collimation: tuple[float, ...]  # dark margin: left, top, right, bottom
    marker: str  # 'L' | 'R' | ''
    arms_down: bool
    push: float = 0.0  # shift of heart and trachea; > 0 towards the patient's left
    domes: tuple[float, float] = (0.0, 0.0)  # extra height of the right and the left diaphragm


def draw_anatomy(rng: Random, ratio: float) -> Anatomy:
    """Draw a subject with the cardiothoracic ratio `ratio`."""
    sex = rng.choice(("F", "M"))
    age = min(95, max(18, round(rng.gauss(61, 17))))
    old = max(0.0, (age - 55) / 40)
    bow = rng.uniform(0.05, 0.11) * rng.choice((-1, 1)) if rng.random() < 0.16 else 0.0
    surgery = rng.random()
    return Anatomy(
        sex=sex,
        age=age,
        habitus=min(1.0, max(0.0, rng.gauss(0.42, 0.26))),
        width=rng.uniform(0.62, 0.71) - (0.03 if sex == "F" else 0.0),
        apex=rng.uniform(-0.82, -0.72),
        ratio=ratio,
        aorta=min(1.0, max(0.0, rng.gauss(0.2 + 0.45 * old, 0.2))),
        scoliosis=bow + rng.gauss(0, 0.008),
        hyperinflated=rng.random() < 0.09,
        right_dome=rng.uniform(0.02, 0.06),
        ribs=(rng.uniform(0, 1), rng.uniform(0.135, 0.158), rng.uniform(0.10, 0.22)),
        trees=(rng.randrange(TREES), rng.randrange(TREES)),
        sternotomy=surgery < 0.10 + 0.08 * old,
        pacemaker="" if rng.random() < 0.91 else rng.choice(("left", "left", "left", "right")),
    )


def draw_pose(rng: Random, anatomy: Anatomy) -> Pose:
    """Draw one exposure of the subject."""
    bedside = rng.random() < 0.40 + 0.25 * (anatomy.age > 75)
    if anatomy.hyperinflated:
        breath = rng.uniform(0.92, 1.1)
    else:
        breath = rng.uniform(0.05, 0.85) if bedside else rng.uniform(0.45, 0.95)
    rotation = min(1.0, max(-1.0, rng.gauss(0, 0.40 if bedside else 0.22)))
    closed = rng.random() < 0.3
    margins = (0.05, 0.05, 0.05, 0.1)
    margins = tuple(rng.uniform(0.0, m) * (closed and rng.random() < 0.6) for m in margins)
    return Pose(
        view="AP" if bedside else "PA",
        breath=breath,
        rotation=rotation,
        tilt=rng.gauss(0, 0.035 if bedside else 0.015),
        zoom=rng.uniform(0.80, 0.95),
        shift=(rng.gauss(0, 0.03), rng.gauss(0.06, 0.03)),
        exposure=min(1.0, max(-1.0, rng.gauss(0, 0.4))),
        contrast=rng.uniform(0.85, 1.15) * (0.92 if bedside else 1.0),
        noise=rng.uniform(0.6, 1.6) * (1.4 if bedside else 1.0),
        collimation=margins,
        marker=rng.choice(("L", "R", "L", "")),
        arms_down=bedside and rng.random() < 0.7,
    )


class Walls(NamedTuple):
    """Inner and outer border of a lung, as |x|, and its depth along the beam (0..1), by level."""

    inner: Array
    outer: Array
    depth: Array


def walls(anatomy: Anatomy, y: Array | float, drop: float = 0.0, shrink: float = 0.0) -> Walls:
    """Borders of a lung at the levels y; collapse lowers the apex and moves the side inwards."""
    top, side = anatomy.apex + drop, anatomy.width - shrink
    peak = 0.42 * anatomy.width - 0.5 * shrink
    up = np.clip((WIDEST - y) / (WIDEST - top), 0.0, 1.0)
    arch = np.sqrt(1.0 - up * up)
    flat = np.sqrt(1.0 - up**6)
    taper = 0.10 * np.clip(y - WIDEST, 0.0, 1.0) ** 2
    return Walls(peak - (peak - 0.105) * flat, peak + (side - peak) * arch - taper, arch)


def dome_level(anatomy: Anatomy, pose: Pose, side: str) -> float:
    """Level of the top of a hemidiaphragm."""
    level = 0.14 + 0.36 * pose.breath + (0.03 if anatomy.hyperinflated else 0.0)
    if side == "right":
        return level - 0.5 * anatomy.right_dome - pose.domes[0]
    return level + 0.5 * anatomy.right_dome - pose.domes[1]


def lung_point(anatomy: Anatomy, pose: Pose, side: str, across: float, down: float) -> Point:
    """Body coordinates of a place in a lung, 0..1 from its inner border out and its apex down."""
    y = anatomy.apex + down * (dome_level(anatomy, pose, side) - anatomy.apex)
    borders = walls(anatomy, y)
    x = float(borders.inner + across * (borders.outer - borders.inner))
    return SIGN[side] * x, y
