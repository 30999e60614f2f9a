"""CSV tables of a source: rows with the numbers that a spreadsheet shows, and one-line errors."""

import contextlib
import csv
import gzip
import io
import math
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TypeVar

from medsyn_jax.core.errors import RejectedRecord, UserError, shortened
from medsyn_jax.data.store.items import NEGATIVE, POSITIVE, UNCERTAIN, UNKNOWN

LABEL_VALUES = {
    **dict.fromkeys(("1", "1.0"), POSITIVE),
    **dict.fromkeys(("0", "0.0"), NEGATIVE),
    **dict.fromkeys(("-1", "-1.0"), UNCERTAIN),
    **dict.fromkeys(("", "-2", "-2.0"), UNKNOWN),
}
_UNREADABLE = (OSError, EOFError, zlib.error)
# What pandas and spreadsheets write into an empty cell.
_MISSING = {"nan", "NaN", "NAN", "None", "none", "null", "NULL", "N/A", "n/a", "NA", "<NA>", "#N/A"}

Value = TypeVar("Value")


def _opened(path: Path) -> io.TextIOWrapper:
    """Text in lines; bytes that are not UTF-8 become lone surrogates, for `_garbled`."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        return opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="\n")
    except FileNotFoundError:
        raise UserError(f"no table: {path} does not exist: check the path") from None
    except (OSError, ValueError) as error:  # ValueError: of a path with a null byte
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"unreadable table: {path}: {error}: check the file")


def _garbled(text: str) -> bool:
    """Whether bytes of a text were not UTF-8."""
    return any("\udc80" <= letter <= "\udcff" for letter in text)


def cells(header: list[str], row: list[str]) -> list[str]:
    """The cells of a row, '' for `nan`, `None`, `N/A` and the like.

    Raises:
      RejectedRecord: the row has the wrong length, or bytes that are not UTF-8.
    """
    if len(row) != len(header):
        raise RejectedRecord(f"has {len(row)} fields where the head line has {len(header)}")
    if not "".join(row).isascii():
        for name, cell in zip(header, row, strict=True):
            if _garbled(cell):
                raise RejectedRecord(f"column {shortened(name)!r} is not UTF-8 text")
    return row if _MISSING.isdisjoint(row) else ["" if cell in _MISSING else cell for cell in row]


def fields(header: list[str], row: list[str]) -> dict[str, str]:
    """`cells` by column name. The name '' stands for no column and is always '', even where a
    column has no name, as pandas' index has none."""
    return dict(zip(header, cells(header, row), strict=True)) | {"": ""}


def labels(fields: Mapping[str, str], names: Sequence[str]) -> tuple[int, ...]:
    """The values of label columns; raises RejectedRecord for a cell that is no label."""
    return label_values([fields[name] for name in names], names)


def label_values(cells: Sequence[str], names: Sequence[str]) -> tuple[int, ...]:
    """As `labels`, of the cells of the columns `names`."""
    try:
        return tuple(map(LABEL_VALUES.__getitem__, map(str.strip, cells)))
    except KeyError:
        pairs = zip(names, cells, strict=True)
        name, cell = next((n, c) for n, c in pairs if c.strip() not in LABEL_VALUES)
        value = shortened(cell)
        raise RejectedRecord(f"column {name!r}: {value!r} is not 1, 0, -1 or empty") from None


def number(text: str, what: str) -> float:
    """A finite number; raises RejectedRecord, which calls the cell `what`."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RejectedRecord(f"{what}: {shortened(text)!r} is not a number")
    return value


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (line number, text) of a list in a text file, without blank lines and outer spaces;
    raises UserError for a file that is missing, unreadable, or not UTF-8."""
    with _opened(path) as text:
        try:
            for number, line in enumerate(text, 1):
                if _garbled(line):
                    raise UserError(f"not a UTF-8 list: {path}: line {number}: save it in UTF-8")
                if line.strip():
                    yield number, line.strip()
        except _UNREADABLE as error:
            raise _unreadable(path, error) from None


