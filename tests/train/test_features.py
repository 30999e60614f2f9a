"""Frozen encoders and their features, on small pairs of images whose brightness is their label."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from medsyn_jax.core import mesh as meshes
from medsyn_jax.core import tree
from medsyn_jax.core.errors import UserError
from medsyn_jax.data.sources import resolve
from medsyn_jax.data.store import shards
from medsyn_jax.models.weights import convert
from medsyn_jax.train import features, frozen, pyramids
from tests.train import toy
from tests.train.runs import CROP, SIZE, ingest_config, write_pairs, write_run


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, dict]:
    workdir = tmp_path_factory.mktemp("run")
    return workdir, write_run(workdir)


@pytest.fixture(scope="module")
def run(saved) -> Path:
    return saved[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return resolve.prepare(str(write_pairs(folder / "pairs")), ingest_config(), folder)


def test_pretrained_is_the_image_encoder_of_the_checkpoint(saved):
    workdir, state = saved
    got = frozen.pretrained(workdir)
    want = toy.on_host((state["params"]["image"], state["stats"]["image"]))
    named = [tree.named(x) for x in (toy.on_host((got.params, got.stats)), want)]
    assert named[0].keys() == named[1].keys()
    for name, leaf in named[1].items():
        np.testing.assert_array_equal(named[0][name], leaf)
    assert (got.size, got.crop, dict(got.pixels)) == (
        SIZE,
        CROP,
        {"mean": 0.4, "std": 0.2, "channels": 1, "upsample": 0},
    )


def test_untrained_is_the_same_architecture_by_its_seed(run):
    first, again, other = (frozen.untrained(run, seed) for seed in (0, 0, 1))
    assert first.fingerprint == again.fingerprint
    assert len({first.fingerprint, other.fingerprint, frozen.pretrained(run).fingerprint}) == 3


def test_a_vit_has_the_same_fingerprint_in_another_process(tmp_path):
    vit = {"kind": "vit", "size": 16, "patch": 8, "width": 8, "layers": 1, "heads": 2}
    vit |= {"mlp_width": 8, "channels": 1, "eps": 1e-6, "remat": False, "mean": 0.4, "std": 0.2}
    config = {"dtype": "float32", "image": vit, "data": {"size": 20}, "augment": {"size": 16}}
    (tmp_path / "config.json").write_text(json.dumps({"config": config}))
    program = f"""
