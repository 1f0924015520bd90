"""From probabilities and labels to the figures that describe a classifier. Pure arithmetic on tensors.

Shape letters: N images, K classes, B bins. Probabilities, accuracies and intervals are in [0, 1].
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CALIBRATION_BINS = 15
COVERAGE = 0.95
"""Share of pictures whose prediction set should hold the true class."""
CONFUSIONS = 3


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured for one set of weights on one set of images."""

    dataset: str
    """The images in words: "CIFAR-10 test"."""
    digest: str
    """sha256 over their pixels and labels."""
    evaluated_at: str
    """UTC time, ISO 8601."""
    confusion_KK: Tensor
    """Counts as int64; row = true class, column = predicted class."""
    nll: float
    """Mean negative log likelihood of the true class, in nats."""
    brier: float
    """Mean over images of the sum over classes of (probability - truth)**2; between 0 and 2."""
    ece: float
    """Expected calibration error; see `calibration_error`."""
    bins_B3: Tensor
    """Count, mean confidence and accuracy of each bin of the calibration error: the reliability diagram."""
    uncalibrated_nll: float
    """The same three before calibration."""
    uncalibrated_brier: float
    uncalibrated_ece: float
    coverage: float | None = None
    """Share of images whose prediction set holds the true class; None if the weights have no threshold for them."""
    set_size: float | None = None
    """Mean number of classes in a prediction set."""

    @property
    def accuracy(self) -> float:
        """Share of the images whose most probable class is the true one."""
        return _ratio(int(self.confusion_KK.diagonal().sum()), int(self.confusion_KK.sum()))


def confusion_matrix(predicted_N: Tensor, labels_N: Tensor, num_classes: int) -> Tensor:
    """Counts (K, K) as int64, row = true class, column = predicted class."""
    cells_N = labels_N * num_classes + predicted_N
    return torch.bincount(cells_N, minlength=num_classes**2).reshape(num_classes, num_classes)


def calibration_bins(probabilities_NK: Tensor, labels_N: Tensor, bins: int = CALIBRATION_BINS) -> Tensor:
    """Count, mean confidence and accuracy (B, 3) of the images sorted by confidence and cut into `bins` equal parts.

    Of the two usual estimators, equal-mass bins are the less biased (Roelofs et al., 2022, arXiv:2012.08668).
    """
    confidence_N, predicted_N = probabilities_NK.double().max(dim=1)
    right_N = (predicted_N == labels_N).double()
    parts = [part for part in confidence_N.argsort(stable=True).tensor_split(bins) if len(part)]
    rows = [[len(part), confidence_N[part].mean(), right_N[part].mean()] for part in parts]
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)


