"""The plan of a phantom study: findings with side, zone and grade, and medical devices."""

from __future__ import annotations

from collections.abc import Iterator
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
OPPOSITE = {"right": "left", "left": "right"}

# heart width over chest width by grade; None is a heart that is not enlarged
RATIOS = {None: (0.39, 0.50), 0: (0.535, 0.58), 1: (0.58, 0.63), 2: (0.63, 0.71)}
ENLARGED = 0.19  # share of subjects with an enlarged heart
HEALTHY = 0.36  # share of studies without findings among the others
# chance of each further finding in a study that is not healthy
CHANCES = {
    EFFUSION: 0.30, PNEUMOTHORAX: 0.20, CONSOLIDATION: 0.27, EDEMA: 0.20, ATELECTASIS: 0.27,
    LESION: 0.20, FOREIGN: 0.19,
}  # fmt: skip
# the same beside an enlarged heart, where it differs
HEART_CHANCES = {EDEMA: 0.36, EFFUSION: 0.36, LESION: 0.10, FOREIGN: 0.13, PNEUMOTHORAX: 0.10}
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


Findings = tuple[Finding, ...]


@dataclass(frozen=True)
class Device:
    """Hardware: 'ett', 'ngt', 'jugular', 'picc', 'port', 'chest tube', 'pacemaker' or 'wires'."""

    kind: str
    side: str = ""
    reach: float = 0.0  # how far the tip lies, 0..1


@dataclass(frozen=True)
class Plan:
    """Everything about a study but its pixels and words."""

    anatomy: Anatomy
    pose: Pose
    findings: Findings
    devices: tuple[Device, ...]


def draw_ratio(rng: Random) -> tuple[int | None, float]:
    """Draw the grade of cardiac enlargement (None: not enlarged) and the cardiothoracic ratio."""
    grade = rng.choice((0, 1, 1, 2)) if rng.random() < ENLARGED else None
    return grade, rng.uniform(*RATIOS[grade])


def draw_findings(rng: Random, heart: int | None, view: str) -> Findings:
    """Draw the findings of one study of a subject whose heart has the grade `heart`."""
    findings: list[Finding] = []
    if heart is None:
        if rng.random() < HEALTHY:
            return ()
        labels = [label for label, chance in CHANCES.items() if rng.random() < chance]
        labels = labels or rng.choices(list(CHANCES), list(CHANCES.values()))
    else:
        chances = CHANCES | HEART_CHANCES
        labels = [label for label, chance in chances.items() if rng.random() < chance]
        certain = heart > 0 or rng.random() > 0.2
        findings.append(Finding(CARDIOMEGALY, heart, certain=certain))
    for label in labels:
        foci = list(DRAWS[label](rng, findings, view))
        if foci and label != FOREIGN and rng.random() < UNCERTAIN:
            foci = [replace(foci[0], grade=0, certain=False)]
        findings += foci
    return tuple(findings)


def _grade(rng: Random) -> int:
    return rng.choices((0, 1, 2), (0.36, 0.38, 0.26))[0]


def _sides(rng: Random) -> tuple[str, ...]:
    return rng.choice((("right",), ("left",), ("right", "left")))


def _fluid(findings: list[Finding], side: str) -> int:
    """Grade of the effusion on a side: from 1 it hides the lower zone, at 2 the middle one too."""
    return max((f.grade for f in findings if f.label == EFFUSION and f.side == side), default=0)


def _sites(rng: Random, findings: list[Finding], count: int) -> list[tuple[str, str]]:
    """Draw different sides and zones that neither fluid nor a collapsed lung hides."""
    collapsed = {f.side for f in findings if f.label == PNEUMOTHORAX and f.grade > 0}
    free = [
        (side, zone)
        for side in SIDES
        if side not in collapsed
        for zone in ZONES[: 3 - _fluid(findings, side)]
    ]
    return rng.sample(free, min(count, len(free)))


def _place(rng: Random, findings: list[Finding], side: str, zone: str) -> tuple[float, float]:
    """Draw a place in a zone, clear of the hilum and of a large heart."""
    covered = side == "left" and zone != "upper" and any(f.label == CARDIOMEGALY for f in findings)
    across = rng.uniform(0.62, 0.80) if covered else rng.uniform(0.32, 0.72)
    return across, rng.uniform(0.06, 0.24) + {"upper": 0.08, "mid": 0.38, "lower": 0.68}[zone]


# Each function draws the foci of one label beside the findings drawn before. The order of the
# draws decides which studies a seed gives.


def _effusion(rng: Random, findings: list[Finding], view: str) -> Iterator[Finding]:
    for side in _sides(rng):
        kind = "layering" if view == "AP" and rng.random() < 0.3 else "meniscus"
        yield Finding(EFFUSION, _grade(rng), side, "lower", kind, extent=(rng.random(), 0))


def _pneumothorax(rng: Random, findings: list[Finding], view: str) -> Iterator[Finding]:
    side = rng.choice(SIDES)
    if _fluid(findings, side):
        side = OPPOSITE[side]
    grade = 0 if _fluid(findings, side) else _grade(rng)
    kind = "tension" if grade == 2 and rng.random() < 0.3 else ("apical", "", "")[grade]
    zone = "upper" if grade == 0 else ""
    yield Finding(PNEUMOTHORAX, grade, side, zone, kind, extent=(rng.random(), 0))


