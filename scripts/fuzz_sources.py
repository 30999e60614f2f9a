"""Malformed texts, tables and class folders for `scripts/fuzz.py`."""

import csv
import gzip
import io
import re
import string
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import tokenizers as hf
from ml_collections import ConfigDict
from PIL import Image

from configs import ingest as ingest_configs
from medsyn_jax.core.errors import RejectedRecord
from medsyn_jax.data.sources import mimic_cxr, plan, prompts
from medsyn_jax.data.text import reports
from medsyn_jax.data.text.tokenizers import Tokenizer
from scripts.fuzz_inputs import bent_bytes, bent_text, check

_CACHE: dict[str, Any] = {}

# --- texts --------------------------------------------------------------------------------------

HEADS = [
    "FINDINGS",
    "IMPRESSION",
    "INDICATION",
    "COMPARISON",
    "TECHNIQUE",
    "EXAMINATION",
    "HISTORY",
    "WET READ",
    "SUMMARY",
    "FINAL REPORT",
    "ADDENDUM",
    "NOTE",
    "COMMENT",
    "HOSPITAL COURSE",
    "RESULT",
    "LUNGS",
    "HEART",
    "REASON FOR EXAM",
    "CHEST PA AND LATERAL",
    "RECOMMENDATION",
    "NOTIFICATION",
    "DICTATED BY",
    "READ BY",
    "END OF IMPRESSION",
    "DIAGNOSIS",
    "COMMUNICATION OF CRITICAL FINDINGS",
    "ACCESSION NUMBER",
    "FINDINGS AND IMPRESSION",
    "XYZ",
    "Q",
]
BODIES = (
    "The lungs are clear.",
    "No pneumothorax or pleural effusion, no edema.",
    "Heart size is normal; 2.5 cm nodule (new) vs. ___.",
    "1. Small effusion. 2. Cardiomegaly.\n3. No fracture",
    "- ET tube 3 cm above the carina\n- NG tube",
    "as compared to ___, Dr. [**Last Name**] was told at 5:47 p.m.",
    "Supine film",
    "Portable AP view of the chest dated ___",
    "",
)


def report(rng: Random) -> str:
    """A report with heads of many kinds or none; sometimes far from a report."""
    parts = []
    for _ in range(rng.choice((0, 1, 2, 3, 5, 9))):
        head = rng.choice(HEADS)
        if rng.random() < 0.1:
            head = "".join(rng.choices(string.ascii_uppercase + " /-()", k=rng.randint(1, 30)))
        head = rng.choice((head, head, head.title(), head.lower()))
        head += rng.choice((":", ":", ": ", " :", " - ", ".", "", "\n", " (ADDENDUM):"))
        body = " ".join(rng.choices(BODIES, k=rng.choice((0, 1, 2, 6))))
        parts.append(f"{rng.choice((head, head, head, ''))}{rng.choice((' ', chr(10)))}{body}")
    text = rng.choice(("\n", "\n\n", " ", "\r\n", "\n \n ", "_" * 20)).join(parts)
    if rng.random() < 0.5:
        text = bent_text(rng, text)
    if rng.random() < 0.01 and text:
        size = rng.choice((10_000, 100_000))
        text = (text * (size // len(text) + 1))[:size]
    return text


_UNWANTED = re.compile(r"__|\[\*\*.*?\*\*\]|[\x00-\x1f\x7f-\x9f\ud800-\udfff\u200b-\u200f]|  ")


def _check_clean(text: str, what: str) -> None:
    check(text == text.strip() and not _UNWANTED.search(text), f"{what} is not clean", text)


def text_case(rng: Random, folder: Path) -> None:
    text = report(rng)
    sections = reports.sections(text)
    check(set(sections) <= {*reports.SECTION_NAMES}, "sections of unknown names", list(sections))
    check(all(sections.values()), "empty sections", sections)
    clean = reports.clean(text)
    _check_clean(clean, "clean")
    sentences = reports.sentences(text)
    for sentence in sentences:
        _check_clean(sentence, "a sentence")
    words = re.findall(r"\w+", clean)
    check(re.findall(r"\w+", " ".join(sentences)) == words, "sentences lose words", text)
    main = (reports.clean(sections.get(name, "")) for name in ("findings", "impression"))
    wanted = rng.sample((*reports.SECTION_NAMES, "report"), rng.choice((0, 1, 2, 3)))
    _check_clean(reports.select_text(*main, text, tuple(wanted)), "select_text")
    items = [prompts.Prompt(str(i), "s", "train", t) for i, t in enumerate((text, "The heart."))]
    length = rng.choice((1, 3, 8, 77))
    fitted = prompts.fit(prompts.Prompts(items, (), []), _words(), length)
    check(len(fitted.items) + len(fitted.rejects) == 2, "prompts are lost", text)
    for item in fitted.items:
        _check_clean(item.text, "a prompt")
        check(len(_words().backend.encode(item.text)) <= max(length, 3), "a prompt is too long")


def _words() -> Tokenizer:
    """A tokenizer with one token for each word and sign, between two [CLS]."""
    if not (tokenizer := _CACHE.get("words")):
        backend = hf.Tokenizer(hf.models.WordLevel({"[UNK]": 0, "[CLS]": 1}, unk_token="[UNK]"))
        backend.pre_tokenizer = hf.pre_tokenizers.BertPreTokenizer()
        ends = [("[CLS]", 1)]
        backend.post_processor = hf.processors.TemplateProcessing("[CLS] $0 [CLS]", None, ends)
        tokenizer = _CACHE["words"] = Tokenizer(backend, 0, "[UNK]", Path())
    return tokenizer


def nothing(folder: Path) -> None:
    pass


# --- tables and class folders -------------------------------------------------------------------

CELLS = ("", " ", "1", "0", "-1", "1.0", "nan", "x", "a\0b", "a\nb", "../b.png", "/", ".", "\udcff")
CELLS += (
    "é",
    "[red]x",
    "y" * 3000,
    "\x1b[1m",
    "train",
    "valid",
    "test",
    "VAL",
    "dev",
    "AP",
    "LATERAL",
)
_COLUMNS = ("image", "report", "subject", "split", "view", "odd", "sick")


def tables_prepare(folder: Path) -> None:
    _CACHE["tables"] = folder
    study = folder / "files" / "p10" / "p10000001" / "s50000001"
    study.mkdir(parents=True)
    (folder / "img").mkdir()
    for i in range(4):
        pixels = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) + np.uint8(i))
        pixels.save(folder / "img" / f"{i}.png")
        pixels.save(study / f"d{i}.jpg")
    study.with_suffix(".txt").write_text("FINDINGS: The lungs are clear.")


