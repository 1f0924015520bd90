"""Each corruption does what its name says, and the table counts right."""

import io
from functools import partial

import pytest
import torch
from conftest import random_checkpoint
from PIL import Image
from torch import Tensor

from app.checkpoint import CIFAR10_CLASSES
from app.data import Split
from app.images import decode, to_tensor
from training import robustness
from training.evaluate import evaluate
from training.robustness import (
    brightness,
    contrast,
    corruptions,
    enlarge,
    format_robustness,
    jpeg,
    measure,
    mirror,
    shift,
)


def lost(before_NCHW: Tensor, after_NCHW: Tensor) -> float:
    return (before_NCHW.float() - after_NCHW.float()).square().mean().sqrt().item()


@pytest.mark.parametrize(
    "nothing", [partial(shift, 0, 0), partial(brightness, 1.0), partial(contrast, 1.0), corruptions()["as they are"][0]]
)
def test_shift_0_and_factor_1_change_nothing(nothing: robustness.Corruption, photos_NCHW: Tensor) -> None:
    assert nothing(photos_NCHW).equal(photos_NCHW)


@pytest.mark.parametrize("name", corruptions())
def test_every_row_gives_pixels_and_leaves_its_input_alone(name: str, photos_NCHW: Tensor) -> None:
    before_NCHW = photos_NCHW.clone()
    for corrupt in corruptions()[name]:
        after_NCHW = corrupt(photos_NCHW)
        assert (after_NCHW.shape, after_NCHW.dtype) == (photos_NCHW.shape, torch.uint8)
        assert photos_NCHW.equal(before_NCHW)
        assert after_NCHW.equal(photos_NCHW) == (name == "as they are")
        assert corrupt(photos_NCHW).equal(after_NCHW)


def test_jpeg_is_a_real_encoder_with_half_the_chroma(photos_NCHW: Tensor) -> None:
    file = io.BytesIO()
    Image.fromarray(photos_NCHW[3].permute(1, 2, 0).numpy()).save(file, "JPEG", quality=75, subsampling=2)
    assert jpeg(75, photos_NCHW)[3].equal(to_tensor([decode(file.getvalue())])[0])
    losses = [lost(photos_NCHW, jpeg(quality, photos_NCHW)) for quality in (90, 75, 50)]
    assert 0 < losses[0] < losses[1] < losses[2]


def test_a_shift_moves_the_picture_and_repeats_its_border() -> None:
    pixels_NCHW = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    pixels_NCHW[0, :, 5, 7] = 200
    pixels_NCHW[0, :, 0] = 9  # the uppermost row
    down, right = shift(3, 0, pixels_NCHW)[0, 0], shift(0, -2, pixels_NCHW)[0, 0]
    assert down[8, 7] == 200
    assert (down[:4] == 9).all()
    assert (down[4:8] == 0).all()
    assert right[5, 5] == 200
    assert (right[0] == 9).all()


def test_a_shift_row_covers_all_four_directions(photos_NCHW: Tensor) -> None:
    left, right, up, down = (shift(rows, columns, photos_NCHW) for rows, columns in ((0, -2), (0, 2), (-2, 0), (2, 0)))
    moved = [variant(photos_NCHW) for variant in corruptions()["shifted by 2 pixels"]]
    assert len(moved) == 4
    for expected in (left, right, up, down):
        assert sum(expected.equal(each) for each in moved) == 1
    assert left[:, :, :, :30].equal(photos_NCHW[:, :, :, 2:])
    assert down[:, :, 2:].equal(photos_NCHW[:, :, :30])


def test_brightness_scales_rounds_and_clips() -> None:
    values = torch.tensor([0, 1, 100, 199, 255], dtype=torch.uint8).expand(1, 3, 32, 5)
    assert brightness(1.5, values)[0, 0, 0].tolist() == [0, 2, 150, 255, 255]
    assert brightness(0.5, values)[0, 0, 0].tolist() == [0, 0, 50, 100, 128]