def rows(
    path: Path, wanted: Iterable[str] | Mapping[str, str]
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields row numbers and the wanted columns, as `fields`; raises UserError as `columns`."""
    for number, wanted_cells in columns(path, wanted):
        yield number, {"": "", **dict(zip(wanted, wanted_cells, strict=True))}


def columns(
    path: Path, wanted: Iterable[str] | Mapping[str, str]
) -> Iterator[tuple[int, Sequence[str]]]:
    """Yields row numbers and the cells of the wanted columns; raises UserError as `read`, and for a
    row of the wrong length or encoding."""
    with read(path, wanted) as (header, table):
        places = [header.index(name) for name in wanted]
        pick = itemgetter(*places) if len(places) > 1 else lambda row: [row[i] for i in places]
        for number, row in table:
            try:
                row = cells(header, row)
            except RejectedRecord as error:
                where = f"{path}: row {number}"
                raise UserError(f"broken table: {where}: {error}: mend the table") from None
            yield number, pick(row)


def grouped(
    path: Path,
    name: str,
    columns: Sequence[str],
    parse: Callable[[dict[str, str]], Value],
    rejects: dict[str, str],
) -> dict[str, list[Value]]:
    """The rows of a table with one or several rows an image.

    Args:
      path: of the table.
      name: the column with the image of a row.
      columns: that `parse` needs.
      parse: makes a value of the `fields` of a row, or raises RejectedRecord.
      rejects: image -> reason; each image with an unusable row is added to it.

    Returns:
      image -> values of its usable rows, in the order of the table.

    Raises:
      UserError: as `read`.
    """
    groups: dict[str, list[Value]] = {}
    with read(path, (name, *columns)) as (header, table):
        for number, row in table:
            image = dict(zip(header, row, strict=False)).get(name, "").strip()
            try:
                if not image:
                    raise RejectedRecord(f"column {name!r} is empty")
                values = groups.setdefault(image, [])
                values.append(parse(fields(header, row)))
            except RejectedRecord as error:
                rejects.setdefault(image or f"row-{number}", f"{path}: row {number}: {error}")
    return groups


@contextlib.contextmanager
def read(
    path: Path, wanted: Iterable[str] | Mapping[str, str]
) -> Iterator[tuple[list[str], Iterator[tuple[int, list[str]]]]]:
    """Opens a `.csv`, `.tsv` or `.csv.gz` file; to be used in a `with` statement.

    Args:
      path: UTF-8 text with a head line, with or without a byte order mark.
      wanted: columns that must be there; a mapping says by which setting each is named.

    Yields:
      The column names, and an iterator over (row number, fields). The head line is row 1, blank
      rows are passed over but counted. Rows may be of wrong length or encoding, see `cells`.

    Raises:
      UserError: the file is missing, unreadable, empty, not a table, or lacks a wanted column.
    """
    text = _opened(path)
    csv.field_size_limit(sys.maxsize)  # one report can be longer than the default 128 KiB
    tabs = path.name.removesuffix(".gz").endswith(".tsv")
    with text:
        reader = csv.reader(text, delimiter="\t" if tabs else ",", strict=True)
        yield _header(path, reader, wanted), _numbered(path, reader)


def _header(path: Path, reader, wanted: Iterable[str] | Mapping[str, str]) -> list[str]:
    try:
        header = [name.strip() for name in next(reader)]
    except StopIteration:
        raise UserError(f"empty table: {path}: expected a head line of column names") from None
    except csv.Error as error:
        raise UserError(f"broken table: {path}: line 1: {error}: mend the quotes") from None
    except _UNREADABLE as error:
        raise _unreadable(path, error) from None
    if any(_garbled(name) or "\0" in name for name in header):
        raise UserError(f"not a UTF-8 table: {path}: line 1: save it as CSV in UTF-8")
    twice = {name for name in header if name and header.count(name) > 1}
    if twice:
        name = shortened(sorted(twice)[0])
        raise UserError(f"ambiguous table: {path}: column {name!r} occurs twice")
    for name in wanted:
        if name not in header:
            columns = shortened(", ".join(header), 400)
            advice = f": set --config.{wanted[name]}" if isinstance(wanted, Mapping) else ""
            raise UserError(f"missing column: {path}: no column {name!r} among: {columns}{advice}")
    return header


def _numbered(path: Path, reader) -> Iterator[tuple[int, list[str]]]:
    number = 1
    try:
        for number, row in enumerate(reader, 2):
            if row:
                yield number, row
    except csv.Error as error:
        where = f"row {number + 1}, line {reader.line_num}"
        raise UserError(f"broken table: {path}: {where}: {error}: mend the quotes") from None
    except _UNREADABLE as error:
        raise _unreadable(path, error) from None
