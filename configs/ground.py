"""Phrase grounding: heat maps of phrases, scored on the masks and boxes of findings.

demo: the embedded phantom corpus, with the encoders of `--config configs/gloria.py`.
smoke: the same in seconds, with the encoders of `--config configs/gloria.py:smoke`.
paper: the encoders of `--config configs/gloria.py:paper`, on the phantom at 256 pixels, since
  MIMIC-CXR has no masks or boxes.
Other encoders: --config.encoder.workdir=runs/mgca-demo --workdir runs/ground-mgca
"""

from ml_collections import ConfigDict

from configs import common

VARIANTS = common.VARIANTS


def get_config(variant: str = "demo") -> ConfigDict:
    common.check(variant, VARIANTS)
    config = ConfigDict({"task": "ground"})
    config.encoder = {"workdir": f"runs/gloria-{variant}"}
    config.data = {"source": "phantom"}
    config.ingest = common.phantom(size=64, subjects=2500)
    config.phrases = {  # phrases for labels that have masks or boxes
        "Pleural Effusion": "pleural effusion",
        "Pneumothorax": "pneumothorax",
        "Consolidation": "consolidation",
        "Lung Lesion": "nodule",
        "Foreign Object": "foreign object",
    }
    config.shown = 6  # images of each phrase in heat_maps.png
    if variant == "smoke":
        config.ingest = common.phantom(size=32, subjects=40)
        config.phrases = {"Pleural Effusion": "pleural effusion"}
        config.shown = 2
    if variant == "paper":
        config.ingest = common.phantom(size=256, subjects=2500)
    return config
