"""YOLOv3's head on three feature maps in torch, channels first, as a reference."""

import torch
from torch import nn


def leaky_conv(inputs: int, outputs: int, size: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, size, padding=(size - 1) // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.LeakyReLU(0.1))


class Detector(nn.Module):
    """inputs: channels of the maps, from the fine to the coarse one. Three anchors, one class."""

    def __init__(self, inputs: tuple[int, ...], width: int = 512):
        super().__init__()
        widths = [width, width // 2, width // 4]
        beside = [0, *widths[1:]]
        self.branches = nn.ModuleList(
            self.branch(channels + extra, own)
            for channels, extra, own in zip(reversed(inputs), beside, widths, strict=True)
        )
        self.links = nn.ModuleList(leaky_conv(2 * own, own, 1) for own in widths[1:])

    @staticmethod
    def branch(i: int, f: int) -> nn.ModuleList:
        shapes = [(i, f, 1), (f, 2 * f, 3), (2 * f, f, 1), (f, 2 * f, 3), (2 * f, f, 1)]
        first = nn.Sequential(*(leaky_conv(*shape) for shape in shapes))
        return nn.ModuleList([first, leaky_conv(f, 2 * f, 3), nn.Conv2d(2 * f, 18, 1)])

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """Logits of each map, the coarse one first. maps: from the fine to the coarse one."""
        outputs, y = [], None
        for scale, ((first, wide, last), x) in enumerate(
            zip(self.branches, reversed(maps), strict=True)
        ):
            if y is not None:
                up = nn.functional.interpolate(self.links[scale - 1](y), scale_factor=2)
                x = torch.cat([up, x], 1)
            y = first(x)
            outputs.append(last(wide(y)))
        return outputs
