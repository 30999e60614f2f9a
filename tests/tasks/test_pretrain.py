"""The pre-training task from a config to results.json and encoders, on 8 simulated devices.

Compilation takes most of the time, so two runs are shared by what is asked of them: a plain one,
and one with all that is unusual at once.
"""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from configs.convirt import get_config
from medsyn_jax import main
from medsyn_jax.core import outputs, tree
from medsyn_jax.core.errors import UserError
from medsyn_jax.data.loading import loader
from medsyn_jax.data.store import shards
from medsyn_jax.data.text import tokenizers
from medsyn_jax.models import towers
from medsyn_jax.models.weights import convert, files
from medsyn_jax.tasks import pretrain
from medsyn_jax.train import corpus
from medsyn_jax.train import state as states
from medsyn_jax.train.checkpoint import Checkpoints
from medsyn_jax.train.run import prepare
from tests.train.runs import write_pairs, write_swapped

FIGURES = {
    f"test/{way}/{figure}"
    for way in ("image_to_text", "text_to_image")
    for figure in ("recall@1", "recall@5", "recall@10", "median_rank")
}


def plain_config():
    config = get_config("smoke")
    config.ingest.workers = 1
    config.data.batch_size = 32
    config.data.threads = 1
    config.augment.size = 16
    config.data.size = 24  # the loader resizes, the augmentation crops
    config.train.log_every = 1
    return config


