"""Predictions in batches, the figures from them, and the table."""

import dataclasses

import pytest
import torch
from conftest import noise, random_checkpoint
from torch import Tensor, nn

from app import model
from app.calibration import Calibration
from app.checkpoint import CIFAR10_CLASSES, Checkpoint
from app.errors import DataError
from app.report import report
from training.evaluate import evaluate, format_report, predict

IMAGES = 23


def checkpoint(temperature: float = 1.0, name: str = "cifar_net") -> Checkpoint:
    return dataclasses.replace(random_checkpoint(name), calibration=Calibration(temperature=temperature))


class BatchSizes(nn.Module):
    """Answers with the first pixel of each image, and remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        self.seen.append(len(pixels_NCHW))
        first_N = pixels_NCHW[:, 0, 0, 0].float() / 255
        return torch.stack([first_N, -first_N], dim=1)


@pytest.mark.parametrize(
    ("batch_size", "seen"), [(1, [1] * 23), (4, [4] * 5 + [3]), (23, [23]), (22, [22, 1]), (1000, [23])]
)
def test_every_image_is_predicted_once_in_order_whatever_the_batch_size(batch_size: int, seen: list[int]) -> None:
    network = BatchSizes().eval()
    pixels_NCHW = noise(IMAGES).pixels_NCHW
    probabilities_NK = predict(network, pixels_NCHW, batch_size)
    assert network.seen == seen
    first_N = pixels_NCHW[:, 0, 0, 0].float() / 255
    torch.testing.assert_close(probabilities_NK[:, 0], torch.sigmoid(2 * first_N))


@pytest.mark.parametrize("name", model.NETWORKS)
def test_the_batch_size_changes_no_figure(name: str) -> None:
    figures = [evaluate(checkpoint(name=name), noise(IMAGES), batch_size=batch_size) for batch_size in (1, 7, 23, 1000)]
    for other in figures[1:]:
        assert torch.equal(other.confusion_KK, figures[0].confusion_KK)
        assert other.nll == pytest.approx(figures[0].nll, abs=1e-5)
        assert other.ece == pytest.approx(figures[0].ece, abs=1e-5)


def test_repeated_evaluation_gives_identical_figures() -> None:
    first, second = evaluate(checkpoint(), noise(IMAGES)), evaluate(checkpoint(), noise(IMAGES))
    assert (first.nll, first.brier, first.ece) == (second.nll, second.brier, second.ece)


def test_the_calibration_of_the_checkpoint_is_applied() -> None:
    logits_NK = checkpoint().network()(noise(IMAGES).pixels_NCHW)
    figures = evaluate(checkpoint(temperature=0.25), noise(IMAGES))
    for nll, said_NK in ((figures.nll, logits_NK / 0.25), (figures.uncalibrated_nll, logits_NK)):
        true_N = said_NK.softmax(dim=1)[torch.arange(IMAGES), noise(IMAGES).labels_N]
        assert nll == pytest.approx(-true_N.log().mean().item(), rel=1e-5)


def test_the_evaluation_records_its_dataset_and_time() -> None:
    figures = evaluate(checkpoint(), noise(IMAGES))
    assert (figures.dataset, figures.digest) == ("noise test", noise(IMAGES).digest)
    assert figures.confusion_KK.sum(dim=1).tolist() == noise(IMAGES).labels_N.bincount(minlength=10).tolist()
    assert figures.evaluated_at.endswith("+00:00")


def test_other_classes_are_refused() -> None:
    official = ("airplane", "automobile", *CIFAR10_CLASSES[2:])
    with pytest.raises(DataError, match=r"know the classes plane, car, .* have the classes airplane, automobile, "):
        evaluate(checkpoint(), dataclasses.replace(noise(IMAGES), classes=official))


def test_classes_may_come_in_another_order() -> None:
    """Folders are in alphabetical order, CIFAR-10's classes are not."""
    known, order_K = noise(IMAGES), torch.tensor([CIFAR10_CLASSES.index(name) for name in sorted(CIFAR10_CLASSES)])
    sorted_labels_N = order_K.argsort()[known.labels_N]
    reordered = dataclasses.replace(known, classes=tuple(sorted(CIFAR10_CLASSES)), labels_N=sorted_labels_N)
    assert [reordered.classes[label] for label in sorted_labels_N] == [CIFAR10_CLASSES[n] for n in known.labels_N]
    assert evaluate(checkpoint(), reordered).confusion_KK.equal(evaluate(checkpoint(), known).confusion_KK)
    assert not sorted_labels_N.equal(known.labels_N)


def test_the_table_shows_the_figures_of_the_report() -> None:
    figures = dataclasses.replace(evaluate(checkpoint(), noise(IMAGES)), nll=1.23456, brier=0.51239, ece=0.08714)
    confusion_KK = torch.diag(torch.arange(1000, 1010))
    confusion_KK[3, 5] = 1003  # every second cat is called a dog
    figures = dataclasses.replace(
        figures, confusion_KK=confusion_KK, uncalibrated_nll=2.5, coverage=0.951, set_size=1.25
    )
    text = format_report(report(figures, CIFAR10_CLASSES))
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line}
    assert "noise test: 11,048 images, sha256 " + noise(IMAGES).digest[:12] in text
    assert "accuracy 90.92 %  (10,045 of 11,048; 95 % Wilson interval 90.37 to 91.44 %)" in text
    per_class = [line.split() for line in text.splitlines() if line.startswith(("cat", "dog"))]
    assert per_class[0] == ["cat", "1,003", "2,006", "50.00", "%", "100.00", "%", "0.6667", "47.81", "to", "52.19", "%"]
    assert per_class[1] == [
        "dog",
        "1,005",
        "1,005",
        "100.00",
        "%",
        "50.05",
        "%",
        "0.6671",
        "99.62",
        "to",
        "100.00",
        "%",
    ]
    assert lines["cat"][1:] == ["0", "0", "0", "1,003", "0", "1,003", "0", "0", "0", "0"]  # of the confusion matrix
    assert "1.2346 nats" in text
    assert "0.5124 (0 to 2)" in text
    assert "0.0871 (15 equal-mass bins of the highest probability)" in text
    assert "before calibration  2.5000, " in text
    assert "95.10 % hold the true class (target 95%), 1.250 classes on average" in text


def test_the_table_leaves_out_a_matrix_of_many_classes() -> None:
    figures = evaluate(checkpoint(), noise(IMAGES))
    texts = [
        format_report(report(dataclasses.replace(figures, confusion_KK=torch.eye(count).long()), tuple(names[:count])))
        for names in [[f"number {index}" for index in range(31)]]
        for count in (30, 31)
    ]
    assert ["confusion (row" in text for text in texts] == [True, False]
    assert all("number 29 " in text and "negative log likelihood" in text for text in texts)


def test_the_table_keeps_its_columns_with_long_names() -> None:
    names = ("a", "a class with a very long name")
    two = dataclasses.replace(noise(IMAGES), classes=names, labels_N=noise(IMAGES).labels_N % 2)
    given = Checkpoint(
        architecture="net",
        arguments={"num_classes": 2},
        state_dict=model.build("net", num_classes=2).state_dict(),
        classes=names,
    )
    lines = format_report(report(evaluate(given, two), names)).splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("confusion"))
    assert len({len(line) for line in lines[start + 1 : start + 4]}) == 1
