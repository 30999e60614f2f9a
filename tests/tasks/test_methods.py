"""Every method of pre-training: on eight devices as on one, and from a config to its figures."""

import copy
import functools
import json
from pathlib import Path
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from configs import gloria, ground, mgca
from medsyn_jax import main
from medsyn_jax.core import mesh as meshes
from medsyn_jax.core.errors import UserError
from medsyn_jax.models import towers
from medsyn_jax.models.layers import split, statistics
from medsyn_jax.objectives.contrastive import normalize
from medsyn_jax.tasks import ground as task
from medsyn_jax.tasks import pretrain
from medsyn_jax.train import frozen
from medsyn_jax.train import state as states
from medsyn_jax.train.checkpoint import Checkpoints
from medsyn_jax.train.run import Data, Training
from scripts import heat_maps
from tests.train import toy

CONFIGS = {"gloria": gloria.get_config("smoke"), "mgca": mgca.get_config("smoke")}


def model_of(method):
    heads = toy.HEADS | {"local": True}
    if method == "gloria":
        heads |= {"kind": "linear", "text": False, "width": toy.TEXT["width"]}
    heads |= {"prototypes": 5} if method == "mgca" else {}
    text = toy.TEXT | {"layers": 2, "summed": 2, "dropout": 0.0}
    return lambda rngs: towers.PairEncoder(toy.IMAGE, text, heads, vocab_size=20, rngs=rngs)


def batch_of():
    """16 pairs; of every report's pieces the third belongs to the word of the second."""
    batch, rng = toy.batch_of(0), np.random.default_rng(0)
    batch["image"] = rng.normal(size=(16, 32, 32, 1)).astype(np.float32)
    places = np.arange(8)
    words = np.where(places > 1, places - 1, places)
    return batch | {"words": np.where(batch["mask"], words, -1).astype(np.int32)}


@functools.cache
def step_of(method, mesh):
    """(params, stats, batch) -> ((loss, statistics), gradients), compiled."""
    structure, *_ = states.shapes(model_of(method))
    config = CONFIGS[method]

    def loss_fn(params, stats, batch):
        model = nnx.merge(structure, params, stats, copy=True)
        e = model(batch["image"], batch["ids"], batch["mask"], batch["words"], train=True)
        loss, _ = pretrain.METHODS[method].loss(e, mesh, **config.loss)
        return loss, statistics(model)

    return jax.jit(jax.value_and_grad(loss_fn, has_aux=True))


def outcome(method, mesh, change=lambda params: params):
    """Loss, statistics and gradients of one batch, with the parameters changed so."""
    params, stats = jax.jit(lambda: split(model_of(method)(nnx.Rngs(0)))[1:])()
    batch = meshes.to_devices(mesh, batch_of())
    state = jax.device_put((change(params), stats), meshes.replicated(mesh))
    (loss, stats), grads = step_of(method, mesh)(*state, batch)
    return toy.on_host({"loss": loss, "stats": stats, "grads": grads})


@pytest.mark.parametrize("method", CONFIGS)
def test_eight_devices_equal_one(method):
    """Loss, statistics, gradients, Sinkhorn; for ConVIRT see tests/train/test_step.py."""
    one = outcome(method, toy.one_device_mesh())
    many = outcome(method, meshes.make_mesh(8, 1))
    nudged = outcome(method, toy.one_device_mesh(), toy.nudged)
    # Biases before a batch normalization have no gradient, but for rounding.
    skip = r".*_head/(first|last)/bias" if method == "mgca" else "$^"
    toy.assert_equal_but_for_rounding(many, one, nudged, skip)


def test_words_are_the_sums_of_their_pieces():
    x = jnp.arange(12.0).reshape(1, 6, 2)
    found = towers.sum_words(x, jnp.array([[0, 1, 1, 2, -1, -1]]))
    np.testing.assert_array_equal(found[0], [[0, 1], [6, 8], [6, 7], [0, 0], [0, 0], [0, 0]])


