"""Make a tree in the layout of MIMIC-CXR-JPG with known faults, and check its ingestion.

    python -m scripts.mimic_tree --studies 20000 --out runs/mimic-tree --ingest

Writes tables, tiny JPEG files and reports. The reports mix head lines of MIMIC-CXR at random: wet
reads, addenda, reports that hold only a comparison; some images are lateral views. A known share of
images and reports is missing or broken. With --ingest, `configs/ingest.py:paper` reads the tree,
and the script prints the rate, the peak memory of all processes, rejects by reason beside the
expected numbers, and whether each row of the metadata became a record or a reject or was left out.
All text is made up. 20,000 studies are ingested at 422 rows/s on two cores.
"""

import argparse
import csv
import gzip
import io
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from medsyn_jax.data.sources.mimic_cxr import LABELS

# Fault of a study -> its number per thousand studies, and a pattern of the reason for rejection.
FAULTS = {
    "image missing": (5, r"\.jpg: no such file"),
    "image truncated": (3, r"\.jpg: broken or truncated"),
    "image empty": (2, r"\.jpg: the file is empty"),
    "image constant": (2, r"\.jpg: every pixel has the value"),
    "report missing": (4, r"no such report"),
    "report not UTF-8": (2, r"is not UTF-8"),
    "image without split": (1, r"is not in the split table"),
    "report too short": (10, r"too few words"),
}
SEEN = ("The lungs are clear", "There is a {n} mm nodule in the {side} {zone} zone", "No effusion")
SEEN += ("Heart size is {size}", "{side} basal opacity may be atelectasis", "No pneumothorax")
SEEN += ("An endotracheal tube ends {n} mm above the carina", "Median sternotomy wires are intact")
BEFORE = ("EXAMINATION:  CHEST (PORTABLE AP)", "INDICATION:  ___ year old with fever // pneumonia?")
BEFORE += ("TECHNIQUE:  Chest PA and lateral", "HISTORY:  ___-year-old man with cough.")
BEFORE += ("COMPARISON:  ___ at 5:47.", "REASON FOR EXAM:  Line placement.")
AFTER = ("NOTIFICATION:  Told to Dr. ___ by phone at 14:05 on ___.", "RECOMMENDATION(S):  CT.")


def report(rng: Random) -> str:
    """A report like those of MIMIC-CXR: with both sections, one, neither, or with additions."""

    def sentences(count: int) -> str:
        places = {"side": ("left", "right"), "zone": ("upper", "middle", "lower")}
        places |= {"size": ("normal", "mildly enlarged", "top normal")}
        return (
            " ".join(
                rng.choice(SEEN).format(
                    n=rng.randint(4, 90), **{k: rng.choice(v) for k, v in places.items()}
                )
                + "."
                for _ in range(count)
            )
            + f" Stable since {rng.randint(1, 500)} days ago."
        )

    findings, impression = (sentences(rng.randint(2, 5)) for _ in range(2))
    head = rng.sample(BEFORE, rng.randint(1, 4))
    middle = rng.choice(
        (
            [f"FINDINGS:  {findings}", f"IMPRESSION:  {impression}"],
            [f"FINDINGS: \n\n {findings}", f"IMPRESSION: \n \n 1. {impression}\n 2. {findings}"],
            [f"FINDINGS AND IMPRESSION:  {impression}"],
            [f"IMPRESSION:  {impression}"],
            [f"CHEST, TWO VIEWS:  {findings}", f"CONCLUSION:  {impression}"],
            [f"{findings}", f"{impression}"],
            [f"COMPARISON:  In comparison with the study of ___, {findings} {impression}"],
        )
    )
    parts = ["FINAL REPORT", *head, *middle, *rng.sample(AFTER, rng.choice((0, 0, 1, 2)))]
    if rng.random() < 0.1:
        parts = [f"WET READ: ___ ___ ___ 5:47 PM\n  {sentences(2)}\n{'_' * 60}", *parts]
    if rng.random() < 0.05:
        parts = [f"FINAL ADDENDUM\n ADDENDUM  {sentences(2)}\n{'_' * 60}", *parts]
    return f"                                 {(chr(10) + ' ' + chr(10) + ' ').join(parts)}\n"


