"""Sources: what they list, what they reject and why, and the records made from them."""

import csv
import dataclasses
import gc
import gzip
import io
import pickle

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from medsyn_jax.core.errors import LeftOutRecord, RejectedRecord, UserError
from medsyn_jax.data.sources import mimic_cxr, plan, records
from medsyn_jax.data.store.items import Item, Listing, Runs
from medsyn_jax.phantom import study as phantom

IMAGE = np.arange(64 * 48, dtype=np.uint32).reshape(64, 48) // 12
IMAGE = IMAGE.astype(np.uint8)


def settings(source: str, path="", **fields) -> ConfigDict:
    config = ConfigDict(
        {
            "source": source,
            "path": str(path),
            "size": 32,
            "sections": ("findings", "impression"),
            "min_tokens": 3,
            "frontal_only": True,
            "bits": 0,
            "display": "window",
            "square": "pad",
            "inverted": False,
            "seed": 5,
            "phantom": {"subjects": 3, "studies_per_subject": 2},
            "pairs": {
                "image": "image",
                "report": "report",
                "findings": "",
                "impression": "",
                "subject": "",
                "split": "",
                "labels": ("",),
                "view": "",
            },
            "mimic_cxr": {"reports": ""},
            "folder": {"subject": ""},
        }
    )
    config.update_from_flattened_dict(fields)
    return config


def listing(config: ConfigDict) -> Listing:
    return plan.SOURCES[config.source].list_items(config)


def make(item: Item, config: ConfigDict) -> dict:
    return plan.SOURCES[config.source].make(item, config)


def decoded(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        assert image.mode == "L"
        return np.asarray(image)


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(IMAGE).save(path)
    return path


# ---- phantom


def test_phantom_records_follow_the_schema():
    config = settings("phantom")
    found = listing(config)
    assert len(found.items) == 6
    assert len({item.key for item in found.items}) == 6
    assert len({item.subject for item in found.items}) == 3
    assert found.label_names == tuple(phantom.LABELS)
    item = found.items[3]
    made = phantom.study(5, 1, 1, 32)
    record = make(item, config)
    assert (record["key"], record["subject"]) == (item.key, item.subject)
    assert (item.key, item.subject) == ("p5/s000001/1", "p5s000001")
    assert np.array_equal(decoded(record["image"]), made.image)
    assert np.array_equal(decoded(record["mask_lungs"]), np.where(made.masks["lungs"], 255, 0))
    assert {"mask_pneumothorax", "mask_effusion", "boxes"} <= record.keys()
    assert record["labels"].dtype == np.int8
    assert record["labels"].tolist() == [made.labels[name] for name in phantom.LABELS]
    assert record["report"] == made.report
    assert record["findings"] or record["impression"]
    assert record["view"] == made.view
    assert "FINDINGS" not in record["findings"] + record["impression"]


def test_phantom_boxes():
    config = settings("phantom", **{"phantom.subjects": 40})
    boxes = [box for item in listing(config).items for box in make(item, config)["boxes"]]
    assert boxes
    for box in boxes:
        assert box["bbox"].dtype == np.float32
        assert box["bbox"].shape == (4,)
        assert isinstance(box["label"], str)


def test_items_travel_to_other_processes():
    config = settings("phantom")
    item = listing(config).items[0]
    again, config_again = pickle.loads(pickle.dumps((item, config)))
    assert again == item
    assert make(again, config_again)["image"] == make(item, config)["image"]


# ---- masks as run-lengths


def test_run_lengths_go_down_the_columns(tmp_path):
    config = settings("folder", size=8)
    path = tmp_path / "image.png"
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(path)
    runs = Runs(8, 8, (8, 3, 53))  # the upper three pixels of the second column
    item = Item(
        "1", "1", None, str(path), masks=(("mask_lesion", runs), ("mask_no", Runs(8, 8, (64,))))
    )
    record = make(item, config)
    expected = np.zeros((8, 8), np.uint8)
    expected[:3, 1] = 255
    assert np.array_equal(decoded(record["mask_lesion"]), expected)
    assert not decoded(record["mask_no"]).any()


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (Runs(8, 8, (8, 60)), "leave or do not fill the image of 8 x 8"),
        (Runs(8, 8, (70, -6)), "leave or do not fill"),
        (Runs(4, 16, (64,)), "has 8 x 8 pixels, .* those of 16 x 4"),
    ],
)
def test_run_lengths_that_do_not_fit_their_image_are_rejected(tmp_path, runs, message):
    path = tmp_path / "image.png"
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(path)
    item = Item("1", "1", None, str(path), masks=(("mask_lesion", runs),))
    with pytest.raises(RejectedRecord, match=message):
        make(item, settings("folder", size=8))


# ---- pairs