def test_contrast_scales_around_each_pictures_mean_grey(photos_NCHW: Tensor) -> None:
    two_greys = torch.tensor([100, 140], dtype=torch.uint8).repeat(16).expand(1, 3, 32, 32)
    pixels_NCHW = torch.cat([two_greys, two_greys - 60])
    assert contrast(1.5, pixels_NCHW)[:, 0, 0, :2].tolist() == [[90, 150], [30, 90]]
    assert contrast(0.5, pixels_NCHW)[:, 0, 0, :2].tolist() == [[110, 130], [50, 70]]
    assert contrast(0.0, photos_NCHW).flatten(1).amax(1).equal(contrast(0.0, photos_NCHW).flatten(1).amin(1))
    green, blue = (torch.zeros(1, 3, 32, 32, dtype=torch.uint8).index_fill(1, torch.tensor([i]), 255) for i in (1, 2))
    assert contrast(0.0, green)[0, 0, 0, 0] == 150  # 0.587 x 255
    assert contrast(0.0, blue)[0, 0, 0, 0] == 29  # 0.114 x 255


def test_mirroring_exchanges_left_and_right(photos_NCHW: Tensor) -> None:
    assert mirror(photos_NCHW)[:, :, :, 0].equal(photos_NCHW[:, :, :, 31])
    assert mirror(mirror(photos_NCHW)).equal(photos_NCHW)


def test_enlarging_goes_through_the_services_own_path(photos_NCHW: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def spy(data: bytes, resize: str | None) -> bytes:
        sizes.append((Image.open(io.BytesIO(data)).size, Image.open(io.BytesIO(data)).format, resize))
        return decode(data, "stretch")

    monkeypatch.setattr("app.images.decode", spy)
    assert 0 < lost(photos_NCHW, enlarge(photos_NCHW)) < 8
    assert sizes == [((256, 256), "PNG", "stretch")] * 8


def test_the_rows_report_accuracy_and_its_fall(photos_NCHW: Tensor) -> None:
    checkpoint = random_checkpoint()
    network = checkpoint.network()
    labels_N = network(photos_NCHW).argmax(dim=1)  # as they are, every answer is right
    labels_N[0] = (labels_N[0] + 1) % 10  # but one
    split = Split(name="photos", classes=CIFAR10_CLASSES, pixels_NCHW=photos_NCHW, labels_N=labels_N)
    rows = {row["pictures"]: row for row in measure(checkpoint, split)}
    assert list(rows) == list(corruptions())
    assert rows["as they are"] == {"pictures": "as they are", "accuracy": 7 / 8, "fall": 0.0}
    assert int(evaluate(checkpoint, split).confusion_KK.diagonal().sum()) == 7
    right = [
        (network(shift(*step, photos_NCHW)).argmax(dim=1) == labels_N).double().mean().item()
        for step in ((4, 0), (-4, 0), (0, 4), (0, -4))
    ]
    shifted = rows["shifted by 4 pixels"]
    assert shifted["accuracy"] == pytest.approx(sum(right) / 4)
    assert shifted["fall"] == pytest.approx(100 * (7 / 8 - sum(right) / 4))


def test_the_table_shows_the_rows() -> None:
    result = {
        "weights": {"file": "a.pth", "sha256": "a" * 64, "trained_on": "45 of them"},
        "dataset": {"name": "photos", "sha256": "d" * 64, "images": 1234},
        "rows": [
            {"pictures": "as they are", "accuracy": 0.9, "fall": 0.0},
            {"pictures": "JPEG quality 75", "accuracy": 0.875, "fall": 2.5},
        ],
    }
    lines = format_robustness(result).splitlines()
    assert "1,234 images" in lines[0]
    assert "trained on 45 of them" in lines[1]
    assert lines[5].split() == ["JPEG", "quality", "75", "87.50%", "2.50"]