def test_what_an_encoder_gives_regions_and_words_is_in_its_place():
    """Regions row by row, words as sums of their pieces in the last two layers, all by loops."""
    model, batch = model_of("gloria")(nnx.Rngs(0)), batch_of()
    ids, mask, words = (jnp.asarray(batch[k]) for k in ("ids", "mask", "words"))
    images = jnp.asarray(batch["image"])
    e = model(images, ids, mask, words, train=False)
    layer3, states = model.image(images, False).layer3, model.text(ids, mask, None)
    attention = model.text.cls_attention(states, mask)
    kernel, (_, side, _, _) = model.region_head.last.kernel[...], layer3.shape
    near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    for y, x in np.ndindex(side, side):
        near(e.local.regions[:, y * side + x], layer3[:, y, x] @ kernel)
    summed = states[-1] + states[-2]
    for i, numbers in enumerate(batch["words"]):
        assert e.local.word_count[i] == numbers.max() - 1
        for n in range(8):
            pieces = np.flatnonzero(numbers == n)
            near(e.local.words[i, n], sum((summed[i, t] for t in pieces), jnp.zeros(16)))
            near(e.local.word_attention[i, :, n], attention[i][:, pieces].sum(1))


def test_the_state_of_cls_does_not_enter_the_normalization_of_words():
    """As in MGCA's code; the head's last normalization centres what it sees."""
    e = model_of("mgca")(nnx.Rngs(0))(
        *(jnp.asarray(batch_of()[k]) for k in ("image", "ids", "mask", "words")), train=True
    )
    np.testing.assert_allclose(e.local.words[:, 1:].mean((0, 1)), 0, atol=1e-5)
    assert not e.local.words[:, 0].any()


def test_which_words_the_losses_compare(monkeypatch):
    """GLoRIA [CLS] and the words, MGCA the words and [SEP], a heat map the words alone."""
    batch = batch_of()
    e = model_of("mgca")(nnx.Rngs(0))(
        *(jnp.asarray(batch[k]) for k in ("image", "ids", "mask", "words")), train=True
    )
    last = batch["words"].max(1)  # the number of [SEP]
    _, words, mask = pretrain._regions_and_words(e)
    np.testing.assert_array_equal(mask, np.arange(8) < last[:, None])
    np.testing.assert_array_equal(words, e.local.words)
    taken = []
    monkeypatch.setattr(pretrain.mgca, "mgca_loss", lambda *args: taken.extend(args) or ())
    pretrain._mgca(e, None)
    np.testing.assert_array_equal(taken[2], e.local.words[:, 1:])
    np.testing.assert_array_equal(taken[4], np.arange(1, 8) <= last[:, None])
    assert not np.asarray(taken[5])[~np.asarray(taken[4])].any()

    regions = jnp.array([[[1.0, 0], [0, 1], [1, 1], [-1, 0]]])
    words = jnp.array([[[9.0, 9], [2, 0], [0, 3], [-5, 5], [7, 7]]])
    none = jnp.zeros((1, 1, 5))
    found = frozen._by_words(towers.Local(regions, words, jnp.array([2]), none, None))
    np.testing.assert_allclose(found, [[[0.5, 0.5], [0.5**0.5, -0.5]]], rtol=1e-6)


def test_counting_the_padding_would_not_change_gloria():
    """The official mean over all positions is the mean over the real ones, but for its length."""
    rng = np.random.default_rng(0)
    image, text = rng.normal(size=(2, 4, 6)).astype("f")
    share = rng.uniform(0.1, 1, (4, 1)).astype("f")  # of a report that is not padding
    a, b = (
        pretrain.gloria.global_loss(jnp.asarray(image), jnp.asarray(t))[0]
        for t in (text, share * text)
    )
    np.testing.assert_allclose(a, b, rtol=1e-6)


def small(method):
    config = CONFIGS[method].copy_and_resolve_references()
    config.ingest.workers = 1
    config.data.update({"batch_size": 32, "threads": 1})
    config.train.log_every = 1
    return config


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    for method in CONFIGS:
        (folder / method).mkdir()
        main.run(small(method), folder / method)
    return folder


@pytest.mark.parametrize(
    ("method", "kinds"), [("gloria", ("", "local/", "mixed/")), ("mgca", ("",))]
)
def test_a_run_finds_reports_by_what_its_method_compares(runs, method, kinds):
    found = json.loads((runs / method / "results.json").read_text())["metrics"]
    assert set(found) == {
        f"test/{kind}{way}/{figure}"
        for kind in kinds
        for way in ("image_to_text", "text_to_image")
        for figure in ("recall@1", "recall@5", "recall@10", "median_rank")
    }
    lines = [json.loads(s) for s in (runs / method / "metrics.jsonl").read_text().splitlines()]
    losses = [line[k] for line in lines for k in ("train/loss", "valid/loss") if k in line]
    assert len(losses) == 6
    assert np.isfinite(losses).all()