REPORT = "FINDINGS: The lungs are clear.\nIMPRESSION: No acute process."


def table(path, lines: list[list[str]]):
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(lines)
    return path


def test_pairs_with_every_column(tmp_path):
    path = table(
        tmp_path / "pairs.csv",
        [
            ["file", "text", "patient", "part", "orientation", "Edema", "Mass", "extra"],
            ["images/a b.png", REPORT, "7", "val", "AP Supine", "1.0", "", "x"],
            ["./images/ä.png", REPORT, "8", "train", "pa", "-1", "0", "x"],
            ["images/c.png", REPORT, "8", "train", "Lateral", "0", "0", "x"],
        ],
    )
    picture(tmp_path / "images" / "a b.png")
    columns = {
        "image": "file",
        "report": "text",
        "subject": "patient",
        "split": "part",
        "view": "orientation",
        "labels": ("Edema", "Mass"),
    }
    config = settings("pairs", path)
    config.pairs.update(columns)
    found = listing(config)
    assert found.label_names == ("Edema", "Mass")
    assert found.rejects == []
    assert found.dropped == {"not a frontal view": 1}
    first, second = found.items
    assert (first.key, second.key) == ("images/a%20b.png", "images/%C3%A4.png")
    assert (first.subject, first.split, first.view) == ("7", "val", "AP")
    assert (first.labels, second.labels) == ((1, -2), (-1, 0))
    assert second.view == "PA"
    record = make(first, config)
    assert set(record) == {
        *("key", "subject", "image", "report", "findings", "impression", "labels", "view")
    }
    assert record["report"] == REPORT
    assert record["findings"] == "The lungs are clear."
    assert record["impression"] == "No acute process."
    image = decoded(record["image"])
    assert image.shape == (32, 32)
    assert image[:, :4].max() == 0  # 64 x 48 padded to a square
    assert image[:, 5].max() > 100
    config.frontal_only = False
    assert [item.view for item in listing(config).items] == ["AP", "PA", ""]


def test_pairs_with_the_two_needed_columns(tmp_path):
    path = table(tmp_path / "pairs.csv", [["report", "image"], [REPORT, "a.png"]])
    picture(tmp_path / "a.png")
    config = settings("pairs", path)
    (item,) = listing(config).items
    assert item.subject == item.key == "a.png"
    assert item.split is None
    assert make(item, config)["labels"].shape == (0,)


def test_inverted_source(tmp_path):
    path = table(tmp_path / "pairs.csv", [["report", "image"], [REPORT, "a.png"]])
    picture(tmp_path / "a.png")
    config = settings("pairs", path)
    (item,) = listing(config).items
    plain = decoded(make(item, config)["image"])
    config.inverted = True
    inverted = decoded(make(item, config)["image"])
    inside = plain.max(0) > 0
    assert np.abs(inverted[:, inside] + plain[:, inside].astype(int) - 255).max() <= 1
    assert inverted[:, ~inside].max() == 0  # the padding stays black


def test_how_images_become_square(tmp_path):
    path = table(tmp_path / "pairs.csv", [["report", "image"], [REPORT, "a.png"]])
    picture(tmp_path / "a.png")  # 64 x 48
    config = settings("pairs", path)
    (item,) = listing(config).items
    sides = {}
    for config.square in ("pad", "edge", "crop", "stretch"):
        made = decoded(make(item, config)["image"])
        assert made.shape == (32, 32)
        sides[config.square] = made
    assert sides["pad"][:, :4].max() == 0
    assert np.array_equal(sides["edge"][:, 4:28], sides["pad"][:, 4:28])
    assert np.array_equal(sides["edge"][:, 0], sides["pad"][:, 4])
    top, bottom = IMAGE[8:56].mean(1)[[0, -1]]  # of the rows that are kept
    assert abs(sides["crop"][0].mean() - top) < 3
    assert abs(sides["crop"][-1].mean() - bottom) < 3
    assert abs(sides["stretch"][0].mean() - IMAGE[0].mean()) < 3
    assert abs(sides["stretch"][-1].mean() - IMAGE[-1].mean()) < 3


def test_pairs_in_other_wrappings(tmp_path):
    text = "image,report\na.png,Clear lungs seen.\n"
    (tmp_path / "bom.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "packed.csv.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "tabs.tsv").write_text(text.replace(",", "\t"))
    for name in ("bom.csv", "packed.csv.gz", "tabs.tsv"):
        (item,) = listing(settings("pairs", tmp_path / name)).items
        assert (item.key, item.report) == ("a.png", "Clear lungs seen.")
    long = "word " * 100_000  # beyond the csv module's default limit of a field
    path = table(tmp_path / "long.csv", [["image", "report"], ["a.png", long]])
    assert len(listing(settings("pairs", path)).items) == 1


