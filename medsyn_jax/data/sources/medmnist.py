"""The source `medmnist`: an .npz file of MedMNIST v2 or v2+ (Yang et al. 2023), whole in memory."""

import functools
import math
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from medsyn_jax.core.errors import RejectedRecord, UserError, reason
from medsyn_jax.data.sources import records
from medsyn_jax.data.store.items import NEGATIVE, POSITIVE, Item, Listing

LABELS = {  # by the first part of the file name; of the other sets, labels are class numbers
    "chestmnist": (
        "Atelectasis",
        "Cardiomegaly",
        "Effusion",
        "Infiltration",
        "Mass",
        "Nodule",
        "Pneumonia",
        "Pneumothorax",
        "Consolidation",
        "Edema",
        "Emphysema",
        "Fibrosis",
        "Pleural_Thickening",
        "Hernia",
    ),
    "pneumoniamnist": ("Normal", "Pneumonia"),
}
_SPLITS = {"train": "train", "val": "valid", "test": "test"}
_LARGE = 2**30  # bytes

# What zipfile and NumPy raise for files that are damaged, encrypted or hold pickles.
_BROKEN = (OSError, ValueError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error)

Value = TypeVar("Value")


def list_items(config: Any) -> Listing:
    """The images of an .npz file, with its splits.

    `config.path` is the file, or a folder that holds one only. It has the arrays
    `{train,val,test}_images`, uint8 [n, h, w] or [n, h, w, 3], and `{train,val,test}_labels`, int
    [n, l]: l labels of 0 or 1, or, for l = 1, a class, which becomes one-hot labels. Keys are
    SPLIT/ROW. No image is read.

    Raises:
      UserError: there is no such file, an array is missing, pickled or of another shape or type.
    """
    path = _file(Path(config.path))
    labels = {split: _read(path, lambda file, s=split: file[f"{s}_labels"]) for split in _SPLITS}
    shapes = {split: _shape(path, f"{split}_images") for split in _SPLITS}
    widths = set()
    for split, values in labels.items():
        where = f"medmnist: {path}: {split}_labels"
        if values.dtype.kind not in "ui" or values.ndim != 2 or not values.shape[1]:
            kind = f"{values.dtype} {list(values.shape)}"
            raise UserError(f"{where}: {kind}: expected integers [n, labels]: download it again")
        if len(values) != shapes[split][0]:
            images = f"{split}_images has {shapes[split][0]}"
            raise UserError(f"{where}: has {len(values)} rows, {images}: download it again")
        most = 1 if values.shape[1] > 1 else 255
        if values.size and not 0 <= values.min() <= values.max() <= most:
            span = f"values from {values.min()} to {values.max()}, where 0 to {most} are possible"
            raise UserError(f"{where}: {span}: download it again")
        widths.add(values.shape[1])
    if len(widths) > 1 or len({shape[1:] for shape in shapes.values()}) > 1:
        raise UserError(f"medmnist: {path}: its splits differ in shape: download it again")
    several = max(widths) > 1
    count = max(widths) if several else 1 + max(int(v.max(initial=0)) for v in labels.values())
    names = LABELS.get(path.stem.lower().partition("_")[0], ())
    names = names if len(names) == count else tuple(map(str, range(count)))
    items = []
    for split, values in labels.items():
        hot = values == 1 if several else values == np.arange(count)
        for row, values_of_row in enumerate(np.where(hot, POSITIVE, NEGATIVE).tolist()):
            key = f"{split}/{row}"
            items.append(Item(key, key, _SPLITS[split], str(path), labels=tuple(values_of_row)))
    height, width = shapes["train"][1:3]
    notes = ["medmnist names no patients: every image is a subject of its own"]
    if max(height, width) < config.size:
        notes.append(
            f"images of {width} x {height} pixels are enlarged to ingest.size={config.size}"
        )
    if (size := max(map(math.prod, shapes.values()))) > _LARGE:
        notes.append(
            f"each process holds {size / _LARGE:.1f} GiB of images: lower ingest.workers if memory "
            "runs out"
        )
    return Listing(items, names, notes=notes)


def make(item: Item, config: Any) -> dict[str, Any]:
    """As `records.make`; colours are weighted by ITU-R 601."""
    split, row = item.key.split("/")
    pixels = _images(str(item.image), split)[int(row)]
    if pixels.ndim == 3:
        pixels = np.asarray(Image.fromarray(pixels).convert("L"))
    if pixels.min() == pixels.max():
        raise RejectedRecord(f"{item.image}: {item.key}: every pixel has the value {pixels.min()}")
    return records.make(item, config, pixels)


@functools.lru_cache(maxsize=1)  # the records of a shard are of one split
def _images(path: str, split: str) -> np.ndarray:
    return _read(Path(path), lambda file: file[f"{split}_images"])


def _file(path: Path) -> Path:
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if len(files) != 1 or not files[0].is_file():
        inside = f"holds {len(files)} .npz files" if path.is_dir() else "does not exist"
        raise UserError(f"medmnist: {path}: {inside}: set ingest.path to one .npz file")
    return files[0]


def _read(path: Path, read: Callable[[Any], Value]) -> Value:
    """What `read` takes out of the file; no pickled array is loaded."""
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("not an .npz file")
        with np.load(path, allow_pickle=False) as file:
            return read(file)
    except KeyError as error:
        raise UserError(f"medmnist: {path}: {error.args[0]}: is it a file of MedMNIST?") from None
    except _BROKEN as error:
        raise UserError(f"medmnist: {path}: {reason(error)}: download it again") from None


def _shape(path: Path, name: str) -> tuple[int, ...]:
    """The shape of an array of images, from its head alone; raises UserError for no images."""

    def head(file: Any) -> tuple[tuple[int, ...], np.dtype]:
        if name not in file:
            raise KeyError(f"there is no array {name}")
        with file.zip.open(f"{name}.npy") as stream:
            first = np.lib.format.read_magic(stream) == (1, 0)
            reader = np.lib.format.read_array_header_1_0
            shape, _, dtype = (reader if first else np.lib.format.read_array_header_2_0)(stream)
        return shape, dtype

    shape, dtype = _read(path, head)
    if dtype != np.uint8 or len(shape) not in (3, 4) or shape[3:] not in ((), (3,)):
        raise UserError(
            f"medmnist: {path}: {name}: {dtype} {list(shape)}: expected uint8 [n, height, width] "
            "or [n, height, width, 3]"
        )
    return shape
