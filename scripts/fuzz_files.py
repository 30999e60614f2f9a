"""Malformed images (PNG, JPEG, TIFF, BMP, DICOM) and tensors (safetensors) for `fuzz.py`."""

import io
import json
import struct
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import jax
import numpy as np
import pydicom
from flax import nnx
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless

from medsyn_jax.core import tree
from medsyn_jax.data.images import decode
from medsyn_jax.models import towers
from medsyn_jax.models.layers import split
from medsyn_jax.models.weights import convert
from scripts.fuzz_inputs import bent_bytes, bent_json, check, json_bytes

_SOUND: list[tuple[str, bytes]] = []  # sound pictures: suffix and content
_TENSORS: dict[str, tuple] = {}  # layout -> shapes, header, data

# --- images -------------------------------------------------------------------------------------

_MODES = ("L", "1", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr", "LAB", "HSV")


def images_prepare(folder: Path) -> None:
    """Make sound pictures of every format and mode, and DICOM files of several kinds."""
    grey = np.add.outer(np.arange(24), np.arange(16)).astype(np.uint8) * 6
    pictures = []
    for mode in _MODES:
        if mode == "I;16":
            picture = Image.fromarray(grey.astype(np.uint16) * 16)
        else:
            picture = Image.fromarray(grey).convert("RGB" if mode in ("LAB", "HSV") else "L")
            with suppress(ValueError):
                picture = picture.convert(mode)
        for suffix, options in (
            (".png", {}),
            (".jpg", {}),
            (".jpg", {"progressive": True, "exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"}),
            (".tif", {}),
            (".tif", {"compression": "tiff_lzw"}),
            (".tif", {"save_all": True, "append_images": [picture]}),
            (".bmp", {}),
            (".gif", {}),
        ):
            stream = io.BytesIO()
            with suppress(OSError, ValueError, KeyError):
                kinds = {
                    ".jpg": "JPEG",
                    ".tif": "TIFF",
                    ".png": "PNG",
                    ".bmp": "BMP",
                    ".gif": "GIF",
                }
                picture.save(stream, kinds[suffix], **options)
                pictures.append((suffix, stream.getvalue()))
    pictures += [(".dcm", dicom(Random(i))) for i in range(40)]
    _SOUND[:] = pictures


_TEXT_VALUES = (
    "",
    "x",
    "LINEAR",
    "SIGMOID",
    "MONOCHROME1",
    "MONOCHROME2",
    "RGB",
    "1\\2",
    "y" * 300,
)
_NUMBERS = (0, 1, -1, 2, 7, 8, 12, 16, 24, 255, 4096, 65535, 2**31 - 1)
_ELEMENTS = "Rows,Columns,BitsAllocated,BitsStored,HighBit,PixelRepresentation,SamplesPerPixel,"
_ELEMENTS += "PhotometricInterpretation,NumberOfFrames,WindowCenter,WindowWidth,VOILUTFunction,"
_ELEMENTS += "RescaleSlope,RescaleIntercept,PixelPaddingValue,PixelPaddingRangeLimit,"
_ELEMENTS += "PlanarConfiguration,SpecificCharacterSet,PixelData,VOILUTSequence,ModalityLUTSequence"


def dicom(rng: Random, odd: int = 0) -> bytes:
    """A DICOM file, raw or in JPEG 2000, with odd values in `odd` of its elements."""
    bits, signed = rng.choice((8, 10, 12, 16)), rng.random() < 0.3
    wide = 8 if bits == 8 else 16
    pixels = np.add.outer(np.arange(12), np.arange(10)) * ((1 << bits) // 24)
    pixels = (pixels - signed * (1 << (bits - 1))).astype(f"<{'i' if signed else 'u'}{wide // 8}")
    data = pydicom.Dataset()
    data.Rows, data.Columns, data.SamplesPerPixel = 12, 10, 1
    data.BitsAllocated, data.BitsStored, data.HighBit = wide, bits, bits - 1
    data.PixelRepresentation = int(signed)
    data.PhotometricInterpretation = rng.choice(("MONOCHROME1", "MONOCHROME2"))
    if rng.random() < 0.5:
        data.WindowCenter, data.WindowWidth = rng.choice(((100, 50), ([40, 9], [400, 2]), (0, 1)))
    if rng.random() < 0.3:
        data.RescaleSlope, data.RescaleIntercept = rng.choice((1, 2, "0.5")), rng.choice((0, -1024))
    if rng.random() < 0.3:
        table = pydicom.Dataset()
        table.LUTDescriptor = [rng.choice((0, 16, 256)), 0, rng.choice((8, 12, 16))]
        table["LUTDescriptor"].VR = table_vr = rng.choice(("US", "SS"))
        table.add_new("LUTData", rng.choice(("US", "OW", table_vr)), list(range(256)))
        if table["LUTData"].VR == "OW":
            table.LUTData = np.arange(256, dtype="<u2").tobytes()
        data.VOILUTSequence = [table]
    if rng.random() < 0.2:
        data.PixelPaddingValue = 0
    data.file_meta = FileMetaDataset()
    syntax = rng.choice((ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless))
    data.file_meta.TransferSyntaxUID = syntax
    data.file_meta.MediaStorageSOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    data.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    data.PixelData = pixels.tobytes()
    if syntax == JPEG2000Lossless:
        stream = io.BytesIO()
        Image.fromarray(pixels.view(f"u{wide // 8}")).save(stream, "JPEG2000", no_jp2=True)
        data.PixelData = encapsulate([stream.getvalue()])
    data["PixelData"].VR = "OW" if syntax == ImplicitVRLittleEndian else "OB"
    for _ in range(odd):
        _bend_element(rng, data)
    stream = io.BytesIO()
    data.save_as(stream, enforce_file_format=rng.random() < 0.9 or odd == 0)
    return stream.getvalue()


def _bend_element(rng: Random, data: pydicom.Dataset) -> None:
    name, ignore = rng.choice(_ELEMENTS.split(",")), pydicom.config.IGNORE
    if rng.random() < 0.15:
        data.file_meta = FileMetaDataset() if rng.random() < 0.5 else data.file_meta
        if rng.random() < 0.5:
            data.file_meta.TransferSyntaxUID = rng.choice(("1.2.840.10008.1.2.5", "1.2.3", ""))
    elif rng.random() < 0.2 and name in data:
        del data[name]
    elif "Sequence" in name and name in data:
        _bend_lut(rng, data[name][0])
    else:
        vr = pydicom.datadict.dictionary_VR(name).split(" ")[0]
        vr = rng.choice((vr, vr, "LO", "US", "DS", "SS"))
        number = rng.choice(_NUMBERS)
        value: Any = rng.choice(_TEXT_VALUES) if vr in ("CS", "LO") else number
        value = rng.choice((value, [value] * rng.choice((0, 1, 3))))
        value = {"OB": b"x" * 7, "OW": b"x" * 8, "SQ": []}.get(vr, value)
        data.add(pydicom.DataElement(name, vr, value, validation_mode=ignore))


def _bend_lut(rng: Random, table: pydicom.Dataset) -> None:
    entries = rng.choice(_NUMBERS) & 0xFFFF
    table.LUTDescriptor = [entries, rng.choice((0, 5, 4096)), rng.choice((0, 1, 8, 12, 16, 99))]
    table["LUTDescriptor"].VR = "US"
    if rng.random() < 0.5:
        table.add_new("LUTData", "US", rng.choices(range(65536), k=rng.choice((1, 2, 16))))
    if rng.random() < 0.2:
        del table[rng.choice(("LUTData", "LUTDescriptor"))]


def image_case(rng: Random, folder: Path) -> None:
    suffix, data = rng.choice(_SOUND)
    if rng.random() < 0.3:
        with suppress(Exception):  # pydicom does not write every odd value
            suffix, data = ".dcm", dicom(rng, odd=rng.choice((1, 1, 2, 4)))
    if rng.random() < 0.6:
        data = bent_bytes(rng, data)
    path = folder / f"a{rng.choice((suffix, suffix, suffix, '.dcm', '.jpg', ''))}"
    path.write_bytes(data)
    grey = decode.decode_grey(path, rng.choice((0, 0, 8, 64)), rng.choice((0, 0, 0, 8, 12, 16)))
    check(grey.dtype == np.uint8 and grey.ndim == 2, "no grey image", (grey.dtype, grey.shape))
    check(grey.min() < grey.max(), "an image of one value")
    decode.encode_png(decode.square(grey, 8))


# --- tensors ------------------------------------------------------------------------------------

_TOWERS: dict[str, dict[str, Any]] = {
    "torchvision": {"kind": "resnet", "depths": (1, 1, 1, 1), "width": 2, "block": "basic"}
    | {"channels": 1, "stem": "7x7", "remat": False},
    "hf_vit": {"kind": "vit", "size": 8, "patch": 4, "width": 4, "layers": 2, "heads": 2}
    | {"mlp_width": 4, "channels": 1, "eps": 1e-6, "remat": False},
    "hf_bert": {"width": 4, "layers": 2, "heads": 2, "mlp_width": 4, "max_length": 8, "types": 2}
    | {"dropout": 0.0, "eps": 1e-12, "remat": False},
}
_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "U64": 64, "U32": 32}
_BITS |= {"I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "C64": 64, "F4": 4, "F6_E2M3": 6}
_BITS |= dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "X", ""), 8)
_EXTRA = ("head.weight", "decoder_blocks.0.norm1.weight", "cls.predictions.bias", "a\nb", "z" * 900)
_CONFIG = {"model_type": "bert", "num_attention_heads": 2, "hidden_act": "gelu", "hidden_size": 4}
_CONFIG |= {"layer_norm_eps": 1e-12, "num_hidden_layers": 2, "image_size": 8, "patch_size": 4}
_CONFIG |= {"intermediate_size": 4, "architectures": ["BertModel"], "auto_map": {}}