def unusual_config(world: Path):
    """Own pairs and the phantom, imported encoders, the text one frozen, bfloat16, two passes."""
    plain, config = world / "plain", plain_config()
    config.dtype = "bfloat16"
    config.data.sources, config.data.weights = (str(world / "own" / "pairs.csv"), "phantom"), (3, 1)
    config.data.tokenizer = str(plain / "tokenizer")
    config.ingest.pairs.update({"subject": "subject", "split": "split"})
    for part in ("image", "text"):
        config[part].weights = str(plain / "encoders" / f"{part}.safetensors")
    config.optim.update({"frozen": ("text/.*",), "accumulate": 2})
    config.mesh.update({"data": 2, "fsdp": 4})
    config.train.epochs = 1.0
    return config


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with the plain run in `plain` and pairs in `own`."""
    folder = tmp_path_factory.mktemp("world")
    write_pairs(folder / "own")
    main.run(plain_config(), folder / "plain")
    return folder


def lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def figures(workdir: Path) -> dict:
    text = (workdir / "results.json").read_text()
    results = json.loads(text, parse_constant=pytest.fail)  # NaN is not JSON
    assert results["task"] == "pretrain"
    return results["metrics"]


def test_a_run_leaves_all_that_it_should(world):
    workdir = world / "plain"
    kept = {p.name for p in workdir.iterdir()}
    files = {"config.json", "metrics.jsonl", "results.json"}
    assert kept == files | {"checkpoints", "encoders", "tensorboard", "tokenizer"}
    found = figures(workdir)
    assert found.keys() == FIGURES
    assert all(f["ci95"][0] <= f["value"] <= f["ci95"][1] and f["n"] == 10 for f in found.values())
    training = [line for line in lines(workdir) if "train/loss" in line]
    assert [line["step"] for line in training] == [1, 2, 3, 4]  # 64 records, twice, by 32
    assert training[-1]["images_per_second"] > 0
    validation = [line for line in lines(workdir) if "valid/loss" in line]
    assert [line["step"] for line in validation] == [2, 4]
    best = min(validation, key=lambda line: line["valid/loss"])["step"]
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    assert (checkpoints.latest(), checkpoints.best()) == (4, best)
    checkpoints.close()


def test_the_exported_encoders_are_those_of_the_best_checkpoint(world):
    config, workdir = plain_config(), world / "plain"
    vocab = len((workdir / "tokenizer" / "vocab.txt").read_text().splitlines())
    makers = {
        "image": lambda rngs: towers.image_encoder(
            config.image.to_dict(), np.dtype("float32"), rngs
        ),
        "text": lambda rngs: towers.text_encoder(
            config.text.to_dict(), vocab, np.dtype("float32"), rngs
        ),
    }
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    saved = checkpoints.restore_all(checkpoints.best(), ("params", "stats"))
    checkpoints.close()
    for part, make in makers.items():
        path = workdir / "encoders" / f"{part}.safetensors"
        for flat, loaded in zip(
            saved, convert.load(path, "", *states.shapes(make)[1:]), strict=True
        ):
            for name, leaf in tree.named(loaded).items():
                np.testing.assert_array_equal(leaf, flat[f"{part}/{name}"], err_msg=name)


def test_the_same_command_again_evaluates_only(world, capsys, monkeypatch):
    workdir, threads, eval_loader = world / "plain", [], loader.eval_loader

    def spied(*arguments):
        threads.append(arguments[4])
        return eval_loader(*arguments)

    monkeypatch.setattr(loader, "eval_loader", spied)
    before = figures(workdir), lines(workdir)
    (workdir / "results.json").unlink()
    main.run(plain_config(), workdir)
    assert (figures(workdir), lines(workdir)) == before
    assert "resumed at step 4" in capsys.readouterr().err
    assert threads == [plain_config().data.threads] == [1]


def test_another_config_in_the_same_workdir_is_refused(world):
    config = plain_config()
    config.optim.lr = 0.5
    with pytest.raises(
        UserError, match=r"plain was made with another config \(optim\.lr .* 0\.5\)"
    ):
        main.run(config, world / "plain")


def test_all_that_is_unusual_at_once(world):
    workdir = world / "unusual"
    main.run(unusual_config(world), workdir)
    found = figures(workdir)
    assert found.keys() == FIGURES
    assert found["test/image_to_text/recall@1"]["value"] == 1.0  # all own reports are one text
    assert [line["step"] for line in lines(workdir) if "train/loss" in line] == [1, 2, 3]
    assert all(np.isfinite(line.get("train/grad_norm", 0.0)) for line in lines(workdir))
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    params, opt = checkpoints.restore_all(checkpoints.latest(), ("params", "opt"))
    checkpoints.close()
    assert {str(x.dtype) for x in params.values()} == {"float32"}
    assert not [name for name in opt if "/text/" in name]
    config, moved = unusual_config(world), {}
    for part in ("image", "text"):
        before = files.read(Path(config[part].weights))
        after = files.read(workdir / "encoders" / f"{part}.safetensors")
        assert before.keys() == after.keys()
        moved[part] = [k for k in before if not np.array_equal(before[k], after[k])]
    assert not moved["text"]
    assert len(moved["image"]) > 20


@pytest.mark.parametrize("pooler", [False, True])
def test_a_run_with_the_pooler_setting_of_earlier_versions_goes_on(pooler, tmp_path):
    config = get_config("smoke")
    old = json.loads(config.to_json())
    old["text"]["pooler"] = pooler
    (tmp_path / "config.json").write_text(json.dumps({"config": old}))
    outputs.check_config(tmp_path, config, pretrain.FREE)


WRONG = [
    (
        {"data.sources": ("nowhere.csv",), "image.weights": "no.safetensors"},
        r"missing: config\.image\.weights 'no\.safetensors' \(looked at /.*/no\.safetensors\); "
        r"config\.data\.sources\[0\] 'nowhere\.csv' \(looked at /.*/nowhere\.csv\): see docs",
    ),
    ({"data.tokenizer": "no-folder"}, r"missing: config\.data\.tokenizer 'no-folder'"),
    ({"method": "other"}, r"config\.method: 'other' is unknown: choose from convirt"),
    ({"dtype": "foo"}, r"config\.dtype: 'foo' is unknown: choose from float32, bfloat16"),
    ({"image.block": "foo"}, r"config\.image\.block: 'foo' is unknown: choose from basic, bottle"),
    ({"image.stem": "5x5"}, r"config\.image\.stem: '5x5' is unknown: choose from 7x7, 3x3"),
    ({"image.depths": (1, 1)}, r"config\.image\.depths: \(1, 1\): give the number of blocks"),
    ({"text.heads": 5}, r"config\.text\.heads: 5 do not divide config\.text\.width 32: change"),
    ({"text.pooling": "sum"}, r"config\.text\.pooling: 'sum' is unknown: choose from cls, mean"),
    ({"heads.kind": "big"}, r"config\.heads\.kind: 'big' is unknown: choose from normed, mlp"),
    *(
        ({field: value}, rf"config\.{field}: {value}: give a number above 0")
        for field in ("train.evals_per_epoch", "train.checkpoints_per_epoch", "train.epochs")
        for value in (0.0, -1.0)
    ),
    ({"train.log_every": 0}, r"config\.train\.log_every: 0: give a number above 0"),
    ({"data.threads": -1}, r"config\.data\.threads: -1: give a number of 0 or more"),
    ({"loss.temperature": 0.0}, r"config\.loss\.temperature: 0\.0: give a number above 0"),
    ({"data.batch_size": 0}, r"config\.data\.batch_size: 0: give a number above 0"),
    ({"data.batch_size": 12}, r"batch_size: 12 does not divide over 8 devices: .* multiple of 8"),
    ({"optim.accumulate": 3}, r"32 does not divide over 8 devices x 3 micro-batches"),
    ({"mesh.data": 3}, r"config\.mesh: data=3 x fsdp=1 does not fit the 8 devices"),
    ({"data.batch_size": 80}, r"config\.data\.batch_size: 80 is more than the 64 training records"),
    ({"data.tokens": 65}, r"config\.data\.tokens: 65 is more than .*max_length 64"),
    ({"data.weights": (1.0, 2.0)}, r"config\.data\.weights: 2 weights for 1 sources"),
    ({"data.weights": (0.0,)}, r"data\.weights: \(0\.0,\): give one positive number for each"),
    ({"data.weights": ("a",)}, r"data\.weights: \('a',\): give one positive number for each"),
    ({"data.sources": (), "data.weights": ()}, r"weights: \(\): .* each of the 0 sources"),
    ({"data.sources": (1,)}, r"config\.data\.sources: \(1,\): give texts"),
    ({"data.sections": ("history of all",)}, r"config\.data\.sections: 'history of all' is unk"),
    ({"augment.jitter": (0.2,)}, r"config\.augment\.jitter: \(0\.2,\): give two numbers"),
    ({"augment.area": (0.8, 1.2)}, r"config\.augment\.area: \(0\.8, 1\.2\): give shares above 0"),
    ({"train.epochs": float("inf")}, r"config\.train\.epochs: inf: give a finite number"),
    ({"train.epochs": 1e30}, r"config\.train\.epochs: 1e\+30: is more than 2147483647 steps"),
    ({"optim.warmup": 2147483648.0}, r"config\.optim\.warmup: 2147483648\.0: give a share from"),
    ({"optim.frozen": (False,)}, r"config\.optim\.frozen: \(False,\): give texts"),
    ({"optim.lr": float("nan")}, r"config\.optim\.lr: nan: give a finite number"),
    ({"image.channels": 0}, r"config\.image\.channels: 0: give a number above 0"),
    ({"image.std": 0.0}, r"config\.image\.std: 0\.0: give a share above 0"),
    ({"image.depths": ("a", 1, 1, 1)}, r"config\.image\.depths: \('a', 1, 1, 1\): give whole"),
    ({"optim.frozen": ("txt/.*",)}, r"config\.optim\.frozen: 'txt/\.\*' matches no parameter"),
]


@pytest.mark.parametrize(("changes", "says"), WRONG)
def test_a_wrong_config_is_one_line_before_anything_is_trained(world, tmp_path, changes, says):
    config = plain_config()
    config.update_from_flattened_dict(changes)
    workdir = world / tmp_path.name  # beside the plain run, whose data are there
    with pytest.raises(UserError, match=says) as caught:
        main.run(config, workdir)
    assert "\n" not in str(caught.value)
    assert not (workdir / "metrics.jsonl").exists()


def test_weights_of_another_encoder_are_refused(world):
    config = unusual_config(world)
    config.image.weights = config.text.weights
    with pytest.raises(UserError, match=r"text\.safetensors"):
        main.run(config, world / "misfit")


def test_pairs_without_a_test_split_are_refused_before_training(tmp_path):
    path = write_pairs(tmp_path / "own")
    path.write_text(path.read_text().replace(",test,", ",train,"))
    config = plain_config()
    config.data.sources = (str(path),)
    config.ingest.pairs.update({"subject": "subject", "split": "split"})
    config.ingest.split_shares = (0.9, 0.1, 0.0)  # else one is drawn from train
    with pytest.raises(UserError, match=r"pairs-\w+: split test has no record"):
        main.run(config, tmp_path / "run")


def test_a_tokenizer_that_was_cut_short_is_made_anew(world, tmp_path, monkeypatch):
    """A kill while it is written leaves nothing that the next start takes for whole."""
    folder = next((world / "data").glob("phantom-*"))

    def cut_short(texts, vocab_size, folder):
        folder.mkdir()
        (folder / "vocab.txt").write_text("[PAD]\n")
        raise KeyboardInterrupt

    config, own = plain_config(), tmp_path / "tokenizer"
    words = ([folder], config.data.sections, config.data.vocab_size, config.data.tokens)
    with monkeypatch.context() as patch:
        patch.setattr(corpus.tokenizers, "train_wordpiece", cut_short)
        with pytest.raises(KeyboardInterrupt):
            corpus.tokenizer(own, *words)
    assert corpus.tokenizer(own, *words) == own
    vocab = (world / "plain" / "tokenizer" / "vocab.txt").read_text()
    assert (own / "vocab.txt").read_text() == vocab


def test_jax_sees_the_devices_of_this_file():
    assert jax.device_count() == 8


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_source_that_trains_on_held_out_subjects_is_refused(tmp_path, split):
    """A synthetic set, say, whose own splits put subjects of the real test split into train."""
    real, other = write_swapped(tmp_path / "own", split)
    config = plain_config()
    config.data.update({"sources": (str(real), str(other)), "weights": (1.0, 1.0)})
    config.ingest.pairs.update({"subject": "subject", "split": "split"})
    says = rf"{other} trains on 6 subjects, such as p\d+, that {real} holds out for validation or"
    with pytest.raises(UserError, match=says):
        main.run(config, tmp_path / "run")


def test_a_source_with_the_same_splits_may_hold_the_same_subjects(tmp_path):
    real = write_pairs(tmp_path / "own")
    config = plain_config()
    config.data.sources = (str(real), str(shutil.copy(real, tmp_path / "own" / "more.csv")))
    config.ingest.pairs.update({"subject": "subject", "split": "split"})
    folders, _ = prepare(config, tmp_path / "run", "")
    assert len(set(folders)) == 2
    assert len({tuple(shards.open_split(f, "train").subjects()) for f in folders}) == 1


def test_the_tokenizer_is_learned_from_all_sources(world, tmp_path, capsys):
    """The first alone has no piece for the words of the second, and a line says so."""
    config = plain_config()
    config.ingest.pairs.update({"subject": "subject", "split": "split"})
    folders = [next((world / "data").glob("phantom-*"))]
    folders.append(corpus.prepare(str(write_pairs(tmp_path / "own")), config.ingest, tmp_path))
    words = config.data.sections, 400, config.data.tokens
    alone = corpus.tokenizer(tmp_path / "alone", folders[1:], *words)
    both = corpus.tokenizer(tmp_path / "both", folders, *words)
    again = corpus.tokenizer(tmp_path / "again", [folders[1]] * 2, *words)
    assert (again / "vocab.txt").read_text() == (alone / "vocab.txt").read_text()
    sizes = config.data.tokens, config.data.size
    for own, length, says in (
        (alone, 200, r"phantom: of \d+ training texts 100% hold \[UNK\]$"),
        (both, 200, ""),
        (both, 5, r"phantom: of \d+ training texts 100% are cut at 5 tokens$"),
    ):
        tokenizer = tokenizers.load(own)
        source = loader.Source(
            folders[0], "train", config.data.sections, tokenizer, length, sizes[1]
        )
        capsys.readouterr()
        corpus.say_losses("phantom", source)
        said = capsys.readouterr().err.strip()
        assert re.search(says, said) if says else not said


def test_a_folder_of_weights_that_says_otherwise_is_refused_before_any_data(world, tmp_path):
    config = unusual_config(world)
    for part, content, says in (
        ("text", {"num_attention_heads": 8}, "num_attention_heads is 8, config.text.heads is 2"),
        ("image", {"architecture": "resnetblur50"}, "architecture is 'resnetblur50'"),
    ):
        folder = tmp_path / part
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(content))
        config[part].weights = str(folder)
        with pytest.raises(UserError, match=re.escape(f"{part}/config.json: {says}")):
            main.run(config, tmp_path / "run")
        config[part].weights = str(world / "plain" / "encoders" / f"{part}.safetensors")
    assert not (tmp_path / "data").exists()
