"""The radiologist of the phantom corpus: words for a plan of findings, never twice the same way.

Phrases hold alternatives in braces, `{a|b|}`, and slots in angle brackets, `<side>`. Left and right
are the patient's. A finding that is present is always named; one that is absent is denied at most.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random

from medsyn_jax.phantom import phrases as book
from medsyn_jax.phantom import setting
from medsyn_jax.phantom.findings import (
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
from medsyn_jax.phantom.thorax import Anatomy, Pose

_CHOICE = re.compile(r"\{([^{}]*)\}")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou])")
_ORDER = (
    PNEUMOTHORAX, EFFUSION, CONSOLIDATION, EDEMA, ATELECTASIS, LESION, CARDIOMEGALY, FOREIGN
)  # fmt: skip
Group = list[Finding]  # the foci of one label


def say(rng: Random, phrases: str | Sequence[str], **slots: str) -> str:
    """Picks a phrase, fills its slots, picks its alternatives, and mends spaces and capitals."""
    phrase = phrases if isinstance(phrases, str) else rng.choice(phrases)
    while "<" in phrase:  # a slot may hold slots
        for name, text in slots.items():
            phrase = phrase.replace(f"<{name}>", text)
    while "{" in phrase:
        phrase = _CHOICE.sub(lambda m: rng.choice(m.group(1).split("|")), phrase)
    phrase = " ".join(phrase.split()).replace(" ,", ",").replace(",.", ".").replace(" .", ".")
    phrase = _ARTICLE.sub(r"\1n ", phrase)
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
    verdict = _impression(rng, groups, before)
    parts = ["                                 FINAL REPORT"] if rng.random() < 0.3 else []
    if rng.random() < 0.75:
        parts.append(say(rng, "{EXAMINATION|EXAM|STUDY}: <exam>", exam=setting.EXAMS[pose.view]))
    if rng.random() < 0.8:
        who = f"{anatomy.age}-year-old" if rng.random() < 0.4 else "___-year-old"
        who += " woman" if anatomy.sex == "F" else " man"
        head = rng.choice(("INDICATION", "HISTORY", "CLINICAL HISTORY"))
        parts.append(f"{head}: {say(rng, setting.HISTORY, who=who)}")
    if rng.random() < 0.3:
        parts.append(f"TECHNIQUE: {say(rng, setting.TECHNIQUES[pose.view])}")
    if rng.random() < 0.7:
        parts.append(f"COMPARISON: {say(rng, setting.PRIORS[before is not None])}")
    layout = rng.random()
    if layout < 0.05:
        parts.append(f"IMPRESSION: {body}")
    elif layout < 0.10:
        parts.append(f"FINDINGS AND IMPRESSION: {body} {' '.join(verdict)}")
    else:
        parts.append(f"FINDINGS: {body}")
        if len(verdict) > 1 and rng.random() < 0.5:
            verdict = [f"{i}. {line}" for i, line in enumerate(verdict, 1)]
            parts.append("IMPRESSION:\n" + "\n".join(verdict))
        else:
            parts.append(f"IMPRESSION: {' '.join(verdict)}")
    return "\n\n".join("\n".join(map(_wrap, part.split("\n"))) for part in parts)


def _wrap(text: str) -> str:
    """Breaks a line after at most 78 characters, as the reports of the field are."""
    lines, start = [], 0
    while len(text) - start > 78:
        end = text.rfind(" ", start + 1, start + 78)
        lines.append(text[start:end])
        start = end + 1
    return "\n".join([*lines, text[start:]])


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
    if rng.random() < 0.6:
        lines.append(say(rng, setting.OPENINGS[pose.view]))
    lines += [_device(rng, device) for device in devices if rng.random() < 0.9]
    lines += _background(rng, anatomy, pose)
    blocks = [_finding(rng, g, before) for g in groups]
    if CARDIOMEGALY not in present and rng.random() < 0.75:
        kind = "upper" if anatomy.ratio > 0.475 else pose.view
        blocks.append(say(rng, book.HEARTS[kind]))
    absent = [n for n in book.ABSENT if n not in present]
    blocks += _deny(rng, absent, clear=not present - {CARDIOMEGALY, FOREIGN})
    if before is not None:
        gone = {f.label for f in before if f.certain} & (book.RESOLVED.keys() - present)
        blocks += [say(rng, book.RESOLVED[n]) for n in sorted(gone) if rng.random() < 0.3]
    if rng.random() < 0.6:
        rng.shuffle(blocks)
    lines += blocks
    lines += [say(rng, phrases) for phrases in setting.NORMAL if rng.random() < 0.35]
    return lines


def _background(rng: Random, anatomy: Anatomy, pose: Pose) -> list[str]:
    """What can be seen beside the findings: breath, rotation, penetration, aorta, spine, build."""
    spine = anatomy.scoliosis
    slots = {
        "grade": "moderate" if abs(spine) > 0.08 else "mild",
        "name": "levo" if spine > 0 else "dextro",
        "side": "left" if spine > 0 else "right",
    }
    turned = {"side": "left" if pose.rotation > 0 else "right"}
    seen = (  # name, whether it can be seen, chance that it is told
        ("hyperinflated", anatomy.hyperinflated, 0.85, {}),
        ("low", pose.breath < 0.32, 0.85, {}),
        ("full", pose.breath > 0.8 and not anatomy.hyperinflated, 0.4, {}),
        ("rotated", abs(pose.rotation) > 0.42, 0.75, turned),
        ("dark", pose.exposure > 0.55, 0.5, {}),
        ("pale", pose.exposure < -0.55, 0.5, {}),
        ("aorta", anatomy.aorta > 0.62, 0.75, {}),
        ("scoliosis", abs(spine) > 0.04, 0.8, slots),
        ("habitus", anatomy.habitus > 0.78, 0.5, {}),
        ("arms", pose.arms_down, 0.15, {}),
    )
    lines = [
        say(rng, setting.BACKGROUND[name], **words)
        for name, visible, chance, words in seen
        if visible and rng.random() < chance
    ]
    if rng.random() < 0.25:
        lines.append(say(rng, setting.INCIDENTAL))
    rng.shuffle(lines)
    return lines


def _device(rng: Random, device: Device) -> str:
    tips = setting.TIPS.get(device.kind, ("",))
    tip = tips[min(len(tips) - 1, int(len(tips) * device.reach))]
    return say(rng, setting.DEVICES[device.kind], side=device.side, tip=tip)


def _finding(rng: Random, group: Group, before: Sequence[Finding] | None) -> str:
    """One or more sentences on the foci of one label."""
    label = group[0].label
    if group[0].certain:
        text = " ".join(_foci(rng, group))
    else:
        text = say(rng, book.OPEN[label], **_slots(group[0]))
    if before is not None and rng.random() < 0.35 and label != FOREIGN:
        change = book.CHANGES[any(f.label == label for f in before)]
        text = f"{text.removesuffix('.')}, {say(rng, change).lower()}."
    return text


def _slots(f: Finding) -> dict[str, str]:
    return {
        "grade": book.GRADES[f.label][f.grade],
        "degree": book.DEGREES[f.grade],
        "zone": f"<side> {book.ZONES[f.zone]}" if f.zone else "",
        "place": f"<side> {f.zone}",
        "side": f.side,
        "other": "left" if f.side == "right" else "right",
        "size": f"{round(40 * sum(f.extent)) / 2:g}",  # cm: a unit is 20 cm
        "object": book.FOREIGN_NAMES.get(f.kind, ""),
    }


def _foci(rng: Random, group: Group) -> list[str]:
    """The sentences on certain foci; two sides of one kind are often told together."""
    kinds = book.FINDINGS[group[0].label]
    if len(group) == 2 and "both" in kinds and rng.random() < 0.75:
        right, left = sorted(group, key=lambda f: f.side == "left")
        if right.grade == left.grade and right.kind == left.kind and right.zone == left.zone:
            return [say(rng, kinds["both"], **_slots(right))]
        if "each" in kinds:
            grades = book.GRADES[right.label]
            return [say(rng, kinds["each"], right=grades[right.grade], left=grades[left.grade])]
    lines = []
    for i, f in enumerate(group):
        phrases = kinds.get("more") if i else None
        lines.append(say(rng, phrases or kinds.get(f.kind) or kinds[""], **_slots(f)))
    return lines


def _deny(rng: Random, absent: list[str], clear: bool) -> list[str]:
    """Denials of findings that are not there: some together, some alone, some not at all."""
    lines = [say(rng, book.LUNGS_CLEAR)] if clear and rng.random() < 0.6 else []
    told = [n for n in absent if rng.random() < book.ABSENT[n]]
    rng.shuffle(told)
    cut = rng.randint(0, len(told)) if rng.random() < 0.4 else len(told)
    for part in (told[:cut], told[cut:]):
        names = [say(rng, book.DENIALS[n]).lower() for n in part]
        if len(names) > 2:
            names = [", ".join(names[:-1]) + ",", names[-1]]
        if names:
            lines.append(say(rng, book.NEGATIONS, names=" or ".join(names)))
    return lines


def _impression(rng: Random, groups: list[Group], before: Sequence[Finding] | None) -> list[str]:
    """The findings once more, in short and the pressing ones first, or that there are none."""
    present = {g[0].label for g in groups}
    lines = [_short(rng, group) for group in groups]
    if not present - {CARDIOMEGALY, FOREIGN}:
        lines.append(say(rng, book.CLOSING["normal"]))
    elif len(present) == 1 and rng.random() < 0.3:
        lines.append(say(rng, book.CLOSING["otherwise"]))
    if present & {PNEUMOTHORAX, CONSOLIDATION, LESION} and rng.random() < 0.35:
        lines.append(say(rng, book.CLOSING["advice"]))
    if before is None and rng.random() < 0.3:
        rng.shuffle(lines)
    return lines


def _short(rng: Random, group: Group) -> str:
    worst = max(group, key=lambda f: f.grade)
    if not worst.certain:
        return say(rng, book.OPEN_IMPRESSIONS[worst.label], **_slots(worst))
    phrases = book.IMPRESSIONS[worst.label]
    kind = worst.kind
    if len(group) > 1:
        kind = "both" if "both" in phrases else "many"
    return say(rng, phrases.get(kind) or phrases[""], **_slots(worst))
