"""Our default recipe, with its two teachers and without, against airbench94, step for step: images per second in one
process, by turns.

airbench94 is the fastest known way to 94 % of CIFAR-10 on one GPU: K. Jordan, "94% on CIFAR-10 in 3.29 Seconds on a
Single GPU", 2024 (arXiv:2404.00498), here in its later form with the optimizer Muon; network and step are written anew
from that description. Both train with the same batch size, precision and memory format, uncompiled;
the augmentation that each has is part of its time.
Shape letters: N images, C = 3, H = W = 32, K classes.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app import model
from app.checkpoint import Checkpoint
from app.data import Split
from app.device import choose_device, choose_dtype
from app.model import CifarNet, Group
from training.config import RECIPES
from training.distill import Teachers
from training.fit import fit, initialize
from training.muon import Muon

REPETITIONS = 3


class PlainGroup(Group):
    """Two convolutions, and no shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        del self.third

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x = F.gelu(self.first.norm(F.max_pool2d(self.first.conv(x_NCHW), 2)))
        return F.gelu(self.second(x))


class AirbenchNet(CifarNet):
    """1,972,792 parameters and 118 million multiply-adds."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, widths=(64, 256, 256))
        self.groups = nn.Sequential(PlainGroup(24, 64), PlainGroup(64, 256), PlainGroup(256, 256))


class AirbenchTrainer:
    """Its training step: alternating flips and shifts by 2 of whole epochs, label smoothing 0.2, Muon and SGD."""

    def __init__(self, images: Split, batch_size: int, device: torch.device) -> None:
        self.device, self.dtype, self.batch_size = device, choose_dtype(device), batch_size
        self.network = AirbenchNet(len(images.classes))
        initialize(self.network, RECIPES["default"], images.pixels_NCHW)
        self.network.to(device).to(memory_format=torch.channels_last)
        self.padded_NCHW = F.pad(images.pixels_NCHW.to(device).float(), (2, 2, 2, 2), mode="reflect").to(self.dtype)
        self.labels_N = images.labels_N.to(device)
        filters = [p for p in self.network.groups.parameters() if p.requires_grad and p.ndim == 4]
        biases = [p for p in self.network.parameters() if p.requires_grad and p.ndim == 1]
        decay = 2e-6 * batch_size
        head_rate = 0.67 / self.network.head.in_features**2  # there the head's answers are divided by its inputs
        groups = [
            {"params": biases, "lr": 0.053, "weight_decay": decay / 0.053},
            {"params": [self.network.head.weight], "lr": head_rate, "weight_decay": decay / head_rate},
        ]
        sgd = torch.optim.SGD(groups, momentum=0.85, nesterov=True, fused=device.type in ("cpu", "cuda"))
        muon = Muon(filters, 0.24)
        muon.newton_schulz_steps = 3
        self.optimizers: list[torch.optim.Optimizer] = [sgd, muon]

    def epoch(self) -> float:
        """Train on every image once: images per second."""
        start = time.perf_counter()
        self.network.train()
        images_NCHW = self._shifted().flip(3)  # in every second epoch; always here, since it costs the same each time
        count = len(self.labels_N)
        for batch_N in torch.randperm(count, device=self.device).split(self.batch_size):
            batch_NCHW = images_NCHW[batch_N].contiguous(memory_format=torch.channels_last)
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                logits_NK = self.network(batch_NCHW)
            loss = F.cross_entropy(logits_NK.float(), self.labels_N[batch_N], label_smoothing=0.2, reduction="sum")
            loss.backward()
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
        assert loss.isfinite()  # reading it also waits for the device
        return count / (time.perf_counter() - start)

    def _shifted(self) -> Tensor:
        """All images moved by up to 2 pixels; those that move alike are copied together."""
        size = self.padded_NCHW.shape[2] - 4
        shifted_NCHW = self.padded_NCHW.new_empty(len(self.padded_NCHW), 3, size, size)
        way_N = torch.randint(25, (len(shifted_NCHW),), device=self.device)
        for way in range(25):
            row, column = divmod(way, 5)
            chosen = way_N == way
            shifted_NCHW[chosen] = self.padded_NCHW[chosen, :, row : row + size, column : column + size]
        return shifted_NCHW


def ours(images: Split, device: torch.device, teachers: Teachers | None = None) -> float:
    """Images per second of one epoch under the default recipe, from labels alone or from `teachers`, too."""
    recipe = replace(RECIPES["default"], epochs=1)
    if teachers is None:
        recipe = replace(recipe, distillation=0.0)
    network = model.build(recipe.network)
    initialize(network, recipe, images.pixels_NCHW)
    return fit(network, images, recipe, device=device, teachers=teachers)[0]["images_per_second"]


def two_teachers(classes: tuple[str, ...]) -> Teachers:
    """As large as those of the default recipe; what they say takes no longer if it makes sense."""
    name = RECIPES["teacher"].network
    states = [model.build(name).state_dict() for _ in range(2)]
    return Teachers(
        [Checkpoint(architecture=name, arguments={}, state_dict=state, classes=classes) for state in states], classes
    )


def compare(images: Split, batch_size: int = RECIPES["default"].batch_size) -> dict[str, float]:
    """Images per second of each: the median of repetitions that take turns, after one to warm up."""
    device = choose_device()
    trainer, teachers = AirbenchTrainer(images, batch_size, device), two_teachers(images.classes)
    rivals: dict[str, Callable[[], float]] = {
        "ours": lambda: ours(images, device, teachers),
        "ours without teachers": lambda: ours(images, device),
        "airbench94": trainer.epoch,
    }
    speeds: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(1 + REPETITIONS):
        for name, run in rivals.items():
            speeds[name].append(run())
    return {name: statistics.median(values[1:]) for name, values in speeds.items()}
