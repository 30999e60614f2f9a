"""Radiographs from files to grey uint8 arrays."""

import io

import numpy as np
from PIL import Image

from medsyn_jax.core.errors import RejectedRecord


def decode_grey(path: str, at_least: int = 0) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("L"))
    except OSError as error:
        raise RejectedRecord(f"{path}: {error}") from None


def square(image: np.ndarray, size: int) -> np.ndarray:
    side = max(image.shape)
    canvas = Image.new("L", (side, side))
    canvas.paste(Image.fromarray(image), ((side - image.shape[1]) // 2, (side - image.shape[0]) // 2))
    return np.asarray(canvas.resize((size, size), Image.Resampling.LANCZOS))


def encode_png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()
