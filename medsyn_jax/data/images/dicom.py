"""DICOM radiographs to grey uint8 arrays: the display pipeline of DICOM PS3.4 N.2, first view.

Where a header contradicts its pixels or look-up tables, the data decide if they can; otherwise the
file is rejected with a message. `pydicom.pixels.apply_modality_lut` and `apply_voi_lut` believe the
header: wrong depths, signs and counts of table entries, packed tables and half a rescale need the
code here.
"""

import contextlib
import io
import math
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import uid
from pydicom.datadict import dictionary_description
from pydicom.encaps import get_frame
from pydicom.pixels.decoders.base import Decoder, get_decoder
from pydicom.tag import Tag

from medsyn_jax.core.errors import RejectedRecord, reason

Grey = NDArray[np.uint8]

MAX_PIXELS = 80_000_000  # the largest chest detectors have below 20 million
DISPLAYS = ("window", "quantile")
_FIRST_GROUPS = (b"\x02\x00", b"\x08\x00", b"\x00\x08")  # start of a file without preamble
_ITEM = b"\xfe\xff\x00\xe0"  # start of compressed pixel data, PS3.5 A.4
_GDCM = (uid.JPEGLossless, uid.JPEGLosslessSV1, *uid.JPEGLSTransferSyntaxes)
_PACKAGES = {  # for transfer syntaxes beyond a minimal pydicom
    **dict.fromkeys(_GDCM, "pip install python-gdcm"),
    uid.JPEGExtended12Bit: "pip install pylibjpeg-libjpeg (under GPLv3)",
    **dict.fromkeys(uid.JPEG2000TransferSyntaxes, "pip install pylibjpeg-openjpeg"),
}
_DECODERS = {  # fixed, so that pixels do not depend on the installed extras
    uid.JPEGBaseline8Bit: "pillow",
    **dict.fromkeys(uid.JPEG2000TransferSyntaxes, "pylibjpeg"),
}
_STRICT = (*_GDCM, uid.JPEGExtended12Bit)  # the frame is checked before a decoder reads it
_LOSSY = (uid.JPEG2000, uid.HTJ2K, uid.JPEGLSNearLossless)
_OWN_DEPTH = (*uid.JPEG2000TransferSyntaxes, *uid.JPEGLSTransferSyntaxes)  # in the codestream


@contextlib.contextmanager
def broken(what: str) -> Iterator[None]:
    """Turn any exception of a decoder into a RejectedRecord that names `what`."""
    try:
        yield
    except (RejectedRecord, MemoryError):
        raise
    except Exception as error:
        raise RejectedRecord(f"broken or truncated: {what}: {reason(error)}") from None


def check_size(width: int, height: int) -> None:
    """Raise RejectedRecord for an image without pixels or with more than MAX_PIXELS."""
    if width * height > MAX_PIXELS:
        limit = MAX_PIXELS // 1_000_000
        raise RejectedRecord(f"{width} x {height} pixels: more than {limit} million")
    if width < 1 or height < 1:
        raise RejectedRecord(f"{width} x {height} pixels")


def to_bytes(values: np.ndarray, low: float | np.number, high: float | np.number) -> Grey:
    """Map low..high to 0..255, rounded and clipped."""
    scaled = (np.asarray(values, np.float64) - low) * (255 / (high - low))
    return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)


def has_mark(content: bytes) -> bool:
    """Whether the file has the mark of DICOM, with or without a preamble before it."""
    return b"DICM" in (content[128:132], content[:4])


def may_be(content: bytes, suffix: str) -> bool:
    """Whether a file without the mark may be DICOM by its name or its first element."""
    return suffix in (".dcm", ".dicom") or content[:2] in _FIRST_GROUPS


def decode(content: bytes, display: str) -> Grey:
    """Decode a DICOM file of one grey image.

    Args:
      content: the bytes of the file.
      display: "window" for the file's own VOI look-up table or window, if any; "quantile" to
        ignore both and stretch between the 0.1 % and 99.9 % quantiles.

    Returns:
      uint8 [height, width], bone bright. The photometric interpretation alone decides the polarity.

    Raises:
      RejectedRecord: not DICOM, broken, in colour, several frames, values without grey levels, or
        a compression without an installed decoder.
    """
    with broken("DICOM header"):
        data = pydicom.dcmread(io.BytesIO(content.removeprefix(b"DICM")), force=True)
        if "Rows" not in data and not has_mark(content):
            raise RejectedRecord("not a DICOM file")
        kind = _check(data)
        decoder = _decoder(data)
    with broken("DICOM data"):
        return _decoded(data, kind, decoder, display)


