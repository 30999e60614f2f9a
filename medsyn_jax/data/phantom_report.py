"""The radiologist of the phantom corpus: words for a plan of findings, never twice the same way.

Phrases hold alternatives in braces, `{a|b|}`, and slots in angle brackets, `<side>`. Left and right are
the patient's. A finding that is present is always named; one that is absent is denied at most.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from random import Random

from medsyn_jax.data.findings import (
    ATELECTASIS,
    CARDIOMEGALY,
    CONSOLIDATION,
    EDEMA,
    EFFUSION,
    FOREIGN,
    LESION,
    PNEUMOTHORAX,
    Device,
    Finding,
)
from medsyn_jax.data.phantom_phrases import (
    ABSENT,
    BACKGROUND,
    CLOSING,
    COMPARISONS,
    DENIALS,
    DEVICES,
    EXAMS,
    FINDINGS,
    FOREIGN_NAMES,
    GRADES,
    HEARTS,
    HISTORY,
    IMPRESSIONS,
    INCIDENTAL,
    LUNGS_CLEAR,
    NORMAL,
    OPEN,
    OPEN_IMPRESSIONS,
    PRIORS,
    RESOLVED,
    ZONES,
)
from medsyn_jax.data.thorax import Anatomy, Pose

_CHOICE = re.compile(r"\{([^{}]*)\}")
_ORDER = (
    PNEUMOTHORAX, EFFUSION, CONSOLIDATION, EDEMA, ATELECTASIS, LESION, CARDIOMEGALY, FOREIGN
)  # fmt: skip
Group = list[Finding]  # the foci of one label


def say(rng: Random, phrase: str, **slots: str) -> str:
    """Fills the slots of a phrase, picks its alternatives, and mends space and capitals."""
    for name, text in slots.items():
        phrase = phrase.replace(f"<{name}>", text)
    while "{" in phrase:
        phrase = _CHOICE.sub(lambda m: rng.choice(m.group(1).split("|")), phrase)
    phrase = " ".join(phrase.split()).replace(" ,", ",").replace(" .", ".")
    return phrase[:1].upper() + phrase[1:]


def write(
    rng: Random,
    anatomy: Anatomy,
    pose: Pose,
    findings: Sequence[Finding],
    devices: Sequence[Device],
    before: Sequence[Finding] | None,
) -> str:
    """A report in the manner of MIMIC-CXR, sections under their heads.

    Args:
      rng: source of the wording.
      anatomy, pose, findings, devices: what the image shows.
      before: findings of the study before, None for the first one.
    """
    groups = [[f for f in findings if f.label == name] for name in _ORDER]
    groups = [g for g in groups if g]
    body = " ".join(_findings(rng, anatomy, pose, groups, devices, before))
    verdict = _impression(rng, pose, groups, before)
    parts = []
    if rng.random() < 0.3:
        parts.append("                                 FINAL REPORT")
    exam = say(rng, EXAMS[pose.view])
    if rng.random() < 0.75:
        parts.append(f"{rng.choice(('EXAMINATION', 'EXAM', 'STUDY'))}:  {exam}")
    if rng.random() < 0.8:
        who = f"{anatomy.age}-year-old {'woman' if anatomy.sex == 'F' else 'man'}"
        who = who if rng.random() < 0.4 else f"___-year-old {who.split()[-1]}"
        text = say(rng, rng.choice(HISTORY), who=who)
        parts.append(f"{rng.choice(('INDICATION', 'HISTORY', 'CLINICAL HISTORY'))}:  {text}")
    if rng.random() < 0.3:
        parts.append(f"TECHNIQUE:  {say(rng, '{Single |}<exam> {was obtained|}.', exam=exam)}")
    if rng.random() < 0.7:
        parts.append(f"COMPARISON:  {say(rng, rng.choice(PRIORS[before is not None]))}")
    layout = rng.random()
    if layout < 0.05:
        parts.append(f"IMPRESSION:  {body}")
    elif layout < 0.10:
        parts.append(f"FINDINGS AND IMPRESSION:  {body} {verdict}")
    else:
        parts += [f"FINDINGS:  {body}", f"IMPRESSION:  {verdict}"]
    return "\n\n".join(parts)


def _findings(
    rng: Random,
    anatomy: Anatomy,
    pose: Pose,
    groups: list[Group],
    devices: Sequence[Device],
    before: Sequence[Finding] | None,
) -> list[str]:
    present = {g[0].label for g in groups}
    lines = []
    if rng.random() < 0.55:
        lines.append(say(rng, rng.choice(COMPARISONS[pose.view])))
    for device in devices:
        if rng.random() < 0.9:
            lines.append(_device(rng, device))
    lines += _background(rng, anatomy, pose)
    blocks = [_finding(rng, g, before) for g in groups]
    if CARDIOMEGALY not in present and rng.random() < 0.75:
        blocks.append(_heart(rng, anatomy, pose))
    absent = [n for n in ABSENT if n not in present]
    blocks += _deny(rng, absent, clear=not present - {CARDIOMEGALY, FOREIGN})
    if before is not None:
        gone = {f.label for f in before if f.certain} & (RESOLVED.keys() - present)
        blocks += [say(rng, RESOLVED[n]) for n in sorted(gone) if rng.random() < 0.3]
    if rng.random() < 0.6:
        rng.shuffle(blocks)
    lines += blocks
    for phrases in NORMAL:
        if rng.random() < 0.35:
            lines.append(say(rng, rng.choice(phrases)))
    return lines


def _background(rng: Random, anatomy: Anatomy, pose: Pose) -> list[str]:
    """What can be seen beside the findings: breath, rotation, penetration, aorta, spine, build."""
    seen: list[tuple[str, float, dict[str, str]]] = []
    if anatomy.hyperinflated:
        seen.append(("hyperinflated", 0.85, {}))
    elif pose.breath < 0.32:
        seen.append(("low", 0.85, {}))
    elif pose.breath > 0.8:
        seen.append(("full", 0.4, {}))
    if abs(pose.rotation) > 0.42:
        seen.append(("rotated", 0.75, {"side": "left" if pose.rotation > 0 else "right"}))
    if abs(pose.exposure) > 0.55:
        seen.append(("dark" if pose.exposure > 0 else "pale", 0.5, {}))
    if anatomy.aorta > 0.62:
        seen.append(("aorta", 0.75, {}))
    if abs(anatomy.scoliosis) > 0.04:
        side, name = ("left", "levo") if anatomy.scoliosis > 0 else ("right", "dextro")
        grade = "moderate" if abs(anatomy.scoliosis) > 0.08 else "mild"
        seen.append(("scoliosis", 0.8, {"side": side, "name": name, "grade": grade}))
    if anatomy.habitus > 0.78:
        seen.append(("habitus", 0.5, {}))
    if pose.arms_down and rng.random() < 0.2:
        seen.append(("supine", 1.0, {}))
    lines = [say(rng, BACKGROUND[n], **slots) for n, p, slots in seen if rng.random() < p]
    if rng.random() < 0.25:
        lines.append(say(rng, rng.choice(INCIDENTAL)))
    rng.shuffle(lines)
    return lines


def _device(rng: Random, device: Device) -> str:
    tip = ("high", "mid", "low")[min(2, int(3 * device.reach))]
    return say(rng, DEVICES[device.kind][tip], side=device.side)


def _heart(rng: Random, anatomy: Anatomy, pose: Pose) -> str:
    if anatomy.ratio > 0.465:
        return say(rng, rng.choice(HEARTS["upper"]))
    return say(rng, rng.choice(HEARTS[pose.view]))


def _finding(rng: Random, group: Group, before: Sequence[Finding] | None) -> str:
    """One or two sentences on the foci of one label."""
    label = group[0].label
    if not any(f.certain for f in group):
        text = say(rng, rng.choice(OPEN[label]), **_slots(rng, group[0]))
    else:
        text = " ".join(_foci(rng, group))
    if before is not None and rng.random() < 0.35 and label != FOREIGN:
        old = any(f.label == label for f in before)
        tail = rng.choice(
            (", similar to prior", ", not significantly changed", ", unchanged", ", as before")
            if old else (", new since the prior study", ", new from prior", ", not seen previously")
        )  # fmt: skip
        text = text.removesuffix(".") + tail + "."
    return text


def _slots(rng: Random, f: Finding) -> dict[str, str]:
    zones = ZONES[f.side or "both"][f.zone] if f.zone else ""
    side = f.side or "right"
    return {
        "grade": GRADES[f.label][f.grade],
        "ly": ("{mildly|slightly}", "moderately", "{severely|markedly}")[f.grade],
        "side": f.side,
        "other": "left" if side == "right" else "right",
        "zone": zones,
        "place": f"{f.side} {f.zone}" if f.zone else f.side,
        "size": f"{round(4 * (f.extent[0] + f.extent[1]) * 5) / 2:g}",  # cm: a unit is 20 cm
        "object": FOREIGN_NAMES.get(f.kind, ""),
    }


def _foci(rng: Random, group: Group) -> list[str]:
    """The sentences on certain foci; two sides of one kind are often told together."""
    first, label = group[0], group[0].label
    kinds = FINDINGS[label]
    if len(group) == 2 and "both" in kinds and rng.random() < 0.75:
        right, left = sorted(group, key=lambda f: f.side == "left")
        if right.grade == left.grade and right.kind == left.kind:
            return [say(rng, rng.choice(kinds["both"]), **_slots(rng, first))]
        if "each" in kinds:
            slots = _slots(rng, right) | {
                "right": GRADES[label][right.grade], "left": GRADES[label][left.grade]
            }  # fmt: skip
            return [say(rng, rng.choice(kinds["each"]), **slots)]
    lines = []
    for i, f in enumerate(group):
        phrases = kinds.get(f.kind) or kinds[""]
        if i and "more" in kinds:
            phrases = kinds["more"]
        lines.append(say(rng, rng.choice(phrases), **_slots(rng, f)))
    return lines


def _deny(rng: Random, absent: list[str], clear: bool) -> list[str]:
    """Denials of findings that are not there: some together, some alone, some not at all."""
    lines = []
    if clear and rng.random() < 0.6:
        lines.append(say(rng, rng.choice(LUNGS_CLEAR)))
    named = [n for n in absent if rng.random() < ABSENT[n]]
    rng.shuffle(named)
    cut = rng.randint(0, len(named)) if rng.random() < 0.4 else len(named)
    for part in (named[:cut], named[cut:]):
        if part:
            lines.append(_negation(rng, [say(rng, DENIALS[n]).lower() for n in part]))
    return lines


def _negation(rng: Random, names: list[str]) -> str:
    if len(names) == 1:
        listed = names[0]
    elif len(names) == 2:
        listed = f"{names[0]} or {names[1]}"
    else:
        listed = ", ".join(names[:-1]) + f", or {names[-1]}"
    return say(
        rng,
        "{No <names>.|No <names> {is seen|is identified|is present|is detected}.|There is no <names>.|"
        "No evidence of <names>.|Negative for <names>.|There is no {evidence of|definite} <names>.}",
        names=listed,
    )


def _impression(
    rng: Random, pose: Pose, groups: list[Group], before: Sequence[Finding] | None
) -> str:
    present = {g[0].label for g in groups}
    lines = []
    for group in groups:
        f = group[0]
        if not any(f.certain for f in group):
            lines.append(say(rng, rng.choice(OPEN_IMPRESSIONS[f.label]), **_slots(rng, f)))
            continue
        phrases = IMPRESSIONS[f.label]
        if len(group) == 2 and {g.side for g in group} == {"left", "right"} and "both" in phrases:
            lines.append(say(rng, rng.choice(phrases["both"]), **_slots(rng, f)))
            continue
        worst = max(group, key=lambda f: f.grade)
        chosen = phrases.get("many" if len(group) > 1 else worst.kind) or phrases[""]
        lines.append(say(rng, rng.choice(chosen), **_slots(rng, worst)))
    if not present - {CARDIOMEGALY, FOREIGN}:
        lines.append(say(rng, rng.choice(CLOSING["normal"])))
    elif len(present) == 1 and rng.random() < 0.3:
        lines.append(say(rng, rng.choice(CLOSING["otherwise"])))
    if present & {PNEUMOTHORAX, CONSOLIDATION, LESION} and rng.random() < 0.35:
        lines.append(say(rng, rng.choice(CLOSING["advice"])))
    if rng.random() < 0.5 and before is None and len(lines) > 1:
        rng.shuffle(lines)
    return _listed(rng, lines)


def _listed(rng: Random, lines: Iterable[str]) -> str:
    lines = list(lines)
    if len(lines) > 1 and rng.random() < 0.5:
        return "\n".join(f"{i}.  {line}" for i, line in enumerate(lines, 1))
    return " ".join(lines)
