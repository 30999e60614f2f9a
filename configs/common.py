"""Parts that several experiment configs share."""

from ml_collections import ConfigDict

VARIANTS = ("demo", "smoke", "paper")


def check(variant: str, known: tuple[str, ...] = VARIANTS) -> None:
    if variant not in known:
        raise ValueError(f"variant {variant!r} is unknown: choose from {', '.join(known)}")


def phantom(size: int, subjects: int) -> ConfigDict:
    """How the phantom corpus, or a CSV of pairs, is ingested into shards."""
    return ConfigDict(
        {
            "source": "phantom",
            "path": "",
            "splits": "",  # a published split: a CSV of image, split; or a folder of train.txt, ...
            "size": size,
            "sections": ("findings", "impression"),
            "min_tokens": 3,
            "frontal_only": True,
            "bits": 0,  # used by 16-bit files, for example 12; 0: from the largest value of each
            "display": "window",  # of a DICOM; quantile: stretch, ignore the window
            "square": "pad",  # with black; or edge (with the outermost pixels), crop, stretch
            "inverted": False,  # True if bone is dark and the files do not say so
            "max_reject_share": 0.05,
            "records_per_shard": 512,
            "workers": 0,
            "seed": 0,
            "split_shares": (0.8, 0.1, 0.1),
            "phantom": {"subjects": subjects, "studies_per_subject": 2},
            "pairs": {
                "image": "image",
                "report": "report",
                "findings": "",  # its own column; report is then optional
                "impression": "",
                "subject": "",
                "split": "",
                "view": "",
                "labels": (),
            },
        }
    )


def resnet(depths: tuple[int, ...], width: int, block: str, channels: int, stem: str) -> ConfigDict:
    """A ResNet; `weights` is a safetensors file or model folder, empty for a random start."""
    return ConfigDict(
        {
            "kind": "resnet",
            "depths": depths,
            "width": width,
            "block": block,
            "channels": channels,
            "stem": stem,
            "remat": False,
            "weights": "",
            "layout": "",
            "mean": 0.5,
            "std": 0.25,
            "upsample": 0,  # side to which images are enlarged for the encoder; 0: unchanged
        }
    )


def resnet50() -> ConfigDict:
    return resnet((3, 4, 6, 3), 64, "bottleneck", 3, "7x7")


def vit() -> ConfigDict:
    """ViT-B/16 at 224 pixels; `weights` is a file or folder in timm's or Hugging Face's layout."""
    return ConfigDict(
        {
            "kind": "vit",
            "size": 224,
            "patch": 16,
            "width": 768,
            "layers": 12,
            "heads": 12,
            "mlp_width": 3072,
            "channels": 3,
            "eps": 1e-6,
            "remat": False,
            "weights": "weights/vit-base-patch16",
            "layout": "",
            "mean": 0.5,
            "std": 0.5,
            "upsample": 0,
        }
    )


def bert(width: int, layers: int, heads: int, max_length: int, dropout: float) -> ConfigDict:
    """A text encoder; `weights` is a safetensors file or Hugging Face folder, empty for none."""
    return ConfigDict(
        {
            "width": width,
            "layers": layers,
            "heads": heads,
            "mlp_width": 4 * width,
            "max_length": max_length,
            "types": 2,
            "dropout": dropout,
            "eps": 1e-12,
            "remat": False,
            "pooling": "cls",  # or mean, max
            "summed": 1,  # number of last layers that are summed
            "weights": "",
            "truncate": False,  # True: keep the first `layers` of a deeper file
            "layout": "",
        }
    )


def heads(kind: str, hidden: int, width: int, local: bool = False) -> ConfigDict:
    """Heads from the encoders to the shared space; `local` adds heads for regions and words."""
    return ConfigDict(
        {
            "kind": kind,
            "hidden": hidden,
            "width": width,
            "text": True,  # False: the text encoder's space is the shared space
            "local": local,
            "prototypes": 0,
        }
    )


def vae(widths: tuple[int, ...], groups: int, size: int) -> ConfigDict:
    """An autoencoder of grey images, in the fields of diffusers' config.json."""
    return ConfigDict(
        {
            "in_channels": 1,
            "out_channels": 1,
            "latent_channels": 4,
            "block_out_channels": widths,
            "down_block_types": ("DownEncoderBlock2D",) * len(widths),
            "up_block_types": ("UpDecoderBlock2D",) * len(widths),
            "layers_per_block": 1,
            "norm_num_groups": groups,
            "sample_size": size,
        }
    )


def unet(widths: tuple[int, ...], heads: tuple[int, ...], groups: int, context: int) -> ConfigDict:
    """A latent U-Net with attention at every level, in the fields of diffusers' config.json."""
    return ConfigDict(
        {
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": widths,
            "down_block_types": ("CrossAttnDownBlock2D",) * len(widths),
            "up_block_types": ("CrossAttnUpBlock2D",) * len(widths),
            "layers_per_block": 1,
            "attention_head_dim": heads,  # the number of heads, despite diffusers' name
            "cross_attention_dim": context,
            "use_linear_projection": True,
            "norm_num_groups": groups,
            "sample_size": 16,
        }
    )


def clip_text(width: int, layers: int, heads: int) -> ConfigDict:
    """A text encoder, in the fields of transformers' config.json; the data set the vocabulary."""
    return ConfigDict(
        {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": 4 * width,
            "hidden_act": "gelu",
        }
    )


def scheduler(prediction: str) -> ConfigDict:
    """The noise schedule of Stable Diffusion, in the fields of diffusers' scheduler_config.json."""
    return ConfigDict(
        {
            "_class_name": "PNDMScheduler",
            "num_train_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "prediction_type": prediction,
            "skip_prk_steps": True,
            "steps_offset": 1,
            "set_alpha_to_one": False,
            "clip_sample": False,
        }
    )


def augment(
    size: int, area: tuple[float, float], jitter: tuple[float, float] = (1.0, 1.0)
) -> ConfigDict:
    """Augmentation on the device; the fields are those of `transforms.augment`."""
    return ConfigDict(
        {
            "size": size,
            "area": area,
            "aspect": (1.0, 1.0),
            "flip": 0.0,  # reports name the side
            "rotate": 0.0,
            "shift": 0.0,
            "zoom": (1.0, 1.0),
            "jitter": jitter,
            "blur": (0.0, 0.0),
        }
    )


def adamw(lr: float, warmup: float, weight_decay: float, clip: float) -> ConfigDict:
    """AdamW with warm-up over the share `warmup` of all steps, then a cosine to `end_lr`."""
    return ConfigDict(
        {
            "lr": lr,
            "end_lr": 1e-8,
            "warmup": warmup,
            "weight_decay": weight_decay,
            "clip": clip,
            "b1": 0.9,
            "b2": 0.999,
            "frozen": (),  # regexes of parameters and running statistics: ("text/.*",)
            "held": (),  # regexes of parameters frozen during the first `held_epochs`
            "held_epochs": 0.0,
            "unit_rows": (),  # regexes of matrices whose rows are normalized after each update
            "accumulate": 1,  # micro-batches in a step; each is contrasted within itself
        }
    )


def schedule(epochs: float) -> ConfigDict:
    """How long to train, and how often to evaluate, save and log."""
    return ConfigDict(
        {
            "epochs": epochs,
            "steps": 0,  # instead of the epochs, where it is not 0
            "evals_per_epoch": 1.0,
            "checkpoints_per_epoch": 2.0,
            "patience": 5,  # evaluations without a lower validation loss; 0: no limit
            "log_every": 10,  # steps
        }
    )