def tensors_prepare(folder: Path) -> None:
    for layout, settings in _TOWERS.items():

        def make(layout: str = layout, settings: dict[str, Any] = settings) -> nnx.Module:
            if layout == "hf_bert":
                return towers.text_encoder(settings, 11, np.float32, nnx.Rngs(0))
            return towers.image_encoder(settings, np.float32, nnx.Rngs(0))

        like = split(nnx.eval_shape(make))[1:]
        zeros = jax.tree.map(lambda s: np.zeros(s.shape, np.float32), like)
        path = folder / f"{layout}.safetensors"
        convert.save(path, layout, *zeros)
        data = path.read_bytes()
        end = 8 + struct.unpack("<Q", data[:8])[0]
        _TENSORS[layout] = (like, json.loads(data[8:end]), data[end:])


def tensor_case(rng: Random, folder: Path) -> None:
    layout = rng.choice(list(_TOWERS))
    like, header, data = _TENSORS[layout]
    path = folder / rng.choice(("model.safetensors",) * 9 + ("a.bin",))
    path.write_bytes(_bent_tensors(rng, header, data))
    if rng.random() < 0.25:
        names = {key: path.name for key in header if key != "__metadata__"}
        index = bent_json(rng, {"metadata": {"total_size": 1}, "weight_map": names})
        index_file = folder / f"{path.stem}.safetensors.index.json"
        index_file.write_bytes(json_bytes(rng, index))
        path = index_file
    if rng.random() < 0.3:
        for name in ("config.json", "preprocessor_config.json"):
            (folder / name).write_bytes(json_bytes(rng, bent_json(rng, _CONFIG)))
        path = folder
    layers = rng.choice((None, None, 1))
    loaded = convert.load(path, rng.choice(("", layout)), *like, layers=layers, report=str)
    for arrays, wanted in zip(loaded, like, strict=True):
        shapes = {name: leaf.shape for name, leaf in tree.named(arrays).items()}
        check(shapes == {n: x.shape for n, x in tree.named(wanted).items()}, "other shapes", shapes)
        kinds = {leaf.dtype for leaf in tree.named(arrays).values()}
        check(kinds <= {np.dtype(np.float32)}, "other types", kinds)


