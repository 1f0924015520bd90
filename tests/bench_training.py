"""Our training against airbench94's: step for step (`compare`, part of `make bench`), and to the end, by our recipe
`fast`:

    CIFAR_DATA=DIR python tests/bench_training.py

This trains both on nine tenths of the training images, under two seeds, and prints time and accuracy on the last tenth:
half an hour on two cores.

airbench94 is the fastest known way to 94 % of CIFAR-10 on one GPU: K. Jordan, "94% on CIFAR-10 in 3.29 Seconds on a
Single GPU", 2024 (arXiv:2404.00498), here in its later form with the optimizer Muon; network and step are written anew
from that description. Both train in one process, in the same precision and memory format, uncompiled; each one's time
includes its augmentation.
Shape letters: N images, C = 3, H = W = 32, K classes.
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app import data, memory, model
from app.checkpoint import Checkpoint
from app.data import Split
from app.device import choose_device, choose_dtype, describe
from app.model import CifarNet, Group
from training.config import RECIPES, Recipe
from training.data import hold_out, locate
from training.distill import Teachers
from training.evaluate import forward
from training.fit import Row, fit, initialize, set_learning_rates
from training.muon import Muon

REPETITIONS = 3
SEEDS = (0, 1)
AIRBENCH_EPOCHS, AIRBENCH_BATCH = 10, 2000
"""Epochs that give 94 % in six views with a tenth of the images held out; eight are published, with all images."""


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
    """airbench94's training: alternating flips, shifts by up to 2, both applied to whole epochs, label smoothing 0.2,
    Muon and SGD with rates that fall to 0 over `epochs`; the whitening bias learns in the first three only."""

    WHITENING_EPOCHS = 3

    def __init__(self, images: Split, batch_size: int, device: torch.device, epochs: int) -> None:
        self.device, self.dtype, self.batch_size = device, choose_dtype(device), batch_size
        self.epochs, self.epochs_done = epochs, 0
        self.network = AirbenchNet(len(images.classes))
        initialize(self.network, RECIPES["default"], images.pixels_NCHW)
        self.network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload, unused-ignore]  # torch < 2.14
        self.padded_NCHW = F.pad(images.pixels_NCHW.to(device).float(), (2, 2, 2, 2), mode="reflect").to(self.dtype)
        mirrored_N = torch.rand(len(images), device=device) < 0.5
        self.padded_NCHW[mirrored_N] = self.padded_NCHW[mirrored_N].flip(3)
        self.labels_N = images.labels_N.to(device)
        filters = [p for p in self.network.groups.parameters() if p.requires_grad and p.ndim == 4]
        biases = [p for p in self.network.parameters() if p.requires_grad and p.ndim == 1]
        decay = 2e-6 * batch_size
        head_rate = 0.67 / self.network.head.in_features**2  # there the head divides by its number of inputs
        groups = [
            {"params": biases, "peak": 0.053, "weight_decay": decay / 0.053},
            {"params": [self.network.head.weight], "peak": head_rate, "weight_decay": decay / head_rate},
        ]
        sgd = torch.optim.SGD(groups, lr=0.0, momentum=0.85, nesterov=True, fused=device.type in ("cpu", "cuda"))
        muon = Muon([{"params": filters, "peak": 0.24}], steps=3)
        self.optimizers: list[torch.optim.Optimizer] = [sgd, muon]

    def epoch(self) -> float:
        """Train on every image once; returns images per second."""
        start = time.perf_counter()
        self.network.train()
        cast(Tensor, self.network.whiten.bias).requires_grad_(self.epochs_done < self.WHITENING_EPOCHS)
        images_NCHW = self._shifted()
        if self.epochs_done % 2:
            images_NCHW = images_NCHW.flip(3)
        count = len(self.labels_N)
        batches = torch.randperm(count, device=self.device).split(self.batch_size)
        for step, batch_N in enumerate(batches):
            progress = (self.epochs_done + step / len(batches)) / self.epochs
            set_learning_rates(self.optimizers, 1 - progress, self.device)
            batch_NCHW = images_NCHW[batch_N].contiguous(memory_format=torch.channels_last)
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                logits_NK = self.network(batch_NCHW)
            loss = F.cross_entropy(logits_NK.float(), self.labels_N[batch_N], label_smoothing=0.2, reduction="sum")
            loss.backward()
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
        assert loss.isfinite()  # reading it also waits for the device
        self.epochs_done += 1
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
    return train(images, recipe, device, teachers)[1][0]["images_per_second"]


def train(
    images: Split, recipe: Recipe, device: torch.device, teachers: Teachers | None = None
) -> tuple[nn.Module, list[Row]]:
    """Train a new network; returns it and the figures of its epochs."""
    network = model.build(recipe.network)
    initialize(network, recipe, images.pixels_NCHW)
    return network, fit(network, images, recipe, device=device, teachers=teachers)


def two_teachers(classes: tuple[str, ...]) -> Teachers:
    """Untrained teachers as large as those of the default recipe: sensible answers would take no longer."""
    name = RECIPES["teacher"].network
    states = [model.build(name).state_dict() for _ in range(2)]
    return Teachers(
        [Checkpoint(architecture=name, arguments={}, state_dict=state, classes=classes) for state in states], classes
    )


def compare(images: Split, batch_size: int = RECIPES["default"].batch_size) -> dict[str, float]:
    """Images per second of each: the median of repetitions, run by turns after one to warm up."""
    device = choose_device()
    trainer = AirbenchTrainer(images, batch_size, device, epochs=1 + REPETITIONS)
    teachers = two_teachers(images.classes)
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


def six_views(network: nn.Module, pixels_NCHW: Tensor) -> Tensor:
    """airbench94's logits (N, K): of each image and of two copies moved by one pixel either way along the diagonal, all
    three mirrored and not. The image counts as much as both copies together."""

    def both(view_NCHW: Tensor) -> Tensor:
        return forward(network, view_NCHW) + forward(network, view_NCHW.flip(3))

    padded_NCHW = F.pad(pixels_NCHW.float(), (1, 1, 1, 1), mode="reflect")
    return 2 * both(pixels_NCHW) + both(padded_NCHW[:, :, :-2, :-2]) + both(padded_NCHW[:, :, 2:, 2:])


def train_airbench(images: Split, seed: int, device: torch.device) -> nn.Module:
    torch.manual_seed(seed)
    trainer = AirbenchTrainer(images, AIRBENCH_BATCH, device, AIRBENCH_EPOCHS)
    for _ in range(AIRBENCH_EPOCHS):
        trainer.epoch()
    return trainer.network


def train_ours(images: Split, seed: int, device: torch.device) -> nn.Module:
    torch.manual_seed(seed)
    return train(images, replace(RECIPES["fast"], seed=seed), device)[0]


def main() -> None:
    """Train both to the end, by turns under several seeds."""
    device = choose_device()
    images, held_out = hold_out(data.read(locate(None, os.environ))[0], 0.1)
    print(f"{describe(device)}, torch {torch.__version__}; {len(images):,} images\n")
    print("| | seed | seconds | one view | six views |\n| --- | --- | --- | --- | --- |")
    memory.keep()
    for seed in SEEDS:
        for name, trained in (("airbench94", train_airbench), ("recipe `fast`", train_ours)):
            start = time.perf_counter()
            network = trained(images, seed, device).eval()
            seconds = time.perf_counter() - start
            logits = forward(network, held_out.pixels_NCHW), six_views(network, held_out.pixels_NCHW)
            one, six = ((logits_NK.argmax(1) == held_out.labels_N).double().mean().item() for logits_NK in logits)
            print(f"| {name} | {seed} | {seconds:.0f} | {one:.2%} | {six:.2%} |", flush=True)


if __name__ == "__main__":
    main()
