"""Pipeline folders: what is read is written again, and whatever does not fit is refused."""

import functools
import json
import os
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from medsyn_jax.core import tree
from medsyn_jax.core.errors import UserError
from medsyn_jax.models.diffusion import pipeline
from medsyn_jax.models.layers import split

SD1_UNET = {"cross_attention_dim": 768}
SD2_UNET = {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
SD_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "layers_per_block": 2,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
SD1_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
SD2_TEXT = {
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
}
SMALL = {
    "unet": {
        "attention_head_dim": 2,
        "block_out_channels": [8, 16],
        "cross_attention_dim": 12,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    },
    "vae": {
        "block_out_channels": [8],
        "in_channels": 1,
        "norm_num_groups": 4,
        "out_channels": 1,
        "scaling_factor": 0.5,
    },
    "text_encoder": {
        "hidden_size": 12,
        "intermediate_size": 20,
        "max_position_embeddings": 7,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 11,
    },
}


def outline(make):
    """The parameters' shapes; nothing is computed."""
    return split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))[1]


@functools.cache
def made(dtype=np.float32):
    """The parts of a small pipeline, every parameter random."""
    rng = np.random.default_rng(0)
    parts = {}
    for name, config in SMALL.items():
        part = pipeline.part(name, config, {})
        fill = lambda x: rng.random(x.shape, np.float32).astype(dtype)  # noqa: E731
        parts[name] = pipeline.part(name, config, jax.tree.map(fill, outline(part.make)))
    return parts


@pytest.fixture
def small(tmp_path):
    """A pipeline in memory, with the folder of its tokenizer."""
    return pipeline.Pipeline(made(), {"_class_name": "DDIMScheduler"}, tokenizer(tmp_path / "t"))


def tokenizer(folder):
    folder.mkdir()
    (folder / "vocab.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    return folder


@pytest.fixture
def folder(small, tmp_path):
    """The same pipeline on disk."""
    pipeline.write(tmp_path / "p", small)
    return tmp_path / "p"


def assert_same(a, b):
    """The parts of a, which may be fewer, are those of b, bit for bit."""
    assert a.scheduler == b.scheduler
    for name, part in a.parts.items():
        assert dict(part.config) == dict(b.parts[name].config)
        ours, theirs = tree.named(part.params), tree.named(b.parts[name].params)
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert value.dtype == theirs[key].dtype
            np.testing.assert_array_equal(value, theirs[key], key)


@pytest.mark.parametrize(
    ("name", "config", "count"),
    [
        ("unet", SD1_UNET, 859_520_964),
        ("unet", SD2_UNET, 865_910_724),
        ("vae", SD_VAE, 83_653_863),
        ("text_encoder", SD1_TEXT, 123_060_480),
        ("text_encoder", SD2_TEXT, 340_387_840),
    ],
)
def test_full_size(name, config, count):
    """As many parameters as the published networks, and a key of the file for each."""
    params = outline(pipeline.part(name, config, {}).make)
    assert tree.size(params) == count
    plan = pipeline.KINDS[name].layout(config).plan(tree.named(params))
    assert plan is not None
    assert len(plan) == len(tree.named(params))


@pytest.mark.parametrize("name", pipeline.PARTS)
def test_rematerialization(name):
    """Every part recomputes in its backward pass if asked; gradients: test_pipeline_parity.py."""
    image = jax.ShapeDtypeStruct((1, 4, 4, 1 if name == "vae" else 4), np.float32)
    ids, t = (jax.ShapeDtypeStruct(shape, np.int32) for shape in ((1, 5), (1,)))
    text = jax.ShapeDtypeStruct((1, 5, 12), np.float32)
    inputs = {"unet": (image, t, text), "vae": (image,), "text_encoder": (ids,)}[name]
    part = made()[name]
    for remat in (False, True):
        structure = split(nnx.eval_shape(lambda: part.make(nnx.Rngs(0), remat=remat)))[0]  # noqa: B023
        run = lambda params, *x: nnx.merge(structure, params, {}, copy=True)(*x)  # noqa: B023, E731
        assert ("remat" in str(jax.make_jaxpr(run)(part.params, *inputs))) == remat


def test_round_trip(small, folder, tmp_path):
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["model_index.json", "scheduler", "tokenizer", *pipeline.PARTS]
    )
    assert (folder / "tokenizer" / "vocab.json").read_text() == "{}"
    found = pipeline.read(folder)
    assert_same(found, small)
    assert found.scaling_factor == 0.5
    assert found.parts.keys() == small.parts.keys()
    assert found.tokenizer == folder / "tokenizer"
    pipeline.write(tmp_path / "again", found)
    for path in folder.rglob("*"):
        if path.is_file():
            assert (tmp_path / "again" / path.relative_to(folder)).read_bytes() == path.read_bytes()


