"""GET /metrics/per-class: from the checkpoint, or measured on a data set."""

import dataclasses
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import drawing, encode, noise, random_checkpoint, random_evaluation
from fastapi.testclient import TestClient
from running import eventually

from app import checkpoint, data
from app.calibration import Calibration
from app.checkpoint import CIFAR10_CLASSES, Checkpoint
from app.data import Split
from app.errors import DataError
from app.main import create_app
from app.report import evaluate_probabilities, report
from app.schemas import Report
from app.settings import Settings


def settings_with_data(settings: Settings) -> Settings:
    return Settings(weights=settings.weights, device="cpu", threads=1, data=Path("anywhere"))


def report_from(client: TestClient, source: str) -> dict[str, Any]:
    """The report as soon as it is from there."""
    eventually(lambda: client.get("/metrics/per-class").json().get("source") == source)
    body: dict[str, Any] = client.get("/metrics/per-class").json()
    return body


def test_the_report_in_the_checkpoint_is_the_answer(client: TestClient, weights: Path) -> None:
    body = client.get("/metrics/per-class").json()
    loaded = checkpoint.load(weights)
    expected = Report.model_validate(
        {
            "source": "checkpoint",
            "weights": {"name": "net", "sha256": loaded.sha256},
            "trained": {"recipe": "random", "seed": 7},
            **report(random_evaluation(), CIFAR10_CLASSES),
        }
    )
    assert body == expected.model_dump(mode="json")
    assert [row["label"] for row in body["classes"]] == list(CIFAR10_CLASSES)
    assert sum(row["support"] for row in body["classes"]) == body["dataset"]["images"] == 200


def test_every_figure_of_the_report_is_in_the_schema() -> None:
    figures = report(random_evaluation(), CIFAR10_CLASSES)
    assert figures.keys() | {"source", "weights", "trained"} == Report.model_fields.keys()
    assert (
        figures["classes"][0].keys()
        == Report.model_validate(
            {"source": "measured", "weights": {"name": "", "sha256": ""}, "trained": {}, **figures}
        )
        .classes[0]
        .model_dump()
        .keys()
    )


def test_with_data_the_loaded_weights_are_measured(
    settings: Settings, weights: Path, monkeypatch: pytest.MonkeyPatch, png: bytes
) -> None:
    monkeypatch.setattr(data, "read_test", lambda _folder: noise(50))
    with TestClient(create_app(settings_with_data(settings))) as client:
        assert client.post("/predict", content=png).status_code == 200
        body = report_from(client, "measured")
    assert body["dataset"] == {"name": "noise test", "sha256": noise(50).digest, "images": 50}
    predicted_N = checkpoint.load(weights).network()(noise(50).pixels_NCHW).argmax(dim=1)
    right = int((predicted_N == noise(50).labels_N).sum())
    assert body["correct"] == pytest.approx(right, abs=2)  # bfloat16 may tip one
    assert [sum(row) for row in body["confusion"]] == torch.bincount(noise(50).labels_N, minlength=10).tolist()


