"""The sources of image-report records: what a source holds, and how one record is made.

A source is listed first (`SOURCES[config.source](config)`), then each item becomes an example on
its own (`example`), in any process and in any order.

Fields of `config` (the ingest config) that are read here and in `sources`:
  source, path, size (pixels), sections, min_tokens, frontal_only, seed,
  bits: used in the images of 16, 0 = each image's own (`decode.decode_grey`),
  display: of DICOM files (`dicom.decode`),
  inverted: whether bone is dark in the files of this source, although they do not say so,
  square: how images become square (`decode.square`),
  phantom.{subjects, studies_per_subject},
  pairs.{image, report, findings, impression, subject, split, labels, view}: column names, "" = no
    such column,
  mimic_cxr.reports: the folder that holds the reports, "" = `path`,
  folder.subject: regular expression, "" = the file name's stem is the subject.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from medsyn_jax.core.errors import LeftOutRecord, RejectedRecord, UserError
from medsyn_jax.data.images import decode
from medsyn_jax.data.sources import pairs
from medsyn_jax.data.store.items import Item, Listing
from medsyn_jax.data.text import reports

__all__ = ["SOURCES", "Item", "Listing", "example"]


def _phantom(config: Any) -> Listing:
    """`phantom.subjects` x `phantom.studies_per_subject` procedural radiographs."""
    from medsyn_jax.phantom import study as phantom

    seed, size, counts = config.seed, config.size, config.phantom
    if not 0 <= seed < 2**64 or not 32 <= size <= 1024:
        raise UserError(
            f"ingest: seed={seed}, size={size}: the phantom needs a seed from 0 to 2**64 - 1 and a "
            "size of 32 to 1024 pixels"
        )
    if min(counts.subjects, counts.studies_per_subject) < 1:
        what = f"subjects={counts.subjects}, studies_per_subject={counts.studies_per_subject}"
        raise UserError(f"ingest.phantom: {what}: give at least 1 of each")
    items = [
        Item(
            key=f"p{seed}/s{subject:06d}/{study}",
            subject=f"p{seed}s{subject:06d}",
            split=None,
            image=(seed, subject, study),
        )
        for subject in range(config.phantom.subjects)
        for study in range(config.phantom.studies_per_subject)
    ]
    return Listing(items, tuple(phantom.LABELS))


SOURCES: dict[str, Callable[[Any], Listing]] = {
    "phantom": _phantom,
    "pairs": pairs.pairs,
    "mimic_cxr": pairs.mimic_cxr,
    "folder": pairs.folder,
}


def example(item: Item, config: Any) -> dict:
    """Makes one record.

    Args:
      item: of a listing.
      config: the ingest config that the listing was made with.

    Returns:
      key, subject, report, findings, impression, view: str; image: PNG bytes of a grey uint8
      [size, size]; labels: int8 [l]; a `mask_<name>` for each mask of the item (PNG bytes, 0
      or 255); the phantom has mask_lungs, mask_pneumothorax, mask_effusion and boxes, a list of
      {"bbox": float32 [4], "label": str}.

    Raises:
      RejectedRecord: the image, a mask or the report cannot be used; the message names the file.
      LeftOutRecord: the report has fewer than `min_tokens` words.
    """
    if isinstance(item.image, tuple):
        return _phantom_example(item, item.image, config)
    report = _read_report(item.report_path) if item.report_path else item.report
    # The report is cheap to read and to reject: before the image.
    texts = _texts(report, item, config)
    # Half of the decoder's work on a large JPEG is saved without a visible loss.
    pixels = decode.decode_grey(item.image, 2 * config.size, config.bits, config.display)
    if config.inverted:
        pixels = 255 - pixels
    return {
        "key": item.key,
        "subject": item.subject,
        "image": decode.encode_png(decode.square(pixels, config.size, config.square)),
        **texts,
        "labels": np.array(item.labels, np.int8),
        "view": item.view,
        **{name: _mask(path, pixels.shape, config) for name, path in item.masks},
    }


def _mask(path: str, shape: tuple[int, ...], config: Any) -> bytes:
    """A mask as PNG bytes of 0 or 255, squared as its image of `shape` is.

    It may be smaller or larger than the image, as those of the COVID-19 Radiography Database are.
    """
    mask = decode.decode_grey(path, constant=True)
    height, width = mask.shape
    if abs(height / width / (shape[0] / shape[1]) - 1) > 0.02:  # both were rounded to pixels
        raise RejectedRecord(
            f"{path}: a mask of {width} x {height} pixels, of other proportions than its image of "
            f"{shape[1]} x {shape[0]}"
        )
    top = int(mask.max())  # small numbers are those of structures, large ones a grey scale
    inside = np.where(mask > (top // 2 if top > 15 else 0), np.uint8(255), np.uint8(0))
    beside = "pad" if config.square == "edge" else config.square  # no structure beside the image
    squared = decode.square(inside, config.size, beside)
    return decode.encode_png(np.where(squared > 127, np.uint8(255), np.uint8(0)))


def _phantom_example(item: Item, which: tuple[int, int, int], config: Any) -> dict:
    from medsyn_jax.phantom import study as phantom

    made = phantom.study(*which, config.size)
    masks = {
        f"mask_{name}": decode.encode_png(mask.astype(np.uint8) * np.uint8(255))
        for name, mask in made.masks.items()
    }
    boxes = [
        {"bbox": np.array(corners, np.float32), "label": label} for label, *corners in made.boxes
    ]
    return {
        "key": item.key,
        "subject": item.subject,
        "image": decode.encode_png(made.image),
        **_texts(made.report, item, config),
        "labels": np.array([made.labels[name] for name in phantom.LABELS], np.int8),
        "view": made.view,
        **masks,
        "boxes": boxes,
    }


def _texts(report: str, item: Item, config: Any) -> dict[str, str]:
    """The report and its cleaned sections; a source that brings no report has no rule to keep."""
    found = reports.sections(report) if None in item.sections else {}
    named = zip(("findings", "impression"), item.sections, strict=True)
    findings, impression = (
        reports.clean(found.get(name, "") if text is None else text) for name, text in named
    )
    text = reports.select_text(findings, impression, report, tuple(config.sections))
    count = reports.token_count(text)
    if _has_reports(config) and count < config.min_tokens:
        where = item.report_path or item.key
        what = f"{', '.join(config.sections)}: {count} words"
        raise LeftOutRecord(f"{where}: the report has too few words in {what}")
    return {"report": report, "findings": findings, "impression": impression}


def _has_reports(config: Any) -> bool:
    columns = config.pairs
    named = columns.report or columns.findings or columns.impression
    return config.source != "folder" and not (config.source == "pairs" and not named)


def _read_report(path: str) -> str:
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise RejectedRecord(f"{path}: no such report") from None
    except UnicodeDecodeError as error:
        raise RejectedRecord(f"{path}: the report is not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise RejectedRecord(f"{path}: the report cannot be read: {error.strerror}") from None
