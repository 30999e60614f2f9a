"""A latent diffusion model from nothing, and one that goes on from its pipeline folder."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import finetune_diffusion as configs
from medsyn_jax import main
from medsyn_jax.core import tree
from medsyn_jax.core.errors import UserError
from medsyn_jax.data.store import shards
from medsyn_jax.models.diffusion import pipeline
from medsyn_jax.tasks import finetune_diffusion
from tests.train.runs import write_swapped


def smoke():
    config = configs.get_config("smoke")
    config.ingest.workers = 1
    config.train.epochs = 1.0
    return config


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The workdir of a run from nothing."""
    workdir = tmp_path_factory.mktemp("runs") / "smoke"
    workdir.mkdir()
    main.run(smoke(), workdir)
    return workdir


def test_a_run_from_nothing_leaves_a_pipeline_and_its_figure(made):
    found = pipeline.read(made / "pipeline")
    assert set(found.parts) == set(pipeline.PARTS)
    assert found.scheduler["prediction_type"] == "v_prediction"
    tokenizer = json.loads((found.tokenizer / "tokenizer_config.json").read_text())
    assert tokenizer["model_max_length"] == 32
    figure = json.loads((made / "results.json").read_text())["metrics"]["valid/loss"]
    assert figure["n"] == 6
    assert np.isfinite(figure["value"])
    lines = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    assert figure["value"] in [line.get("valid/loss") for line in lines]


def test_latents_are_scaled_to_unit_spread(made):
    found = pipeline.read(made / "pipeline", ("vae",))
    assert 0.1 < found.scaling_factor < 100
    assert found.scaling_factor != 0.18215


def test_the_same_command_again_changes_nothing(made):
    before = (made / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    main.run(smoke(), made)
    after = (made / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert before == after


def test_it_goes_on_from_a_pipeline_and_trains_what_it_is_told(made, tmp_path):
    config = smoke()
    start = shutil.copytree(made / "pipeline", tmp_path / "start")
    for path in (start / "model_index.json", start / "scheduler" / "scheduler_config.json"):
        path.write_text(path.read_text().replace("PNDMScheduler", "HeunDiscreteScheduler"))
    config.pipeline = str(start)
    config.train_text = False
    main.run(config, tmp_path)
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "HeunDiscreteScheduler"]
    old, new = (pipeline.read(folder / "pipeline") for folder in (made, tmp_path))
    assert not (tmp_path / "autoencoder").exists()
    assert not (tmp_path / "text_encoder").exists()
    for name in ("vae", "text_encoder"):
        pairs = zip(*(tree.named(p.parts[name].params).values() for p in (old, new)), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs)
    a, b = (p.parts["unet"].params["enter"]["kernel"] for p in (old, new))
    assert not np.array_equal(a, b)

    check_latents(next((tmp_path / "latents").glob("*-latents-*")), old)


def check_latents(folder, found):
    """The set beside the run is that which it was made from, with the latents of the encoder."""
    records = shards.open_split(folder, "valid")
    record = records[len(records) - 1]
    assert record["report"]
    assert records.subjects() == [records[i]["subject"] for i in range(len(records))]
    assert (folder / "splits" / "valid.subjects.txt").exists()
    assert record["mask_lungs"].shape == (32, 32)
    part = found.parts["vae"]
    structure = nnx.split(nnx.eval_shape(lambda: part.make(nnx.Rngs(0))))[0]
    encode = jax.jit(lambda params, x: nnx.merge(structure, params, copy=True).encode(x))
    pixels = finetune_diffusion._pixels(jnp.array(record["image"][None]), 1)
    mean, logvar = encode(part.params, pixels)
    np.testing.assert_allclose(record["latents"], np.concatenate([mean, logvar], -1)[0], atol=5e-3)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("ema", 1.0, "config.ema: 1.0: give a number below 1"),
        ("caption_dropout", 1.0, "config.caption_dropout"),
        ("pipeline", "nowhere", "config.pipeline 'nowhere'"),
        ("dtype", "float8", "config.dtype: 'float8' is unknown"),
    ],
)
def test_a_wrong_setting_is_one_line(tmp_path, field, value, message):
    config = smoke()
    config[field] = value
    with pytest.raises(UserError, match=message) as found:
        main.run(config, tmp_path)
    assert "\n" not in str(found.value)
    assert not (tmp_path / "config.json").exists()


def test_a_source_that_trains_on_held_out_subjects_is_refused(tmp_path):
    """Of the test split, too: no figure of this run, but the images are judged against it."""
    real, other = write_swapped(tmp_path / "own", "test")
    config = smoke()
    config.data.update({"sources": (str(real), str(other)), "weights": (1.0, 1.0)})
    config.ingest.pairs.update({"subject": "subject", "split": "split"})
    says = rf"{other} trains on 6 subjects, such as p\d+, that {real} holds out for validation or"
    with pytest.raises(UserError, match=says):
        main.run(config, tmp_path / "run")


def test_an_image_is_brought_to_the_range_of_the_autoencoder():
    x = finetune_diffusion._pixels(jnp.array([[[0, 255]]], jnp.uint8), 3)
    assert x.shape == (1, 1, 2, 3)
    np.testing.assert_allclose(x[0, 0], [[-1] * 3, [1] * 3])