def write(root: Path, studies: int, seed: int = 0) -> Counter[str]:
    """Write the tree below `root`; return the number of images by fault, of views that are not
    frontal ("not frontal"), and of rows in the metadata ("rows")."""
    rng, counts = Random(seed), Counter()
    pictures = [_jpeg(np.random.default_rng(i).integers(0, 255, (32, 24))) for i in range(64)]
    broken = {"image truncated": pictures[0][:400], "image empty": b""}
    broken["image constant"] = _jpeg(np.full((32, 24), 7))
    metadata = [["dicom_id", "subject_id", "study_id", "ViewPosition", "Rows", "Columns"]]
    split = [["dicom_id", "study_id", "subject_id", "split"]]
    chexpert = [["subject_id", "study_id", *LABELS]]
    names, weights = [*FAULTS, ""], [share for share, _ in FAULTS.values()]
    weights.append(1000 - sum(weights))
    home = ""
    for number in range(studies):
        subject, study = str(10_000_000 + 37 * (number // 2)), str(50_000_000 + number)
        fault = rng.choices(names, weights)[0]
        home = (
            rng.choices(("train", "validate", "test"), (96, 2, 2))[0] if number % 2 == 0 else home
        )
        folder = root / "files" / f"p{subject[:2]}" / f"p{subject}" / f"s{study}"
        folder.mkdir(parents=True)
        text = "FINDINGS:  ___." if fault == "report too short" else report(rng)
        if fault != "report missing":
            data = text.encode() + (b"\xff\xfe" if fault == "report not UTF-8" else b"")
            folder.with_suffix(".txt").write_bytes(data)
        views = [rng.choice(("PA", "AP")), *rng.choice(([], [], ["LATERAL"], ["LL"], [""]))]
        for i, view in enumerate(views):
            dicom = f"{number:08x}-{i:08x}-{rng.getrandbits(96):024x}"
            counts["rows"] += 1
            metadata.append([dicom, subject, study, view, "32", "24"])
            counts[fault if i == 0 else "not frontal"] += 1
            if i or fault != "image without split":
                split.append([dicom, study, subject, home])
            if i or fault != "image missing":
                sound = pictures[number % len(pictures)]
                data = sound if i else broken.get(fault, sound)
                (folder / f"{dicom}.jpg").write_bytes(data)
        values = rng.choices(("", "1.0", "0.0", "-1.0"), (70, 15, 10, 5), k=len(LABELS))
        chexpert.append([subject, study, *values])
    tables = {"metadata": metadata, "split": split, "chexpert": chexpert}
    for name, table in tables.items():
        with gzip.open(root / f"mimic-cxr-2.0.0-{name}.csv.gz", "wt", newline="") as file:
            csv.writer(file).writerows(table)
    return counts


def _jpeg(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(stream, "JPEG")
    return stream.getvalue()


def ingest(root: Path, workdir: Path) -> tuple[float, int]:
    """Ingest the tree; return the seconds, and the peak memory of all processes in bytes."""
    command = [sys.executable, "-m", "medsyn_jax.main", "--config", "configs/ingest.py:paper"]
    command += [f"--workdir={workdir}", f"--config.ingest.path={root}"]
    began, peak = time.monotonic(), 0
    process = subprocess.Popen(command, start_new_session=True)
    while process.poll() is None:
        peak = max(peak, _memory(process.pid))
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"the ingestion ended with status {process.returncode}")
    return time.monotonic() - began, peak


def _memory(session: int) -> int:
    """Bytes in memory of all processes of a session; shared pages count in proportion."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(folder.name)) == session:
                rollup = (folder / "smaps_rollup").read_text()
                total += 1024 * int(re.search(r"^Pss: +(\d+)", rollup, re.M)[1])
        except (OSError, TypeError):
            continue  # the process has ended
    return total


def summary(expected: Counter[str], workdir: Path) -> bool:
    """Print rejects by reason beside the expected numbers; return whether everything adds up."""
    info = json.loads((workdir / "shards" / "medsyn.json").read_text())
    with (workdir / "shards" / "rejects.csv").open(newline="") as file:
        reasons = [row["reason"] for row in csv.DictReader(file)]
    counts = {
        name: sum(re.search(pattern, reason) is not None for reason in reasons)
        for name, (_, pattern) in FAULTS.items()
    }
    left_out = info["left_out"]
    counts["not frontal"] = left_out.get("not a frontal view", 0)
    print(f"{'what':<22}{'expected':>9}{'found':>9}")
    for name, count in counts.items():
        print(f"{name:<22}{expected[name]:>9}{count:>9}")
    records = sum(part["records"] for part in info["splits"].values())
    accounted = records + info["rejects"] + sum(left_out.values())
    print(
        f"rows {expected['rows']} = {records} records + {info['rejects']} rejects + "
        f"{sum(left_out.values())} left out: {accounted == expected['rows']}"
    )
    return accounted == expected["rows"] and all(expected[name] == n for name, n in counts.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--studies", type=int, default=20_000)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ingest", action="store_true", help="ingest the tree, check the set")
    args = parser.parse_args()
    counts = write(args.out / "tree", args.studies, args.seed)
    print(f"{args.studies} studies, {counts['rows']} images in {args.out / 'tree'}", flush=True)
    if not args.ingest:
        return 0
    seconds, peak = ingest(args.out / "tree", args.out / "run")
    rate = counts["rows"] / seconds
    print(
        f"{seconds:.1f} s, {rate:.0f} rows/s; peak memory of all processes {peak / 2**20:.0f} MiB"
    )
    return 0 if summary(counts, args.out / "run") else 1


if __name__ == "__main__":
    sys.exit(main())
