"""The segment task from a workdir to results.json, its three ways to use an encoder, bad input."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs.segment import get_config
from medsyn_jax import main
from medsyn_jax.core import mesh as meshes
from medsyn_jax.core import tree
from medsyn_jax.core.errors import UserError
from medsyn_jax.data.images import decode
from medsyn_jax.data.store import shards, splits
from medsyn_jax.tables import examples
from medsyn_jax.tasks import segment
from medsyn_jax.train import dense, frozen
from tests.train.runs import write_pairs, write_run


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a pre-training run in `run`; sets are ingested beside it, into `data`."""
    folder = tmp_path_factory.mktemp("world")
    write_run(folder / "run")
    return folder


def config_of(world: Path):
    config = get_config("smoke")
    config.encoder.workdir = str(world / "run")
    config.ingest.workers = 1
    return config


def results_of(config, workdir):
    main.run(config, workdir)
    text = (workdir / "results.json").read_text()
    return json.loads(text, parse_constant=pytest.fail)["metrics"]  # NaN is not JSON


def test_a_run_from_workdir_to_results(world, capsys):
    config, workdir = config_of(world), world / "lungs"
    config.data.mask = "mask_lungs"  # large and easy: the whole chain learns, or is broken
    config.fit.update({"epochs": 12, "learning_rate": 5e-3})
    metrics = results_of(config, workdir)
    kinds = {
        f"{way}/{kind}_empty" for way in ("per_image", "per_set") for kind in ("with", "without")
    }
    names = {f"{name}/{kind}" for name in ("dice", "iou") for kind in kinds} | {"dice/mgca_compat"}
    encoders = ("pretrained", "random", "pretrained-random")
    fractions = ("50%", "100%")
    assert set(metrics) == {f"{e}/test/{f}/{n}" for e in encoders for f in fractions for n in names}
    for encoder in encoders[:2]:
        entry = metrics[f"{encoder}/test/100%/dice/per_image/with_empty"]
        assert entry["value"] > 0.8
        assert entry["ci95"][0] <= entry["value"] <= entry["ci95"][1]
        assert (len(entry["seeds"]), entry["n"]) == (2, entry["positives"])  # all have lungs
        dice, iou = (
            metrics[f"{encoder}/test/100%/{n}/per_set/with_empty"] for n in ("dice", "iou")
        )
        assert iou["seeds"] == pytest.approx([d / (2 - d) for d in dice["seeds"]])
    pair = [metrics[f"{e}/test/50%/dice/per_set/with_empty"]["value"] for e in encoders]
    assert pair[2] == pytest.approx(pair[0] - pair[1])
    said = capsys.readouterr()
    assert "pretrained/test/50%/dice/mgca_compat" in said.out
    assert said.err.count("pretrained, 100% of the labels, seed") == 2

    records = shards.open_split(next((world / "data").glob("phantom-*")), "test")
    rows = examples.chosen(records.keys, np.ones(len(records), bool))  # all have lungs
    truth = [decode.square(records[int(row)]["mask_lungs"], 32) > 127 for row in rows]
    inside = np.hstack([np.pad(examples._outline(x, "inside"), ((0, 0), (0, 4))) for x in truth])
    for encoder in encoders[:2]:
        with Image.open(examples.path(workdir, encoder, "100%")) as image:
            strip = np.asarray(image.convert("RGB"))[: examples.SIDE]
        blue = (strip == np.array(examples.TRUE)).all(axis=-1)
        orange = (strip == np.array(examples.PREDICTED)).all(axis=-1)
        np.testing.assert_array_equal(blue | (orange & inside[:, :-4]), inside[:, :-4])
        assert blue.sum() > 0.5 * inside.sum()
        assert orange.any()

    keys = {
        (share, seed): (workdir / "fractions" / f"{share}-seed{seed}.txt").read_text().split()
        for share in fractions
        for seed in range(2)
    }
    half, whole = (
        {s: {k.rpartition("/")[0] for k in keys[f, s]} for s in range(2)} for f in fractions
    )
    assert len(half[0]) == round(len(whole[0]) / 2)
    assert len(keys["50%", 0]) == 2 * len(half[0])  # both studies of each subject
    assert half[0] < whole[0] == whole[1]
    assert half[0] != half[1]


