"""Augmentation: each operation against a plain reference, image by image."""

import dataclasses
import io

import pytest
import torch
from PIL import Image
from torch import Tensor

from training.augment import Draws, augment, draw, epoch_generator, shrink, simulate_jpeg
from training.config import Recipe

PLAIN = Recipe(network="net")


def identity(count: int) -> Draws:
    return Draws(
        shift_N2=torch.zeros(count, 2, dtype=torch.int64),
        flip_N=torch.zeros(count, dtype=torch.bool),
        jpeg_quality_N=torch.zeros(count, dtype=torch.int64),
        cutout_N2=torch.zeros(count, 2, dtype=torch.int64),
        partner_N=torch.arange(count),
        patch_N2=torch.zeros(count, 2, dtype=torch.int64),
        patch_side_N=torch.zeros(count, dtype=torch.int64),
    )


def test_identity_draws_leave_images_unchanged(photos_NCHW: Tensor) -> None:
    chosen = torch.tensor([3, 0, 5])
    assert augment(photos_NCHW, chosen, identity(8), PLAIN).equal(photos_NCHW[chosen])


def test_flip_mirrors_left_and_right(photos_NCHW: Tensor) -> None:
    draws = dataclasses.replace(identity(8), flip_N=torch.arange(8) % 2 == 0)
    flipped = augment(photos_NCHW, torch.arange(8), draws, PLAIN)
    assert flipped[0].equal(photos_NCHW[0].flip(2))
    assert flipped[1].equal(photos_NCHW[1])


@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (3, -2), (-4, 4), (1, 0)])
@pytest.mark.parametrize("flip", [False, True])
def test_shift_reflects_the_border(photos_NCHW: Tensor, rows: int, columns: int, flip: bool) -> None:
    draws = dataclasses.replace(
        identity(8), shift_N2=torch.tensor([[rows, columns]] * 8), flip_N=torch.full((8,), flip)
    )
    padded = torch.nn.functional.pad(photos_NCHW.float(), (4, 4, 4, 4), mode="reflect").to(torch.uint8)
    expected = padded[:, :, 4 + rows : 36 + rows, 4 + columns : 36 + columns]
    expected = expected.flip(3) if flip else expected
    assert augment(photos_NCHW, torch.arange(8), draws, PLAIN).equal(expected)


def test_each_image_has_its_own_shift_and_flip(photos_NCHW: Tensor) -> None:
    recipe = dataclasses.replace(PLAIN, shift=3, flip=True)
    draws = draw(8, 0, recipe, epoch_generator(0, 0))
    assert len(draws.shift_N2.unique(dim=0)) > 1 < len(draws.flip_N.unique())
    chosen = torch.tensor([6, 1, 1, 4, 0])
    padded = torch.nn.functional.pad(photos_NCHW.float(), (3, 3, 3, 3), mode="reflect").to(torch.uint8)
    for index, image_CHW in zip(chosen.tolist(), augment(photos_NCHW, chosen, draws, recipe), strict=True):
        row, column = (3 + draws.shift_N2[index]).tolist()
        expected_CHW = padded[index, :, row : row + 32, column : column + 32]
        assert image_CHW.equal(expected_CHW.flip(2) if draws.flip_N[index] else expected_CHW)


def test_cutout_greys_exactly_one_square(photos_NCHW: Tensor) -> None:
    recipe = dataclasses.replace(PLAIN, cutout=6)
    draws = dataclasses.replace(identity(8), cutout_N2=torch.tensor([[2, 20]] * 8))
    expected = photos_NCHW.clone()
    expected[:, :, 2:8, 20:26] = 128
    assert augment(photos_NCHW, torch.arange(8), draws, recipe).equal(expected)


