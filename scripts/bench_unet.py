"""Time one guided step of a Stable Diffusion U-Net in diffusers (torch) and here, in turns.

    python -m scripts.bench_unet --model sd15 --size 512 --repeats 3
    python -m scripts.bench_unet --flops

One latent with and without its text, as one batch of two, fp32, all cores, random weights. Prints a
JSON line with the seconds of each call on both sides, the ratio of the medians (above 1: we are
faster) and the FLOPs as compiled. With --flops nothing is timed: the JSON line gives the TFLOP, as
lowered, of an image of 512 pixels by 75 guided steps of PNDM, as RoentGen samples, and by the
default of configs/generate.py.
"""

import argparse
import json
import statistics
import time

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from medsyn_jax.models.diffusion import pipeline
from medsyn_jax.models.layers import split
from scripts.programs import VAE, image_tflop
from tpu.plan import MODELS, TOKENS


def theirs(config: dict, x: np.ndarray, t: np.ndarray, text: np.ndarray):
    """A function that runs the step in torch; channels last, the faster layout here."""
    model = diffusers.UNet2DConditionModel(**config).eval().to(memory_format=torch.channels_last)
    images = torch.from_numpy(x.transpose(0, 3, 1, 2)).to(memory_format=torch.channels_last)
    times, texts = torch.from_numpy(t), torch.from_numpy(text)

    @torch.inference_mode()
    def call() -> None:
        without, with_text = model(images, times, texts).sample.chunk(2)
        float((without + 3 * (with_text - without)).sum())

    return call


def ours(config: dict, x: np.ndarray, t: np.ndarray, text: np.ndarray):
    """A function that runs the step in this package, and the FLOPs of the compiled step."""
    make = pipeline.part("unet", config, {}).make
    structure, shapes, _ = split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: jnp.asarray(rng.standard_normal(p.shape, np.float32) * 0.02), shapes
    )

    def step(params, x, t, text):
        both = nnx.merge(structure, params, {}, copy=True)(x, t, text)
        without, with_text = jnp.split(both, 2)
        return without + 3 * (with_text - without)

    args = (params, *(jnp.asarray(a) for a in (x, t, text)))
    compiled = jax.jit(step).lower(*args).compile()
    return lambda: jax.block_until_ready(compiled(*args)), compiled.cost_analysis()["flops"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="sd15")
    parser.add_argument("--size", type=int, default=512, help="side of the image in pixels")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--flops", action="store_true", help="print the TFLOP of an image alone")
    args = parser.parse_args()
    if args.flops:
        return print(json.dumps(image_tflop(MODELS[args.model], VAE)))
    config, side = MODELS[args.model], args.size // 8
    rng = np.random.default_rng(1)
    x = np.repeat(rng.standard_normal((1, side, side, 4), np.float32), 2, 0)
    text = rng.standard_normal((2, TOKENS, config["cross_attention_dim"]), np.float32)
    inputs = (x, np.array([500, 500], np.int32), text)
    sides = {"torch": theirs(config, *inputs)}
    sides["ours"], flops = ours(config, *inputs)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for call in sides.values():
        call()
    for _ in range(args.repeats):
        for name, call in sides.items():
            began = time.perf_counter()
            call()
            seconds[name].append(round(time.perf_counter() - began, 3))
    ratio = statistics.median(seconds["torch"]) / statistics.median(seconds["ours"])
    print(json.dumps(vars(args) | {"seconds": seconds, "ratio": ratio, "tflop": flops / 1e12}))


if __name__ == "__main__":
    main()
