"""Small diffusion networks and pipelines of every option against diffusers and transformers."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from medsyn_jax.core import tree
from medsyn_jax.models.diffusion import pipeline
from medsyn_jax.models.layers import split
from medsyn_jax.models.weights import convert

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import transformers  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from scripts import parity_diffusion  # noqa: E402

pytestmark = pytest.mark.parity
TOLERANCE = 1e-4

SD1 = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 4,
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
    "sample_size": 8,
}
SD2 = SD1 | {
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "upcast_attention": True,
}
ODD = SD2 | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "transformer_layers_per_block": 2,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-3,
    "in_channels": 3,
    "out_channels": 5,
}
VAE = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 8,
    "layers_per_block": 2,
    "sample_size": 16,
}
TEXT = {
    "vocab_size": 60,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 12,
    "bos_token_id": 58,
    "eos_token_id": 59,
    "pad_token_id": 59,
}


def error(ours, theirs):
    """|ours - theirs| / |theirs|, in the Euclidean norm."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def perturbed(module):
    """Random biases and scales, too, and attention that is far from uniform."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return module.eval()


def random(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def to_torch(x):
    """NHWC to a torch tensor NCHW that takes gradients."""
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))).requires_grad_()


def from_torch(x):
    return x.detach().permute(0, 2, 3, 1).numpy()


def imported(name, module, folder):
    module.save_pretrained(folder)
    return pipeline._read_part(folder, pipeline.KINDS[name], np.float32, None)


def gradients(name, module, part, folder):
    """torch's gradients in a tree like the parameters."""
    grads = {key: p.grad.contiguous() for key, p in module.named_parameters()}
    save_file(grads, folder / "g.safetensors")
    layout = pipeline.KINDS[name].layout(part.config)
    return convert.load(folder / "g.safetensors", layout, part.params, {})[0]


def assert_gradients(found, expected):
    found, expected = tree.named(found), tree.named(expected)
    for name in expected:
        if name.endswith("key/bias"):  # softmax ignores it: no gradient but rounding
            scale = np.linalg.norm(expected[name.replace("key/bias", "query/bias")])
            assert np.linalg.norm(found[name]) < TOLERANCE * scale, name
        else:
            assert error(found[name], expected[name]) < TOLERANCE, name


def runner(part, **options):
    """The module of a part as a function of parameters, a method's name and its arguments."""
    structure = split(nnx.eval_shape(lambda: part.make(rngs=nnx.Rngs(0), **options)))[0]

    def run(params, method, *args):
        return getattr(nnx.merge(structure, params, {}, copy=True), method)(*args)

    return run


@pytest.mark.parametrize(
    ("config", "size"), [(SD1, (8, 8)), (SD2, (6, 10)), (ODD, (9, 7))], ids=["sd1", "sd2", "odd"]
)
def test_unet(config, size, tmp_path):
    """The output, and the gradients of parameters, latents and text; with remat for one of them."""
    module = perturbed(diffusers.UNet2DConditionModel(**config))
    part = imported("unet", module, tmp_path)
    run = runner(part, remat=config is SD2)
    channels = [config.get(f"{side}_channels", 4) for side in ("in", "out")]
    x, text = random((2, *size, channels[0])), random((2, 5, 24), 1)
    probe, t = random((2, *size, channels[1]), 2), np.array([3, 977], np.int32)

    x_torch, text_torch = to_torch(x), torch.from_numpy(text).requires_grad_()
    theirs = module(x_torch, torch.from_numpy(t), text_torch).sample
    (theirs * to_torch(probe)).sum().backward()

    def objective(params, x, text):
        ours = run(params, "__call__", x, jnp.asarray(t), text)
        return jnp.sum(ours * probe), ours

    take = jax.jit(jax.grad(objective, argnums=(0, 1, 2), has_aux=True))
    (found, dx, dtext), ours = take(part.params, jnp.asarray(x), jnp.asarray(text))
    assert error(ours, from_torch(theirs)) < TOLERANCE
    assert error(dx, from_torch(x_torch.grad)) < TOLERANCE
    assert error(dtext, text_torch.grad) < TOLERANCE
    assert_gradients(found, gradients("unet", module, part, tmp_path))


