"""Write a tiny pipeline folder with random weights, to try generation without training.

    python -m scripts.random_pipeline runs/random-pipeline
    python -m medsyn_jax.main --config configs/generate.py:smoke \\
        --config.pipeline=runs/random-pipeline

Prints nothing. The images of this pipeline are noise of 16 x 16 pixels that depends on the prompt.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from medsyn_jax.data.text import tokenizers
from medsyn_jax.models.diffusion import pipeline
from medsyn_jax.models.layers import split
from medsyn_jax.phantom import study as phantom

TOKENS = 32
UNET = {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
    "norm_num_groups": 4,
    "sample_size": 8,
}
VAE = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 16,
}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": TOKENS,
}
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "steps_offset": 1,
    "clip_sample": False,
}


def write(folder: Path, seed: int = 0) -> pipeline.Pipeline:
    """Write the pipeline to `folder`, and its tokenizer also beside it; return the pipeline."""
    reports = [phantom.study(0, subject, 0, 32).report for subject in range(40)]
    own = folder.with_name(f"{folder.name}-tokenizer")
    tokenizer = tokenizers.train_wordpiece(reports, 400, own)
    settings = own / "tokenizer_config.json"  # diffusers reads the padded length from it
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": TOKENS}))
    text = TEXT | {"vocab_size": tokenizer.vocab_size}
    configs = {"unet": UNET, "vae": VAE, "text_encoder": text}
    rng = np.random.default_rng(seed)

    def random(path: tuple, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        """Random values everywhere: a last layer of zeros would give images without content."""
        values = rng.standard_normal(shape.shape, np.float32)
        if values.ndim > 1:
            return values / np.sqrt(np.float32(values[..., 0].size))
        return 0.1 * values + np.float32(path[-1].key == "scale")

    parts = {}
    for name, config in configs.items():
        empty = pipeline.part(name, config, {})
        shapes = split(nnx.eval_shape(lambda make=empty.make: make(nnx.Rngs(0))))[1]
        parts[name] = dataclasses.replace(empty, params=jax.tree.map_with_path(random, shapes))
    tiny = pipeline.Pipeline(parts, SCHEDULER, own)
    pipeline.write(folder, tiny)
    return tiny


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)