def test_parts_alone(small, folder):
    shutil.rmtree(folder / "unet")
    found = pipeline.read(folder, ["vae", "text_encoder"])
    assert list(found.parts) == ["vae", "text_encoder"]


def test_half_precision(tmp_path):
    """Files keep the dtype of the parameters; the reader chooses."""
    source = pipeline.Pipeline(
        made(ml_dtypes.bfloat16), {"_class_name": "DDIMScheduler"}, tokenizer(tmp_path / "t")
    )
    pipeline.write(tmp_path / "p", source)
    file = load_file(tmp_path / "p" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in file.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert_same(pipeline.read(tmp_path / "p", dtype=ml_dtypes.bfloat16), source)
    wide = pipeline.read(tmp_path / "p").parts["vae"].params
    assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {np.dtype(np.float32)}


def test_old_names_of_the_autoencoder(small, folder):
    """query, key, value, proj_attn, as files of the first year name them."""
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for key, value in load_file(path).items():
        for new, old in names.items():
            key = key.replace(f"attentions.0.{new}", f"attentions.0.{old}")
        tensors[key] = value
    assert "decoder.mid_block.attentions.0.proj_attn.bias" in tensors
    save_file(tensors, path)
    assert_same(pipeline.read(folder, ["vae"]), small)


def test_text_encoders_of_all_versions(small, folder):
    """With and without the prefix; the table of positions is left out, and told."""
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    assert all(key.startswith("text_model.") for key in tensors)
    extra = {"text_model.embeddings.position_ids": np.arange(7)[None]}
    save_file(tensors | extra, path)
    lines = []
    assert_same(pipeline.read(folder, ["text_encoder"], report=lines.append), small)
    assert lines == [f"{folder / 'text_encoder'}: left out by name: {next(iter(extra))}"]
    save_file({key.removeprefix("text_model."): value for key, value in tensors.items()}, path)
    assert_same(pipeline.read(folder, ["text_encoder"]), small)


def test_variants(small, folder):
    """fp16 files are taken where there are no others, also in shards."""
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    variant = path.with_name("diffusion_pytorch_model.fp16.safetensors")
    shutil.copy(path, variant)
    variant.write_bytes(variant.read_bytes()[:-1])  # not looked at beside the plain file
    assert_same(pipeline.read(folder, ["unet"]), small)
    path.rename(variant)
    assert_same(pipeline.read(folder, ["unet"]), small)
    keys = sorted(load_file(variant))
    shards = {}
    for i, key in enumerate(keys):
        shards.setdefault(f"diffusion_pytorch_model.fp16-0000{i % 2}.safetensors", []).append(key)
    for name, part in shards.items():
        save_file({key: load_file(variant)[key] for key in part}, path.with_name(name))
    variant.unlink()
    where = {key: name for name, part in shards.items() for key in part}
    index = path.with_name("diffusion_pytorch_model.safetensors.index.fp16.json")
    index.write_text(json.dumps({"weight_map": where}))
    assert_same(pipeline.read(folder, ["unet"]), small)


def test_files_beside_the_half_precision_one(small, folder):
    """non_ema weights, a LoRA or a pickle do not stand in its way."""
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    for name in ("diffusion_pytorch_model.non_ema", "pytorch_lora_weights"):
        (path.parent / f"{name}.safetensors").write_bytes(b"")
    assert_same(pipeline.read(folder, ["unet"]), small)


def test_a_text_encoder_in_the_file_of_a_whole_clip(small, folder):
    path, lines = folder / "text_encoder" / "model.safetensors", []
    names = ("logit_scale", "text_projection.weight", "vision_model.a", "visual_projection.weight")
    save_file(load_file(path) | dict.fromkeys(names, np.zeros((2, 2), np.float32)), path)
    assert_same(pipeline.read(folder, ["text_encoder"], report=lines.append), small)
    assert lines == [f"{folder / 'text_encoder'}: left out by name: {', '.join(names)}"]


def test_what_diffusers_corrects_when_it_opens_a_folder(folder):
    path = folder / "scheduler" / "scheduler_config.json"
    for offset in (0, 2, None):
        edited(path, _class_name="DDPMScheduler", steps_offset=offset, clip_sample=True)
        found = pipeline.read(folder)
        assert (found.scheduler["steps_offset"], found.scheduler["clip_sample"]) == (1, False)
    assert found.scheduler["_class_name"] == "DDPMScheduler"


def test_the_text_encoder_opens_in_float32(small, tmp_path):
    """transformers opens a network in the dtype of its file unless the config says another."""
    config = dict(small.parts["text_encoder"].config)
    for more in ({}, {"dtype": "bfloat16"}):
        text = pipeline.part("text_encoder", config | more, made()["text_encoder"].params)
        source = pipeline.Pipeline(
            {**small.parts, "text_encoder": text}, small.scheduler, small.tokenizer
        )
        pipeline.write(tmp_path / "p", source)
        written = json.loads((tmp_path / "p" / "text_encoder" / "config.json").read_text())
        assert written == config | {"dtype": "float32"}
        assert pipeline.read(tmp_path / "p").parts["text_encoder"].config == config


def edited(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("name", [*pipeline.PARTS, "tokenizer", "scheduler"])
def test_missing_part(folder, name):
    shutil.rmtree(folder / name)
    with pytest.raises(UserError, match=rf"^pipeline: {folder}: the part {name}/ is missing: "):
        pipeline.read(folder)


@pytest.mark.parametrize("name", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_missing_file(folder, name):
    (folder / name).rename(folder / "elsewhere")
    with pytest.raises(UserError, match=rf"^pipeline: {folder}/{name}: no such file: copy it"):
        pipeline.read(folder)


def test_nameless_scheduler(folder):
    """Without its class nothing could be written that diffusers opens: told before any training."""
    path = folder / "scheduler" / "scheduler_config.json"
    edited(path, _class_name=None)
    with pytest.raises(UserError, match=rf"^pipeline: {path}: _class_name: is missing: copy"):
        pipeline.read(folder)


def test_no_pipeline(tmp_path):
    with pytest.raises(UserError, match=r"model_index\.json: no such file: give the folder of a"):
        pipeline.read(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(UserError, match=r"model_index\.json: cannot be read as JSON"):
        pipeline.read(tmp_path)
    (tmp_path / "model_index.json").write_bytes('{"_class_name": "Lungenödem"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"model_index\.json: cannot be read as JSON: 'utf-8'"):
        pipeline.read(tmp_path)
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(UserError, match=r"model_index\.json: must hold one JSON object"):
        pipeline.read(tmp_path)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"_class_name": "StableDiffusionXLPipeline"},
            "_class_name is 'StableDiffusionXLPipeline'",
        ),
        ({"unet": ["diffusers", "UNet2DModel"]}, "unet is 'UNet2DModel', must be 'UNet2DCond"),
        ({"vae": ["diffusers", "VQModel"]}, "vae is 'VQModel', must be 'AutoencoderKL'"),
        ({"text_encoder": None}, "text_encoder is None, must be 'CLIPTextModel'"),
    ],
)
def test_wrong_class(folder, fields, says):
    edited(folder / "model_index.json", **fields)
    with pytest.raises(UserError, match=rf"^pipeline: {folder}/model_index\.json: {says}"):
        pipeline.read(folder)


@pytest.mark.parametrize(
    ("name", "fields", "says"),
    [
        ("unet", {"act_fn": "mish"}, "act_fn: 'mish' is not supported, only 'silu' is"),
        ("unet", {"class_embed_type": "timestep"}, "class_embed_type: 'timestep' is not supported"),
        ("unet", {"mid_block_type": None}, "mid_block_type: None is not supported"),
        ("unet", {"time_cond_proj_dim": 8}, "time_cond_proj_dim: 8 is not supported"),
        (
            "unet",
            {"down_block_types": ["SimpleCrossAttnDownBlock2D", "DownBlock2D"]},
            "down_block_types: 'SimpleCrossAttnDownBlock2D' is not supported, only CrossAttnDownB",
        ),
        ("unet", {"up_block_types": ["UpBlock2D"]}, r"up_block_types: \['UpBlock2D'\]: must be 2"),
        ("unet", {"attention_head_dim": 3}, "attention_head_dim: 3 does not divide the channels 8"),
        ("unet", {"attention_head_dim": [2]}, r"attention_head_dim: \[2\]: must be one positive"),
        ("unet", {"norm_num_groups": 5}, "norm_num_groups: 5 does not divide the channels 8"),
        ("unet", {"norm_num_groups": None}, "norm_num_groups: None: must be positive integers"),
        ("unet", {"layers_per_block": [1, 2]}, r"layers_per_block: \[1, 2\]: must be the same"),
        ("unet", {"block_out_channels": []}, r"block_out_channels: \[\]: must be positive"),
        ("unet", {"flip_sin_to_cos": "yes"}, "flip_sin_to_cos: 'yes': must be true or false"),
        ("unet", {"norm_eps": "small"}, "norm_eps: 'small': must be a number"),
        ("unet", {"block_out_channels": [2**31, 2**31]}, r"block_out_channels: \[2147483648, 2147"),
        ("unet", {"block_out_channels": [4] * 10**5}, "block_out_channels: "),
        ("unet", {"block_out_channels": [9, 18]}, "block_out_channels: 9: the first must be even"),
        (
            "unet",
            {"in_channels": True},
            "in_channels: True: must be positive integers, up to 16384",
        ),
        ("unet", {"layers_per_block": 10**11}, "layers_per_block: 100000000000: must be one"),
        (
            "unet",
            {"layers_per_block": 100},
            "layers_per_block: makes 200 blocks, more than the 128",
        ),
        ("unet", {"transformer_layers_per_block": 99}, "layers_per_block: makes 198 blocks"),
        ("unet", {"norm_eps": float("nan")}, "norm_eps: nan: must be a number above 0"),
        ("unet", {"freq_shift": 4}, "freq_shift: 4: must be a number from 0, below 4"),
        ("vae", {"scaling_factor": -8}, "scaling_factor: -8: must be a number above 0"),
        ("vae", {"scaling_factor": float("nan")}, "scaling_factor: nan: must be a number above 0"),
        ("vae", {"scaling_factor": float("inf")}, "scaling_factor: inf: must be a number above 0"),
        ("vae", {"scaling_factor": 0}, "scaling_factor: 0: must be a number above 0"),
        ("vae", {"layers_per_block": 1000}, "layers_per_block: makes 1000 blocks"),
        ("text_encoder", {"hidden_act": ["gelu"]}, r"hidden_act: \['gelu'\] is not supported"),
        ("text_encoder", {"num_hidden_layers": 10**6}, "num_hidden_layers: 1000000: must be"),
        ("text_encoder", {"vocab_size": 10**30}, "vocab_size: 10*: must be"),
        ("vae", {"up_block_types": ["AttnUpDecoderBlock2D"]}, "up_block_types: 'AttnUpDecoderB"),
        ("vae", {"shift_factor": 0.1}, "shift_factor: 0.1 is not supported, only None is"),
        ("vae", {"scaling_factor": None}, "scaling_factor: None: must be a number"),
        ("text_encoder", {"hidden_act": "relu"}, "hidden_act: 'relu' is not supported, only quick"),
        ("text_encoder", {"num_attention_heads": 5}, "num_attention_heads: 5 does not divide"),
    ],
)
def test_unsupported(folder, name, fields, says):
    edited(folder / name / "config.json", **fields)
    with pytest.raises(UserError, match=rf"^pipeline: {folder}/{name}/config\.json: {says}") as e:
        pipeline.read(folder, [name])
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (
            lambda path: path.write_bytes(path.read_bytes()[:-9]),
            r"\.safetensors: not a whole safet",
        ),
        (lambda path: path.rename(path.with_suffix(".bin")), r"\.bin: .*to_safetensors\.py"),
        (lambda path: path.unlink(), ": no .safetensors file in this folder"),
        (
            lambda path: save_file(load_file(path) | {"extra": np.zeros(1)}, path),
            ": does not fit the model: 1 extra: extra",
        ),
        (
            lambda path: save_file(
                {k: v[:1] if k == "quant_conv.weight" else v for k, v in load_file(path).items()},
                path,
            ),
            r"1 misshapen: quant_conv\.weight \[1, 8, 1, 1\] for quant/kernel \[8, 8\]",
        ),
        (
            lambda path: save_file(
                {k: v for k, v in load_file(path).items() if k != "decoder.conv_in.bias"}, path
            ),
            r"1 missing: decoder\.conv_in\.bias",
        ),
    ],
    ids=["short", "pickle", "none", "extra", "misshapen", "missing"],
)
def test_bad_weights(folder, edit, says):
    edit(folder / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=rf"^weights: {folder}/vae.*{says}") as e:
        pipeline.read(folder, ["vae"])
    assert "\n" not in str(e.value)


