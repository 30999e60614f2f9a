"""The study of arXiv 2310.07027: can synthetic radiographs stand in for real ones?

Pre-trains on real, synthetic, mixed and duplicated data at one number of steps, runs all downstream
tasks on each encoder, and writes one table. Any command of it can be stopped and given again.
demo: the embedded phantom corpus and generator: hours on two CPU cores.
smoke: the same in minutes, for tests.
paper: MIMIC-CXR as ingested, images of RoentGen, and the downstream sets of the paper.
--config.cells='convirt_real_*' runs some cells; WORKDIR/cells.txt lists all of them, one a line.
--config.cells= (empty) runs none: only that list and the table are written.
"""

from ml_collections import ConfigDict

from configs import common

VARIANTS = common.VARIANTS
REAL_OR_SYNTHETIC = ("real", "synthetic")


def _task(figures: str, metric: str, untrained: str) -> dict[str, str]:
    """untrained: the field that adds an untrained encoder to a run, where it is not 0."""
    return {"figures": figures, "metric": metric, "untrained": untrained}


def get_config(variant: str = "demo") -> ConfigDict:
    common.check(variant, VARIANTS)
    config = ConfigDict({"task": "study", "variant": variant, "configs": "configs"})
    config.real = ""  # folder of shards; empty: made by configs/ingest.py
    config.synthetic = ""  # folder of shards; empty: made from the real reports, generate.py
    config.arms = {
        # "duplicated" is the control of "mixed": the real set twice instead of real and synthetic.
        "convirt": (*REAL_OR_SYNTHETIC, "mixed", "synthetic_then_real", "duplicated"),
        "gloria": REAL_OR_SYNTHETIC,
        "mgca": REAL_OR_SYNTHETIC,
    }
    config.steps = 300  # of every pre-training
    config.fractions = (0.01, 0.1, 1.0)  # of the labels
    config.seeds = 3  # each pre-trains anew and draws the labelled records anew
    config.imagenet = ""  # safetensors for the arm "imagenet"; empty: without this arm
    config.tasks = {  # of the config of this name: its figures, the one in the table
        "classify": _task("{encoder}/linear-convex/test/{fraction}/", "auroc/mean", "untrained"),
        "segment": _task(
            "{encoder}/test/{fraction}/", "dice/per_set/with_empty", "encoder.untrained"
        ),
        "detect": _task("{encoder}/test/{fraction}/", "map", "encoder.untrained"),
    }
    config.flags = dict.fromkeys(("ingest", "generate", "pretrain", *config.tasks), ())
    config.cells = "*"  # pattern of the cells to run, as of file names
    config.workers = 0  # commands at a time, 1 for one accelerator; 0: one a core
    if variant == "demo":  # light heads: what differs between arms is the encoder
        config.flags.segment = ("decoder.kind=mlp", "fit.learning_rate=2e-3", "fit.steps=3000")
        config.flags.detect = ("detector.width=32", "fit.epochs=30")
    if variant == "smoke":
        config.update({"steps": 8, "fractions": (0.5, 1.0), "seeds": 2})
        config.arms = {"convirt": REAL_OR_SYNTHETIC}
        config.flags.ingest = ("ingest.phantom.subjects=40",)
        config.flags.generate = ("pipeline=assets/phantom-diffusion", "sampler.steps=2")
    if variant == "paper":
        config.update({"real": "data/mimic-cxr", "synthetic": "runs/generate-paper/shards"})
        config.update({"steps": 50 * 1400, "imagenet": "weights/resnet50", "workers": 1})
    return config
