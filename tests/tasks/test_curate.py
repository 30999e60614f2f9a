"""The curate task from sets on disk to results.json and its page, and the pair of encoders."""

import csv
import io
import json
import re
from pathlib import Path
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from flax import nnx
from scipy import ndimage

from configs.curate import get_config
from medsyn_jax import main
from medsyn_jax.core.errors import UserError
from medsyn_jax.curation.collection import Collection
from medsyn_jax.data.images import transforms
from medsyn_jax.data.loading.dataset import Source
from medsyn_jax.data.sources import resolve
from medsyn_jax.data.store import shards
from medsyn_jax.tasks import curate
from medsyn_jax.train import features, frozen
from tests.curation import standins
from tests.train.runs import CROP, SIZE, ingest_config, write_pair_run, write_pairs, write_run

NAMES = ["bright", "left", "rare"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A pre-training run in `run`, the real set in `real`, and the synthetic `good` and `bad`.

    bad: dark and blurred, with reports of other images and marks of de-identification; every third
    image of good is a training image, some of them noisy.
    """
    folder = tmp_path_factory.mktemp("world")
    write_pair_run(folder / "run")
    config = ingest_config()
    table = write_pairs(folder / "pairs", 200, standins.report)
    (folder / "real").symlink_to(resolve.prepare(str(table), config, folder))
    train = shards.open_split(folder / "real", "train")
    made, rng = standins.make(7, 60, SIZE), np.random.default_rng(0)

    def good(i: int, record: dict) -> dict:
        if i % 3:
            return record
        noise = rng.normal(0, 2, (SIZE, SIZE)) if i % 2 else 0
        image = np.clip(train[i]["image"] + noise, 0, 255).astype(np.uint8)
        return record | {"image": image, "labels": train[i]["labels"]}

    def bad(i: int, record: dict) -> dict:
        other = made[(7 * i // 2 + 3) % 30]  # both images of a prompt have the same wrong one
        text = other["report"] + " Seen by ___."
        record |= {"prompt": f"Prompt {i // 2}.", "seed": "1", "generator": "none"}
        image = ndimage.gaussian_filter(record["image"] // 4, 2)
        return record | {"image": image, "report": text} | {k: other[k] for k in ("labels",)}

    chosen = standins.changed(made, good)
    (folder / "good").mkdir()
    parts = {"train": chosen[:24], "test": chosen[24:]}
    standins.write_set(folder / "good" / "shards", parts, NAMES)
    standins.write_set(folder / "bad", {"train": standins.changed(made[:30], bad, 2)}, NAMES)
    return folder


def config_of(world: Path, synthetic: str):
    config = get_config("smoke")
    config.encoder.workdir = str(world / "run")
    config.synthetic, config.real = str(world / synthetic), str(world / "real")
    config.probe.update({"epochs": 20, "learning_rate": 0.02})
    return config


def figures(workdir: Path) -> dict:
    text = (workdir / "results.json").read_text()
    results = json.loads(text, parse_constant=pytest.fail)  # NaN is not JSON
    assert results["task"] == "curate"
    return results["metrics"]


def test_a_good_set_with_copies(world, tmp_path, monkeypatch):
    workdir = tmp_path / "good"
    main.run(config_of(world, "good"), workdir)
    found = figures(workdir)
    # One feature outweighs the others in this encoder, so that chance is large; a bad set has 50.
    assert found["fidelity/frechet/ratio"]["value"] < 5
    assert found["fidelity/frechet/real"]["n"] == found["fidelity/frechet/synthetic"]["n"]
    for side, count in (("real", 40), ("synthetic", 36)):
        entry = found[f"labels/{side}/auroc/bright"]
        assert entry["value"] > 0.9
        assert entry["ci95"][0] <= entry["value"] <= entry["ci95"][1]
        assert entry["n"] <= count
        assert f"labels/{side}/auroc/rare" not in found
    assert found["alignment/synthetic/true"]["n"] == 36  # those of held-out prompts
    assert found["privacy/pixels/rate"]["value"] == 20 / 60  # but copies among all
    assert found["privacy/rate"]["value"] >= 20 / 60
    assert found["privacy/pixels/maximum"]["value"] >= found["privacy/pixels/threshold"]["value"]
    assert not any(found[k]["value"] for k in found if k.startswith("leftovers/"))
    rows = list(csv.DictReader(io.StringIO((workdir / "records.csv").read_text())))
    train = shards.open_split(world / "real", "train").keys
    assert [r["key"] for r in rows] == [f"made/{i:03d}" for i in range(60)]
    for i, row in enumerate(rows):
        assert row["pixels_flagged"] == str(int(i % 3 == 0))
        if i % 3 == 0:
            assert row["pixels_nearest"] == train[i]
            assert float(row["pixels_similarity"]) > 0.99
    page = (workdir / "report.html").read_text(encoding="utf-8")
    assert page.count("class='card marked'") >= 12
    _check_self_contained(page)
    before = (workdir / "results.json").read_text()
    monkeypatch.setattr(features, "compute", lambda *_: pytest.fail("features are on disk"))
    main.run(config_of(world, "good"), workdir)
    assert (workdir / "results.json").read_text() == before
    assert (workdir / "report.html").read_text(encoding="utf-8") == page


def test_a_bad_set_of_several_images_a_prompt(world, tmp_path):
    workdir = tmp_path / "bad"
    main.run(config_of(world, "bad"), workdir)
    found = figures(workdir)
    assert found["fidelity/frechet/ratio"]["value"] > 20
    assert found["labels/synthetic/auroc/bright"]["value"] < 0.75
    assert found["labels/real/auroc/bright"]["value"] > 0.9
    assert found["diversity/ms_ssim/synthetic/same_prompt"]["n"] == 30  # a pair a prompt
    for side in ("real", "synthetic"):
        mine, others, difference = (
            found[f"alignment/{side}/{what}"]["value"]
            for what in ("true", "shuffled", "difference")
        )
        assert difference == pytest.approx(mine - others, abs=1e-6)
    assert found["leftovers/report/___"] == {"value": 60, "n": 60}
    assert found["leftovers/prompt/___"] == {"value": 0, "n": 60}
    page = (workdir / "report.html").read_text(encoding="utf-8")
    assert len(re.findall(r"<p>Prompt \d+\.</p>", page)) == 12
    assert len(re.findall(r"made/\d+#1", page)) >= 12  # the second image of each prompt shown
    _check_self_contained(page)


def test_sets_without_labels_have_no_label_agreement():
    sources = [Mock(spec=Source, label_names=[])]
    empty = Collection(sources, np.ones((4, 2)), np.zeros((4, 0), np.int8), np.arange(4))
    config = get_config("smoke")
    assert curate._label_agreement(config, empty, empty, {"real": empty, "synthetic": empty}) == {}


def _check_self_contained(page: str) -> None:
    assert set(re.findall(r"(?:src|href)='([a-z:/]*)", page)) == {"data:image/png"}
    assert "http" not in page
    assert page.count("<figure>") == page.count("</figure>") > 12


def test_the_figures_of_alignment_are_those_of_the_pair(world):
    pair = frozen.pretrained_pair(world / "run")
    assert (pair.tokens, pair.size, pair.crop) == (8, SIZE, CROP)
    records = shards.open_split(world / "real", "test")
    texts = records.texts(pair.sections)[:5]
    images = np.stack([records[i]["image"] for i in range(5)])
    ids, mask = pair.tokenizer.encode(texts, pair.tokens)
    v, t = jax.jit(frozen.Pair.embed)(pair, images, ids, mask)
    np.testing.assert_allclose(np.linalg.norm(v, axis=1), 1, atol=1e-5)

    state = write_run(world / "again")
    edge = (SIZE - CROP) // 2

    @jax.jit
    def direct(images, ids, mask):
        model = nnx.merge(pair.structure, state["params"], state["stats"], copy=True)
        seen = transforms.normalize(images[:, edge:-edge, edge:-edge], mean=0.4, std=0.2)
        return model(seen, ids, mask, train=False)[:2]

    for got, want in zip((v, t), direct(images, ids, mask), strict=True):
        want = np.asarray(want, np.float64)
        want = want / np.linalg.norm(want, axis=1, keepdims=True)
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"synthetic": ""}, "config.synthetic and config.real: one is empty"),
        ({"synthetic": "gone"}, "config.synthetic 'gone'"),
        ({"synthetic": "{world}/run"}, "holds no data set"),
        ({"synthetic": "{world}/other"}, "the synthetic set has fog; the real one has bright, "),
        ({"synthetic": "{world}/single"}, "distance: 1 synthetic images and 80 real"),
        ({"splits": ("valid",)}, "split valid has no record, it has"),
        ({"real": "gone.csv"}, "config.real 'gone.csv'"),
        ({"encoder.workdir": "{world}/empty"}, "empty/checkpoints: no checkpoints there"),
        ({"encoder.workdir": "nowhere"}, "configs/convirt.py` first"),
        ({"privacy.quantile": 1.5}, "config.privacy.quantile: 1.5: give a share"),
        ({"fidelity.draws": 0}, "config.fidelity.draws: 0: give a number above 0"),
        ({"data.batch_size": 12}, "config.data.batch_size: 12 does not divide"),
        ({"probe.learning_rate": 1e30}, "config.probe.learning_rate: 1e\\+30: .* diverged"),
    ],
)
def test_a_mistake_is_one_line_that_names_what_is_wrong(world, tmp_path, changes, message):
    if not (world / "other").exists():
        one = standins.make(3, 1, SIZE)
        standins.write_set(world / "single", {"test": one}, NAMES)
        one[0]["labels"] = one[0]["labels"][:1]
        standins.write_set(world / "other", {"test": one}, ["fog"])
        (world / "empty").mkdir()
        (world / "empty" / "config.json").write_bytes((world / "run/config.json").read_bytes())
    config = config_of(world, "good")
    config.update_from_flattened_dict(
        {k: v.format(world=world) if isinstance(v, str) else v for k, v in changes.items()}
    )
    with pytest.raises(UserError, match=message) as error:
        main.run(config, tmp_path / "run")
    assert "\n" not in str(error.value)
