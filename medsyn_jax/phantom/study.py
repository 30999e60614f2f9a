"""A procedural chest radiograph with its report, labels, masks and boxes, from a seed.

The pixels are line integrals through a simple thorax, attenuated by Beer-Lambert's law; the text is
put together from the same plan of findings. Needs no download and no accelerator.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np

from medsyn_jax.phantom import film, findings, hardware, lesions, organs, report, thorax
from medsyn_jax.phantom.film import Box
from medsyn_jax.phantom.findings import LABELS, Device, Finding
from medsyn_jax.phantom.thorax import Anatomy, Pose

__all__ = ["LABELS", "Phantom", "Plan", "plan", "render", "study"]

Masks = dict[str, np.ndarray]


@dataclass(frozen=True)
class Plan:
    """Everything about a study but its pixels and words."""

    anatomy: Anatomy
    pose: Pose
    findings: tuple[Finding, ...]
    devices: tuple[Device, ...]


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
    masks: Masks
    boxes: list[Box]
    report: str
    view: str


def _random(*parts: int) -> Random:
    """A stream of its own for each tuple of numbers below 2**64."""
    return Random(sum(part << (64 * i) for i, part in enumerate(parts)))


def plan(seed: int, subject: int, study: int) -> Plan:
    """What study number `study` of a subject shows. Subjects keep their anatomy and their heart."""
    of_subject = _random(seed, subject, 0, 1)
    heart, ratio = findings.draw_ratio(of_subject)
    anatomy = thorax.draw_anatomy(of_subject, ratio)
    of_study = _random(seed, subject, study + 1, 2)
    pose = thorax.draw_pose(of_study, anatomy)
    found = findings.draw_findings(of_study, heart, pose.view)
    hardware = findings.draw_devices(of_study, anatomy, pose.view, found)
    return Plan(anatomy, findings.displaced(pose, found), found, hardware)


def render(made: Plan, size: int, seeds: tuple[int, ...]) -> tuple[np.ndarray, Masks, list[Box]]:
    """Image, masks and boxes of a plan; `seeds` chooses its noise."""
    fields = np.random.Generator(np.random.PCG64([*seeds, 3]))
    sheet = film.Film(size, made.pose)
    organs.draw(sheet, made.anatomy, fields)
    truth = lesions.draw(sheet, made.anatomy, made.findings, fields)
    hardware.draw(sheet, made.anatomy, made.devices)
    boxes = truth.boxes + hardware.draw_foreign(sheet, made.anatomy, made.findings)
    sheet.draw_strokes()
    masks = {
        "lungs": sheet.field_mask,
        "pneumothorax": truth.pneumothorax,
        "effusion": truth.effusion,
    }
    grain = np.random.Generator(np.random.PCG64([*seeds, 4, size]))
    return film.expose(sheet, grain), masks, boxes


def report_of(seed: int, subject: int, study: int) -> str:
    """Write the report of a study without drawing its image: arguments as for `study`."""
    shown = plan(seed, subject, study)
    before = plan(seed, subject, study - 1).findings if study else None
    rng = _random(seed, subject, study + 1, 5)
    return report.write(rng, shown.anatomy, shown.pose, shown.findings, shown.devices, before)


def study(seed: int, subject: int, study: int, size: int) -> Phantom:
    """Makes one study, the same for the same arguments on any machine.

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
    made = plan(seed, subject, study)
    image, masks, boxes = render(made, size, (seed, subject, study))
    return Phantom(
        image=image,
        labels=findings.labels(made.findings),
        masks=masks,
        boxes=boxes,
        report=report_of(seed, subject, study),
        view=made.pose.view,
    )
