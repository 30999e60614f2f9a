"""The detect task from a workdir to results.json, and what its programs do with an encoder."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from configs.detect import get_config
from medsyn_jax import main
from medsyn_jax.core import detection
from medsyn_jax.core import mesh as meshes
from medsyn_jax.core.errors import UserError
from medsyn_jax.data.store import shards
from medsyn_jax.tables import examples
from medsyn_jax.tasks import detect
from medsyn_jax.train import dense, frozen
from tests.train.runs import ingest_config, write_pairs, write_run

SIZE = 32


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a pre-training run in `run`; phantom shards come into `data`."""
    folder = tmp_path_factory.mktemp("world")
    write_run(folder / "run")
    return folder


def config_of(world: Path):
    config = get_config("smoke")
    config.encoder.workdir = str(world / "run")
    config.data.threads = 0
    config.ingest.workers = 1
    return config


def metrics_of(workdir: Path) -> dict:
    return json.loads((workdir / "results.json").read_text(), parse_constant=pytest.fail)["metrics"]


def test_a_run_from_workdir_to_results_compiles_once(world, monkeypatch, capsys):
    made, make = [], dense.make_programs
    monkeypatch.setattr(dense, "make_programs", lambda *a: made.append(make(*a)) or made[-1])
    main.run(config_of(world), world / "detect")
    results = metrics_of(world / "detect")
    names = ("map", "map_coco", "ap50", "map_mgca", "map/Consolidation")
    for encoder in ("pretrained", "random", "pretrained-random"):
        for fraction in ("50%", "100%"):
            for name in names:
                entry = results[f"{encoder}/test/{fraction}/{name}"]
                assert len(entry["seeds"]) == 2
                if entry["value"] is not None and "ci95" in entry:
                    assert entry["ci95"][0] <= entry["value"] <= entry["ci95"][1]
    (folder,) = (world / "data").iterdir()
    truth = [len(shards.open_split(folder, "train")[i]["boxes"]) for i in range(30)]
    assert len(set(truth)) > 2  # images with several numbers of boxes, and yet:
    (programs,) = made
    assert (programs.step._cache_size(), programs.judge._cache_size()) == (1, 1)
    records = shards.open_split(folder, "test")
    boxes = sum(len(records[i]["boxes"]) for i in range(len(records)))
    entry = results["pretrained/test/100%/map"]
    assert (entry["n"], entry["boxes"]) == (len(records), boxes)
    assert f"test {detect_count(records)} of {len(records)} ({boxes})" in capsys.readouterr().err

    for encoder in ("pretrained", "random"):
        with Image.open(examples.path(world / "detect", encoder, "100%")) as image:
            blue = (np.asarray(image.convert("RGB")) == np.array(examples.TRUE)).all(axis=-1)
        rows = examples.chosen(records.keys, np.array([bool(r["boxes"]) for r in records]))
        for i, row in enumerate(rows.tolist()):
            scale = examples.SIDE / len(records[row]["image"])
            for left, top, *_ in (box["bbox"] * scale for box in records[row]["boxes"]):
                assert blue[round(top) :, i * 132 + round(left)][:2].any()  # where it begins

    text = (world / "detect" / "results.json").read_text()
    main.run(config_of(world), world / "detect")
    assert (world / "detect" / "results.json").read_text() == text


def detect_count(records) -> int:
    """The number of images with a box."""
    return sum(bool(records[i]["boxes"]) for i in range(len(records)))


def test_a_detector_that_finds_nothing_scores_0(world):
    config = config_of(world)
    config.detector.least, config.fit.epochs = 1.0, 1
    config.fractions, config.seeds, config.encoder.untrained = (1.0,), 1, False
    main.run(config, world / "nothing")
    results = metrics_of(world / "nothing")
    assert results["pretrained/test/100%/map"]["value"] == 0.0
    assert results["pretrained/test/100%/map"]["ci95"] == [0.0, 0.0]
    assert results["pretrained/test/100%/map_mgca"]["value"] is None
    assert not [name for name in results if name.startswith(("random", "pretrained-random"))]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": "mgca"}, "config.protocol: 'mgca' is unknown: choose from strict, mgca_comp"),
        ({"encoder.workdir": "nowhere"}, "configs/convirt.py` first"),
        ({"data.source": ""}, "config.data.source: is empty"),
        (
            {"data.labels": ("Fog",)},
            "config.data.labels: Fog: the boxes of .* are of Consolidation",
        ),
        ({"data.labels": (1,)}, r"config.data.labels: \(1,\): give texts"),
        ({"data.size": 40}, "config.data.size: 40: .* maps have 10, 5, 3 rows .* multiple of 32"),
        ({"detector.least": 2.0}, "config.detector.least: 2.0: give a share from 0 to 1"),
        ({"detector.width": 0}, "config.detector.width: 0: give a whole number above 0"),
        ({"fit.learning_rate": 1e30}, "config.fit.learning_rate: .* seed 0 diverged"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_field(world, tmp_path, changes, message):
    config = config_of(world)
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message) as error:
        main.run(config, world / f"mistake-{tmp_path.name}")
    assert "\n" not in str(error.value)


