"""What is learned from held-out images: the temperature, the prediction sets, what is familiar."""

import math

import pytest
import torch
from conftest import noise, random_checkpoint

from app.calibration import Calibration, energy
from app.report import calibration_error
from training.calibrate import calibrate, fit_probabilities, set_threshold
from training.robustness import jpeg


@pytest.mark.parametrize(("temperature", "cubic"), [(0.5, 0.0), (1.0, 0.0), (2.5, 0.0), (2.5, 0.02)])
def test_the_calibration_that_generated_the_labels_is_recovered(temperature: float, cubic: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_NK = torch.randn(40_000, 10, generator=generator) * 3
    truth_NK = Calibration(temperature=temperature, cubic=cubic).probabilities(logits_NK)
    labels_N = truth_NK.multinomial(1, generator=generator)[:, 0]
    found = fit_probabilities(logits_NK, labels_N)
    assert found.temperature == pytest.approx(temperature, rel=0.05)
    assert found.cubic == pytest.approx(cubic, abs=0.01)
    after = calibration_error(found.probabilities(logits_NK), labels_N)
    assert after < 0.01
    if temperature != 1.0:
        assert calibration_error(logits_NK.softmax(dim=1), labels_N) > 3 * after


@pytest.mark.parametrize("scale", [0.001, 30.0, 10_000.0])
def test_the_calibration_does_not_depend_on_the_size_of_the_logits(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_NK = 3 * torch.randn(2000, 10, generator=generator)
    truth_NK = Calibration(temperature=0.5, cubic=0.02).probabilities(logits_NK)
    labels_N = truth_NK.multinomial(1, generator=generator)[:, 0]
    found, scaled = (fit_probabilities(size * logits_NK, labels_N) for size in (1, scale))
    assert scaled.temperature == pytest.approx(scale * found.temperature, rel=1e-4)
    assert scaled.cubic == pytest.approx(found.cubic / scale**3, rel=1e-3)


def test_a_few_correct_images_do_not_make_the_calibration_certain() -> None:
    logits_NK = torch.tensor([[1.5, 0.2, 0.0], [0.3, 1.2, 0.1], [0.0, 0.4, 1.4]]).repeat(8, 1)
    found = fit_probabilities(logits_NK, logits_NK.argmax(dim=1))
    surest = found.probabilities(logits_NK).max(dim=1).values
    assert surest.mean() == pytest.approx(25 / 26, abs=0.01)
    doubtful = found.probabilities(torch.tensor([[0.5, 0.3, 0.0]])).max()
    assert doubtful < 0.8


def test_images_seen_twice_do_not_count_as_more_evidence() -> None:
    logits_NK = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    labels_N = logits_NK.argmax(dim=1)
    once = fit_probabilities(logits_NK, labels_N)
    twice = fit_probabilities(logits_NK.repeat(2, 1), labels_N.repeat(2), views=2)
    surest = [found.probabilities(logits_NK).max().item() for found in (once, twice)]
    assert surest[1] == pytest.approx(surest[0], abs=1e-6)


def test_the_temperature_stays_finite_when_every_image_is_wrong() -> None:
    logits_NK = torch.randn(10, 10, generator=torch.Generator().manual_seed(0))
    found = fit_probabilities(logits_NK, logits_NK.argmin(dim=1))
    assert found.temperature <= math.exp(5)
    assert found.probabilities(logits_NK).isfinite().all()


def test_logits_that_are_all_the_same_can_be_calibrated() -> None:
    found = fit_probabilities(torch.zeros(10, 10), torch.arange(10))
    assert found.temperature == pytest.approx(1)
    assert found.cubic < 1


def test_the_threshold_is_the_finite_sample_quantile() -> None:
    probabilities_N = torch.arange(1, 100) / 100  # of the true class, for 99 images
    probabilities_NK = torch.stack([probabilities_N, 1 - probabilities_N], dim=1).double()
    labels_N = torch.zeros(99, dtype=torch.int64)
    assert set_threshold(probabilities_NK, labels_N) == pytest.approx(0.05)  # floor(100 x 0.05) = the fifth smallest
    assert set_threshold(probabilities_NK[1:], labels_N[1:]) == pytest.approx(0.05)  # the fourth smallest of 98
    assert set_threshold(probabilities_NK[-18:], labels_N[-18:]) == 0  # 18 cannot promise 95 %: 19 can
    assert set_threshold(probabilities_NK[-19:], labels_N[-19:]) == pytest.approx(0.81)
    # 99 pictures seen twice: five of them may be missed, and of the fifth both views, so that the ninth value counts.
    both_NK, both_N = probabilities_NK.repeat(2, 1), labels_N.repeat(2)
    assert set_threshold(both_NK, both_N, views=2) == pytest.approx(0.05)
    both_NK[99:] += torch.tensor([0.005, -0.005], dtype=torch.float64)
    assert set_threshold(both_NK, both_N, views=2) == pytest.approx(0.05)


def test_prediction_sets_cover_the_true_class_as_often_as_promised() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_NK = 2 * torch.randn(12_000, 10, generator=generator)
    labels_N = (2 * logits_NK).softmax(dim=1).multinomial(1, generator=generator)[:, 0]  # the network is too modest
    probabilities_NK = logits_NK.softmax(dim=1)
    threshold = set_threshold(probabilities_NK[:2000], labels_N[:2000])
    known = Calibration(set_threshold=threshold)
    sets = [known.prediction_set(row) for row in probabilities_NK[2000:].tolist()]
    assert all(sets)
    coverage = (
        sum(label in chosen for label, chosen in zip(labels_N[2000:].tolist(), sets, strict=True) if chosen) / 1e4
    )
    assert coverage == pytest.approx(0.95, abs=0.015)  # 3 standard deviations of both samples


def test_a_prediction_set_is_ranked_and_never_empty() -> None:
    known = Calibration(set_threshold=0.3)
    assert known.prediction_set([0.3, 0.25, 0.45]) == [2, 0]
    assert known.prediction_set([0.1, 0.9, 0.0]) == [1]
    assert known.prediction_set([0.28, 0.22, 0.26, 0.24]) == [0]
    assert Calibration().prediction_set([0.5, 0.5]) is None


def test_familiarity_is_the_share_of_held_out_images_of_higher_energy() -> None:
    known = Calibration(energy_quantiles=(1.0, 2.0, 2.0, 4.0, 8.0))
    given = {0.5: 1.0, 1.0: 1.0, 1.5: 0.875, 2.0: 0.75, 3.0: 0.375, 4.0: 0.25, 6.0: 0.125, 8.0: 0.0, 9.0: 0.0}
    assert {value: known.familiarity(value) for value in given} == pytest.approx(given)


def test_energy_by_hand() -> None:
    logits_NK = torch.tensor([[3.0, 3.0], [0.0, 100.0], [0.0, 0.0], [-5.0, -5.0]])
    assert energy(logits_NK).tolist() == pytest.approx([-3 - math.log(2), -100, -math.log(2), 5 - math.log(2)])


def test_half_of_the_held_out_images_are_more_familiar_than_the_median() -> None:
    held_out, given = noise(60), random_checkpoint()
    found = calibrate(given, held_out)
    assert found.images == "noise test, as they are and as JPEG of quality 75"
    assert (found.count, found.digest) == (60, held_out.digest)
    logits_NK = given.network()(torch.cat([held_out.pixels_NCHW, jpeg(75, held_out.pixels_NCHW)]))
    expected = fit_probabilities(logits_NK, held_out.labels_N.repeat(2), views=2)
    assert found.temperature == pytest.approx(expected.temperature, rel=1e-3)
    assert found.cubic == pytest.approx(expected.cubic, abs=1e-3)
    assert found.energy_quantiles is not None
    ranks = sorted(found.familiarity(value) for value in found.energy_quantiles[::100])
    assert ranks == pytest.approx([index / 10 for index in range(11)], abs=1e-6)


@pytest.mark.parametrize("known", [Calibration(temperature=0.5), Calibration(temperature=2.0, cubic=0.3)])
def test_calibration_matches_hand_computed_values_and_keeps_the_order(known: Calibration) -> None:
    logits_NK = torch.tensor([[1.0, 3.0, 0.0], [-2.0, -2.0, 5.0]], dtype=torch.float64)
    below_NK = torch.tensor([[2.0, 0.0, 3.0], [7.0, 7.0, 0.0]], dtype=torch.float64)
    expected_NK = -(below_NK / known.temperature + known.cubic * below_NK**3)
    torch.testing.assert_close(known.adjust(logits_NK), expected_NK)
    torch.testing.assert_close(known.probabilities(logits_NK), expected_NK.softmax(dim=1))
    assert torch.equal(known.probabilities(logits_NK).argsort(stable=True), logits_NK.argsort(stable=True))
