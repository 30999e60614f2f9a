"""The radiologist of the phantom corpus: puts the plan of a study into words.

Left and right are the patient's. A report names every finding that is present, and denies only
findings that are absent. All phrases come from `phrases.toml`, which explains its notation.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from random import Random

from medsyn_jax.phantom.findings import CARDIOMEGALY, FOREIGN, OPPOSITE, Device, Finding, Plan

PHRASES = tomllib.loads((files("medsyn_jax.phantom") / "phrases.toml").read_text("utf-8"))
OUTSIDE_LUNGS = {CARDIOMEGALY, FOREIGN}
_SLOT = re.compile(r"<(\w+)>")
_CHOICE = re.compile(r"\{([^{}]*)\}")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou])")
Groups = Mapping[str, Sequence[Finding]]  # foci by label, the pressing ones first
Before = Sequence[Finding] | None


def say(rng: Random, phrases: str | Sequence[str], **slots: str) -> str:
    """Draw a phrase, fill its slots, draw its alternatives, and mend spaces and capitals.

    Raises:
      KeyError: the phrase has a slot that `slots` does not fill.
    """
    phrase = phrases if isinstance(phrases, str) else rng.choice(phrases)
    while _SLOT.search(phrase):  # a slot may hold slots
        phrase = _SLOT.sub(lambda slot: slots[slot[1]], phrase)
    while _CHOICE.search(phrase):  # from the inside out
        phrase = _CHOICE.sub(lambda choice: rng.choice(choice[1].split("|")), phrase)
    phrase = " ".join(phrase.split()).replace(" ,", ",").replace(",.", ".").replace(" .", ".")
    phrase = _ARTICLE.sub(r"\1n ", phrase)
    return phrase[:1].upper() + phrase[1:]


def write(rng: Random, plan: Plan, before: Before) -> str:
    """Write a report in the manner of MIMIC-CXR, sections under their heads.

    Args:
      rng: source of the wording.
      plan: what the image shows.
      before: findings of the previous study, None for the first study.
    """
    view = plan.pose.view
    groups = {name: [f for f in plan.findings if f.label == name] for name in PHRASES["findings"]}
    groups = {name: foci for name, foci in groups.items() if foci}
    body = " ".join(_findings(rng, plan, groups, before))
    impression = _impression(rng, groups, first=before is None)
    parts = [" " * 33 + "FINAL REPORT"] if rng.random() < 0.3 else []
    if rng.random() < 0.75:
        parts.append(say(rng, PHRASES["exam"][view]))
    if rng.random() < 0.8:
        age = plan.anatomy.age if rng.random() < 0.4 else "___"
        who = f"{age}-year-old {'woman' if plan.anatomy.sex == 'F' else 'man'}"
        head, phrases = PHRASES["history"].values()
        parts.append(f"{say(rng, head)} {say(rng, phrases, who=who)}")
    if rng.random() < 0.3:
        parts.append(f"TECHNIQUE: {say(rng, PHRASES['technique'][view])}")
    if rng.random() < 0.7:
        study = "first" if before is None else "later"
        parts.append(f"COMPARISON: {say(rng, PHRASES['comparison'][study])}")
    layout = rng.random()
    if layout < 0.05:
        parts.append(f"IMPRESSION: {body}")
    elif layout < 0.10:
        parts.append(f"FINDINGS AND IMPRESSION: {body} {' '.join(impression)}")
    else:
        parts.append(f"FINDINGS: {body}")
        if len(impression) > 1 and rng.random() < 0.5:
            numbered = (f"{i}. {line}" for i, line in enumerate(impression, 1))
            parts.append("IMPRESSION:\n" + "\n".join(numbered))
        else:
            parts.append(f"IMPRESSION: {' '.join(impression)}")
    return "\n\n".join("\n".join(map(_wrap, part.split("\n"))) for part in parts)


def _wrap(text: str) -> str:
    """Break lines after at most 78 characters, as the reports of the field do."""
    lines, start = [], 0
    while len(text) - start > 78:
        end = text.rfind(" ", start + 1, start + 78)
        lines.append(text[start:end])
        start = end + 1
    return "\n".join([*lines, text[start:]])


def _findings(rng: Random, plan: Plan, groups: Groups, before: Before) -> list[str]:
    """Sentences of the section FINDINGS."""
    view = plan.pose.view
    lines = [say(rng, PHRASES["opening"][view])] if rng.random() < 0.6 else []
    lines += [_device(rng, device) for device in plan.devices if rng.random() < 0.9]
    lines += _background(rng, plan)
    blocks = [_finding(rng, foci, before) for foci in groups.values()]
    if CARDIOMEGALY not in groups and rng.random() < 0.75:
        blocks.append(say(rng, PHRASES["heart"]["upper" if plan.anatomy.ratio > 0.475 else view]))
    blocks += _denials(rng, groups)
    gone = {f.label for f in before or () if f.certain} - groups.keys()
    resolved = [PHRASES["findings"][name].get("resolved") for name in sorted(gone)]
    blocks += [say(rng, phrase) for phrase in resolved if phrase and rng.random() < 0.3]
    if rng.random() < 0.6:
        rng.shuffle(blocks)
    normal = [say(rng, p) for p in PHRASES["normal"].values() if rng.random() < 0.35]
    return lines + blocks + normal


def _background(rng: Random, plan: Plan) -> list[str]:
    """Sentences on breath, rotation, exposure, aorta, spine and build."""
    anatomy, pose, bow = plan.anatomy, plan.pose, plan.anatomy.scoliosis
    slots = {
        "turn": "left" if pose.rotation > 0 else "right",
        "bow": "moderate" if abs(bow) > 0.08 else "mild",
        "sense": "levo" if bow > 0 else "dextro",
        "convex": "left" if bow > 0 else "right",
    }
    visible = {
        "hyperinflated": anatomy.hyperinflated,
        "shallow_breath": pose.breath < 0.32,
        "deep_breath": pose.breath > 0.8 and not anatomy.hyperinflated,
        "rotation": abs(pose.rotation) > 0.42,
        "overexposed": pose.exposure > 0.55,
        "underexposed": pose.exposure < -0.55,
        "wide_aorta": anatomy.aorta > 0.62,
        "scoliosis": abs(bow) > 0.04,
        "obesity": anatomy.habitus > 0.78,
        "arms_down": pose.arms_down,
    }
    signs = [sign for name, sign in PHRASES["background"].items() if visible[name]]
    lines = [say(rng, sign["words"], **slots) for sign in signs if rng.random() < sign["chance"]]
    if rng.random() < 0.25:
        lines.append(say(rng, PHRASES["incidental"]["phrases"]))
    rng.shuffle(lines)
    return lines


def _device(rng: Random, device: Device) -> str:
    phrases = PHRASES["devices"][device.kind]
    tips = phrases.get("tips", [""])
    tip = tips[min(len(tips) - 1, int(len(tips) * device.reach))]
    return say(rng, phrases["words"], side=device.side, tip=tip)


def _finding(rng: Random, foci: Sequence[Finding], before: Before) -> str:
    """One or more sentences on the foci of one label."""
    label = foci[0].label
    if foci[0].certain:
        text = " ".join(_foci(rng, foci))
    else:
        text = say(rng, PHRASES["findings"][label]["uncertain"], **_slots(foci[0]))
    if before is not None and rng.random() < 0.35 and label != FOREIGN:
        change = PHRASES["change"]["old" if any(f.label == label for f in before) else "new"]
        text = f"{text.removesuffix('.')}, {say(rng, change).lower()}."
    return text


def _slots(f: Finding) -> dict[str, str]:
    return {
        "grade": PHRASES["findings"][f.label]["grades"][f.grade],
        "degree": PHRASES["degrees"][f.grade],
        "zone": f"<side> {PHRASES['zones'][f.zone]}" if f.zone else "",
        "place": f"<side> {f.zone}",
        "side": f.side,
        "other": OPPOSITE.get(f.side, ""),
        "size": f"{round(40 * sum(f.extent)) / 2:g}",  # cm: a unit is 20 cm
        "object": PHRASES["objects"].get(f.kind, ""),
    }


def _foci(rng: Random, foci: Sequence[Finding]) -> list[str]:
    """Sentences on certain foci of one label; often a single one on two sides."""
    phrases = PHRASES["findings"][foci[0].label]
    sentences = phrases["sentences"]
    if len(foci) == 2 and "both" in sentences and rng.random() < 0.75:
        right, left = sorted(foci, key=lambda f: f.side == "left")
        if (right.grade, right.kind, right.zone) == (left.grade, left.kind, left.zone):
            return [say(rng, sentences["both"], **_slots(right))]
        if "each" in sentences:
            grades = {f.side: phrases["grades"][f.grade] for f in (right, left)}
            return [say(rng, sentences["each"], **grades)]
    lines = []
    for i, f in enumerate(foci):
        more = sentences.get("more") if i else None
        lines.append(say(rng, more or sentences.get(f.kind) or sentences["any"], **_slots(f)))
    return lines


def _denials(rng: Random, groups: Groups) -> list[str]:
    """Denials of absent findings: some together, some alone, some left out."""
    lines = []
    if groups.keys() <= OUTSIDE_LUNGS and rng.random() < 0.6:
        lines.append(say(rng, PHRASES["denials"]["clear_lungs"]))
    absent = [finding for name, finding in PHRASES["absent"].items() if name not in groups]
    denied = [finding["words"] for finding in absent if rng.random() < finding["chance"]]
    rng.shuffle(denied)
    cut = rng.randint(0, len(denied)) if rng.random() < 0.4 else len(denied)
    for part in (denied[:cut], denied[cut:]):
        names = [say(rng, name).lower() for name in part]
        if len(names) > 2:
            names = [", ".join(names[:-1]) + ",", names[-1]]
        if names:
            lines.append(say(rng, PHRASES["denials"]["phrases"], names=" or ".join(names)))
    return lines


def _impression(rng: Random, groups: Groups, first: bool) -> list[str]:
    """Sentences of the section IMPRESSION: each label in short, or that there is no finding."""
    closing = PHRASES["closing"]
    lines = [_short(rng, foci) for foci in groups.values()]
    if groups.keys() <= OUTSIDE_LUNGS:
        lines.append(say(rng, closing["normal"]))
    elif len(groups) == 1 and rng.random() < 0.3:
        lines.append(say(rng, closing["otherwise"]))
    if groups.keys() & set(closing["advised"]) and rng.random() < 0.35:
        lines.append(say(rng, closing["advice"]))
    if first and rng.random() < 0.3:
        rng.shuffle(lines)
    return lines


def _short(rng: Random, foci: Sequence[Finding]) -> str:
    """One sentence on the foci of one label."""
    worst = max(foci, key=lambda f: f.grade)
    phrases = PHRASES["findings"][worst.label]
    if not worst.certain:
        return say(rng, phrases["uncertain_impression"], **_slots(worst))
    impressions, kind = phrases["impressions"], worst.kind
    if len(foci) > 1:
        kind = "both" if "both" in impressions else "many"
    return say(rng, impressions.get(kind) or impressions["any"], **_slots(worst))