def _decoded(data: pydicom.Dataset, kind: str, decoder: Decoder, display: str) -> Grey:
    raw = _pixels(data, decoder)
    if raw.shape != (data.Rows, data.Columns):  # pydicom reads surplus data as further frames
        raise RejectedRecord(
            f"broken or truncated: more pixel data than {data.Columns} x {data.Rows} pixels need"
        )
    low = int(raw.min())
    index = np.subtract(raw, low, dtype=np.intp)
    counts = np.bincount(index.ravel())
    # The display pipeline depends on the value alone: compute each value once.
    stored = np.arange(low, low + len(counts))
    padding = _padding(data, stored, raw.dtype)
    counts[padding] = 0
    shown = _display(_rescaled(stored, counts, data), counts, data, display)
    used = shown[counts > 0]
    if len(used) > 1 and used.min() == used.max():
        raise RejectedRecord(
            f"the file's own window or look-up table gives every pixel the value {used[0]}: "
            "set --config.ingest.display=quantile to ignore it"
        )
    if kind == "MONOCHROME1":
        shown = 255 - shown
    shown[padding] = 0
    return shown.take(index)  # faster than shown[index]


def _check(data: pydicom.Dataset) -> str:
    """The photometric interpretation; RejectedRecord unless the file holds one grey image."""
    for name in ("Rows", "Columns", "PixelData"):
        if name not in data or (name == "PixelData" and not data.PixelData):
            if "FloatPixelData" in data or "DoubleFloatPixelData" in data:
                raise RejectedRecord("a DICOM file of floating-point pixels, not grey levels")
            raise RejectedRecord(f"broken or truncated: a DICOM file without {name}")
    defaults = {"NumberOfFrames": 1, "SamplesPerPixel": 1, "Rows": 0, "Columns": 0}
    for name, default in (defaults | {"BitsAllocated": 0}).items():
        setattr(data, name, int(_number(data, name, default)))
    data.BitsStored = int(_number(data, "BitsStored", data.BitsAllocated))
    check_size(data.Columns, data.Rows)
    frames, data.NumberOfFrames = data.NumberOfFrames, 1
    if frames > 1:
        raise RejectedRecord(f"a DICOM file of {frames} frames where one image is needed")
    kind = data.get("PhotometricInterpretation") or "unknown"
    if kind not in ("MONOCHROME1", "MONOCHROME2") or data.SamplesPerPixel != 1:
        raise RejectedRecord(f"a DICOM file of colour type {kind}, not grey")
    if not 1 <= data.BitsStored <= min(data.BitsAllocated, 16):
        bits = f"{data.BitsStored} bits in words of {data.BitsAllocated}"
        raise RejectedRecord(f"DICOM pixels of {bits}, not 1 to 16 bit grey")
    return kind


def _number(data: pydicom.Dataset, name: str, default: float) -> float:
    """The first value of an element; the default if the element is missing or empty."""
    tag = Tag(name)
    label = f"({tag.group:04x},{tag.element:04x}) {dictionary_description(tag)}"
    with broken(f"DICOM element {label}"):
        value = data.get(name)
        if isinstance(value, Sequence) and not isinstance(value, str | bytes):
            value = value[0] if len(value) else None
        if value is None or value in ("", b""):
            return default
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(f"the value is {number}")
        return number


def _decoder(data: pydicom.Dataset) -> Decoder:
    """The decoder of the transfer syntax; without one, of the encoding of the parsed header."""
    syntax = data.file_meta.get("TransferSyntaxUID")
    pixels = data["PixelData"]
    fragments = pixels.is_undefined_length or pixels.value[:4] == _ITEM
    if not syntax:
        if fragments:
            raise RejectedRecord("compressed pixels without a transfer syntax (0002,0010)")
        # Pixels of implicit and explicit VR are the same.
        little_endian = data.original_encoding[1]
        syntax = uid.ImplicitVRLittleEndian if little_endian else uid.ExplicitVRBigEndian
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise RejectedRecord(f"DICOM pixels in {_name(syntax)}: pydicom has no decoder") from None
    if pixels.is_undefined_length and decoder.is_native:
        name = _name(syntax)
        raise RejectedRecord(f"compressed pixels in the uncompressed transfer syntax {name}")
    if not decoder.is_available:
        raise _wants_package(syntax)
    return decoder


def _wants_package(syntax: uid.UID) -> RejectedRecord:
    package = _PACKAGES.get(syntax, "see pydicom's list of decoders")
    return RejectedRecord(f"no decoder is installed for {_name(syntax)}: {package}")


def _name(syntax: uid.UID) -> str:
    return str(syntax) if syntax.name == syntax else f"{syntax.name} ({syntax})"


