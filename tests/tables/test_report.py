"""The page of a study: it holds the pictures and curves of the first seed with the most labels."""

import base64
import json
import re

import numpy as np
import pytest

from medsyn_jax.tables import cells, examples, report
from medsyn_jax.tables.cells import Cell

CELLS = [
    Cell(method, arm, "segment", fraction, seed)
    for seed in range(2)
    for method, arm in (("none", "random"), ("convirt", "real"), ("convirt", "synthetic"))
    for fraction in (0.1, 1.0)
]
RATES = {
    "false_positive_rates": [0.0, 0.5, 1.0],
    "true_positive_rates": {"mean": [0.25, 0.75, 1.0]},
}


def draw(path, shade):
    images = np.full((1, 16, 16), shade, np.uint8)
    mask = np.zeros((1, 16, 16), bool)
    mask[:, 4:8, 4:8] = True
    examples.draw_masks(path, images, mask, mask)


@pytest.fixture
def folder(tmp_path):
    for shade, cell in enumerate(CELLS):
        entry = {"cell": vars(cell), "metric": "dice", "source": "mimic_cxr"}
        entry |= {"metrics": {"dice": {"value": 0.5 + 0.01 * shade}}}
        if cell.seed == 0:
            draw(tmp_path / f"{cell.name}.png", 20 * shade)
            entry["roc"] = RATES
        (tmp_path / f"{cell.name}.json").write_text(json.dumps(entry))
    return tmp_path


def page(folder, pairs=None) -> str:
    entries = cells.read(folder, CELLS)
    report.write(folder, entries, ("segment",), len(CELLS), pairs)
    return (folder / "report.html").read_text()


def pictures(html: str) -> list[bytes]:
    return [base64.b64decode(x) for x in re.findall(r"image/png;base64,([^']+)'", html)]


def test_the_page_holds_a_picture_of_each_encoder_with_the_most_labels(folder):
    html = page(folder)
    shown = [c for c in CELLS if (c.seed, c.fraction) == (0, 1.0)]
    assert pictures(html) == [(folder / f"{c.name}.png").read_bytes() for c in shown]
    assert html.index("convirt, real</figcaption>") < html.index("convirt, synthetic</figcaption>")
    assert "true mask</span>" in html
    assert "100 % of the labels" in html
    assert not re.search(r"(src|href)='(?!data:)", html)  # nothing outside of the file


def test_pairs_stand_above_the_tasks(folder):
    draw(folder / "pairs.png", 200)
    html = page(folder, examples.read(folder / "pairs.png"))
    assert pictures(html)[0] == (folder / "pairs.png").read_bytes()
    assert html.index("image/png") < html.index("<h2>")


def test_roc_curves_are_drawn_in_pixels(folder):
    html = page(folder)
    curves = html[html.index("aria-label='ROC curves") :]
    assert curves.count("<polyline") == 3
    points = re.search(r"points='([^']+)'", curves).group(1).split()
    assert points == ["54.0,287.5", "287.0,102.5", "520.0,10.0"]  # 0.25, 0.75 and 1 of 370 pixels


def test_real_images_are_marked_unless_they_are_the_phantoms(folder):
    assert "This page shows real images" in page(folder)
    for path in folder.glob("*.json"):
        path.write_text(path.read_text().replace("mimic_cxr", "phantom"))
    assert "This page shows real images" not in page(folder)


def test_cells_without_pictures_make_a_page_without_them(folder):
    for path in folder.glob("*.png"):
        path.unlink()
    for path in folder.glob("*.json"):
        entry = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in entry.items() if k not in ("roc", "source")}))
    html = page(folder)
    assert pictures(html) == []
    assert "ROC" not in html
    assert "This page shows real images" not in html


def test_page_and_table_begin_with_the_same_sentences(folder):
    html = page(folder)
    table = (folder / "table.md").read_text()
    listed = re.findall(r"<li>(.*?)</li>", html)
    assert [f"- {sentence}" for sentence in listed] == table.split("\n\n")[0].splitlines()
    assert listed[0].startswith("segment, 100 % of the labels. Synthetic minus real: convirt +0.02")
