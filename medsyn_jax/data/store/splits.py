"""Splits by subject, and label fractions: how they are drawn, written and read.

A subject's split is a hash of (seed, subject), so records added later move no subject.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medsyn_jax.core.errors import UserError, shortened
from medsyn_jax.core.files import replaced, write_text

SPLITS = ("train", "valid", "test")

_BESIDE = r"(?:set|split|data|images?|cxr|x-?ray|\d++)"
_NAMES = re.compile(
    rf"(?:{_BESIDE}[\W_]*+)*+(?:(?P<train>train(?:ing)?)|(?P<valid>val(?:id(?:ate|ation)?)?"
    rf"|dev(?:elopment)?)|(?P<test>test(?:ing)?))(?:[\W_]*+{_BESIDE})*+",
    re.I,
)


def split_name(text: str) -> str | None:
    """train, valid or test by any usual name: `Val`, `TRAINING`, `test_set`, `01_train`; else None.

    For columns and folders alike.
    """
    match = _NAMES.fullmatch(text.strip())
    return match.lastgroup if match else None


def assign(
    records: Sequence[tuple[str, str, str | None]], shares: Any, seed: int
) -> dict[str, str]:
    """Gives every record its split.

    Args:
        records: (key, subject, the source's split or None), a split for all records or for none.
            The source's splits are kept; a valid or test that it lacks is drawn from the subjects
            of train.
        shares: of train, valid and test, adding up to 1. They count subjects, not records.
        seed: of the draw.

    Returns:
        key -> 'train' | 'valid' | 'test'.

    Raises:
        UserError: for invalid shares or split names, a split for some records only, and a subject
            in two splits.
    """
    weights = _weights(shares)
    placed = [(key, subject, _canonical(split, key)) for key, subject, split in records if split]
    if placed and len(placed) < len(records):
        key = next(key for key, _, split in records if not split)
        raise UserError(
            f"split: record {shortened(key)} has none while {len(placed)} others have one: "
            "fill the column for every record, or for none"
        )
    if not placed:
        bounds = np.cumsum(list(weights.values()))[:2]
        subjects = {subject for _, subject, _ in records}
        drawn = {s: SPLITS[int(np.searchsorted(bounds, unit(seed, s), "right"))] for s in subjects}
        return {key: drawn[subject] for key, subject, _ in records}
    check_leaks(placed)
    missing = [name for name in ("test", "valid") if name not in {split for *_, split in placed}]
    while missing:
        pool = sum(weights[name] for name in ("train", *missing))
        name = missing.pop(0)
        share = weights[name] / max(pool, 1e-9)
        placed = [
            (key, s, name if split == "train" and unit(seed, f"{name}/{s}") < share else split)
            for key, s, split in placed
        ]
    return {key: split for key, _, split in placed}


def remarks(records: Sequence[tuple[str, str, str | None]], homes: Mapping[str, str]) -> list[str]:
    """Lines for the user on what `assign` made of `records`: splits drawn although the source
    brings others, and empty ones. homes: key -> split."""
    source = {split_name(split) for *_, split in records if split}
    lines = []
    for name in SPLITS:
        subjects = [subject for key, subject, _ in records if homes[key] == name]
        if subjects and source and name not in source:
            lines.append(
                f"the source has no {name} split: {len(set(subjects))} subjects of train with "
                f"{len(subjects)} records were drawn for it"
            )
    if empty := ", ".join(name for name in SPLITS if name not in homes.values()):
        fixed = source and "train" not in source
        lines.append(
            f"no record is in {empty}: training needs train, early stopping valid, figures test: "
            + ("add records to the source" if fixed else "add subjects, or change split_shares")
        )
    return lines


def check_leaks(records: Iterable[tuple[str, str, str]]) -> None:
    """Raises UserError for a subject in two splits. records: (key, subject, split)."""
    home: dict[str, tuple[str, str]] = {}
    for key, subject, split in records:
        before, first = home.setdefault(subject, (split, key))
        if before != split:
            raise UserError(
                f"split: subject {shortened(subject)} is in {before} (record {shortened(first)}) "
                f"and in {split} (record {shortened(key)}): one subject belongs to one split, "
                "correct the source, or what names subjects: ingest.pairs.subject or "
                "ingest.folder.subject"
            )


def fraction(
    keys: Sequence[str],
    subjects: Sequence[str],
    labels: np.ndarray,
    share: float,
    seed: int,
) -> list[str]:
    """Draws a label fraction by subject; for one seed, a smaller share lies within a larger one.

    Subjects are grouped by their rarest positive label, the rarest group first, as in iterative
    stratification (Sechidis et al. 2011). Each group is drawn in its own proportion. Of each label,
    a positive and a negative record are drawn wherever there are any, if need be beyond the share.

    Args:
        keys: of the records to draw from.
        subjects: of the records, drawn as a whole.
        labels: int[n] classes or int[n, l] labels (1, 0, negative = unknown), in the order of
            `keys`; l may be 0.
        share: of the records, in (0, 1].
        seed: of the draw.

    Returns:
        The chosen keys, in the order of `keys`.
    """
    if not 0 < share <= 1:
        raise UserError(f"label fraction: {share}: must be above 0 and at most 1")
    if labels.ndim == 1:
        labels = (labels[:, None] == np.unique(labels[labels >= 0])).astype(np.int8)
    names, of = np.unique(np.asarray(subjects, str), return_inverse=True)
    digests = [_digest(seed, f"fraction/{name}") for name in names.tolist()]
    order = np.array(sorted(range(len(names)), key=digests.__getitem__), int)
    has = np.zeros((2, len(names), labels.shape[1]), bool)  # a negative, a positive record
    for value in (0, 1):
        np.logical_or.at(has[value], of, labels == value)

    counts = np.where(has[1], has[1].sum(axis=0), len(names) + 1)
    none = np.full((len(names), 1), len(names))  # the last group: no positive label
    group = np.concatenate([counts, none], axis=1).argmin(axis=1)
    place = np.zeros(len(names))  # in [0, 1) within the group: below p lies a share of p
    for number in np.unique(group):
        members = order[group[order] == number]
        shift = unit(seed, f"fraction/group {number}")
        place[members] = (np.arange(len(members)) + shift) / len(members)
    sides = has.sum(axis=1)
    for value, label in sorted(np.ndindex(sides.shape), key=lambda side: sides[side]):
        members = order[has[value, order, label]]
        if len(members) and not (place[members] < 0).any():
            place[members[place[members].argmin()]] = -1  # drawn in any case
    first = order[np.argsort(place[order], kind="stable")]
    wanted = max(1, round(share * len(keys)))
    drawn = np.cumsum(np.bincount(of, minlength=len(names))[first])
    chosen = np.zeros(len(names), bool)
    chosen[first[: np.searchsorted(drawn, wanted) + 1]] = True
    chosen |= place < 0
    return [key for key, subject in zip(keys, of, strict=True) if chosen[subject]]


def keys_path(directory: Path, split: str) -> Path:
    """The file with the keys of a split."""
    return directory / "splits" / f"{split}.txt"


def subjects_path(directory: Path, split: str) -> Path:
    """The file with the subjects of a split, in the order of its keys."""
    return directory / "splits" / f"{split}.subjects.txt"


def write_keys(path: Path, keys: Sequence[str]) -> str:
    """Writes one key a line, all or nothing, and returns the sha256 of the file."""
    text = _lines(keys)
    with replaced(path) as temporary:
        temporary.write_bytes(text)
    return hashlib.sha256(text).hexdigest()


def _lines(texts: Sequence[str]) -> bytes:
    return "".join(f"{text}\n" for text in texts).encode()


def read_keys(path: Path, sha256: str | None = None) -> list[str]:
    """Reads the keys that `write_keys` wrote.

    Raises:
        UserError: when the file is missing, or does not hash to `sha256`.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"split file: {path}: cannot be read ({error.strerror})") from error
    if sha256 is not None and hashlib.sha256(text).hexdigest() != sha256:
        raise UserError(
            f"split file: {path}: was changed after it was written (its hash differs from the "
            "recorded one): restore it, or make the data set again"
        )
    return text.decode().splitlines()