def _pixels(data: pydicom.Dataset, decoder: Decoder) -> np.ndarray:
    """int [height, width]: the stored values, without other bits of their words."""
    syntax, allocated, stored = decoder.UID, int(data.BitsAllocated), int(data.BitsStored)
    options: dict[str, Any] = {"raw": True, "correct_unused_bits": False}
    if syntax in _OWN_DEPTH:  # narrower words than those of the codestream would wrap values
        options["bits_allocated"] = max(16, allocated)
    if syntax == uid.JPEGBaseline8Bit:  # 8 bits whatever the header says
        if stored > 8:
            raise RejectedRecord(f"DICOM pixels of {stored} bits in {_name(syntax)}, which has 8")
        options["bits_allocated"] = 8
    if _DECODERS.get(syntax) in decoder.available_plugins:
        options["decoding_plugin"] = _DECODERS[syntax]
    if syntax in _STRICT:
        with broken(f"DICOM pixels in {_name(syntax)}"):
            _check_frame(data)
    try:
        raw, _ = decoder.as_array(data, **options)
    except Exception as error:
        gpl = "pylibjpeg"
        if syntax == uid.JPEGExtended12Bit and stored > 8 and gpl not in decoder.available_plugins:
            raise _wants_package(syntax) from None
        if "broadcast" in str(error):
            size = f"{data.Columns} x {data.Rows} grey pixels of {allocated} bits"
            error = ValueError(f"the frame does not hold {size}")
        with broken(f"DICOM pixels in {_name(syntax)}"):
            raise error
    return _stored(raw, data, syntax)


def _stored(raw: np.ndarray, data: pydicom.Dataset, syntax: uid.UID) -> np.ndarray:
    """The stored bits of each word; pydicom does not mask JPEG 2000 and JPEG-LS."""
    allocated, stored = int(data.BitsAllocated), int(data.BitsStored)
    low, high = int(raw.min()), int(raw.max())
    if max(high, -low - 1) >= 1 << allocated:
        raise RejectedRecord(f"DICOM pixels from {low} to {high} in words of {allocated} bits")
    half, margin = 1 << stored - 1, (1 << stored) // 8
    bottom, top = (-half, half - 1) if low < 0 else (0, 2 * half - 1)
    plain = low < 0 or raw.dtype.kind == "u"
    if syntax in _LOSSY and plain and bottom - margin <= low and high <= top + margin:
        return np.clip(raw, bottom, top)  # overshoot of the compression, not other bits
    spare = unused = 8 * raw.dtype.itemsize - stored
    if spare:  # PS3.5 8.1.1
        shift = int(_number(data, "HighBit", stored - 1)) + 1 - stored
        if 0 < shift <= spare and (high >> stored or low < -half):
            unused -= shift  # the values lie higher in their words, as allowed until 2014
        np.left_shift(raw, unused, out=raw)
        np.right_shift(raw, spare, out=raw)
    return raw


def _check_frame(data: pydicom.Dataset) -> None:
    """Check a JPEG or JPEG-LS frame up to its pixels: GDCM ends the process on a broken one."""
    frame, at, marker = get_frame(data.PixelData, 0, number_of_frames=1), 2, 0
    size = ()
    while marker != 0xFFDA:  # the start of the pixels
        marker, length = struct.unpack_from(">HH", frame, at)
        if length < 2 + (marker < 0xFFE0) or not (
            0xFFC0 <= marker < 0xFFD0 or 0xFFDA <= marker < 0xFFFF
        ):
            raise ValueError(f"no JPEG segment at byte {at} of the frame")
        if marker == 0xFFF7 or (marker < 0xFFD0 and marker not in (0xFFC4, 0xFFC8, 0xFFCC)):
            size = struct.unpack_from(">BHHB", frame, at + 4)
        at += 2 + length
    if not size or size[0] > 16 or size[1:] != (data.Rows, data.Columns, 1):
        raise ValueError(f"bits, height, width and samples of the frame are {size}")