def test_pairs_rejects_rows_by_number(tmp_path):
    path = table(
        tmp_path / "pairs.csv",
        [
            ["image", "report", "who", "Edema"],
            ["a.png", "One\nreport of\nthree lines.", "1", "1"],
            ["b.png", "  ", "1", "1"],
            ["", REPORT, "1", "1"],
            [],
            ["./a.png", REPORT, "1", "1"],
            ["c.png", REPORT, "1"],
            ["d.png", REPORT, "", "1"],
            ["e.png", REPORT, "1", "maybe"],
            ["f.png", REPORT, "1", "0"],
        ],
    )
    content = path.read_bytes() + b"g.png,Temperature 38\xb0C today,1,1\r\n"
    path.write_bytes(content)
    config = settings("pairs", path, **{"pairs.subject": "who", "pairs.labels": ("Edema",)})
    found = listing(config)
    assert [item.key for item in found.items] == ["a.png", "f.png"]
    assert found.rejects == [
        (key, f"{path}: row {number}: {reason}")
        for key, number, reason in [
            ("row-3", 3, "column 'report' is empty"),
            ("row-4", 4, "column 'image' is empty"),
            ("a.png", 6, "image a.png is already in row 2"),
            ("row-7", 7, "has 3 fields where the head line has 4"),
            ("row-8", 8, "column 'who' is empty"),
            ("row-9", 9, "column 'Edema': 'maybe' is not 1, 0, -1 or empty"),
            ("row-11", 11, "column 'report' is not UTF-8 text"),
        ]
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no table: {path} does not exist: check the path"),
        (b"", "empty table: {path}: expected a head line of column names"),
        (
            b"image,text\n",
            "missing column: {path}: no column 'report' among: image, text: "
            "set --config.ingest.pairs.report, to nothing where there is none",
        ),
        (b"image,report,image\n", "ambiguous table: {path}: column 'image' occurs twice"),
        (b"im\xe4ge,report\n", "not a UTF-8 table: {path}: line 1: save it as CSV in UTF-8"),
        (
            "image,report\n".encode("utf-16"),
            "not a UTF-8 table: {path}: line 1: save it as CSV in UTF-8",
        ),
        (
            b'image,report\na.png,fine text here\nb.png,"never closed\n',
            "broken table: {path}: row 3, line 3: unexpected end of data: mend the quotes",
        ),
    ],
)
def test_pairs_tables_that_cannot_be_used(tmp_path, content, message):
    path = tmp_path / "pairs.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        listing(settings("pairs", path))
    assert str(caught.value) == message.format(path=path)
    files = [thing for thing in gc.get_objects() if type(thing) is io.FileIO]
    assert not [file for file in files if str(file.name) == str(path) and not file.closed]


def test_pairs_unreadable_archive_and_folder(tmp_path):
    path = tmp_path / "pairs.csv.gz"
    path.write_bytes(gzip.compress(b"image,report\n" * 1000)[:-20])
    with pytest.raises(UserError, match=f"unreadable table: {path}: "):
        listing(settings("pairs", path))
    with pytest.raises(UserError, match=f"unreadable table: {tmp_path}: "):
        listing(settings("pairs", tmp_path))


@pytest.mark.parametrize(
    ("report", "reason"),
    [
        ("No effusion.", "a.png: the report has too few words in findings, impression: 2 words"),
        ("FINDINGS: ___\nIMPRESSION: Normal.", "too few words in findings, impression: 1 words"),
        ("INDICATION: Cough for three weeks.", "too few words in findings, impression: 0 words"),
    ],
)
def test_short_reports_are_rejected(tmp_path, report, reason):
    path = table(tmp_path / "pairs.csv", [["image", "report"], ["a.png", report]])
    picture(tmp_path / "a.png")
    config = settings("pairs", path)
    (item,) = listing(config).items
    with pytest.raises(RejectedRecord, match=reason):
        make(item, config)
    config.min_tokens = 0
    assert make(item, config)["report"] == report


