"""The loaded network answers what the plain network says, for any number of pictures."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import needs_openvino, random_checkpoint
from running import ROOT
from torch import Tensor

from app import checkpoint
from app.calibration import Calibration
from app.device import choose_dtype
from app.engine import TorchEngine
from app.errors import CheckpointError
from app.predictor import build
from app.steps import finish

CPU = torch.device("cpu")
NEIGHBOUR_BOUND = 0.001
"""As the README says. Less than 0.000001 was measured; other hardware may choose other kernels by batch size."""


def some_pixels(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("architecture", ["net", "cifar_net"])
def test_probabilities_are_those_of_the_plain_network(architecture: str) -> None:
    random, pixels_NCHW = random_checkpoint(architecture), some_pixels(11)
    expected_NK = random.network()(pixels_NCHW).softmax(dim=1)
    probabilities_NK = finish(build(random, CPU, threads=1, max_batch=4)).predict(pixels_NCHW)
    tolerance = 1e-5 if choose_dtype(CPU) is torch.float32 else 0.01
    assert torch.allclose(probabilities_NK.float(), expected_NK, atol=tolerance)


def test_rows_sum_to_one() -> None:
    probabilities_NK = finish(build(random_checkpoint(), CPU, threads=1, max_batch=8)).predict(some_pixels(8))
    assert probabilities_NK.dtype == torch.float64
    assert (probabilities_NK.sum(dim=1) - 1).abs().max() < 1e-12


@pytest.mark.parametrize("spoil", [lambda x_ND: x_ND * torch.nan, lambda x_ND: x_ND[1:]], ids=["nan", "too few"])
def test_nonsense_from_an_engine_is_no_answer(spoil: Callable[[Tensor], Tensor]) -> None:
    predictor = finish(build(random_checkpoint(), CPU, engine_name="torch", threads=1, max_batch=8))
    engine = predictor.engine

    class Failing(TorchEngine):
        def __init__(self) -> None:
            pass

        def __call__(self, pixels_NCHW: Tensor) -> Tensor:
            return spoil(engine(pixels_NCHW))

    predictor.engine = Failing()
    with pytest.raises(CheckpointError, match="With the engine torch on cpu, these weights give logits that are not"):
        predictor.estimate(some_pixels(3))


@pytest.mark.parametrize("max_batch", [1, 3, 64])
def test_the_batch_a_picture_is_in_makes_no_difference(max_batch: int) -> None:
    predictor, pixels_NCHW = finish(build(random_checkpoint(), CPU, threads=1, max_batch=max_batch)), some_pixels(10)
    alone = torch.cat([predictor.predict(pixel_1CHW) for pixel_1CHW in pixels_NCHW.split(1)])
    assert torch.allclose(predictor.predict(pixels_NCHW), alone, atol=0.003)


@pytest.mark.parametrize("name", ["torch", pytest.param("openvino", marks=needs_openvino)])
@pytest.mark.parametrize("weights", sorted((ROOT / "weights").glob("*.pth")), ids=lambda path: path.stem)
def test_neighbours_do_not_change_an_answer(weights: Path, name: str, photos_NCHW: Tensor) -> None:
    """With the weights that are shipped, whatever lies beside a picture, wherever it stands, however many there are."""
    predictor = finish(build(checkpoint.load(weights), CPU, engine_name=name, threads=1, max_batch=16))
    alone_NK = torch.cat([predictor.predict(pixels_1CHW) for pixels_1CHW in photos_NCHW.split(1)])
    opinions_K = (alone_NK.amax(dim=0) - alone_NK.amin(dim=0)) > 100 * NEIGHBOUR_BOUND
    assert opinions_K.any(), "only a network that tells pictures apart proves anything"
    for size in (2, 7, 16, 33):
        black, white = (torch.full((size, 3, 32, 32), value, dtype=torch.uint8) for value in (0, 255))
        for beside_NCHW in (black, white, some_pixels(size), photos_NCHW[torch.arange(size) % 8]):
            for place, picture in ((0, 0), (size // 2, 5), (size - 1, 2)):
                batch_NCHW = beside_NCHW.index_copy(0, torch.tensor([place]), photos_NCHW[picture : picture + 1])
                apart_K = predictor.predict(batch_NCHW)[place] - alone_NK[picture]
                assert apart_K.abs().max() <= NEIGHBOUR_BOUND


def test_items_of_one_and_of_several_pictures_keep_their_order() -> None:
    predictor, pixels_NCHW = finish(build(random_checkpoint(), CPU, threads=1, max_batch=8)), some_pixels(5)
    items = [bytes(part.permute(0, 2, 3, 1).flatten().tolist()) for part in pixels_NCHW.split([1, 3, 1])]
    first, second, third = predictor.estimate_each(items)
    assert [len(first), len(second), len(third)] == [1, 3, 1]
    assert [each.probabilities_K for each in first + second + third] == predictor.predict(pixels_NCHW).tolist()


def test_predictions_are_calibrated() -> None:
    known = Calibration(temperature=3.0, cubic=0.5)
    predictor = finish(build(dataclasses.replace(random_checkpoint(), calibration=known), CPU, threads=1, max_batch=4))
    expected_NK = known.probabilities(predictor.logits(some_pixels(4)))
    assert torch.equal(predictor.predict(some_pixels(4)), expected_NK)
    assert [row.probabilities_K for row in predictor.estimate(some_pixels(4))] == expected_NK.tolist()
    assert not torch.allclose(expected_NK, predictor.logits(some_pixels(4)).softmax(dim=1))


def test_predictions_are_inference_tensors() -> None:
    probabilities_NK = finish(build(random_checkpoint(), CPU, threads=1, max_batch=1)).predict(some_pixels(1))
    assert probabilities_NK.is_inference()


def test_the_number_of_threads_is_kept() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        finish(build(random_checkpoint(), CPU, engine_name="torch", threads=1, max_batch=1))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("device", "max_batch", "sizes"),
    [
        ("cpu", 1, [1]),
        ("cpu", 20, [1, 20]),
        ("cpu", 128, [1, 32]),
        ("mps", 20, [1, 2, 4, 8, 16, 20]),
        ("cuda", 4, [1, 1, 2, 2, 4, 4]),
        ("cuda", 20, [1, 1, 2, 2, 4, 4, 8, 8, 16, 16, 20, 20]),
    ],
)
def test_warming_up_runs_what_the_device_needs(
    device: str, max_batch: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An NVIDIA GPU records the second run of each size."""
    predictor, seen = finish(build(random_checkpoint(), CPU, threads=1, max_batch=max_batch)), []
    monkeypatch.setattr(predictor, "_device", torch.device(device))
    monkeypatch.setattr(predictor, "predict", lambda pixels_NCHW: seen.append(len(pixels_NCHW)))
    for _ in predictor.warm_up():
        pass
    assert seen == sizes