@pytest.mark.parametrize("channels", [1, 3])
def test_vae(channels, tmp_path):
    """Encoder, decoder, and gradients; without the linear maps between them when grey."""
    extras = {"use_quant_conv": False, "use_post_quant_conv": False} if channels == 1 else {}
    config = VAE | extras | {"in_channels": channels, "out_channels": channels}
    module = perturbed(diffusers.AutoencoderKL(**config))
    part = imported("vae", module, tmp_path)
    run = runner(part, remat=channels == 1)
    x = random((2, 18, 14, channels))
    latents = module.encode(to_torch(x)).latent_dist
    theirs = module.decode(latents.mean).sample
    (theirs.square().mean() + latents.logvar.square().mean()).backward()

    def objective(params):
        mean, logvar = run(params, "encode", jnp.asarray(x))
        y = run(params, "decode", mean)
        return jnp.square(y).mean() + jnp.square(logvar).mean(), (mean, logvar, y)

    found, ours = jax.jit(jax.grad(objective, has_aux=True))(part.params)
    for a, b in zip(ours, (latents.mean, latents.logvar, theirs), strict=True):
        assert error(a, from_torch(b)) < TOLERANCE
    assert_gradients(found, gradients("vae", module, part, tmp_path))


@pytest.mark.parametrize(("act", "old"), [("quick_gelu", True), ("gelu", False)])
def test_text_encoder(act, old, tmp_path):
    """Both activations, and files of transformers before version 5 and since."""
    module = perturbed(
        transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT, hidden_act=act))
    )
    part = imported("text_encoder", module, tmp_path)
    if old:
        tensors = {f"text_model.{k}": v.clone() for k, v in module.state_dict().items()}
        tensors["text_model.embeddings.position_ids"] = torch.arange(12)[None]
        save_file(tensors, tmp_path / "model.safetensors")
        lines = []
        kind = pipeline.KINDS["text_encoder"]
        part = pipeline._read_part(tmp_path, kind, np.float32, lines.append)
        assert [line.rsplit(": ")[-1] for line in lines] == ["text_model.embeddings.position_ids"]
    run = runner(part, remat=old)
    ids = np.random.default_rng(0).integers(0, 58, (2, 12)).astype(np.int32)
    probe = random((2, 12, 24))
    theirs = module(torch.from_numpy(ids)).last_hidden_state
    (theirs * torch.from_numpy(probe)).sum().backward()

    def objective(params):
        ours = run(params, "__call__", jnp.asarray(ids))
        return jnp.sum(ours * probe), ours

    found, ours = jax.jit(jax.grad(objective, has_aux=True))(part.params)
    assert error(ours, theirs.detach()) < TOLERANCE
    assert_gradients(found, gradients("text_encoder", module, part, tmp_path))