def test_bad_images_are_rejected_by_name(tmp_path):
    names = ["none.png", "empty.png", "cut.png", "text.png"]
    lines = [["image", "report"], *([name, REPORT] for name in names)]
    config = settings("pairs", table(tmp_path / "pairs.csv", lines))
    (tmp_path / "empty.png").touch()
    whole = picture(tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("hello")
    for item in listing(config).items:
        with pytest.raises(RejectedRecord, match=f"{tmp_path}/{item.key}: "):
            make(item, config)


def test_sections_in_columns_of_their_own(tmp_path):
    """Open-i and ReXGradient: no report column, and either section may be empty."""
    path = table(
        tmp_path / "pairs.csv",
        [
            ["image", "findings", "impression"],
            ["a.png", "The lungs are clear. SUMMARY: none.", "No acute process."],
            ["b.png", "", " 1. No acute process today.\n"],
            ["c.png", "The heart is large.", ""],
            ["d.png", "", ""],
        ],
    )
    config = settings("pairs", path)
    config.pairs.update({"findings": "findings", "impression": "impression"})
    for name in "abcd":
        picture(tmp_path / f"{name}.png")
    found = listing(config)
    assert found.rejects == []
    assert any("no column 'report'" in note for note in found.notes)
    made = [make(item, config) for item in found.items[:3]]
    assert [(r["findings"], r["impression"]) for r in made] == [
        ("The lungs are clear. SUMMARY: none.", "No acute process."),
        ("", "No acute process today."),
        ("The heart is large.", ""),
    ]
    assert made[1]["report"] == "IMPRESSION: 1. No acute process today."
    assert made[2]["report"] == "FINDINGS: The heart is large."
    with pytest.raises(LeftOutRecord, match="too few words in findings, impression: 0 words"):
        make(found.items[3], config)


def test_sections_beside_a_report_column(tmp_path):
    """CheXpert Plus: the whole report is stored as it came, the columns are its sections."""
    path = table(
        tmp_path / "pairs.csv",
        [
            ["image", "report", "section_findings", "section_impression"],
            ["a.png", f"{REPORT}\nSUMMARY: 2-ABNORMAL, REPORTED", "", "Effusion on the left."],
            ["b.png", "", "", "Effusion on the right."],
        ],
    )
    config = settings("pairs", path)
    config.pairs.update({"findings": "section_findings", "impression": "section_impression"})
    picture(tmp_path / "a.png"), picture(tmp_path / "b.png")
    first, second = (make(item, config) for item in listing(config).items)
    assert first["report"].startswith(REPORT)
    assert (first["findings"], first["impression"]) == ("", "Effusion on the left.")
    assert second["report"] == "IMPRESSION: Effusion on the right."
    config.pairs.findings = ""  # then the report has the say
    first, second = (make(item, config) for item in listing(config).items)
    assert (first["findings"], first["impression"]) == (
        "The lungs are clear.",
        "Effusion on the left.",
    )
    config.pairs.impression = "section_impresion"
    with pytest.raises(UserError, match="no column 'section_impresion' among: image, report, "):
        listing(config)


@pytest.mark.parametrize("empty", ["nan", "None", "N/A", "<NA>", "NULL", "None.", "n/a."])
def test_cells_of_nothing_and_own_heads_in_columns_of_sections(tmp_path, empty):
    lines = [["image", "findings", "impression", "report", "odd"]]
    lines += [["a.png", empty, "Conclusion: No acute process.", "", "nan"]]
    lines += [["b.png", "FINDINGS:\nThe lungs are clear.", empty, empty.strip("."), "1"]]
    lines += [["c.png", empty, empty, REPORT, "0"]]
    config = settings("pairs", table(tmp_path / "pairs.csv", lines))
    config.pairs.update({"findings": "findings", "impression": "impression"})
    config.pairs.labels = ("odd", "odd")
    found = listing(config)
    assert [item.labels for item in found.items] == [(-2,), (1,), (0,)]
    for name in "abc":
        picture(tmp_path / f"{name}.png")
    made = [make(item, config) for item in found.items]
    assert [(r["findings"], r["impression"]) for r in made] == [
        ("", "No acute process."),
        ("The lungs are clear.", ""),
        ("The lungs are clear.", "No acute process."),
    ]
    assert made[0]["report"] == "IMPRESSION: No acute process."
    assert made[2]["report"] == REPORT


@pytest.mark.parametrize(
    ("wording", "view"),
    [
        *(
            (text, "PA")
            for text in ("PA", "PA_erect", "postero-anterior", "POSTEROANTERIOR", "p-a")
        ),
        *(
            (text, "AP")
            for text in ("AP_horizontal", "ap supine", "Anterior-Posterior", "AP AXIAL")
        ),
        *((text, "") for text in ("", "nan", "Frontal", "front", "F", "Portable", "unknown", "0")),
        *((text, None) for text in ("L", "COSTAL", "EXCLUDE", "LLD", "RAO", "OBLIQUE", "SWIMMERS")),
        *((text, None) for text in ("Left lateral", "Portable lateral", "APPENDIX", "lordotic")),
    ],
)
def test_views_that_are_named_and_not_frontal_are_left_out(tmp_path, wording, view):
    lines = [["image", "report", "view"], ["a.png", REPORT, wording], ["b.png", REPORT, "PA"]]
    config = settings("pairs", table(tmp_path / "pairs.csv", lines), **{"pairs.view": "view"})
    found = listing(config)
    assert [item.view for item in found.items] == ["PA"] if view is None else [view, "PA"]
    said = f"not frontal by column 'view', and so left out: {wording} 1"
    assert (said in found.notes) == (view is None)
    assert found.dropped == ({"not a frontal view": 1} if view is None else {})


def test_labels_without_reports_have_no_fewest_words(tmp_path):
    path = table(tmp_path / "labels.csv", [["image", "Edema"], ["a.png", "1"], ["b.png", "0"]])
    picture(tmp_path / "a.png"), picture(tmp_path / "b.png")
    config = settings("pairs", path, **{"pairs.report": "", "pairs.labels": ("Edema",)})
    made = [make(item, config) for item in listing(config).items]
    assert [record["labels"].tolist() for record in made] == [[1], [0]]
    assert [record["report"] for record in made] == ["", ""]


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ({"Patient ID": "pqpq"}, "'Patient ID' (2 values)"),
        ({"uid": "1122", "fluid": "1010", "study_id": "aabb"}, "'uid' (2 values), 'study_id' (2"),
        ({"imageID": "1122", "subject": "xyyz"}, "'subject' (3 values), 'imageID' (2 values)"),
        ({"patient": "abcd"}, None),  # every image another patient: no reason to ask
        ({"patient": "aaaa", "valid": "0011"}, None),
    ],
)
def test_a_source_without_a_subject_column_says_so(tmp_path, columns, named):
    lines = [["image", "report", *columns]]
    lines += [[f"{n}.png", REPORT, *(v[n] for v in columns.values())] for n in range(4)]
    config = settings("pairs", table(tmp_path / "pairs.csv", lines))
    (note,) = listing(config).notes
    assert note.startswith("no subject column is named, so every image is a subject of its own")
    assert "ingest.pairs.subject" in note
    assert ("columns that look like subjects" in note) == (named is not None)
    assert (named or "") in note
    config.pairs.subject = next(iter(columns))
    assert listing(config).notes == []


