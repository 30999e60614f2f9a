"""Segmentation by a U-Net decoder on an encoder, at several label fractions, after MGCA.

demo: pleural effusions of the embedded phantom corpus, with the encoder of
  `--config configs/convirt.py`. Other masks: --config.data.mask=mask_pneumothorax, or mask_lungs,
  which is easy: each image has it, at nearly the same place.
smoke: the same in seconds, with the encoder of `--config configs/convirt.py:smoke`.
siim: SIIM-ACR Pneumothorax as downloaded: --config.data.source=DIR
  --config.encoder.workdir=runs/...
rsna: RSNA Pneumonia as downloaded, likewise; the mask is the union of the filled boxes.
paper: siim with the encoder of `--config configs/convirt.py:paper`.
Each run also trains decoders on the same architecture untrained, and with ImageNet weights if a
file is given: --config.encoder.weights=resnet50.safetensors
"""

from ml_collections import ConfigDict

from configs import common

VARIANTS = (*common.VARIANTS, "siim", "rsna")


def get_config(variant: str = "demo") -> ConfigDict:
    common.check(variant, VARIANTS)
    config = ConfigDict({"task": "segment", "seed": 0, "dtype": "float32"})
    config.encoder = {
        "workdir": "runs/convirt-demo",  # a pre-training run
        "frozen": True,  # False: the encoder is trained, too
        # True: a frozen encoder normalizes by the statistics of the batch and moves its own, which
        # the test then uses, as in MGCA's code; it runs in every step.
        "training_mode": False,
        "untrained": True,  # whether the same architecture is also used untrained
        "weights": "",  # safetensors of the same architecture, for example from ImageNet
        "layout": "",
        "mean": 0.449,  # expected by these weights: mean of ImageNet's three channels
        "std": 0.226,
    }
    config.data = {
        "source": "phantom",
        # A finding that a quarter of the images have, as SIIM's pneumothorax: enough positives at
        # 1 % of the labels, and empty masks to judge.
        "mask": "mask_effusion",
        "size": 64,  # side of the images that the encoder sees, whole and not enlarged
        "balanced": False,  # True: train on all images with the mask and as many without
        "batch_size": 64,  # images at a time in evaluation
        "threads": 2,
        # Of the stored feature maps; with more, or 0, a frozen encoder runs in every step, on
        # images that are then augmented.
        "memory_mib": 8192,
    }
    config.ingest = common.phantom(size=64, subjects=2500)
    config.ingest.update({"folder": {"subject": ""}})
    config.decoder = {
        "kind": "unet",  # MGCA's; "mlp": SegFormer's, light
        # channels of the U-Net's blocks, the coarsest first, or (WIDTH,) of "mlp"; empty: an eighth
        # of the encoder's ("mlp": 32 at least), then halves (256, 128, 64, 32, 16 on ResNet-50)
        "widths": (),
    }
    config.fractions = (0.01, 0.1, 1.0)
    config.fractions_from = ""  # fractions/ of another run on this data set; empty: drawn
    config.seeds = 3  # each with its own subset, decoder, order and untrained encoder
    # Where the encoder runs in every step: scaling and rotation (degrees) together.
    config.augment = {"probability": 0.5, "zoom": (0.9, 1.1), "rotate": 10.0}
    config.fit = {
        "learning_rate": 5e-4,
        "weight_decay": 0.05,
        "batch_size": 8,
        "epochs": 50,
        "steps": 1000,  # a fit ends with the epoch in which it has made so many; published: none
        "patience": 10,  # epochs without a lower validation loss
    }
    config.mesh = {"data": -1, "fsdp": 1}
    if variant == "smoke":
        config.encoder.update({"workdir": "runs/convirt-smoke"})
        config.data.update({"size": 32, "batch_size": 16})
        config.ingest.update({"size": 32, "phantom": {"subjects": 40, "studies_per_subject": 2}})
        config.fractions, config.seeds = (0.5, 1.0), 2
        config.fit.update({"epochs": 2})
    if variant in ("siim", "rsna", "paper"):
        source = "rsna" if variant == "rsna" else "siim"
        config.encoder.update({"workdir": "runs/convirt-paper"})
        config.data.update({"source": f"data/{source}", "size": 224, "threads": 16})
        config.data.update({"memory_mib": 65536})
        config.data.mask = {"siim": "mask_pneumothorax", "rsna": "mask_opacity"}[source]
        config.data.balanced = source == "siim"
        config.ingest.update({"source": source, "size": 224, "split_shares": (0.7, 0.15, 0.15)})
        config.fit.update({"batch_size": 16 if source == "rsna" else 8, "steps": 10**9})
    if variant == "rsna":
        config.ingest.split_shares = (0.6, 0.2, 0.2)  # 16,010, 5,337 and 5,337 images as published
    return config
