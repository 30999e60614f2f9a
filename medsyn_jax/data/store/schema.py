"""The record schema: the fields of a stored record, as TFDS features and as bytes."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tensorflow_datasets.proto import tf_example_pb2

TEXTS = ("key", "subject", "report", "findings", "impression", "view")
ORIGIN = ("prompt", "seed", "generator")  # texts: what a synthetic image was made from
OPTIONAL = ("boxes", "latents", *ORIGIN)  # and any mask_<name>


def is_mask(name: str) -> bool:
    """Whether a field of a record is a mask: any `mask_<name>`, 0 or 255."""
    return re.fullmatch(r"mask_\w+", name) is not None


def is_image(name: str) -> bool:
    """Whether a field of a record holds pixels."""
    return name == "image" or is_mask(name)


def features(
    label_names: Sequence[str], optional: Sequence[str] = ()
) -> tfds.features.FeaturesDict:
    """The TFDS features of records with the `optional` fields. KeyError for an unknown field."""
    t = tfds.features
    grey = functools.partial(t.Image, shape=(None, None, 1), dtype=np.uint8, encoding_format="png")
    labels = f"1 positive, 0 negative, -1 uncertain, -2 unknown: {', '.join(label_names)}"
    boxes = t.Sequence({"bbox": t.Tensor(shape=(4,), dtype=np.float32), "label": t.Text()})
    moments = "mean and log-variance of an autoencoder's latents, one behind the other"
    latents = t.Tensor(shape=(None,) * 3, dtype=np.float16, encoding="bytes", doc=moments)
    kinds = {"boxes": boxes, "latents": latents} | {name: t.Text() for name in ORIGIN}
    return t.FeaturesDict(
        {name: t.Text() for name in TEXTS}
        | {"image": grey(doc="grey, high is bright as on a viewing screen")}
        | {"labels": t.Tensor(shape=(len(label_names),), dtype=np.int8, doc=labels)}
        | {name: grey() if is_image(name) else kinds[name] for name in sorted(optional)}
    )


def encoder(label_names: Sequence[str], optional: Sequence[str]) -> Callable[[Mapping], bytes]:
    """A function from a record, images as PNG bytes, to the bytes that a shard stores."""
    schema = features(label_names, optional)
    serializer = ExampleSerializer(schema.get_serialized_info())  # pyright: ignore[reportArgumentType]

    def encode(record: Mapping[str, Any]) -> bytes:
        example = serializer.get_tf_example(schema.encode_example(dict(record)))
        # Without `deterministic`, the order of the fields, and so every byte, is by chance.
        return example.SerializeToString(deterministic=True)

    return encode


def parse(data: bytes) -> Mapping[str, Any]:
    """The stored fields of a record from its bytes; raises protobuf's DecodeError."""
    example = tf_example_pb2.Example  # pyright: ignore[reportAttributeAccessIssue]
    return example.FromString(data).features.feature


def optional_fields(record: Mapping[str, Any]) -> list[str]:
    """The optional fields of a record, before or after it is stored, in sorted order."""
    names = {"boxes/bbox": "boxes", "latents/value": "latents"}
    fields = {names.get(name, name) for name in record}
    return sorted(name for name in fields if is_mask(name) or name in OPTIONAL)