def test_long_and_odd_cells_are_quoted_in_short(tmp_path):
    path = table(
        tmp_path / "pairs.csv",
        [
            ["image", "report", "Edema"],
            ["a.png", REPORT, "very much\n" * 1000],
            ["b\0.png", REPORT, "1"],
            ["c" * 3000 + ".png", REPORT, "1"],
            ["c" * 3000 + ".png", REPORT, "1"],
        ],
    )
    found = listing(settings("pairs", path, **{"pairs.labels": ("Edema",)}))
    reasons = [reason.removeprefix(str(path)) for _, reason in found.rejects]
    assert reasons[1] == ": row 3: column 'image' holds a NUL character, so it is no path"
    assert max(map(len, reasons)) < 200
    assert not any("\n" in reason for reason in reasons)
    (item,) = found.items  # too long a name is a reject of its own
    with pytest.raises(RejectedRecord) as caught:
        make(item, settings("pairs", path))
    assert len(str(caught.value)) <= 1000
    with pytest.raises(UserError) as caught:
        listing(settings("pairs", path, **{"pairs.labels": ("Oedema" * 1000,)}))
    assert len(str(caught.value)) <= 1000


def test_damaged_archives_are_unreadable_or_read_whole(tmp_path):
    lines = "".join(f"{n}.png,Report number {n} of the set.\n" for n in range(50))
    packed_bytes = gzip.compress(f"image,report\n{lines}".encode(), mtime=0)
    path = tmp_path / "pairs.csv.gz"
    told = []
    for place in range(len(packed_bytes)):
        damaged = bytearray(packed_bytes)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:  # some bytes of the head, as the date, matter to nobody
            assert len(listing(settings("pairs", path)).items) == 50
        except UserError as error:
            told.append(str(error))
    assert len(told) > 0.9 * len(packed_bytes)
    assert sum(line.startswith(f"unreadable table: {path}: ") for line in told) > 0.5 * len(told)
    assert not any("\n" in line for line in told)
    for length in range(0, len(packed_bytes), 7):
        path.write_bytes(packed_bytes[:length])
        with pytest.raises(UserError, match=r"unreadable table|empty table"):
            listing(settings("pairs", path))


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": -1},
        {"seed": 2**64},
        {"size": 3},
        {"size": 31},
        {"size": 1025},
        {"phantom.subjects": 0},
        {"phantom.studies_per_subject": -1},
    ],
)
def test_a_phantom_that_cannot_be(fields):
    with pytest.raises(UserError, match=r"ingest.*: (?:the phantom needs|give at least 1)"):
        listing(settings("phantom", **{"size": 32, **fields}))


