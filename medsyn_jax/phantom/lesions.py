"""Findings on the film, with the masks and boxes of the findings that have them."""

from __future__ import annotations

import numpy as np

from medsyn_jax.phantom import findings
from medsyn_jax.phantom.film import Film, smooth_noise
from medsyn_jax.phantom.findings import Finding, Plan
from medsyn_jax.phantom.thorax import SIGN, WIDEST, Anatomy, Array, dome_level, lung_point, walls


def draw(film: Film, plan: Plan, rng: np.random.Generator) -> None:
    """Draw all findings but the foreign objects, in the order of DRAWS."""
    texture = 0.85 * smooth_noise(rng, film.size, 18) + 0.25 * smooth_noise(rng, film.size, 44)
    for label, draw_focus in DRAWS.items():
        for f in plan.findings:
            if f.label == label:
                draw_focus(film, plan.anatomy, f, texture)


def _consolidation(film: Film, anatomy: Anatomy, f: Finding, texture: Array) -> None:
    x, y = lung_point(anatomy, film.pose, f.side, *f.place)
    a, b = f.extent
    rows, columns = film.window(x, y, 1.5 * a, 1.5 * b)
    dx, dy = film.x[rows, columns] - x, film.y[rows] - y
    dx = dx + f.angle * dy
    rough = texture[rows, columns]
    fill = 0.95 - (dx / a) ** 2 - (dy / b) ** 2 + 0.40 * rough
    if f.kind == "lobar":  # a straight lower border, the minor fissure
        fill = np.minimum(fill + 0.3, (0.55 * b - dy + 0.15 * dx) * 22)
    fill = np.clip(fill, 0.0, 1.0) * np.clip(0.9 + 0.2 * rough, 0.5, 1.1)
    fill *= (0.40, 0.62, 0.88)[f.grade] * (1.0 if f.certain else 0.8)
    film.air[rows, columns] *= 1.0 - fill
    visible = fill * film.lung[rows, columns]
    down, across = np.nonzero(visible >= 0.3 * visible.max())
    x0, y0 = float(columns.start + across.min()), float(rows.start + down.min())
    x1, y1 = float(columns.start + across.max() + 1), float(rows.start + down.max() + 1)
    film.boxes.append((findings.CONSOLIDATION, x0, y0, x1, y1))


def _lesion(film: Film, anatomy: Anatomy, f: Finding, texture: Array) -> None:
    x, y = lung_point(anatomy, film.pose, f.side, *f.place)
    a, b = f.extent
    depth = 0.5 * (a + b) * (0.9 if f.certain else 0.6)
    film.ellipsoid("soft", (x, y), (a, b, 0.95 * depth), f.angle)
    film.add_box(findings.LESION, np.array([[x - a, y - b], [x + a, y + b]]))


def _edema(film: Film, anatomy: Anatomy, f: Finding, texture: Array) -> None:
    amount = (0.17, 0.36, 0.62)[f.grade] * (0.7 if not f.certain else 1.0)
    away = (np.abs(film.x) - 0.22) / 0.30
    low = (film.y - 0.02) / 0.40
    wing = np.exp(-away * away - low * low)
    if f.kind == "alveolar":
        wing *= np.clip(0.85 + 0.45 * texture, 0.1, 1.5)
    else:
        wing += 0.25 + 0.12 * texture
    film.air *= 1.0 - np.clip(amount * wing, 0.0, 0.8)
    film.engorged = 1.5 + 0.45 * f.grade
    t = np.linspace(0, 1, 10)
    for side, sign in SIGN.items():  # Kerley B lines: short, level, at the edge of the bases
        base = dome_level(anatomy, film.pose, side)
        for step in range(2 + 2 * f.grade):
            y = base + 0.04 - 0.05 * step
            edge = float(walls(anatomy, y).outer) - 0.01
            path = np.column_stack((sign * (edge - 0.075 * t), np.full(10, y)))
            film.stroke("soft", 0, path, 0.02 + 0.012 * f.grade)