def test_a_set_without_boxes_and_a_split_without_one_are_refused(world, tmp_path):
    write_pairs(tmp_path / "pairs")
    config = config_of(world)
    config.data.source = str(tmp_path / "pairs" / "pairs.csv")
    config.ingest = ingest_config()
    config.ingest.update({"folder": {"subject": ""}})
    with pytest.raises(UserError, match=r"config.data.source: .* has no boxes: ingest a source"):
        main.run(config, tmp_path / "detect")
    none = boxed(count=3, empty=True)
    data = {"train": boxed(), "valid": boxed(), "test": none}
    with pytest.raises(UserError, match="a: none of the 3 images of the test split has such a box"):
        detect.check_boxes(data, config, ("a",))


def test_a_vit_is_refused(tmp_path):
    vit = {"kind": "vit", "size": 32, "patch": 8, "width": 8, "layers": 1, "heads": 2}
    vit |= {"mlp_width": 8, "channels": 1, "eps": 1e-6, "remat": False, "mean": 0.4, "std": 0.2}
    config = {"dtype": "float32", "image": vit, "data": {"size": 32}, "augment": {"size": 32}}
    (tmp_path / "config.json").write_text(json.dumps({"config": config}))
    with pytest.raises(UserError, match=r"config.encoder.workdir: its encoder is a ViT"):
        detect.make_programs(get_config("smoke"), frozen.untrained(tmp_path, 0), 1)


