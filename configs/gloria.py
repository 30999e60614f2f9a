"""GLoRIA: pre-training on whole images and reports, and on regions and words (ICCV 2021).

demo: the embedded phantom corpus, in minutes on two CPU cores, nothing to download.
smoke: the same in seconds, for tests.
paper: the official recipe on MIMIC-CXR: ResNet-50 (start: torchvision's IMAGENET1K_V1), its layer 3
  as regions, Bio_ClinicalBERT, the last four layers summed, one random sentence of the impression,
  a constant rate. docs/pretraining.md lists where the recipe departs.
"""

from ml_collections import ConfigDict

from configs import common, convirt

VARIANTS = common.VARIANTS


def get_config(variant: str = "demo") -> ConfigDict:
    common.check(variant, VARIANTS)
    config = convirt.get_config(variant)
    config.method = "gloria"
    config.loss = ConfigDict(
        {
            "global_weight": 1.0,
            "local_weight": 1.0,
            "tau1": 4.0,
            "tau2": 5.0,
            "tau3": 10.0,
        }
    )
    config.heads = common.heads("linear", hidden=0, width=config.text.width, local=True)
    config.heads.text = False
    if variant == "paper":
        config.data.update({"tokens": 97, "batch_size": 48})
        config.data.update({"sections": ("impression",), "random_sentence": True})
        config.text.update({"layers": 12, "truncate": False, "summed": 4, "pooling": "mean"})
        config.optim.update({"lr": 5e-5, "end_lr": 5e-5, "warmup": 0.0, "b1": 0.5})
        config.optim.update({"weight_decay": 1e-6, "clip": 0.25})
        config.train.patience = 10
    return config
