"""What a model folder says of its encoder beside the weights, against the settings of a run.

`config.json` of transformers or timm says what no shape tells: heads, activation, epsilon;
`preprocessor_config.json` how images were normalized. Nothing else of a folder is read or run.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from medsyn_jax.core.errors import UserError
from medsyn_jax.models.weights.files import read_object

Config = Mapping[str, Any]

# transformers' fields and our settings. One that is absent is not compared: shapes tell it as well,
# but for the heads, which are then 12.
_TRANSFORMER = {
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_width",
}
_FIELDS = {
    "bert": _TRANSFORMER | {"max_position_embeddings": "max_length", "type_vocab_size": "types"},
    "vit": _TRANSFORMER | {"image_size": "size", "patch_size": "patch", "num_channels": "channels"},
    "resnet": {
        "depths": "depths",
        "embedding_size": "width",
        "layer_type": "block",
        "num_channels": "channels",
    },
}
# The values that we compute of other fields; the first is transformers' default.
_EXACT = ("gelu", "gelu_python")
_FIXED = {
    "bert": {
        "model_type": ("bert", "cxr-bert"),
        "hidden_act": _EXACT,
        "position_embedding_type": ("absolute",),
        "is_decoder": (False,),
    },
    "vit": {"model_type": ("vit", "vit_mae", "vit_msn", "deit"), "hidden_act": _EXACT},
    "resnet": {
        "model_type": ("resnet",),
        "hidden_act": ("relu",),
        "downsample_in_first_stage": (False,),
        "downsample_in_bottleneck": (False,),
    },
}
_TIMM = {
    "vit": r"(?:vit|deit)_(tiny|small|base|large|huge)_patch\d+_\d+(?:_in21k|_dino|_mae)?",
    "resnet": r"(?:(?:tv|gluon|ssl|swsl)_)?(resnet)\d+(?:_v1b)?",
}
_TIMM_HEADS = {"tiny": 3, "small": 6, "base": 12, "large": 16, "huge": 16}
_TIMM_SHAPES = ("num_classes", "global_pool", "in_chans", "img_size", "patch_size", "embed_dim")
_TIMM_SHAPES += ("depth", "layers", "mlp_ratio", "drop_rate", "drop_path_rate", "num_heads")


def agreed(
    path: str | Path,
    settings: Config,
    *,
    part: str = "config.image",
    pixels: str = "config.image",
    report: Callable[[str], None],
) -> dict[str, Any]:
    """The settings of an encoder, with the epsilon of the folder that `path` is in.

    path: as of `weights.load`. settings: of `towers.image_encoder`, with mean and std, or of
    `text_encoder`. part, pixels: where the settings, and mean and std, come from. report: gets a
    line for an epsilon that is taken, and for greys in [-1, 1] where the folder normalizes
    otherwise, since published recipes do so with weights of ImageNet. Raises UserError for the
    first field that says otherwise than the settings, or asks for what we do not compute.
    """
    folder, settings = Path(path), dict(settings)
    folder = folder if folder.is_dir() else folder.parent
    kind = settings.get("kind", "bert")
    file = folder / "config.json"
    config = read_object(file) if file.is_file() else {}
    if "architecture" in config and kind in _TIMM:
        theirs = _of_timm(config, kind, file)
    elif config.keys() & {*_FIELDS[kind], *_FIXED[kind]}:
        theirs = _of_transformers(config, kind, file)
    else:
        theirs = {}
    for name, (field, value) in theirs.items():
        ours = list(settings[name]) if name == "depths" else settings[name]
        truncated = name == "layers" and settings.get("truncate")
        deeper = truncated and isinstance(value, int) and value > settings[name]
        if name != "eps" and value != ours and not deeper:
            of_kind = type(value) is type(ours)
            raise UserError(
                f"weights: {file}: {field} is {_short(value)}, {part}.{name} is {ours}: choose "
                f"other weights{f', or train with --{part}.{name}={_short(value)}' * of_kind}"
            )
    if "eps" in theirs and theirs["eps"][1] != settings["eps"]:
        report(f"{file}: layer normalization with its epsilon, not with {settings['eps']}")
        settings["eps"] = theirs["eps"][1]
    if kind != "bert":
        _check_pixels(folder, config, settings, pixels, report)
    return settings


def _of_transformers(config: Config, kind: str, file: Path) -> dict[str, tuple[str, Any]]:
    """Our setting -> the field of config.json that decides it, and its value."""
    for field, known in _FIXED[kind].items():
        if (value := config.get(field, known[0])) not in known:
            raise _unknown(file, field, value, known)
    if kind != "resnet":
        config = {"num_attention_heads": 12, **config}
    fields = _FIELDS[kind].items()
    theirs = {name: (field, config[field]) for field, name in fields if field in config}
    for name, (field, value) in theirs.items():
        if name in ("size", "patch") and isinstance(value, list) and len({*map(str, value)}) == 1:
            theirs[name] = field, value[0]  # [224, 224]
    if kind != "resnet":
        usual = 1e-6 if config.get("model_type") == "vit_msn" else 1e-12
        eps = _number(config.get("layer_norm_eps", usual))
        if not 0 < eps < 1:
            raise _unknown(file, "layer_norm_eps", config["layer_norm_eps"], ("a small number",))
        theirs["eps"] = "layer_norm_eps", eps
    return theirs


def _of_timm(config: Config, kind: str, file: Path) -> dict[str, tuple[str, Any]]:
    """The same of timm, where the name of an architecture says all that no shape tells."""
    name, options = config["architecture"], config.get("model_args") or {}
    size = re.fullmatch(_TIMM[kind], str(name))
    if size is None:
        raise _unknown(file, "architecture", name, (f"a plain {kind}",))
    odd = options if not isinstance(options, dict) else sorted(options.keys() - {*_TIMM_SHAPES})
    if odd:
        raise _unknown(file, "model_args", odd, _TIMM_SHAPES)
    if kind == "resnet":
        return {}
    heads = options.get("num_heads", _TIMM_HEADS[size[1]])
    return {"heads": ("number of heads", heads), "eps": ("epsilon", 1e-6)}


def _check_pixels(
    folder: Path, config: Config, settings: Config, flag: str, report: Callable[[str], None]
) -> None:
    """Of x / 255 both, whatever the folder rescales by; the mean of its channels, as x is grey."""
    file, factor = folder / "preprocessor_config.json", 1.0
    if file.is_file():
        found = read_object(file)
        mean, std = found.get("image_mean"), found.get("image_std")
        if not found.get("do_normalize", True):
            mean, std = 0.0, 1.0
        scale = found.get("rescale_factor", 1 / 255) if found.get("do_rescale", True) else 1
        factor = 255 * _number(scale)
    else:
        inner = config.get("pretrained_cfg")
        found = {**config, **(inner if isinstance(inner, dict) else {})}
        file, mean, std = folder / "config.json", found.get("mean"), found.get("std")
    if mean is None or std is None:
        return
    theirs = tuple(_number(x) / factor if factor else math.nan for x in (mean, std))
    if not all(map(math.isfinite, theirs)) or theirs[1] <= 0:
        raise _unknown(file, "the normalization", [mean, std, factor], ("finite numbers",))
    ours = settings["mean"], settings["std"]
    if max(abs(a - b) for a, b in zip(theirs, ours, strict=True)) < 5e-3 * theirs[1]:
        return
    says = f"{file}: images had mean {theirs[0]:.4g} and deviation {theirs[1]:.4g}"
    if ours != (0.5, 0.5):
        raise UserError(
            f"weights: {says}, {flag}.mean is {ours[0]} and {flag}.std {ours[1]}: give "
            f"--{flag}.mean={theirs[0]:.4g} --{flag}.std={theirs[1]:.4g}"
        )
    report(f"{says}; greys are brought to [-1, 1], as {flag}.mean and {flag}.std say")


def _number(value: Any) -> float:
    """A number, or the mean of a list of them; nan for anything else."""
    values = value if isinstance(value, list) and value else [value]
    known = [float(x) for x in values if isinstance(x, (int, float)) and abs(x) < 1e300]
    return sum(known) / len(known) if len(known) == len(values) else math.nan


def _short(value: Any) -> str:
    text = str(tuple(value)) if isinstance(value, list) else repr(value)
    text = text.replace(" ", "")
    return text if len(text) <= 80 else f"{text[:77]}..."


def _unknown(file: Path, field: str, value: Any, known: tuple) -> UserError:
    return UserError(
        f"weights: {file}: {field} is {_short(value)}: we compute {', '.join(map(str, known))} "
        "alone: choose other weights"
    )
