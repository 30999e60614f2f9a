#!/usr/bin/env bash
# One would guess: a Stable Diffusion folder whose files are all in bfloat16 opens in one dtype.
# What happens: `StableDiffusionPipeline.from_pretrained(DIR)` opens the U-Net and the autoencoder in
#   float32, diffusers' default, and the text encoder in bfloat16, since transformers 5 keeps the
#   dtype of a file. The first prompt then ends in a RuntimeError about two dtypes.
#   "dtype": "float32" in text_encoder/config.json repairs the folder without other weights.
# Why it matters: generators of radiographs are distributed in half precision, and most people open
#   them with the two lines of diffusers' README.
# Seen with diffusers 0.42.1, transformers 5.24.0, torch 2.13.0:
#   as written: bfloat16 float32 float32, RuntimeError
#   with dtype in the config: float32 float32 float32, image (16, 16, 3)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q diffusers==0.42.1 transformers==5.24.0 torch==2.13.0 accelerate
cd "$folder"
venv/bin/python - <<'PYTHON'
import json
import logging
import warnings
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
print("diffusers", diffusers.__version__, "transformers", transformers.__version__, torch.__version__)
letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
pieces = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
tokenizer = CLIPTokenizer(
    vocab={p: i for i, p in enumerate(pieces)}, merges=[], model_max_length=12
)
text = CLIPTextConfig(
    vocab_size=len(pieces),
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=12,
    bos_token_id=52,
    eos_token_id=53,
    pad_token_id=53,
)
unet = UNet2DConditionModel(
    sample_size=8,
    block_out_channels=(8, 16),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    attention_head_dim=2,
    cross_attention_dim=16,
    norm_num_groups=4,
)
vae = AutoencoderKL(
    block_out_channels=(8, 8),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    norm_num_groups=4,
)
StableDiffusionPipeline(
    unet=unet,
    vae=vae,
    text_encoder=CLIPTextModel(text),
    tokenizer=tokenizer,
    scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1),
    safety_checker=None,
    feature_extractor=None,
    requires_safety_checker=False,
).to(torch.bfloat16).save_pretrained("half")
path = Path("half/text_encoder/config.json")
config = json.loads(path.read_text())


def drawn(dtype):
    rest = {k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")}
    path.write_text(json.dumps(rest | ({"dtype": dtype} if dtype else {})))
    pipe = StableDiffusionPipeline.from_pretrained("half")
    pipe.set_progress_bar_config(disable=True)
    kinds = [str(p.dtype)[6:] for p in (pipe.text_encoder, pipe.unet, pipe.vae)]
    try:
        end = f"image {pipe('a lung', num_inference_steps=2, output_type='np').images[0].shape}"
    except RuntimeError:
        end = "RuntimeError"
    return f"{' '.join(kinds)}, {end}"


for name, dtype, wanted in (
    ("as written", None, "bfloat16 float32 float32, RuntimeError"),
    ("with dtype in the config", "float32", "float32 float32 float32, image (16, 16, 3)"),
):
    seen = drawn(dtype)
    print(f"{name}: {seen}")
    assert seen == wanted, f"{name}: was {wanted}"
PYTHON
