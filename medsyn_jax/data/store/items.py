"""What a source lists: records before their pixels are read."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

from medsyn_jax.core.errors import RejectedRecord, shortened

POSITIVE, NEGATIVE, UNCERTAIN, UNKNOWN = 1, 0, -1, -2  # labels
NOT_FRONTAL = "not a frontal view"  # a reason to leave an item out
_PLAIN = re.compile(r"[A-Za-z0-9/\-_.~+,=@:()]*")


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
    size: tuple[int, int] | None = None  # height, width of the image file, where the source says so


@dataclass(frozen=True)
class Listing:
    """All items of a source, in an order that does not change from run to run."""

    items: list[Item]
    label_names: tuple[str, ...]
    rejects: list[tuple[str, str]] = field(default_factory=list)  # unusable rows: (key, reason)
    dropped: dict[str, int] = field(default_factory=dict)  # left out by choice: reason -> count
    notes: list[str] = field(default_factory=list)  # lines for the user before the ingestion


def check_box(left: float, top: float, right: float, bottom: float) -> None:
    """Raises RejectedRecord for a box without area, an inverted one, or one that is not finite."""
    if not (left < right and top < bottom and math.isfinite(right - left + bottom - top)):
        corners = f"({left:g}, {top:g}) to ({right:g}, {bottom:g})"
        raise RejectedRecord(f"the box from {corners} has no area")


def key_of(path: str) -> str:
    """A record key from a path: ASCII without spaces; distinct paths give distinct keys.

    A path that is not UTF-8 comes from the file system with lone surrogates: its bytes are quoted.
    """
    if _PLAIN.fullmatch(path):  # nearly all; `quote` takes twice as long
        return path
    return quote(path, safe="/-_.~+,=@:()", errors="surrogateescape")


def runs_of(height: int, width: int, spans: Iterable[tuple[int, int]]) -> Runs:
    """A mask as run-lengths from spans of pixels, counted down the columns: (first, behind the
    last). Spans may overlap and come in any order; they end inside of the mask."""
    counts: list[int] = []
    filled = 0  # pixels that the counts cover
    for start, end in sorted(spans):
        if end <= max(start, filled):
            continue
        if start > filled or not counts:
            counts += [start - filled, end - start]
        else:
            counts[-1] += end - filled
        filled = end
    return Runs(height, width, (*counts, height * width - filled))


def coco_counts(text: str | bytes) -> list[int]:
    """Run-lengths from COCO's compressed form: six bits a letter, the lowest five first; from the
    fourth number on, the difference to the one before the last. pycocotools only unpacks them to
    pixels. Raises RejectedRecord for another text."""
    counts: list[int] = []
    value = shift = 0
    for letter in text.encode() if isinstance(text, str) else text:
        bits = letter - 48
        value |= (bits & 31) << shift
        shift += 5
        if not 0 <= bits < 64 or shift > 40:
            raise RejectedRecord("the run-lengths are no compressed ones of COCO")
        if bits & 32:
            continue
        value -= (bits & 16) << (shift - 4)
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    return counts


def annotation_counts(
    items: Sequence[Item], homes: Mapping[str, str], names: Sequence[str]
) -> list[str]:
    """Lines for the user with the records of each label, box and mask by split; masks in files
    are not read, and so not counted.

    homes: key -> split.
    """
    positive: Counter[tuple[str, str]] = Counter()  # (name, split) -> records
    boxed, masked = positive.copy(), positive.copy()
    boxes: Counter[str] = Counter()
    for item in items:
        home = homes[item.key]
        positive.update((names[n], home) for n, x in enumerate(item.labels) if x == POSITIVE)
        boxes.update(label for label, *_ in item.boxes or ())
        boxed.update({(label, home) for label, *_ in item.boxes or ()})
        marked = [name for name, mask in item.masks if isinstance(mask, Runs) and mask.counts[1:2]]
        masked.update((name, home) for name in marked)
    lines = []
    if any(item.labels for item in items):
        lines.append(f"positive for {_by_split(names, positive)}")
    if any(item.boxes is not None for item in items):
        each = ", ".join(f"{n} of {shortened(label, 40)}" for label, n in boxes.most_common(20))
        lines.append(f"boxes: {each or 'none'}, on {_by_split([*boxes], boxed)}")
    if names_of_masks := sorted({name for name, _ in masked}):
        lines.append(f"not empty: {_by_split(names_of_masks, masked)}")
    return lines


def _by_split(names: Sequence[str], records: Counter[tuple[str, str]]) -> str:
    parts = []
    for name in names[:20]:
        by_split = {split: records[name, split] for split in ("train", "valid", "test")}
        inside = ", ".join(f"{split} {count}" for split, count in by_split.items())
        parts.append(f"{shortened(name, 40)} {sum(by_split.values())} ({inside})")
    return "; ".join(parts) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
