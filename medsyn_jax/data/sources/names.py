"""Names of records in lists that others published: splits, and tables of annotations."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from medsyn_jax.core.errors import UserError, shortened
from medsyn_jax.data.sources import tables
from medsyn_jax.data.store.items import Item, key_of
from medsyn_jax.data.store.splits import split_name

NOT_IN_LIST = "not in the split list"  # a reason to leave an item out
_RECORDS, _SUBJECTS = ("key", "image"), ("subject", "patient")  # columns, the first one counts


def lookup(records: Iterable[tuple[str, str]]) -> Callable[[str], list[str]]:
    """A function from a name to the keys of the records that it may mean: the one of that key, else
    all with that name, with or without suffix, as the last part of their key or path.

    records: (key, path of the image or "").
    """
    keys: set[str] = set()
    by_name: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for key, path in records:
        keys.add(key)
        ends = [PurePath(text) for text in (key, key_of(path))]
        whole = key.removesuffix(ends[0].suffix)
        for name in (whole, *(name for end in ends for name in (end.name, end.stem))):
            by_name[name][key] = None

    def keys_of(name: str) -> list[str]:
        quoted = key_of(name)
        return [quoted] if quoted in keys else [*by_name.get(quoted, ())]

    return keys_of


@dataclass(frozen=True)
class SplitList:
    """A published split: which record or subject is in train, valid and test."""

    path: Path
    of: str  # what it names: "records", "subjects", or "" for either
    homes: Mapping[str, str]  # name -> split

    @property
    def sha256(self) -> str:
        """Of the content, the same for a list in another order, place or format."""
        text = json.dumps([self.of, sorted(self.homes.items())])
        return hashlib.sha256(text.encode()).hexdigest()

    def assign(self, items: Sequence[Item]) -> tuple[list[Item], list[str]]:
        """The items that the list names, with its splits, and lines for the user.

        Raises:
          UserError: a name means several records, a record is in two splits, or the list names
            nothing that was listed.
        """
        records = lookup((i.key, i.image if isinstance(i.image, str) else "") for i in items)
        subjects: defaultdict[str, list[str]] = defaultdict(list)
        for item in items:
            subjects[item.subject].append(item.key)
        splits: dict[str, str] = {}
        lacking: list[str] = []
        for name, split in self.homes.items():
            keys = records(name) if self.of != "subjects" else []
            if len(keys) > 1:
                which = shortened(f"{keys[0]} and {keys[1]}", 200)
                raise UserError(
                    f"split list: {self.path}: {shortened(name)} may be {which}: list the keys"
                )
            keys = keys or (subjects.get(name, []) if self.of != "records" else [])
            if not keys:
                lacking.append(name)
            for key in keys:
                if splits.setdefault(key, split) != split:
                    raise UserError(
                        f"split list: {self.path}: record {shortened(key)} is in {splits[key]} and "
                        f"in {split}: correct the list"
                    )
        if not splits:
            names = f"{shortened(next(iter(self.homes)))}, and the first record is {items[0].key}"
            raise UserError(
                f"split list: {self.path}: none of its {len(self.homes)} names is a record or "
                f"subject of this source; the first name is {names} of subject "
                f"{shortened(items[0].subject)}: take the list of this source"
            )
        notes = [f"split list {self.path}: sha256 {self.sha256}"]
        if lacking:
            notes.append(
                f"split list {self.path}: {len(lacking)} of {len(self.homes)} names are no record "
                f"or subject of the source, or a rejected one, such as {shortened(lacking[0])}"
            )
        rest = [item.key for item in items if item.key not in splits]
        if rest:
            notes.append(
                f"split list {self.path}: {len(rest)} of {len(items)} records are not in it and so "
                f"left out, such as {shortened(rest[0])}"
            )
        kept = [replace(i, split=splits[i.key]) for i in items if i.key in splits]
        return kept, notes


def read_split_list(path: Path) -> SplitList:
    """Reads a published split.

    Args:
      path: a CSV or TSV with a column `key`, `image`, `subject` or `patient` and a column `split`,
        or a folder with a text file a split (train.txt, val.txt, ...) of one name a line.

    Raises:
      UserError: it is neither, is broken or empty, or has a name in two splits.
    """
    homes: dict[str, str] = {}

    def add(name: str, split: str, where: str) -> None:
        if not name or homes.setdefault(name, split) != split:
            fault = f"{shortened(name)} is in {homes[name]}, too" if name else "there is no name"
            raise UserError(f"split list: {where}: {fault}: correct the list")

    kind = ""
    if path.is_dir():
        files = {file: split_name(file.stem) for file in sorted(path.glob("*.txt"))}
        used = {split: file for file, split in files.items() if split}
        if len(used) < sum(split is not None for split in files.values()):
            several = ", ".join(file.name for file, split in files.items() if split)
            raise UserError(f"split list: {path}: two files of one split among {several}")
        for split, file in used.items():
            for number, line in enumerate(_text(file).splitlines(), 1):
                if line.strip():
                    add(line.strip(), split, f"{file}: line {number}")
    else:
        with tables.read(path, ("split",)) as (header, _):
            column = next((name for name in (*_RECORDS, *_SUBJECTS) if name in header), "")
        if not column:
            columns = shortened(", ".join(header), 400)
            raise UserError(
                f"split list: {path}: no column key, image, subject or patient among: {columns}"
            )
        kind = "records" if column in _RECORDS else "subjects"
        for number, fields in tables.rows(path, (column, "split")):
            where, split = f"{path}: row {number}", split_name(fields["split"])
            if split is None:
                value = shortened(fields["split"])
                raise UserError(f"split list: {where}: {value!r}: use train, valid or test")
            add(fields[column].strip(), split, where)
    if not homes:
        raise UserError(
            f"split list: {path}: names nothing: give a CSV with the columns image and split, or a "
            "folder with train.txt, valid.txt and test.txt"
        )
    return SplitList(path, kind, homes)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"split list: {path}: cannot be read as UTF-8 text: {error}") from None
