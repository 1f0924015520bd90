"""CIFAR-10 itself, where its files lie beside the repository."""

from importlib.util import find_spec

import pytest
import torch
from running import ROOT
from torch import Tensor

from app import checkpoint, data, engine
from app.checkpoint import Checkpoint
from app.device import choose_dtype
from app.machine import available_cpus
from app.predictor import build
from app.report import calibration_error, confusion_matrix, negative_log_likelihood
from app.steps import finish
from training.data import hold_out
from training.evaluate import evaluate, predict
from training.provenance import hold_out_for

SHARED = ROOT.parent / "shared"
CPU = torch.device("cpu")

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


@pytest.fixture(scope="module", params=["cifar_net", "tutorial_net"])
def trained(request: pytest.FixtureRequest) -> Checkpoint:
    return checkpoint.load(ROOT / "weights" / f"{request.param}.pth")


@pytest.fixture(scope="module")
def expected_NK(trained: Checkpoint, splits: tuple[data.Split, data.Split]) -> Tensor:
    """What `python -m training evaluate` says of the test file, in float32."""
    return predict(trained.network(), splits[1].pixels_NCHW, calibration=trained.calibration)


def test_the_figures_in_a_shipped_file_are_those_of_its_weights(
    trained: Checkpoint, expected_NK: Tensor, splits: tuple[data.Split, data.Split]
) -> None:
    known, labels_N = trained.evaluation, splits[1].labels_N
    assert known is not None
    assert (known.dataset, known.digest) == (splits[1].name, splits[1].digest)
    # Another processor may round one of two nearly equal probabilities up.
    assert (confusion_matrix(expected_NK.argmax(1), labels_N, 10) - known.confusion_KK).abs().sum() <= 4
    assert negative_log_likelihood(expected_NK, labels_N) == pytest.approx(known.nll, abs=1e-4)
    assert calibration_error(expected_NK, labels_N) == pytest.approx(known.ece, abs=5e-4)


@pytest.mark.parametrize("name", ["cifar_net", "tutorial_net"])
def test_the_figures_on_validation_images_are_those_of_the_weights_that_have_not_seen_them(
    name: str, splits: tuple[data.Split, data.Split]
) -> None:
    held_out = checkpoint.load(ROOT / "weights" / "validation" / f"{name}.pth")
    unseen = hold_out_for(held_out, splits[0], 0.1)[1]
    known, again = held_out.evaluation, evaluate(held_out, unseen)
    assert known is not None
    assert (known.dataset, known.digest) == (unseen.name, unseen.digest)
    assert (known.confusion_KK - again.confusion_KK).abs().sum() <= 4
    shipped = checkpoint.load(ROOT / "weights" / f"{name}.pth")
    assert shipped.calibration == held_out.calibration


def probabilities(trained: Checkpoint, engine: str, pixels_NCHW: Tensor) -> Tensor:
    """What the service would answer."""
    return finish(build(trained, CPU, engine_name=engine, threads=available_cpus(), max_batch=50)).predict(pixels_NCHW)


@pytest.mark.parametrize("name", ["torch", "openvino"])
def test_every_engine_agrees_with_float32_on_the_test_file(
    name: str, trained: Checkpoint, expected_NK: Tensor, splits: tuple[data.Split, data.Split]
) -> None:
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    given_NK = probabilities(trained, name, splits[1].pixels_NCHW)
    assert (given_NK.argmax(1) == expected_NK.argmax(1)).double().mean() >= 0.998
    assert (given_NK - expected_NK).abs().max() <= 0.02  # bfloat16 keeps 8 bits
    right_N, expected_right_N = ((each.argmax(1) == splits[1].labels_N).double() for each in (given_NK, expected_NK))
    assert abs(right_N.mean() - expected_right_N.mean()) <= 0.001


@pytest.mark.skipif(choose_dtype(CPU) is torch.bfloat16, reason="here the test above computes in bfloat16")
def test_emulated_bfloat16_agrees_with_float32(
    trained: Checkpoint,
    expected_NK: Tensor,
    splits: tuple[data.Split, data.Split],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine, "choose_dtype", lambda _device: torch.bfloat16)
    given_NK = probabilities(trained, "torch", splits[1].pixels_NCHW[:300])
    assert 0 < (given_NK - expected_NK[:300]).abs().max() <= 0.02