def write_subjects(path: Path, subjects: Sequence[str]) -> str:
    """Writes one subject a line as `write_keys` does; line breaks and letters beyond ASCII are
    escaped as in Python."""
    return write_keys(path, [s.encode("unicode_escape").decode() for s in subjects])


def read_subjects(path: Path, sha256: str) -> list[str]:
    """Reads the subjects that `write_subjects` wrote; raises UserError as `read_keys`."""
    return [line.encode().decode("unicode_escape") for line in read_keys(path, sha256)]


def write_fraction(path: Path, keys: Sequence[str]) -> None:
    """Writes a label fraction, and its hash for `sha256sum -c` beside it in <name>.sha256."""
    digest = hashlib.sha256(_lines(keys)).hexdigest()
    # The hash comes first: whatever a kill leaves, there is no list without its hash.
    write_text(path.with_suffix(".sha256"), f"{digest}  {path.name}\n")
    write_keys(path, keys)


def read_fraction(path: Path, places: Mapping[str, int]) -> list[int]:
    """Reads a label fraction that `write_fraction` wrote.

    Args:
        path: of the list; its hash is beside it.
        places: the place of each key that may be drawn.

    Returns:
        The places of the keys, in the order of the file.

    Raises:
        UserError: when a file is missing, or the list has been changed, is empty, or holds a key
            twice or without a place.
    """
    beside = path.with_suffix(".sha256")
    try:
        recorded = beside.read_text().split()
    except OSError as error:
        raise UserError(
            f"split file: {beside}: cannot be read ({error.strerror}): make it by `sha256sum "
            f"{path.name} > {beside.name}`, or take the folder of another run"
        ) from None
    keys = read_keys(path, (recorded or [""])[0])
    strange = [key for key in keys if key not in places]
    fault = "" if keys and len(set(keys)) == len(keys) else "holds no key, or one twice"
    if strange:
        some = f"{len(strange)} of its {len(keys)} keys, such as {strange[0]}"
        fault = f"{some}, are not in the train split of this data set"
    if fault:
        raise UserError(
            f"split file: {path}: {fault}: take one that was drawn from this data set, or move it "
            "away to have it drawn"
        )
    return [places[key] for key in keys]


def unit(seed: int, name: str) -> float:
    """A number in [0, 1) that depends on the seed and the name alone."""
    return int.from_bytes(_digest(seed, name)[:7], "big") / 2.0**56


def _digest(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()


def _canonical(split: str, key: str) -> str:
    name = split_name(split)
    if name is None:
        what = f"{shortened(split)!r} of record {shortened(key)}"
        raise UserError(f"split: {what}: use train, valid or test")
    return name


def _weights(shares: Any) -> dict[str, float]:
    try:
        weights: dict[str, float] = dict(zip(SPLITS, map(float, shares), strict=True))
        fine = min(weights.values()) >= 0 and abs(sum(weights.values()) - 1) <= 1e-6  # no nan
    except (TypeError, ValueError):
        weights, fine = {}, False
    if not fine:
        what = shortened(str(shares))
        raise UserError(f"split_shares: {what}: give train, valid and test, adding up to 1")
    return weights