def _atelectasis(film: Film, anatomy: Anatomy, f: Finding, texture: Array) -> None:
    faint = 1.0 if f.certain else 0.7
    if f.kind == "linear":
        x, y = lung_point(anatomy, film.pose, f.side, *f.place)
        t = np.linspace(-1, 1, 60)
        for line in range(1 + f.grade):
            across = x + f.extent[0] * t * (1 - 0.2 * line)
            down = y + 0.055 * line + f.extent[0] * f.angle * t
            amount = faint * (0.07, 0.10, 0.14)[f.grade] * (1 - 0.6 * t * t)
            film.stroke("soft", 1, np.column_stack((across, down)), amount)
        return
    columns, x = film.half(f.side)
    up = (dome_level(anatomy, film.pose, f.side) + 0.03 - film.y) / (0.10 + 0.05 * f.grade)
    haze = np.exp(-(np.clip(up, 0, None) ** 2) - ((x - 0.26) / 0.24) ** 2)
    haze *= (0.42, 0.62, 0.85)[f.grade] * faint * np.clip(1 + 0.25 * texture[:, columns], 0, 1.1)
    film.air[:, columns] *= 1.0 - np.clip(haze, 0.0, 0.95)


def _pneumothorax(film: Film, anatomy: Anatomy, f: Finding, texture: Array) -> None:
    """The lung shrinks away from the chest wall; air without vessels takes its place."""
    vary = f.extent[0]
    drop = (0.14 + 0.08 * vary, 0.22 + 0.10 * vary, 0.36 + 0.16 * vary)[f.grade]
    shrink = (0.02 + 0.01 * vary, 0.08 + 0.05 * vary, 0.22 + 0.12 * vary)[f.grade]
    if not f.certain:
        drop, shrink = 0.11, 0.015
    columns, x = film.half(f.side)
    rest = walls(anatomy, film.y, drop, shrink)
    free = film.masks["lungs"][:, columns] & (x > 0)
    free &= (x > rest.outer) | (x < rest.inner) | (film.y < anatomy.apex + drop)
    free &= (x > 0.16) | (film.y < -0.3)
    film.air[:, columns] *= 1.0 - (0.04, 0.10, 0.30)[f.grade]
    film.air[:, columns][free] = 0.99
    film.masks["pneumothorax"][:, columns] |= free
    turn = np.linspace(-0.9, np.pi * 0.80, 260)  # the pleural line
    top, outer = anatomy.apex + drop, anatomy.width - shrink
    peak = 0.42 * anatomy.width - 0.5 * shrink
    across = np.where(np.cos(turn) > 0, outer - peak, peak - 0.105) * np.cos(turn)
    x = np.where(turn < 0, outer, peak + across)
    y = np.where(turn < 0, WIDEST - 0.6 * turn, WIDEST - (WIDEST - top) * np.sin(turn))
    keep = y < dome_level(anatomy, film.pose, f.side)
    film.stroke("soft", 0, np.column_stack((SIGN[f.side] * x, y))[keep], 0.05)


def _effusion(film: Film, anatomy: Anatomy, f: Finding, texture: Array) -> None:
    """Fluid: a meniscus that climbs at the side, or a veil when it lies behind the lung."""
    vary = f.extent[0]
    columns, x = film.half(f.side)
    level = dome_level(anatomy, film.pose, f.side)
    borders = walls(anatomy, film.y)
    span = np.maximum(borders.outer - borders.inner, 1e-3)
    share = np.clip((x - borders.inner) / span, 0.0, 1.0)
    if f.kind == "layering":
        veil = np.clip((film.y - anatomy.apex - 0.25) / (level - anatomy.apex), 0, 1)
        veil = np.broadcast_to(veil * (0.34, 0.55, 0.80)[f.grade], share.shape)
        fluid = veil + 0.6 * np.clip((film.y - level - 0.03 + 0.10 * share) / 0.06, 0, 1)
        wet = fluid > 0.18
    else:
        height = (0.005 + 0.06 * vary, 0.12 + 0.14 * vary, 0.36 + 0.30 * vary)[f.grade]
        if not f.certain:
            height = 0.0
        climb = (0.05 + 0.04 * vary, 0.19, 0.19)[f.grade]
        surface = level + 0.10 - height - climb * share * share * share
        fluid = np.clip((film.y - surface) / 0.035, 0, 1)
        wet = film.y > surface
    film.air[:, columns] *= 1.0 - np.clip(fluid, 0.0, 1.0)
    film.masks["effusion"][:, columns] |= wet & film.masks["lungs"][:, columns] & (x > 0)


# in the order of drawing: pneumothorax and effusion cover the others
DRAWS = {
    findings.EDEMA: _edema,
    findings.CONSOLIDATION: _consolidation,
    findings.ATELECTASIS: _atelectasis,
    findings.LESION: _lesion,
    findings.PNEUMOTHORAX: _pneumothorax,
    findings.EFFUSION: _effusion,
}
