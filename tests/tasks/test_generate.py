import json
import resource
import shutil
import warnings
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from configs.generate import get_config
from medsyn_jax import main
from medsyn_jax.core.errors import UserError
from medsyn_jax.data.loading import loader
from medsyn_jax.data.store import card, schema, shards
from medsyn_jax.data.text import tokenizers
from medsyn_jax.diffusion.generator import Generator, NotFinite, Sampling
from medsyn_jax.tasks import generate
from medsyn_jax.train import frozen
from scripts import random_pipeline

SIDE = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a pipeline."""
    made = tmp_path_factory.mktemp("made") / "pipeline"
    random_pipeline.write(made)
    return made


class Drawn(Generator):
    """Stands for a generator: what it draws depends on the record's index and prompt alone."""

    batch, sampling, side, lost, drawn = 4, Sampling("ddim", 4), SIDE, None, 0

    def __init__(self):
        pass

    def encode(self, prompts):
        assert len(set(prompts)) == len(prompts)
        return np.array([[[len(text)]] for text in prompts])

    def stream(self, chunks):
        for chunk in chunks:
            assert len(chunk.indices) <= self.batch
            if self.lost in chunk.indices:
                raise NotFinite(self.lost, 2)
            self.drawn += len(chunk.indices)
            yield np.stack(
                [
                    np.random.default_rng((i, c)).integers(0, 256, (self.side,) * 2, np.uint8)
                    for i, c in zip(chunk.indices, chunk.contexts[:, 0, 0], strict=True)
                ]
            )


@pytest.fixture
def drawn(monkeypatch):
    made = Drawn()
    monkeypatch.setattr(generate, "_generator", lambda config, pipeline: made)
    return made


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "prompts.csv"
    parts = ["train"] * 20 + ["valid"] * 3 + ["test"] * 7
    lines = [f"Effusion {i % 9}.,k{i},{part}" for i, part in enumerate(parts)]
    path.write_text("\n".join(["prompt,key,split", *lines, ",empty,train"]))
    return path


def configured(folder, table, **changes):
    config = get_config("smoke")
    config.update({"pipeline": str(folder), "records_per_shard": 6, **changes})
    config.data.update({"source": str(table)})
    config.data.columns.update({"key": "key", "split": "split"})
    return config


def files(directory):
    return {p.name: p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def times(directory):
    return {p.name: p.stat().st_mtime_ns for p in directory.glob("*.array_record-*")}


def records(directory):
    found = []
    for split, part in shards.describe(directory)["splits"].items():
        if part["records"]:
            data = shards.open_split(directory, split)
            found += [data[i] for i in range(len(data))]
    return found


def test_the_command_leaves_shards_that_a_pretraining_reads(folder, tmp_path, capsys):
    config = get_config("smoke")
    config.pipeline = str(folder)
    config.license = "CC0"
    main.run(config, tmp_path / "run")
    to = tmp_path / "run" / "shards"
    made = records(to)
    assert len(made) == 40
    first = shards.open_split(to, "train")[0]
    assert first["image"].shape == (SIDE, SIDE)
    assert np.std([r["image"] for r in made], (1, 2)).min() > 5
    assert first["report"].startswith("FINAL REPORT") or "IMPRESSION" in first["report"]
    assert first["impression"].startswith(first["prompt"])
    assert first["seed"] == "0/0"
    assert first["generator"].startswith("pipeline ")
    assert first["generator"].endswith(", dpm++2m 4 steps, guidance 2")
    tokenizer = tokenizers.load(folder / "tokenizer")
    source = loader.Source(to, "train", ("impression",), tokenizer, 24, 32)
    assert source.take(np.arange(4))["image"].shape == (4, 32, 32)

    results = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]
    assert sum(m["value"] for n, m in results.items() if n.startswith("records/")) == 40
    assert results["prompts/truncated"]["value"] > 0
    said = capsys.readouterr()
    assert "40/40 images" in said.err
    assert "0 s left" in said.err

    readme = (to / card.README).read_text()
    assert "40 images of 16 x 16 pixels" in readme
    assert "License: CC0" in readme
    with Image.open(to / card.SHEET) as sheet:
        assert sheet.size[0] > 6 * 192
    before = times(to)
    main.run(config, tmp_path / "run")
    assert times(to) == before


