from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from configs.ingest import get_config
from medsyn_jax.core.errors import UserError
from medsyn_jax.data.sources import ingestion, plan, records, resolve
from medsyn_jax.data.store import shards
from medsyn_jax.data.store.items import NOT_FRONTAL, Item, Listing
from medsyn_jax.train import corpus


def test_a_csv_is_ingested_once_under_its_name(make_pairs, tmp_path, capsys):
    config = make_pairs()
    table, config.source, config.path = config.path, "phantom", ""
    root = tmp_path / "data"
    directory = resolve.prepare(table, config, root)
    fingerprint = shards.describe(directory)["fingerprint"]
    assert directory == root / f"pairs-{fingerprint[:8]}"
    assert (config.source, config.path) == ("phantom", "")
    stamp = (directory / "medsyn.json").stat().st_mtime_ns
    assert resolve.prepare(table, config, root) == directory
    assert (directory / "medsyn.json").stat().st_mtime_ns == stamp
    assert "of other settings" not in capsys.readouterr().err
    config.size = 8
    assert resolve.prepare(table, config, root) != directory
    assert f"a set beside {directory.name} in" in capsys.readouterr().err


def test_a_directory_of_shards_is_itself_if_it_is_whole(make_pairs, tmp_path):
    directory = resolve.prepare(make_pairs().path, make_pairs(name="b"), tmp_path / "data")
    config = get_config("smoke").ingest
    assert resolve.prepare(str(directory), config, tmp_path / "other") == directory
    assert not (tmp_path / "other").exists()
    next(directory.glob("*train*")).unlink()
    with pytest.raises(UserError, match=r"pairs-train.*is missing"):
        resolve.prepare(str(directory), config, tmp_path / "other")


def test_the_phantom_corpus_is_ingested(tmp_path):
    config = get_config("smoke").ingest
    config.phantom.subjects = 6
    directory = resolve.prepare("phantom", config, tmp_path)
    assert directory.name.startswith("phantom-")
    info = shards.describe(directory)
    assert sum(split["records"] for split in info["splits"].values()) == 12
    record = shards.open_split(directory, "train")[0]
    assert record["image"].shape == record["mask_lungs"].shape == (32, 32)
    assert record["labels"].shape == (len(info["label_names"]),)
    assert record["findings"]


def test_what_is_no_data_is_refused(tmp_path):
    config = get_config("smoke").ingest
    with pytest.raises(UserError, match=r"nothing\.csv: no such file or directory"):
        resolve.prepare(str(tmp_path / "nothing.csv"), config, tmp_path / "data")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"notes\.txt: is neither a CSV nor a directory of shards"):
        resolve.prepare(str(tmp_path / "notes.txt"), config, tmp_path / "data")
    with pytest.raises(UserError, match="holds no data set"):
        resolve.prepare(str(tmp_path), config, tmp_path / "data")
    (tmp_path / "table.csv").write_text("picture,words\na.png,clear\n")
    with pytest.raises(UserError, match=r"table\.csv.*image"):
        resolve.prepare(str(tmp_path / "table.csv"), config, tmp_path / "data")
    assert not Path(tmp_path / "data").exists()


def test_the_workdir_of_a_run_stands_for_its_shards(make_pairs, tmp_path):
    config = make_pairs()
    directory = ingestion.ingest(config, tmp_path / "run" / "shards")
    assert resolve.prepare(str(tmp_path / "run"), config, tmp_path / "data") == directory
    folders = get_config("folder").ingest  # as classify asks for class folders
    assert corpus.prepare(str(tmp_path / "run"), folders, tmp_path / "data") == directory
    assert not (tmp_path / "data").exists()
    with pytest.raises(UserError, match=r"run: holds no data set, but .*/run/shards does: name"):
        shards.describe(tmp_path / "run")


def test_a_table_without_named_labels_is_refused_before_it_is_ingested(make_pairs, tmp_path):
    config = make_pairs()
    resolve.check_labels(config.path, config)
    config.pairs.labels = ()
    with pytest.raises(UserError, match=r"config\.ingest\.pairs\.labels: .* like labels: odd$"):
        corpus.check_labels(config.path, config)
    Path(config.path).write_text("image,report\na.png,1\nb.png,no\n")
    with pytest.raises(UserError, match=r"config\.ingest\.pairs\.labels: .* none looks like one$"):
        resolve.check_labels(config.path, config)
    resolve.check_labels("phantom", config)
    resolve.check_labels(str(tmp_path), config)


def test_a_new_source_is_one_module_that_any_run_can_name(tmp_path, monkeypatch):
    """As chest radiographs with boxes and a published split come: no reports, no settings."""

    def list_items(config):
        root, splits = Path(config.path), ("train", "valid", "test")
        items = [
            Item(path.name, path.stem, split, str(path), labels=(1,), boxes=(("Mass", 1, 2, 9, 9),))
            for path, split in zip(sorted(root.glob("*.png")), splits, strict=True)
        ]
        return Listing(items, ("Mass",), dropped={NOT_FRONTAL: 1})

    source = SimpleNamespace(list_items=list_items, make=records.make)
    monkeypatch.setitem(plan.SOURCES, "tiny", source)
    (tmp_path / "tiny").mkdir()
    for name in "abc":
        pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
        Image.fromarray(pixels).save(tmp_path / "tiny" / f"{name}.png")
    config = get_config("smoke").ingest
    config.source, config.size = "tiny", 8
    directory = resolve.prepare(str(tmp_path / "tiny"), config, tmp_path / "data")
    assert directory.name.startswith("tiny-")
    assert shards.describe(directory)["left_out"] == {NOT_FRONTAL: 1}
    test = shards.open_split(directory, "test")
    assert (test.keys, test.subjects()) == (["c.png"], ["c"])
    record = test[0]
    assert (record["report"], record["labels"].tolist()) == ("", [1])
    np.testing.assert_array_equal(record["boxes"][0]["bbox"], [0.5, 1, 4.5, 4.5])
    assert resolve.prepare(str(tmp_path / "tiny"), config, tmp_path / "data") == directory
    config.source = "phantom"
    with pytest.raises(UserError, match="tiny: holds no data set"):
        resolve.prepare(str(tmp_path / "tiny"), config, tmp_path / "data")
