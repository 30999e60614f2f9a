"""The source `folder`: class folders, with or without splits and masks, and no reports."""

import functools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from medsyn_jax.core.errors import RejectedRecord, UserError, shortened
from medsyn_jax.data.sources import records
from medsyn_jax.data.store.items import NEGATIVE, POSITIVE, Item, Listing, key_of
from medsyn_jax.data.store.splits import split_name

_SUFFIXES = (".jpg", ".jpeg", ".png", ".dcm", ".dicom")
_IMAGES = re.compile(r"(?:images?|imgs?)[ _-]?\d*|cxr[ _-]?png", re.I)  # hold the images of a class
_BESIDE = re.compile(r"^(?:images?|imgs?)[ _-]+|[ _-]+(?:images?|imgs?)$", re.I)
_MASKS = re.compile(r"[Mm](?:asks?|ASKS?)(?![a-z])")  # "lung masks", leftMask, Masks_png
_TRUTHS = re.compile(r"seg(?:mentation)?s?|labels?|annotations?|gt|ground[ _-]?truths?", re.I)
_MASK_STEM = re.compile(  # mask_1.png, 1_mask.png, 1_mask_2.png, 1_seg.png
    r"^masks?[ _-]+(?=.)"
    r"|(?<=.)(?:[ _-]+|(?<=\d))(?:masks?(?:[ _-]?\d+)?|seg(?:mentation)?|label|gt)$",
    re.I,
)
_NO_CLASS = "outside a class folder"

make = records.make


@dataclass(frozen=True)
class Image:
    path: str  # below the root
    place: tuple[str, ...]  # its folders, but those that only tell images from masks
    stem: str

    @property
    def at(self) -> tuple[tuple[str, ...], str]:
        """What an image and its masks have in common."""
        return self.place, self.stem


Masks = Mapping[tuple[tuple[str, ...], str], Mapping[str, str]]  # `Image.at` -> field -> path
Classed = list[tuple[Image, str, str | None]]  # image, class, split


def list_items(config: Any) -> Listing:
    """Images in `path`/[SPLIT/]CLASS/**/* or `path`/CLASS/SPLIT/**/*, each a .jpg, .png or .dcm.

    SPLIT is any name that `splits.split_name` knows. A folder `images` below a class is passed
    through, and what else the class holds is left out. Files in folders of masks, or called
    `..._mask`, become the field `mask_<name>` of the image with the same name in the same class,
    where every image has one. The labels are one-hot over the class names in sorted order. The
    subject is the file name's stem, or what `config.folder.subject`, a regular expression, finds
    in the path below `path`: its groups joined by '-'. A file without a match is rejected.

    Raises:
      UserError: no such folder, no image in a class folder, a broken expression, several sets.
    """
    root = root_of(config)
    dropped: Counter[str] = Counter()
    notes: list[str] = []
    subject_of = subjects(config, notes)
    images, masks = images_and_masks(image_files(root, dropped))
    classed = _without_rest(_classed(root, images, dropped, notes), dropped)
    spellings: dict[str, str] = {}  # train/Normal and test/NORMAL are one class
    classed = [
        (image, spellings.setdefault(name.strip().casefold(), name.strip()), split)
        for image, name, split in classed
    ]
    names = tuple(sorted({name for _, name, _ in classed}))
    if not names:
        layout = root / "[train|valid|test]" / "CLASS" / "*.png"
        dropped["masks"] = sum(map(len, masks.values()))
        left = "".join(f"; {count} left out ({why})" for why, count in dropped.items() if count)
        raise UserError(f"no images: {root}: expected {layout} or .jpg or .dcm{left}")
    if len(names) == 1:
        notes.append(
            f"{root} has one class only, {names[0]}: if the classes are folders inside of it, set "
            "ingest.path to it"
        )
    fields = _fields([image for image, _, _ in classed], masks, dropped, notes)
    items: list[Item] = []
    rejects: list[tuple[str, str]] = []
    for image, name, split in classed:
        key, path = key_of(image.path), str(root / image.path)
        try:
            subject = subject_of(image.path)
        except RejectedRecord as error:
            rejects.append((key, f"{path}: {error}"))
            continue
        labels = tuple(POSITIVE if name == other else NEGATIVE for other in names)
        paths = tuple((field, str(root / masks[image.at][field])) for field in fields)
        items.append(Item(key, subject, split, path, labels=labels, masks=paths))
    return Listing(items, names, rejects, dict(dropped), notes)


