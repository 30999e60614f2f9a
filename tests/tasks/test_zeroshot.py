"""Zero-shot classification: its scores by hand, and what cannot be judged."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from configs.zeroshot import get_config
from medsyn_jax import main
from medsyn_jax.core import mesh as meshes
from medsyn_jax.core.errors import UserError
from medsyn_jax.data.sources import resolve
from medsyn_jax.data.store import shards
from medsyn_jax.tasks import zeroshot
from medsyn_jax.train import frozen
from tests.curation import standins
from tests.train.runs import ingest_config, write_pair_run, write_pairs

PROMPTS = """
[left]
positive = ["left side", "the left is bright"]
negative = ["no side"]
[bright]
positive = ["the image is bright"]
negative = ["dark image", "the image is dark"]
[rare]
positive = ["rare"]
negative = ["common"]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A pre-training run, a set of pairs whose reports differ, and prompts of its labels."""
    folder = tmp_path_factory.mktemp("world")
    write_pair_run(folder / "run")
    table = write_pairs(folder / "pairs", 200, standins.report)
    (folder / "set").symlink_to(resolve.prepare(str(table), ingest_config(), folder))
    (folder / "prompts.toml").write_text(PROMPTS)
    return folder


def settings(world, **changes):
    config = get_config("smoke")
    config.encoder.workdir, config.data.source = str(world / "run"), str(world / "set")
    config.prompts = str(world / "prompts.toml")
    config.update(changes)
    return config


def test_figures_are_those_of_the_cosines_with_a_direction(world, tmp_path, capsys):
    main.run(settings(world), tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())["metrics"]
    assert "one class only in the test split, and so no figure: rare" in capsys.readouterr().err
    pair, records = frozen.pretrained_pair(world / "run"), shards.open_split(world / "set", "test")
    rows = [records[i] for i in range(len(records))]
    label = np.array([row["labels"][records.label_names.index("left")] for row in rows])

    ids, mask = pair.tokenizer.encode([""] * len(rows), pair.tokens)
    source = frozen.Arrays(image=np.stack([row["image"] for row in rows]), ids=ids, mask=mask)
    images, _ = frozen.embeddings(pair, source, meshes.make_mesh(), 16, 0)
    scores = images @ zeroshot.direction(pair, ["left side", "the left is bright"], ["no side"])
    known = label >= 0
    expected = roc_auc_score(label[known], scores[known])
    entry = results["test/auroc/left"]
    assert entry["value"] == pytest.approx(expected, abs=1e-6)
    assert (entry["n"], entry["positives"]) == (known.sum(), (label == 1).sum())
    assert entry["ci95"][0] <= entry["value"] <= entry["ci95"][1]
    mean = np.mean([results[f"test/auroc/{name}"]["value"] for name in ("left", "bright")])
    assert results["test/auroc/mean"]["value"] == pytest.approx(mean)
    assert "test/auroc/rare" not in results
    assert 0 <= results["test/image_to_text/recall@1"]["value"] <= 1


def test_a_direction_is_the_difference_of_means_of_unit_length(world):
    pair = frozen.pretrained_pair(world / "run")
    positive, negative = ["left side", "the left is bright"], ["no side"]
    ids, mask = pair.tokenizer.encode([*positive, *negative], pair.tokens)
    images = np.zeros((3, pair.size, pair.size), np.uint8)
    a, b, down = np.asarray(jax.jit(frozen.Pair.embed)(pair, images, ids, mask)[1])
    np.testing.assert_allclose(np.linalg.norm([a, b, down], axis=1), 1, atol=1e-5)
    up = (a + b) / np.linalg.norm(a + b)
    found = zeroshot.direction(pair, positive, negative)
    np.testing.assert_allclose(found, up - down, atol=1e-6)
    assert np.abs(found).max() > 1e-5


def test_labels_without_prompts_are_named(world, tmp_path, capsys):
    (tmp_path / "one.toml").write_text('[left]\npositive = ["left"]\nnegative = ["clear"]\n')
    main.run(settings(world, prompts=str(tmp_path / "one.toml")), tmp_path / "run")
    assert "no prompts, and so no figure: bright, rare" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[left", "config.prompts: .*cannot be read"),
        ('[left]\npositive = ["a"]', "left: give lists of sentences `positive` and `negative`"),
        ('[left]\npositive = ["a"]\nnegative = []', "left: give lists of sentences"),
        ('[left]\npositive = ["a"]\nnegative = [" "]', "left: give lists of sentences"),
        ('[left]\npositive = ["a"]\nnegative = "b"', "left: give lists of sentences"),
        ("left = 3", "left: give lists of sentences"),
        ('[other]\npositive = ["a"]\nnegative = ["b"]', "no label of the data set .bright, left,"),
    ],
)
def test_prompts_that_cannot_be_used_are_one_line(world, tmp_path, text, says):
    (tmp_path / "prompts.toml").write_text(text)
    with pytest.raises(UserError, match=says):
        main.run(settings(world, prompts=str(tmp_path / "prompts.toml")), tmp_path / "run")


def test_missing_prompts_are_one_line(world, tmp_path):
    with pytest.raises(UserError, match=r"missing: config.prompts 'no.toml'"):
        main.run(settings(world, prompts="no.toml"), tmp_path)
