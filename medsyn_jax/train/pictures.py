"""What a linear probe leaves for people to look at: ROC curves, and heat maps over radiographs."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medsyn_jax.core import mesh as meshes
from medsyn_jax.core import metrics, outputs
from medsyn_jax.data.images import transforms
from medsyn_jax.data.store import shards
from medsyn_jax.models.resnet import ImageFeatures
from medsyn_jax.tables import examples
from medsyn_jax.train import features, fractions, frozen, logistic, probe
from medsyn_jax.train.frozen import Encoder

Curves = dict[str, dict[str, Any]]
_REFERENCE = 64  # test records whose mean the heat maps are compared with
_PLACELESS = "No Finding"  # a label that no place speaks for


def last_maps(encoder: Encoder, images: np.ndarray) -> np.ndarray | None:
    """The last map of a ResNet, float32 [n, p, q, f]; None for another encoder.

    Its mean over the places is `Encoder.pooled`, so that the products of its places with the
    weights of a linear probe have the probe's logit, less the bias, for a mean: they are the exact
    class activation map (Zhou et al., arXiv 1512.04150). images: uint8 [n, size, size] as stored.
    """
    source, mesh = frozen.Arrays(image=images), meshes.one_device()
    nameless = replace(encoder, name="")  # one program for all encoders of an architecture
    maps = frozen.outputs(nameless, Encoder.features, ("image",), source, mesh, examples.SHOWN)
    return np.asarray(maps.layer4, np.float32) if isinstance(maps, ImageFeatures) else None


def draw(
    workdir: Path,
    encoder: Encoder | features.Pixels,
    name: str,
    task: probe.Task,
    drawn: Sequence[fractions.Fraction],
    fits: Sequence[logistic.Fit],
    test: tuple[shards.Records, features.Table, np.ndarray],
) -> Curves:
    """ROC curves of the first seed, fraction -> rates, as JSON; draws its heat maps.

    Args:
        workdir: of the run.
        encoder: without a ResNet, no maps are drawn.
        name: of the encoder.
        task, drawn, fits: the labels, their fractions, and a fit for each fraction.
        test: the test split, with its features and targets.
    """
    _, table, targets = test
    curves: Curves = {}
    for fraction, fit in zip(drawn, fits, strict=True):
        logits = np.asarray(probe.logits(fit, jnp.asarray(table.features)))[0]
        curves[fraction.name] = _roc(task, logits, targets, fraction.trained)
    if not jax.process_index() and isinstance(encoder, Encoder):
        _draw_heat(workdir, encoder, name, task, drawn, fits, test)
    return curves


def _draw_heat(
    workdir: Path,
    encoder: Encoder,
    name: str,
    task: probe.Task,
    drawn: Sequence[fractions.Fraction],
    fits: Sequence[logistic.Fit],
    test: tuple[shards.Records, features.Table, np.ndarray],
) -> None:
    """Draw maps of the finding with the most positives in the test split, on images that have it.

    A map is compared with the mean map of test records: by itself it mostly shows what differs from
    place to place in every image, such as the left and the right lung.
    """
    records, table, targets = test
    source = features.Images(records, encoder.size)
    rows = examples.chosen(records.keys, np.ones(len(records), bool), _REFERENCE)
    maps = last_maps(encoder, source.take(rows)["image"])
    if maps is None:
        return
    mean = maps.mean(axis=0)
    findings = np.array([label != _PLACELESS for label in task.names])
    for fraction, fit in zip(drawn, fits, strict=True):
        positive = (task.columns_of(targets) == 1) & fraction.trained & findings
        label = int(positive.sum(axis=0).argmax())
        rows = examples.chosen(records.keys, positive[:, label])
        if not len(rows):
            continue
        images = source.take(rows)["image"]
        maps = np.asarray(last_maps(encoder, images)) - mean
        logits = np.asarray(probe.logits(fit, jnp.asarray(table.features[rows])))[:1]
        odds = probe.columns(task, logits, targets, fraction.trained)[0, :, label]
        examples.draw_heat(
            examples.path(workdir, name, fraction.name),
            np.asarray(transforms.center_crop(jnp.asarray(images), encoder.crop)),
            maps @ np.asarray(fit.kernel[0, :, label]),
            np.asarray(jax.nn.sigmoid(odds)),
            task.names[label],
        )


def write_curves(workdir: Path, curves: Mapping[str, Curves]) -> None:
    """Write the curves of each encoder to examples/roc.json, where there are any."""
    if curves and not jax.process_index():
        outputs.write_json(workdir / "examples" / "roc.json", curves)


def _roc(
    task: probe.Task, logits: np.ndarray, test: np.ndarray, trained: np.ndarray
) -> dict[str, Any]:
    """ROC curves of the labels that `probe.judge` judges, and their mean over the labels at equal
    false positive rates. logits: [n, c]; test, trained: as of `probe.judge`."""
    test = task.without(test, ~trained)
    scores, labels = probe.columns(task, logits[None], test, trained)[0], task.columns_of(test)
    grid = metrics.ROC_GRID
    curves = {
        task.names[i]: metrics.roc_curve(scores[:, i], labels[:, i], grid)
        for i in probe.judged(task, test)
    }
    curves = {"mean": np.mean(list(curves.values()), axis=0)} | curves
    rates = {label: np.round(curve, 4).tolist() for label, curve in curves.items()}
    return {"false_positive_rates": np.round(grid, 4).tolist(), "true_positive_rates": rates}
