"""A procedural chest radiograph with its report, labels, masks and boxes, from a seed.

The pixels are line integrals through a simple thorax, attenuated by Beer-Lambert's law; the text
describes the same plan of findings. Needs no download and no accelerator.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np

from medsyn_jax.phantom import film, findings, hardware, lesions, organs, report, thorax
from medsyn_jax.phantom.film import Box
from medsyn_jax.phantom.findings import LABELS, Plan

__all__ = ["LABELS", "Phantom", "Plan", "plan", "render", "report_of", "study"]


@dataclass(frozen=True)
class Phantom:
    """One study.

    Attributes:
      image: uint8 [size, size], bright where the beam is weak, as on a viewing screen.
      labels: 1 present, 0 absent, -1 left open, for each of LABELS.
      masks: 'lungs', 'pneumothorax', 'effusion', each bool [size, size].
      boxes: (label, x0, y0, x1, y1) in pixels, for consolidation, lung lesion and foreign object.
      report: the text with its section heads; left and right are the patient's.
      view: 'PA' or 'AP'.
    """

    image: np.ndarray
    labels: dict[str, int]
    masks: dict[str, np.ndarray]
    boxes: list[Box]
    report: str
    view: str


def _random(*parts: int) -> Random:
    """A stream of its own for each tuple of numbers below 2**64."""
    return Random(sum(part << (64 * i) for i, part in enumerate(parts)))


def plan(seed: int, subject: int, study: int) -> Plan:
    """Draw the plan of a study. The anatomy and the heart of a subject are the same in all."""
    rng = _random(seed, subject, 0, 1)
    heart, ratio = findings.draw_ratio(rng)
    anatomy = thorax.draw_anatomy(rng, ratio)
    rng = _random(seed, subject, study + 1, 2)
    pose = thorax.draw_pose(rng, anatomy)
    foci = findings.draw_findings(rng, heart, pose.view)
    devices = tuple(findings.draw_devices(rng, anatomy, pose.view, foci))
    return Plan(anatomy, findings.displaced(pose, foci), foci, devices)


def render(
    plan: Plan, size: int, seeds: tuple[int, ...]
) -> tuple[np.ndarray, dict[str, np.ndarray], list[Box]]:
    """Draw image, masks and boxes of a plan as in `Phantom`; `seeds` chooses the noise."""
    fields = np.random.Generator(np.random.PCG64([*seeds, 3]))
    sheet = film.Film(size, plan.pose)
    organs.draw(sheet, plan.anatomy, fields)
    lesions.draw(sheet, plan, fields)
    hardware.draw(sheet, plan)
    sheet.draw_strokes()
    grain = np.random.Generator(np.random.PCG64([*seeds, 4, size]))
    return film.expose(sheet, grain), sheet.masks, sheet.boxes


def report_of(seed: int, subject: int, study: int) -> str:
    """Write the report of a study without drawing its image: arguments as for `study`."""
    before = plan(seed, subject, study - 1).findings if study else None
    return report.write(_random(seed, subject, study + 1, 5), plan(seed, subject, study), before)


def study(seed: int, subject: int, study: int, size: int) -> Phantom:
    """Make one study, the same for the same arguments on any machine.

    Args:
      seed: of the corpus.
      subject: number of the patient, >= 0.
      study: number of the study of this patient, >= 0.
      size: side of the image in pixels, 32..1024. Labels and report do not depend on it.

    Raises:
      ValueError: a number is out of its range.
    """
    if not 32 <= size <= 1024 or min(seed, subject, study) < 0:
        raise ValueError(f"phantom: {seed=} {subject=} {study=} {size=}: out of range")
    shown = plan(seed, subject, study)
    image, masks, boxes = render(shown, size, (seed, subject, study))
    labels, text = findings.labels(shown.findings), report_of(seed, subject, study)
    return Phantom(image, labels, masks, boxes, text, shown.pose.view)