def test_prototypes_are_held_in_the_first_epoch():
    params = {"prototypes": jnp.eye(3), "image": {"kernel": jnp.ones((2, 2))}}
    config = copy.deepcopy(CONFIGS["mgca"])
    config.train.epochs = 3
    data = Mock(spec=Data, train=[[None] * 24])
    training = Training(config, config, 8, data, Path(), meshes.make_mesh())
    tx = training.optimizer(params)
    state, moved = tx.init(params), []
    for _ in range(5):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        moved.append(bool(jnp.abs(updates["prototypes"]).max() > 1e-6))
    assert moved == [False, False, False, True, True]


def test_prototypes_have_unit_rows(runs):
    checkpoints = Checkpoints(runs / "mgca" / "checkpoints", read_only=True)
    steps = [checkpoints.latest(), checkpoints.best()]
    kept = [checkpoints.restore_all(s, ("params",))[0]["prototypes"] for s in steps]
    checkpoints.close()
    for prototypes in kept:
        np.testing.assert_allclose(np.linalg.norm(prototypes, axis=1), 1, rtol=1e-5)


def test_phrases_are_found_on_masks(runs, tmp_path):
    config = ground.get_config("smoke")
    config.ingest.workers = 1
    config.encoder.workdir = str(runs / "gloria")
    workdir = runs / "ground"
    workdir.mkdir()
    main.run(config, workdir)
    found = json.loads((workdir / "results.json").read_text())["metrics"]
    figures = {"pointing": (0, 1), "contrast_to_noise": (-100, 100), "dice": (0, 1)}
    for figure, (low, high) in figures.items():
        entry = found[f"test/Pleural Effusion/{figure}"]
        assert low <= entry["value"] <= high
        assert entry["n"] >= 1
        for kind in ("prior", "ceiling"):
            assert low <= entry[kind] <= high
    sheet = np.asarray(Image.open(workdir / "heat_maps.png"))
    assert {tuple(color) for color in sheet.reshape(-1, 3)} >= {(0, 255, 255), (255, 255, 255)}

    config.ingest.size = 48  # not what the encoder was trained on
    (runs / "ground-48").mkdir()
    main.run(config, runs / "ground-48")
    assert (runs / "ground-48" / "heat_maps.png").exists()

    config.phrases = {"Hernia": "hernia"}
    with pytest.raises(UserError, match=r"config\.phrases: Hernia: the data set has the labels"):
        main.run(config, tmp_path)
    config.phrases = {}
    with pytest.raises(UserError, match=r"config\.phrases: none"):
        main.run(config, tmp_path)
    config.phrases = {"Edema": "edema"}
    with pytest.raises(UserError, match=r"Edema: no image of .* has it with a mask or box"):
        main.run(config, tmp_path)


def test_grounding_is_compared_with_the_usual_place_and_with_a_perfect_map():
    region = np.zeros((8, 16, 16), bool)
    region[::2, 4:8, 4:8] = True
    region[1::2, 4:8, 8:12] = True
    images = task._Images(region, region, np.array(list("abcdefgh")))
    figures = {}
    for side in (16, 4):
        heat = task.resized(region, side)
        figures[side] = task._figures("Nodule", images, heat, images, heat)
    full, coarse = (figures[side]["test/Nodule/dice"] for side in (16, 4))
    assert full["ceiling"] == full["value"] == 1
    assert 0.5 < coarse["ceiling"] == coarse["value"] < 1
    # The usual place is both: twice the region.
    np.testing.assert_allclose([full["prior"], coarse["prior"]], 2 / 3)
    assert full["n"] == 8
    pointing = figures[4]["test/Nodule/pointing"]
    np.testing.assert_allclose([pointing[k] for k in ("value", "prior")], [1, 0.5])
    np.testing.assert_allclose(pointing["chance"], 1 / 16)


