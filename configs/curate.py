"""Curation: the quality of a synthetic set, and whether its images reveal training images.

demo: a set generated from the embedded phantom corpus, judged by the encoders of
  `--config configs/convirt.py`, which are trained on real images alone.
smoke: the same in seconds, for tests, with the encoders of `--config configs/convirt.py:smoke`.
paper: a set generated from the reports of MIMIC-CXR.
Any other set: --config.synthetic=DIR --config.real=DIR --config.encoder.workdir=runs/...
Writes results.json, records.csv (a row for each synthetic image) and report.html.
"""

from ml_collections import ConfigDict

from configs import common

VARIANTS = common.VARIANTS


def get_config(variant: str = "demo") -> ConfigDict:
    common.check(variant, VARIANTS)
    config = ConfigDict({"task": "curate", "seed": 0})
    config.synthetic = "runs/generate-demo/shards"  # or the workdir of the generation
    config.splits = ()  # of the synthetic set; empty: all
    config.real = "phantom"  # training data of the generator: phantom, CSV of pairs, or shards
    config.encoder = {"workdir": "runs/convirt-demo"}  # a pre-training run on real images
    config.data = {"batch_size": 64, "threads": 2}
    config.ingest = common.phantom(size=64, subjects=2500)
    config.fidelity = {
        "draws": 10,  # draws of two halves of the real held-out subjects
        "subsets": 50,  # of the kernel distance, in each draw
        "subset_size": 200,
    }
    config.unmentioned_zero = False  # whether an unmentioned label counts as negative
    config.seeds = 3  # of the probe that learns the labels from real images
    config.probe = {
        "learning_rate": 5e-4,
        "weight_decay": 1e-6,
        "batch_size": 48,
        "epochs": 50,
        "patience": 10,
        "standardize": True,
    }
    config.alignment = {"quantile": 0.05}  # share of real pairs below the threshold
    config.privacy = {"quantile": 0.999}  # of real held-out images; 1.0: their maximum
    config.mesh = {"data": -1, "fsdp": 1}
    if variant == "smoke":
        config.synthetic = "runs/generate-smoke/shards"
        config.encoder.workdir = "runs/convirt-smoke"
        config.data.batch_size = 16
        config.ingest = common.phantom(size=32, subjects=40)
        config.fidelity.update({"draws": 2, "subsets": 5, "subset_size": 10})
        config.probe.epochs = 5
    if variant == "paper":
        config.synthetic, config.real = "data/synthetic-mimic-cxr", "data/mimic-cxr"
        config.encoder.workdir = "runs/convirt-paper"
        config.data.update({"batch_size": 256, "threads": 16})
        config.fidelity.update({"subsets": 100, "subset_size": 1000})
        config.unmentioned_zero = True
    return config