def test_measured_figures_use_the_calibration(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = random_checkpoint()
    calibration = Calibration(temperature=0.05, set_threshold=0.15)
    checkpoint.save(dataclasses.replace(given, calibration=calibration), tmp_path / "calibrated.pth")
    monkeypatch.setattr(data, "read_test", lambda _folder: noise(50))
    with_data = settings_with_data(dataclasses.replace(settings, weights=tmp_path / "calibrated.pth"))
    with TestClient(create_app(with_data)) as client:
        body = report_from(client, "measured")
    logits_NK = given.network()(noise(50).pixels_NCHW)
    expected = evaluate_probabilities(
        calibration.probabilities(logits_NK),
        noise(50).labels_N,
        dataset="noise test",
        digest="",
        evaluated_at="",
        uncalibrated_NK=logits_NK.softmax(dim=1),
        set_threshold=0.15,
    )
    figures = report(expected, CIFAR10_CLASSES)
    assert body["calibration"]["nll"] == pytest.approx(figures["calibration"]["nll"], rel=0.02)
    assert body["calibration"]["uncalibrated"]["nll"] == pytest.approx(
        figures["calibration"]["uncalibrated"]["nll"], rel=0.02
    )
    assert figures["calibration"]["nll"] > 1.1 * figures["calibration"]["uncalibrated"]["nll"]
    assert body["prediction_sets"]["mean_size"] == pytest.approx(figures["prediction_sets"]["mean_size"], abs=0.1)


def test_weights_without_figures_and_without_data_give_404(tmp_path: Path) -> None:
    checkpoint.save(random_checkpoint(), tmp_path / "bare.pth")
    with TestClient(create_app(Settings(weights=tmp_path / "bare.pth", device="cpu", threads=1))) as client:
        response = client.get("/metrics/per-class")
    assert response.status_code == 404
    assert response.json()["error"].startswith("These weights carry no evaluation. Start the service with a data set")


def refuse(_folder: Path) -> Split:
    raise DataError("There is no folder anywhere.")


def fail(_folder: Path) -> Split:
    raise MemoryError


def test_without_figures_in_the_file_the_answer_is_503_until_they_are_measured(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_read = threading.Event()

    def read(_folder: Path) -> Split:
        may_read.wait()
        return noise(50)

    checkpoint.save(random_checkpoint(), tmp_path / "bare.pth")
    monkeypatch.setattr(data, "read_test", read)
    with TestClient(create_app(settings_with_data(replace(settings, weights=tmp_path / "bare.pth")))) as client:
        response = client.get("/metrics/per-class")
        assert response.status_code == 503
        assert response.headers["retry-after"] == "10"
        assert response.json()["error"] == "The weights are being evaluated on the data set."
        may_read.set()
        assert report_from(client, "measured")["dataset"]["images"] == 50


@pytest.mark.parametrize("read", [refuse, fail])
def test_without_figures_in_the_file_and_with_unusable_data_the_404_refers_to_the_log(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], Split]
) -> None:
    checkpoint.save(random_checkpoint(), tmp_path / "bare.pth")
    monkeypatch.setattr(data, "read_test", read)
    with TestClient(create_app(settings_with_data(replace(settings, weights=tmp_path / "bare.pth")))) as client:
        eventually(lambda: client.get("/metrics/per-class").status_code == 404)
        error = client.get("/metrics/per-class").json()["error"]
    assert error == "These weights carry no evaluation, and cannot get one here; the service's log says why."


def test_an_evaluation_that_fails_gives_404(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object) -> None:
        raise RuntimeError("out of memory")

    checkpoint.save(random_checkpoint(), tmp_path / "bare.pth")
    monkeypatch.setattr(data, "read_test", lambda _folder: noise(50))
    monkeypatch.setattr(Checkpoint, "evaluate", fail)
    with TestClient(create_app(settings_with_data(replace(settings, weights=tmp_path / "bare.pth")))) as client:
        eventually(lambda: client.get("/metrics/per-class").status_code == 404)


@pytest.mark.parametrize(
    ("read", "sentence"),
    [
        (refuse, "The weights are not evaluated here. There is no folder anywhere."),
        (
            lambda _folder: noise(50, ("cat", "dog")),
            "the images (noise test) have the classes cat, dog. Use images",
        ),
    ],
)
def test_unusable_data_is_logged_and_the_checkpoint_report_is_used(
    settings: Settings, read: Any, sentence: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(data, "read_test", read)
    with TestClient(create_app(settings_with_data(settings))) as client:
        eventually(lambda: sentence in caplog.text)
        assert client.get("/metrics/per-class").json()["source"] == "checkpoint"


def test_a_folder_of_pictures_is_read_and_measured(tmp_path: Path) -> None:
    for label in CIFAR10_CLASSES:
        (tmp_path / label).mkdir()
        for index in range(5):
            (tmp_path / label / f"{index}.png").write_bytes(encode(drawing(32 + index, 40)))
    path = tmp_path.parent / "sorted.pth"
    classes = tuple(sorted(CIFAR10_CLASSES))  # the order in which folders are read
    checkpoint.save(dataclasses.replace(random_checkpoint(), classes=classes), path)
    with TestClient(create_app(Settings(weights=path, device="cpu", threads=1, data=tmp_path))) as client:
        assert report_from(client, "measured")["dataset"]["images"] == 10
