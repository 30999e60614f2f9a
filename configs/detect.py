"""Detection by YOLOv3's head on an encoder, at several label fractions, after MGCA.

demo: consolidations of the embedded phantom corpus, with the encoder of
  `--config configs/convirt.py`. Other boxes: --config.data.labels="('Foreign Object',)", which are
  small.
smoke: the same in seconds, with the encoder of `--config configs/convirt.py:smoke`.
rsna: RSNA Pneumonia as downloaded: --config.data.source=DIR --config.encoder.workdir=runs/...
object_cxr: Object-CXR as downloaded, likewise.
paper: rsna with the encoder of `--config configs/convirt.py:paper`.
MGCA's published protocol to the letter: --config.protocol=mgca_compat, and at 1 % of the labels
  --config.fractions='(0.01,)' --config.fit.batch_size=8 --config.fit.learning_rate=2e-4
  (object_cxr: 2.5e-4). Its figure, `map_mgca`, stands beside ours in any case.
Each run also trains detectors on the same architecture untrained, and with ImageNet weights if a
file is given: --config.encoder.weights=resnet50.safetensors
"""

from ml_collections import ConfigDict

from configs import common

VARIANTS = (*common.VARIANTS, "rsna", "object_cxr")


def get_config(variant: str = "demo") -> ConfigDict:
    common.check(variant, VARIANTS)
    config = ConfigDict({"task": "detect", "seed": 0, "dtype": "float32"})
    # "strict": a positive is never a negative of the loss, a frozen encoder is in evaluation mode,
    # and a missed image or a false alarm costs precision. "mgca_compat": MGCA's code to the letter
    config.protocol = "strict"
    config.encoder = {
        "workdir": "runs/convirt-demo",  # a pre-training run
        "frozen": True,  # False: the encoder is trained, too
        "untrained": True,  # whether the same architecture is also used untrained
        "weights": "",  # safetensors of the same architecture, for example from ImageNet
        "layout": "",
        "mean": 0.449,  # expected by these weights: mean of ImageNet's three channels
        "std": 0.226,
    }
    config.data = {
        "source": "phantom",
        "labels": ("Consolidation",),  # names of boxes, a class each; empty: all of the data set
        "size": 64,  # side of the images that the encoder sees, whole; a multiple of 32
        "batch_size": 64,  # images at a time in evaluation
        "threads": 2,
        "memory_mib": 8192,  # of the stored feature maps; with more the encoder runs in every step
    }
    config.ingest = common.phantom(size=64, subjects=2500)
    config.ingest.update({"folder": {"subject": ""}})
    config.detector = {
        "width": 64,  # channels of its coarsest branch; the finer ones have a half and a quarter
        "least": 0.05,  # probability of a box that is kept; mgca_compat: 0.5
        "overlap": 0.5,  # IoU with a better box of its class at which a box is dropped
    }
    config.fractions = (0.01, 0.1, 1.0)
    config.fractions_from = ""  # fractions/ of another run on this data set; empty: drawn
    config.seeds = 3  # each with its own subset, head, order and untrained encoder
    config.fit = {
        "learning_rate": 5e-4,
        "weight_decay": 1e-6,
        "batch_size": 16,
        "epochs": 50,
        "steps": 2000,  # a fit ends with the epoch in which it has made so many; published: none
        "patience": 10,  # epochs without a higher mean average precision on the validation split
    }
    config.mesh = {"data": -1, "fsdp": 1}
    if variant == "smoke":
        config.encoder.update({"workdir": "runs/convirt-smoke"})
        config.data.update({"size": 32, "batch_size": 16, "labels": ()})
        config.ingest.update({"size": 32, "phantom": {"subjects": 40, "studies_per_subject": 2}})
        config.fractions, config.seeds = (0.5, 1.0), 2
        config.fit.update({"epochs": 2})
        config.detector.update({"width": 16})
    if variant in ("rsna", "object_cxr", "paper"):
        source = "object_cxr" if variant == "object_cxr" else "rsna"
        config.encoder.update({"workdir": "runs/convirt-paper"})
        config.data.update({"source": f"data/{source}", "size": 224, "threads": 16, "labels": ()})
        config.data.update({"memory_mib": 65536})
        # whole images squashed to 224 pixels, as published; 60, 20 and 20 % of RSNA's subjects
        config.ingest.update({"source": source, "size": 224, "square": "stretch"})
        config.ingest.update({"split_shares": (0.6, 0.2, 0.2)})
        config.detector.update({"width": 512})
        config.fit.update({"steps": 10**9})
    if variant == "object_cxr":
        config.ingest.split_shares = (0.8, 0.0889, 0.1111)  # 7,200, 800 and 1,000 as published
    return config