def test_real_pairs(shared_data):
    path = shared_data / "covid_pairs" / "pairs.csv"
    config = settings("pairs", path, **{"pairs.subject": "patient", "pairs.view": "view"})
    found = listing(config)
    assert len(found.items) == 215
    assert len({item.subject for item in found.items}) == 128
    assert {item.view for item in found.items} == {"PA", "AP"}
    assert found.rejects == []
    for item in found.items[::20]:
        record = make(item, config)
        assert decoded(record["image"]).shape == (32, 32)


# ---- MIMIC-CXR-JPG


def packed(path, text: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()))


@pytest.fixture
def mimic(tmp_path):
    packed(
        tmp_path / "mimic-cxr-2.0.0-metadata.csv.gz",
        "dicom_id,subject_id,study_id,ViewPosition,Rows\n"
        "d1,10000032,50414267,PA,64\n"
        "d2,10000032,50414267,LATERAL,64\n"
        "d3,10000032,53189527,AP,64\n"
        "d4,11000011,56699142,AP,64\n"
        "d5,11000011,56699142,AP AXIAL,64\n"
        "d6,12000012,57000000,,64\n"
        "d7,12000012,57000000,AP,64\n"
        "d4,11000011,56699142,AP,64\n",
    )
    packed(
        tmp_path / "mimic-cxr-2.0.0-split.csv.gz",
        "dicom_id,study_id,subject_id,split\n"
        "d1,50414267,10000032,train\nd2,50414267,10000032,train\nd3,53189527,10000032,train\n"
        "d4,56699142,11000011,validate\nd5,56699142,11000011,validate\nd6,57000000,12000012,test\n",
    )
    values = ["1.0", "0.0", "-1.0", *[""] * 11]
    packed(
        tmp_path / "mimic-cxr-2.0.0-chexpert.csv.gz",
        f"subject_id,study_id,{','.join(mimic_cxr.LABELS)}\n10000032,50414267,{','.join(values)}\n",
    )
    for study in ("p10/p10000032/s50414267", "p11/p11000011/s56699142"):
        report = tmp_path / "files" / f"{study}.txt"
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(f" FINAL REPORT\n {REPORT}\n")
    picture(tmp_path / "files" / "p10/p10000032/s50414267/d1.jpg")
    return tmp_path


def test_mimic_listing(mimic):
    config = settings("mimic_cxr", mimic)
    found = listing(config)
    assert [item.key for item in found.items] == [
        "p10/p10000032/s50414267/d1",
        "p10/p10000032/s53189527/d3",
        "p11/p11000011/s56699142/d4",
    ]
    assert [item.split for item in found.items] == ["train", "train", "valid"]
    assert [item.view for item in found.items] == ["PA", "AP", "AP"]
    assert found.items[0].subject == "10000032"
    assert found.label_names == mimic_cxr.LABELS
    assert found.items[0].labels == (1, 0, -1, *[-2] * 11)
    assert found.items[1].labels == (-2,) * 14  # no row in the label table
    assert found.dropped == {"not a frontal view": 3}
    where = f"{mimic}/mimic-cxr-2.0.0-metadata.csv.gz: row"
    assert found.rejects == [
        ("row-8", f"{where} 8: dicom_id d7 is not in the split table"),
        ("row-9", f"{where} 9: dicom_id d4 is listed twice"),
    ]
    config.frontal_only = False
    assert [item.view for item in listing(config).items] == ["PA", "", "AP", "AP", "", ""]


def test_mimic_examples(mimic):
    config = settings("mimic_cxr", mimic)
    first, second, third = listing(config).items
    record = make(first, config)
    assert record["findings"] == "The lungs are clear."
    assert record["report"].startswith(" FINAL REPORT")
    assert record["labels"].tolist() == [1, 0, -1, *[-2] * 11]
    report = mimic / "files/p10/p10000032/s53189527.txt"
    with pytest.raises(RejectedRecord, match=f"{report}: no such report"):
        make(second, config)
    report.write_bytes(b"IMPRESSION: 38\xb0C is too hot")
    with pytest.raises(RejectedRecord, match=f"{report}: the report is not UTF-8 at byte 14"):
        make(second, config)
    report.write_text("IMPRESSION: Normal.")
    with pytest.raises(RejectedRecord, match=f"{report}: the report has too few words"):
        make(second, config)
    with pytest.raises(RejectedRecord, match=r"s56699142/d4\.jpg: no such file"):
        make(third, config)


