"""Radiographs from files to grey uint8 arrays, bright as on a viewing screen.

Nothing is stretched or equalised: an 8-bit picture keeps its values, a deeper one is scaled by its
bit depth, a DICOM goes through its own display pipeline. Only a DICOM that brings no window of its
own is stretched, between the 0.1 % and 99.9 % quantiles of its pixels.
"""

import io
import os
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageOps
from pydicom.errors import InvalidDicomError
from pydicom.pixels.processing import apply_modality_lut

from medsyn_jax.core.errors import RejectedRecord

Grey = NDArray[np.uint8]

MAX_PIXELS = 80_000_000  # the largest chest detectors have below 20 million
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
_PLAIN_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_DEPTHS = (8, 10, 12, 14, 16)


def decode_grey(path: str | os.PathLike[str], at_least: int = 0, bits: int = 0) -> Grey:
    """Reads a PNG, JPEG, TIFF, BMP or DICOM file.

    Args:
      path: the file; its content decides what it is, not its name.
      at_least: 0, or a side in pixels: a JPEG may then be decoded at 1/2, 1/4 or 1/8 of its size,
        as long as neither side becomes smaller than this.
      bits: used in the 16 of a PNG or TIFF of such, 8..16; 0 takes the fewest of 8, 10, 12, 14 and
        16 that hold the image, so that a dim image of 12 bits can pass for one of 10.

    Returns:
      uint8 [height, width]. Colour is weighted by ITU-R 601, transparent parts lie over black, an
      EXIF orientation is obeyed, MONOCHROME1 is inverted.

    Raises:
      RejectedRecord: "<path>: <reason>": missing, empty, truncated, not an image, several frames,
        a DICOM in colour, a pixel type that is no picture, more than MAX_PIXELS, all one value, or
        a value that does not fit into `bits`.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise RejectedRecord(f"{path}: no such file") from None
    except OSError as error:
        raise RejectedRecord(f"{path}: cannot be read: {error.strerror}") from None
    # What the libraries would warn of is either harmless here or ends in a reject.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pixels = _decode(content, Path(path).suffix.lower(), at_least, bits)
        except RejectedRecord as error:
            raise RejectedRecord(f"{path}: {error}") from None
    low, high = int(pixels.min()), int(pixels.max())
    if low == high:
        raise RejectedRecord(f"{path}: every pixel has the value {low}")
    return pixels


def _decode(content: bytes, suffix: str, at_least: int, bits: int) -> Grey:
    try:
        if not content:
            raise RejectedRecord("the file is empty (0 bytes)")
        stream = io.BytesIO(content)
        if content[128:132] == b"DICM":
            return _dicom(stream)
        image = _opened(stream)
        if image is not None:
            with image:
                return _picture(image, at_least, bits)
        if suffix in (".dcm", ".dicom"):  # old DICOM files have nothing that tells
            return _dicom(stream)
        raise RejectedRecord("not a PNG, JPEG, TIFF, BMP or DICOM file")
    except (RejectedRecord, MemoryError):
        raise
    except Exception as error:  # decoders meet broken files with exceptions of every kind
        text = " ".join(str(error).split()) or type(error).__name__
        raise RejectedRecord(f"broken or truncated: {text}") from None


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        limit = MAX_PIXELS // 1_000_000
        raise RejectedRecord(f"{width} x {height} pixels: more than {limit} million")
    if width < 1 or height < 1:
        raise RejectedRecord(f"{width} x {height} pixels")


def _opened(stream: BinaryIO) -> Image.Image | None:
    try:
        return Image.open(stream, formats=_FORMATS)
    except Image.UnidentifiedImageError:
        return None
    except Image.DecompressionBombError:
        raise RejectedRecord(f"more than {MAX_PIXELS // 1_000_000} million pixels") from None


def _picture(image: Image.Image, at_least: int, bits: int) -> Grey:
    _check_size(*image.size)
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a camera's JPEG with previews behind it
        raise RejectedRecord(f"{frames} frames where one image is needed")
    if image.mode not in (*_PLAIN_MODES, *_DEEP_MODES):
        raise RejectedRecord(f"pixels of mode {image.mode!r}, not 8 or 16 bit grey or colour")
    if at_least and image.format == "JPEG":
        image.draft(None, (at_least, at_least))
    image.load()
    if _turned(image):
        ImageOps.exif_transpose(image, in_place=True)
    return _deep(np.asarray(image), bits) if image.mode in _DEEP_MODES else _plain(image)


def _turned(image: Image.Image) -> bool:
    try:
        return image.getexif().get(0x0112, 1) != 1
    except Exception:  # damaged EXIF data say nothing about the pixels
        return False


def _plain(image: Image.Image) -> Grey:
    if image.has_transparency_data or image.mode in ("LA", "PA", "RGBA"):
        colour = image.convert("RGBA")
        return np.asarray(ImageChops.multiply(colour.convert("L"), colour.getchannel("A")))
    if image.mode in ("P", "CMYK"):
        image = image.convert("RGB")
    return np.asarray(image.convert("L"))


def _deep(pixels: np.ndarray, bits: int) -> Grey:
    """16-bit containers often hold 10, 12 or 14 bits; without `bits` the largest value tells."""
    low, high = int(pixels.min()), int(pixels.max())
    if low < 0 or high > 65535:
        raise RejectedRecord(f"pixels from {low} to {high}, not 16 bit grey")
    depth = bits or next(depth for depth in _DEPTHS if high < 1 << depth)
    if high >= 1 << depth:
        raise RejectedRecord(f"a pixel of {high}, more than ingest.bits={depth} can hold")
    return _to_bytes(np.arange(1 << depth), 0, (1 << depth) - 1)[pixels]


def _to_bytes(values: np.ndarray, low: float, high: float) -> Grey:
    """Maps low..high to 0..255, rounded, and clips what lies outside."""
    scaled = (np.asarray(values, np.float64) - low) * (255 / (high - low))
    return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)


def _dicom(stream: BinaryIO) -> Grey:
    stream.seek(0)
    try:
        data = pydicom.dcmread(stream)
    except InvalidDicomError:
        stream.seek(0)
        data = pydicom.dcmread(stream, force=True)
        if "Rows" not in data:
            raise RejectedRecord("not a DICOM file") from None
    missing = [name for name in ("Rows", "Columns", "PixelData") if name not in data]
    if missing:
        raise RejectedRecord(f"broken or truncated: a DICOM file without {missing[0]}")
    _check_size(data.Columns, data.Rows)
    frames, kind = data.get("NumberOfFrames") or 1, data.get("PhotometricInterpretation", "")
    if int(frames) > 1:
        raise RejectedRecord(f"a DICOM file of {frames} frames where one image is needed")
    if data.get("SamplesPerPixel", 1) != 1 or kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise RejectedRecord(f"a DICOM file of colour type {kind or 'unknown'}, not grey")
    raw = data.pixel_array
    if raw.ndim != 2 or raw.dtype.kind not in "iu" or data.BitsStored > 16:
        raise RejectedRecord(f"DICOM pixels of type {raw.dtype}, {data.BitsStored} bits, not grey")
    low = int(raw.min())
    index = raw.astype(np.int32) - low
    counts = np.bincount(index.ravel())
    # The display pipeline of DICOM PS3.4 N.2 acts on values alone, so do it once for each value.
    stored = np.arange(low, low + len(counts))
    padding = _padding(data, stored)
    counts[padding] = 0
    shown = _display(apply_modality_lut(stored, data), counts, data)
    if kind == "MONOCHROME1":
        shown = 255 - shown
    shown[padding] = 0
    return shown[index]


def _padding(data: pydicom.Dataset, stored: np.ndarray) -> np.ndarray:
    """bool [v]: the stored values that mark what is no image, shown black whatever the polarity."""
    first = data.get("PixelPaddingValue")
    if first is None:
        return np.zeros(len(stored), bool)
    last = data.get("PixelPaddingRangeLimit", first)
    return (stored >= min(first, last)) & (stored <= max(first, last))


def _display(values: np.ndarray, counts: np.ndarray, data: pydicom.Dataset) -> Grey:
    """uint8 [v]: the value of interest transformation of DICOM PS3.3 C.11.2, first view."""
    if data.get("VOILUTSequence"):
        return _look_up(values, data.VOILUTSequence[0])
    center, width = (_first(data.get(name)) for name in ("WindowCenter", "WindowWidth"))
    function = data.get("VOILUTFunction") or "LINEAR"
    if center is not None and width is not None and width > (function == "LINEAR"):
        if function == "SIGMOID":
            exponent = np.clip(-4 * (values - center) / width, -500, 500)
            return _to_bytes(1 / (1 + np.exp(exponent)), 0, 1)
        if function == "LINEAR":
            center, width = center - 0.5, width - 1
        return _to_bytes(values, center - width / 2, center + width / 2)
    used = values[counts > 0]
    if data.BitsStored <= 8 and values.min() >= 0 and values.max() <= 255:
        return _to_bytes(values, 0, 255)
    if used.size < 2:
        return np.zeros(len(values), np.uint8)  # one value or none: rejected as constant
    share = np.cumsum(counts) / counts.sum()
    ends = [values[int(np.searchsorted(share, quantile))] for quantile in (0.001, 0.999)]
    if ends[0] == ends[1]:
        ends = [used.min(), used.max()]
    return _to_bytes(values, min(ends), max(ends))


def _first(value: object) -> float | None:
    """The first of one or several numbers."""
    if value is None or value == "":
        return None
    return float(value[0] if isinstance(value, pydicom.multival.MultiValue) else value)  # type: ignore


def _look_up(values: np.ndarray, table: pydicom.Dataset) -> Grey:
    # pydicom's apply_voi casts the index to the table's type: an 8-bit table for 12 bits wraps.
    entries, first, depth = table.LUTDescriptor
    data = table.LUTData
    if isinstance(data, bytes):
        data = np.frombuffer(data, "<u2" if len(data) >= 2 * (entries or 65536) else np.uint8)
    bent = _to_bytes(np.asarray(data), 0, (1 << depth) - 1)
    index = np.clip(np.rint(values - np.float64(first)), 0, len(bent) - 1)
    return bent[index.astype(np.int64)]


def square(image: Grey, size: int) -> Grey:
    """Fits an image into a square: antialiased, centred, black beside it.

    Args:
      image: uint8 [height, width].
      size: side of the result in pixels.

    Returns:
      uint8 [size, size].
    """
    height, width = image.shape
    scale = size / max(height, width)
    small = _resize(image, max(1, round(height * scale)), max(1, round(width * scale)))
    top, left = (size - small.shape[0]) // 2, (size - small.shape[1]) // 2
    canvas = np.zeros((size, size), np.uint8)
    canvas[top : top + small.shape[0], left : left + small.shape[1]] = small
    return canvas


def _resize(image: Grey, height: int, width: int) -> Grey:
    if image.shape == (height, width):
        return image
    picture = Image.fromarray(image)
    # Averaging whole blocks down to three times the target first: no visible loss, far faster.
    return np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0))


def encode_png(image: Grey) -> bytes:
    """PNG bytes of a uint8 [height, width] image."""
    if image.dtype != np.uint8 or image.ndim != 2:
        raise TypeError(f"uint8 [height, width] needed, got {image.dtype} {image.shape}")
    stream = io.BytesIO()
    # Level 3 takes a third of the default's time and 15 % more room on radiographs.
    Image.fromarray(image).save(stream, "PNG", compress_level=3)
    return stream.getvalue()
