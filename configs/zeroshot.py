"""Zero-shot classification by prompts, and retrieval, on any data set.

demo: the embedded phantom corpus, with the encoders of `--config configs/convirt.py`.
smoke: the same in seconds, with the encoders of `--config configs/convirt.py:smoke`.
paper: CheXpert as ingested, with the encoders of `--config configs/convirt.py:paper`.
Prompts of your own: --config.prompts=FILE, in the form of configs/prompts.toml.
"""

from ml_collections import ConfigDict

from configs import common

VARIANTS = common.VARIANTS


def get_config(variant: str = "demo") -> ConfigDict:
    common.check(variant, VARIANTS)
    config = ConfigDict({"task": "zeroshot"})
    config.encoder = {"workdir": f"runs/convirt-{variant}"}
    config.data = {"source": "phantom", "batch_size": 64, "threads": 2}
    config.prompts = "configs/prompts.toml"
    config.ingest = common.phantom(size=64, subjects=2500)
    config.mesh = {"data": -1, "fsdp": 1}
    if variant == "smoke":
        config.data.batch_size = 16
        config.ingest = common.phantom(size=32, subjects=40)
    if variant == "paper":
        config.data.update({"source": "data/chexpert", "batch_size": 256, "threads": 16})
    return config