def test_mimic_reports_elsewhere(mimic):
    other = mimic / "texts"
    (other / "mimic-cxr-reports").mkdir(parents=True)
    for report in list((mimic / "files").rglob("*.txt")):
        target = other / "mimic-cxr-reports" / report.relative_to(mimic)
        target.parent.mkdir(parents=True, exist_ok=True)
        report.rename(target)
    with pytest.raises(UserError) as caught:
        listing(settings("mimic_cxr", mimic))
    first = f"{mimic}/files/p10/p10000032/s50414267.txt"
    assert str(caught.value).startswith(f"no report: mimic_cxr: looked for {first}, ")
    assert str(caught.value).endswith("set mimic_cxr.reports")
    config = settings("mimic_cxr", mimic, **{"mimic_cxr.reports": str(other)})
    assert make(listing(config).items[0], config)["impression"] == "No acute process."


@pytest.mark.parametrize("name", ["metadata", "split", "chexpert"])
def test_mimic_missing_tables_and_images(mimic, name):
    path = mimic / f"mimic-cxr-2.0.0-{name}.csv.gz"
    content = path.read_bytes()
    plain = mimic / f"mimic-cxr-2.0.0-{name}.csv"
    path.unlink()
    with pytest.raises(UserError, match=f"no table: {path} does not exist"):
        listing(settings("mimic_cxr", mimic))
    plain.write_bytes(gzip.decompress(content))
    assert len(listing(settings("mimic_cxr", mimic)).items) == 3
    plain.write_text("subject_id,study_id\n1,2\n")
    with pytest.raises(UserError, match=f"missing column: {plain}: no column '"):
        listing(settings("mimic_cxr", mimic))


def test_mimic_broken_rows_and_no_image(mimic):
    (mimic / "files/p10/p10000032/s50414267/d1.jpg").unlink()
    with pytest.raises(UserError, match=r"no image: mimic_cxr: looked for .*/d1\.jpg.*: set path"):
        listing(settings("mimic_cxr", mimic))
    packed(mimic / "mimic-cxr-2.0.0-split.csv.gz", "dicom_id,split\nd1,trane\n")
    with pytest.raises(UserError, match=r"split\.csv\.gz: row 2: expected train, validate or test"):
        listing(settings("mimic_cxr", mimic))
    packed(mimic / "mimic-cxr-2.0.0-split.csv.gz", "dicom_id,split\nd1,train\n")
    labels = mimic / "mimic-cxr-2.0.0-chexpert.csv.gz"
    packed(labels, f"study_id,{','.join(mimic_cxr.LABELS)}\n1,{'2,' * 13}2\n")
    with pytest.raises(UserError, match=r"chexpert\.csv\.gz: row 2: .*'2' is not 1, 0, -1"):
        listing(settings("mimic_cxr", mimic))


@pytest.mark.parametrize("row", ["1", "1,", f"1{',1' * 12},7", f"1{',1' * 15},7", ""])
def test_mimic_label_rows_of_another_length(mimic, row):
    """The study may stand in the last column."""
    labels = mimic / "mimic-cxr-2.0.0-chexpert.csv.gz"
    packed(labels, f"{','.join(mimic_cxr.LABELS)},study_id\n{'1,' * 14}50414267\n{row}\n")
    if not row:  # a blank line is none
        assert listing(settings("mimic_cxr", mimic)).items[0].labels == (1,) * 14
        return
    count = row.count(",") + 1
    with pytest.raises(UserError, match=rf"chexpert.csv.gz: row 3: has {count} fields where"):
        listing(settings("mimic_cxr", mimic))


# ---- class folders


def test_folder_with_splits(tmp_path):
    for name in ("train/B/p1_b.png", "train/A/p1_a.JPG", "val/A/x y.png", "test/C/deep/z.dcm"):
        made = tmp_path / name
        made.parent.mkdir(parents=True, exist_ok=True)
        picture(tmp_path / "some.png").replace(made)
    (tmp_path / "train/A/Thumbs.db").touch()
    (tmp_path / "train/A/.hidden.png").touch()
    picture(tmp_path / "train/loose.png")
    picture(tmp_path / "notes/A/w.png")
    config = settings("folder", tmp_path)
    found = listing(config)
    assert found.label_names == ("A", "B", "C")
    got = {item.key: (item.subject, item.split, item.labels) for item in found.items}
    assert got == {
        "train/A/p1_a.JPG": ("p1_a", "train", (1, 0, 0)),
        "train/B/p1_b.png": ("p1_b", "train", (0, 1, 0)),
        "val/A/x%20y.png": ("x y", "valid", (1, 0, 0)),
        "test/C/deep/z.dcm": ("z", "test", (0, 0, 1)),
    }
    assert found.dropped == {"outside a class folder": 2, "not a .jpg, .png or .dcm file": 2}
    record = make(found.items[0], config)
    assert record["report"] == record["findings"] == record["impression"] == record["view"] == ""
    assert record["labels"].dtype == np.int8


