"""What a source lists: records before their pixels are read."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

from medsyn_jax.core.errors import RejectedRecord, shortened

POSITIVE, NEGATIVE, UNCERTAIN, UNKNOWN = 1, 0, -1, -2  # labels
NOT_FRONTAL = "not a frontal view"  # a reason to leave an item out


@dataclass(frozen=True, slots=True)
class Runs:
    """A mask as run-lengths of an image of `height` x `width`: zeros and ones in turn, zeros first,
    down its columns; COCO's uncompressed counts."""

    height: int
    width: int
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Item:
    """One record before it is made: small, and picklable for worker processes."""

    key: str  # unique in the source, stable across runs, ASCII without spaces
    subject: str
    split: str | None  # as the source calls it; None where it brings no split
    image: str | tuple[int, int, int]  # a path, or the phantom's (seed, subject, study)
    report: str | None = None  # None where the source has no reports, or `report_path` names one
    labels: tuple[int, ...] = ()  # in the order of Listing.label_names; () until made (phantom)
    view: str = ""  # PA, AP, or '' when it is neither or not said
    report_path: str = ""  # of a report that is read with the image (MIMIC-CXR)
    # Findings and impression where they have columns of their own; None: read from the report.
    sections: tuple[str | None, str | None] = (None, None)
    # (mask_<name>, a file or run-lengths), the same names in all items.
    masks: tuple[tuple[str, str | Runs], ...] = ()
    # (label, left, top, right, bottom) in pixels of the image file; None where the source has none.
    boxes: tuple[tuple[str, float, float, float, float], ...] | None = None


@dataclass(frozen=True)
class Listing:
    """All items of a source, in an order that does not change from run to run."""

    items: list[Item]
    label_names: tuple[str, ...]
    rejects: list[tuple[str, str]] = field(default_factory=list)  # unusable rows: (key, reason)
    dropped: dict[str, int] = field(default_factory=dict)  # left out by choice: reason -> count
    notes: list[str] = field(default_factory=list)  # lines for the user before the ingestion


def check_box(box: Sequence[float], width: float = math.inf, height: float = math.inf) -> None:
    """Raises RejectedRecord for a box (left, top, right, bottom) without area, an inverted one, one
    with a number that is none, or one wholly outside of an image of `width` x `height` pixels."""
    left, top, right, bottom = box
    if not (left < right and top < bottom and math.isfinite(right - left + bottom - top)):
        fault = "has no area"
    elif right <= 0 or bottom <= 0 or left >= width or top >= height:
        fault = "is outside of the image"
    else:
        return
    corners = f"({left:g}, {top:g}) to ({right:g}, {bottom:g})"
    raise RejectedRecord(f"the box from {corners} {fault}")


def key_of(path: str) -> str:
    """A record key from a path: ASCII without spaces; distinct paths give distinct keys.

    A path that is not UTF-8 comes from the file system with lone surrogates: its bytes are quoted.
    """
    return quote(path, safe="/-_.~+,=@:()", errors="surrogateescape")


def label_counts(items: Sequence[Item], homes: Mapping[str, str], names: Sequence[str]) -> str:
    """One line with the positive records of each label by split; "" for items without labels.

    homes: key -> split.
    """
    counts = Counter((n, homes[i.key]) for i in items for n, x in enumerate(i.labels) if x == 1)
    parts = []
    for n, name in enumerate(names[:20]):
        by_split = {split: counts[n, split] for split in ("train", "valid", "test")}
        inside = ", ".join(f"{split} {count}" for split, count in by_split.items())
        parts.append(f"{shortened(name, 40)} {sum(by_split.values())} ({inside})")
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return "; ".join(parts) + more if any(item.labels for item in items) else ""
