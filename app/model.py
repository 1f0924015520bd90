"""The networks. Imports only torch.

Every network takes pixels in 0..255 (uint8 or float), normalises them with its own mean and std buffers and returns
logits. Shape letters: N images, C = 3 channels, H = W = 32, D features, K classes.
"""

import copy
import itertools
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

IMAGE_SIZE = 32
IMAGE_BYTES = IMAGE_SIZE * IMAGE_SIZE * 3


class Normalized(nn.Module):
    """A network with its channel means and standard deviations, in [0, 1], so that they travel with the weights."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((3,), 0.5))
        self.register_buffer("std", torch.full((3,), 0.5))

    def normalize(self, pixels_NCHW: Tensor) -> Tensor:
        scale_C, shift_C = 1 / (255 * self.std), -self.mean / self.std
        return pixels_NCHW * scale_C[:, None, None] + shift_C[:, None, None]


class Net(Normalized):
    """The CNN of the PyTorch CIFAR-10 tutorial, unchanged: 62,006 parameters."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        x = self.normalize(pixels_NCHW)
        x = self.pool(F.relu(self.conv1(x)))  # (N, 6, 14, 14)
        x = self.pool(F.relu(self.conv2(x)))  # (N, 16, 5, 5)
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return cast(Tensor, self.fc3(x))


class ConvNorm(nn.Module):
    """A 3x3 convolution without bias and its batch norm; `fold` merges the two into one convolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(outputs)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return cast(Tensor, self.norm(self.conv(x_NCHW)))


class Group(nn.Module):
    """A 3x3 convolution, a maximum over 2x2 pixels, then two 3x3 convolutions beside a shortcut.

    Each convolution begins as the identity on its first channels, so that early gradients reach every layer. The batch
    norms keep the scale 1, because the next convolution can learn any other. Being positive, the scale commutes with
    the maximum, so that `fold` may move the first norm before it.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = ConvNorm(inputs, outputs)
        self.second = ConvNorm(outputs, outputs)
        self.third = ConvNorm(outputs, outputs)
        for layer in (self.first, self.second, self.third):
            nn.init.dirac_(layer.conv.weight.data[: layer.conv.in_channels])
            cast(nn.BatchNorm2d, layer.norm).weight.requires_grad_(False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x = F.gelu(self.first.norm(F.max_pool2d(self.first.conv(x_NCHW), 2)))
        return F.gelu(x + self.third(F.gelu(self.second(x))))


class CifarNet(Normalized):
    """The default network: whitened 2x2 patches, then three groups of three dense 3x3 convolutions.

    After K. Jordan's design for fast training ("94% on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024,
    arXiv:2404.00498), written afresh from the paper, with the third convolution and the shortcut of his airbench96, and
    narrower in return. The first layer does not pad, so the planes have sides of 31, 15, 7 and 3; sides of 32, 16, 8
    and 4 would take a quarter more computation for no more accuracy.
    """

    def __init__(self, num_classes: int = 10, widths: tuple[int, ...] = (64, 192, 256)) -> None:
        super().__init__()
        self.whiten = nn.Conv2d(3, 24, 2)
        self.whiten.weight.requires_grad_(False)
        self.groups = nn.Sequential(*(Group(i, o) for i, o in itertools.pairwise((24, *widths))))
        self.head = nn.Linear(widths[-1], num_classes, bias=False)
        # Scale to a standard deviation of 1 / inputs. Not with normal_, which on the meta device imports sympy, 150 MB.
        self.head.weight.data.mul_((3 / widths[-1]) ** 0.5)

    @torch.no_grad()
    def set_whitening(self, pixels_NCHW: Tensor) -> None:
        """Make the first layer output the principal components of 2x2 patches, scaled to variance 1 (the weakest to
        less), and their negatives. A component without variance (colour, in grey pictures) would be constant, which a
        batch norm turns into noise, so other components take its place. Set the normalisation first.

        Args:
            pixels_NCHW: A few thousand training images, 0..255.
        """
        patches = F.unfold(self.normalize(pixels_NCHW.float()), 2).transpose(1, 2).flatten(0, 1)
        variance, components = torch.linalg.eigh(patches.T @ patches / len(patches))
        scaled = (components / (variance + 5e-4).sqrt()).T.view(12, 3, 2, 2)
        if len(live := (variance > 1e-6).nonzero()[:, 0]):
            scaled = scaled[live[torch.arange(12) % len(live)]]
        self.whiten.weight.copy_(torch.cat([scaled, -scaled]))
        nn.init.zeros_(cast(Tensor, self.whiten.bias))

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        x = self.groups(F.gelu(self.whiten(self.normalize(pixels_NCHW))))
        return cast(Tensor, self.head(x.amax(dim=(2, 3)).float()))


class WideCifarNet(CifarNet):
    """The default network half as wide again, as its teacher."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(num_classes, widths=(96, 288, 384))


NETWORKS: dict[str, type[Normalized]] = {"net": Net, "cifar_net": CifarNet, "wide_cifar_net": WideCifarNet}


def build(name: str, **arguments: object) -> Normalized:
    """A freshly initialised network: `build("net", num_classes=10)`.

    Raises:
        ValueError: there is no network of that name.
    """
    if name not in NETWORKS:
        raise ValueError(f"There is no network {name!r}; there are {', '.join(NETWORKS)}.")
    return NETWORKS[name](**arguments)


def fold(network: Normalized) -> Normalized:
    """A copy in evaluation mode whose batch norms are folded into the convolutions before them."""
    folded = copy.deepcopy(network).eval()
    for module in folded.modules():
        if isinstance(module, ConvNorm) and isinstance(module.norm, nn.BatchNorm2d):
            module.conv = fuse_conv_bn_eval(module.conv, module.norm)
            module.norm = nn.Identity()
    return folded


def split(network: Normalized) -> tuple[Normalized, nn.Linear]:
    """A copy without the last layer, returning features (N, D); and the last layer, which turns them into logits."""
    body = copy.deepcopy(network)
    name, head = [(name, layer) for name, layer in body.named_modules() if isinstance(layer, nn.Linear)][-1]
    setattr(body, name, nn.Identity())
    return body, head
