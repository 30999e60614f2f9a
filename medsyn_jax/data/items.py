"""What a source lists: records before their pixels are read."""

from dataclasses import dataclass, field
from urllib.parse import quote

POSITIVE, NEGATIVE, UNCERTAIN, UNKNOWN = 1, 0, -1, -2


@dataclass(frozen=True, slots=True)
class Item:
    """One record before it is made: small, and picklable for worker processes."""

    key: str  # unique in the source, stable across runs, ASCII without spaces
    subject: str
    split: str | None  # as the source calls it; None where it brings no split
    image: str | tuple[int, int, int]  # a path, or the phantom's (seed, subject, study)
    report: str = ""
    labels: tuple[int, ...] = ()  # in the order of Listing.label_names; () until made (phantom)
    view: str = ""  # PA, AP, or '' when it is neither or not said
    report_path: str = ""  # where the report lies when it is read with the image (MIMIC-CXR)


@dataclass(frozen=True)
class Listing:
    """All items of a source, in an order that does not change from run to run."""

    items: list[Item]
    label_names: tuple[str, ...]
    rejects: list[tuple[str, str]] = field(default_factory=list)  # unusable rows: (key, reason)
    dropped: dict[str, int] = field(default_factory=dict)  # left out by choice: reason -> count


def key_of(path: str) -> str:
    """A record key from a path: ASCII without spaces; distinct paths give distinct keys."""
    return quote(path, safe="/-_.~+,=@:()")