def test_heat_maps_of_ones_own_radiographs(runs, tmp_path, monkeypatch, capsys):
    picture, sheet = tmp_path / "own.png", tmp_path / "sheet.png"
    ramp = np.linspace(0, 255, 60 * 50).reshape(60, 50).astype(np.uint8)
    Image.fromarray(ramp).save(picture)

    def run(*images, phrases=("effusion", "left nodule")):
        command = ["heat_maps", "--encoder", str(runs / "gloria"), "--out", str(sheet), "--images"]
        monkeypatch.setattr("sys.argv", [*command, *map(str, images), "--phrases", *phrases])
        return heat_maps.main()

    assert run(picture, picture) == 0
    seen = np.asarray(Image.open(sheet)).astype(int)
    assert len(np.unique(seen.reshape(-1, 3), axis=0)) > 50
    left, right = seen[4:164, 4:164], seen[4:164, 168:328]
    np.testing.assert_array_equal(left, right)
    assert np.ptp(left - left[..., ::-1]) > 0  # not grey
    written = sheet.read_bytes()

    capsys.readouterr()
    assert run(picture, tmp_path / "none.png") == 2
    assert "none.png: no such file" in capsys.readouterr().err
    assert run(picture, phrases=(" ",)) == 2
    assert "give it a word" in capsys.readouterr().err
    assert sheet.read_bytes() == written


def test_grad_cam_weighs_the_channels_of_layer_3_by_what_they_do_to_the_score():
    model = toy.make_model(nnx.Rngs(0))
    images = jnp.asarray(batch_of()["image"][:1])
    text = jax.random.normal(jax.random.key(1), (1, toy.HEADS["width"]))
    seen = model.image(images, False)
    np.testing.assert_array_equal(model.image.after_layer3(seen.layer3), seen.pooled)

    def score(step):
        image = model.image_head(model.image.after_layer3(seen.layer3 + step), False)
        return (normalize(image) * normalize(text)).sum()

    steps = 1e-3 * jnp.eye(seen.layer3.shape[-1])[:, None, None, None]
    slopes = (jax.vmap(score)(steps) - jax.vmap(score)(-steps)) / 2e-3 / seen.layer3[0, ..., 0].size
    expected = np.maximum(seen.layer3 @ slopes, 0)
    assert expected.max() > 0
    found = frozen._grad_cam(model, images, text)
    np.testing.assert_allclose(found, expected, atol=0.01 * expected.max())


@pytest.mark.parametrize(
    ("method", "changes", "says"),
    [
        ("gloria", {"loss.tau1": 0.0}, r"config\.loss\.tau1: 0\.0: give a number above 0"),
        (
            "gloria",
            {"heads.local": False},
            r"config\.heads: local False.* gloria needs local heads",
        ),
        ("gloria", {"heads.width": 8}, r"config\.heads\.text: without a head for the text"),
        ("gloria", {"text.summed": 2}, r"text\.summed: 2 is more than config\.text\.layers 1"),
        ("gloria", {"loss.tau1": 400.0}, r"config\.loss\.tau1: 400\.0: give a number up to 150"),
        ("gloria", {"image.upsample": -5}, r"config\.image\.upsample: -5: give a number of 0 or"),
        ("mgca", {"heads.hidden": 0}, r"config\.heads\.hidden: 0: give a number above 0"),
        ("gloria", {"heads.prototypes": -1}, r"config\.heads\.prototypes: -1: give 2 or more"),
        ("mgca", {"heads.prototypes": 1}, r"config\.heads\.prototypes: 1: give 2 or more"),
        ("mgca", {"loss.epsilon": -1.0}, r"config\.loss\.epsilon: -1\.0: give a number above 0"),
        ("mgca", {"optim.held": ("q",)}, r"config\.optim\.held: 'q' matches no parameter"),
        ("mgca", {"image.kind": "cnn"}, r"config\.image\.kind: 'cnn' is unknown: choose from"),
        ("mgca", {"data.batch_size": 12}, r"batch_size: 12 does not divide over 8 devices"),
    ],
)
def test_a_wrong_setting_is_one_line(runs, tmp_path, method, changes, says):
    config = small(method)
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=says) as caught:
        main.run(config, runs / tmp_path.name)
    assert "\n" not in str(caught.value)