def test_cutmix_pastes_a_square_of_the_partner(photos_NCHW: Tensor) -> None:
    recipe = dataclasses.replace(PLAIN, cutmix=1.0)
    draws = dataclasses.replace(
        identity(8),
        partner_N=torch.arange(8).flip(0),
        patch_N2=torch.tensor([[2, 20]] * 8),
        patch_side_N=torch.tensor([8, 0] * 4),
        flip_N=torch.arange(8) >= 4,
    )
    mixed = augment(photos_NCHW, torch.tensor([0, 1, 4]), draws, recipe)
    expected = photos_NCHW[0].clone()
    expected[:, 2:10, 20:28] = photos_NCHW[7, :, 2:10, 20:28]
    assert mixed[0].equal(expected)
    assert mixed[1].equal(photos_NCHW[1])
    assert mixed[2, :, 2:10, 20:28].equal(photos_NCHW[3].flip(2)[:, 2:10, 20:28])  # mirrored with its target image
    assert draws.patch_share(torch.tensor([0, 1, 4])).tolist() == [1 / 16, 0, 1 / 16]


@pytest.mark.parametrize("quality", [30, 50, 75, 95])
def test_jpeg_is_close_to_a_real_encoder(photos_NCHW: Tensor, quality: int) -> None:
    simulated = simulate_jpeg(photos_NCHW, torch.full((8,), quality)).float()
    for image, ours in zip(photos_NCHW, simulated, strict=True):
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality, subsampling="4:2:0")
        real = torch.tensor(list(Image.open(file).tobytes())).reshape(32, 32, 3).permute(2, 0, 1).float()
        lost = (real - image).square().mean().sqrt()
        apart = (real - ours).square().mean().sqrt()
        assert apart < 0.5 * lost + 1


def test_jpeg_only_touches_the_chosen_images(photos_NCHW: Tensor) -> None:
    draws = dataclasses.replace(identity(8), jpeg_quality_N=torch.tensor([0, 40] * 4))
    compressed = augment(photos_NCHW, torch.arange(8), draws, dataclasses.replace(PLAIN, jpeg=0.5))
    unchanged = (compressed == photos_NCHW).flatten(1).all(dim=1)
    assert unchanged.tolist() == [True, False] * 4


def test_shrinking_computes_a_triangle_weighted_average(photos_NCHW: Tensor) -> None:
    small_NCHW = shrink(photos_NCHW, 8)
    assert small_NCHW.shape == (8, 3, 8, 8)
    # Triangle weights two small-picture pixels wide, for shrinking the side to a fourth.
    weight_8 = torch.tensor([1.0, 3, 5, 7, 7, 5, 3, 1]) / 32
    row, column = slice(6, 14), slice(10, 18)
    expected = (photos_NCHW[:, :, row, column].float() * weight_8[:, None] * weight_8).sum(dim=(2, 3))
    assert small_NCHW[:, :, 2, 3] == pytest.approx(expected, abs=0.01)


def test_flips_alternate_between_epochs() -> None:
    recipe = dataclasses.replace(PLAIN, flip=True, seed=3)
    first, second, third = (draw(1000, epoch, recipe, epoch_generator(3, epoch)).flip_N for epoch in range(3))
    assert first.equal(~second)
    assert first.equal(third)
    assert 400 < int(first.sum()) < 600


def test_draws_stay_in_bounds_and_follow_the_share() -> None:
    recipe = dataclasses.replace(PLAIN, shift=2, cutout=8, jpeg=0.25, cutmix=0.4)
    draws = draw(10_000, 0, recipe, epoch_generator(0, 0))
    assert draws.shift_N2.unique().tolist() == [-2, -1, 0, 1, 2]
    assert (int(draws.cutout_N2.min()), int(draws.cutout_N2.max())) == (0, 24)
    assert (draws.jpeg_quality_N > 0).double().mean() == pytest.approx(0.25, abs=0.02)
    assert draws.jpeg_quality_N.unique().tolist() == [0, *range(50, 96)]
    assert not draws.flip_N.any()
    assert draws.partner_N.sort().values.equal(torch.arange(10_000))
    assert (draws.patch_side_N > 0).double().mean() == pytest.approx(0.4, abs=0.02)
    assert draws.patch_share(draws.patch_side_N.nonzero()[:, 0]).mean() == pytest.approx(0.5, abs=0.02)
    end_N2 = draws.patch_N2 + draws.patch_side_N[:, None]
    assert (int(draws.patch_N2.min()), int(end_N2.max())) == (0, 32)
    assert draws.patch_N2[draws.patch_side_N == 16].unique().tolist() == [*range(17)]  # anywhere
