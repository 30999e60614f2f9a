"""What a phantom study shows: findings with side, zone and grade, and the hardware."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from medsyn_jax.phantom.thorax import Anatomy, Pose

CARDIOMEGALY, EFFUSION, PNEUMOTHORAX = "Cardiomegaly", "Pleural Effusion", "Pneumothorax"
CONSOLIDATION, EDEMA, ATELECTASIS = "Consolidation", "Edema", "Atelectasis"
LESION, FOREIGN = "Lung Lesion", "Foreign Object"
LABELS = (
    "No Finding", CARDIOMEGALY, EFFUSION, PNEUMOTHORAX, CONSOLIDATION, EDEMA, ATELECTASIS, LESION,
    FOREIGN,
)  # fmt: skip
SIDES, ZONES = ("right", "left"), ("upper", "mid", "lower")

# heart width over chest width by grade; None is a heart that is not enlarged
RATIOS = {None: (0.39, 0.50), 0: (0.535, 0.58), 1: (0.58, 0.63), 2: (0.63, 0.71)}
ENLARGED = 0.19  # share of subjects with an enlarged heart
HEALTHY = 0.36  # share of studies without findings among the others
# chance of each further finding in a study that is not healthy
CHANCES = {
    EFFUSION: 0.30, PNEUMOTHORAX: 0.20, CONSOLIDATION: 0.27, EDEMA: 0.20, ATELECTASIS: 0.27,
    LESION: 0.20, FOREIGN: 0.19,
}  # fmt: skip
UNCERTAIN = 0.08  # share of findings that are faint and that the reader leaves open


@dataclass(frozen=True)
class Finding:
    """One focus. `grade` 0 slight, 1 moderate, 2 severe; `place` is (across, down) in the lung."""

    label: str
    grade: int
    side: str = ""  # 'right' | 'left' | '' where it has none
    zone: str = ""  # 'upper' | 'mid' | 'lower' | ''
    kind: str = ""
    certain: bool = True
    place: tuple[float, float] = (0.5, 0.5)
    extent: tuple[float, float] = (0.0, 0.0)
    angle: float = 0.0


@dataclass(frozen=True)
class Device:
    """Hardware: 'ett', 'ngt', 'jugular', 'picc', 'port', 'chest tube', 'pacemaker' or 'wires'."""

    kind: str
    side: str = ""
    reach: float = 0.0  # how far the tip lies, 0..1


def draw_ratio(rng: Random) -> tuple[int | None, float]:
    """Grade of cardiac enlargement (None: not enlarged) and the cardiothoracic ratio."""
    grade = rng.choice((0, 1, 1, 2)) if rng.random() < ENLARGED else None
    return grade, rng.uniform(*RATIOS[grade])


def draw_findings(rng: Random, heart: int | None, view: str) -> tuple[Finding, ...]:
    """The findings of one study of a subject whose heart has the grade `heart`."""
    if heart is None and rng.random() < HEALTHY:
        return ()
    chances = dict(CHANCES)
    if heart is not None:
        chances |= {EDEMA: 0.36, EFFUSION: 0.36, LESION: 0.10, FOREIGN: 0.13, PNEUMOTHORAX: 0.10}
    present = [name for name in CHANCES if rng.random() < chances[name]]
    if heart is None and not present:
        names = list(CHANCES)
        present = rng.choices(names, [CHANCES[n] for n in names])
    found: list[Finding] = []
    if heart is not None:
        found.append(Finding(CARDIOMEGALY, heart, certain=heart > 0 or rng.random() > 0.2))
    for name in present:
        foci = DRAWS[name](rng, found, view)
        if foci and name != FOREIGN and rng.random() < UNCERTAIN:
            foci = [replace(foci[0], grade=0, certain=False)]
        found += foci
    return tuple(found)


def _grade(rng: Random) -> int:
    return rng.choices((0, 1, 2), (0.36, 0.38, 0.26))[0]


def _filled(found: list[Finding], side: str) -> int:
    """Grade of the fluid on this side: from 1 it hides the lower zone, at 2 the middle one too."""
    return max((f.grade for f in found if f.label == EFFUSION and f.side == side), default=0)


def _effusion(rng: Random, found: list[Finding], view: str) -> list[Finding]:
    sides = rng.choice((("right",), ("left",), ("right", "left")))
    made = []
    for side in sides:
        kind = "layering" if view == "AP" and rng.random() < 0.3 else "meniscus"
        made.append(Finding(EFFUSION, _grade(rng), side, "lower", kind, extent=(rng.random(), 0)))
    return made


def _pneumothorax(rng: Random, found: list[Finding], view: str) -> list[Finding]:
    side = rng.choice(SIDES)
    if _filled(found, side):
        side = "left" if side == "right" else "right"
    if _filled(found, side):
        return [Finding(PNEUMOTHORAX, 0, side, "upper", "apical", extent=(rng.random(), 0))]
    grade = _grade(rng)
    kind = "tension" if grade == 2 and rng.random() < 0.3 else ("apical", "", "")[grade]
    zone = "upper" if grade == 0 else ""
    return [Finding(PNEUMOTHORAX, grade, side, zone, kind, extent=(rng.random(), 0))]


def _sites(rng: Random, found: list[Finding], count: int) -> list[tuple[str, str]]:
    """Sides and zones, all different, that neither fluid nor a collapsed lung hides."""
    collapsed = {f.side for f in found if f.label == PNEUMOTHORAX and f.grade > 0}
    free = [
        (side, zone)
        for side in SIDES
        for zone in ZONES
        if side not in collapsed
        and not (zone == "lower" and _filled(found, side) > 0)
        and not (zone == "mid" and _filled(found, side) > 1)
    ]
    return rng.sample(free, min(count, len(free)))


def _place(rng: Random, found: list[Finding], side: str, zone: str) -> tuple[float, float]:
    """A place in a zone, clear of the hilum and of a large heart."""
    covered = side == "left" and zone != "upper" and any(f.label == CARDIOMEGALY for f in found)
    across = rng.uniform(0.62, 0.80) if covered else rng.uniform(0.32, 0.72)
    return across, rng.uniform(0.06, 0.24) + {"upper": 0.08, "mid": 0.38, "lower": 0.68}[zone]


def _consolidation(rng: Random, found: list[Finding], view: str) -> list[Finding]:
    made: list[Finding] = []
    count = rng.choices((1, 2, 3), (0.6, 0.3, 0.1))[0]
    for side, zone in _sites(rng, found, count):
        kind = "lobar" if (side, zone) == ("right", "upper") and rng.random() < 0.6 else "patchy"
        grade = _grade(rng)
        wide = rng.uniform(0.14, 0.20) + 0.035 * grade
        place = _place(rng, found, side, zone)
        extent = (wide, wide * rng.uniform(0.75, 1.15))
        made.append(Finding(
            CONSOLIDATION, grade, side, zone, kind, True, place, extent, rng.uniform(-0.5, 0.5)
        ))  # fmt: skip
    return made


def _edema(rng: Random, found: list[Finding], view: str) -> list[Finding]:
    return [Finding(EDEMA, _grade(rng), kind=rng.choice(("interstitial", "alveolar")))]


def _atelectasis(rng: Random, found: list[Finding], view: str) -> list[Finding]:
    made = []
    for side in rng.choice((("right",), ("left",), ("right", "left"))):
        filled = _filled(found, side)
        if filled > 1:
            continue
        kind = "linear" if filled or rng.random() < 0.55 else "basal"
        zone = "mid" if filled or (kind == "linear" and rng.random() < 0.2) else "lower"
        place, angle = _place(rng, found, side, zone), rng.uniform(-0.35, 0.35)
        extent = (rng.uniform(0.13, 0.24), 0)
        made.append(Finding(ATELECTASIS, _grade(rng), side, zone, kind, True, place, extent, angle))
    return made


def _lesion(rng: Random, found: list[Finding], view: str) -> list[Finding]:
    made: list[Finding] = []
    count = rng.choices((1, 2, 3), (0.72, 0.18, 0.10))[0]
    for side, zone in _sites(rng, found, count):
        grade = _grade(rng)
        radius = (rng.uniform(0.034, 0.046), rng.uniform(0.048, 0.072), rng.uniform(0.08, 0.13))[
            grade
        ]
        place = _place(rng, found, side, zone)
        kind = "mass" if grade == 2 else "nodule"
        extent = (radius, radius * rng.uniform(0.85, 1.15))
        made.append(
            Finding(LESION, grade, side, zone, kind, True, place, extent, rng.uniform(-1, 1))
        )
    return made


def _foreign(rng: Random, found: list[Finding], view: str) -> list[Finding]:
    made: list[Finding] = []
    for _ in range(rng.choices((1, 2), (0.75, 0.25))[0]):
        kind = rng.choice(("coin", "button", "pin", "necklace", "bullet", "key"))
        if kind == "necklace":
            made.append(Finding(FOREIGN, 2, kind=kind, extent=(rng.uniform(0.15, 0.3), 0)))
            continue
        side, zone = rng.choice(SIDES), rng.choice(ZONES)
        place = (rng.uniform(0.1, 0.9), _place(rng, found, side, zone)[1])
        size = {"coin": 0.06, "button": 0.05, "pin": 0.10, "bullet": 0.035, "key": 0.10}[kind]
        size *= rng.uniform(0.8, 1.25)
        made.append(Finding(
            FOREIGN, int(kind != "button"), side, zone, kind, True, place, (size, size),
            rng.uniform(-3, 3),
        ))  # fmt: skip
    return made


DRAWS = {
    EFFUSION: _effusion,
    PNEUMOTHORAX: _pneumothorax,
    CONSOLIDATION: _consolidation,
    EDEMA: _edema,
    ATELECTASIS: _atelectasis,
    LESION: _lesion,
    FOREIGN: _foreign,
}


def draw_devices(
    rng: Random, anatomy: Anatomy, view: str, findings: tuple[Finding, ...]
) -> tuple[Device, ...]:
    """Tubes, lines and implants; more of them at the bedside."""
    bedside = view == "AP"
    made = []
    if anatomy.sternotomy:
        made.append(Device("wires"))
    if anatomy.pacemaker:
        made.append(Device("pacemaker", anatomy.pacemaker, rng.random()))
    if bedside and rng.random() < 0.24:
        made.append(Device("ett", reach=rng.random()))
    if rng.random() < (0.6 if any(d.kind == "ett" for d in made) else 0.12 if bedside else 0.01):
        made.append(Device("ngt", reach=rng.random()))
    if rng.random() < (0.32 if bedside else 0.05):
        kind = rng.choice(("jugular", "picc"))
        side = "right" if rng.random() < 0.65 else "left"
        made.append(Device(kind, side, rng.random()))
    elif rng.random() < 0.06:
        made.append(Device("port", rng.choice(SIDES), rng.random()))
    for f in findings:
        if f.label == PNEUMOTHORAX and bedside and rng.random() < 0.3:
            made.append(Device("chest tube", f.side, rng.random()))
    return tuple(made)


def labels(findings: tuple[Finding, ...]) -> dict[str, int]:
    """1 present, -1 left open, 0 absent; 'No Finding' is 1 when nothing is present or left open."""
    state: dict[str, int] = dict.fromkeys(LABELS, 0)
    for f in findings:
        state[f.label] = 1 if f.certain or state[f.label] == 1 else -1
    state["No Finding"] = int(not findings)
    return state


def displaced(pose: Pose, findings: tuple[Finding, ...]) -> Pose:
    """The pose with heart, trachea and diaphragm where the findings push or pull them."""
    push, domes = 0.0, {"right": 0.0, "left": 0.0}
    for f in findings:
        away = 1.0 if f.side == "right" else -1.0
        if f.label == EFFUSION and f.grade == 2 and f.kind == "meniscus":
            push += 0.045 * away
        if f.kind == "tension":
            push += 0.11 * away
            domes[f.side] -= 0.05
        if f.kind == "basal":
            push -= 0.025 * away * f.grade
            domes[f.side] += 0.03 + 0.035 * f.grade
    return replace(pose, push=push, domes=(domes["right"], domes["left"]))
