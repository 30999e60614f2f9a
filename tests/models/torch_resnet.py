"""torchvision's ResNet in plain torch, with its key names: the oracle of the parity tests.

Written from the public description (ResNet v1.5), as torchvision need not be installed.
"""

import torch
from torch import nn


def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, (size - 1) // 2, bias=False)


class Basic(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3), nn.BatchNorm2d(width)
        self.downsample = downsample(inputs, width, stride)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
        self.downsample = downsample(inputs, 4 * width, stride)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


def downsample(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """Returns layer3, layer4 (NCHW) and the pooled layer4."""

    def __init__(self, block=Bottleneck, depths=(3, 4, 6, 3), width: int = 64, channels: int = 3):
        super().__init__()
        self.conv1, self.bn1 = conv(channels, width, 7, 2), nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inputs = width
        for stage, depth in enumerate(depths):
            blocks = []
            for index in range(depth):
                blocks.append(block(inputs, width << stage, 2 if stage and not index else 1))
                inputs = (width << stage) * block.expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))

    def forward(self, x):
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        layer3 = self.layer3(self.layer2(self.layer1(x)))
        layer4 = self.layer4(layer3)
        return layer3, layer4, layer4.mean((2, 3))


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Weights and statistics as of a trained network: nothing is at its neutral value.

    Parameters and statistics are drawn so that activations stay near unit scale through the depth,
    in training as in evaluation, as they do in a trained network.
    """
    rng = torch.Generator().manual_seed(seed)

    def draw(tensor, low, high):
        tensor.copy_(torch.rand(tensor.shape, generator=rng) * (high - low) + low)

    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                fan_in = module.weight[0].numel()
                module.weight.copy_(torch.randn(module.weight.shape, generator=rng))
                module.weight.mul_((2 / fan_in) ** 0.5)
            elif isinstance(module, nn.BatchNorm2d):
                last = name.endswith(("bn3", "layer.2.normalization"))
                draw(module.weight, *((0.2, 0.5) if last else (0.6, 1.2)))
                draw(module.bias, -0.2, 0.4)
                draw(module.running_mean, -0.3, 0.3)
                draw(module.running_var, 0.7, 1.6)


def decide(model: ResNet, images: torch.Tensor, seed: int = 0) -> None:
    """Moves every ReLU and max-pool of the network away from its kink at these images.

    A gradient jumps where a ReLU's input crosses zero, and among tens of millions of inputs some
    lie within rounding of it: there, two right implementations differ by 1e-3 and more. So every
    channel is shifted to be wholly on or wholly off (the residual stream on), six standard
    deviations from zero, and the stem's kernel is rounded so that (with images rounded likewise)
    its sums are exact. Running statistics become those of the images, then are perturbed.
    """
    rng = torch.Generator().manual_seed(seed)
    norms = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        model.conv1.weight.mul_(64).round_().div_(64)
        for name, norm in norms:
            always_on = name.endswith(("bn3", "downsample.1"))
            sign = torch.rand(norm.bias.shape, generator=rng) < 0.5
            norm.bias.copy_(6 * norm.weight * (1 if always_on else 1 - 2 * sign.float()))
            norm.momentum = 1.0
        model.train()(images)
        for _, norm in norms:
            norm.momentum = 0.1
            spread = norm.running_var.sqrt()
            norm.running_mean.add_(spread * 0.2 * torch.randn(spread.shape, generator=rng))
            norm.running_var.mul_(torch.rand(spread.shape, generator=rng) * 0.5 + 0.75)
