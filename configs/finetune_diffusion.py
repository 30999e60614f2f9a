"""Latent diffusion on reports and radiographs: fine-tuned like RoentGen, or from scratch.

demo: an autoencoder, a text encoder (first against images, like CLIP's) and a latent U-Net, 7 M
  parameters, from scratch on the phantom corpus at 64 pixels, in an hour on two CPU cores.
smoke: the same in seconds.
paper: RoentGen's recipe (arXiv 2211.12737; settings of RoentGen-v2): Stable Diffusion 2.1-base at
  512 pixels on MIMIC-CXR impressions. --config.train_text=False trains the U-Net alone.
  docs/generation.md says where to get the pipeline folder.
The result is <workdir>/pipeline, a folder for --config configs/generate.py --config.pipeline=...
"""

from ml_collections import ConfigDict

from configs import common

VARIANTS = common.VARIANTS


def get_config(variant: str = "demo") -> ConfigDict:
    common.check(variant, VARIANTS)
    config = ConfigDict({"task": "finetune_diffusion", "seed": 0, "dtype": "float32"})
    config.pipeline = ""  # a diffusers folder; empty: from scratch, in the sizes below
    config.precompute = True  # encode the images once, into shards in the workdir
    config.remat = False
    config.data = {
        "sources": ("phantom",),  # as in configs/convirt.py
        "weights": (1.0,),
        "sections": ("impression",),
        "size": 64,  # of the images in pixels; Stable Diffusion was trained at 512
        "vocab_size": 1000,
        "tokens": 64,
        "batch_size": 32,
        "threads": 2,
    }
    config.ingest = common.phantom(size=64, subjects=5000)
    config.train_text = True
    config.caption_dropout = 0.1  # share of reports replaced by an empty one, for guidance
    config.min_snr = 0.0  # gamma of min-SNR weighting; 5 in its paper, 0: none
    config.ema = 0.995
    config.optim = common.adamw(lr=1e-3, warmup=0.02, weight_decay=0.01, clip=1.0)
    config.train = common.schedule(epochs=8.0)
    config.train.patience = 0
    config.mesh = {"data": -1, "fsdp": 1}
    # From here on: a training from scratch, in the fields of diffusers.
    config.autoencoder = {
        "batch_size": 8,
        "kl_weight": 1e-3,
        "ema": 0.99,
        "optim": common.adamw(lr=2e-3, warmup=0.02, weight_decay=0.01, clip=1.0),
        "train": common.schedule(epochs=2.5),
    }
    config.contrastive = {  # of the text encoder: the mean of its tokens against an image encoder
        "batch_size": 64,
        "temperature": 0.07,
        "ema": 0.99,
        "image": common.resnet((1, 1, 1, 1), 32, "basic", 1, "7x7"),
        "optim": common.adamw(lr=1e-3, warmup=0.1, weight_decay=0.05, clip=1.0),
        "train": common.schedule(epochs=6.0),
    }
    config.vae = common.vae(widths=(16, 32, 64), groups=8, size=64)
    config.unet = common.unet((64, 96, 128), (2, 3, 4), groups=16, context=128)
    config.text_encoder = common.clip_text(width=128, layers=2, heads=4)
    config.scheduler = common.scheduler("v_prediction")
    changes = {"smoke": _smoke, "paper": _paper}
    return changes.get(variant, lambda config: config)(config)


def _smoke(config: ConfigDict) -> ConfigDict:
    config.data.update({"size": 32, "vocab_size": 300, "tokens": 32, "batch_size": 16})
    config.ingest = common.phantom(size=32, subjects=40)
    config.train.epochs = 2.0
    config.autoencoder.update({"batch_size": 16})
    config.autoencoder.train.epochs = 1.0
    config.contrastive.update(
        {"batch_size": 16, "image": common.resnet((1,) * 4, 8, "basic", 1, "3x3")}
    )
    config.contrastive.train.epochs = 1.0
    config.vae = common.vae(widths=(8, 8), groups=4, size=32)
    config.unet = common.unet((8, 16), (2, 2), groups=4, context=16)
    config.text_encoder = common.clip_text(width=16, layers=1, heads=4)
    config.text_encoder.intermediate_size = 32
    return config


def _paper(config: ConfigDict) -> ConfigDict:
    config.dtype = "bfloat16"
    config.pipeline = "weights/stable-diffusion-2-1-base"
    config.remat = True
    config.data.update({"sources": ("data/mimic-cxr-512",), "size": 512, "tokens": 77})
    config.data.update({"batch_size": 384, "threads": 16})
    config.update({"caption_dropout": 0.0, "ema": 0.9999})
    config.optim.update({"lr": 1e-5, "end_lr": 1e-8, "warmup": 0.0083, "weight_decay": 1e-2})
    config.train.epochs = 108.0  # 60,000 steps of 384 on 213,384 pairs
    config.mesh = {"data": -1, "fsdp": 4}
    return config
