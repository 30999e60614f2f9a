"""The U-Net decoder on five feature maps in torch, channels first, as a reference."""

import torch
from torch import nn


def block(inputs: int, outputs: int) -> nn.Sequential:
    layers = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class Decoder(nn.Module):
    """channels: of the maps, the finest first. widths: of the blocks, one for each map."""

    def __init__(self, channels: tuple[int, ...], widths: tuple[int, ...]):
        super().__init__()
        skips = [*reversed(channels[:-1]), 0]
        inputs = [channels[-1], *widths]
        self.blocks = nn.ModuleList(
            block(i + skip, o) for i, skip, o in zip(inputs, skips, widths, strict=False)
        )
        self.out = nn.Conv2d(widths[-1], 1, 3, padding=1)

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        """Logits [b, h, w] at twice the side of the finest map; the maps are the finest first."""
        *skips, x = maps
        for layers in self.blocks:
            x = nn.functional.interpolate(x, scale_factor=2, mode="nearest")
            x = layers(torch.cat([x, skips.pop()], 1) if skips else x)
        return self.out(x)[:, 0]