def _bent_tensors(rng: Random, header: dict[str, Any], data: bytes) -> bytes:
    """A file with tensors of other types, shapes or names, a malformed header, or altered bytes."""
    header, length = json.loads(json.dumps(header)), None
    how = rng.randrange(8)
    if how < 5:
        header, data = _other_tensors(rng, header)
    elif how == 5:
        header = bent_json(rng, header)
    elif how == 6:
        length = rng.choice((0, 1, 2**20, 2**40, 2**63))
    text = json_bytes(rng, header) if how == 5 else json.dumps(header).encode()
    whole = struct.pack("<Q", len(text) if length is None else length) + text + data
    return bent_bytes(rng, whole) if how == 7 else whole


def _other_tensors(rng: Random, header: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    tensors = [(k, e["dtype"], e["shape"]) for k, e in header.items() if k != "__metadata__"]
    to, share = rng.choice(list(_BITS)), rng.choice((0, 0.1, 1))
    bent, offset = {}, 0
    for name, dtype, shape in tensors:
        dtype = to if rng.random() < share else dtype
        if rng.random() < 0.02:
            name, shape = rng.choice((name, name + "2")), rng.choice(([], [0], [*shape, 1], [2, 3]))
        size = -(-int(np.prod(shape)) * _BITS[dtype] // 8)
        bent[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    if rng.random() < 0.3:
        entry = {"dtype": "F32", "shape": [], "data_offsets": [offset, offset + 4]}
        bent[rng.choice(_EXTRA)], offset = entry, offset + 4
    return bent, bytes(offset)