from pathlib import Path
from medsyn_jax.train import frozen
print(frozen.untrained(Path({str(tmp_path)!r}), 3).fingerprint)
"""
    other = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert other.stdout.strip() == frozen.untrained(tmp_path, 3).fingerprint
    changed = config | {"image": vit | {"eps": 1e-5}}
    (tmp_path / "config.json").write_text(json.dumps({"config": changed}))
    assert other.stdout.strip() != frozen.untrained(tmp_path, 3).fingerprint


def test_imported_are_the_weights_of_the_file(run, tmp_path):
    source = frozen.untrained(run, 3)
    path = tmp_path / "image.safetensors"
    convert.save(path, "torchvision", *toy.on_host((source.params, source.stats)))
    got = frozen.imported(run, str(path), "", 0.4, 0.2)
    assert got.fingerprint == source.fingerprint  # mean and std are the run's here
    assert frozen.imported(run, str(path), "", 0.45, 0.2).fingerprint != source.fingerprint


def test_imported_weights_must_agree_with_their_folder(run, tmp_path):
    source = frozen.untrained(run, 3)
    path = tmp_path / "image.safetensors"
    convert.save(path, "torchvision", *toy.on_host((source.params, source.stats)))
    images = tmp_path / "preprocessor_config.json"
    images.write_text('{"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.2, 0.2]}')
    with pytest.raises(UserError, match=r"give --config\.encoder\.mean=0\.5 .*std=0\.2$"):
        frozen.imported(run, str(path), "", 0.4, 0.2)
    assert frozen.imported(run, str(path), "", 0.5, 0.2).pixels[0] == ("mean", 0.5)
    (tmp_path / "config.json").write_text('{"model_type": "resnet", "hidden_act": "gelu"}')
    with pytest.raises(UserError, match="hidden_act is 'gelu'"):
        frozen.imported(run, str(path), "", 0.5, 0.2)


def test_a_folder_that_is_no_run_is_one_line_with_the_command(tmp_path):
    with pytest.raises(UserError, match=r"configs/convirt.py` first") as error:
        frozen.pretrained(tmp_path / "nothing")
    assert "\n" not in str(error.value)


def test_features_are_those_of_each_image_alone_in_the_order_of_the_records(run, data):
    encoder = frozen.pretrained(run)
    records = shards.open_split(data, "train")
    assert len(records) == 36  # not a multiple of the batch
    got = features.compute(encoder, records, meshes.make_mesh(), batch_size=16, threads=2)
    border = (SIZE - CROP) // 2
    for i in (0, 15, 16, 35):
        image = records[i]["image"][border:-border, border:-border]
        alone = encoder.features(jnp.asarray(image[None])).pooled
        np.testing.assert_allclose(got[i], alone[0], rtol=1e-5, atol=1e-6)
    assert got.shape == (36, 64)
    assert got.dtype == np.float32
    assert got.std(axis=0).max() > 0.01


def test_a_batch_that_the_devices_do_not_divide_is_refused(run, data):
    records = shards.open_split(data, "train")
    with pytest.raises(UserError, match="batch_size: 12 does not divide"):
        features.compute(frozen.pretrained(run), records, meshes.make_mesh(), 12, threads=0)


def test_a_table_is_computed_once_and_again_if_its_file_is_cut_short(
    run, data, tmp_path, monkeypatch
):
    mesh, encoder = meshes.make_mesh(), frozen.pretrained(run)
    records = shards.open_split(data, "valid")
    calls = []
    compute = features.compute
    monkeypatch.setattr(features, "compute", lambda *a: calls.append(a) or compute(*a))

    def table(encoder=encoder) -> features.Table:
        return features.table(encoder, records, mesh, tmp_path, batch_size=8, threads=0)

    first, second = table(), table()
    assert len(calls) == 1
    for name in ("features", "labels", "subjects"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    for i in range(len(records)):
        np.testing.assert_array_equal(first.labels[i], records[i]["labels"])
        assert first.subjects[i] == records[i]["subject"]
    (path,) = tmp_path.glob("*.npz")
    path.write_bytes(path.read_bytes()[:500])
    np.testing.assert_array_equal(table().features, first.features)
    assert len(calls) == 2
    pixels = tuple((dict(encoder.pixels) | {"std": 0.3}).items())
    table(dataclasses.replace(encoder, pixels=pixels))
    assert len(calls) == 3
    assert len(list(tmp_path.iterdir())) == 2


def test_pyramids_are_the_maps_of_each_whole_image_alone(run, data):
    encoder = frozen.pretrained(run)
    source = features.Images(shards.open_split(data, "train"), SIZE)
    sizes = {"batch_size": 16, "threads": 2, "memory_mib": 64, "name": "train"}
    maps = pyramids.pyramids(encoder, source, meshes.make_mesh(), **sizes)
    assert maps is not None
    shapes = [(10, 10, 8), (10, 10, 8), (5, 5, 16), (3, 3, 32), (2, 2, 64)]  # stem "3x3"
    assert [(x.shape, x.dtype) for x in maps] == [((36, *s), jnp.bfloat16) for s in shapes]
    assert pyramids.pyramid_bytes(encoder, source) == sum(x.nbytes for x in maps)
    for i in (0, 15, 16, 35):
        images = jnp.asarray(source.take(np.array([i]))["image"])
        whole = dataclasses.replace(encoder, crop=SIZE)
        got = whole.features(images)
        wanted = [*encoder.pyramid(images)[:3], got.layer3, got.layer4]
        for mine, want in zip(maps, wanted, strict=True):
            np.testing.assert_allclose(mine[i].astype(np.float32), want[0], rtol=4e-3)
        assert all(x[i].max() > 0 for x in maps)


def test_maps_that_do_not_fit_are_one_line(run, data, capsys):
    source = features.Images(shards.open_split(data, "train"), 224)
    sizes = {"batch_size": 16, "threads": 0, "memory_mib": 1, "name": "train"}
    assert pyramids.pyramids(frozen.pretrained(run), source, meshes.make_mesh(), **sizes) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert "the maps of 36 images need 20 MiB and may take 1 (config.data.memory_mib)" in line


def test_the_pyramid_of_a_vit_is_its_grid_of_patches(tmp_path):
    vit = {"kind": "vit", "size": 24, "patch": 8, "width": 8, "layers": 1, "heads": 2}
    vit |= {"mlp_width": 8, "channels": 1, "eps": 1e-6, "remat": False, "mean": 0.4, "std": 0.2}
    config = {"dtype": "float32", "image": vit, "data": {"size": 32}, "augment": {"size": 24}}
    (tmp_path / "config.json").write_text(json.dumps({"config": config}))
    encoder = frozen.untrained(tmp_path, 0)
    images = np.random.default_rng(0).integers(0, 256, (2, 24, 24), np.uint8)
    (grid,) = encoder.pyramid(jnp.asarray(images))
    assert grid.shape == (2, 3, 3, 8)
    patches = encoder.features(jnp.asarray(images)).patches
    np.testing.assert_array_equal(grid[:, 1, 2], patches[:, 5])  # row 1, column 2 of three
    with pytest.raises(UserError, match=r"data.size: 32: the encoder is a ViT for 24 pixels"):
        encoder.pyramid(jnp.zeros((1, 32, 32), np.uint8))


def test_pixels_are_the_grey_values_of_the_reduced_image(data, tmp_path):
    records = shards.open_split(data, "test")
    settings = {"batch_size": 5, "threads": 0}  # does not divide the records
    got = features.table(features.Pixels(), records, meshes.make_mesh(), tmp_path, **settings)
    assert got.features.shape == (len(records), 256)
    assert got.features.dtype == np.float32
    for row in (0, len(records) - 1):
        whole = records[row]["image"].astype(np.float64) / 255
        assert got.features[row].mean() == pytest.approx(whole.mean(), abs=0.02)
    left = got.features.reshape(-1, 16, 16)[:, :, :8].mean((1, 2))
    want = [records[i]["image"][:, : SIZE // 2].mean() / 255 for i in range(len(records))]
    np.testing.assert_allclose(left, want, atol=0.03)
