"""COCO's format: boxes, polygons and run-lengths of a user's own."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from configs.ingest import get_config
from medsyn_jax.core.errors import RejectedRecord, UserError
from medsyn_jax.data.sources import coco, ingestion, plan
from medsyn_jax.data.store import shards
from medsyn_jax.data.store.items import coco_counts

HEIGHT, WIDTH = 24, 20
NOISE = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH), np.uint8)
CATEGORIES = [{"id": 3, "name": "Lung Opacity"}, {"id": 7, "name": "heart", "supercategory": "x"}]
SQUARE = [4, 6, 10, 6, 10, 14, 4, 14]  # x 4 to 10, y 6 to 14


def inside(left, top, right, bottom) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def counts(mask: np.ndarray) -> list[int]:
    """Uncompressed run-lengths, zeros first, down the columns."""
    flat = np.concatenate([[0], mask.T.ravel(), [0]])
    edges = np.flatnonzero(np.diff(flat))
    ends = np.append(edges, mask.size) if edges.size == 0 or edges[-1] < mask.size else edges
    return np.diff(np.concatenate([[0], ends])).tolist()


def annotation(image, bbox=(4, 6, 6, 8), category=3, **fields):
    made = {
        "image_id": image,
        "category_id": category,
        "bbox": list(bbox),
        "area": 48,
        "iscrowd": 0,
    }
    return made | fields


def write(path, annotations=(), images=None, categories=CATEGORIES, names=("1.png", "2.png")):
    if images is None:
        images = [
            {"id": n, "file_name": name, "height": HEIGHT, "width": WIDTH}
            for n, name in enumerate(names)
        ]
    path.parent.mkdir(parents=True, exist_ok=True)
    numbered = [{"id": n} | a for n, a in enumerate(annotations)]
    values = {"images": images, "annotations": numbered, "categories": categories}
    path.write_text(json.dumps({"info": {}, "licenses": []} | values))


def draw(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(NOISE).save(root / name)


def settings(path, **fields):
    config = get_config("coco").ingest
    values = {"path": str(path), "size": HEIGHT, "workers": 1, "max_reject_share": 0.9}
    config.update(values | fields)
    return config


def listed(path, *annotations, **fields):
    draw(path, "images/1.png", "images/2.png")
    write(path / "annotations.json", annotations, **fields)
    return coco.list_items(settings(path))


def masks(record) -> dict[str, np.ndarray]:
    """The stored masks without the padding."""
    made = {}
    for name in record:
        if name.startswith("mask_"):
            with Image.open(io.BytesIO(record[name])) as image:
                made[name] = np.asarray(image)[:, 2:22] // 255
    return made


def test_boxes_labels_and_the_union_of_all_kinds_of_segmentation(tmp_path):
    whole = coco_mask.encode(np.asfortranarray(inside(0, 0, 3, 2)))
    listing = listed(
        tmp_path,
        annotation(0, segmentation=[SQUARE]),
        annotation(
            0,
            (0, 0, 3, 2),
            segmentation={"size": [HEIGHT, WIDTH], "counts": whole["counts"].decode()},
        ),
        annotation(
            0,
            (15, 20, 5, 4),
            segmentation={"size": [HEIGHT, WIDTH], "counts": counts(inside(15, 20, 20, 24))},
        ),
        annotation(0, (1, 2, 3, 4), category=7, segmentation=[[1, 2, 4, 2, 4, 6, 1, 6]]),
    )
    assert listing.label_names == ("Lung Opacity", "heart")
    assert listing.rejects == []
    first, second = listing.items
    assert (first.key, first.subject, first.split) == ("images/1.png", "1", None)
    assert (first.labels, second.labels) == ((1, 1), (0, 0))
    assert first.boxes == (
        ("Lung Opacity", 4, 6, 10, 14),
        ("Lung Opacity", 0, 0, 3, 2),
        ("Lung Opacity", 15, 20, 20, 24),
        ("heart", 1, 2, 4, 6),
    )
    assert second.boxes == ()
    config = settings(tmp_path)
    record = coco.make(first, config)
    expected = inside(4, 6, 10, 14) | inside(0, 0, 3, 2) | inside(15, 20, 20, 24)
    assert np.array_equal(masks(record)["mask_lung_opacity"], expected)
    assert np.array_equal(masks(record)["mask_heart"], inside(1, 2, 4, 6))
    assert record["boxes"][0]["bbox"].tolist() == [6, 6, 12, 14]  # with two columns of padding
    assert not any(mask.any() for mask in masks(coco.make(second, config)).values())


def test_run_lengths_of_any_mask_are_those_of_pycocotools():
    rng = np.random.default_rng(1)
    for share in (0.0, 0.01, 0.2, 0.5, 1.0):
        mask = (rng.random((HEIGHT, WIDTH)) < share).astype(np.uint8)
        text = coco_mask.encode(np.asfortranarray(mask))["counts"]
        assert coco_counts(text) == coco_counts(text.decode()) == counts(mask)
    tall = np.zeros((3000, 900), np.uint8)
    tall[100:2900, 5:800] = 1  # long runs, and differences between them
    assert coco_counts(coco_mask.encode(np.asfortranarray(tall))["counts"]) == counts(tall)


def test_empty_runs_within_run_lengths_are_no_end_of_them():
    runs = [0, 0, 10, 5, 0, 7, HEIGHT * WIDTH - 22, 0]
    (part,) = coco._parts({"size": [HEIGHT, WIDTH], "counts": runs}, HEIGHT, WIDTH)
    assert coco_counts(part["counts"]) == [10, 12, HEIGHT * WIDTH - 22]


def test_polygons_beyond_the_edge_are_cut_off_and_several_are_one_mask(tmp_path):
    polygons = [[-5, 0, 4, 0, 4, 8, -5, 8], [16, 20, 30, 20, 30, 30, 16, 30]]
    listing = listed(tmp_path, annotation(0, segmentation=polygons))
    made = masks(coco.make(listing.items[0], settings(tmp_path)))["mask_lung_opacity"]
    assert np.array_equal(made, inside(0, 0, 4, 8) | inside(16, 20, 20, 24))


def test_boxes_alone_make_no_masks_and_missing_segmentations_are_counted(tmp_path):
    listing = listed(tmp_path / "a", annotation(0), annotation(1, segmentation=[]))
    assert [item.masks for item in listing.items] == [(), ()]
    listing = listed(
        tmp_path / "b",
        annotation(0, segmentation=[SQUARE]),
        annotation(0, category=7),
        annotation(1, category=7, iscrowd=1),
    )
    assert [[name for name, _ in item.masks] for item in listing.items] == [
        ["mask_lung_opacity"],
        ["mask_lung_opacity"],
    ]
    assert "2 annotations have a box alone: no mask shows them" in listing.notes
    assert "1 crowds (iscrowd) are in labels and masks, but no boxes" in listing.notes
    assert (listing.items[1].boxes, listing.items[1].labels) == ((), (0, 1))


@pytest.mark.parametrize(
    ("tables", "images"),
    [
        (
            ("annotations/instances_train2017.json", "annotations/instances_val2017.json"),
            ("train2017/{}", "val2017/{}"),
        ),
        (
            ("train/_annotations.coco.json", "valid/_annotations.coco.json"),
            ("train/{}", "valid/{}"),
        ),
        (("annotations_train.json", "annotations_val.json"), ("images/{}", "images/{}")),
        (("instances_Train.json", "instances_dev.json"), ("images/Train/{}", "images/dev/{}")),
    ],
)
def test_splits_and_images_of_public_layouts(tmp_path, tables, images):
    for n, (table, pattern) in enumerate(zip(tables, images, strict=True)):
        draw(tmp_path, pattern.format(f"{n}.png"))
        write(tmp_path / table, [annotation(0)], names=[f"{n}.png"])
    listing = coco.list_items(settings(tmp_path))
    assert listing.rejects == []
    assert [(item.key, item.split) for item in listing.items] == [
        (images[0].format("0.png"), "train"),
        (images[1].format("1.png"), "valid"),
    ]
    one = coco.list_items(settings(tmp_path / tables[0]))
    assert [item.split for item in one.items] == ["train" if "/" not in tables[0] or
        tables[0].startswith("annotations/") else None]  # fmt: skip


def test_one_bad_image_is_a_reject_with_its_reason(tmp_path):
    short = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH - 1]}
    other = {"size": [WIDTH, HEIGHT], "counts": [HEIGHT * WIDTH]}
    cases = [
        (annotation(0, (4, 6, 0, 8)), r"the box \[4, 6, 0, 8\] .* has no area"),
        (annotation(0, (4, 6, -2, 8)), r"the box \[4, 6, -2, 8\] .* has no area"),
        (annotation(0, (4, 6, float("nan"), 8)), "has no area"),
        (annotation(0, (4, 6, 8)), "not enough values"),
        (annotation(0, "abcd"), "a value is missing or of the wrong kind"),
        (annotation(0, category=5), "category_id 5 of an annotation is in no category"),
        (annotation(0, category=[5]), r"category_id \[5\] of an annotation is in no category"),
        (annotation(0, segmentation=short), "run-lengths do not fill the image of 20 x 24"),
        (annotation(0, segmentation=other), "of an image of 24 x 20 pixels, but .* has 20 x 24"),
        (annotation(0, segmentation=short | {"counts": "0\x00é"}), "no compressed ones of COCO"),
        (annotation(0, segmentation=short | {"counts": "oo"}), "do not fill the image"),
        (annotation(0, segmentation=short | {"counts": [-5, HEIGHT * WIDTH + 5]}), "do not fill"),
        (annotation(0, segmentation={"size": [HEIGHT, WIDTH]}), "a value is missing"),
        (annotation(0, segmentation=[[1, 2, 3, 4]]), "a polygon is no list of x, y"),
        (annotation(0, segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "a polygon is no list of x, y"),
        (annotation(0, segmentation=[[1, 2, 3, 4, 5, 1e9]]), "far outside of the image of 20 x 24"),
        (annotation(0, segmentation=[[1, 2, 3, 4, 5, float("nan")]]), "far outside"),
        (annotation(0, segmentation=7), "a value is missing or of the wrong kind"),
    ]
    for n, (bad, message) in enumerate(cases):
        listing = listed(tmp_path / str(n), bad, annotation(1))
        assert [item.key for item in listing.items] == ["images/2.png"], message
        ((key, why),) = listing.rejects
        assert key == "images/1.png"
        assert why.startswith(f"{tmp_path / str(n)}/annotations.json: images[0]: ")
        with pytest.raises(RejectedRecord, match=message):
            raise RejectedRecord(why)


def test_boxes_outside_and_annotations_of_another_size_reject_their_record(tmp_path):
    listing = listed(tmp_path, annotation(0, (30, 6, 6, 8)), annotation(1, (15, 20, 9, 9)))
    outside, over_the_edge = listing.items
    with pytest.raises(RejectedRecord, match=r"1\.png: the box 30, 6, 36, 14 .* of 20 x 24 pixels"):
        coco.make(outside, settings(tmp_path))
    (box,) = coco.make(over_the_edge, settings(tmp_path))["boxes"]
    assert box["bbox"].tolist() == [17, 20, 22, 24]
    doubled = [{"id": 0, "file_name": "1.png", "height": 2 * HEIGHT, "width": 2 * WIDTH}]
    listing = listed(tmp_path, annotation(0), images=doubled)
    with pytest.raises(
        RejectedRecord, match="has 20 x 24 pixels, but its annotations are those of 40 x 48"
    ):
        coco.make(listing.items[0], settings(tmp_path))
    first = plan.make_plan(settings(tmp_path)).fingerprint
    listed(tmp_path, annotation(0), images=[doubled[0] | {"width": WIDTH, "height": HEIGHT}])
    assert plan.make_plan(settings(tmp_path)).fingerprint != first


def test_images_that_are_missing_and_images_and_annotations_that_are_too_many(tmp_path):
    draw(tmp_path, "images/3.png")
    names = ("1.png", "4.png", "../images/2.png", str(tmp_path / "images/2.png"))
    listing = listed(tmp_path, annotation(0), annotation(9), names=names)
    assert [item.key for item in listing.items] == ["images/1.png"]
    where = f"{tmp_path}/annotations.json"
    assert [key for key, _ in listing.rejects] == [f"annotations-{n}" for n in (1, 2, 3)]
    assert listing.rejects[0][1] == f"{where}: images[1]: '4.png' is not below {tmp_path}"
    assert listing.dropped == {"image in no JSON file": 2}
    assert "2 images are in no JSON file, such as images/2.png" in listing.notes
    assert f"1 annotations are of no image, such as annotations[1] of {where}" in listing.notes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"annotations\.json: no JSON: "),
        ("{", r"annotations\.json: no JSON: "),
        ("[" * 100_000, r"annotations\.json: no JSON: nested too deep"),
        ("[]", "no list of objects under the key 'images'"),
        ('{"images": [], "annotations": []}', "no list of objects under the key 'categories'"),
        ('{"images": [3], "annotations": [], "categories": []}', "under the key 'images'"),
        ('{"images": [{}], "annotations": [], "categories": []}', "an id, name or image_id: "),
        ('{"images": [], "annotations": [{}], "categories": []}', "an id, name or image_id: "),
        ('{"images": [], "annotations": [], "categories": [{"id": 1}]}', "an id, name or"),
        (
            '{"images": [{"id": 1}, {"id": 1}], "annotations": [], "categories": []}',
            "two images have one id",
        ),
    ],
)
def test_a_file_that_is_none_of_coco_is_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "annotations.json").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        coco.list_items(settings(tmp_path))
    assert "\n" not in str(caught.value)


def test_folders_without_a_file_and_categories_of_one_mask(tmp_path):
    (tmp_path / "captions_train.json").write_text("{}")
    with pytest.raises(UserError, match=r"no annotations\*\.json or instances\*\.json in it"):
        coco.list_items(settings(tmp_path))
    with pytest.raises(UserError, match=r"no folder: .*gone does not exist"):
        coco.list_items(settings(tmp_path / "gone"))
    twins = [{"id": 3, "name": "left-lung"}, {"id": 7, "name": "Left Lung"}]
    both = [annotation(0, segmentation=[SQUARE], category=number) for number in (3, 7)]
    with pytest.raises(UserError, match="'left-lung' and 'Left Lung' are both mask_left_lung"):
        listed(tmp_path, *both, categories=twins)


def test_a_whole_set_is_stored(tmp_path, capsys):
    listed(tmp_path / "in", annotation(0, segmentation=[SQUARE]), annotation(1, (90, 90, 5, 5)))
    out = ingestion.ingest(settings(tmp_path / "in"), tmp_path / "out")
    said = capsys.readouterr().err
    assert "Lung Opacity 2 (train" in said
    assert "1 rejected" in said
    info = shards.describe(out)
    (split,) = (name for name, part in info["splits"].items() if part["records"])
    record = shards.open_split(out, split)[0]
    assert record["key"] == "images/1.png"
    assert record["mask_lung_opacity"].sum() // 255 == 48
    assert "has no area inside" in (out / "rejects.csv").read_text()