@pytest.mark.parametrize("way", ["tuned", "running"])
def test_an_encoder_that_runs_in_every_step(world, way, capsys):
    config = config_of(world)
    config.fractions, config.seeds, config.encoder.untrained = (1.0,), 1, False
    config.fit.epochs, config.decoder.kind = 1, "mlp" if way == "tuned" else "unet"
    config.encoder.frozen = way == "running"
    config.data.memory_mib = 0
    metrics = results_of(config, world / way)
    assert metrics["pretrained/test/100%/dice/per_set/with_empty"]["value"] is not None
    assert ("the encoder runs in every step" in capsys.readouterr().err) == (way == "running")


def fields(count: int = 16):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 32, 32), np.uint8)
    masks = np.where(images > 200, np.uint8(255), np.uint8(0))
    part = segment.Masked(images, masks, [str(i) for i in range(count)], np.arange(count))
    return dict.fromkeys(splits.SPLITS, part)


def prepared(config, world, memory_mib, kind="unet"):
    config.data.memory_mib, config.decoder.kind = memory_mib, kind
    encoder, mesh = frozen.untrained(world / "run", 0), meshes.make_mesh()
    programs = segment.make_programs(config, encoder)
    parts = {split: part.arrays for split, part in fields().items()}
    maps = {"unet": 5, "mlp": 4}[kind]
    sources = dense.sources(config, encoder, parts, mesh, config.encoder.frozen, maps)
    arguments = (jax.random.key(0), encoder.params, encoder.stats, memory_mib > 0)
    state = programs.start(*arguments)
    batch = jax.tree.map(jnp.asarray, sources["valid"].take(np.arange(8)))
    return programs, state, batch


@pytest.mark.parametrize("kind", segment.DECODERS)
def test_stored_maps_and_a_running_encoder_give_the_same_logits(world, kind):
    seen = []
    for memory_mib in (64, 0):
        programs, state, batch = prepared(config_of(world), world, memory_mib, kind)
        assert ("image" in batch) == (memory_mib == 0)
        seen.append(programs.judge(state["params"], state["stats"], batch))
    for stored, running in zip(
        jax.tree.leaves(seen[0][0]), jax.tree.leaves(seen[1][0]), strict=True
    ):
        np.testing.assert_allclose(stored, running, rtol=0.02)  # maps are stored in bfloat16
    np.testing.assert_array_equal(seen[0][1][:, 2], seen[1][1][:, 2])
    for _, counts, packed in seen:  # the predicted masks, eight pixels a byte
        np.testing.assert_array_equal(np.unpackbits(packed, axis=-1).sum((1, 2)), counts[:, 1])


@pytest.mark.parametrize(
    ("settings", "weights_move", "statistics_move"),
    [
        ({}, False, False),
        ({"training_mode": True}, False, True),
        ({"frozen": False}, True, True),
    ],
)
def test_a_step_changes_of_the_encoder_what_it_should(
    world, settings, weights_move, statistics_move
):
    config = config_of(world)
    config.encoder.update(settings)
    programs, state, batch = prepared(config, world, 0)
    before = tree.named(jax.device_get(state))
    state, metrics = programs.step(state, batch, jax.random.key(1))
    moved = {
        name: bool((np.asarray(value) != before[name]).any())
        for name, value in tree.named(jax.device_get(state)).items()
    }
    place = "params/encoder" if weights_move else "stats/encoder"
    for part, moves in (
        (place, weights_move),
        ("stats/statistics", statistics_move),
        ("params/head", True),
        ("stats/head", True),
    ):
        inside = [change for name, change in moved.items() if name.startswith(f"{part}/")]
        assert len(inside) > 10
        assert any(inside) == moves, part
    assert float(metrics["loss"]) > 0


@pytest.mark.parametrize(("widths", "channels"), [((8,), 8), ((), 32)])
def test_the_light_decoder_has_the_width_that_is_asked_for(world, widths, channels):
    config = config_of(world)
    config.decoder.widths = widths
    _, state, _ = prepared(config, world, 64, "mlp")
    assert state["params"]["head"]["out"]["kernel"].shape == (1, 1, channels, 1)


