"""CIFAR-10 itself, where its files lie beside the repository."""

from pathlib import Path

import pytest
import torch

from app import data
from training.data import hold_out

SHARED = Path(__file__).parent.parent.parent / "shared"

pytestmark = pytest.mark.skipif(
    not (SHARED / "cifar-10-batches-bin").is_dir(), reason="no CIFAR-10 in ../shared/cifar-10-batches-bin"
)


@pytest.fixture(scope="module")
def splits() -> tuple[data.Split, data.Split]:
    return data.read(SHARED)


def test_there_are_as_many_images_of_each_class_as_published(splits: tuple[data.Split, data.Split]) -> None:
    train, test = splits
    assert (tuple(train.pixels_NCHW.shape), tuple(test.pixels_NCHW.shape)) == ((50_000, 3, 32, 32), (10_000, 3, 32, 32))
    assert train.labels_N.bincount().tolist() == [5_000] * 10
    assert test.labels_N.bincount().tolist() == [1_000] * 10


def test_channel_statistics_are_the_published_ones(splits: tuple[data.Split, data.Split]) -> None:
    """The order of the planes, too: swapped red and blue would show."""
    std_C, mean_C = torch.std_mean(splits[0].pixels_NCHW.float() / 255, dim=(0, 2, 3))
    assert [round(value, 4) for value in mean_C.tolist()] == [0.4914, 0.4822, 0.4465]
    assert [round(value, 4) for value in std_C.tolist()] == [0.2470, 0.2435, 0.2616]


def test_the_names_say_which_images(splits: tuple[data.Split, data.Split]) -> None:
    """The test file here went through one JPEG encoding; its figures must not pass for those of the exact images."""
    train, test = splits
    assert train.name == "CIFAR-10 training"
    assert test.name == "CIFAR-10 test, JPEG q75"
    assert hold_out(train, 0.1)[1].name == "validation (5,000 held-out training images)"
    assert torch.equal(hold_out(train, 0.1)[1].pixels_NCHW, train.pixels_NCHW[45_000:])