def boxed(count=24, empty=False, seed=0) -> detect.Boxed:
    """Images with a bright rectangle on a dark ground, or none in every fourth."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 60, (count, SIZE, SIZE)).astype(np.uint8)
    corners, labels = np.zeros((count, 2, 4), np.float32), np.full((count, 2), -1, np.int32)
    for i in range(count):
        if not empty and i % 4:
            (x, y), (w, h) = rng.integers(2, 14, 2), rng.integers(8, 16, 2)
            images[i, y : y + h, x : x + w] += 150
            corners[i, 0], labels[i, 0] = (x, y, x + w, y + h), 0
    keys = [f"k{i}" for i in range(count)]
    return detect.Boxed(images, detection.Boxes(corners, labels), keys, np.array(keys))


def test_a_head_learns_to_detect_and_the_best_epoch_is_kept(world, capsys):
    config = config_of(world)
    config.seeds, config.fit.epochs, config.fit.patience = 1, 60, 60
    config.fit.update({"batch_size": 8, "learning_rate": 5e-3})
    encoder = frozen.pretrained(world / "run")
    part = boxed()
    programs = detect.make_programs(config, encoder, 1)
    scores = []

    def score(judged: detect.Judged) -> float:
        scores.append(detect.score("strict", part.truth, 1, judged))
        return scores[-1]

    (judged,) = dense.fit_all(
        config,
        programs,
        score,
        detect.described,
        [encoder],
        dict.fromkeys(("train", "valid", "test"), part.arrays),
        {"100%": np.arange(24)[None]},
        meshes.make_mesh(),
        name="pretrained",
        stored=True,
        coarsest=3,
    )["100%"]
    value = detection.mean_average_precision(detect.boxes_of(judged.detections), part.truth, 1)
    assert value == pytest.approx(-min(scores), abs=1e-9)
    assert value > 0.5
    assert f"validation mean average precision {value:.4f} at epoch" in capsys.readouterr().err
    assert scores[0] > min(scores)


def stepped(world, **changes):
    """(encoder, state before, state after two steps, loss) on images or stored maps."""
    config = config_of(world)
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    encoder, part = frozen.pretrained(world / "run"), boxed(16)
    programs = detect.make_programs(config, encoder, 1)
    stored = config.data.memory_mib > 0
    (source,) = dense.sources(
        config, encoder, {"train": part.arrays}, meshes.make_mesh(), stored, 3
    ).values()
    state = programs.start(
        jax.random.key(0), encoder.params, encoder.stats, dense.are_stored(source.arrays)
    )
    before = jax.device_get(state)
    for _ in range(2):
        state, metrics = programs.step(state, source.take(np.arange(16)), jax.random.key(1))
    return encoder, before, jax.device_get(state), float(metrics["loss"])


def same(a, b) -> bool:
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_a_frozen_encoder_in_the_step_is_the_one_of_the_stored_maps(world):
    *_, stored, loss = stepped(world)
    assert set(stored["params"]) == set(stored["stats"]) == {"head"}
    encoder, _, running, again = stepped(world, data__memory_mib=0)
    assert again == pytest.approx(loss, rel=1e-3)
    assert set(running["params"]) == {"head"}
    assert same(running["stats"]["encoder"], encoder.params)
    assert same(running["stats"]["statistics"], encoder.stats)


def test_by_mgcas_protocol_the_frozen_encoder_s_statistics_move(world):
    encoder, _, after, _ = stepped(world, protocol="mgca_compat", data__memory_mib=0)
    assert same(after["stats"]["encoder"], encoder.params)
    assert not same(after["stats"]["statistics"], encoder.stats)


def test_a_tuned_encoder_learns(world):
    encoder, before, after, _ = stepped(world, encoder__frozen=False, data__memory_mib=0)
    assert same(before["params"]["encoder"], encoder.params)
    assert not same(after["params"]["encoder"], encoder.params)
    assert not same(after["stats"]["statistics"], encoder.stats)


def test_boxes_are_scaled_with_their_images(world):
    config = config_of(world)
    (folder,) = (world / "data").iterdir()
    records = {split: shards.open_split(folder, split) for split in ("train", "valid", "test")}
    whole, names = detect.read(records, config)
    config.data.size = 64
    large, _ = detect.read(records, config)
    assert names == ("Consolidation", "Foreign Object", "Lung Lesion")
    row = int(np.flatnonzero(whole["train"].positive)[0])
    box = records["train"][row]["boxes"][0]
    np.testing.assert_array_equal(whole["train"].truth.corners[row, 0], box["bbox"])
    assert names[whole["train"].truth.labels[row, 0]] == box["label"]
    np.testing.assert_array_equal(large["train"].truth.corners, 2 * whole["train"].truth.corners)
    assert large["train"].images.shape[1:] == (64, 64)
    assert len({part.truth.labels.shape[1] for part in whole.values()}) == 1


def judged_of(scores, loss, finite=True) -> detect.Judged:
    boxes = np.array([[[0, 0, 10, 10]]] * len(scores), np.float32)
    labels = np.where(np.isfinite(scores), 0, -1)[:, None]
    detections = detect.detect.Detections(boxes, np.array(scores, np.float32)[:, None], labels)
    n = len(scores)
    return detect.Judged(detections, np.full(n, loss, np.float32), np.full(n, finite))


def test_what_early_stopping_minimizes():
    truth = detection.Boxes(np.array([[[0, 0, 10, 10]]] * 2, np.float32), np.zeros((2, 1), int))
    both, one, none = [-0.1, -0.2], [-0.1, -np.inf], [-np.inf, -np.inf]
    assert detect.score("strict", truth, 1, judged_of(both, 3.0)) == -1.0
    assert detect.score("strict", truth, 1, judged_of(one, 3.0)) == pytest.approx(-51 / 101)
    # without a detection the loss decides, and any detection is better
    assert detect.score("strict", truth, 1, judged_of(none, 3.0)) == 0.75
    assert detect.score("strict", truth, 1, judged_of(none, 1.0)) == 0.5
    assert detect.score("mgca_compat", truth, 1, judged_of(one, 3.0)) == -1.0
    assert detect.score("mgca_compat", truth, 1, judged_of(none, 3.0)) == 1.0
    assert np.isnan(detect.score("strict", truth, 1, judged_of(both, 3.0, finite=False)))
