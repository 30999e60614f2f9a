"""MGCA: pre-training on pairs, on words and patches, and on prototypes (arXiv 2210.06044).

demo: the embedded phantom corpus, in minutes on two CPU cores, nothing to download.
smoke: the same in seconds, for tests.
paper: the official recipe on MIMIC-CXR: ResNet-50 (start: torchvision's IMAGENET1K_V2), and the
  first six layers of Bio_ClinicalBERT.
vit: the same with ViT-B/16 at 224 pixels (start: DeiT-B).
"""

from ml_collections import ConfigDict

from configs import common, convirt

VARIANTS = (*common.VARIANTS, "vit")


def get_config(variant: str = "demo") -> ConfigDict:
    common.check(variant, VARIANTS)
    config = convirt.get_config("paper" if variant == "vit" else variant)
    config.method = "mgca"
    config.loss = ConfigDict(
        {
            "temperature": 0.07,
            "token_temperature": 0.1,
            "prototype_temperature": 0.2,
            "epsilon": 0.05,
            "iterations": 3,
            "mask_padding": True,  # False: padding in the denominators, as in the official code
            "instance_weight": 1.0,
            "token_weight": 1.0,
            "prototype_weight": 1.0,
        }
    )
    config.heads.update({"local": True, "prototypes": 500})
    config.optim.update({"held": ("prototypes",), "held_epochs": 1.0, "unit_rows": ("prototypes",)})
    if variant == "smoke":
        config.heads.prototypes = 16
    if variant == "vit":
        config.image = common.vit()
    return config
