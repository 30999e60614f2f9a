"""DICOM files with right headers, with wrong headers, and those that must be rejected."""

import io
import struct

import numpy as np
import pydicom
import pytest
from openjpeg.utils import encode_array
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders.base import get_decoder
from pydicom.sequence import Sequence
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian

from medsyn_jax.data.images import decode
from tests.data.images.test_decode import GRADIENT, rejected, saved


def dicom(path, pixels: np.ndarray, bits: int, syntax=ExplicitVRLittleEndian, frame=b"", **fields):
    """Write a file of `pixels`, or of a compressed `frame` that should hold them."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    meta.TransferSyntaxUID = syntax
    data = Dataset()
    data.file_meta = meta
    data.SOPClassUID = meta.MediaStorageSOPClassUID
    data.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    data.Rows, data.Columns = pixels.shape[-2:]
    data.SamplesPerPixel = 1
    data.PhotometricInterpretation = "MONOCHROME2"
    data.BitsAllocated = 8 * pixels.dtype.itemsize
    data.BitsStored, data.HighBit = bits, bits - 1
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    big_endian = syntax == uid.ExplicitVRBigEndian
    data.PixelData = pixels.astype(pixels.dtype.newbyteorder("><"[not big_endian])).tobytes()
    if frame:
        data.PixelData = encapsulate([frame])
        data["PixelData"].is_undefined_length = True
    for name, value in fields.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)
    return path


R12 = np.arange(4096)
RAMP = R12.astype(np.uint16).reshape(64, 64)


def test_dicom_window(tmp_path):
    path = dicom(tmp_path / "a.dcm", RAMP, 12, WindowCenter=2048, WindowWidth=1024)
    got = decode.decode_grey(path).ravel()
    assert got[0] == got[1536] == 0
    assert got[2559] == got[4095] == 255
    assert np.all(np.diff(got.astype(int)) >= 0)
    # PS3.3 C.11.2.1.2: ((x - (c - .5)) / (w - 1) + .5) * 255
    assert got[2000] == round(((2000 - 2047.5) / 1023 + 0.5) * 255)
    several = dicom(tmp_path / "b.dcm", RAMP, 12, WindowCenter=[2048, 9], WindowWidth=[1024, 9])
    assert np.array_equal(decode.decode_grey(several).ravel(), got)
    exact = {"WindowCenter": 2048, "WindowWidth": 1024, "VOILUTFunction": "LINEAR_EXACT"}
    got = decode.decode_grey(dicom(tmp_path / "c.dcm", RAMP, 12, **exact)).ravel()
    assert got[2000] == round(((2000 - 2048) / 1024 + 0.5) * 255)
    exact["VOILUTFunction"] = "SIGMOID"
    got = decode.decode_grey(dicom(tmp_path / "d.dcm", RAMP, 12, **exact)).ravel()
    assert got[1000] == round(255 / (1 + np.exp(-4 * (1000 - 2048) / 1024)))


def test_dicom_monochrome1_is_inverted(tmp_path):
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    plain = decode.decode_grey(dicom(tmp_path / "a.dcm", RAMP, 12, **window))
    window["PhotometricInterpretation"] = "MONOCHROME1"
    inverted = decode.decode_grey(dicom(tmp_path / "b.dcm", RAMP, 12, **window))
    assert np.array_equal(inverted, 255 - plain)


def test_dicom_rescale_comes_before_the_window(tmp_path):
    pixels = (RAMP.astype(np.int32) - 2048).astype(np.int16)
    fields = {"RescaleSlope": 2, "RescaleIntercept": 100, "WindowCenter": 100, "WindowWidth": 201}
    got = decode.decode_grey(dicom(tmp_path / "a.dcm", pixels, 12, **fields)).ravel()
    stored = pixels.ravel().astype(int)
    expected = np.clip(((2 * stored + 100 - 99.5) / 200 + 0.5) * 255, 0, 255)
    assert np.array_equal(got, np.rint(expected))


@pytest.mark.parametrize("kind", ["US", "OW"])
def test_dicom_lookup_table(tmp_path, kind):
    entries = np.arange(2048) * 255 // 2047  # 8-bit entries, more of them than a byte counts
    item = Dataset()
    item.LUTDescriptor = [2048, 1000, 8]
    item.add_new(
        "LUTData", kind, entries.tolist() if kind == "US" else entries.astype("<u2").tobytes()
    )
    fields = {"VOILUTSequence": Sequence([item]), "WindowCenter": 1, "WindowWidth": 2}
    got = decode.decode_grey(dicom(tmp_path / "a.dcm", RAMP, 12, **fields)).ravel()
    assert got[:1001].max() == 0
    assert got[3047:].min() == 255
    assert got[2000] == 1000 * 255 // 2047


def test_dicom_without_window(tmp_path):
    pixels = RAMP.copy()
    pixels[0, 0] = 65535  # a dead pixel must not darken the rest
    got = decode.decode_grey(dicom(tmp_path / "a.dcm", pixels, 16)).ravel()
    assert got[0] == 255
    assert got[4090] == 255
    assert abs(int(got[2048]) - 127) <= 1
    bytes_ = decode.decode_grey(dicom(tmp_path / "b.dcm", GRADIENT // 2, 8))
    assert np.array_equal(bytes_, GRADIENT // 2)
    two = np.zeros((64, 64), np.uint16)
    two[0, 0] = 900  # rarer than the quantiles see
    assert decode.decode_grey(dicom(tmp_path / "c.dcm", two, 12)).max() == 255
    useless = {"WindowCenter": 40, "WindowWidth": 0}
    got = decode.decode_grey(dicom(tmp_path / "d.dcm", RAMP, 12, **useless))
    assert (got.min(), got.max()) == (0, 255)


def test_dicom_padding_is_black_in_both_polarities(tmp_path):
    pixels = RAMP.copy()
    pixels[:8] = 4095
    for kind in ("MONOCHROME1", "MONOCHROME2"):
        fields = {"PhotometricInterpretation": kind, "PixelPaddingValue": 4095}
        got = decode.decode_grey(dicom(tmp_path / "a.dcm", pixels, 12, **fields))
        assert got[:8].max() == 0
        assert got[8:].max() == 255


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"NumberOfFrames": 2}, "a DICOM file of 2 frames where one image is needed"),
        (
            {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0},
            "a DICOM file of colour type RGB, not grey",
        ),
        (
            {"PhotometricInterpretation": "PALETTE COLOR"},
            "a DICOM file of colour type PALETTE COLOR, not grey",
        ),
        ({"Rows": 60000, "Columns": 60000}, "60000 x 60000 pixels: more than 80 million"),
        ({"Rows": 128}, "broken or truncated: "),
    ],
)
def test_dicom_that_must_be_rejected(tmp_path, fields, reason):
    assert rejected(dicom(tmp_path / "a.dcm", RAMP, 12, **fields)).startswith(reason)


def test_dicom_without_pixels_truncated_or_constant(tmp_path):
    path = dicom(tmp_path / "a.dcm", RAMP, 12)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert rejected(path).startswith("broken or truncated: ")
    path.write_bytes(content[:140])
    assert rejected(path)
    data = pydicom.dcmread(dicom(path, RAMP, 12))
    del data.PixelData
    data.save_as(path)
    assert rejected(path) == "broken or truncated: a DICOM file without PixelData"
    assert rejected(dicom(path, np.full((8, 8), 5, np.uint16), 12)) == "every pixel has the value 0"


def test_dicom_known_by_its_content_or_its_name(tmp_path):
    path = dicom(tmp_path / "no-suffix", RAMP, 12)
    expected = decode.decode_grey(path)
    bare = tmp_path / "old.dcm"
    bare.write_bytes(path.read_bytes()[132:])  # without the preamble
    assert np.array_equal(decode.decode_grey(bare), expected)
    saved(tmp_path / "a.png", GRADIENT).rename(tmp_path / "a.dcm")
    assert np.array_equal(decode.decode_grey(tmp_path / "a.dcm"), GRADIENT)


def test_real_dicom(shared_data):
    got = decode.decode_grey(shared_data / "formats" / "RG1_J2KI.dcm")
    assert got.shape == (1955, 1841)
    lung, spine = got[700:1000, 450:600].mean(), got[900:1200, 900:960].mean()
    assert lung < spine - 40  # MONOCHROME1 inverted: air is dark, bone is bright


# ---- transfer syntaxes


WINDOW = {"WindowCenter": 2048, "WindowWidth": 4096}
J2K = uid.JPEG2000Lossless


def without_syntax(content: bytes) -> bytes:
    """The file without (0002,0010) in its meta group."""
    start = content.index(b"\2\0\x10\0UI")
    size = 8 + struct.unpack_from("<H", content, start + 6)[0]
    (length,) = struct.unpack_from("<I", content, 140)
    rest = content[144:start] + content[start + size :]
    return content[:140] + struct.pack("<I", length - size) + rest


def data_set_alone(content: bytes) -> bytes:
    return content[144 + struct.unpack_from("<I", content, 140)[0] :]


ENCODINGS = [uid.ImplicitVRLittleEndian, ExplicitVRLittleEndian, uid.ExplicitVRBigEndian]
CUTS = {
    "whole": lambda content: content,
    "no syntax": without_syntax,
    "no preamble": lambda content: content[132:],
    "no preamble but the mark": lambda content: content[128:],
    "no preamble, no syntax": lambda content: without_syntax(content)[132:],
    "data set alone": data_set_alone,
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", ["a.dcm", "IM0001"])
@pytest.mark.parametrize("syntax", ENCODINGS)
def test_a_file_without_transfer_syntax_is_read_as_it_was_parsed(tmp_path, syntax, cut, name):
    expected = decode.decode_grey(dicom(tmp_path / "b.dcm", RAMP, 12, **WINDOW))
    content = dicom(tmp_path / "c.dcm", RAMP, 12, syntax, **WINDOW).read_bytes()
    (tmp_path / name).write_bytes(CUTS[cut](content))
    assert np.array_equal(decode.decode_grey(tmp_path / name), expected)


@pytest.mark.parametrize("cut", ["no syntax", "no preamble, no syntax", "data set alone"])
def test_compressed_pixels_need_their_transfer_syntax(tmp_path, cut):
    path = dicom(tmp_path / "a.dcm", RAMP, 12, J2K, encode_array(RAMP, bits_stored=12))
    path.write_bytes(CUTS[cut](path.read_bytes()))
    assert rejected(path) == "compressed pixels without a transfer syntax (0002,0010)"


def test_a_transfer_syntax_that_its_pixels_contradict(tmp_path):
    path = dicom(tmp_path / "a.dcm", RAMP, 12, J2K, encode_array(RAMP, bits_stored=12))
    content = path.read_bytes()
    assert content.count(J2K.encode()) == 1
    path.write_bytes(content.replace(J2K.encode(), b"1.2.840.10008.1.2.1\0\0\0"))
    name = "Explicit VR Little Endian (1.2.840.10008.1.2.1)"
    assert rejected(path) == f"compressed pixels in the uncompressed transfer syntax {name}"
    path.write_bytes(content.replace(J2K.encode(), b"1.2.840.10008.1.2.4.99"))
    assert rejected(path) == "DICOM pixels in 1.2.840.10008.1.2.4.99: pydicom has no decoder"


@pytest.mark.parametrize(
    ("syntax", "package"),
    [
        (uid.JPEGLossless, "python-gdcm"),
        (uid.JPEGLosslessSV1, "python-gdcm"),
        (uid.JPEGLSLossless, "python-gdcm"),
        (uid.JPEGLSNearLossless, "python-gdcm"),
        (uid.JPEG2000Lossless, "pylibjpeg-openjpeg"),
        (uid.JPEG2000, "pylibjpeg-openjpeg"),
        (uid.HTJ2K, "pylibjpeg-openjpeg"),
    ],
)
def test_a_missing_decoder_is_named_with_its_package(tmp_path, monkeypatch, syntax, package):
    monkeypatch.setattr(get_decoder(syntax), "_available", {})
    path = dicom(tmp_path / "a.dcm", RAMP, 12, syntax, b"\xff\xd8" * 50)
    reason = f"no decoder is installed for {syntax.name} ({syntax}): pip install {package}"
    assert rejected(path) == reason


def test_12_bit_jpeg_needs_the_gpl_decoder(tmp_path, monkeypatch):
    monkeypatch.delitem(get_decoder(uid.JPEGExtended12Bit)._available, "pylibjpeg", raising=False)
    stream = io.BytesIO()
    Image.fromarray(GRADIENT).save(stream, "JPEG", quality=95)
    deep = GRADIENT.astype(np.uint16)
    path = dicom(tmp_path / "a.dcm", deep, 12, uid.JPEGExtended12Bit, stream.getvalue())
    name = "JPEG Extended (Process 2 and 4) (1.2.840.10008.1.2.4.51)"
    package = "pip install pylibjpeg-libjpeg (under GPLv3)"
    assert rejected(path) == f"no decoder is installed for {name}: {package}"
    path = dicom(path, GRADIENT, 8, uid.JPEGExtended12Bit, stream.getvalue())
    assert np.abs(decode.decode_grey(path).astype(int) - GRADIENT).max() <= 3


# ---- bits beside the stored ones


def stored_words(signed: bool) -> dict[str, np.ndarray]:
    """16-bit words with the same 12 stored bits."""
    values = RAMP.astype(int) - (2048 if signed else 0)
    bits = (values & 4095).astype(np.uint16)
    words = {"zeros above": bits, "overlay above": bits | (RAMP % 3 << 12).astype(np.uint16)}
    return words | ({"sign above": values.astype(np.int16).view(np.uint16)} if signed else {})


@pytest.mark.parametrize("way", ["raw", "RLE", "JPEG 2000", "signed JPEG 2000"])
@pytest.mark.parametrize("signed", [False, True])
def test_bits_above_the_stored_ones_are_cleared(tmp_path, signed, way):
    kind = np.int16 if signed else np.uint16
    window = {"WindowCenter": 0 if signed else 2048, "WindowWidth": 4096}
    expected = np.rint(np.clip((RAMP + 0.5) * 255 / 4095 - 255 / 8190, 0, 255)).astype(np.uint8)
    for words in stored_words(signed).values():
        syntax, frame = ExplicitVRLittleEndian, b""
        if way == "RLE":
            data = pydicom.dcmread(dicom(tmp_path / "raw.dcm", words, 16))
            data.compress(uid.RLELossless)
            syntax = uid.RLELossless
            frame = pydicom.encaps.get_frame(data.PixelData, 0, number_of_frames=1)
        elif way != "raw":
            syntax = J2K
            frame = encode_array(words.view(np.int16) if "signed" in way else words)
        path = dicom(tmp_path / "a.dcm", words.view(kind), 12, syntax, frame, **window)
        assert np.abs(decode.decode_grey(path).astype(int) - expected).max() <= 1
        got = decode.decode_grey(path).ravel().astype(int)
        assert np.array_equal(got, np.sort(got))
        assert (got[0], got[-1]) == (0, 255)


@pytest.mark.parametrize("signed", [False, True])
def test_overshoot_of_a_lossy_codestream_is_no_other_bit(tmp_path, signed):
    """4,100 of 12 bits is white in JPEG 2000 of 16 bits: without bit 12 it would be black."""
    kind, middle = (np.int16, 2048) if signed else (np.uint16, 0)
    lossy = np.clip(RAMP.astype(int) * 1.01, 0, 4130) - middle
    frame = encode_array(np.rint(lossy).astype(kind))
    window = {"WindowCenter": 2048 - middle, "WindowWidth": 4096}
    path = dicom(tmp_path / "a.dcm", RAMP.astype(kind), 12, uid.JPEG2000, frame, **window)
    got = decode.decode_grey(path).ravel().astype(int)
    assert np.abs(got - np.minimum(R12 * 1.01 * 255 / 4095, 255)).max() <= 1
    over = encode_array(RAMP | (RAMP % 3 << 12).astype(np.uint16))  # an overlay under the same UID
    path = dicom(tmp_path / "a.dcm", RAMP, 12, uid.JPEG2000, over, **WINDOW)
    assert np.abs(decode.decode_grey(path).ravel() - R12 * 255 / 4095).max() <= 1


# 8 x 8 pixels (x + 8 y) * 65 - 2048 of 12 bits: alone, and in 16 with bit 13 set where x < 2.
_LOSSLESS = (
    "ffd8ffc3000b100008000801011100ffc400170001010101000000000000000000000000070a0c0fffda0008010100"
    "010000e0ff00e82828282828283410828282828282834108282828282828341082828282828283881d050505050505"
    "06821050505050505068210505050505050682105050505050507fffd900",
    "ffd8ffc3000b100008000801011100ffc400180001010101010000000000000000000000070d0a0c0fffda00080101"
    "00010000f27ff4180808282828283a084180808282828283a084180808282828283a084180808282828283c40e8301"
    "010505050507410830101050505050741083010105050505074108301010505050507fffd900",
)
FRAMES = {
    uid.JPEGLossless: _LOSSLESS,
    uid.JPEGLosslessSV1: _LOSSLESS,
    uid.JPEGLSLossless: (
        "ffd8fff7000b0c0008000801011100ffda0008010100000000000000001ffd20ff7f5ede5ddd40002810901fcf8f"
        "4f04220e767472706e6c401063534333231307f10540820842100000282f2e2d2c2b2a3e10429282726252"
        "43d103232221207ef8f0ffd9",
        "ffd8fff7000b100008000801011100fff8000d01ffff0012004301140040ffda000801010000000000000fff1020"
        "003c042060ff07d87b879410903002414809fa7c90481d1fe00bd5e2ed749008193ec0172b85bad93f01fd6000"
        "1fbe004010040200504a7b805aba39b927cc0cbcc038b837b72f581577806d6c6b6a5e00ffd9",
    ),
    uid.JPEGLSNearLossless: (
        "ffd8fff7000b0c0008000801011100ffda0008010100010000000000000d5352ad4a7529d2801d2c54a952850b0d"
        "a5099326489151b489222408902a56a0844448000e907df7de78a958f3aebae3850ac6dc6da6da28ffd9",
        "ffd8fff7000b100008000801011100fff8000d01ffff00150048011b0040ffda00080101000100000002a98ac000"
        "012a8530ae14c278a75c8a6008b2555555156b5298054545466952b153019b364c95400a8c001a7c01008080802a"
        "e54c0e4c58b1556b54f0583060bd51ac53c0bd72f79500ffd9",
    ),
}


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("syntax", FRAMES)
def test_lossless_jpeg_and_jpeg_ls(tmp_path, syntax, signed, deep):
    pytest.importorskip("gdcm", reason="the extra `dicom`")
    values = np.arange(64).reshape(8, 8) * 65 - 2048
    words = values.astype(np.int16 if signed else np.uint16)
    window = {"WindowCenter": 0 if signed else 2048, "WindowWidth": 4096}
    frame = bytes.fromhex(FRAMES[syntax][deep])
    path = dicom(tmp_path / "a.dcm", words, 12, syntax, frame, **window)
    expected = np.rint((values + 2048 if signed else values & 4095) * 255 / 4095)
    inner = slice(1, -1)  # a loss of one level may turn the first and last of 4,096 into each other
    assert np.abs(decode.decode_grey(path) - expected).ravel()[inner].max() <= 1
    assert rejected(dicom(path, words[:7], 12, syntax, frame)).startswith("broken or truncated: ")
    for end in (3, 20, 40, len(frame) // 2):
        assert rejected(dicom(path, words, 12, syntax, frame[:end])).startswith(
            f"broken or truncated: DICOM pixels in {syntax.name}"
        )


def test_values_that_lie_higher_in_their_words(tmp_path):
    expected = decode.decode_grey(dicom(tmp_path / "a.dcm", RAMP, 12, **WINDOW))
    for shift in (4, 2):  # HighBit 15 and 13: allowed until 2014; overlays lay below
        words = RAMP << shift | 1
        path = dicom(tmp_path / "b.dcm", words, 12, HighBit=11 + shift, **WINDOW)
        assert np.array_equal(decode.decode_grey(path), expected)
    for wrong in (15, 7, 40):  # the values lie where BitsStored says
        path = dicom(tmp_path / "c.dcm", RAMP, 12, HighBit=wrong, **WINDOW)
        assert np.array_equal(decode.decode_grey(path), expected)


def test_words_and_codestreams_of_different_depth(tmp_path):
    grey = np.repeat(np.repeat(GRADIENT, 8, 0), 2, 1)
    path = dicom(tmp_path / "a.dcm", grey, 8, J2K, encode_array(RAMP + np.uint16(300)))
    assert rejected(path) == "DICOM pixels from 300 to 4395 in words of 8 bits"
    wide = grey.astype(np.uint16)
    path = dicom(tmp_path / "b.dcm", wide, 8, J2K, encode_array(grey))
    assert np.array_equal(decode.decode_grey(path), wide)
    stream = io.BytesIO()
    Image.fromarray(GRADIENT).save(stream, "JPEG", quality=95)
    path = dicom(tmp_path / "c.dcm", wide[::8, ::2], 8, uid.JPEGBaseline8Bit, stream.getvalue())
    assert np.abs(decode.decode_grey(path).astype(int) - GRADIENT).max() <= 3
    path = dicom(tmp_path / "d.dcm", wide[::8, ::2], 12, uid.JPEGBaseline8Bit, stream.getvalue())
    assert rejected(path).startswith("DICOM pixels of 12 bits in JPEG Baseline")
    for bits in (1, 4, 7):
        pixels = GRADIENT >> (8 - bits)
        got = decode.decode_grey(dicom(tmp_path / "e.dcm", pixels, bits))
        assert np.array_equal(got, np.rint(pixels * (255 / ((1 << bits) - 1))))


# ---- look-up tables


def table(first, depth, entries, count=None, signs="US", packed=False) -> Sequence:
    item = Dataset()
    count = len(entries) % 65536 if count is None else count
    item.add_new("LUTDescriptor", signs, [count, first, depth])
    content = np.asarray(entries).astype("u1" if packed else "<u2").tobytes()
    item.add_new("LUTData", "OW", content + b"\0" * (len(content) % 2))
    item.ModalityLUTType = "US"
    return Sequence([item])


def shown_by(tmp_path, tables, pixels=RAMP, bits=12, syntax=ExplicitVRLittleEndian, **fields):
    path = dicom(tmp_path / "a.dcm", pixels, bits, syntax, VOILUTSequence=tables, **fields)
    return decode.decode_grey(path).ravel()


@pytest.mark.parametrize("kind", ["OW", "US"])
@pytest.mark.parametrize(
    ("depth", "top"),
    [(16, 4095), (16, 1023), (10, 4095), (8, 4095), (8, 65535), (12, 65535), (16, 255), (0, 4095)],
)
def test_a_voi_lut_has_the_range_of_its_entries_where_its_descriptor_is_wrong(
    tmp_path, depth, top, kind
):
    bottom = top // 8
    entries = np.rint(bottom + R12 * (top - bottom) / 4095)
    tables = table(0, depth, entries)
    if kind == "US":
        tables[0].add_new("LUTData", "US", entries.astype(int).tolist())
    got = shown_by(tmp_path, tables, WindowCenter=9, WindowWidth=9)
    assert np.array_equal(got, np.rint((entries - bottom) * 255 / (top - bottom)))
    got = shown_by(tmp_path, tables, PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(got, 255 - np.rint((entries - bottom) * 255 / (top - bottom)))


@pytest.mark.parametrize("bits", [10, 12])
def test_a_table_of_signed_entries(tmp_path, bits):
    entries = (R12 - 2048) >> (12 - bits)
    wanted = np.rint((entries - entries[0]) * 255 / (entries[-1] - entries[0]))
    assert np.array_equal(shown_by(tmp_path, table(0, bits, entries)), wanted)
    fields = {"ModalityLUTSequence": table(0, bits, entries), "WindowCenter": 0}
    fields |= {"WindowWidth": 1 << bits}
    path = dicom(tmp_path / "a.dcm", RAMP, 12, **fields)
    assert np.array_equal(decode.decode_grey(path).ravel(), wanted)


def test_a_voi_lut_whose_descriptor_is_right_keeps_the_range_of_its_depth(tmp_path):
    entries = 600 + R12 * 3000 // 4095
    assert np.array_equal(shown_by(tmp_path, table(0, 12, entries)), np.rint(entries * 255 / 4095))


@pytest.mark.parametrize("syntax", ENCODINGS)
@pytest.mark.parametrize("count", [4096, 4095])
def test_a_voi_lut_of_8_bit_entries_packed_in_words(tmp_path, syntax, count):
    tables = table(0, 8, (R12 // 16)[:count], packed=True)
    if syntax == uid.ExplicitVRBigEndian:
        tables[0].LUTData = np.frombuffer(tables[0].LUTData, "<u2").astype(">u2").tobytes()
    got = shown_by(tmp_path, tables, syntax=syntax)
    assert np.array_equal(got, R12 // 16)


def test_a_voi_lut_of_65536_entries_counts_them_as_0(tmp_path):
    pixels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    tables = table(0, 16, np.arange(65536))
    assert tables[0].LUTDescriptor[0] == 0
    got = shown_by(tmp_path, tables, pixels, 16)
    assert np.array_equal(got, np.rint(np.arange(65536) * 255 / 65535))


@pytest.mark.parametrize("syntax", ENCODINGS[:2])
@pytest.mark.parametrize("signs", ["US", "SS"])
@pytest.mark.parametrize(
    ("low", "fields"),
    [
        (-2048, {}),  # signed pixels
        (-1024, {"RescaleSlope": 1, "RescaleIntercept": -1024}),  # CR
        (40000, {}),
    ],
)
@pytest.mark.parametrize("name", ["VOILUTSequence", "ModalityLUTSequence"])
def test_the_first_value_of_a_table_meets_the_pixels_whatever_its_sign(
    tmp_path, syntax, signs, low, fields, name
):
    if fields and name == "ModalityLUTSequence":
        return  # takes the place of the slope
    pixels = RAMP if fields else (RAMP.astype(int) + low).astype(np.int16 if low < 0 else np.uint16)
    first = low % 65536 if signs == "US" else (low + 32768) % 65536 - 32768
    fields = fields | {name: table(first, 12, R12, signs=signs)}
    if name == "ModalityLUTSequence":
        fields |= WINDOW
    bits = 12 if pixels is RAMP else 16
    path = dicom(tmp_path / "a.dcm", pixels, bits, syntax, **fields)
    assert np.array_equal(decode.decode_grey(path).ravel(), np.rint(R12 * 255 / 4095))


def test_a_modality_lut_of_any_depth(tmp_path):
    tables = table(0, 12, 4095 - R12)
    path = dicom(tmp_path / "a.dcm", RAMP, 12, ModalityLUTSequence=tables, **WINDOW)
    assert np.array_equal(decode.decode_grey(path).ravel(), np.rint((4095 - R12) * 255 / 4095))
    tables = table(0, 8, R12 // 16, packed=True)
    window = {"WindowCenter": 128, "WindowWidth": 256}
    path = dicom(tmp_path / "a.dcm", RAMP, 12, ModalityLUTSequence=tables, **window)
    assert np.array_equal(decode.decode_grey(path).ravel(), R12 // 16)


@pytest.mark.parametrize(
    ("tables", "reason"),
    [
        (table(0, 12, R12[:1000], 4096), "a VOI LUT of 1000 entries instead of 4096"),
        (table(0, 12, R12[:1000], 0), "a VOI LUT of 1000 entries instead of 65536"),
        (table(0, 12, R12 * 0 + 7), "every entry of the VOI LUT is 7"),
        (
            table(30000, 12, R12),
            "the file's own window or look-up table gives every pixel the value 0: "
            "set --config.ingest.display=quantile to ignore it",
        ),
    ],
)
def test_a_senseless_voi_lut_is_rejected_in_words(tmp_path, tables, reason):
    path = dicom(tmp_path / "a.dcm", RAMP, 12, VOILUTSequence=tables)
    assert rejected(path) == reason
    assert decode.decode_grey(path, display="quantile").max() == 255


def test_a_voi_lut_that_lacks_its_table_leaves_the_window(tmp_path):
    expected = decode.decode_grey(dicom(tmp_path / "a.dcm", RAMP, 12, **WINDOW)).ravel()
    for lacking in ("LUTData", "LUTDescriptor"):
        tables = table(0, 12, R12)
        del tables[0][lacking]
        assert np.array_equal(shown_by(tmp_path, tables, **WINDOW), expected)
    assert np.array_equal(shown_by(tmp_path, Sequence([]), **WINDOW), expected)
    tables = table(0, 12, R12)
    tables[0].LUTDescriptor = [4096, 0]
    path = dicom(tmp_path / "a.dcm", RAMP, 12, VOILUTSequence=tables)
    assert "LUT Descriptor (0028,3002) is [4096, 0], not three numbers" in rejected(path)


# ---- other elements


def test_display_by_quantiles_whatever_the_file_brings(tmp_path):
    stretched = decode.decode_grey(dicom(tmp_path / "a.dcm", RAMP, 12))
    wide = {"WindowCenter": 32768, "WindowWidth": 65536}
    for fields in (wide, {"VOILUTSequence": table(0, 16, R12)}):
        path = dicom(tmp_path / "b.dcm", RAMP, 12, **fields)
        assert np.array_equal(decode.decode_grey(path, display="quantile"), stretched)
        assert not np.array_equal(decode.decode_grey(path), stretched)
    dim = dicom(tmp_path / "c.dcm", GRADIENT // 2 + 50, 8)
    assert decode.decode_grey(dim).tolist() == (GRADIENT // 2 + 50).tolist()
    assert decode.decode_grey(dim, display="quantile").max() == 255


@pytest.mark.parametrize(("signs", "value"), [("US", 63536), ("SS", -2000)])
def test_padding_of_signed_pixels_in_either_sign(tmp_path, signs, value):
    pixels = RAMP.astype(np.int16) - np.int16(1000)
    pixels[:8] = -2000
    path = dicom(tmp_path / "a.dcm", pixels, 16)
    data = pydicom.dcmread(path)
    data.add_new("PixelPaddingValue", signs, value)
    data.save_as(path)
    got = decode.decode_grey(path).ravel()
    assert got[: 8 * 64].max() == 0
    assert got[8 * 64] == 0  # the darkest of the image, which the padding no longer stretches
    assert abs(int(got[(512 + 4095) // 2]) - 127) <= 1


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"RescaleSlope": 2}, 2 * R12),
        ({"RescaleSlope": "", "RescaleIntercept": -100}, R12 - 100),
        ({"RescaleSlope": -1, "RescaleIntercept": 4095}, 4095 - R12),
        ({"RescaleSlope": "", "RescaleIntercept": ""}, R12),
    ],
)
def test_a_rescale_of_which_a_part_is_missing(tmp_path, fields, expected):
    got = decode.decode_grey(dicom(tmp_path / "a.dcm", RAMP, 12, **fields, **WINDOW)).ravel()
    assert np.array_equal(got, np.rint(np.clip(expected * 255 / 4095, 0, 255)))


@pytest.mark.parametrize("function", ["LINEAR", "", "NONSENSE"])
def test_a_window_function_that_is_none_is_linear(tmp_path, function):
    expected = decode.decode_grey(dicom(tmp_path / "a.dcm", RAMP, 12, **WINDOW))
    path = dicom(tmp_path / "b.dcm", RAMP, 12, VOILUTFunction=function, **WINDOW)
    assert np.array_equal(decode.decode_grey(path), expected)


@pytest.mark.parametrize("name", ["Rows", "BitsStored", "NumberOfFrames", "SamplesPerPixel"])
def test_elements_of_several_values_or_none(tmp_path, name):
    expected = decode.decode_grey(dicom(tmp_path / "a.dcm", RAMP, 12, **WINDOW))
    value = {"Rows": 64, "BitsStored": 12}.get(name, 1)
    path = dicom(tmp_path / "b.dcm", RAMP, 12, **{name: [value, value]}, **WINDOW)
    assert np.array_equal(decode.decode_grey(path), expected)
    path = dicom(tmp_path / "b.dcm", RAMP, 12, **{name: None}, **WINDOW)
    if name == "Rows":
        assert rejected(path) == "64 x 0 pixels"
    else:
        assert np.array_equal(decode.decode_grey(path), expected)


@pytest.mark.filterwarnings("ignore:Invalid value for VR DS")
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"RescaleSlope": 0}, "DICOM element (0028,1053) Rescale Slope is 0"),
        (
            {"RescaleSlope": "nan"},
            "broken or truncated: DICOM element (0028,1053) Rescale Slope: the value is nan",
        ),
        (
            {"WindowCenter": 9, "WindowWidth": 2},
            "the file's own window or look-up table gives every pixel the value 255: "
            "set --config.ingest.display=quantile to ignore it",
        ),
        ({"BitsStored": 20}, "DICOM pixels of 20 bits in words of 16, not 1 to 16 bit grey"),
        ({"PixelData": b""}, "broken or truncated: a DICOM file without PixelData"),
    ],
)
def test_elements_that_make_no_picture_are_named(tmp_path, fields, reason):
    assert rejected(dicom(tmp_path / "a.dcm", RAMP + np.uint16(100), 16, **fields)) == reason


def test_frames_and_files_that_hold_something_else(tmp_path):
    stream = io.BytesIO()
    Image.fromarray(GRADIENT).convert("RGB").save(stream, "JPEG")
    path = dicom(tmp_path / "a.dcm", GRADIENT, 8, uid.JPEGBaseline8Bit, stream.getvalue())
    name = "JPEG Baseline (Process 1) (1.2.840.10008.1.2.4.50)"
    reason = "the frame does not hold 32 x 8 grey pixels of 8 bits"
    assert rejected(path) == f"broken or truncated: DICOM pixels in {name}: {reason}"
    data = pydicom.dcmread(dicom(path, RAMP, 12))
    del data.PixelData
    data.FloatPixelData = RAMP.astype(np.float32).tobytes()
    data.save_as(path)
    assert rejected(path) == "a DICOM file of floating-point pixels, not grey levels"
