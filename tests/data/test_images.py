"""Every kind of picture that becomes a radiograph, and every kind that must not."""

import io
import struct
import zlib

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian

from medsyn_jax.core.errors import RejectedRecord
from medsyn_jax.data import images

GRADIENT = np.arange(256, dtype=np.uint8).reshape(8, 32)


def saved(path, image: Image.Image | np.ndarray, **options):
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    picture.save(path, **options)
    return path


def rejected(path) -> str:
    with pytest.raises(RejectedRecord) as caught:
        images.decode_grey(path)
    reason = str(caught.value)
    assert reason.startswith(f"{path}: ")
    assert "\n" not in reason
    return reason.removeprefix(f"{path}: ")


def test_8_bit_values_stay(tmp_path):
    for name in ("a.png", "a.bmp", "a.tif"):
        assert np.array_equal(images.decode_grey(saved(tmp_path / name, GRADIENT)), GRADIENT)
    smooth = np.tile(np.arange(64, dtype=np.uint8) * 3, (64, 1))
    jpeg = images.decode_grey(str(saved(tmp_path / "a.jpg", smooth, quality=95)))
    assert np.abs(jpeg.astype(int) - smooth).max() <= 3


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_16_bit_is_scaled_by_its_depth(tmp_path, bits):
    top = (1 << bits) - 1
    deep = np.array([[0, top // 2, top - 1, top]], np.uint16)
    got = images.decode_grey(saved(tmp_path / "a.png", deep))
    assert got.tolist() == [[0, 127, 255, 255]]  # the brightest never wraps to 0


def test_bits_of_a_source_hold_for_its_dim_images_too(tmp_path):
    dim = saved(tmp_path / "dim.png", np.array([[0, 500, 1000]], np.uint16))
    assert images.decode_grey(dim).tolist() == [[0, 125, 249]]  # taken for 10 bits
    assert images.decode_grey(dim, bits=12).tolist() == [[0, 31, 62]]
    with pytest.raises(RejectedRecord, match=r"dim\.png: a pixel of 1000, more than ingest.bits=9"):
        images.decode_grey(dim, bits=9)
    assert images.decode_grey(saved(tmp_path / "8.png", GRADIENT), bits=12).max() == GRADIENT.max()


def test_16_bit_keeps_a_dim_picture_dim(tmp_path):
    got = images.decode_grey(saved(tmp_path / "a.png", np.array([[0, 1500]], np.uint16)))
    assert got.tolist() == [[0, round(1500 * 255 / 4095)]]
    shallow = images.decode_grey(saved(tmp_path / "a.png", np.array([[3, 200]], np.uint16)))
    assert shallow.tolist() == [[3, 200]]


def test_16_bit_big_endian_tiff_and_32_bit(tmp_path):
    big = Image.frombytes("I;16B", (2, 1), struct.pack(">HH", 0, 65535))
    assert images.decode_grey(saved(tmp_path / "a.tif", big)).tolist() == [[0, 255]]
    wide = saved(tmp_path / "b.tif", np.array([[0, 65535]], np.int32))
    assert images.decode_grey(wide).tolist() == [[0, 255]]
    saved(wide, np.array([[-5, 65535]], np.int32))
    assert rejected(wide) == "pixels from -5 to 65535, not 16 bit grey"


def test_one_bit(tmp_path):
    path = saved(tmp_path / "a.png", Image.fromarray(GRADIENT > 99))
    assert np.array_equal(images.decode_grey(path), np.where(GRADIENT > 99, 255, 0))


def test_palette_even_an_inverted_one(tmp_path):
    picture = Image.frombytes("P", (32, 8), GRADIENT.tobytes())
    picture.putpalette([255 - level for level in range(256) for _ in range(3)])
    path = saved(tmp_path / "a.png", picture)
    assert np.array_equal(images.decode_grey(path), 255 - GRADIENT)
    saved(path, picture, transparency=bytes([0] * 100 + [255] * 156))  # per palette entry
    assert np.array_equal(
        images.decode_grey(path), np.where(GRADIENT < 100, 0, 255 - GRADIENT.astype(int))
    )


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparent_parts_are_black(tmp_path, mode):
    picture = Image.fromarray(GRADIENT).convert(mode)
    alpha = np.zeros((8, 32), np.uint8)
    alpha[:, 8:], alpha[:, 16:] = 128, 255
    picture.putalpha(Image.fromarray(alpha))
    got = images.decode_grey(saved(tmp_path / "a.png", picture))
    assert np.abs(got - GRADIENT * (alpha / 255.0)).max() <= 1
    assert got[:, :8].max() == 0


def test_colour_and_cmyk(tmp_path):
    colours = np.zeros((8, 8, 3), np.uint8)
    colours[:, :4] = (255, 255, 255)
    colours[:4, 4:] = (0, 255, 0)
    rgb = images.decode_grey(saved(tmp_path / "a.png", colours))
    assert [rgb[0, 0], rgb[7, 7], rgb[0, 7]] == [255, 0, 150]
    cmyk = Image.fromarray(GRADIENT.repeat(8, 0)).convert("RGB").convert("CMYK")
    got = images.decode_grey(saved(tmp_path / "a.jpg", cmyk, quality=95))
    assert np.abs(got.astype(int) - GRADIENT.repeat(8, 0)).max() <= 8


def test_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    path = saved(tmp_path / "a.png", GRADIENT, exif=exif)
    assert np.array_equal(images.decode_grey(path), np.rot90(GRADIENT, -1))
    saved(path, GRADIENT, exif=b"Exif\0\0 nonsense")
    assert np.array_equal(images.decode_grey(path), GRADIENT)


def test_large_jpeg_may_be_decoded_smaller(tmp_path):
    path = saved(tmp_path / "a.jpg", np.tile(np.arange(250, dtype=np.uint8), (400, 4)))
    assert images.decode_grey(path).shape == (400, 1000)
    assert images.decode_grey(path, at_least=100).shape == (100, 250)
    assert images.decode_grey(path, at_least=101).shape == (200, 500)
    assert images.decode_grey(path, at_least=500).shape == (400, 1000)


# ---- pictures that must be rejected


def test_missing_empty_and_not_an_image(tmp_path):
    assert rejected(tmp_path / "none.png") == "no such file"
    assert "directory" in rejected(tmp_path)
    for name, content, reason in [
        ("empty.png", b"", "the file is empty (0 bytes)"),
        ("text.png", b"not a picture" * 30, "not a PNG, JPEG, TIFF, BMP or DICOM file"),
        ("text.dcm", b"not a picture" * 30, "not a DICOM file"),
    ]:
        (tmp_path / name).write_bytes(content)
        assert rejected(tmp_path / name) == reason


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.bmp"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_truncated_files(tmp_path, name, share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    path = saved(tmp_path / name, noise)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert rejected(path).startswith(("broken or truncated: ", "not a PNG"))


def test_flipped_bits_are_found(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    path = saved(tmp_path / "a.png", noise)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    assert rejected(path).startswith("broken or truncated: ")


@pytest.mark.parametrize(
    ("side", "reason"),
    [(9500, "9500 x 9500 pixels: more than 80 million"), (10**6, "more than 80 million pixels")],
)
def test_absurd_size_is_rejected_before_it_is_decoded(tmp_path, side, reason):
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    path = tmp_path / "bomb.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )
    assert rejected(path) == reason


def test_wrong_mode_and_frames(tmp_path):
    path = saved(tmp_path / "a.tif", np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8))
    assert rejected(path) == "pixels of mode 'F', not 8 or 16 bit grey or colour"
    frame = Image.fromarray(GRADIENT)
    frame.save(path, save_all=True, append_images=[Image.fromarray(255 - GRADIENT)])
    assert rejected(path) == "2 frames where one image is needed"


@pytest.mark.parametrize("value", [0, 7, 255])
def test_constant_image(tmp_path, value):
    path = saved(tmp_path / "a.png", np.full((16, 16), value, np.uint8))
    assert rejected(path) == f"every pixel has the value {value}"


# ---- DICOM


def dicom(path, pixels: np.ndarray, bits: int, **fields):
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
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
    data.PixelData = pixels.tobytes()
    for name, value in fields.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)
    return path


RAMP = (np.arange(4096, dtype=np.uint16)).reshape(64, 64)


def test_dicom_window(tmp_path):
    path = dicom(tmp_path / "a.dcm", RAMP, 12, WindowCenter=2048, WindowWidth=1024)
    got = images.decode_grey(path).ravel()
    assert got[0] == got[1536] == 0
    assert got[2559] == got[4095] == 255
    assert np.all(np.diff(got.astype(int)) >= 0)
    # PS3.3 C.11.2.1.2: ((x - (c - .5)) / (w - 1) + .5) * 255
    assert got[2000] == round(((2000 - 2047.5) / 1023 + 0.5) * 255)
    several = dicom(tmp_path / "b.dcm", RAMP, 12, WindowCenter=[2048, 9], WindowWidth=[1024, 9])
    assert np.array_equal(images.decode_grey(several).ravel(), got)
    exact = {"WindowCenter": 2048, "WindowWidth": 1024, "VOILUTFunction": "LINEAR_EXACT"}
    got = images.decode_grey(dicom(tmp_path / "c.dcm", RAMP, 12, **exact)).ravel()
    assert got[2000] == round(((2000 - 2048) / 1024 + 0.5) * 255)
    exact["VOILUTFunction"] = "SIGMOID"
    got = images.decode_grey(dicom(tmp_path / "d.dcm", RAMP, 12, **exact)).ravel()
    assert got[1000] == round(255 / (1 + np.exp(-4 * (1000 - 2048) / 1024)))


def test_dicom_monochrome1_is_inverted(tmp_path):
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    plain = images.decode_grey(dicom(tmp_path / "a.dcm", RAMP, 12, **window))
    window["PhotometricInterpretation"] = "MONOCHROME1"
    inverted = images.decode_grey(dicom(tmp_path / "b.dcm", RAMP, 12, **window))
    assert np.array_equal(inverted, 255 - plain)


def test_dicom_rescale_comes_before_the_window(tmp_path):
    pixels = (RAMP.astype(np.int32) - 2048).astype(np.int16)
    fields = {"RescaleSlope": 2, "RescaleIntercept": 100, "WindowCenter": 100, "WindowWidth": 201}
    got = images.decode_grey(dicom(tmp_path / "a.dcm", pixels, 12, **fields)).ravel()
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
    got = images.decode_grey(dicom(tmp_path / "a.dcm", RAMP, 12, **fields)).ravel()
    assert got[:1001].max() == 0
    assert got[3047:].min() == 255
    assert got[2000] == 1000 * 255 // 2047


def test_dicom_without_window(tmp_path):
    pixels = RAMP.copy()
    pixels[0, 0] = 65535  # a dead pixel must not darken the rest
    got = images.decode_grey(dicom(tmp_path / "a.dcm", pixels, 16)).ravel()
    assert got[0] == 255
    assert got[4090] == 255
    assert abs(int(got[2048]) - 127) <= 1
    bytes_ = images.decode_grey(dicom(tmp_path / "b.dcm", GRADIENT // 2, 8))
    assert np.array_equal(bytes_, GRADIENT // 2)
    two = np.zeros((64, 64), np.uint16)
    two[0, 0] = 900  # rarer than the quantiles see
    assert images.decode_grey(dicom(tmp_path / "c.dcm", two, 12)).max() == 255
    useless = {"WindowCenter": 40, "WindowWidth": 0}
    got = images.decode_grey(dicom(tmp_path / "d.dcm", RAMP, 12, **useless))
    assert (got.min(), got.max()) == (0, 255)


def test_dicom_padding_is_black_in_both_polarities(tmp_path):
    pixels = RAMP.copy()
    pixels[:8] = 4095
    for kind in ("MONOCHROME1", "MONOCHROME2"):
        fields = {"PhotometricInterpretation": kind, "PixelPaddingValue": 4095}
        got = images.decode_grey(dicom(tmp_path / "a.dcm", pixels, 12, **fields))
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
    expected = images.decode_grey(path)
    bare = tmp_path / "old.dcm"
    bare.write_bytes(path.read_bytes()[132:])  # without the preamble
    assert np.array_equal(images.decode_grey(bare), expected)
    saved(tmp_path / "a.png", GRADIENT).rename(tmp_path / "a.dcm")
    assert np.array_equal(images.decode_grey(tmp_path / "a.dcm"), GRADIENT)


def test_real_dicom(shared_data):
    got = images.decode_grey(shared_data / "formats" / "RG1_J2KI.dcm")
    assert got.shape == (1955, 1841)
    lung, spine = got[700:1000, 450:600].mean(), got[900:1200, 900:960].mean()
    assert lung < spine - 40  # MONOCHROME1 inverted: air is dark, bone is bright


def test_real_pictures(shared_data):
    for folder, suffix in (("covid_pairs/images", "png"), ("kermany224/test", "jpeg")):
        paths = sorted((shared_data / folder).rglob(f"*.{suffix}"))[::40]
        assert paths
        for path in paths:
            with Image.open(path) as picture:
                assert np.array_equal(images.decode_grey(path), np.asarray(picture.convert("L")))


# ---- fitting and encoding


def test_square_pads_with_black_and_keeps_the_proportions():
    tall = images.square(np.full((200, 100), 200, np.uint8), 64)
    assert tall.shape == (64, 64)
    assert np.array_equal(np.unique(tall), [0, 200])
    assert np.array_equal(np.flatnonzero(tall[32]), np.arange(16, 48))
    wide = images.square(np.full((3, 1000), 9, np.uint8), 32)
    assert np.array_equal(np.flatnonzero(wide[:, 5]), [15])
    assert images.square(np.full((5, 3), 9, np.uint8), 10).sum() == 9 * 60
    same = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(images.square(same, 16), same)


def test_resizing_is_antialiased():
    stripes = np.zeros((512, 512), np.uint8)
    stripes[:, ::2] = 255
    small = images.square(stripes, 64).astype(int)
    assert np.abs(small - 127.5).max() < 3


def test_encode_png():
    with Image.open(io.BytesIO(images.encode_png(GRADIENT))) as picture:
        assert picture.mode == "L"
        assert np.array_equal(np.asarray(picture), GRADIENT)
    with pytest.raises(TypeError, match="float64"):
        images.encode_png(GRADIENT / 255)