def test_folder_without_splits_and_with_a_subject_pattern(tmp_path):
    for name in ("A/p1_left.png", "A/p1_right.png", "B/p2_left.png", "B/odd.png"):
        picture(tmp_path / name)
    config = settings("folder", tmp_path, **{"folder.subject": r"(p\d+)_"})
    found = listing(config)
    assert [(item.subject, item.split) for item in found.items] == [
        ("p1", None),
        ("p1", None),
        ("p2", None),
    ]
    assert found.rejects == [
        ("B/odd.png", f"{tmp_path}/B/odd.png: folder.subject '(p\\\\d+)_' finds nothing")
    ]
    config.folder.subject = r"^(\w)/(p\d+)?"
    assert {item.subject for item in listing(config).items} == {"A-p1", "B-p2", "B"}


def test_the_subject_pattern_of_the_docs_takes_the_folder_of_a_patient(tmp_path):
    for name in ("train/A/p1/x.png", "train/B/p1/y.png", "test/A/p2/x.png"):
        picture(tmp_path / name)
    found = listing(settings("folder", tmp_path, **{"folder.subject": "/([^/]+)/[^/]+$"}))
    assert sorted(item.subject for item in found.items) == ["p1", "p1", "p2"]
    assert found.label_names == ("A", "B")


def test_folder_that_cannot_be_used(tmp_path):
    missing = tmp_path / "none"
    with pytest.raises(UserError, match=f"no folder: {missing} does not exist"):
        listing(settings("folder", missing))
    with pytest.raises(UserError, match=r"no folder: ingest\.path does not exist: set path"):
        listing(settings("folder", ""))
    picture(tmp_path / "loose.png")
    with pytest.raises(UserError, match=f"no images: {tmp_path}: expected "):
        listing(settings("folder", tmp_path))
    with pytest.raises(UserError, match=r"folder.subject: '\(p': .*regular expression"):
        listing(settings("folder", tmp_path, **{"folder.subject": "(p"}))


def test_real_folder(shared_data):
    # The ids of train and test may be different children: keep them apart by the split's name.
    pattern = r"^(\w+)/.*?(person\d+|IM-\d+)"
    config = settings("folder", shared_data / "kermany224", **{"folder.subject": pattern})
    found = listing(config)
    assert found.label_names == ("NORMAL", "PNEUMONIA")
    assert found.rejects == []
    assert len(found.items) == 5840
    counts = np.array([item.labels for item in found.items if item.split == "train"]).sum(0)
    assert counts.tolist() == [1341, 3875]
    subjects = [{i.subject for i in found.items if i.split == split} for split in ("train", "test")]
    assert not subjects[0] & subjects[1]
    assert decoded(make(found.items[0], config)["image"]).shape == (32, 32)


@pytest.mark.parametrize("square", ["pad", "edge", "crop", "stretch"])
@pytest.mark.parametrize("shape", [(128, 96), (60, 96)])
def test_boxes_move_with_the_pixels(tmp_path, square, shape):
    pixels = np.full(shape, 10, np.uint8)
    pixels[24:40, 30:60] = 250
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95)
    boxes = (("Nodule", 30, 24, 60, 40), ("Outside", 0, 0, 0.5, 0.5))
    item = Item("a", "a", None, str(tmp_path / "a.jpg"), boxes=boxes)
    config = settings("folder", square=square)
    record = records.make(item, config)
    rows, columns = np.nonzero(decoded(record["image"]) > 130)
    box = record["boxes"][0]
    assert box["label"] == "Nodule"
    assert box["bbox"].dtype == np.float32
    edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    np.testing.assert_allclose(box["bbox"], edges, atol=1)
    assert len(record["boxes"]) == (1 if square == "crop" else 2)
    bare = records.make(dataclasses.replace(item, boxes=()), config)
    assert bare["boxes"] == []
    assert "boxes" not in records.make(dataclasses.replace(item, boxes=None), config)


def test_a_box_ends_at_the_image_not_in_the_padding_beside_it(tmp_path):
    path = str(picture(tmp_path / "a.png"))  # 48 x 64, padded to 64 x 64, stored at 32 x 32
    item = Item("a", "a", None, path, boxes=(("Nodule", -9, -9, 90, 32),))
    boxes = records.make(item, settings("folder"))["boxes"]
    assert [box["bbox"].tolist() for box in boxes] == [[4, 0, 28, 16]]


@pytest.mark.parametrize("box", [(48, 0, 60, 9), (9, 9, 9, 20), (20, 9, 9, 20), (0, 0, np.nan, 9)])
def test_a_box_without_area_in_the_image_rejects_the_record(tmp_path, box):
    item = Item("a", "a", None, str(picture(tmp_path / "a.png")), boxes=(("Nodule", *box),))
    with pytest.raises(RejectedRecord, match=r"a.png: the box .* has no area inside of the image"):
        records.make(item, settings("folder"))