def _padding(data: pydicom.Dataset, stored: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """bool [v]: the stored values outside the image, shown black in either polarity."""
    first = _number(data, "PixelPaddingValue", math.nan)
    if math.isnan(first):
        return np.zeros(len(stored), bool)
    last = _number(data, "PixelPaddingRangeLimit", first)
    # US for signed pixels, or SS for unsigned ones, has the same bits.
    ends = np.array([first, last]).astype(np.int64).astype(dtype)
    return (stored >= ends.min()) & (stored <= ends.max())


def _rescaled(stored: np.ndarray, counts: np.ndarray, data: pydicom.Dataset) -> np.ndarray:
    """Numbers [v]: the modality transformation of PS3.3 C.11.1."""
    if (table := _table(data, "ModalityLUTSequence")) is not None:
        entries, _, index = _look_up("modality LUT", table, stored, counts, data)
        return entries[index].astype(np.int64)
    slope, intercept = _number(data, "RescaleSlope", 1), _number(data, "RescaleIntercept", 0)
    if slope == 0:
        raise RejectedRecord("DICOM element (0028,1053) Rescale Slope is 0")
    return stored if (slope, intercept) == (1, 0) else stored * slope + intercept


def _display(values: np.ndarray, counts: np.ndarray, data: pydicom.Dataset, display: str) -> Grey:
    """uint8 [v]: the value of interest transformation of PS3.3 C.11.2, first view."""
    own = display == "window"
    if own and (table := _table(data, "VOILUTSequence")) is not None:
        entries, depth, index = _look_up("VOI LUT", table, values, counts, data)
        low, high = int(entries.min()), int(entries.max())
        if low == high:
            raise RejectedRecord(f"every entry of the VOI LUT is {low}")
        if high.bit_length() == depth:  # else the descriptor is wrong: take the entries' range
            low, high = 0, (1 << depth) - 1
        return to_bytes(entries, low, high)[index]
    center, width = (_number(data, name, math.nan) for name in ("WindowCenter", "WindowWidth"))
    function = data.get("VOILUTFunction")
    linear = function not in ("LINEAR_EXACT", "SIGMOID")
    if own and not math.isnan(center) and width > linear:
        if function == "SIGMOID":
            exponent = np.clip(-4 * (values - center) / width, -500, 500)
            return to_bytes(1 / (1 + np.exp(exponent)), 0, 1)
        if linear:
            center, width = center - 0.5, width - 1
        return to_bytes(values, center - width / 2, center + width / 2)
    used, top = values[counts > 0], (1 << data.BitsStored) - 1
    if own and top <= 255 and values.min() >= 0 and values.max() <= top:
        return to_bytes(values, 0, top)
    if used.size < 2:
        return np.zeros(len(values), np.uint8)  # one value or none: rejected as constant
    share = np.cumsum(counts) / counts.sum()
    ends = [values[int(np.searchsorted(share, quantile))] for quantile in (0.001, 0.999)]
    if ends[0] == ends[1]:
        ends = [used.min(), used.max()]
    return to_bytes(values, min(ends), max(ends))


def _table(data: pydicom.Dataset, name: str) -> pydicom.Dataset | None:
    """The first look-up table of a sequence; None for no table or an empty one."""
    with broken(f"DICOM {name}"):
        first = (data.get(name) or [pydicom.Dataset()])[0]
        return first if first.get("LUTDescriptor") and first.get("LUTData") else None


def _look_up(
    what: str, table: pydicom.Dataset, values: np.ndarray, counts: np.ndarray, data: pydicom.Dataset
) -> tuple[np.ndarray, int, np.ndarray]:
    """Read a look-up table; its entries and the pixels correct a wrong descriptor.

    Returns:
      entries, u/int16 [n]; their bits by the descriptor; the index of each value, int [v].
    """
    with broken(f"DICOM {what}"):
        if len(table.LUTDescriptor) != 3:
            raise ValueError(
                f"LUT Descriptor (0028,3002) is {table.LUTDescriptor}, not three numbers"
            )
        number, first, depth = (int(value) for value in table.LUTDescriptor)
        number = number % 65536 or 65536
        content, order = table.LUTData, "<>"[not data.original_encoding[1]]
        if not isinstance(content, bytes):  # one number or several, sometimes signed
            content = np.atleast_1d(np.array(content)).astype(f"{order}u2").tobytes()
        packed = len(content) in (number, number + number % 2)
        entries = np.frombuffer(content[: len(content) // 2 * 2], f"{order}u2").astype("<u2")
        if packed:  # two entries of 8 bits in a word
            entries = entries.view(np.uint8)[:number].astype("<u2")
    if len(entries) < number:
        raise RejectedRecord(f"a {what} of {len(entries)} entries instead of {number}")
    half, signed = 1 << max(depth, 0) >> 1, entries.view("<i2")
    if entries.max() >= 2 * half and -half <= signed.min() and signed.max() < half:
        entries = signed
    # US or SS depends on the reader: take the sign with which the table covers most pixels.
    signs = sorted({first, first % 65536, first % 65536 - 65536}, key=lambda s: s != first)
    inside = [counts[(values >= s) & (values < s + number)].sum() for s in signs]
    first = signs[int(np.argmax(inside))]
    index = np.clip(np.rint(values - np.float64(first)), 0, len(entries) - 1)
    return entries, depth, index.astype(np.int64)
