"""The source `phantom`: procedural radiographs with reports, labels, masks and boxes."""

from typing import Any

import numpy as np

from medsyn_jax.core.errors import UserError
from medsyn_jax.data.images import decode
from medsyn_jax.data.sources import records
from medsyn_jax.data.store.items import Item, Listing
from medsyn_jax.phantom import study as phantom


def list_items(config: Any) -> Listing:
    """`phantom.subjects` x `phantom.studies_per_subject` studies."""
    seed, size, counts = config.seed, config.size, config.phantom
    if not 0 <= seed < 2**64 or not 32 <= size <= 1024:
        raise UserError(
            f"ingest: seed={seed}, size={size}: the phantom needs a seed from 0 to 2**64 - 1 and a "
            "size of 32 to 1024 pixels"
        )
    if min(counts.subjects, counts.studies_per_subject) < 1:
        what = f"subjects={counts.subjects}, studies_per_subject={counts.studies_per_subject}"
        raise UserError(f"ingest.phantom: {what}: give at least 1 of each")
    items = [
        Item(
            key=f"p{seed}/s{subject:06d}/{study}",
            subject=f"p{seed}s{subject:06d}",
            split=None,
            image=(seed, subject, study),
        )
        for subject in range(counts.subjects)
        for study in range(counts.studies_per_subject)
    ]
    return Listing(items, tuple(phantom.LABELS))


def make(item: Item, config: Any) -> dict[str, Any]:
    """Draws the record of an item; raises LeftOutRecord as `records.make`."""
    assert isinstance(item.image, tuple)
    study = phantom.study(*item.image, config.size)
    masks = {name: np.where(mask, np.uint8(255), np.uint8(0)) for name, mask in study.masks.items()}
    return {
        "key": item.key,
        "subject": item.subject,
        "image": decode.encode_png(study.image),
        **records.texts(study.report, item, config),
        "labels": np.array([study.labels[name] for name in phantom.LABELS], np.int8),
        "view": study.view,
        **{f"mask_{name}": decode.encode_png(mask) for name, mask in masks.items()},
        "boxes": [
            {"bbox": np.array(box, np.float32), "label": label} for label, *box in study.boxes
        ],
    }
