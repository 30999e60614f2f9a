import json

import pytest

from configs.ingest import get_config
from medsyn_jax.core.errors import UserError
from medsyn_jax.data import loader, shards, tokenizers
from medsyn_jax.tasks import ingest


def test_the_command_leaves_shards_and_a_summary(tmp_path, capsys):
    config = get_config("smoke")
    ingest.run(config, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["task"] == "ingest"
    info = shards.describe(tmp_path / "shards")
    for split, part in info["splits"].items():
        assert results["metrics"][f"records/{split}"]["value"] == part["records"]
    assert sum(m["value"] for m in results["metrics"].values()) == 40
    assert results["metrics"]["left_out"]["n"] == 40
    printed = capsys.readouterr()
    assert info["fingerprint"] in printed.err
    assert info["splits"]["train"]["sha256"] in printed.err
    assert "records/train" in printed.out
    assert json.loads((tmp_path / "config.json").read_text())["config"]["task"] == "ingest"
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "shards").glob("*train*")}
    ingest.run(config, tmp_path)
    assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "shards").glob("*train*")}


def test_what_it_leaves_can_be_loaded(tmp_path):
    ingest.run(get_config("smoke"), tmp_path)
    data = shards.open_split(tmp_path / "shards", "train")
    sections = ("findings", "impression")
    tokenizer = tokenizers.train_wordpiece(data.texts(sections), 300, tmp_path / "tokenizer")
    source = loader.Source(tmp_path / "shards", "train", sections, tokenizer, 24, 32)
    batch = next(loader.train_loader([source], [1.0], 8, seed=0))
    assert batch["image"].shape == (8, 32, 32)
    assert batch["image"].std() > 10


@pytest.mark.parametrize(
    ("variant", "source", "size"),
    [
        ("demo", "phantom", 96),
        ("smoke", "phantom", 32),
        ("paper", "mimic_cxr", 256),
        ("pairs", "pairs", 256),
        ("folder", "folder", 256),
    ],
)
def test_variants(variant, source, size):
    config = get_config(variant).ingest
    assert (config.source, config.size) == (source, size)


@pytest.mark.parametrize("variant", ["paper", "pairs", "folder"])
def test_a_source_that_is_not_there_is_told_in_one_line(variant, tmp_path):
    config = get_config(variant)
    config.ingest.path = str(tmp_path / "not-here")
    with pytest.raises(UserError, match="not-here") as told:
        ingest.run(config, tmp_path / "work")
    assert "\n" not in str(told.value)
    assert not (tmp_path / "work" / "shards").exists()


def test_an_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="variant 'huge' is unknown"):
        get_config("huge")
