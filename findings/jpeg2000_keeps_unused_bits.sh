#!/usr/bin/env bash
# A 16-bit DICOM word that holds a 12-bit pixel may carry anything in the other four bits, for
# example an old overlay. pydicom's `correct_unused_bits`, on by default, clears these bits.
# One would guess: a 12-bit image gives the same array after any lossless compression.
# What happens: raw and RLE pixels are clean. JPEG 2000 and JPEG-LS with a 16-bit codestream keep the
# overlay, and signed pixels whose sign was not extended have their halves exchanged: -1 becomes
# 4095. There is no warning.
# Why it matters: archives recompress raw radiographs as JPEG 2000. An overlay of a marker is then
# brighter than bone (4096 and more beside at most 4095), a window turns the overlay white, and
# signed images look as in no viewer. Shift left and right by BitsAllocated - BitsStored yourself.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pydicom==3.0.2 pylibjpeg==2.1.0 pylibjpeg-openjpeg==2.6.0 \
  pyjpegls==1.5.1 numpy==2.4.6 pillow==12.0.0
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import jpeg_ls
import numpy as np
from openjpeg.utils import encode_array
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate

for name in ("pydicom", "pylibjpeg-openjpeg", "pyjpegls", "numpy"):
    print(name, version(name))


def decoded(words, signed, way):
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    data.SOPClassUID, data.SOPInstanceUID = uid.ComputedRadiographyImageStorage, "1.2.3"
    data.Rows, data.Columns = words.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 12, 11
    data.PixelRepresentation = int(signed)
    data.PixelData = words.tobytes()
    if way == "RLE":
        data.compress(uid.RLELossless, generate_instance_uid=False)
    elif way != "raw":
        j2k = way == "JPEG 2000"
        data.file_meta.TransferSyntaxUID = uid.JPEG2000Lossless if j2k else uid.JPEGLSLossless
        frame = encode_array(words, bits_stored=16) if j2k else jpeg_ls.encode_pixel_data(
            words.tobytes(), rows=64, columns=64, bits_stored=16, samples_per_pixel=1
        )
        data.PixelData = encapsulate([bytes(frame)])
        data["PixelData"].is_undefined_length = True
    return data.pixel_array


values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
overlay = np.where(np.arange(64) < 8, 1 << 12, 0).astype(np.uint16)
signed = (values.astype(np.int16) - 2048) & 4095  # 12 bits of two's complement, zeros above
seen = {}
for way in ("raw", "RLE", "JPEG 2000", "JPEG-LS"):
    got = decoded(values | overlay, False, way)
    halves = decoded(signed.astype(np.uint16), True, way)
    kept = "cleared" if np.array_equal(got, values) else "kept"
    assert kept == "cleared" or np.array_equal(got, values | overlay)
    seen[way] = (kept, int(halves.min()), int(halves.max()))
    print(f"{way}: overlay {kept}; signed -2048..2047 as {seen[way][1:]}")
assert seen["raw"] == seen["RLE"] == ("cleared", -2048, 2047), seen
assert seen["JPEG 2000"] == seen["JPEG-LS"] == ("kept", 0, 4095), seen
PYTHON