def _consolidation(rng: Random, findings: list[Finding], view: str) -> Iterator[Finding]:
    for side, zone in _sites(rng, findings, rng.choices((1, 2, 3), (0.6, 0.3, 0.1))[0]):
        kind = "lobar" if (side, zone) == ("right", "upper") and rng.random() < 0.6 else "patchy"
        grade = _grade(rng)
        width = rng.uniform(0.14, 0.20) + 0.035 * grade
        place = _place(rng, findings, side, zone)
        extent, angle = (width, width * rng.uniform(0.75, 1.15)), rng.uniform(-0.5, 0.5)
        yield Finding(CONSOLIDATION, grade, side, zone, kind, True, place, extent, angle)


def _edema(rng: Random, findings: list[Finding], view: str) -> Iterator[Finding]:
    yield Finding(EDEMA, _grade(rng), kind=rng.choice(("interstitial", "alveolar")))


def _atelectasis(rng: Random, findings: list[Finding], view: str) -> Iterator[Finding]:
    for side in _sides(rng):
        fluid = _fluid(findings, side)
        if fluid > 1:
            continue
        kind = "linear" if fluid or rng.random() < 0.55 else "basal"
        zone = "mid" if fluid or (kind == "linear" and rng.random() < 0.2) else "lower"
        place, angle = _place(rng, findings, side, zone), rng.uniform(-0.35, 0.35)
        extent, grade = (rng.uniform(0.13, 0.24), 0), _grade(rng)
        yield Finding(ATELECTASIS, grade, side, zone, kind, True, place, extent, angle)


def _lesion(rng: Random, findings: list[Finding], view: str) -> Iterator[Finding]:
    for side, zone in _sites(rng, findings, rng.choices((1, 2, 3), (0.72, 0.18, 0.10))[0]):
        grade = _grade(rng)
        kind = "mass" if grade == 2 else "nodule"
        radii = [rng.uniform(*r) for r in ((0.034, 0.046), (0.048, 0.072), (0.08, 0.13))]
        place = _place(rng, findings, side, zone)
        extent, angle = (radii[grade], radii[grade] * rng.uniform(0.85, 1.15)), rng.uniform(-1, 1)
        yield Finding(LESION, grade, side, zone, kind, True, place, extent, angle)


def _foreign(rng: Random, findings: list[Finding], view: str) -> Iterator[Finding]:
    for _ in range(rng.choices((1, 2), (0.75, 0.25))[0]):
        kind = rng.choice(("coin", "button", "pin", "necklace", "bullet", "key"))
        if kind == "necklace":
            yield Finding(FOREIGN, 2, kind=kind, extent=(rng.uniform(0.15, 0.3), 0))
            continue
        side, zone = rng.choice(SIDES), rng.choice(ZONES)
        place = (rng.uniform(0.1, 0.9), _place(rng, findings, side, zone)[1])
        size = {"coin": 0.06, "button": 0.05, "pin": 0.10, "bullet": 0.035, "key": 0.10}[kind]
        size *= rng.uniform(0.8, 1.25)
        grade, angle = int(kind != "button"), rng.uniform(-3, 3)
        yield Finding(FOREIGN, grade, side, zone, kind, True, place, (size, size), angle)


DRAWS = {
    EFFUSION: _effusion,
    PNEUMOTHORAX: _pneumothorax,
    CONSOLIDATION: _consolidation,
    EDEMA: _edema,
    ATELECTASIS: _atelectasis,
    LESION: _lesion,
    FOREIGN: _foreign,
}


def draw_devices(rng: Random, anatomy: Anatomy, view: str, findings: Findings) -> Iterator[Device]:
    """Draw tubes, lines and implants; more of them at the bedside."""
    bedside = view == "AP"
    if anatomy.sternotomy:
        yield Device("wires")
    if anatomy.pacemaker:
        yield Device("pacemaker", anatomy.pacemaker, rng.random())
    intubated = bedside and rng.random() < 0.24
    if intubated:
        yield Device("ett", reach=rng.random())
    if rng.random() < (0.6 if intubated else 0.12 if bedside else 0.01):
        yield Device("ngt", reach=rng.random())
    if rng.random() < (0.32 if bedside else 0.05):
        kind = rng.choice(("jugular", "picc"))
        side = "right" if rng.random() < 0.65 else "left"
        yield Device(kind, side, rng.random())
    elif rng.random() < 0.06:
        yield Device("port", rng.choice(SIDES), rng.random())
    for f in findings:
        if f.label == PNEUMOTHORAX and bedside and rng.random() < 0.3:
            yield Device("chest tube", f.side, rng.random())


def labels(findings: Findings) -> dict[str, int]:
    """1 present, -1 left open, 0 absent; 'No Finding' is 1 when nothing is present or left open."""
    states = dict.fromkeys(LABELS, 0) | {f.label: 1 if f.certain else -1 for f in findings}
    return states | {"No Finding": int(not findings)}


def displaced(pose: Pose, findings: Findings) -> Pose:
    """Move heart, trachea and diaphragm to where the findings push or pull them."""
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