def test_half_of_a_balanced_training_set_has_the_mask(world, capsys):
    config = config_of(world)
    config.data.update({"balanced": True, "mask": "mask_effusion"})
    config.fractions, config.seeds, config.encoder.untrained = (1.0,), 1, False
    config.fit.epochs = 1
    results_of(config, world / "balanced")
    err = capsys.readouterr().err
    positive = int(err.partition("training set balanced: ")[2].split()[0])
    assert f"{positive} with mask_effusion, {2 * positive} in all" in err
    assert f"images with mask_effusion: train {positive} of {2 * positive}, valid " in err
    drawn = (world / "balanced" / "fractions" / "100%-seed0.txt").read_text().split()
    assert len(drawn) == 2 * positive


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder.workdir": "nowhere"}, "configs/convirt.py` first"),
        ({"data.source": ""}, "config.data.source: is empty"),
        (
            {"data.mask": "mask_heart"},
            "config.data.mask: mask_heart: .* has the masks mask_effusion",
        ),
        ({"data.size": 0}, "config.data.size: 0: give a whole number above 0"),
        ({"data.memory_mib": -1}, "config.data.memory_mib: -1: give a number of 0 or more"),
        ({"decoder.widths": (8, 8)}, r"config.decoder.widths: \(8, 8\): give .* 5 or more"),
        ({"decoder.widths": (8, 8, 8, 8, 0)}, r"config.decoder.widths: .* whole numbers above 0"),
        ({"decoder.kind": "fcn"}, "config.decoder.kind: 'fcn' is unknown: choose from unet"),
        ({"decoder": {"kind": "mlp", "widths": (8, 8)}}, r"widths: \(8, 8\): give one for .* mlp"),
        ({"fit.batch_size": 0}, "config.fit.batch_size: 0: give a whole number above 0"),
        ({"fit.learning_rate": 1e30}, "config.fit.learning_rate: the fit .* diverged"),
        ({"fractions": (0.0,)}, r"config.fractions: \(0.0,\): give shares above 0"),
        ({"augment.zoom": (1.1, 0.9)}, r"config.augment.zoom: \(1.1, 0.9\): give two numbers"),
        ({"augment.probability": 2.0}, "config.augment.probability: 2.0: give a share"),
        ({"encoder.weights": "gone.safetensors"}, "config.encoder.weights 'gone.safetensors'"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_field(world, changes, message):
    config = config_of(world)
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message) as error:
        main.run(config, world / "mistake")
    assert "\n" not in str(error.value)


def test_a_set_without_masks_is_one_line(world):
    config = config_of(world)
    config.data.source = str(write_pairs(world / "pairs"))
    config.ingest.pairs.labels = ("bright",)
    with pytest.raises(
        UserError, match=r"mask_effusion: .* has no masks: name one of them, or ing"
    ):
        main.run(config, world / "no-masks")


def test_a_split_without_a_pixel_of_the_mask_is_one_line():
    config, data = get_config("smoke"), fields()
    data["test"] = segment.Masked(data["test"].images, 0 * data["test"].masks, [], np.arange(16))
    with pytest.raises(UserError, match=r"mask_effusion: none of .* test split has a pixel"):
        segment.check_masks(data, config)


def test_a_fraction_without_a_positive_is_one_line(tmp_path, capsys):
    config, part = get_config("smoke"), fields()["train"]
    part.masks[1:] = 0  # one positive
    config.fractions_from = str(tmp_path)
    for seed in range(2):
        splits.write_fraction(tmp_path / f"50%-seed{seed}.txt", ["1", "2", "3"])
        splits.write_fraction(tmp_path / f"100%-seed{seed}.txt", part.keys)
    fractions = segment.make_fractions(config, tmp_path, part)
    assert list(fractions) == ["100%"]
    assert "50% of the labels: no figure: the images of seed 0, 1 have" in capsys.readouterr().err
    config.fractions = (0.5,)
    with pytest.raises(UserError, match=r"config.fractions: \(0.5,\): none has an image with"):
        segment.make_fractions(config, tmp_path, part)
