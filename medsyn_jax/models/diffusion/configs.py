"""The three networks of a Stable Diffusion pipeline from their `config.json`.

A field that is absent has diffusers' (or transformers') default. What we do not compute is refused
by the name of its field; fields that change no output, such as training settings, are ignored.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from medsyn_jax.core.errors import UserError
from medsyn_jax.models.diffusion.clip_text import ACTIVATIONS, ClipText
from medsyn_jax.models.diffusion.unet import UNet
from medsyn_jax.models.diffusion.vae import Autoencoder

Config = Mapping[str, Any]

# The one value of a field that we compute; it is also diffusers' default.
_UNET_FIXED = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dropout": 0,
    "dual_cross_attention": False,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}
_VAE_FIXED = {
    "act_fn": "silu",
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
    "shift_factor": None,
}
_CLIP_FIXED = {"attention_dropout": 0}
# More than any network has. A file is compared with its config only after the module's shapes are
# known, which takes time and memory as the config says.
_MOST_CHANNELS, _MOST_WORDS, _MOST_LEVELS, _MOST_BLOCKS = 2**14, 2**20, 8, 128
_ATTENTIVE = {"Down": "CrossAttnDownBlock2D", "Up": "CrossAttnUpBlock2D"}


def _fixed(config: Config, fixed: Config, where: str) -> None:
    for field, value in fixed.items():
        if (given := config.get(field, value)) != value and (given or value):
            raise UserError(f"{where}: {field}: {given!r} is not supported, only {value!r} is")


def _numbers(
    config: Config,
    field: str,
    default: Any,
    where: str,
    count: int = 0,
    most: int = _MOST_CHANNELS,
) -> tuple[int, ...]:
    """One positive integer, or a list of them; `count` equal ones if a list of `count` is due."""
    given = config.get(field, default)
    values = list(given) if isinstance(given, (list, tuple)) else [given] * max(count, 1)
    whole = all(type(v) is int and 0 < v <= most for v in values)
    if not whole or not 0 < len(values) <= _MOST_LEVELS or (count and len(values) != count):
        wanted = f"one positive integer or {count}" if count else "positive integers"
        raise UserError(f"{where}: {field}: {given!r}: must be {wanted}, up to {most}")
    return tuple(values)


def _number(
    config: Config, field: str, default: int, where: str, most: int = _MOST_CHANNELS
) -> int:
    return _equal(_numbers(config, field, default, where, most=most), field, where)


def _equal(values: tuple[int, ...], field: str, where: str) -> int:
    if len(set(values)) != 1:
        raise UserError(f"{where}: {field}: {list(values)}: must be the same at all levels")
    return values[0]


def _positive(config: Config, field: str, default: float, where: str) -> float:
    """A number that is neither 0 nor infinite in float32."""
    given = config.get(field, default)
    if type(given) not in (int, float) or not 1e-30 < given < 1e30:
        raise UserError(f"{where}: {field}: {given!r}: must be a number above 0")
    return float(given)


def _count_blocks(count: int, field: str, where: str) -> None:
    if count > _MOST_BLOCKS:
        raise UserError(
            f"{where}: {field}: makes {count} blocks, more than the {_MOST_BLOCKS} that are "
            "supported: copy the file again"
        )


def _flag(config: Config, field: str, default: bool, where: str) -> bool:
    given = config.get(field, default)
    if not isinstance(given, bool):
        raise UserError(f"{where}: {field}: {given!r}: must be true or false")
    return given


def _blocks(
    config: Config, field: str, default: list[str], names: tuple[str, ...], count: int, where: str
) -> tuple[str, ...]:
    given = config.get(field, default)
    if not isinstance(given, (list, tuple)) or len(given) != count:
        raise UserError(f"{where}: {field}: {given!r}: must be {count}, as block_out_channels")
    for name in given:
        if name not in names:
            known = ", ".join(names)
            raise UserError(f"{where}: {field}: {name!r} is not supported, only {known}")
    return tuple(given)


def _divides(
    widths: tuple[int, ...], parts: tuple[int, ...], fields: tuple[str, str], where: str
) -> None:
    for width, part in zip(widths, parts, strict=True):
        if width % part:
            raise UserError(f"{where}: {fields[0]}: {part} does not divide the {fields[1]} {width}")


def unet(config: Config, where: str) -> Callable[..., UNet]:
    """The maker (rngs, dtype, remat) of a UNet2DConditionModel. where: named in errors.

    Note that `attention_head_dim` is the number of heads (huggingface/diffusers issue 2011).
    `upcast_attention` and `use_linear_projection` change nothing here: logits and softmax are
    float32 always, and a 1 x 1 convolution is the linear map that it is.
    """
    _fixed(config, _UNET_FIXED, where)
    widths = _numbers(config, "block_out_channels", [320, 640, 1280, 1280], where)
    count, shift = len(widths), config.get("freq_shift", 0)
    if widths[0] % 2:
        raise UserError(f"{where}: block_out_channels: {widths[0]}: the first must be even")
    if type(shift) not in (int, float) or not 0 <= shift < widths[0] / 2:
        raise UserError(
            f"{where}: freq_shift: {shift!r}: must be a number from 0, below {widths[0] // 2}"
        )
    groups = _number(config, "norm_num_groups", 32, where)
    _divides(widths, (groups,) * count, ("norm_num_groups", "channels"), where)
    heads = _numbers(config, "attention_head_dim", 8, where, count)
    _divides(widths, heads, ("attention_head_dim", "channels"), where)
    attentive = {}
    for side, name in _ATTENTIVE.items():
        plain, field = f"{side}Block2D", f"{side.lower()}_block_types"
        default = [name] * 3 + [plain] if side == "Down" else [plain] + [name] * 3
        kinds = _blocks(config, field, default, (name, plain), count, where)
        attentive[side] = tuple(kind == name for kind in kinds)

    def same(field: str, default: int) -> int:
        return _equal(_numbers(config, field, default, where, count), field, where)

    options = {
        "in_channels": _number(config, "in_channels", 4, where),
        "out_channels": _number(config, "out_channels", 4, where),
        "widths": widths,
        "layers": same("layers_per_block", 2),
        "heads": heads,
        "down": attentive["Down"],
        "up": attentive["Up"],
        "context_width": same("cross_attention_dim", 1280),
        "depth": same("transformer_layers_per_block", 1),
        "groups": groups,
        "eps": _positive(config, "norm_eps", 1e-5, where),
        "cosine_first": _flag(config, "flip_sin_to_cos", True, where),
        "shift": float(shift),
    }
    _count_blocks(count * options["layers"] * options["depth"], "layers_per_block", where)
    return _maker(UNet, options)


def vae(config: Config, where: str) -> Callable[..., Autoencoder]:
    """The maker (rngs, dtype, remat) of an AutoencoderKL. where: named in errors."""
    _fixed(config, _VAE_FIXED, where)
    _positive(config, "scaling_factor", 0.18215, where)
    widths = _numbers(config, "block_out_channels", [64], where)
    groups = _number(config, "norm_num_groups", 32, where)
    _divides(widths, (groups,) * len(widths), ("norm_num_groups", "channels"), where)
    for side, name in (("down", "DownEncoderBlock2D"), ("up", "UpDecoderBlock2D")):
        _blocks(config, f"{side}_block_types", [name], (name,), len(widths), where)
    layers = _number(config, "layers_per_block", 1, where)
    _count_blocks(len(widths) * layers, "layers_per_block", where)
    options = {
        "in_channels": _number(config, "in_channels", 3, where),
        "out_channels": _number(config, "out_channels", 3, where),
        "latent_channels": _number(config, "latent_channels", 4, where),
        "widths": widths,
        "layers": layers,
        "groups": groups,
        "quant": _flag(config, "use_quant_conv", True, where),
        "post_quant": _flag(config, "use_post_quant_conv", True, where),
    }
    return _maker(Autoencoder, options)


def text_encoder(config: Config, where: str) -> Callable[..., ClipText]:
    """The maker (rngs, dtype, remat) of a CLIPTextModel. where: named in errors."""
    _fixed(config, _CLIP_FIXED, where)
    act = config.get("hidden_act", "quick_gelu")
    if not isinstance(act, str) or act not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise UserError(f"{where}: hidden_act: {act!r} is not supported, only {known}")
    width = _number(config, "hidden_size", 512, where)
    heads = _number(config, "num_attention_heads", 8, where)
    _divides((width,), (heads,), ("num_attention_heads", "hidden_size"), where)
    options = {
        "vocab_size": _number(config, "vocab_size", 49408, where, _MOST_WORDS),
        "width": width,
        "layers": _number(config, "num_hidden_layers", 12, where, _MOST_BLOCKS),
        "heads": heads,
        "mlp_width": _number(config, "intermediate_size", 2048, where),
        "max_length": _number(config, "max_position_embeddings", 77, where),
        "act": act,
        "eps": _positive(config, "layer_norm_eps", 1e-5, where),
    }
    return _maker(ClipText, options)


def _maker(cls: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    def make(rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32, remat: bool = False):
        return cls(**options, remat=remat, dtype=dtype, rngs=rngs)

    return make