def write_table(rng: Random, path: Path, table: list[list[str]]) -> int:
    """Write rows, some of them malformed; return the number of data rows that csv reads back."""
    text, gz = io.StringIO(), path.suffix == ".gz"
    tabs = ".tsv" in path.name
    quoting = rng.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
    ends = rng.choice(("\n", "\r\n"))
    csv.writer(
        text, "excel-tab" if tabs else "excel", quoting=quoting, lineterminator=ends
    ).writerows(
        row if rng.random() < 0.97 else row[: rng.randint(0, len(row))] + rng.choices(CELLS, k=2)
        for row in table
    )
    data = rng.choice((b"", b"\xef\xbb\xbf")) + text.getvalue().encode("utf-8", "surrogateescape")
    if rng.random() < 0.2:
        data = bent_bytes(rng, data)
    packed = gzip.compress(data) if gz else data
    path.write_bytes(bent_bytes(rng, packed) if gz and rng.random() < 0.2 else packed)
    lines = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    try:
        reader = io.StringIO(lines, newline="\n")  # str.splitlines also breaks at other characters
        read = csv.reader(reader, "excel-tab" if tabs else "excel", strict=True)
        return sum(1 for row in read if row) - 1
    except csv.Error:
        return -1


def table_case(rng: Random, folder: Path) -> None:
    rng.choice((_pairs_case, _pairs_case, _prompts_case, _mimic_case, _folder_case))(rng, folder)


def _rows(rng: Random, sound: Callable[[int], list[str]]) -> list[list[str]]:
    share = rng.choice((0, 0.02, 0.3))
    bent = lambda cell: rng.choice(CELLS) if rng.random() < share else cell  # noqa: E731
    return [[bent(cell) for cell in sound(i)] for i in range(rng.choice((0, 1, 4, 12)))]


def _pair(i: int) -> list[str]:
    image = f"img/{i % 5}{i if i > 4 else ''}.png"
    split = ("train", "valid", "test")[i % 3]
    return [image, "Clear lungs, no edema.", f"p{i}", split, "PA", str(i % 2), "0"]


def _pairs_case(rng: Random, folder: Path) -> None:
    (folder / "img").symlink_to(_CACHE["tables"] / "img")
    path = folder / rng.choice(("t.csv", "t.csv", "t.tsv", "t.csv.gz", "t.TSV", "t"))
    count = write_table(rng, path, [list(_COLUMNS), *_rows(rng, _pair)])
    config = _ingest("pairs", str(path))
    choose = lambda name: rng.choice((name,) * 5 + ("",) * 3 + (rng.choice(_COLUMNS), "no"))  # noqa: E731
    for name in ("subject", "split", "view"):
        config.pairs[name] = choose(name)
    config.pairs.labels = tuple(rng.choice(((), ("odd",), ("odd", "sick"), ("",), ("no",))))
    config.pairs.report = rng.choice(("report", "report", "report", "odd", ""))
    _check_plan(plan.make_plan(config), config, count)


