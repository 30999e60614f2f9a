"""The settings of a run against the configuration files in a folder of weights.

`config.json` of transformers or timm holds what no shape shows: heads, activation, epsilon.
`preprocessor_config.json` holds the normalization of images. No other file is read, no code is run.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from medsyn_jax.core.errors import UserError
from medsyn_jax.models.resnet import EXPANSION
from medsyn_jax.models.weights.files import read_object

Config = Mapping[str, Any]

# transformers' fields and our settings. An absent field is not compared, because shapes show the
# same. Only the number of heads, which they do not show, is then 12.
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
# The supported values of other fields; the first one is transformers' default.
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
    part: str,
    pixels: str = "",
    report: Callable[[str], None],
) -> dict[str, Any]:
    """The settings of an encoder, with the epsilon of the folder that holds `path`.

    path: as of `weights.convert.load`. settings: of `towers.image_encoder`, with mean and std, or
    of `towers.text_encoder`. part: the name of the settings for messages, such as "config.image";
    pixels: the same for mean and std, by default `part`. report: gets a line for an epsilon that
    differs, and for greys in [-1, 1] where the folder normalizes otherwise, which is allowed
    because published recipes do so with ImageNet weights. Raises UserError for the first field that
    contradicts the settings or is not supported.
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
    _, eps = theirs.pop("eps", ("", settings.get("eps")))
    for name, (field, value) in theirs.items():
        ours = list(settings[name]) if name == "depths" else settings[name]
        truncated = name == "layers" and settings.get("truncate")
        deeper = truncated and isinstance(value, int) and value > settings[name]
        if value != ours and not deeper:
            advice = f", or train with --{part}.{name}={_short(value)}"
            raise UserError(
                f"weights: {file}: {field} is {_short(value)}, {part}.{name} is {ours}: choose "
                f"other weights{advice if type(value) is type(ours) else ''}"
            )
    if eps != settings.get("eps"):
        report(f"{file}: layer normalization with its epsilon, not with {settings['eps']}")
        settings["eps"] = eps
    if kind != "bert":
        _check_pixels(folder, config, settings, pixels or part, report)
    return settings


def for_transformers(settings: Config) -> dict[str, Any]:
    """The fields of config.json that describe an encoder to transformers; others keep its defaults.

    settings: of `towers.image_encoder` or `towers.text_encoder`. `agreed` reads the same fields.
    """
    kind = settings.get("kind", "bert")
    fields = {field: settings[name] for field, name in _FIELDS[kind].items()}
    if kind == "resnet":
        first = settings["width"] * EXPANSION[settings["block"]]
        return fields | {"hidden_sizes": [first << stage for stage in range(4)]}
    return fields | {"layer_norm_eps": settings["eps"]}


def _of_transformers(config: Config, kind: str, file: Path) -> dict[str, tuple[str, Any]]:
    """The field of config.json that decides each of our settings, and its value."""
    for field, supported in _FIXED[kind].items():
        if (value := config.get(field, supported[0])) not in supported:
            raise _unsupported(file, field, value, supported)
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
            raise _unsupported(
                file, "layer_norm_eps", config["layer_norm_eps"], ("a small number",)
            )
        theirs["eps"] = "layer_norm_eps", eps
    return theirs


def _of_timm(config: Config, kind: str, file: Path) -> dict[str, tuple[str, Any]]:
    """The same for timm, where the name of the architecture decides."""
    name, options = config["architecture"], config.get("model_args") or {}
    match = re.fullmatch(_TIMM[kind], str(name))
    if match is None:
        raise _unsupported(file, "architecture", name, (f"a plain {kind}",))
    odd = options if not isinstance(options, dict) else sorted(options.keys() - {*_TIMM_SHAPES})
    if odd:
        raise _unsupported(file, "model_args", odd, _TIMM_SHAPES)
    if kind == "resnet":
        return {}
    heads = options.get("num_heads", _TIMM_HEADS[match[1]])
    return {"heads": ("number of heads", heads), "eps": ("epsilon", 1e-6)}


def _check_pixels(
    folder: Path, config: Config, settings: Config, flag: str, report: Callable[[str], None]
) -> None:
    """Raise UserError if mean and std, of greys in [0, 1], are not those of the folder.

    They are the means over its channels, whatever factor it rescales by, because images are grey.
    """
    file, factor = folder / "preprocessor_config.json", 1.0
    if file.is_file():
        theirs = read_object(file)
        mean, std = theirs.get("image_mean"), theirs.get("image_std")
        if not theirs.get("do_normalize", True):
            mean, std = 0.0, 1.0
        scale = theirs.get("rescale_factor", 1 / 255) if theirs.get("do_rescale", True) else 1
        factor = 255 * _number(scale)
    else:
        inner = config.get("pretrained_cfg")
        theirs = {**config, **(inner if isinstance(inner, dict) else {})}
        file, mean, std = folder / "config.json", theirs.get("mean"), theirs.get("std")
    if mean is None or std is None:
        return
    wanted = tuple(_number(x) / factor if factor else math.nan for x in (mean, std))
    if not all(map(math.isfinite, wanted)) or wanted[1] <= 0:
        raise _unsupported(file, "the normalization", [mean, std, factor], ("finite numbers",))
    ours = settings["mean"], settings["std"]
    if max(abs(a - b) for a, b in zip(wanted, ours, strict=True)) < 5e-3 * wanted[1]:
        return
    says = f"{file}: images had mean {wanted[0]:.4g} and deviation {wanted[1]:.4g}"
    if ours != (0.5, 0.5):
        raise UserError(
            f"weights: {says}, {flag}.mean is {ours[0]} and {flag}.std {ours[1]}: give "
            f"--{flag}.mean={wanted[0]:.4g} --{flag}.std={wanted[1]:.4g}"
        )
    report(f"{says}; greys are brought to [-1, 1], as {flag}.mean and {flag}.std say")


def _number(value: Any) -> float:
    """A number, or the mean of a list of them; nan for anything else."""
    values = value if isinstance(value, list) and value else [value]
    numbers = [float(x) for x in values if isinstance(x, (int, float)) and abs(x) < 1e300]
    return sum(numbers) / len(numbers) if len(numbers) == len(values) else math.nan


def _short(value: Any) -> str:
    text = str(tuple(value)) if isinstance(value, list) else repr(value)
    text = text.replace(" ", "")
    return text if len(text) <= 80 else f"{text[:77]}..."


def _unsupported(file: Path, field: str, value: Any, supported: tuple) -> UserError:
    return UserError(
        f"weights: {file}: {field} is {_short(value)}: we compute "
        f"{', '.join(map(str, supported))} alone: choose other weights"
    )
