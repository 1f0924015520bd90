"""That the rival of our benchmark is airbench94: its size, its start, and that it learns."""

import pytest
import torch
import torch.nn.functional as F
from bench_training import Airbench, AirbenchTrainer
from torch import nn

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


def test_it_has_the_published_size() -> None:
    """1.97 M parameters, and 118.1 M multiply-adds an image, counted from the original by others."""
    network = Airbench()
    assert sum(parameter.numel() for parameter in network.parameters()) == pytest.approx(1.97e6, rel=0.003)
    assert sum(row.multiply_adds for row in layers(network)) == pytest.approx(118.1e6, rel=0.001)


def test_the_first_layer_whitens_the_patches() -> None:
    images_NCHW = kinds(64).pixels_NCHW.float() / 64 - 2
    network = Airbench()
    network.set_whitening(images_NCHW)
    answers_NCHW = F.conv2d(images_NCHW, network.whiten.weight)
    outputs = answers_NCHW.transpose(0, 1).flatten(1)
    second_moments = outputs[:12] @ outputs[:12].T / outputs.shape[1]
    off_diagonal = second_moments - torch.diag(second_moments.diagonal())
    assert off_diagonal.abs().max() < 0.01
    assert second_moments.diagonal().max() == pytest.approx(1, abs=0.01)
    torch.testing.assert_close(outputs[12:], -outputs[:12])


def test_convolutions_begin_as_the_identity_on_their_first_channels() -> None:
    for convolution in (each for each in Airbench().groups.modules() if isinstance(each, nn.Conv2d)):
        x = torch.rand(1, convolution.in_channels, 5, 5)
        torch.testing.assert_close(convolution(x)[:, : convolution.in_channels], x)


def test_it_learns() -> None:
    torch.manual_seed(0)
    split = kinds(120)
    trainer = AirbenchTrainer(split, 40, CPU)
    for _ in range(4):
        assert trainer.epoch() > 0
    trainer.network.eval()
    images_NCHW = trainer.padded_NCHW[:, :, 2:-2, 2:-2].float().flip(3)
    with torch.no_grad():
        right_N = trainer.network(images_NCHW).argmax(dim=1) == split.labels_N
    assert right_N.double().mean() > 0.8