def test_projections_of_the_other_kind(folder):
    """A 1.x file under a 2.x config: the shapes say so."""
    edited(folder / "unet" / "config.json", use_linear_projection=True)
    with pytest.raises(UserError, match=r"8 misshapen: down_blocks\.0\.attentions\.0\.proj_in"):
        pipeline.read(folder, ["unet"])


def test_what_write_replaces(small, folder, tmp_path):
    pipeline.write(folder, small)  # an earlier export
    found = pipeline.read(folder)
    with pytest.raises(UserError, match="is where this pipeline was read from"):
        pipeline.write(folder, found)
    with pytest.raises(UserError, match="is there already and is no pipeline"):
        pipeline.write(tmp_path, found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p", "t"]


def test_full_disk(small, folder, monkeypatch):
    """The earlier pipeline stays, and nothing half-written beside it."""

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    replace = os.replace

    def full_at_last(source, target):
        return full() if str(source).endswith(".part") else replace(source, target)

    for module, name, fails in ((shutil, "copytree", full), (os, "replace", full_at_last)):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, fails)
            with pytest.raises(
                UserError, match=rf"^pipeline: {folder}: cannot be written: .*No sp"
            ):
                pipeline.write(folder, small)
        assert_same(pipeline.read(folder), small)
        assert sorted(path.name for path in folder.parent.iterdir()) == ["p", "t"]
