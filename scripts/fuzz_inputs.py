"""Shared by all kinds of `scripts/fuzz.py`: mutations of bytes, texts and JSON, and `check`.

A kind has two functions. `prepare(folder)` writes the sound files that cases start from. `case(rng,
folder)` makes one malformed input in an empty folder, calls the package, and raises `Fault` if the
result is not sane. `fuzz.py` judges the errors that the package raises.
"""

import json
import string
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple


class Fault(AssertionError):
    """A result that is not sane: "what: how"."""


class Kind(NamedTuple):
    """weight: relative frequency of the kind. limit_s: processor time of one case."""

    prepare: Callable[[Path], None]
    case: Callable[[Random, Path], None]
    weight: float
    limit_s: float


def check(sane: bool, what: str, how: Any = "") -> None:
    """Raise Fault unless sane. what: the same text for all faults of a cause; how: details."""
    if not sane:
        raise Fault(f"{what}: {ascii(how)[:300]}")


# --- mutations ----------------------------------------------------------------------------------

DEEP = "@deep@"  # becomes deeply nested lists when JSON is written
ODD = (None, True, False, 0, -1, 1, 2, 0.5, -8.0, float("nan"), float("inf"), 2**31, 10**11, 2**70)
ODD += (1e308, "", "x", "0", "nan", "9.0", "a\nb", "a\0b", "[red]", "é\udcff", "y" * 3000, DEEP)
ODD += ([], [1], [0, "a"], {}, {"a": 1}, [[]], [None] * 3, "../up", "/", "True", [8] * 40)
_BITS = (
    "\0",
    "\x1b[31m",
    "\u202e",
    "\u200b",
    "\x85",
    "\ufeff",
    "\udc80",
    "ﬁ",
    "é",
    "…",
    "\r",
    "\t",
)


def bent_bytes(rng: Random, data: bytes) -> bytes:
    """Apply one to four bit flips, cuts, copies, deletions, insertions or runs of zeros."""
    bent = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, end = sorted(rng.randint(0, len(bent)) for _ in range(2))
        end = min(end, at + rng.choice((1, 4, 64, 1 << 20)))
        how = rng.randrange(6)
        if how == 0 and at < len(bent):
            bent[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            del bent[at:]
        elif how == 2:
            bent[at:at] = bent[at:end]
        elif how == 3:
            del bent[at:end]
        elif how == 4:
            bent[at:at] = rng.randbytes(rng.choice((1, 4, 40)))
        else:
            bent[at:end] = bytes(end - at)
    return bytes(bent)


def bent_text(rng: Random, text: str) -> str:
    """Drop, double, move or replace letters, or repeat a piece of the text many times."""
    for _ in range(rng.choice((1, 2, 8))):
        at, end = sorted(rng.randint(0, len(text)) for _ in range(2))
        end = min(end, at + rng.choice((1, 2, 30)))
        piece = rng.choice(
            (text[at:end], rng.choice(_BITS), rng.choice(string.punctuation + " \n"))
        )
        count = rng.choice((0, 1, 1, 2, 30, rng.choice((3, 300, 3000))))
        text = text[:at] + piece * count + text[rng.choice((at, end)) :]
    return text[:100_000]


def bent_json(rng: Random, value: Any) -> Any:
    """Replace, remove, duplicate, swap or rename one to three values of the tree."""
    whole = [json.loads(json.dumps(value))]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(whole))
        inside, key = rng.choice(places)
        how = rng.randrange(8)
        if how < 4:
            inside[key] = json.loads(json.dumps(rng.choice(ODD)))  # a copy: it may change again
        elif how == 4 and inside is not whole:
            del inside[key]
        elif how == 5:
            other, name = rng.choice(places)
            inside[key] = json.loads(json.dumps(other[name]))
        elif how == 6 and isinstance(inside, dict):
            inside[rng.choice((f"{key}2", "", "x" * 600, key.upper()))] = inside.pop(key)
        elif isinstance(inside[key], int | float) and not isinstance(inside[key], bool):
            inside[key] = rng.choice((-1, 2, 0.5, 1000, 1e20)) * inside[key]
    return whole[0]


def _places(tree: Any) -> Any:
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from _places(tree[key])


def json_bytes(rng: Random, value: Any) -> bytes:
    """A tree as JSON; in one case of five the text itself is altered, too."""
    nested = f"{'[' * 100_000}{']' * 100_000}" if rng.random() < 0.5 else "[" * 5000
    data = json.dumps(value).replace(f'"{DEEP}"', nested).encode()
    return bent_bytes(rng, data) if rng.random() < 0.2 else data
