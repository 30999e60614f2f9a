"""The three networks of a Stable Diffusion pipeline from their `config.json`.

A field that is absent has the default of diffusers or transformers. A value that we do not compute
is refused by the name of its field. Fields that change no output, such as training settings, are
ignored.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from medsyn_jax.core.errors import UserError
from medsyn_jax.models.diffusion.clip_text import ClipText
from medsyn_jax.models.diffusion.unet import UNet
from medsyn_jax.models.diffusion.vae import Autoencoder
from medsyn_jax.models.layers import ACTIVATIONS

Config = Mapping[str, Any]

# The one value of a field that we compute, which is also diffusers' default.
_UNET_FIXED = {
    "act_fn": "silu",
    "attention_type": "default",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
    "dropout": 0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "resnet_out_scale_factor": 1,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
}
_UNET_FALSE = "center_input_sample class_embeddings_concat dual_cross_attention"
_UNET_FALSE += " only_cross_attention resnet_skip_time_act"
_UNET_NONE = "addition_embed_type class_embed_type cross_attention_norm encoder_hid_dim_type"
_UNET_NONE += " mid_block_only_cross_attention num_attention_heads num_class_embeds"
_UNET_NONE += " time_cond_proj_dim time_embedding_act_fn time_embedding_dim timestep_post_act"
_UNET_FIXED |= dict.fromkeys(_UNET_FALSE.split(), False) | dict.fromkeys(_UNET_NONE.split())
_VAE_FIXED = {
    "act_fn": "silu",
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
    "shift_factor": None,
}
_CLIP_FIXED = {"attention_dropout": 0}
# More than any network has. A weights file is compared with its config only after the module's
# shapes are computed, which takes time and memory in proportion to these numbers.
_MOST_CHANNELS, _MOST_WORDS, _MOST_LEVELS, _MOST_BLOCKS = 2**14, 2**20, 8, 128


@dataclass(frozen=True)
class _Fields:
    """Checked access to the fields of a config; every method raises UserError for a bad value.

    where: the file, named in errors.
    """

    config: Config
    where: str

    def error(self, field: str, fault: str) -> UserError:
        return UserError(f"{self.where}: {field}: {fault}")

    def check_fixed(self, fixed: Config) -> None:
        for field, value in fixed.items():
            if (actual := self.config.get(field, value)) != value and (actual or value):
                raise self.error(field, f"{actual!r} is not supported, only {value!r} is")

    def numbers(
        self, field: str, default: Any, count: int = 0, most: int = _MOST_CHANNELS
    ) -> tuple[int, ...]:
        """Positive integers up to `most`; with `count`, so many, of which a config may give one."""
        value = self.config.get(field, default)
        values = list(value) if isinstance(value, (list, tuple)) else [value] * max(count, 1)
        whole = all(type(v) is int and 0 < v <= most for v in values)
        if not whole or not 0 < len(values) <= _MOST_LEVELS or (count and len(values) != count):
            wanted = f"one positive integer or {count}" if count else "positive integers"
            raise self.error(field, f"{value!r}: must be {wanted}, up to {most}")
        return tuple(values)

    def number(self, field: str, default: int, count: int = 0, most: int = _MOST_CHANNELS) -> int:
        """A positive integer, or `count` equal ones."""
        values = self.numbers(field, default, count, most)
        if len(set(values)) != 1:
            raise self.error(field, f"{list(values)}: must be the same at all levels")
        return values[0]

    def positive(self, field: str, default: float) -> float:
        """A number that is neither 0 nor infinite in float32."""
        value = self.config.get(field, default)
        if type(value) not in (int, float) or not 1e-30 < value < 1e30:
            raise self.error(field, f"{value!r}: must be a number above 0")
        return float(value)

    def flag(self, field: str, default: bool) -> bool:
        value = self.config.get(field, default)
        if not isinstance(value, bool):
            raise self.error(field, f"{value!r}: must be true or false")
        return value

    def blocks(
        self, field: str, default: list[str], names: tuple[str, ...], count: int
    ) -> tuple[str, ...]:
        """The kinds of the blocks of all `count` levels, each of `names`."""
        value = self.config.get(field, default)
        if not isinstance(value, (list, tuple)) or len(value) != count:
            raise self.error(field, f"{value!r}: must be {count}, as block_out_channels")
        for name in value:
            if name not in names:
                raise self.error(field, f"{name!r} is not supported, only {', '.join(names)}")
        return tuple(value)

    def check_divides(
        self, field: str, parts: tuple[int, ...], whole: str, widths: tuple[int, ...]
    ) -> None:
        for width, part in zip(widths, parts, strict=True):
            if width % part:
                raise self.error(field, f"{part} does not divide the {whole} {width}")

    def check_count(self, field: str, count: int) -> None:
        if count > _MOST_BLOCKS:
            raise self.error(
                field,
                f"makes {count} blocks, more than the {_MOST_BLOCKS} that are supported: "
                "copy the file again",
            )


def unet(config: Config, where: str) -> Callable[..., UNet]:
    """The maker (rngs, dtype, remat) of a UNet2DConditionModel. where: named in errors.

    Note that `attention_head_dim` is the number of heads (huggingface/diffusers issue 2011).
    `upcast_attention` and `use_linear_projection` change nothing here: logits and softmax are
    always float32, and a 1 x 1 convolution is a linear map.
    """
    fields = _Fields(config, where)
    fields.check_fixed(_UNET_FIXED)
    widths = fields.numbers("block_out_channels", [320, 640, 1280, 1280])
    count, shift = len(widths), config.get("freq_shift", 0)
    if widths[0] % 2:
        raise fields.error("block_out_channels", f"{widths[0]}: the first must be even")
    if type(shift) not in (int, float) or not 0 <= shift < widths[0] / 2:
        fault = f"{shift!r}: must be a number from 0, below {widths[0] // 2}"
        raise fields.error("freq_shift", fault)
    groups = fields.number("norm_num_groups", 32)
    fields.check_divides("norm_num_groups", (groups,) * count, "channels", widths)
    heads = fields.numbers("attention_head_dim", 8, count)
    fields.check_divides("attention_head_dim", heads, "channels", widths)
    plain, attentive = ("DownBlock2D", "UpBlock2D"), ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
    down = fields.blocks(
        "down_block_types", [attentive[0]] * 3 + [plain[0]], (attentive[0], plain[0]), count
    )
    up = fields.blocks(
        "up_block_types", [plain[1]] + [attentive[1]] * 3, (attentive[1], plain[1]), count
    )
    options = {
        "in_channels": fields.number("in_channels", 4),
        "out_channels": fields.number("out_channels", 4),
        "widths": widths,
        "layers": fields.number("layers_per_block", 2, count),
        "heads": heads,
        "down": tuple(kind == attentive[0] for kind in down),
        "up": tuple(kind == attentive[1] for kind in up),
        "context_width": fields.number("cross_attention_dim", 1280, count),
        "depth": fields.number("transformer_layers_per_block", 1, count),
        "groups": groups,
        "eps": fields.positive("norm_eps", 1e-5),
        "cosine_first": fields.flag("flip_sin_to_cos", True),
        "shift": float(shift),
    }
    fields.check_count("layers_per_block", count * options["layers"] * options["depth"])
    return _maker(UNet, options)


def vae(config: Config, where: str) -> Callable[..., Autoencoder]:
    """The maker (rngs, dtype, remat) of an AutoencoderKL. where: named in errors."""
    fields = _Fields(config, where)
    fields.check_fixed(_VAE_FIXED)
    fields.positive("scaling_factor", 0.18215)
    widths = fields.numbers("block_out_channels", [64])
    groups = fields.number("norm_num_groups", 32)
    fields.check_divides("norm_num_groups", (groups,) * len(widths), "channels", widths)
    for side, name in (("down", "DownEncoderBlock2D"), ("up", "UpDecoderBlock2D")):
        fields.blocks(f"{side}_block_types", [name], (name,), len(widths))
    layers = fields.number("layers_per_block", 1)
    fields.check_count("layers_per_block", len(widths) * layers)
    options = {
        "in_channels": fields.number("in_channels", 3),
        "out_channels": fields.number("out_channels", 3),
        "latent_channels": fields.number("latent_channels", 4),
        "widths": widths,
        "layers": layers,
        "groups": groups,
        "quant": fields.flag("use_quant_conv", True),
        "post_quant": fields.flag("use_post_quant_conv", True),
    }
    return _maker(Autoencoder, options)


def text_encoder(config: Config, where: str) -> Callable[..., ClipText]:
    """The maker (rngs, dtype, remat) of a CLIPTextModel. where: named in errors."""
    fields = _Fields(config, where)
    fields.check_fixed(_CLIP_FIXED)
    act = config.get("hidden_act", "quick_gelu")
    if not isinstance(act, str) or act not in ACTIVATIONS:
        raise fields.error("hidden_act", f"{act!r} is not supported, only {', '.join(ACTIVATIONS)}")
    width = fields.number("hidden_size", 512)
    heads = fields.number("num_attention_heads", 8)
    fields.check_divides("num_attention_heads", (heads,), "hidden_size", (width,))
    options = {
        "vocab_size": fields.number("vocab_size", 49408, most=_MOST_WORDS),
        "width": width,
        "layers": fields.number("num_hidden_layers", 12, most=_MOST_BLOCKS),
        "heads": heads,
        "mlp_width": fields.number("intermediate_size", 2048),
        "max_length": fields.number("max_position_embeddings", 77),
        "act": act,
        "eps": fields.positive("layer_norm_eps", 1e-5),
    }
    return _maker(ClipText, options)


def _maker(cls: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    def make(rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32, remat: bool = False):
        return cls(**options, remat=remat, dtype=dtype, rngs=rngs)

    return make
