"""Radiographs from files to grey uint8 arrays, bright as on a viewing screen.

Grey levels are neither stretched nor equalised: an 8-bit image keeps its values, a deeper one is
scaled by its bit depth, a DICOM image goes through its display pipeline (`dicom`). Only a DICOM
image without a window, or one read with display="quantile", is stretched, between the 0.1 % and
99.9 % quantiles of its pixels.
"""

import contextlib
import io
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageFile, ImageOps

from medsyn_jax.core.errors import RejectedRecord
from medsyn_jax.data.images import dicom
from medsyn_jax.data.images.dicom import DISPLAYS, MAX_PIXELS, Grey

__all__ = ["DISPLAYS", "SQUARES", "Grey", "decode_grey", "encode_png", "square"]

SQUARES = ("pad", "crop", "stretch", "edge")
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
_PLAIN_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_DEPTHS = (8, 10, 12, 14, 16)


def decode_grey(
    path: str | os.PathLike[str],
    at_least: int = 0,
    bits: int = 0,
    display: str = "window",
    constant: bool = False,
) -> Grey:
    """Read a PNG, JPEG, TIFF, BMP or DICOM file; the content decides the format, not the name.

    Args:
      path: the file.
      at_least: 0, or a side in pixels: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as
        long as both sides keep this length.
      bits: used bits of a 16-bit PNG or TIFF, 8..16; 0 takes the fewest of 8, 10, 12, 14 and 16
        that hold the image, so that a dim image of 12 bits can pass for one of 10.
      display: for DICOM, "window" or "quantile" (`dicom.decode`).
      constant: whether all pixels may have one value, as in an empty mask.

    Returns:
      uint8 [height, width]. Colour is weighted by ITU-R 601, transparent parts lie over black, the
      EXIF orientation is applied, MONOCHROME1 is inverted.

    Raises:
      RejectedRecord: "<path>: <reason>": missing, empty, truncated, not an image, several frames,
        DICOM in colour, a pixel type without grey levels, more than MAX_PIXELS, a single value, a
        value outside `bits`, or no installed decoder.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise RejectedRecord(f"{path}: no such file") from None
    except OSError as error:
        raise RejectedRecord(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:
        name = str(path).replace("\0", "\\0")
        raise RejectedRecord(f"{name}: no file has a name with a NUL character") from None
    # The libraries' warnings are harmless here or are followed by a reject.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pixels = _decode(content, Path(path).suffix.lower(), at_least, bits, display)
        except RejectedRecord as error:
            raise RejectedRecord(f"{path}: {error}") from None
    low, high = int(pixels.min()), int(pixels.max())
    if low == high and not constant:
        raise RejectedRecord(f"{path}: every pixel has the value {low}")
    return pixels


def _decode(content: bytes, suffix: str, at_least: int, bits: int, display: str) -> Grey:
    if not content:
        raise RejectedRecord("the file is empty (0 bytes)")
    if dicom.has_mark(content):
        return dicom.decode(content, display)
    image = None
    with dicom.broken("image header"), contextlib.suppress(Image.UnidentifiedImageError):
        try:
            image = Image.open(io.BytesIO(content), formats=_FORMATS)
        except Image.DecompressionBombError:
            limit = MAX_PIXELS // 1_000_000
            raise RejectedRecord(f"more than {limit} million pixels") from None
    if image is not None:
        with dicom.broken(f"{image.format} data"), image:
            return _grey(image, at_least, bits)
    if dicom.may_be(content, suffix):
        return dicom.decode(content, display)
    raise RejectedRecord("not a PNG, JPEG, TIFF, BMP or DICOM file")


def _grey(image: ImageFile.ImageFile, at_least: int, bits: int) -> Grey:
    dicom.check_size(*image.size)
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # MPO: a camera's JPEG with previews
        raise RejectedRecord(f"{frames} frames where one image is needed")
    if image.mode not in (*_PLAIN_MODES, *_DEEP_MODES):
        raise RejectedRecord(f"pixels of mode {image.mode!r}, not 8 or 16 bit grey or colour")
    if at_least and image.format == "JPEG":
        image.draft(None, (at_least, at_least))
    raw_modes = [args if isinstance(args, str) else args[0] for *_, args in image.tile if args]
    image.load()
    if _turned(image):
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode in _DEEP_MODES:
        pixels = _deep(np.asarray(image), bits)
        white_is_zero = image.format == "TIFF" and image.tag_v2.get(262) == 0  # type: ignore
        return 255 - pixels if white_is_zero else pixels
    pixels = _plain(image)
    halved = any(mode.endswith(("16B", "16L", "16N")) for mode in raw_modes)
    if halved and (bits % 16 or pixels.max() < 64):  # Pillow reads the upper 8 bits alone
        raise RejectedRecord("16-bit colour or alpha with unused bits: save it as 16-bit grey")
    return pixels


def _turned(image: Image.Image) -> bool:
    try:
        return image.getexif().get(0x0112, 1) != 1
    except Exception:  # the pixels are sound even where the EXIF data are damaged
        return False


def _plain(image: Image.Image) -> Grey:
    if image.has_transparency_data or image.mode in ("LA", "PA", "RGBA"):
        colour = image.convert("RGBA")
        return np.asarray(ImageChops.multiply(colour.convert("L"), colour.getchannel("A")))
    if image.mode in ("P", "CMYK"):
        image = image.convert("RGB")
    return np.asarray(image if image.mode == "L" else image.convert("L"))


def _deep(pixels: np.ndarray, bits: int) -> Grey:
    """Scale 16-bit words that hold `bits` bits; 0 takes the depth from the largest value."""
    low, high = int(pixels.min()), int(pixels.max())
    if low < 0 or high > 65535:
        raise RejectedRecord(f"pixels from {low} to {high}, not 16 bit grey")
    depth = bits or next(depth for depth in _DEPTHS if high < 1 << depth)
    if high >= 1 << depth:
        raise RejectedRecord(f"a pixel of {high}, more than ingest.bits={depth} can hold")
    return dicom.to_bytes(np.arange(1 << depth), 0, (1 << depth) - 1).take(pixels)


def size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Width and height in pixels of a PNG, JPEG, TIFF or BMP file as `decode_grey` returns it, from
    its header; raises RejectedRecord."""
    with dicom.broken("image header"):
        try:
            with Image.open(path, formats=_FORMATS) as image:
                width, height = image.size
                dicom.check_size(width, height)
                across = image.getexif().get(0x0112, 1) >= 5  # turned by 90 degrees
                return (height, width) if across else (width, height)
        except Image.UnidentifiedImageError:
            raise RejectedRecord("not a PNG, JPEG, TIFF or BMP file") from None


