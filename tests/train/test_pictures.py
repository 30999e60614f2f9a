"""Heat maps and ROC curves of a probe: they are the probe's own logits and figures."""

import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from medsyn_jax.core import mesh as meshes
from medsyn_jax.data.sources import resolve
from medsyn_jax.data.store import shards
from medsyn_jax.tables import examples
from medsyn_jax.train import features, frozen, logistic, pictures, probe
from medsyn_jax.train.fractions import Fraction
from tests.train.runs import ingest_config, write_pairs, write_run

CROP = 48  # a last map of 3 x 3 places
NAMES = ("bright", "left", "rare")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """An encoder, the splits, their tables, a task and its targets, a fraction and its fit."""
    folder = tmp_path_factory.mktemp("world")
    write_run(folder / "run")
    table = write_pairs(folder / "pairs", count=200)
    directory = resolve.prepare(str(table), ingest_config(), folder)
    encoder = replace(frozen.pretrained(folder / "run"), size=64, crop=CROP)
    mesh = meshes.make_mesh()
    parts = {split: shards.open_split(directory, split) for split in ("train", "valid", "test")}
    tables = {
        split: features.table(encoder, part, mesh, folder, batch_size=8, threads=0)
        for split, part in parts.items()
    }
    policy = np.full(3, -2, np.int8)
    task = probe.Task("multilabel", NAMES, np.arange(3), policy, policy)
    targets = {split: task.targets(table.labels) for split, table in tables.items()}
    rows = np.arange(len(parts["train"]), dtype=np.int32)[None]
    fraction = Fraction("100%", rows, probe.has_both(targets["train"]))
    (fit,) = logistic.fit_seeds(
        task,
        (tables["train"].features, targets["train"]),
        (tables["valid"].features, targets["valid"]),
        [rows],
        inverse_penalties=(1e-2, 1.0),
    )
    return encoder, parts["test"], tables["test"], task, targets["test"], fraction, fit


def test_the_mean_of_a_class_activation_map_is_the_probes_logit(world):
    encoder, records, table, *_, fit = world
    images = features.Images(records, encoder.size).take(np.arange(len(records)))["image"]
    maps = pictures.last_maps(encoder, images)
    assert maps.shape[1:3] == (3, 3)
    heat = maps @ np.asarray(fit.kernel[0]) + np.asarray(fit.bias[0])
    logits = np.asarray(probe.logits(fit, jnp.asarray(table.features)))[0]
    assert np.abs(logits[:, :2]).max() > 0.5
    np.testing.assert_allclose(heat.mean(axis=(1, 2)), logits, atol=1e-4)


def test_a_vit_has_no_map(tmp_path):
    vit = {"kind": "vit", "size": 32, "patch": 8, "width": 8, "layers": 1, "heads": 2}
    vit |= {"mlp_width": 8, "channels": 1, "eps": 1e-6, "remat": False, "mean": 0.4, "std": 0.2}
    config = {"dtype": "float32", "image": vit, "data": {"size": 32}, "augment": {"size": 32}}
    (tmp_path / "config.json").write_text(json.dumps({"config": config}))
    encoder = frozen.untrained(tmp_path, 0)
    assert pictures.last_maps(encoder, np.zeros((2, 32, 32), np.uint8)) is None


def test_curves_have_the_area_of_the_auroc_and_maps_the_label_with_most_positives(world, tmp_path):
    encoder, records, table, task, targets, fraction, fit = world
    curves = pictures.draw(
        tmp_path, encoder, "e", task, [fraction], [fit], (records, table, targets)
    )
    rates = curves["100%"]["true_positive_rates"]
    assert [*rates] == ["mean", "bright", "left"]  # no record is positive of "rare"
    logits = np.asarray(probe.logits(fit, jnp.asarray(table.features)))[0]
    areas = {}
    for i, label in enumerate(NAMES[:2]):
        known = targets[:, i] >= 0
        want = roc_auc_score(targets[known, i], logits[known, i])
        areas[label] = np.trapezoid(rates[label], curves["100%"]["false_positive_rates"])
        assert areas[label] == pytest.approx(want, abs=0.02)
    mean = np.trapezoid(rates["mean"], curves["100%"]["false_positive_rates"])
    assert mean == pytest.approx(np.mean(list(areas.values())), abs=1e-4)
    strip = examples.read(tmp_path / "examples" / "e-100%.png")
    most = NAMES[int((targets == 1).sum(axis=0).argmax())]
    assert strip.caption.endswith(f"P({most})")


def test_no_finding_is_not_looked_for(world, tmp_path):
    encoder, records, table, task, targets, fraction, fit = world
    most = int((targets == 1).sum(axis=0).argmax())
    names = ["No Finding" if i == most else name for i, name in enumerate(NAMES)]
    task = probe.Task(task.kind, tuple(names), task.columns, task.uncertain, task.unmentioned)
    pictures.draw(tmp_path, encoder, "e", task, [fraction], [fit], (records, table, targets))
    strip = examples.read(tmp_path / "examples" / "e-100%.png")
    assert strip.caption.endswith(f"P({NAMES[1 - most]})")


def test_a_map_is_compared_with_the_mean_image_and_lies_over_what_the_encoder_saw(
    world, tmp_path, monkeypatch
):
    encoder, records, table, task, targets, fraction, fit = world
    drawn = []
    monkeypatch.setattr(examples, "draw_heat", lambda *arguments: drawn.append(arguments))
    pictures.draw(tmp_path, encoder, "e", task, [fraction], [fit], (records, table, targets))
    ((_, images, maps, probability, name),) = drawn
    label = NAMES.index(name)
    rows = examples.chosen(records.keys, targets[:, label] == 1)
    assert images.shape == (len(rows), CROP, CROP)
    logits = np.asarray(probe.logits(fit, jnp.asarray(table.features)))[0, :, label]
    mean = logits.mean()  # fewer test records than the reference takes
    np.testing.assert_allclose(maps.mean(axis=(1, 2)), logits[rows] - mean, atol=1e-4)
    np.testing.assert_allclose(probability, 1 / (1 + np.exp(-logits[rows])), atol=1e-5)