def test_the_metadata_are_croissant(folder, table, tmp_path, drawn):
    main.run(configured(folder, table), tmp_path / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        croissant = pytest.importorskip("mlcroissant")
        read = croissant.Dataset(str(tmp_path / "run" / "shards" / card.CROISSANT)).metadata
    assert not read.issues.errors
    assert not [issue for issue in read.issues.warnings if "is recommended" not in issue]
    names = {field.name for field in read.record_sets[0].fields}
    assert names == {*schema.TEXTS, *schema.ORIGIN, "image", "labels"}
    assert len(read.distribution) == 7 + 1


def test_what_was_cut_off_is_completed_and_equal(folder, table, tmp_path, drawn, monkeypatch):
    config = configured(folder, table, images_per_prompt=3, records_per_shard=10)
    main.run(config, tmp_path / "whole")
    whole = tmp_path / "whole" / "shards"
    made = records(whole)
    subjects = [
        s for n in ("train", "valid", "test") for s in shards.open_split(whole, n).subjects()
    ]
    assert subjects == [r["subject"] for r in made]
    assert (whole / "splits" / "train.subjects.txt").exists()
    assert [r["key"] for r in made] == [f"k{i}#{k}" for i in range(30) for k in range(3)]
    assert [r["seed"] for r in made] == [f"0/{i}" for i in range(90)]
    assert len({r["image"].tobytes() for r in made}) == 90
    assert "empty,the prompt is empty" in (whole / "rejects.csv").read_text()

    shutil.copytree(tmp_path / "whole", tmp_path / "torn")
    torn, drawn.drawn = tmp_path / "torn" / "shards", 0
    lost = sorted(torn.glob("*train*"))[1:5:2]
    lost[0].unlink()
    lost[1].write_bytes(lost[1].read_bytes()[:-9])
    (torn / ".synthetic-train.array_record-00000-of-00006.99.tmp").write_bytes(b"begun")
    main.run(config, tmp_path / "torn")
    assert drawn.drawn == 20
    assert files(torn) == files(whole)
    (torn / shards.INFO).unlink()  # cut off behind the last shard: nothing is to be drawn
    monkeypatch.setattr(generate, "_generator", lambda *_: pytest.fail("compiled for nothing"))
    main.run(config, tmp_path / "torn")
    assert files(torn) == files(whole)


def test_processes_share_the_shards(folder, table, tmp_path, drawn, monkeypatch):
    config = configured(folder, table)
    main.run(config, tmp_path / "whole")
    to = tmp_path / "parts" / "shards"
    to.mkdir(parents=True)
    shutil.copy(tmp_path / "whole" / "shards" / "plan.json", to)  # by the first one
    monkeypatch.setattr(generate.jax, "process_index", lambda: 1)
    monkeypatch.setattr(generate.jax, "process_count", lambda: 2)
    monkeypatch.setattr(generate.meshes, "wait_for_all", lambda what: None)
    main.run(config, tmp_path / "parts")  # the second one, by itself
    assert drawn.drawn == 30 + 6 + 2 + 6
    places = {
        p.name.removeprefix("synthetic-").replace(".array_record", "") for p in to.glob("*record-*")
    }
    assert places == {"train-00001-of-00004", "train-00003-of-00004", "test-00000-of-00002"}
    monkeypatch.undo()
    monkeypatch.setattr(generate, "_generator", lambda config, pipeline: drawn)
    main.run(config, tmp_path / "parts")
    assert drawn.drawn == 30 + 30
    assert files(to) == files(tmp_path / "whole" / "shards")


def test_a_record_that_is_lost_in_the_sampler_stops_the_run_by_name(folder, table, tmp_path, drawn):
    config = configured(folder, table)
    drawn.lost = 8
    told = r"record k8 \('Effusion 8.'\): not finite after step 2 of ddim: use"
    with pytest.raises(UserError, match=told) as raised:
        main.run(config, tmp_path / "run")
    assert "\n" not in str(raised.value)
    assert len(times(tmp_path / "run" / "shards")) == 1
    drawn.lost, drawn.drawn = None, 0
    main.run(config, tmp_path / "run")
    assert drawn.drawn == 24
    assert len(records(tmp_path / "run" / "shards")) == 30


def test_images_that_do_not_fit_are_made_anew_and_a_lost_attempt_is_named(
    folder, table, tmp_path, drawn, monkeypatch
):
    """An image fits if its first pixel is bright; at later attempts all are."""
    config = configured(folder, table)
    judge = generate.Filter(Mock(frozen.Pair, sections=("impression",)), 0.5, 2)
    monkeypatch.setattr(generate, "_filter", lambda config, workdir: judge)
    monkeypatch.setattr(
        generate.frozen, "scores", lambda pair, made, texts: np.array([x[0, 0] / 255 for x in made])
    )
    lost = set()

    def again(indices, texts, attempt):
        if found := lost & set(indices):
            raise NotFinite(found.pop(), 1)
        return [np.full((SIDE, SIDE), 128 + i, np.uint8) for i in indices]

    monkeypatch.setattr(drawn, "images", again, raising=False)
    main.run(config, tmp_path / "run")
    made = records(tmp_path / "run" / "shards")
    anew = [i for i, r in enumerate(made) if r["seed"] == f"0/{i}/1"]
    assert 5 < len(anew) < 25
    assert all((made[i]["image"] == 128 + i).all() for i in anew)
    assert all(r["seed"] == f"0/{i}" for i, r in enumerate(made) if i not in anew)
    assert all(r["image"][0, 0] >= 128 for r in made)
    results = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]
    assert results["filter/replaced"] == {"value": len(anew) / 30, "n": 30}
    lost.add(anew[-1])
    with pytest.raises(UserError, match=f"record k{anew[-1]} .*: not finite after step 1 of"):
        main.run(config, tmp_path / "lost")


