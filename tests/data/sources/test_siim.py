"""SIIM-ACR Pneumothorax in its public layout: nested DICOM files and relative run-lengths."""

import io

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from configs.ingest import get_config
from medsyn_jax.core.errors import RejectedRecord, UserError
from medsyn_jax.data.sources import plan, siim
from medsyn_jax.data.sources.ingestion import ingest
from medsyn_jax.data.store import shards
from medsyn_jax.data.store.items import Runs, runs_of
from tests.data.images.test_dicom import dicom

UID = "1.2.276.0.7230010.3.1.4.8323329.{}.1517875160.837500"
HEAD = "ImageId, EncodedPixels"
GREY = np.tile(np.arange(1024) // 4, (1024, 1)).astype(np.uint8)


def uid(number: int) -> str:
    return UID.format(number)


def settings(root, **fields):
    config = get_config("siim").ingest
    config.update({"path": str(root), "size": 64, "workers": 1, **fields})
    return config


def siim_folder(root, rows, images, head=HEAD, pixels=None):
    """Writes train-rle.csv, and <study>/<series>/<image>.dcm of the image numbers."""
    root.mkdir(exist_ok=True)
    (root / "train-rle.csv").write_text("\n".join([head, *rows]) + "\n")
    for number in images:
        folder = root / "dicom-images-train" / f"{uid(number)}.study" / f"{uid(number)}.series"
        folder.mkdir(parents=True)
        if pixels is None:
            (folder / f"{uid(number)}.dcm").touch()  # listed, not read
        else:
            dicom(folder / f"{uid(number)}.dcm", pixels, 8)
    return root


def listing(root, rows, images=range(4), **fields):
    return siim.list_items(settings(siim_folder(root, rows, images, **fields)))


def test_rows_of_an_image_are_one_mask(tmp_path):
    rows = [
        f"{uid(0)}, -1",
        f"{uid(1)}, 2048 10 1014 10",  # columns 2 and 3, rows 0 to 9
        f"{uid(1)}, 2053 10",  # column 2, rows 5 to 14
        f"{uid(2)},5 3",
    ]
    result = listing(tmp_path, rows)
    assert result.label_names == ("Pneumothorax",)
    assert [item.labels for item in result.items] == [(0,), (1,), (1,)]
    assert [item.subject for item in result.items] == [uid(0), uid(1), uid(2)]
    assert all(item.split is None and item.boxes is None for item in result.items)
    path = tmp_path / "dicom-images-train" / f"{uid(1)}.study" / f"{uid(1)}.series"
    assert result.items[1].image == str(path / f"{uid(1)}.dcm")
    masks = [dict(item.masks)["mask_pneumothorax"] for item in result.items]
    assert masks == [
        Runs(1024, 1024, (1024 * 1024,)),
        Runs(1024, 1024, (2048, 15, 1009, 10, 1024 * 1024 - 3082)),
        Runs(1024, 1024, (5, 3, 1024 * 1024 - 8)),
    ]
    assert result.dropped == {"image in no table": 1}
    assert result.rejects == []


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools'
def test_the_union_is_that_of_pycocotools():
    rng = np.random.default_rng(0)
    for _ in range(50):
        spans = [(s, s + n) for s, n in zip(*rng.integers(0, 30, (2, 6)).tolist(), strict=True)]
        whole = np.zeros(64, bool)
        for start, end in spans:
            whole[start:end] = True
        runs = runs_of(8, 8, spans)
        assert min(runs.counts[1:], default=0) >= 0
        decoded = coco.decode(coco.frPyObjects({"size": [8, 8], "counts": [*runs.counts]}, 8, 8))
        assert np.array_equal(decoded.T.ravel(), whole)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (["1048570 7"], "the runs leave the mask of 1024 x 1024 pixels"),
        (["5 3 -2 4"], "'5 3 -2 4': expected -1, or pairs of numbers from 0: gap and length"),
        (["5 3 2"], "expected -1, or pairs"),
        (["5 0"], "expected -1, or pairs"),
        (["5 3.5"], "expected -1, or pairs"),
        (["nan"], "EncodedPixels 'nan': expected -1"),
        ([""], "EncodedPixels '': expected -1"),
        (["5 3,9"], "has 3 fields where the head line has 2"),
        (["5 3", "-1"], "has a mask in one row, and -1 in another"),
        (["5 3", "7"], "train-rle.csv: row 3: EncodedPixels '7': expected -1"),
    ],
)
def test_an_image_with_an_unusable_row_is_rejected(tmp_path, rows, reason):
    rows = [f"{uid(0)}, {row}" for row in rows]
    result = listing(tmp_path, [*rows, f"{uid(1)}, -1"], images=(0, 1))
    assert [item.key for item in result.items] == [uid(1)]
    assert [key for key, _ in result.rejects] == [uid(0)]
    assert reason in result.rejects[0][1]
    assert result.dropped == {}