def square(image: Grey, size: int, how: str = "pad") -> Grey:
    """Fit an image into a square, antialiased and centred.

    Args:
      image: uint8 [height, width].
      size: side of the result in pixels.
      how: "pad" fills up the shorter side with black, "edge" with the outermost pixels; "crop" cuts
        the longer side; "stretch" gives up the proportions.

    Returns:
      uint8 [size, size].
    """
    height, width = image.shape
    if how == "stretch":
        return _resize(image, size, size)
    if how == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return _resize(image[top : top + side, left : left + side], size, size)
    scale = size / max(height, width)
    small = _resize(image, max(1, round(height * scale)), max(1, round(width * scale)))
    margins = [((size - side) // 2, size - side - (size - side) // 2) for side in small.shape]
    return np.pad(small, margins, "edge" if how == "edge" else "constant")


def _resize(image: Grey, height: int, width: int) -> Grey:
    if image.shape == (height, width):
        return image
    # Blocks are first averaged down to three times the target: no visible loss, far faster.
    lanczos = Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(image).resize((width, height), lanczos, reducing_gap=3.0))


def encode_png(image: np.ndarray) -> bytes:
    """PNG bytes of a uint8 [height, width] image."""
    if image.dtype != np.uint8 or image.ndim != 2:
        raise TypeError(f"uint8 [height, width] needed, got {image.dtype} {image.shape}")
    stream = io.BytesIO()
    # Level 3 takes a third of the default level's time and 15 % more space on radiographs.
    Image.fromarray(image).save(stream, "PNG", compress_level=3)
    return stream.getvalue()
