"""Compare Stable Diffusion's networks at full size, in float32, with diffusers and transformers.

    python scripts/parity_diffusion.py [NAME ...]      (all networks: 8 GB of memory)

Each network has random weights, biases and scales, and is read from a pipeline folder. Prints the
number of parameters and the relative error |ours - theirs| / |theirs| of every output. Latents are
32 x 32, and the U-Net's batch is that of one guided step. Exit status 1 if an error exceeds 1e-4.
"""

import gc
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx

from medsyn_jax.core import tree
from medsyn_jax.models.diffusion import pipeline
from medsyn_jax.models.layers import split

LIMIT = 1e-4
SD2 = {
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "layers_per_block": 2,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
TEXT1 = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
TEXT2 = {
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
}


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def images(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def rows(x: torch.Tensor) -> np.ndarray:
    return x.permute(0, 2, 3, 1).numpy()


def unet(width: int) -> tuple[Callable, Callable, tuple]:
    """(torch's function of model and inputs, ours, the inputs) of a guided step."""
    inputs = random(2, 32, 32, 4), np.array([981, 981], np.int32), random(2, 77, width)

    def theirs(model, x, t, text):
        return rows(model(images(x), torch.from_numpy(t), torch.from_numpy(text)).sample)

    return theirs, lambda model, *x: model(*x), inputs


def encode(model, x):
    latents = model.encode(images(x)).latent_dist
    return np.concatenate([rows(latents.mean), rows(latents.logvar)], -1)


def decode(model, z):
    return rows(model.decode(images(z)).sample)


def text() -> tuple[Callable, Callable, tuple]:
    ids = np.random.default_rng(0).integers(0, 49406, (2, 77)).astype(np.int32)

    def theirs(model, ids):
        return model(torch.from_numpy(ids).long()).last_hidden_state.numpy()

    return theirs, lambda model, ids: model(ids), (ids,)


def both(model, x):
    return jnp.concatenate(model.encode(x), -1)


def text_model(config: dict[str, Any]) -> transformers.CLIPTextModel:
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))


UNET = diffusers.UNet2DConditionModel
# name: (part of the pipeline, maker of the torch model, the computations)
CASES = {
    "SD 1.5 U-Net": ("unet", lambda: UNET(cross_attention_dim=768), [unet(768)]),
    "SD 2.1 U-Net": ("unet", lambda: UNET(**SD2), [unet(1024)]),
    "VAE, encode and decode": (
        "vae",
        lambda: diffusers.AutoencoderKL(**VAE),
        [
            (encode, both, (random(1, 256, 256, 3),)),
            (decode, lambda model, z: model.decode(z), (random(1, 32, 32, 4),)),
        ],
    ),
    "SD 1.5 text encoder": ("text_encoder", lambda: text_model(TEXT1), [text()]),
    "SD 2.1 text encoder": ("text_encoder", lambda: text_model(TEXT2), [text()]),
}


def randomize(module: torch.nn.Module) -> None:
    """Change biases and scales from their initial values, and make attention far from uniform."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif any(part in name for part in ("to_q.", "to_k.", "q_proj.", "k_proj.")):
                parameter.mul_(3)


def run_torch(name: str, folder: Path) -> list[np.ndarray]:
    """The outputs of torch; writes the model to the folder, as a pipeline of one part."""
    part, make, calls = CASES[name]
    module = make().eval()
    randomize(module)
    module.save_pretrained(folder / part)
    kind = pipeline.KINDS[part]
    index = {"_class_name": "StableDiffusionPipeline", part: [kind.library, kind.cls]}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "tokenizer").mkdir()
    diffusers.DDIMScheduler().save_pretrained(folder / "scheduler")
    with torch.no_grad():
        return [theirs(module, *inputs) for theirs, _, inputs in calls]


def run_jax(name: str, folder: Path) -> tuple[int, list[np.ndarray]]:
    part, _, calls = CASES[name]
    loaded = pipeline.read(folder, [part]).parts[part]
    structure = split(nnx.eval_shape(lambda: loaded.make(nnx.Rngs(0))))[0]
    params = jax.device_put(loaded.params)
    results = []
    for _, ours, inputs in calls:
        run = jax.jit(lambda p, *x: ours(nnx.merge(structure, p, {}, copy=True), *x))  # noqa: B023
        results.append(np.asarray(run(params, *inputs)))
    return tree.size(params), results


def main(names: list[str]) -> int:
    print(f"{'':24}{'parameters':>14}{'error':>10}", flush=True)
    worst = 0.0
    for name in names or CASES:
        with tempfile.TemporaryDirectory() as folder:
            theirs = run_torch(name, Path(folder))
            gc.collect()
            count, ours = run_jax(name, Path(folder))
        gc.collect()
        for a, b in zip(ours, theirs, strict=True):
            wide, expected = a.astype(np.float64), b.astype(np.float64)
            error = np.linalg.norm(wide - expected) / np.linalg.norm(expected)
            worst = max(worst, error) if np.isfinite(error) else np.inf
            print(f"{name:24}{count:14,}{error:10.1e}", flush=True)
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
