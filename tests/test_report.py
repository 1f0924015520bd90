"""Figures worked out by hand for three classes, and published values."""

import math
from typing import Any

import pytest
import torch

from app.calibration import Calibration
from app.report import (
    calibration_bins,
    calibration_error,
    confusion_matrix,
    evaluate_probabilities,
    per_class,
    report,
    wilson_interval,
)

CLASSES = ("ant", "bee", "cow")
# Rows true, columns predicted. Of 5 ants 3 are found, of 4 bees 2, of 1 cow none; nothing else is called a cow.
CONFUSION_KK = torch.tensor([[3, 2, 0], [1, 2, 1], [1, 0, 0]])


def test_confusion_rows_are_true_classes() -> None:
    predicted_N = torch.tensor([0, 0, 1, 2, 1])
    labels_N = torch.tensor([0, 1, 1, 1, 0])
    assert confusion_matrix(predicted_N, labels_N, 3).tolist() == [[1, 1, 0], [1, 1, 1], [0, 0, 0]]


def test_per_class_by_hand() -> None:
    ant, bee, cow = per_class(CONFUSION_KK, CLASSES)
    assert (ant["label"], ant["support"], ant["predicted"], ant["correct"]) == ("ant", 5, 5, 3)
    assert ant["accuracy"] == ant["precision"] == ant["f1"] == pytest.approx(3 / 5)
    assert (bee["class_id"], bee["support"], bee["predicted"], bee["correct"]) == (1, 4, 4, 2)
    assert bee["f1"] == pytest.approx(2 * 0.5 * 0.5 / (0.5 + 0.5))
    assert (cow["support"], cow["predicted"], cow["accuracy"], cow["precision"], cow["f1"]) == (1, 1, 0, 0, 0)


def test_f1_is_the_harmonic_mean_of_precision_and_recall() -> None:
    first, second = per_class(torch.tensor([[8, 2], [4, 6]]), ("x", "y"))
    assert (first["accuracy"], first["precision"]) == (8 / 10, 8 / 12)
    assert first["f1"] == pytest.approx(2 / (10 / 8 + 12 / 8))
    assert (second["accuracy"], second["precision"]) == (6 / 10, 6 / 8)
    assert second["f1"] == pytest.approx(2 / (10 / 6 + 8 / 6))


def test_a_class_without_images_or_predictions_is_zero_not_an_error() -> None:
    rows = per_class(torch.tensor([[2, 0], [0, 0]]), ("seen", "never"))
    assert [rows[1][key] for key in ("support", "predicted", "accuracy", "precision", "f1")] == [0, 0, 0, 0, 0]
    assert rows[1]["interval"] == (0, 1)


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe (1998), table I, method 3 (score, no continuity correction)
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_agrees_with_newcombe(successes: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(successes, total) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_is_symmetric_and_within_bounds() -> None:
    assert wilson_interval(20, 20) == pytest.approx([1 - end for end in reversed(wilson_interval(0, 20))])
    assert wilson_interval(10, 10)[1] == 1
    assert wilson_interval(0, 0) == (0, 1)


def test_calibration_error_by_hand() -> None:
    # Two bins of two images: sure of 0.6 and 0.6, one right; sure of 0.9 and 1.0, both right.
    probabilities_NK = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.4, 0.6], [0.0, 1.0]])
    labels_N = torch.tensor([0, 0, 0, 1])
    low, high = calibration_bins(probabilities_NK, labels_N, bins=2).tolist()
    assert low == pytest.approx([2, 0.6, 0.5])
    assert high == pytest.approx([2, 0.95, 1.0])
    assert calibration_error(probabilities_NK, labels_N, bins=2) == pytest.approx((0.1 + 0.05) / 2)


def test_calibration_error_weighs_bins_by_their_images() -> None:
    # Three images in two bins: two of confidence 0.5 and 0.6, one right; one of confidence 0.8, wrong.
    probabilities_NK = torch.tensor([[0.5, 0.5], [0.6, 0.4], [0.8, 0.2]])
    labels_N = torch.tensor([1, 0, 1])
    expected = (2 * abs(0.5 - 0.55) + 1 * abs(0.0 - 0.8)) / 3
    assert calibration_error(probabilities_NK, labels_N, bins=2) == pytest.approx(expected)


def test_calibration_error_of_fully_certain_answers_is_0_or_1() -> None:
    sure_NK = torch.eye(2).repeat(50, 1)
    labels_N = torch.tensor([0, 1]).repeat(50)
    assert calibration_error(sure_NK, labels_N) == 0
    assert calibration_error(sure_NK, 1 - labels_N) == 1


def test_more_bins_than_images_is_possible() -> None:
    probabilities_NK, labels_N = torch.tensor([[0.7, 0.3], [0.2, 0.8]]), torch.tensor([0, 1])
    assert calibration_bins(probabilities_NK, labels_N)[:, 0].tolist() == [1, 1]