def _utf8(name: str) -> str:
    """A file name as text that can be stored: bytes that are no UTF-8 are escaped."""
    return name.encode("utf-8", "backslashreplace").decode()


def root_of(config: Any) -> Path:
    """The folder `config.path`; UserError if there is none."""
    root = Path(config.path)
    if not config.path or not root.is_dir():
        raise UserError(f"no folder: {config.path or 'ingest.path'} does not exist: set path")
    return root


def subjects(config: Any, notes: list[str]) -> Callable[[str], str]:
    """A function from the path of an image below the root to its subject: the stem, or what
    `config.<source>.subject` finds. That function raises RejectedRecord where nothing is found.

    Raises:
      UserError: for a broken expression.
    """
    setting = f"{config.source}.subject"
    expression = config.get(config.source, {}).get("subject", "")
    if not expression:
        notes.append(
            f"ingest.{setting} is empty, so every file name is a subject of its own: give an "
            "expression that finds the patient where one has several images"
        )
        return lambda file: _utf8(PurePath(file).stem)
    text = shortened(expression)
    try:
        pattern = re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"{setting}: {text!r}: {error}: give a regular expression") from None

    def subject_of(file: str) -> str:
        try:
            match = pattern.search(file)
        except MemoryError:  # of a huge count in the expression
            raise UserError(f"{setting}: {text!r}: needs too much memory: simplify it") from None
        groups = match.groups() if match else ()
        subject = "-".join(filter(None, groups)) if groups or not match else match[0]
        if not subject:
            raise RejectedRecord(f"{setting} {text!r} finds nothing")
        return _utf8(subject)

    return subject_of


def image_files(root: Path, dropped: Counter[str]) -> Iterator[str]:
    """Paths below root, in sorted order; hidden files and folders are passed over."""
    for place, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX", "@")))
        for name in sorted(files):
            if name.lower().endswith(_SUFFIXES) and not name.startswith("."):
                yield (Path(place) / name).relative_to(root).as_posix()
            else:
                dropped["not a .jpg, .png or .dcm file"] += 1


def images_and_masks(paths: Iterable[str]) -> tuple[list[Image], Masks]:
    """Tells images from masks by the names of folders and files; a second mask of one field has a
    name that ends in '_'."""
    images: list[Image] = []
    masks: dict[tuple[tuple[str, ...], str], dict[str, str]] = {}
    for path in paths:
        stem = PurePath(path).stem
        place, field = _place(path.rpartition("/")[0])
        if field or _MASK_STEM.search(stem):
            same = masks.setdefault((place, _MASK_STEM.sub("", stem)), {})
            field = field or "mask_mask"
            while field in same:
                field += "_"
            same[field] = path
        else:
            images.append(Image(path, place, stem))
    return images, masks


@functools.lru_cache(maxsize=1)  # files come folder by folder
def _place(folder: str) -> tuple[tuple[str, ...], str]:
    """The folders that tell split and class, and the field of the masks in it, "" of images."""
    names = [name for name in folder.split("/") if name]
    inner = [name for name in names if _is_mask(name)]
    bare = [_MASKS.sub("", n).strip(" _-") if n in inner else _BESIDE.sub("", n) for n in names]
    # train_masks and train_images are both in train
    kept = [
        b if split_name(b) else "" if n in inner else n for n, b in zip(names, bare, strict=True)
    ]
    place = tuple(name for name in kept if name and not _IMAGES.fullmatch(name))
    return place, _field(inner) if inner else ""


def _is_mask(name: str) -> bool:
    words = re.split(r"[\W_]+", name.lower())  # a whole set may be called "images and masks"
    return bool(_TRUTHS.fullmatch(name)) or bool(
        _MASKS.search(name) and not {"and", "with", "without"} & {*words}
    )


def _field(folders: Sequence[str]) -> str:
    """The field of the masks in nested folders: mask_lungs in "lung masks", mask_left in
    ManualMask/leftMask, mask_masks where there are no other words."""
    for name in reversed(folders):
        words = [w.lower() for w in re.findall("[A-Z]?[a-z]+|[A-Z]+|[0-9]+", _MASKS.sub(" ", name))]
        beside = ("png", "jpg", "image", "images")
        rest = "_".join(word for word in words if word not in beside and not split_name(word))
        if rest:
            return f"mask_{'lungs' if rest == 'lung' else rest}"
    word = _MASKS.search(folders[-1])
    return f"mask_{word[0].lower() if word else 'masks'}"


