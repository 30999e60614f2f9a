"""The phantom corpus: the same each time, and image, labels, masks, boxes and report agree."""

import hashlib
import re
import subprocess
import sys
from dataclasses import replace
from random import Random

import numpy as np
import pytest

from medsyn_jax.phantom import findings, report
from medsyn_jax.phantom import study as phantom
from medsyn_jax.phantom.hardware import DEVICES
from medsyn_jax.phantom.study import LABELS, Phantom

SEED = 11
BOXED = {"Consolidation", "Lung Lesion", "Foreign Object"}
# words that name a finding, as a labeler would look for them
NAMES = {
    "Cardiomegaly": r"cardiomegaly|enlarged|enlargement",
    "Pleural Effusion": r"effusion|pleural fluid",
    "Pneumothorax": r"pneumothorax",
    "Consolidation": r"consolidation|pneumonia|airspace|opacity|opacities",
    "Edema": r"edema",
    "Atelectasis": r"atelecta",
    "Lung Lesion": r"nodul|mass",
}
HASHES = """
import hashlib
from medsyn_jax.phantom import study as phantom
for n in range(6):
    p = phantom.study(11, n, n % 2, 96)
    parts = [p.image, *p.masks.values(), f"{p.labels}{p.boxes}{p.view}{p.report}".encode()]
    print(hashlib.sha256(b"".join(parts)).hexdigest())
"""
# of 3,000 reports: no change of the code or of phrases.toml may alter them unnoticed
REPORTS_SHA256 = "8d4accabc25c18330fbcfde4b9a4e7c76642b86721f7b85392015ec6837b0488"