def test_scores_by_hand() -> None:
    probabilities_NK = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [1.0, 0.0, 0.0]], dtype=torch.float64)
    labels_N = torch.tensor([0, 1, 0])
    figures = evaluate_probabilities(probabilities_NK, labels_N, dataset="d", digest="x", evaluated_at="now")
    assert figures.nll == pytest.approx(-(math.log(0.5) + math.log(0.8)) / 3)
    first = 0.5**2 + 0.25**2 + 0.25**2
    second = 0.1**2 + 0.2**2 + 0.1**2
    assert figures.brier == pytest.approx((first + second + 0) / 3)
    assert figures.confusion_KK.tolist() == [[2, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert figures.bins_B3.tolist() == [[1, 0.5, 1], [1, 0.8, 1], [1, 1, 1]]  # more bins than images: one each


def test_a_certain_but_wrong_answer_has_a_large_but_finite_loss() -> None:
    figures = evaluate_probabilities(
        torch.tensor([[0.0, 1.0]]), torch.tensor([0]), dataset="d", digest="x", evaluated_at="now"
    )
    assert 80 < figures.nll < 100
    assert figures.brier == 2


def test_the_report_is_complete_and_of_plain_types() -> None:
    probabilities_NK = torch.eye(3)[torch.tensor([0, 0, 0, 1, 1, 0, 1, 1, 2, 0])]
    labels_N = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 2])
    figures = evaluate_probabilities(
        probabilities_NK, labels_N, dataset="three insects", digest="abc", evaluated_at="2026-01-01T00:00:00+00:00"
    )
    body = report(figures, CLASSES)
    assert body["confusion"] == CONFUSION_KK.tolist()
    assert body["dataset"] == {"name": "three insects", "sha256": "abc", "images": 10}
    assert (body["correct"], body["accuracy"]) == (5, 0.5)
    assert body["interval"] == pytest.approx((0.2366, 0.7634), abs=5e-5)
    assert body["classes"] == per_class(CONFUSION_KK, CLASSES)
    assert body["calibration"]["ece"] == pytest.approx(0.5)  # always sure, right half of the time
    assert "15 equal-mass bins" in body["calibration"]["ece_estimator"]
    assert body["prediction_sets"] is None


def test_the_figures_before_calibration_are_those_of_the_plain_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_NK, labels_N = torch.randn(200, 5, generator=generator).double(), torch.arange(200) % 5
    names: Any = {"dataset": "d", "digest": "x", "evaluated_at": "now"}
    plain = evaluate_probabilities(logits_NK.softmax(dim=1), labels_N, **names)
    sharp = evaluate_probabilities(
        (logits_NK / 0.5).softmax(dim=1), labels_N, **names, uncalibrated_NK=logits_NK.softmax(dim=1)
    )
    assert (plain.uncalibrated_nll, plain.uncalibrated_ece) == pytest.approx((plain.nll, plain.ece))
    without = (sharp.uncalibrated_nll, sharp.uncalibrated_brier, sharp.uncalibrated_ece)
    assert without == pytest.approx((plain.nll, plain.brier, plain.ece))
    assert sharp.nll > plain.nll + 0.1
    body = report(sharp, tuple("abcde"))["calibration"]
    assert body["uncalibrated"] == pytest.approx({"nll": plain.nll, "brier": plain.brier, "ece": plain.ece})


def test_coverage_and_size_of_the_prediction_sets_by_hand() -> None:
    probabilities_NK = torch.tensor([[0.5, 0.4, 0.1], [0.1, 0.2, 0.7], [0.34, 0.33, 0.33], [0.05, 0.5, 0.45]])
    labels_N = torch.tensor([1, 1, 0, 2])  # the sets from 0.4 on: {0, 1}, {2}, {0} for want of any, {1, 2}
    names: Any = {"dataset": "d", "digest": "x", "evaluated_at": "now"}
    figures = evaluate_probabilities(probabilities_NK.double(), labels_N, **names, set_threshold=0.399)
    assert report(figures, CLASSES)["prediction_sets"] == {"target": 0.95, "coverage": 0.75, "mean_size": 1.5}
    known = Calibration(set_threshold=0.399)
    sets = [known.prediction_set(row) for row in probabilities_NK.tolist()]
    assert sets == [[0, 1], [2], [0], [1, 2]]


def test_the_most_frequent_confusions_come_first_and_none_is_made_up() -> None:
    confusion_KK = torch.diag(torch.tensor([9, 9, 9, 9, 9]))
    confusion_KK[0, 1:] = torch.tensor([1, 4, 2, 3])
    confusion_KK[1, 4] = 5
    rows = per_class(confusion_KK, ("a", "b", "c", "d", "e"))
    assert rows[0]["confusions"] == [
        {"label": "c", "images": 4},
        {"label": "e", "images": 3},
        {"label": "d", "images": 2},
    ]
    assert rows[1]["confusions"] == [{"label": "e", "images": 5}]
    assert rows[2]["confusions"] == []
