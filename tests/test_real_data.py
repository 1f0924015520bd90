"""CIFAR-10 itself, where its files lie beside the repository."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from app import checkpoint, data
from app.checkpoint import Checkpoint
from app.machine import available_cpus
from app.predictor import build
from app.steps import finish
from training.data import hold_out
from training.evaluate import predict

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
WEIGHTS = ROOT / "weights" / "cifar_net.pth"

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


@pytest.fixture(scope="module")
def trained() -> Checkpoint:
    return checkpoint.load(WEIGHTS)


@pytest.fixture(scope="module")
def expected_NK(trained: Checkpoint, splits: tuple[data.Split, data.Split]) -> Tensor:
    """What `python -m training evaluate` says of the test file, in float32."""
    return predict(trained.network(), splits[1].pixels_NCHW, calibration=trained.calibration)


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_every_engine_agrees_with_float32_on_the_test_file(
    engine: str, trained: Checkpoint, expected_NK: Tensor, splits: tuple[data.Split, data.Split]
) -> None:
    if find_spec(engine) is None:
        pytest.skip(f"{engine} is not installed")
    predictor = finish(build(trained, torch.device("cpu"), engine_name=engine, threads=available_cpus(), max_batch=50))
    given_NK = predictor.predict(splits[1].pixels_NCHW)
    assert (given_NK.argmax(1) == expected_NK.argmax(1)).double().mean() >= 0.998
    assert (given_NK - expected_NK).abs().max() <= 0.02  # bfloat16 keeps 8 bits
    right_N, expected_right_N = ((each.argmax(1) == splits[1].labels_N).double() for each in (given_NK, expected_NK))
    assert abs(right_N.mean() - expected_right_N.mean()) <= 0.001
