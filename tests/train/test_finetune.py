"""Fine-tuning an encoder with a linear layer: its step against a plain loop, and whole fits."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from configs.classify import get_config
from medsyn_jax.core import mesh as meshes
from medsyn_jax.core import tree
from medsyn_jax.data.images import transforms
from medsyn_jax.data.sources import resolve
from medsyn_jax.data.store import shards, splits
from medsyn_jax.models import layers
from medsyn_jax.objectives import classify
from medsyn_jax.train import features, finetune, fractions, frozen, probe
from tests.train.runs import CROP, SIZE, ingest_config, write_pairs, write_run

NAMES = ("bright", "left", "rare")
MESH = meshes.one_device()
KEY = meshes.replicate_key(MESH, jax.random.key(0))
VIT = {"kind": "vit", "size": CROP, "patch": 8, "width": 16, "layers": 1, "heads": 2}
VIT |= {"mlp_width": 32, "channels": 1, "eps": 1e-6, "remat": False}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, shards.Records]:
    folder = tmp_path_factory.mktemp("data")
    directory = resolve.prepare(str(write_pairs(folder / "pairs", 100)), ingest_config(), folder)
    return {split: shards.open_split(directory, split) for split in splits.SPLITS}


def config_of(**changes):
    config = get_config("smoke")
    config.data.update({"batch_size": 8, "threads": 0})
    rates = {"learning_rate": 0.01, "weight_decay": 0.0}  # mostly the same, for compiled steps
    config.finetune.update({"batch_size": 8} | rates | changes)
    return config


def task_of(kind: str) -> probe.Task:
    policy = np.full(len(NAMES), -2, np.int8)
    return probe.Task(kind, NAMES, np.arange(len(NAMES)), policy, policy)


def batch_of(seed: int, targets: np.ndarray | None = None) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    if targets is None:
        targets = rng.choice([0, 1, -2], (8, 3)).astype(np.int8)
    images = rng.integers(0, 256, (8, SIZE, SIZE), np.uint8)
    return meshes.to_devices(MESH, {"image": images, "target": targets})


def started(encoder, kind: str = "multilabel", **changes):
    """The programs, and the state at the start of a fit, of this encoder."""
    config = config_of(**changes)
    programs = finetune.programs_of(task_of(kind), encoder, config.finetune)
    state = programs.start(jax.random.key(3), encoder.params, encoder.stats, False)
    return programs, state


def logits_of(encoder, params, statistics, images):
    """Logits by a linear layer on pooled features in training mode, and the statistics after."""
    model = nnx.merge(encoder.structure, params["encoder"], statistics, copy=True)
    x = model(images, train=True).pooled
    kernel, bias = params["head"]["kernel"], params["head"]["bias"]
    return x @ kernel + bias[None], layers.statistics(model)


def plain_loss(logits, target):
    """Cross-entropy of labels, written out, as the mean over the known entries."""
    y = jnp.maximum(target, 0).astype(jnp.float32)
    losses = -(y * jax.nn.log_sigmoid(logits) + (1 - y) * jax.nn.log_sigmoid(-logits))
    return jnp.where(target >= 0, losses, 0).sum() / (target >= 0).sum().astype(jnp.float32)


def test_two_steps_are_those_of_a_plain_loop(run):
    encoder = frozen.pretrained(run)
    programs, state = started(encoder, learning_rate=1e-4, weight_decay=0.1)
    tx = optax.adamw(1e-4, weight_decay=0.1)

    @jax.jit
    def plain_step(params, statistics, opt, batch, key):
        settings = {"area": (0.8, 1.0), "jitter": (0.9, 1.1), "mean": 0.4, "std": 0.2}
        images = transforms.augment(key, batch["image"], size=CROP, **settings)

        def loss_fn(params):
            logits, after = logits_of(encoder, params, statistics, images)
            return plain_loss(logits, batch["target"]), after

        (loss, statistics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt = tx.update(grads, opt, params)
            return optax.apply_updates(params, updates), statistics, opt, loss

    start = jax.tree.map(jnp.copy, (state["params"], state["stats"]["statistics"]))  # donated
    plain = (*start, jax.jit(tx.init)(start[0]))
    for number in range(2):
        batch, key = batch_of(number), meshes.replicate_key(MESH, jax.random.key(5))
        state, metrics = programs.step(state, batch, key)
        *plain, loss = plain_step(*plain, batch, jax.random.fold_in(key, number))
        assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    first, want, got = (
        tree.named(jax.device_get(dict(zip(("params", "statistics"), x, strict=True))))
        for x in (start, plain[:2], (state["params"], state["stats"]["statistics"]))
    )
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, atol=1e-5, rtol=1e-5, err_msg=name)
        moved = np.linalg.norm(value - first[name])
        assert np.linalg.norm(got[name] - value) < 0.01 * moved, name


def test_labels_that_are_not_known_have_no_gradient(run):
    programs, state = started(frozen.pretrained(run))
    before = jax.device_get(state["params"])
    targets = np.full((8, 3), -2, np.int8)
    state, metrics = programs.step(state, batch_of(0, targets), KEY)
    assert (float(metrics["loss"]), float(metrics["grad_norm"])) == (0, 0)
    targets[:, 0] = np.arange(8) % 2
    state, metrics = programs.step(state, batch_of(0, targets), KEY)
    assert float(metrics["grad_norm"]) > 0
    after = jax.device_get(state["params"])
    moved = (after["head"]["kernel"] != before["head"]["kernel"]).any(0)
    assert moved.tolist() == [True, False, False]
    for name, value in tree.named(after["encoder"]).items():
        assert (value != tree.named(before["encoder"])[name]).any(), name


def fractions_of(parts, trained) -> list[fractions.Fraction]:
    """Of two seeds: half of the training records, padded, and all of them."""
    n = len(parts["train"])
    half = np.stack([np.arange(n // 2), np.arange(n // 2)[::-1]]).astype(np.int32)
    half[1, -1] = -1
    whole = np.tile(np.arange(n, dtype=np.int32), (2, 1))
    subsets = {"50%": half, "100%": whole}
    return [fractions.Fraction(name, rows, np.array(trained)) for name, rows in subsets.items()]


def test_fits_lower_the_validation_loss_and_compile_one_step(run, parts, capsys):
    task, config = task_of("multilabel"), config_of(epochs=6)
    targets = {s: task.targets(features.labels(part), s == "test") for s, part in parts.items()}
    drawn = fractions_of(parts, [True, True, False])
    encoders = {"pretrained": frozen.pretrained(run), "random": frozen.untrained(run, 0)}
    programs = finetune.programs_of(task, encoders["pretrained"], config.finetune)
    for name, encoder in encoders.items():
        seeds = np.arange(2)
        half, whole = finetune.fit_all(config, name, encoder, task, drawn, targets, parts, seeds)
        assert half["test"].shape == (2, len(parts["test"]), 3)
        messages = [x for x in capsys.readouterr().err.splitlines() if "finetuned" in x]
        n = len(parts["train"])
        ends = [x.partition(f"{name}, finetuned, ")[2].partition(": ") for x in messages]
        wheres = [
            f"50% of the labels, seed 0 ({n // 2} images)",
            f"50% of the labels, seed 1 ({n // 2 - 1} images)",
            f"100% of the labels, seed 0 ({n} images)",
            f"100% of the labels, seed 1 ({n} images)",
        ]
        assert [where for where, _, _ in ends] == wheres
        known = task.without(targets["valid"], np.array([False, False, True]))
        for logits, (_, _, end) in zip([*half["valid"], *whole["valid"]], ends, strict=True):
            loss = float(plain_loss(jnp.asarray(logits), jnp.asarray(known)))
            assert end.startswith(f"validation loss {loss:.4f} at epoch ")
            assert loss < 0.5  # 0.69 says nothing
        bright = targets["test"][:, 0] >= 0
        for logits in whole["test"]:
            score = classify.mean_auroc(
                jnp.asarray(logits[bright, :1]), jnp.asarray(targets["test"][bright, :1])
            )
            assert float(score) > 0.95
    assert finetune.programs_of(task, encoders["random"], config.finetune) is programs
    assert (programs.step._cache_size(), programs.judge._cache_size()) == (1, 1)


def test_a_label_that_a_fraction_cannot_teach_changes_nothing(run, parts):
    task, config = task_of("multilabel"), config_of(epochs=2)
    encoder, drawn = frozen.pretrained(run), fractions_of(parts, [True, True, False])[:1]
    targets = {s: task.targets(features.labels(part), s == "test") for s, part in parts.items()}
    logits = []
    for value in (0, 1):
        for split, y in targets.items():
            targets[split] = np.where([False, False, True], np.int8(value), y)
        fitted = finetune.fit_all(
            config, "pretrained", encoder, task, drawn, targets, parts, np.array([1])
        )
        logits.append(fitted[0]["test"])
    np.testing.assert_array_equal(*logits)


def test_a_vit_is_trained_through_its_class_token(tmp_path):
    settings = {"image": {**VIT, "mean": 0.4, "std": 0.2, "upsample": 0}, "dtype": "float32"}
    settings |= {"data": {"size": SIZE}, "augment": {"size": CROP}}
    (tmp_path / "config.json").write_text(json.dumps({"config": settings}))
    encoder = frozen.untrained(tmp_path, 0)
    programs, state = started(encoder, "multiclass", learning_rate=1e-3)
    before = tree.named(jax.device_get(state["params"]["encoder"]))
    losses, batch = [], batch_of(0, np.arange(8, dtype=np.int32) % 3)
    for _ in range(8):
        state, metrics = programs.step(state, batch, KEY)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.9 * losses[0]
    after = tree.named(jax.device_get(state["params"]["encoder"]))
    assert (after["cls"] != before["cls"]).any()