def _fields(
    images: Sequence[Image], masks: Masks, dropped: Counter[str], notes: list[str]
) -> list[str]:
    """The masks that every image has: a set has the same fields in all its records."""
    counts = Counter(field for image in images for field in masks.get(image.at, ()))
    fields = sorted(field for field, count in counts.items() if count == len(images))
    for field, count in sorted(counts.items()):
        if field in fields:
            notes.append(f"{field}: a mask of every image")
        else:
            notes.append(
                f"{field}: only {count} of {len(images)} images have this mask, so it is left out "
                "of all records: to keep it, move the images without it away"
            )
    own = {image.at for image in images}
    left = sum(map(len, masks.values())) - len(fields) * len(own)
    if left:
        dropped["masks"] = left
    lone = sorted(p for at, paths in masks.items() if at not in own for p in paths.values())
    if lone:
        notes.append(f"{len(lone)} masks are of no image of the set, such as {shortened(lone[0])}")
    return fields


def _classed(
    root: Path, images: Sequence[Image], dropped: Counter[str], notes: list[str]
) -> Classed:
    """The images in class folders, with class and split."""
    places = {image.place for image in images}
    at = {p: next((n for n, name in enumerate(p) if split_name(name)), None) for p in places}
    above: dict[tuple[str, ...], set[str]] = {}  # folders of split folders: what is in those
    for place, n in at.items():
        if n is not None and len(place) > n + 1:
            above.setdefault(place[:n], set()).add(place[n + 1])
    top = min(map(len, above), default=0)
    bases = sorted(base for base in above if len(base) == top)
    if len(bases) > 1 and not set.intersection(*(above[base] for base in bases)):
        above, bases = {}, []  # CLASS/SPLIT/PATIENT
    if len(bases) > 1:
        several = shortened(", ".join("/".join(base) for base in bases), 300)
        raise UserError(f"several sets: {root}: {several} each hold split folders: set path to one")
    below = not above and any(at.values())  # CLASS/SPLIT
    if below and not all(at.values()):
        lone = min("/".join(place) for place, n in at.items() if not n)
        split = min("/".join(place) for place, n in at.items() if n)
        raise UserError(
            f"split folders: {root}: there are images in {split}, but {lone or 'the folder itself'}"
            " has no split folder: give one to every class, or to none"
        )
    base = bases[0] if bases else () if below else _wrapper(root.name, [*at])
    beside: Counter[str] = Counter()
    classed: Classed = []
    for image in images:
        place, n = image.place, at[image.place]
        rest = place[len(base) :]
        if below and n:
            classed.append((image, _utf8(place[n - 1]), split_name(place[n])))
        elif above and place[: len(base)] == base and n == len(base) and len(rest) > 1:
            classed.append((image, _utf8(rest[1]), split_name(rest[0])))
        elif not above and rest and n != len(base):
            classed.append((image, _utf8(rest[0]), None))
        else:
            dropped[_NO_CLASS] += 1
            beside["/".join(place[: len(base) + 1]) or "no folder"] += 1
    if beside and classed:
        names = ", ".join(f"{name} ({count} images)" for name, count in beside.items())
        notes.append(f"{root}: {_NO_CLASS}, and so left out: {shortened(names, 300)}")
    return classed


def _wrapper(name: str, places: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The folders of a zip in a folder of the same name, chest_xray/chest_xray, passed through."""
    base: tuple[str, ...] = ()
    while places and all(len(place) > len(base) + 1 for place in places):
        heads, inner = ({place[len(base) + n].lower() for place in places} for n in (0, 1))
        if len(heads) > 1 or heads not in ({name.lower()}, inner):
            break
        name = places[0][len(base)]
        base = (*base, name)
    return base


def _without_rest(classed: Classed, dropped: Counter[str]) -> Classed:
    """Leaves out what stands beside a folder `images`."""
    holders = set()  # of such folders
    for image, *_ in classed:
        parts = PurePath(image.path).parts[:-1]
        holders |= {parts[:n] for n, name in enumerate(parts) if _IMAGES.fullmatch(name)}

    def is_beside(image: Image) -> bool:
        parts = PurePath(image.path).parts[:-1]
        return any(
            parts[:n] in holders and not _IMAGES.fullmatch(name)
            for n, name in enumerate((*parts, ""))
        )

    kept = [entry for entry in classed if not is_beside(entry[0])]
    if len(kept) < len(classed):
        dropped["beside a folder of images"] = len(classed) - len(kept)
    return kept
