"""Image files of every kind that is read, and of every kind that must be rejected."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from medsyn_jax.core.errors import RejectedRecord
from medsyn_jax.data.images import decode

GRADIENT = np.arange(256, dtype=np.uint8).reshape(8, 32)


def saved(path, image: Image.Image | np.ndarray, **options):
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    picture.save(path, **options)
    return path


def rejected(path) -> str:
    with pytest.raises(RejectedRecord) as caught:
        decode.decode_grey(path)
    reason = str(caught.value)
    assert reason.startswith(f"{path}: ")
    assert "\n" not in reason
    return reason.removeprefix(f"{path}: ")


def test_8_bit_values_stay(tmp_path):
    for name in ("a.png", "a.bmp", "a.tif"):
        assert np.array_equal(decode.decode_grey(saved(tmp_path / name, GRADIENT)), GRADIENT)
    smooth = np.tile(np.arange(64, dtype=np.uint8) * 3, (64, 1))
    jpeg = decode.decode_grey(str(saved(tmp_path / "a.jpg", smooth, quality=95)))
    assert np.abs(jpeg.astype(int) - smooth).max() <= 3


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_16_bit_is_scaled_by_its_depth(tmp_path, bits):
    top = (1 << bits) - 1
    deep = np.array([[0, top // 2, top - 1, top]], np.uint16)
    got = decode.decode_grey(saved(tmp_path / "a.png", deep))
    assert got.tolist() == [[0, 127, 255, 255]]  # the brightest never wraps to 0


def test_bits_of_a_source_hold_for_its_dim_images_too(tmp_path):
    dim = saved(tmp_path / "dim.png", np.array([[0, 500, 1000]], np.uint16))
    assert decode.decode_grey(dim).tolist() == [[0, 125, 249]]  # taken for 10 bits
    assert decode.decode_grey(dim, bits=12).tolist() == [[0, 31, 62]]
    with pytest.raises(RejectedRecord, match=r"dim\.png: a pixel of 1000, more than ingest.bits=9"):
        decode.decode_grey(dim, bits=9)
    assert decode.decode_grey(saved(tmp_path / "8.png", GRADIENT), bits=12).max() == GRADIENT.max()


def test_16_bit_keeps_a_dim_picture_dim(tmp_path):
    got = decode.decode_grey(saved(tmp_path / "a.png", np.array([[0, 1500]], np.uint16)))
    assert got.tolist() == [[0, round(1500 * 255 / 4095)]]
    shallow = decode.decode_grey(saved(tmp_path / "a.png", np.array([[3, 200]], np.uint16)))
    assert shallow.tolist() == [[3, 200]]


def test_16_bit_big_endian_tiff_and_32_bit(tmp_path):
    big = Image.frombytes("I;16B", (2, 1), struct.pack(">HH", 0, 65535))
    assert decode.decode_grey(saved(tmp_path / "a.tif", big)).tolist() == [[0, 255]]
    wide = saved(tmp_path / "b.tif", np.array([[0, 65535]], np.int32))
    assert decode.decode_grey(wide).tolist() == [[0, 255]]
    saved(wide, np.array([[-5, 65535]], np.int32))
    assert rejected(wide) == "pixels from -5 to 65535, not 16 bit grey"


def test_white_is_zero_in_a_16_bit_tiff(tmp_path):
    path = saved(tmp_path / "a.tif", np.array([[0, 1000, 4095]], np.uint16))
    entry = struct.pack("<HHI", 262, 3, 1)  # PhotometricInterpretation: black is zero
    content = path.read_bytes()
    assert content.count(entry + b"\1\0") == 1
    path.write_bytes(content.replace(entry + b"\1\0", entry + b"\0\0"))
    assert decode.decode_grey(path).tolist() == [[255, 255 - 62, 0]]


def png(shape, depth: int, kind: int, rows: bytes) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + check

    head = struct.pack(">IIBBBBB", *shape[::-1], depth, kind, 0, 0, 0)
    chunks = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize(("kind", "samples"), [(4, 2), (2, 3)])
def test_16_bit_with_alpha_or_colour(tmp_path, kind, samples):
    """Pillow reads the upper 8 bits of each: right for 16 bits in use, all but black for 12."""
    grey = np.arange(256).reshape(16, 16)

    def file(values):
        pixels = np.repeat(values[..., None], samples, -1)
        pixels[..., samples - 1] = 65535 if kind == 4 else values
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
        (tmp_path / "a.png").write_bytes(png(values.shape, 16, kind, rows))
        return tmp_path / "a.png"

    assert np.array_equal(decode.decode_grey(file(grey * 257)), grey)
    reason = "16-bit colour or alpha with unused bits: save it as 16-bit grey"
    assert rejected(file(grey * 16)) == reason
    with pytest.raises(RejectedRecord, match=reason):
        decode.decode_grey(file(grey * 257), bits=12)


def test_one_bit(tmp_path):
    path = saved(tmp_path / "a.png", Image.fromarray(GRADIENT > 99))
    assert np.array_equal(decode.decode_grey(path), np.where(GRADIENT > 99, 255, 0))


def test_palette_even_an_inverted_one(tmp_path):
    picture = Image.frombytes("P", (32, 8), GRADIENT.tobytes())
    picture.putpalette([255 - level for level in range(256) for _ in range(3)])
    path = saved(tmp_path / "a.png", picture)
    assert np.array_equal(decode.decode_grey(path), 255 - GRADIENT)
    saved(path, picture, transparency=bytes([0] * 100 + [255] * 156))  # per palette entry
    assert np.array_equal(
        decode.decode_grey(path), np.where(GRADIENT < 100, 0, 255 - GRADIENT.astype(int))
    )


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparent_parts_are_black(tmp_path, mode):
    picture = Image.fromarray(GRADIENT).convert(mode)
    alpha = np.zeros((8, 32), np.uint8)
    alpha[:, 8:], alpha[:, 16:] = 128, 255
    picture.putalpha(Image.fromarray(alpha))
    got = decode.decode_grey(saved(tmp_path / "a.png", picture))
    assert np.abs(got - GRADIENT * (alpha / 255.0)).max() <= 1
    assert got[:, :8].max() == 0


def test_colour_and_cmyk(tmp_path):
    colours = np.zeros((8, 8, 3), np.uint8)
    colours[:, :4] = (255, 255, 255)
    colours[:4, 4:] = (0, 255, 0)
    rgb = decode.decode_grey(saved(tmp_path / "a.png", colours))
    assert [rgb[0, 0], rgb[7, 7], rgb[0, 7]] == [255, 0, 150]
    cmyk = Image.fromarray(GRADIENT.repeat(8, 0)).convert("RGB").convert("CMYK")
    got = decode.decode_grey(saved(tmp_path / "a.jpg", cmyk, quality=95))
    assert np.abs(got.astype(int) - GRADIENT.repeat(8, 0)).max() <= 8


def test_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    path = saved(tmp_path / "a.png", GRADIENT, exif=exif)
    assert np.array_equal(decode.decode_grey(path), np.rot90(GRADIENT, -1))
    saved(path, GRADIENT, exif=b"Exif\0\0 nonsense")
    assert np.array_equal(decode.decode_grey(path), GRADIENT)


def test_the_size_of_an_image_is_that_of_its_decoded_pixels(tmp_path):
    exif = Image.Exif()
    for exif[0x0112] in range(1, 9):
        path = saved(tmp_path / "a.png", GRADIENT[:, :5], exif=exif)
        assert decode.size(path) == decode.decode_grey(path).shape[::-1]
    path.write_bytes(b"no image")
    with pytest.raises(RejectedRecord, match=r"^not a PNG, JPEG, TIFF or BMP file$"):
        decode.size(path)


def test_large_jpeg_may_be_decoded_smaller(tmp_path):
    path = saved(tmp_path / "a.jpg", np.tile(np.arange(250, dtype=np.uint8), (400, 4)))
    assert decode.decode_grey(path).shape == (400, 1000)
    assert decode.decode_grey(path, at_least=100).shape == (100, 250)
    assert decode.decode_grey(path, at_least=101).shape == (200, 500)
    assert decode.decode_grey(path, at_least=500).shape == (400, 1000)


# ---- pictures that must be rejected


def test_missing_empty_and_not_an_image(tmp_path):
    assert rejected(tmp_path / "none.png") == "no such file"
    assert "directory" in rejected(tmp_path)
    with pytest.raises(
        RejectedRecord, match=r"a\\0b\.png: no file has a name with a NUL character"
    ):
        decode.decode_grey(f"{tmp_path}/a\0b.png")
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
    path = tmp_path / "bomb.png"
    path.write_bytes(png((side, side), 8, 0, bytes(1000)))
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


def test_real_pictures(shared_data):
    for folder, suffix in (("covid_pairs/images", "png"), ("kermany224/test", "jpeg")):
        paths = sorted((shared_data / folder).rglob(f"*.{suffix}"))[::40]
        assert paths
        for path in paths:
            with Image.open(path) as picture:
                assert np.array_equal(decode.decode_grey(path), np.asarray(picture.convert("L")))


# ---- fitting and encoding


def test_square_pads_with_black_and_keeps_the_proportions():
    tall = decode.square(np.full((200, 100), 200, np.uint8), 64)
    assert tall.shape == (64, 64)
    assert np.array_equal(np.unique(tall), [0, 200])
    assert np.array_equal(np.flatnonzero(tall[32]), np.arange(16, 48))
    wide = decode.square(np.full((3, 1000), 9, np.uint8), 32)
    assert np.array_equal(np.flatnonzero(wide[:, 5]), [15])
    assert decode.square(np.full((5, 3), 9, np.uint8), 10).sum() == 9 * 60
    same = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(decode.square(same, 16), same)


@pytest.mark.parametrize("turned", [False, True])
def test_square_crops_stretches_or_continues_the_edge(turned):
    def square(how):
        fitted = decode.square(image.T if turned else image, 64, how)
        assert fitted.shape == (64, 64)
        return fitted.T if turned else fitted

    image = np.repeat(np.arange(50, 250, dtype=np.uint8)[:, None], 100, 1)  # 200 x 100, a ramp
    image[:, :10], image[:, 90:] = 5, 9  # its two sides
    crop = square("crop")  # rows 50 to 150, all columns
    assert np.abs(crop[:, 32] - np.linspace(100, 200, 65)[:-1]).max() < 2
    assert crop[32, 3] == 5
    assert crop[32, 60] == 9
    stretched = square("stretch")  # all rows, all columns
    assert np.abs(stretched[:, 32] - np.linspace(50, 250, 65)[:-1]).max() < 3
    assert stretched[32, 3] == 5
    assert stretched[32, 60] == 9
    edge, pad = square("edge"), square("pad")
    assert np.array_equal(edge[:, 16:48], pad[:, 16:48])
    assert np.array_equal(edge[:, :16], edge[:, 16:17].repeat(16, 1))
    assert np.array_equal(edge[:, 48:], edge[:, 47:48].repeat(16, 1))
    assert pad[:, :16].max() == pad[:, 48:].max() == 0


def test_resizing_is_antialiased():
    stripes = np.zeros((512, 512), np.uint8)
    stripes[:, ::2] = 255
    small = decode.square(stripes, 64).astype(int)
    assert np.abs(small - 127.5).max() < 3


def test_encode_png():
    with Image.open(io.BytesIO(decode.encode_png(GRADIENT))) as picture:
        assert picture.mode == "L"
        assert np.array_equal(np.asarray(picture), GRADIENT)
    with pytest.raises(TypeError, match="float64"):
        decode.encode_png(GRADIENT / 255)