def calibration_error(probabilities_NK: Tensor, labels_N: Tensor, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error: the mean of |accuracy - confidence| over equal-mass bins, weighted by their count."""
    count_B, confidence_B, accuracy_B = calibration_bins(probabilities_NK, labels_N, bins).T
    return float((count_B * (accuracy_B - confidence_B).abs()).sum()) / max(1, len(labels_N))


def evaluate_probabilities(
    probabilities_NK: Tensor,
    labels_N: Tensor,
    *,
    dataset: str,
    digest: str,
    evaluated_at: str,
    uncalibrated_NK: Tensor | None = None,
    set_threshold: float | None = None,
) -> Evaluation:
    """Every figure of `Evaluation` from the probabilities (N, K) and the true classes (N,).

    Args:
        uncalibrated_NK: The probabilities before their calibration, if there was one.
        set_threshold: The least probability of a class in a prediction set, if there are such sets.
    """
    probabilities_NK = probabilities_NK.double()
    nll, brier, ece = _scores(probabilities_NK, labels_N)
    plain_NK = probabilities_NK if uncalibrated_NK is None else uncalibrated_NK.double()
    uncalibrated_nll, uncalibrated_brier, uncalibrated_ece = _scores(plain_NK, labels_N)
    coverage, set_size = _prediction_sets(probabilities_NK, labels_N, set_threshold)
    return Evaluation(
        dataset=dataset,
        digest=digest,
        evaluated_at=evaluated_at,
        confusion_KK=confusion_matrix(probabilities_NK.argmax(dim=1), labels_N, probabilities_NK.shape[1]),
        nll=nll,
        brier=brier,
        ece=ece,
        bins_B3=calibration_bins(probabilities_NK, labels_N),
        uncalibrated_nll=uncalibrated_nll,
        uncalibrated_brier=uncalibrated_brier,
        uncalibrated_ece=uncalibrated_ece,
        coverage=coverage,
        set_size=set_size,
    )


def negative_log_likelihood(probabilities_NK: Tensor, labels_N: Tensor) -> float:
    """The mean negative log likelihood of the true classes, in nats."""
    true_N = probabilities_NK.gather(1, labels_N[:, None])
    # Below the smallest normal float32 a probability has underflowed; the logarithm must stay finite.
    return -true_N.clamp_min(torch.finfo(torch.float32).tiny).log().mean().item()


def _scores(probabilities_NK: Tensor, labels_N: Tensor) -> tuple[float, float, float]:
    """Negative log likelihood, Brier score and expected calibration error."""
    true_N = probabilities_NK.gather(1, labels_N[:, None])[:, 0]
    # sum_k (p_k - y_k)^2 = sum_k p_k^2 - 2 p_true + 1
    brier = (probabilities_NK.square().sum(dim=1) - 2 * true_N + 1).mean().item()
    return negative_log_likelihood(probabilities_NK, labels_N), brier, calibration_error(probabilities_NK, labels_N)


def _prediction_sets(
    probabilities_NK: Tensor, labels_N: Tensor, threshold: float | None
) -> tuple[float, float] | tuple[None, None]:
    """Coverage and mean size of the sets that `Calibration.prediction_set` makes."""
    if threshold is None:
        return None, None
    # Each set holds the most probable class, and any other from the threshold up.
    sets_NK = probabilities_NK >= probabilities_NK.amax(dim=1, keepdim=True).clamp_max(threshold)
    coverage = sets_NK.gather(1, labels_N[:, None]).double().mean().item()
    return coverage, sets_NK.sum(dim=1).double().mean().item()


def wilson_interval(successes: int, total: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson, 1927): right near 0 and 1, where the usual formula is not."""
    if total == 0:
        return 0.0, 1.0
    share, z = successes / total, 1.959964  # 95 % of a normal distribution lie within z standard deviations
    scale = 1 / (1 + z * z / total)
    centre = scale * (share + z * z / (2 * total))
    half = scale * z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    # Rounding must not leave the share itself outside: 20 of 20 ends at exactly 1.
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def per_class(confusion_KK: Tensor, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    """For each class: support, predicted, correct, accuracy (= recall), precision, f1, the accuracy's interval, and
    the other classes that its images are most often taken for, at most `CONFUSIONS`, by number of images.

    A ratio without cases (a class never predicted, a class without images) is 0, never a division by zero.
    """
    rows = []
    for index, name in enumerate(classes):
        correct = int(confusion_KK[index, index])
        support = int(confusion_KK[index].sum())
        predicted = int(confusion_KK[:, index].sum())
        rows.append(
            {
                "class_id": index,
                "label": name,
                "support": support,
                "predicted": predicted,
                "correct": correct,
                "accuracy": _ratio(correct, support),
                "precision": _ratio(correct, predicted),
                "f1": _ratio(2 * correct, support + predicted),
                "interval": wilson_interval(correct, support),
                "confusions": _confusions(confusion_KK[index].tolist(), index, classes),
            }
        )
    return rows


def _confusions(counts_K: list[int], own: int, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    wrong = [(count, name) for index, (count, name) in enumerate(zip(counts_K, classes, strict=True)) if index != own]
    ranked = sorted(wrong, key=lambda pair: -pair[0])[:CONFUSIONS]
    return [{"label": name, "images": count} for count, name in ranked if count]


def report(evaluation: Evaluation, classes: tuple[str, ...]) -> dict[str, Any]:
    """The whole report as plain types: what GET /metrics/per-class and `python -m training evaluate --json` return."""
    total = int(evaluation.confusion_KK.sum())
    correct = int(evaluation.confusion_KK.diagonal().sum())
    return {
        "dataset": {"name": evaluation.dataset, "sha256": evaluation.digest, "images": total},
        "evaluated_at": evaluation.evaluated_at,
        "accuracy": evaluation.accuracy,
        "correct": correct,
        "interval": wilson_interval(correct, total),
        "calibration": {
            "nll": evaluation.nll,
            "brier": evaluation.brier,
            "ece": evaluation.ece,
            "ece_estimator": f"{CALIBRATION_BINS} equal-mass bins of the highest probability",
            "uncalibrated": {
                "nll": evaluation.uncalibrated_nll,
                "brier": evaluation.uncalibrated_brier,
                "ece": evaluation.uncalibrated_ece,
            },
        },
        "prediction_sets": None
        if evaluation.coverage is None
        else {"target": COVERAGE, "coverage": evaluation.coverage, "mean_size": evaluation.set_size},
        "classes": per_class(evaluation.confusion_KK, classes),
        "confusion": evaluation.confusion_KK.tolist(),
    }
