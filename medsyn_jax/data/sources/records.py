"""Makes records from files: image, masks, boxes and texts of an item."""

from pathlib import Path
from typing import Any

import numpy as np

from medsyn_jax.core.errors import LeftOutRecord, RejectedRecord
from medsyn_jax.data.images import decode
from medsyn_jax.data.store.items import Item, Runs
from medsyn_jax.data.text import reports


def make(item: Item, config: Any) -> dict[str, Any]:
    """Makes one record, in any process and in any order.

    Args:
      item: of a listing.
      config: the ingest config that the listing was made with.

    Returns:
      key, subject, report, findings, impression, view: str; image: PNG bytes of a grey uint8
      [size, size]; labels: int8 [l]; each mask of the item: PNG bytes, 0 or 255; boxes, if the
      item has them: a list of {"bbox": float32 [4] left, top, right, bottom in pixels of the
      stored image, "label": str}.

    Raises:
      RejectedRecord: the image, a mask or the report cannot be used; the message names the file.
      LeftOutRecord: the report has fewer than `min_tokens` words.
    """
    # The report is cheap to read and to reject: before the image.
    report = read_report(item.report_path) if item.report_path else item.report
    fields = texts(report, item, config)
    # Half of the decoder's work on a large JPEG is saved without a visible loss. Boxes are in
    # pixels of the whole image, as are run-lengths.
    sized = item.boxes is not None or any(isinstance(mask, Runs) for _, mask in item.masks)
    at_least = 0 if sized else 2 * config.size
    pixels = decode.decode_grey(str(item.image), at_least, config.bits, config.display)
    if config.inverted:
        pixels = 255 - pixels
    boxes = {} if item.boxes is None else {"boxes": _boxes(item, pixels.shape, config)}
    return {
        "key": item.key,
        "subject": item.subject,
        "image": decode.encode_png(decode.square(pixels, config.size, config.square)),
        **fields,
        "labels": np.array(item.labels, np.int8),
        "view": item.view,
        **{name: _mask(mask, item, pixels.shape, config) for name, mask in item.masks},
        **boxes,
    }


def _mask(mask: str | Runs, item: Item, shape: tuple[int, ...], config: Any) -> bytes:
    """A mask as PNG bytes of 0 or 255, squared as its image of `shape` is.

    A file may be smaller or larger than the image, as those of the COVID-19 Radiography Database
    are. Run-lengths are those of an image of one size.
    """
    if isinstance(mask, Runs):
        inside = _inside(mask, item, shape)
    else:
        pixels = decode.decode_grey(mask, constant=True)
        height, width = pixels.shape
        if abs(height / width / (shape[0] / shape[1]) - 1) > 0.02:  # both were rounded to pixels
            raise RejectedRecord(
                f"{mask}: a mask of {width} x {height} pixels, of other proportions than its image "
                f"of {shape[1]} x {shape[0]}"
            )
        top = int(pixels.max())  # small numbers are those of structures, large ones a grey scale
        inside = pixels > (top // 2 if top > 15 else 0)
    beside = "pad" if config.square == "edge" else config.square  # no structure beside the image
    squared = decode.square(np.where(inside, np.uint8(255), np.uint8(0)), config.size, beside)
    return decode.encode_png(np.where(squared > 127, np.uint8(255), np.uint8(0)))


def _inside(runs: Runs, item: Item, shape: tuple[int, ...]) -> np.ndarray:
    """Run-lengths as bool [height, width]; raises RejectedRecord."""
    if (runs.height, runs.width) != shape:
        raise RejectedRecord(
            f"{item.image}: the image has {shape[1]} x {shape[0]} pixels, but the run-lengths of "
            f"its mask are those of {runs.width} x {runs.height}"
        )
    ones = np.arange(len(runs.counts)) % 2 == 1
    if min(runs.counts, default=0) < 0 or sum(runs.counts) != runs.height * runs.width:
        raise RejectedRecord(
            f"{item.image}: the run-lengths of the mask leave or do not fill the image of "
            f"{runs.width} x {runs.height} pixels"
        )
    return np.repeat(ones, runs.counts).reshape(runs.width, runs.height).T


def _boxes(item: Item, shape: tuple[int, ...], config: Any) -> list[dict[str, Any]]:
    """The boxes of an item whose image has `shape`, moved as `decode.square` moves the pixels.

    A box is cut off at the edges of image and square, and dropped where the square is a crop
    without it. A box without area inside of the image rejects the record: without that box, the
    record would say that nothing is there.
    """
    sides = np.array(shape[::-1])  # width, height
    if config.square == "stretch":
        scale = config.size / sides
    else:
        scale = config.size / (sides.min() if config.square == "crop" else sides.max())
    offset = (config.size - scale * sides) / 2
    boxes = []
    for label, *corners in item.boxes or ():
        inside = np.reshape(corners, (2, 2)).clip(0, sides)
        if not (inside[1] > inside[0]).all():  # also of NaN
            edges = ", ".join(f"{corner:g}" for corner in corners)
            raise RejectedRecord(
                f"{item.image}: the box {edges} (left, top, right, bottom) has no area inside of "
                f"the image of {shape[1]} x {shape[0]} pixels"
            )
        moved = inside * scale + offset
        bbox = moved.clip(0, config.size).astype(np.float32)
        if (bbox[1] > bbox[0]).all():
            boxes.append({"bbox": bbox.ravel(), "label": label})
    return boxes


def texts(report: str | None, item: Item, config: Any) -> dict[str, str]:
    """The report, and its findings and impression, cleaned.

    Raises:
      LeftOutRecord: `config.sections` have fewer than `min_tokens` words. A source without
        reports, where `report` is None, has no such minimum.
    """
    whole = report or ""
    cut = reports.sections(whole) if None in item.sections else {}
    findings, impression = (
        reports.clean(cut.get(name, "") if text is None else text)
        for name, text in zip(("findings", "impression"), item.sections, strict=True)
    )
    if report is not None:
        text = reports.select_text(findings, impression, whole, tuple(config.sections))
        if (count := reports.token_count(text)) < config.min_tokens:
            what = f"{', '.join(config.sections)}: {count} words"
            where = item.report_path or item.key
            raise LeftOutRecord(f"{where}: the report has too few words in {what}")
    return {"report": whole, "findings": findings, "impression": impression}


def read_report(path: str) -> str:
    """The text of a report file; raises RejectedRecord."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise RejectedRecord(f"{path}: no such report") from None
    except UnicodeDecodeError as error:
        raise RejectedRecord(f"{path}: the report is not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise RejectedRecord(f"{path}: the report cannot be read: {error.strerror}") from None