@pytest.fixture(scope="module")
def studies() -> list[Phantom]:
    return [phantom.study(SEED, n // 2, n % 2, 64) for n in range(500)]


def sentences(report: str) -> list[str]:
    """The sentences of findings and impression."""
    text = report[min(report.find(h) for h in ("FINDINGS", "IMPRESSION") if h in report) :]
    return re.split(r"\.\s+|:\s+", " ".join(text.split()) + " ")


def denies(sentence: str) -> bool:
    return bool(re.match(r"(\d\. )?(no|there is no|negative for)\b", sentence.lower()))


def asserted(report: str) -> str:
    """Sentences on present findings, in lower case: no denials, no resolved findings."""
    kept = [s for s in sentences(report) if not denies(s) and "reviously" not in s]
    return " . ".join(kept).lower()


def test_two_processes_make_the_same():
    process = subprocess.run(
        [sys.executable, "-c", HASHES], capture_output=True, text=True, check=True
    )
    for n, expected in enumerate(process.stdout.split()):
        p = phantom.study(SEED, n, n % 2, 96)
        parts = [p.image, *p.masks.values(), f"{p.labels}{p.boxes}{p.view}{p.report}".encode()]
        assert hashlib.sha256(b"".join(parts)).hexdigest() == expected


def test_reports_are_pinned():
    reports = (phantom.report_of(SEED, n // 3, n % 3) for n in range(3000))
    assert hashlib.sha256("\0".join(reports).encode()).hexdigest() == REPORTS_SHA256


def phrases(node) -> list[str]:
    """All strings of a table of phrases.toml."""
    if isinstance(node, str):
        return [node]
    nodes = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return [phrase for child in nodes for phrase in phrases(child)]


def test_phrases_close_their_braces_and_hold_known_slots():
    known = "grade degree side other zone place size object left right names who tip turn bow sense"
    for phrase in phrases(report.PHRASES):
        rest, changes = re.sub(rf"<({known.replace(' ', '|')}|convex)>", "", phrase), 1
        while changes:
            rest, changes = re.subn(r"\{[^{}]*\}", "", rest)
        assert not re.search(r"[{}<>|]", rest), phrase


def test_a_slot_that_nothing_fills_is_an_error():
    with pytest.raises(KeyError, match="zone"):
        report.say(Random(0), "opacity in the <zone>")


def test_a_report_needs_no_image(studies):
    assert [phantom.report_of(SEED, n // 2, n % 2) for n in range(500)] == [
        p.report for p in studies
    ]


@pytest.mark.parametrize("subject", [0, 3, 8])
def test_sizes_show_the_same_study(subject):
    by_size = {size: phantom.study(SEED, subject, 1, size) for size in (64, 128, 224, 512)}
    small = by_size[64]
    for size, p in by_size.items():
        assert p.image.shape == (size, size)
        assert p.image.dtype == np.uint8
        assert (p.report, p.labels, p.view) == (small.report, small.labels, small.view)
        assert len(p.boxes) == len(small.boxes)
        for name, mask in p.masks.items():
            assert mask.shape == (size, size)
            assert mask.mean() == pytest.approx(small.masks[name].mean(), abs=0.02)
    pooled = by_size[512].image.reshape(128, 4, 128, 4).mean((1, 3))
    assert np.corrcoef(pooled.ravel(), by_size[128].image.ravel())[0, 1] > 0.98


def test_subjects_keep_their_anatomy():
    first, second, other = (phantom.plan(SEED, *n) for n in ((4, 0), (4, 1), (5, 0)))
    assert first.anatomy == second.anatomy != other.anatomy
    assert first.pose != second.pose


def test_masks_and_boxes_agree_with_labels(studies):
    for p in studies:
        assert tuple(p.labels) == LABELS
        for label, name in (("Pneumothorax", "pneumothorax"), ("Pleural Effusion", "effusion")):
            assert p.masks[name].any() == (p.labels[label] != 0), (p.report, label)
            assert not (p.masks[name] & ~p.masks["lungs"]).any(), p.report
        assert 0.1 < p.masks["lungs"].mean() < 0.6, p.report
        boxed = {label for label, *_ in p.boxes}
        assert boxed == {label for label in BOXED if p.labels[label] != 0}, p.report
        for _, x0, y0, x1, y1 in p.boxes:
            assert 0 <= x0 < x1 <= 64, p.report
            assert 0 <= y0 < y1 <= 64, p.report
        others = [v for label, v in p.labels.items() if label != "No Finding"]
        assert p.labels["No Finding"] == int(not any(others))


def test_sides_of_the_report_are_the_patients(studies):
    checked = 0
    for p in studies:
        for label, name in (("Pneumothorax", "pneumothorax"), ("Pleural Effusion", "effusion")):
            mask = p.masks[name]
            lungs = np.flatnonzero(p.masks["lungs"].any(0))
            left_of_film = mask[:, : int(lungs.mean())].sum() / max(1, mask.sum())
            if p.labels[label] == 0 or 0 < left_of_film < 1:
                continue
            side, other = ("right", "left") if left_of_film > 0.5 else ("left", "right")
            lines = [s for s in asserted(p.report).split(" . ") if re.search(NAMES[label], s)]
            lines = [re.sub("(shift|mediastinal).*", "", s) for s in lines]
            assert any(side in s for s in lines), p.report
            assert not any(other in s or "bilateral" in s for s in lines), p.report
            checked += 1
    assert checked > 60


def test_reports_name_present_findings_and_deny_absent_ones(studies):
    denied = 0
    for p in studies:
        for label, names in NAMES.items():
            if p.labels[label] != 0:
                assert re.search(names, asserted(p.report)), (label, p.report)
            if p.labels[label] != 0 or label == "Consolidation":
                continue
            for s in sentences(p.report):
                denied += denies(s) and bool(re.search(names, s.lower()))
        for s in filter(denies, sentences(p.report)):
            for label, names in NAMES.items():
                if re.search(names.replace("|airspace|opacity|opacities", ""), s.lower()):
                    assert p.labels[label] == 0, (label, s, p.report)
        if p.labels["No Finding"]:
            assert not re.search("effusion|edema|atelecta|nodul", asserted(p.report)), p.report
    assert denied > len(studies)


def test_open_findings_are_hedged_and_few(studies):
    hedge = r"possib|questionable|exclude|may |could |borderline"
    share = np.mean([v == -1 for p in studies for k, v in p.labels.items() if k != "No Finding"])
    assert 0.003 < share < 0.03
    for p in studies:
        if -1 in p.labels.values():
            assert re.search(hedge, p.report.lower()), p.report


def test_reports_vary(studies):
    def body(p: Phantom) -> str:
        return " ".join(sentences(p.report)[1:])

    assert len({body(p) for p in studies}) >= 0.98 * len(studies)
    normal = [body(p) for p in studies if p.labels["No Finding"]]
    assert len(set(normal)) >= 0.95 * len(normal)
    assert 0.5 < np.mean(["COMPARISON:" in p.report for p in studies]) < 0.9
    assert not any(re.search(r"[<>{}|]|  \w| [.,]", p.report.strip()) for p in studies)
    assert max(len(line) for p in studies for line in p.report.splitlines()) <= 80


def test_prevalence():
    states = [findings.labels(phantom.plan(SEED, n, 0).findings) for n in range(3000)]
    share = {name: np.mean([s[name] == 1 for s in states]) for name in LABELS}
    assert 0.2 < share.pop("No Finding") < 0.33
    assert all(0.09 < value < 0.30 for value in share.values()), share


def _region(p: phantom.Plan, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The image with and without the findings, and the pixels of the findings."""
    image, masks, boxes = phantom.render(p, 128, (1,))
    without, _, _ = phantom.render(replace(p, findings=()), 128, (1,))
    if name in masks:
        return image, without, masks[name]
    where = np.zeros((128, 128), bool)
    for _, x0, y0, x1, y1 in boxes:
        where[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))] = True
    return image, without, where


@pytest.mark.parametrize(
    ("label", "name", "sign"),
    [
        ("Pneumothorax", "pneumothorax", -1),
        ("Pleural Effusion", "effusion", 1),
        ("Consolidation", "", 1),
        ("Lung Lesion", "", 1),
        ("Foreign Object", "", 1),
    ],
)
def test_findings_are_visible_at_their_masks_and_boxes(label, name, sign):
    contrast = []
    for n in range(400):
        p = phantom.plan(SEED, n, 0)
        if {f.label for f in p.findings} != {label}:
            continue
        # heart and diaphragm stay displaced without the finding
        image, without, where = _region(p, name)
        change = sign * (image.astype(float) - without)
        contrast.append(change[where].mean() - np.median(change))
    assert len(contrast) > 5
    assert np.mean(np.array(contrast) > 1.0) > 0.9, np.sort(contrast)
    assert np.median(contrast) > 4


@pytest.mark.parametrize("size", [64, 128, 224, 512])
def test_extremes_stay_in_range(size):
    base = phantom.plan(SEED, 2, 0)
    for sign in (-1.0, 1.0):
        anatomy = replace(
            base.anatomy,
            habitus=0.5 + 0.5 * sign,
            width=0.66 + 0.07 * sign,
            ratio=0.55 + 0.2 * sign,
            aorta=0.5 + 0.5 * sign,
            scoliosis=0.15 * sign,
            sex="FM"[sign > 0],
            hyperinflated=sign > 0,
        )
        pose = replace(
            base.pose,
            breath=0.5 + 0.6 * sign,
            rotation=sign,
            tilt=0.12 * sign,
            zoom=0.9 + 0.12 * sign,
            shift=(0.15 * sign, -0.15 * sign),
            exposure=sign,
            contrast=1.0 + 0.3 * sign,
            noise=3.0,
            push=0.15 * sign,
            domes=(0.12, -0.1),
            arms_down=True,
        )
        place = (0.5 + 0.5 * sign, 0.9)
        foci = tuple(
            findings.Finding(label, 2, side, "lower", kind, True, place, (0.2, 0.2), 3.0)
            for label, side, kind in (
                ("Pleural Effusion", "left", "meniscus"),
                ("Pneumothorax", "right", "tension"),
                ("Consolidation", "left", "patchy"),
                ("Lung Lesion", "left", "mass"),
                ("Edema", "", "alveolar"),
                ("Atelectasis", "left", "basal"),
                ("Foreign Object", "left", "key"),
            )
        )
        devices = tuple(findings.Device(kind, "left", 1.0) for kind in DEVICES)
        plan = phantom.Plan(anatomy, pose, foci, devices)
        image, masks, _ = phantom.render(plan, size, (0,))
        assert image.shape == (size, size)
        assert all(m.any() for m in masks.values())


def test_grey_values_fill_the_range(studies):
    low, high = zip(*(np.percentile(p.image, (0.5, 99.5)) for p in studies), strict=True)
    assert np.mean(np.array(low) < 30) > 0.95
    assert np.mean(np.array(high) > 210) > 0.95
    for p in studies:  # bright spine and dark lungs, never the reverse
        if p.labels["No Finding"]:
            lungs = np.median(p.image[p.masks["lungs"]])
            assert lungs + 40 < np.median(p.image[-12:-4, 28:36]), p.report
        assert np.mean(p.image == 255) < 0.05, p.report


@pytest.mark.parametrize("bad", [(-1, 0, 0, 64), (0, -1, 0, 64), (0, 0, -2, 64), (0, 0, 0, 8)])
def test_numbers_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match="out of range"):
        phantom.study(*bad)
