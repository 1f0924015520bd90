"""That the rival of our benchmark is airbench94: its size, and that it learns."""

import pytest
import torch
import torch.nn.functional as F
from bench_training import AirbenchNet, AirbenchTrainer, six_views

from app.data import Split
from training.summary import layers

CPU = torch.device("cpu")


def kinds(count: int) -> Split:
    """Ten smooth patterns in noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(10, 3, 4, 4, generator=generator) * 200
    labels_N = torch.arange(count) % 10
    smooth = F.interpolate(coarse, size=(32, 32), mode="bicubic").clamp(0, 200)[labels_N]
    noise = torch.rand(count, 3, 32, 32, generator=generator) * 55
    classes = tuple("0123456789")
    return Split(name="kinds", classes=classes, pixels_NCHW=(smooth + noise).to(torch.uint8), labels_N=labels_N)


def test_the_airbench_network_has_the_published_size() -> None:
    """1.97 M parameters and 118.1 M multiply-adds an image, as others counted in the original."""
    network = AirbenchNet(10)
    assert sum(parameter.numel() for parameter in network.parameters()) == pytest.approx(1.97e6, rel=0.003)
    assert sum(row.multiply_adds for row in layers(network)) == pytest.approx(118.1e6, rel=0.001)


def test_the_airbench_trainer_learns() -> None:
    torch.manual_seed(0)
    split = kinds(40)
    trainer = AirbenchTrainer(split, 20, CPU, epochs=4)
    for _ in range(4):
        assert trainer.epoch() > 0
    trainer.network.eval()
    logits_NK = six_views(trainer.network, split.pixels_NCHW)
    assert (logits_NK.argmax(dim=1) == split.labels_N).double().mean() > 0.8


def test_six_views_are_weighted_as_published() -> None:
    """The image counts as much as both shifted copies, whose border is reflected; half of each is mirrored."""

    class Corner(torch.nn.Module):
        def forward(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
            return pixels_NCHW[:, :, 0, 0]

    images_NCHW = kinds(3).pixels_NCHW.float()
    seen = [images_NCHW[:, :, row, column] for row, column in ((0, 0), (0, 31), (1, 1), (1, 30))]
    assert six_views(Corner().eval(), images_NCHW).equal(2 * torch.stack(seen).sum(dim=0))
