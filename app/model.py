"""The networks. A leaf: torch only.

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
    """Holds the channel means and standard deviations, in [0, 1], so that they travel with the weights."""

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
    """A convolution without bias and its batch norm; `fold` makes one convolution of the two."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=(kernel - 1) // 2, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(outputs)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return cast(Tensor, self.norm(self.conv(x_NCHW)))


class Residual(nn.Module):
    """Two 3x3 convolutions beside the identity. The second batch norm starts at zero: a new block changes nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = ConvNorm(width, width)
        self.second = ConvNorm(width, width)
        nn.init.zeros_(cast(nn.BatchNorm2d, self.second.norm).weight)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return F.relu(x_NCHW + self.second(F.relu(self.first(x_NCHW))))


class CifarNet(Normalized):
    """The default network: a small residual network of dense 3x3 convolutions, which suit matrix units.

    Each stage halves height and width with a strided convolution and refines with one residual block: 16x16, 8x8, 4x4.
    At 32x32 there is only the thin stem, since work there is memory traffic rather than arithmetic; a stem that halves
    the picture at once (4x4, stride 2) was no faster and lost 1.6 points of validation accuracy in five epochs.
    """

    def __init__(self, num_classes: int = 10, stem: int = 32, widths: tuple[int, ...] = (96, 192, 224)) -> None:
        super().__init__()
        self.stem = ConvNorm(3, stem)
        self.down = nn.ModuleList(ConvNorm(i, o, stride=2) for i, o in itertools.pairwise((stem, *widths)))
        self.refine = nn.ModuleList(Residual(width) for width in widths)
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        x = F.relu(self.stem(self.normalize(pixels_NCHW)))
        for down, refine in zip(self.down, self.refine, strict=True):
            x = refine(F.relu(down(x)))
        # A bfloat16 mean would throw away most of what averaging gains.
        return cast(Tensor, self.head(x.mean(dim=(2, 3), dtype=torch.float32)))


NETWORKS: dict[str, type[Normalized]] = {"net": Net, "cifar_net": CifarNet}


def build(name: str, **arguments: object) -> Normalized:
    """A freshly initialised network: `build("net", num_classes=10)`.

    Raises:
        ValueError: there is no network of that name.
    """
    if name not in NETWORKS:
        raise ValueError(f"There is no network {name!r}; known are {', '.join(NETWORKS)}.")
    return NETWORKS[name](**arguments)


def fold(network: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose batch norms are folded into the convolutions before them."""
    folded = copy.deepcopy(network).eval()
    for module in folded.modules():
        if isinstance(module, ConvNorm) and isinstance(module.norm, nn.BatchNorm2d):
            module.conv = fuse_conv_bn_eval(module.conv, module.norm)
            module.norm = nn.Identity()
    return folded


def split(network: nn.Module) -> tuple[nn.Module, nn.Linear]:
    """A copy without the last layer, which gives the features (N, D) that this layer makes logits of; and the layer."""
    body = copy.deepcopy(network)
    name, head = [(name, layer) for name, layer in body.named_modules() if isinstance(layer, nn.Linear)][-1]
    setattr(body, name, nn.Identity())
    return body, head