def test_an_image_that_is_missing_and_one_without_a_row(tmp_path):
    rows = [f"{uid(0)}, -1", f"{uid(7)}, 5 3", ", -1"]
    result = listing(tmp_path, rows, images=(0, 1, 2))
    assert [item.key for item in result.items] == [uid(0)]
    reasons = dict(result.rejects)
    assert reasons[uid(7)].endswith(f"there is no {uid(7)}.dcm below {tmp_path}")
    assert reasons["row-4"].endswith("row 4: column 'ImageId' is empty")
    assert result.dropped == {"image in no table": 2}


def test_an_altered_or_missing_table_is_named(tmp_path):
    with pytest.raises(UserError, match=r"missing column: .*train-rle.csv: no column 'EncodedP"):
        listing(tmp_path / "a", [f"{uid(0)},-1"], head="ImageId,Encoded")
    with pytest.raises(UserError, match=r"missing column: .*: no column 'ImageId' among: 1.2.27"):
        listing(tmp_path / "b", [], head=f"{uid(0)}, -1")
    with pytest.raises(UserError, match=r"no table: .*none/train-rle.csv does not exist"):
        siim.list_items(settings(tmp_path / "none"))


def test_stage_2_lies_flat_and_has_no_spaces(tmp_path):
    images = tmp_path / "stage_2_images"
    images.mkdir()
    for name in ("ID_01", "ID_02"):
        (images / f"{name}.dcm").touch()
    (images / "._ID_02.dcm").touch()
    text = "ImageId,EncodedPixels\nID_01,-1\nID_02,5 3\n"
    (tmp_path / "stage_2_train.csv").write_text(text)
    result = siim.list_items(settings(tmp_path))
    assert [(item.key, item.labels) for item in result.items] == [("ID_01", (0,)), ("ID_02", (1,))]
    assert result.items[1].image == str(images / "ID_02.dcm")


def test_images_behind_a_link_are_listed(tmp_path):
    siim_folder(tmp_path / "disk", [], [0])
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train-rle.csv").write_text(f"{HEAD}\n{uid(0)}, -1\n")
    (tmp_path / "set" / "images").symlink_to(tmp_path / "disk" / "dicom-images-train")
    assert len(siim.list_items(settings(tmp_path / "set")).items) == 1


def test_a_mask_is_rejected_with_an_image_of_another_size(tmp_path):
    half = siim_folder(tmp_path, [f"{uid(0)}, 5 3"], [0], pixels=GREY[:512, :512])
    item = siim.list_items(settings(half)).items[0]
    with pytest.raises(RejectedRecord, match="has 512 x 512 pixels, but the run-lengths of its ma"):
        siim.make(item, settings(half))


def test_the_set_is_ingested_and_its_counts_are_printed(tmp_path):
    runs = f"{256 * 1024 + 512} 64" + " 960 64" * 63  # rows 512 to 575 of columns 256 to 319
    rows = [f"{uid(0)}, {runs}", *(f"{uid(n)}, -1" for n in (1, 2)), f"{uid(3)}, 9"]
    root = siim_folder(tmp_path / "siim", rows, range(4), pixels=GREY)
    config = settings(root, split_shares=(1.0, 0.0, 0.0), max_reject_share=0.5)
    planned = plan.make_plan(config)
    assert "positive for Pneumothorax 1 (train 1, valid 0, test 0)" in planned.notes
    assert "not empty: mask_pneumothorax 1 (train 1, valid 0, test 0)" in planned.notes
    ingest(config, tmp_path / "shards", planned)
    described = shards.describe(tmp_path / "shards")
    assert described["splits"]["train"]["records"] == 3
    assert described["rejects"] == 1
    record = siim.make(next(item for item in planned.parts[0].items if item.key == uid(0)), config)
    with Image.open(io.BytesIO(record["mask_pneumothorax"])) as png:
        rows_of, columns = np.nonzero(np.asarray(png))
    assert (rows_of.min(), rows_of.max(), columns.min(), columns.max()) == (32, 35, 16, 19)
    assert len(rows_of) == 16
