"""Stable Diffusion's U-Net and its autoencoder's decoder in plain torch, with diffusers' key names.

scripts/on_gpu.py compares speed with these networks, since diffusers may be missing. Attention is
by SDPA, projections are 1 x 1 convolutions (SD 1.x).
tests/models/diffusion/test_torch_unet.py compares both networks with diffusers.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

WIDTHS, HEADS, GROUPS = (320, 640, 1280, 1280), 8, 32
DECODER_WIDTHS = (128, 256, 512, 512)


class Block(nn.Module):
    """Two convolutions with a shortcut. time: width of the time embedding, 0 for none."""

    def __init__(self, inputs: int, width: int, time: int, groups: int, eps: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps)
        self.conv1 = nn.Conv2d(inputs, width, 3, padding=1)
        self.time_emb_proj = nn.Linear(time, width) if time else None
        self.norm2 = nn.GroupNorm(groups, width, eps)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, width, 1) if inputs != width else None

    def forward(self, x, time=None):
        y = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            y = y + self.time_emb_proj(F.silu(time))[:, :, None, None]
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    def __init__(self, width: int, context: int, heads: int, bias: bool = False):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias)
        self.to_k, self.to_v = (nn.Linear(context, width, bias) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x, context):
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        y = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](y.transpose(1, 2).flatten(2))


class Gated(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, -1)
        return value * F.gelu(gate)


class TransformerBlock(nn.Module):
    def __init__(self, width: int, context: int, heads: int):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1 = Attention(width, width, heads)
        self.attn2 = Attention(width, context, heads)
        self.ff = nn.ModuleDict(
            {"net": nn.Sequential(Gated(width), nn.Identity(), nn.Linear(4 * width, width))}
        )

    def forward(self, x, context):
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff["net"](self.norm3(x))


class Transformer(nn.Module):
    def __init__(self, width: int, context: int, heads: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, 1e-6)
        self.proj_in, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(2))
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, context, heads)])

    def forward(self, x, context):
        y = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        y = self.transformer_blocks[0](y, context).transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.proj_out(y)


class Resample(nn.Module):
    def __init__(self, width: int, up: bool):
        super().__init__()
        self.up, self.conv = up, nn.Conv2d(width, width, 3, 1 if up else 2, 1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0) if self.up else x)


class Level(nn.Module):
    """Residual blocks of one resolution. inputs: channels that each block receives."""

    def __init__(self, inputs: Sequence[int], width: int, time: int, groups: int, eps: float):
        super().__init__()
        self.resnets = nn.ModuleList([Block(n, width, time, groups, eps) for n in inputs])
        self.attentions = nn.ModuleList()

    def attend(self, count: int, width: int, context: int, heads: int, groups: int) -> "Level":
        blocks = [Transformer(width, context, heads, groups) for _ in range(count)]
        self.attentions = nn.ModuleList(blocks)
        return self

    def layer(self, i: int, x, time, context):
        x = self.resnets[i](x, time)
        return self.attentions[i](x, context) if i < len(self.attentions) else x


class UNet(nn.Module):
    """Maps latents [b, 4, h, w], times [b] and texts [b, t, context] to latents."""

    def __init__(self, widths=WIDTHS, layers=2, heads=HEADS, context=768, groups=GROUPS, latent=4):
        super().__init__()
        self.width, time, last = widths[0], 4 * widths[0], len(widths) - 1
        self.conv_in = nn.Conv2d(latent, widths[0], 3, padding=1)
        steps = nn.Linear(widths[0], time), nn.Linear(time, time)
        self.time_embedding = nn.ModuleDict(dict(zip(("linear_1", "linear_2"), steps, strict=True)))

        def level(inputs: list[int], i: int, attentive: bool) -> Level:
            stage, count = Level(inputs, widths[i], time, groups, 1e-5), len(inputs) * attentive
            return stage.attend(count, widths[i], context, heads, groups)

        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        skips = [widths[0]]
        for i, width in enumerate(widths):
            stage = level([skips[-1]] + [width] * (layers - 1), i, i < last)
            if i < last:
                stage.downsamplers = nn.ModuleList([Resample(width, up=False)])
            self.down_blocks.append(stage)
            skips += [width] * (layers + (i < last))
        middle = Level([widths[-1]] * 2, widths[-1], time, groups, 1e-5)
        self.mid_block = middle.attend(1, widths[-1], context, heads, groups)
        x = widths[-1]
        for i in range(last, -1, -1):
            inputs = [(x if j == 0 else widths[i]) + skips.pop() for j in range(layers + 1)]
            stage, x = level(inputs, i, i < last), widths[i]
            if i:
                stage.upsamplers = nn.ModuleList([Resample(x, up=True)])
            self.up_blocks.append(stage)
        self.conv_norm_out = nn.GroupNorm(groups, x, 1e-5)
        self.conv_out = nn.Conv2d(x, latent, 3, padding=1)

    def forward(self, x, t, context):
        half = self.width // 2
        angles = t.float()[:, None] * torch.exp(
            -math.log(10000.0) / half * torch.arange(half, device=x.device)
        )
        time = torch.cat([angles.cos(), angles.sin()], -1).to(x.dtype)
        time = self.time_embedding["linear_2"](F.silu(self.time_embedding["linear_1"](time)))
        x = self.conv_in(x)
        skips = [x]
        for level in self.down_blocks:
            for i in range(len(level.resnets)):
                x = level.layer(i, x, time, context)
                skips.append(x)
            if hasattr(level, "downsamplers"):
                x = level.downsamplers[0](x)
                skips.append(x)
        for i in range(2):
            x = self.mid_block.layer(i, x, time, context)
        for level in self.up_blocks:
            for i in range(len(level.resnets)):
                x = level.layer(i, torch.cat([x, skips.pop()], 1), time, context)
            if hasattr(level, "upsamplers"):
                x = level.upsamplers[0](x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class PixelAttention(Attention):
    def __init__(self, width: int, groups: int):
        super().__init__(width, width, 1, bias=True)
        self.group_norm = nn.GroupNorm(groups, width, 1e-6)

    def forward(self, x):
        y = self.group_norm(x).flatten(2).transpose(1, 2)
        return x + super().forward(y, y).transpose(1, 2).unflatten(2, x.shape[2:])


class Decoder(nn.Module):
    """The autoencoder's decoder, from latents [b, 4, h, w] to images [b, 3, 8 h, 8 w]."""

    def __init__(self, widths=DECODER_WIDTHS, layers=2, groups=GROUPS, latent=4, channels=3):
        super().__init__()
        x, eps = widths[-1], 1e-6
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)
        self.decoder = nn.ModuleDict({"conv_in": nn.Conv2d(latent, x, 3, padding=1)})
        middle = Level([x] * 2, x, 0, groups, eps)
        middle.attentions = nn.ModuleList([PixelAttention(x, groups)])
        self.decoder["mid_block"], levels = middle, nn.ModuleList()
        for i in range(len(widths) - 1, -1, -1):
            stage = Level([x] + [widths[i]] * layers, widths[i], 0, groups, eps)
            x = widths[i]
            if i:
                stage.upsamplers = nn.ModuleList([Resample(x, up=True)])
            levels.append(stage)
        self.decoder["up_blocks"] = levels
        self.decoder["conv_norm_out"] = nn.GroupNorm(groups, x, eps)
        self.decoder["conv_out"] = nn.Conv2d(x, channels, 3, padding=1)

    def forward(self, z):
        parts = self.decoder
        x, middle = parts["conv_in"](self.post_quant_conv(z)), parts["mid_block"]
        x = middle.resnets[1](middle.attentions[0](middle.resnets[0](x)))
        for level in parts["up_blocks"]:
            for block in level.resnets:
                x = block(x)
            x = level.upsamplers[0](x) if hasattr(level, "upsamplers") else x
        return parts["conv_out"](F.silu(parts["conv_norm_out"](x)))


