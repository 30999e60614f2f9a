"""Generation: from prompts to shards of synthetic radiographs (<workdir>/shards), restartable.

demo: the impressions of the embedded phantom corpus, by the small generator of the repository.
smoke: a few impressions, by the generator of `--config configs/finetune_diffusion.py:smoke`.
paper: RoentGen (arXiv 2211.12737) on the impressions of MIMIC-CXR, ingested, at 512 pixels.
Any other: --config.pipeline=DIR, a Stable Diffusion folder, and --config.data.source=
  a folder of shards; a CSV with a column of prompts (--config.data.columns.prompt=text and so on);
  or the tables of MIMIC-CXR-JPG, with the reports there or in --config.data.reports=DIR.
Train on the result: --config configs/convirt.py --config.data.sources="('<workdir>/shards',)"
"""

from ml_collections import ConfigDict

from configs import common

VARIANTS = common.VARIANTS


def get_config(variant: str = "demo") -> ConfigDict:
    common.check(variant, VARIANTS)
    config = ConfigDict({"task": "generate", "seed": 0, "dtype": "float32"})
    config.pipeline = "assets/phantom-diffusion"  # also looked for in the repository
    config.data = {
        "source": "phantom",
        "splits": ("train", "valid", "test"),  # splits whose prompts are used
        "sections": ("impression",),  # of reports in shards and MIMIC-CXR
        "limit": 0,  # number of prompts; 0: all
        "reports": "",
        "columns": {
            "prompt": "prompt",
            "key": "",
            "subject": "",
            "split": "",
            "view": "",
            "labels": (),
        },
    }
    config.ingest = common.phantom(size=64, subjects=2500)
    config.images_per_prompt = 1
    config.size = 0  # of the images in pixels; 0: the size of the pipeline's training
    config.sampler = {
        "name": "dpm++2m",  # or ddim, pndm, euler, unipc
        "steps": 20,
        "guidance": 2.0,  # 1.0: none
        "interval": (0.6, 3.0),  # (low, high]: guided noise levels; empty: all
        "rescale": 0.0,
        "cache_every": 2,  # run all layers of the U-Net in every n-th step (DeepCache)
    }  # an eighth of the FLOPs of 75 guided steps: docs/results.md has the curve
    config.filter = {  # images that fit their report worse than real images are drawn again
        "encoder": "",  # workdir of a pre-training, whose encoders judge; empty: no filter
        "real": "phantom",  # data whose validation pairs set the threshold
        "quantile": 0.05,  # share of these pairs below the threshold
        "attempts": 3,
    }
    config.batch_per_device = 16
    config.records_per_shard = 512
    config.license = ""  # for the data card
    if variant == "smoke":
        config.pipeline = "runs/finetune_diffusion-smoke/pipeline"
        config.ingest = common.phantom(size=32, subjects=20)
        config.sampler.steps = 4
        config.update({"batch_per_device": 4, "records_per_shard": 16})
    if variant == "paper":
        config.dtype = "bfloat16"
        config.pipeline = "weights/roentgen"
        config.data.source = "data/mimic-cxr"
        config.sampler.update({"name": "pndm", "steps": 75, "guidance": 4.0})
        config.sampler.update({"interval": (), "cache_every": 1})
        config.license = "PhysioNet Credentialed Health Data License 1.5.0, as the reports"
    return config
