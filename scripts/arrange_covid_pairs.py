"""Arrange the covid-chestxray pairs as folders of masks and of boxes, for `--config.ingest.source`.

    python -m scripts.arrange_covid_pairs covid_pairs OUT

OUT/lungs gets the images that have a lung mask with their masks, OUT/boxes all images with lung
boxes and boxes.csv; both in folders of patients, pNUMBER, so that `ingest.masks.subject='p(\\w+)/'`
splits by patient.
"""

import argparse
import csv
import shutil
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()

    def copy(path: str, *to: str) -> None:
        target = args.out.joinpath(*to, Path(path).name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(args.pairs / path, target)

    with (args.pairs / "pairs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    with (args.pairs / "lung_boxes.csv").open(newline="") as file:
        boxes = list(csv.DictReader(file))
    boxed, patients = {box["image"] for box in boxes}, {r["image"]: r["patient"] for r in rows}
    for row in rows:
        patient = f"p{row['patient']}"
        if row["lung_mask"]:
            copy(row["image"], "lungs", "images", patient)
            copy(row["lung_mask"], "lungs", "lung masks", patient)
        if row["image"] in boxed:
            copy(row["image"], "boxes", "images", patient)
    with (args.out / "boxes" / "boxes.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "left", "top", "right", "bottom", "label"))
        for box in boxes:
            left, top, width, height = (float(box[k]) for k in ("x", "y", "width", "height"))
            path = f"images/p{patients[box['image']]}/{Path(box['image']).name}"
            writer.writerow((path, left, top, left + width, top + height, box["label"]))
    print(f"{args.out}: {sum(bool(r['lung_mask']) for r in rows)} masks, {len(boxes)} boxes")


if __name__ == "__main__":
    main()