def calls(batch: int, toy: bool, device: torch.device) -> tuple[Callable, Callable]:
    """Two functions: a guided step of `batch` latents, and as many images by the sampler of
    configs/generate.py with each step guided and all layers. SD 1.5, bf16, random weights, channels
    last, compiled. toy: small, not compiled."""
    from scripts import programs

    side, context = (8, 16) if toy else (64, programs.UNET["cross_attention_dim"])
    sizes = {"widths": (16, 16, 32, 32), "heads": 2, "groups": 4, "context": 16} if toy else {}
    with device:
        unet = UNet(**sizes)
        decoder = Decoder((8, 8, 8, 8), groups=4) if toy else Decoder()
    layout = {"memory_format": torch.channels_last, "dtype": torch.bfloat16}
    unet, decoder = (m.eval().requires_grad_(False).to(**layout) for m in (unet, decoder))
    if not toy:
        unet.compile()
        decoder.compile()
    noise = torch.randn(batch, 4, side, side, device=device)
    text = torch.randn(2 * batch, programs.TOKENS, context, device=device, dtype=torch.bfloat16)

    def predict(x: torch.Tensor, t: float) -> torch.Tensor:
        times = torch.full((2 * batch,), t, device=device)
        without, with_text = unet(torch.cat([x, x]).to(**layout), times, text).float().chunk(2)
        return without + 2 * (with_text - without)

    settings = programs.generate.get_config().sampler
    table = programs.schedule.make_table(settings.name, programs.SCHEDULER, settings.steps)
    columns = [np.asarray(x).tolist() for x in table.steps]
    rows = [table.steps._make(row) for row in zip(*columns, strict=True)]

    def weighed(weights: Sequence[float], states: Sequence[torch.Tensor]) -> Any:
        return sum(w * s for w, s in zip(weights, states, strict=True))

    def images() -> torch.Tensor:
        x = noise * float(table.init_sigma)
        last, history = torch.zeros_like(x), [torch.zeros_like(x)] * (len(rows[0].mix[0]) - 3)
        for at in rows:
            entries = [weighed(at.entry, (x, predict(at.scale * x, at.time))), *history]
            states = (x, last, *entries)
            x, last = (weighed(weights, states) for weights in at.mix)
            history = entries[:-1]
        latents = (x / 0.18215).to(**layout)
        return torch.cat([decoder(part) for part in latents.split(4)])

    return lambda: predict(noise, 500.0), images
