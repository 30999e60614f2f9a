"""ConVIRT: contrastive pre-training on image-report pairs (arXiv 2010.00747).

demo: the embedded phantom corpus, in minutes on two CPU cores. smoke: in seconds, for tests.
paper: MIMIC-CXR, by MGCA's code: ResNet-50 (from torchvision's IMAGENET1K_V2), six layers of
  Bio_ClinicalBERT. docs/pretraining.md lists where the recipe departs.
original: the same by ConVIRT's paper: one random sentence, batch 32, strong augmentation, the last
  six layers of BERT, Adam at a constant rate (the paper halves the rate when validation stalls).
pairs: your own pairs at 224 pixels with a ResNet-50 and a text encoder of MiniLM's shape:
  --config.data.sources="('pairs.csv',)" --config.text.weights=DIR --config.data.tokenizer=DIR
"""

from ml_collections import ConfigDict

from configs import common

VARIANTS = (*common.VARIANTS, "original", "pairs")


def get_config(variant: str = "demo") -> ConfigDict:
    common.check(variant, VARIANTS)
    config = ConfigDict({"task": "pretrain", "method": "convirt", "seed": 0, "dtype": "float32"})
    config.data = ConfigDict(
        {
            "sources": ("phantom",),  # folders of shards, CSV files, or the phantom corpus;
            "weights": (1.0,),  # relative frequency of each; the first source is also evaluated
            "sections": ("findings", "impression"),
            "random_sentence": False,  # train on one sentence of the report, drawn anew each time
            "size": 64,  # side of the images from the loader
            "tokenizer": "",  # Hugging Face folder; empty: train WordPiece on the corpus
            "vocab_size": 1000,
            "tokens": 96,
            "batch_size": 64,
            "threads": 2,
        }
    )
    config.ingest = common.phantom(size=64, subjects=2500)
    config.augment = common.augment(size=64, area=(0.8, 1.0), jitter=(0.9, 1.1))
    config.image = common.resnet((1, 1, 1, 1), 32, "basic", 1, "7x7")
    config.text = common.bert(width=128, layers=1, heads=4, max_length=128, dropout=0.0)
    config.text.pooling = "mean"  # an untrained [CLS] needs many more steps
    config.heads = common.heads("normed", hidden=256, width=128)
    config.loss = ConfigDict({"temperature": 0.07, "image_to_text": 1.0, "text_to_image": 1.0})
    config.optim = common.adamw(lr=1e-3, warmup=0.1, weight_decay=0.05, clip=1.0)
    config.train = common.schedule(epochs=8.0)
    config.mesh = ConfigDict({"data": -1, "fsdp": 1})
    changes = {"smoke": _smoke, "paper": _paper, "original": _original, "pairs": _pairs}
    return changes.get(variant, lambda config: config)(config)


def _smoke(config: ConfigDict) -> ConfigDict:
    config.data.update({"size": 32, "tokens": 32, "batch_size": 16, "vocab_size": 300})
    config.ingest = common.phantom(size=32, subjects=40)
    config.augment.size = 32
    config.image = common.resnet((1, 1, 1, 1), 8, "basic", 1, "3x3")
    config.text.update({"width": 32, "heads": 2, "mlp_width": 64, "max_length": 64})
    config.heads.update({"hidden": 32, "width": 16})
    config.train.epochs = 2.0
    return config


def _pairs(config: ConfigDict) -> ConfigDict:
    config.data.update({"sources": ("pairs.csv",), "size": 256, "tokens": 112, "batch_size": 32})
    config.ingest.update({"size": 256, "split_shares": (0.65, 0.1, 0.25)})
    config.augment.update({"size": 224, "area": (0.6, 1.0)})
    config.image = common.resnet50()
    config.text = common.bert(width=384, layers=6, heads=12, max_length=512, dropout=0.1)
    config.text.pooling = "mean"
    config.optim.lr = 1e-4
    config.train.update({"epochs": 20.0, "evals_per_epoch": 0.25, "checkpoints_per_epoch": 0.25})
    return config


def _paper(config: ConfigDict) -> ConfigDict:
    config.dtype = "bfloat16"
    config.data.update({"sources": ("data/mimic-cxr",), "size": 256, "tokens": 112})
    config.data.sections = ("impression", "findings")  # in this order: cut at 112 tokens
    config.data.update({"tokenizer": "weights/Bio_ClinicalBERT", "batch_size": 144, "threads": 16})
    config.augment.update({"size": 224, "area": (0.765625, 0.765625), "jitter": (1.0, 1.0)})
    config.image = common.resnet50()
    config.image.update({"weights": "weights/resnet50", "std": 0.5, "upsample": 299})
    config.text = common.bert(width=768, layers=6, heads=12, max_length=512, dropout=0.1)
    config.text.update({"weights": config.data.tokenizer, "truncate": True})
    config.heads.update({"hidden": 2048, "width": 128})
    config.optim.update({"lr": 2e-5, "warmup": 0.4, "clip": 0.0})
    config.train.epochs = 50.0
    return config


def _original(config: ConfigDict) -> ConfigDict:
    config = _paper(config)
    config.data.update({"random_sentence": True, "batch_size": 32})
    config.augment.update({"area": (0.6, 1.0), "flip": 0.5, "rotate": 20.0, "shift": 0.1})
    config.augment.update({"zoom": (0.95, 1.05), "jitter": (0.6, 1.4), "blur": (0.1, 3.0)})
    config.image.upsample = 0
    config.text.update({"layers": 12, "truncate": False, "pooling": "max"})
    config.heads.update({"kind": "mlp", "hidden": 512, "width": 512})
    config.loss.update({"temperature": 0.1, "image_to_text": 0.75, "text_to_image": 0.25})
    config.optim.update({"lr": 1e-4, "end_lr": 1e-4, "warmup": 0.0, "weight_decay": 0.0})
    config.optim.frozen = ("text/embeddings/.*", r"text/layers/[0-5]/.*")
    return config