def tokenizer():
    """CLIP's tokenizer with single letters for word pieces."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces = [*letters, *(f"{c}</w>" for c in letters)]
    pieces += [f"<{i}>" for i in range(58 - len(pieces))] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=12)


def grey_or_color(channels):
    return VAE | {"in_channels": channels, "out_channels": channels}


def torch_pipeline(unet, channels):
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        steps_offset=1,
    )
    text = transformers.CLIPTextConfig(**TEXT)
    return diffusers.StableDiffusionPipeline(
        unet=perturbed(diffusers.UNet2DConditionModel(**unet)),
        vae=perturbed(diffusers.AutoencoderKL(**grey_or_color(channels))),
        text_encoder=perturbed(transformers.CLIPTextModel(text)),
        tokenizer=tokenizer(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def two_steps(pipe):
    pipe.set_progress_bar_config(disable=True)
    latents = torch.from_numpy(random((1, 4, 8, 8)))
    run = pipe(["a lung"], num_inference_steps=2, latents=latents, output_type="np")
    return run.images


def assert_same_parts(a, b):
    assert a.parts.keys() == b.parts.keys()
    for name, part in a.parts.items():
        configs = (json.dumps(x, sort_keys=True) for x in (part.config, b.parts[name].config))
        assert next(configs) == next(configs)
        mine, other = tree.named(part.params), tree.named(b.parts[name].params)
        assert mine.keys() == other.keys()
        for key, value in mine.items():
            np.testing.assert_array_equal(value, other[key], key)


@pytest.mark.parametrize(("unet", "channels"), [(SD1, 3), (SD2, 1)], ids=["sd1", "sd2-grey"])
def test_pipeline(unet, channels, tmp_path):
    """diffusers opens what we write of what it wrote, and runs it to the same picture."""
    pipe = torch_pipeline(unet, channels)
    pipe.save_pretrained(tmp_path / "theirs")
    source = pipeline.read(tmp_path / "theirs")
    if channels == 1:  # configs with no more than the sizes will do, as of a model of our own
        sizes = {"unet": unet, "vae": grey_or_color(1), "text_encoder": TEXT}
        parts = {k: pipeline.part(k, sizes[k], source.parts[k].params) for k in pipeline.PARTS}
        source = dataclasses.replace(source, parts=parts)
    pipeline.write(tmp_path / "ours", source)
    assert_same_parts(pipeline.read(tmp_path / "ours"), source)
    index = json.loads((tmp_path / "ours" / "model_index.json").read_text())
    assert index["safety_checker"] == [None, None]
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "ours")
    for name in pipeline.PARTS:
        states = [getattr(p, name).state_dict() for p in (pipe, again)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    images = two_steps(again)
    assert images.shape == (1, 16, 16, channels)
    np.testing.assert_array_equal(images, two_steps(pipe))


def test_variants_and_shards(tmp_path):
    """Folders with half-precision variants alone, and with shards, as diffusers writes them."""
    pipe = torch_pipeline(SD1, 3)
    pipe.save_pretrained(tmp_path / "plain")
    pipe.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    pipe.save_pretrained(tmp_path / "both", max_shard_size="50KB", variant="fp16")
    assert len(list((tmp_path / "shards" / "unet").glob("*.safetensors"))) > 2
    plain = pipeline.read(tmp_path / "plain")
    for name in ("shards", "both"):
        assert_same_parts(pipeline.read(tmp_path / name), plain)
    pipe.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    files = {path.name for path in (tmp_path / "half" / "unet").glob("*.safetensors")}
    assert files == {"diffusion_pytorch_model.fp16.safetensors"}
    half = pipeline.read(tmp_path / "half", dtype=np.float16)
    for name, part in plain.parts.items():
        found = tree.named(half.parts[name].params)
        for key, value in tree.named(part.params).items():
            assert found[key].dtype == np.float16
            np.testing.assert_array_equal(found[key], value.astype(np.float16), key)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_written_pipelines_draw_without_a_dtype(dtype, tmp_path):
    """By the two lines of diffusers' README, whatever the dtype of the files; values are kept."""
    torch_pipeline(SD1, 3).save_pretrained(tmp_path / "theirs")
    pipeline.write(tmp_path / "p", pipeline.read(tmp_path / "theirs", dtype=dtype))
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "p")
    assert {getattr(pipe, name).dtype for name in pipeline.PARTS} == {torch.float32}
    assert np.isfinite(two_steps(pipe)).all()
    ours = pipeline.read(tmp_path / "p").parts["text_encoder"].params["word"]["table"]
    (theirs,) = (v for k, v in pipe.text_encoder.state_dict().items() if "token_embedding" in k)
    np.testing.assert_array_equal(ours, theirs)


def test_the_committed_generator_draws_without_a_dtype():
    folder = Path(__file__).parents[3] / "assets" / "phantom-diffusion"
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    assert {getattr(pipe, name).dtype for name in pipeline.PARTS} == {torch.float32}
    pipe.set_progress_bar_config(disable=True)
    (image,) = pipe("Large left pleural effusion.", num_inference_steps=10, output_type="np").images
    assert image.shape == (64, 64, 1)
    assert image.std() > 0.1


def test_full_size_script(capsys):
    """The script itself, with the smallest of its models."""
    assert parity_diffusion.main(["SD 1.5 text encoder"]) == 0
    assert "123,060,480" in capsys.readouterr().out
