"""The networks in plain PyTorch, as today's simulators have them: the yardstick.

Names of the parameters are those of the published state dicts, which
`mosaic_jax.interop.torch` writes.
"""

import itertools

import numpy as np
import torch
from torch import nn
from torch.nn import functional


def _norm(kind: str, channels: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(min(8, channels), channels)


class Block(nn.Module):
    """Basic residual block."""

    def __init__(self, into: int, out: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.bn1 = _norm(norm, out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = _norm(norm, out)
        self.shortcut = nn.Sequential()
        if stride != 1 or into != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(into, out, 1, stride, bias=False), _norm(norm, out)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(h)) + self.shortcut(x))


class ResNet18(nn.Module):
    """With a CIFAR stem."""

    def __init__(self, width: int, norm: str = "batch", channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = _norm(norm, width)
        into = width
        for group in range(4):
            out, stride = width * 2**group, 1 if group == 0 else 2
            blocks = Block(into, out, stride, norm), Block(out, out, 1, norm)
            setattr(self, f"layer{group + 1}", nn.Sequential(*blocks))
            into = out
        self.linear = nn.Linear(into, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(x.mean((2, 3)))


class CNN(nn.Module):
    """Four convolutions with norms; all but the first halve the map."""

    def __init__(self, width: int, norm: str = "batch", channels: int = 3) -> None:
        super().__init__()
        widths = [channels, *(width * 2**i for i in range(4))]
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, 2 if i else 1, 1, bias=False)
            for i, (a, b) in enumerate(itertools.pairwise(widths))
        )
        self.norms = nn.ModuleList(_norm(norm, width) for width in widths[1:])
        self.fc = nn.Linear(widths[-1], 10)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 8 width], before the head."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = functional.relu(norm(conv(x)))
        return x.mean((2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.features(x))


class MLP(nn.Module):
    """Two hidden layers."""

    def __init__(self, width: int, inputs: int = 3 * 32 * 32) -> None:
        super().__init__()
        self.hidden = nn.ModuleList([nn.Linear(inputs, width), nn.Linear(width, width)])
        self.fc = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        for layer in self.hidden:
            x = functional.relu(layer(x))
        return self.fc(x)


def build(network: str, width: int, norm: str) -> nn.Module:
    """A classifier: "resnet18", "cnn" or "mlp", which has no norm."""
    if network == "mlp":
        return MLP(width)
    return {"resnet18": ResNet18, "cnn": CNN}[network](width, norm)


class Generator(nn.Module):
    """DCGAN for 32 pixels."""

    def __init__(self, width: int, channels: int = 3, latent: int = 100) -> None:
        super().__init__()
        widths = [width * 8, width * 4, width * 2, width]
        layers = [nn.ConvTranspose2d(latent, widths[0], 4, 1, 0, bias=False)]
        layers += [nn.BatchNorm2d(widths[0]), nn.ReLU(True)]
        for a, b in itertools.pairwise(widths):
            layers += [nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False)]
            layers += [nn.BatchNorm2d(b), nn.ReLU(True)]
        layers += [nn.ConvTranspose2d(width, channels, 1, 1, 0, bias=False), nn.Tanh()]
        self.main = nn.Sequential(*layers)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.main(z[:, :, None, None])


class Discriminator(nn.Module):
    """DCGAN for 32 pixels, up to logits."""

    def __init__(self, width: int, channels: int = 3) -> None:
        super().__init__()
        layers = [nn.Conv2d(channels, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2)]
        for i in range(3):
            a, b = width * 2**i, width * 2 ** (i + 1)
            layers += [nn.Conv2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b)]
            layers += [nn.LeakyReLU(0.2)]
        layers += [nn.Conv2d(width * 8, 1, 2, 2, 0, bias=False)]
        self.main = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.main(x).reshape(-1)


def batch(image: np.ndarray) -> torch.Tensor:
    """NHWC array to NCHW tensor."""
    return torch.tensor(np.ascontiguousarray(np.moveaxis(image, -1, 1)))