def test_a_full_disk_is_told_and_loses_nothing(folder, table, tmp_path, drawn):
    drawn.side = 64
    config = configured(folder, table, records_per_shard=15)
    main.run(config, tmp_path / "whole")
    whole = files(tmp_path / "whole" / "shards")
    sizes = {name: len(data) for name, data in whole.items() if "array_record-" in name}
    small, large = min(sizes.values()), max(sizes.values())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((small + large) // 2, before[1]))
    try:
        with pytest.raises(UserError, match=r"disk full: .*run/shards/.*: free some space"):
            main.run(config, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    to = tmp_path / "run" / "shards"
    assert not list(to.rglob("*.tmp"))
    assert not (to / shards.INFO).exists()
    kept = times(to)
    main.run(config, tmp_path / "run")
    assert kept.items() <= times(to).items()
    assert files(to) == whole


def test_another_set_does_not_go_into_the_same_place(folder, table, tmp_path, drawn):
    main.run(configured(folder, table), tmp_path / "run")
    with pytest.raises(UserError, match=r"made with another config \(seed 0 -> 1\)"):
        main.run(configured(folder, table, seed=1), tmp_path / "run")
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    main.run(configured(other, table), tmp_path / "run")  # the same one somewhere else
    settings = other / "scheduler" / "scheduler_config.json"
    settings.write_text(settings.read_text().replace("0.012", "0.02"))
    with pytest.raises(UserError, match=r"holds another data set \(pipeline was [0-9a-f]+, is"):
        main.run(configured(other, table), tmp_path / "run")
    table.write_text(table.read_text().replace("Effusion 3", "Edema 3"))
    with pytest.raises(UserError, match=r"holds another data set \(the prompts have changed\)"):
        main.run(configured(folder, table), tmp_path / "run")


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("sampler.name", "plms", r"config\.sampler\.name: 'plms' is unknown: choose from ddim"),
        ("sampler.interval", (1.0,), r"config\.sampler\.interval: \(1\.0,\): give two noise"),
        ("sampler.interval", (5.0, 0.3), r"interval: \(5\.0, 0\.3\): give two .*lower first"),
        ("sampler.rescale", 2.0, r"config\.sampler\.rescale: 2\.0: give a share"),
        ("sampler.steps", 0, r"config\.sampler\.steps: 0: give a number above 0"),
        ("sampler.steps", 1000, r"sampler steps: 1000 with timestep_spacing"),
        ("size", 15, r"config\.size: 15: use a multiple of 2"),
        ("filter.attempts", 0, r"config\.filter\.attempts: 0: give a number above 0"),
        ("filter.quantile", 5.0, r"config\.filter\.quantile: 5\.0: give a share"),
        ("data.splits", ("all",), r"config\.data\.splits: 'all' is unknown"),
        ("data.source", "nowhere.csv", r"no table: nowhere\.csv does not exist"),
        ("pipeline", "assets/none", r"config\.pipeline: assets/none: no such folder .*name a"),
    ],
)
def test_a_mistake_is_told_before_any_work(folder, table, tmp_path, field, value, told):
    config = configured(folder, table)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=told) as raised:
        main.run(config, tmp_path / "run")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def edited(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-9])


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("break_it", "told"),
    [
        (
            lambda f: shutil.rmtree(f / "scheduler"),
            "the part scheduler/ is missing: copy the whole",
        ),
        (
            lambda f: shutil.rmtree(f / "tokenizer"),
            "the part tokenizer/ is missing: copy the whole",
        ),
        (
            lambda f: edited(f / "model_index.json", unet=["x", "UNet3D"]),
            "unet is 'UNet3D', must be",
        ),
        (lambda f: cut_short(f / WEIGHTS), "not a whole safetensors file"),
        (lambda f: (f / WEIGHTS).write_bytes(b"PK\x03\x04pickles"), "a pickle, .* never loaded"),
        (
            lambda f: edited(f / "vae/config.json", latent_channels=3),
            "vae: does not fit the model: .* misshapen",
        ),
        (lambda f: cut_short(f / "tokenizer/tokenizer.json"), "no tokenizer that can be opened"),
        (
            lambda f: edited(
                f / "scheduler/scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler"
            ),
            "_class_name: 'FlowMatchEulerDiscreteScheduler' is not supported without",
        ),
        (
            lambda f: edited(f / "scheduler/scheduler_config.json", prediction_type="sample"),
            "prediction_type: 'sample' is not supported: use epsilon or v_prediction",
        ),
    ],
    ids=[
        "part",
        "words",
        "class",
        "short",
        "pickle",
        "shapes",
        "tokens",
        "scheduler",
        "prediction",
    ],
)
def test_a_folder_that_cannot_be_used_is_told_and_binds_nobody(
    folder, table, tmp_path, break_it, told
):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    break_it(broken)
    with pytest.raises(UserError, match=told) as raised:
        main.run(configured(broken, table), tmp_path / "run")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_a_generator_that_was_not_made_or_lacks_a_part_is_told(
    folder, table, tmp_path, monkeypatch
):
    monkeypatch.setattr(generate, "_ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    config = configured(get_config("demo").pipeline, table)
    with pytest.raises(UserError, match=r"make it by `--config configs/finetune_diffusion\.py`"):
        main.run(config, tmp_path / "run")
    (tmp_path / "assets").mkdir()
    shutil.copytree(folder, tmp_path / config.pipeline)
    shutil.rmtree(tmp_path / config.pipeline / "vae")
    with pytest.raises(UserError, match=r"assets/phantom-diffusion: the part vae/ is missing"):
        main.run(config, tmp_path / "run")