def _prompts_case(rng: Random, folder: Path) -> None:
    path = folder / rng.choice(("t.csv", "t.tsv", "t.csv.gz"))
    count = write_table(rng, path, [list(_COLUMNS), *_rows(rng, _pair)])
    columns = ConfigDict({"prompt": "report", "key": rng.choice(("image", "")), "view": "view"})
    columns.subject, columns.split = rng.choice(("subject", "")), rng.choice(("split", "split", ""))
    columns.labels = tuple(rng.choice(((), ("odd",), ("odd", "view"))))
    shares = rng.choice(
        ((0.8, 0.1, 0.1), (1, 0, 0), (0.5, 0.5), ("a", 1, 0), (float("nan"),) * 3, 1)
    )
    listed = prompts.from_csv(path, columns, ("train", "valid", "test"), shares, 0)
    check(len(listed.items) + len(listed.rejects) == count, "rows of prompts are lost", count)
    check(all(item.key.isascii() and " " not in item.key for item in listed.items), "odd keys")


def _mimic(i: int) -> list[str]:
    return [f"d{i}", "10000001", "50000001", ("PA", "AP", "LATERAL")[i % 3]]


def _mimic_case(rng: Random, folder: Path) -> None:
    (folder / "files").symlink_to(_CACHE["tables"] / "files")
    labels = list(mimic_cxr.LABELS)
    if rng.random() < 0.5:
        labels.reverse()
    study = lambda i: ["10000001", "50000001", *("1.0", "", "-1.0", "0")[i % 4 :], *[""] * 14]  # noqa: E731
    order = rng.choice((slice(None), slice(None, None, -1)))  # study_id first or last
    tables = {
        "metadata": [["dicom_id", "subject_id", "study_id", "ViewPosition"], *_rows(rng, _mimic)],
        "split": [["dicom_id", "split"], *([f"d{i}", "train"] for i in range(12))],
        "chexpert": [["subject_id", "study_id", *labels][order]]
        + [row[:16][order] for row in _rows(rng, study)],
    }
    counts = {}
    bent = rng.choice((*tables, "metadata"))
    for name, table in tables.items():
        path = folder / f"mimic-cxr-2.0.0-{name}.csv{rng.choice(('', '.gz'))}"
        counts[name] = write_table(rng if name == bent else Random(1), path, table)
    config = _ingest("mimic_cxr", str(folder))
    _check_plan(plan.make_plan(config), config, counts["metadata"])
    splits = ("train", "valid", "test")
    for item in prompts.from_mimic(folder, "", splits, ("findings",)).items:
        _check_clean(item.text, "a prompt of MIMIC")


def _folder_case(rng: Random, folder: Path) -> None:
    source = (_CACHE["tables"] / "img" / "1.png").read_bytes()
    names = (
        b"train",
        b"val",
        b"Test",
        b"NORMAL",
        b"images",
        b"a b",
        b"\xff\xfe",
        b"[red]",
        b"e\xcc\x81",
    )
    names += (b"x\ny", b"n" * 200, b"%20", b"\xe4.d")
    root, count = bytes(folder), rng.randint(0, 8)
    paths = set()
    for i in range(count):
        parts = [rng.choice(names) for _ in range(rng.choice((0, 1, 1, 2, 3)))]
        parts.append(
            rng.choice(names)[:20] + b"%d" % i + rng.choice((b".png", b".PNG", b".jpg", b""))
        )
        path = b"/".join((root, *parts))
        Path(path.rpartition(b"/")[0].decode(errors="surrogateescape")).mkdir(
            parents=True, exist_ok=True
        )
        Path(path.decode(errors="surrogateescape")).write_bytes(source)
        paths.add(path)
    config = _ingest("folder", str(folder))
    pieces = (
        "",
        "(",
        "(.*)",
        r"\w+",
        "{2147483648}",
        "{9}",
        "[",
        "|",
        "(?P<a>x)",
        "*",
        "$",
        r"(\d)",
        "a",
    )
    config.folder.subject = "".join(rng.choices(pieces, k=rng.choice((0, 0, 0, 1, 2, 3))))
    _check_plan(plan.make_plan(config), config, len(paths))


def _ingest(variant: str, path: str) -> Any:
    name = {"mimic_cxr": "paper"}.get(variant, variant)
    config = ingest_configs.get_config(name).ingest
    config.update({"path": path, "size": 8})
    return config


def _check_plan(todo: plan.Plan, config: Any, count: int) -> None:
    """Check that rows are items, rejects or left out, and that items make records or rejects."""
    total = todo.total + sum(todo.left_out.values())
    check(count < 0 or total == count, "rows are lost", (total, count))
    items = [item for part in todo.parts for item in part.items]
    check(len({item.key for item in items}) == len(items), "keys occur twice")
    check(all(i.key.isascii() and " " not in i.key for i in items), "odd keys", items[:1])
    for _, reason in todo.rejects[:1]:
        raise RejectedRecord(reason)  # judged like any other message
    for item in items[:2]:
        record = plan.SOURCES[config.source].make(item, config)
        check(record["labels"].shape == (len(todo.label_names),), "labels of another length")
