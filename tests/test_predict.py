"""POST /predict as clients use it."""

import asyncio
import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import drawing, encode, random_checkpoint
from fastapi.testclient import TestClient
from PIL import Image

from app import checkpoint, images
from app.calibration import Calibration, energy
from app.checkpoint import CIFAR10_CLASSES
from app.main import create_app
from app.predictor import Estimate, Predictor
from app.routes.predict import RAW
from app.schemas import ErrorBody, Prediction
from app.service import Service, Verdict
from app.settings import Settings

OCTETS = {"content-type": "application/octet-stream"}


def test_the_answer_is_what_the_network_says(client: TestClient, png: bytes, weights: Path) -> None:
    loaded = checkpoint.load(weights)
    probabilities_K = loaded.network()(images.to_tensor([images.decode(png)])).softmax(dim=1)[0]
    answer = Prediction.model_validate(client.post("/predict", content=png, headers=OCTETS).json(), strict=True)
    assert list(answer.probabilities) == list(CIFAR10_CLASSES)
    assert list(answer.probabilities.values()) == pytest.approx(probabilities_K.tolist(), abs=0.01)
    assert sum(answer.probabilities.values()) == pytest.approx(1, abs=1e-12)
    assert answer.confidence == max(answer.probabilities.values()) == answer.probabilities[answer.label]
    assert answer.label == CIFAR10_CLASSES[answer.class_id]
    assert answer.model.model_dump() == {"name": "net", "sha256": loaded.sha256[:12]}


@pytest.mark.parametrize("content_type", ["image/png", "image/whatever", "IMAGE/PNG; a=b", *RAW])
def test_form_and_raw_body_have_the_same_answer(client: TestClient, png: bytes, content_type: str) -> None:
    form = client.post("/predict", files={"file": ("picture.png", png, "image/png")})
    raw = client.post("/predict", content=png, headers={"content-type": content_type})
    assert form.status_code == raw.status_code == 200
    assert form.json() == raw.json()


def test_a_raw_body_without_content_type_is_taken_as_a_picture(client: TestClient, png: bytes) -> None:
    assert client.post("/predict", content=png).status_code == 200


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_formats(client: TestClient, format: str) -> None:
    assert client.post("/predict", files={"file": encode(drawing(), format)}).status_code == 200


@pytest.mark.parametrize("resize", ["crop", "stretch", "pad"])
def test_resize_is_done_before_the_network(client: TestClient, resize: images.Resize) -> None:
    data = encode(drawing(80, 50))
    resized = Image.frombytes("RGB", (32, 32), images.decode(data, resize))
    answer = client.post(f"/predict?resize={resize}", content=data, headers=OCTETS).json()
    assert answer == client.post("/predict", content=encode(resized), headers=OCTETS).json()


def test_top_k_keeps_the_most_probable_highest_first(client: TestClient, png: bytes) -> None:
    everything = client.post("/predict", content=png, headers=OCTETS).json()
    top = client.post("/predict?top_k=3", content=png, headers=OCTETS).json()
    ranked = sorted(everything["probabilities"].items(), key=lambda pair: -pair[1])
    assert list(top["probabilities"].items()) == ranked[:3]
    assert top["label"] == everything["label"] == ranked[0][0]


def test_top_k_above_the_number_of_classes_is_all_of_them(client: TestClient, png: bytes) -> None:
    assert len(client.post("/predict?top_k=99", content=png, headers=OCTETS).json()["probabilities"]) == 10


def test_concurrent_requests_get_their_own_answers(client: TestClient) -> None:
    pictures = [encode(Image.new("RGB", (32, 32), (index * 8, 255 - index * 8, index))) for index in range(32)]
    alone = [client.post("/predict", content=picture, headers=OCTETS).json() for picture in pictures]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda picture: client.post("/predict", content=picture, headers=OCTETS), pictures))
    for one, other in zip(alone, together, strict=True):
        assert other.json()["probabilities"] == pytest.approx(one["probabilities"], abs=0.003)
    assert len({answer["confidence"] for answer in alone}) > 20  # they do differ


def test_a_broken_picture_among_good_ones_fails_alone(client: TestClient, png: bytes) -> None:
    bodies = [png, png[:100], png, b"no picture"] * 5
    with ThreadPoolExecutor(20) as pool:
        statuses = list(pool.map(lambda body: client.post("/predict", content=body).status_code, bodies))
    assert statuses == [200, 400, 200, 400] * 5


@pytest.mark.parametrize(
    ("side", "query", "light"),
    [(32, "", True), (32, "?resize=crop", False), (400, "?resize=crop", False)],
)
def test_the_event_loop_runs_no_network_and_decodes_only_light_pictures(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, side: int, query: str, light: bool
) -> None:
    threads: dict[str, int] = {}
    decode, estimate, submit = images.decode, Predictor.estimate, Service.predict

    def spy_decode(*args: object) -> bytes:
        threads["decode"] = threading.get_ident()
        return decode(*args)  # type: ignore[arg-type]

    def spy_estimate(self: Predictor, pixels_NCHW: torch.Tensor) -> list[Estimate]:
        threads["predict"] = threading.get_ident()
        return estimate(self, pixels_NCHW)

    def spy_submit(self: Service, body: bytes, resize: images.Resize | None) -> "asyncio.Future[Verdict]":
        threads["event loop"] = threading.get_ident()
        return submit(self, body, resize)

    monkeypatch.setattr(images, "decode", spy_decode)
    monkeypatch.setattr(Predictor, "estimate", spy_estimate)
    monkeypatch.setattr(Service, "predict", spy_submit)
    picture = encode(drawing(side, side), "BMP")
    with TestClient(create_app(Settings(weights=settings.weights, device="cpu", threads=1))) as client:
        assert client.post(f"/predict{query}", content=picture).status_code == 200
    assert threads["predict"] not in (threads["event loop"], threads["decode"])
    assert (threads["decode"] == threads["event loop"]) is light


def calibrated(path: Path, most_familiar: float = -3) -> checkpoint.Checkpoint:
    """Weights saved with a full calibration."""
    known = Calibration(
        temperature=0.5,
        set_threshold=0.1,
        energy_quantiles=tuple(torch.linspace(most_familiar, most_familiar + 1, 101).tolist()),
        images="some",
        count=100,
    )
    given = dataclasses.replace(random_checkpoint(), calibration=known)
    checkpoint.save(given, path)
    return given


def test_familiarity_and_prediction_set_are_those_of_the_calibration(tmp_path: Path, png: bytes) -> None:
    given = calibrated(tmp_path / "calibrated.pth")
    seen = energy(given.network()(images.to_tensor([images.decode(png)]))).item()
    with TestClient(create_app(Settings(weights=tmp_path / "calibrated.pth", device="cpu", threads=1))) as client:
        answer = client.post("/predict", content=png).json()
        many = client.post("/predict/batch", files=[("files", png), ("files", png[:99])]).json()["predictions"]
        outputs = client.post(
            "/v2/models/cifar/infer",
            content=png,
            headers={"inference-header-content-length": "0", "accept": "application/json"},
        ).json()["outputs"]
        few = client.post("/predict?top_k=1", content=png).json()
    Prediction.model_validate(answer, strict=True)
    assert answer["familiarity"] == pytest.approx(given.calibration.familiarity(seen), abs=0.02)
    assert 0 < answer["familiarity"] < 1
    assert answer["unfamiliar"] is False
    ranked = sorted(answer["probabilities"], key=lambda label: -answer["probabilities"][label])
    likely = [label for label in ranked if answer["probabilities"][label] >= 0.1]
    assert 1 < len(likely) < 10
    assert answer["prediction_set"] == few["prediction_set"] == likely
    assert many[0] == {name: value for name, value in answer.items() if name != "model"}
    assert "error" in many[1]
    assert next(output for output in outputs if output["name"] == "familiarity")["data"] == [answer["familiarity"]]


def test_a_picture_of_low_familiarity_is_called_unfamiliar(tmp_path: Path, png: bytes) -> None:
    given = calibrated(tmp_path / "calibrated.pth")
    seen = energy(given.network()(images.to_tensor([images.decode(png)]))).item()
    for lower, unfamiliar in [(0.99, True), (0.9, False)]:
        calibrated(tmp_path / "calibrated.pth", most_familiar=seen - lower)
        with TestClient(create_app(Settings(weights=tmp_path / "calibrated.pth", device="cpu", threads=1))) as client:
            answer = client.post("/predict", content=png).json()
        assert answer["familiarity"] == pytest.approx(1 - lower, abs=0.02)
        assert answer["unfamiliar"] is unfamiliar


def test_familiarity_and_prediction_set_are_null_without_a_calibration(client: TestClient, png: bytes) -> None:
    answer = client.post("/predict", content=png).json()
    assert (answer["prediction_set"], answer["familiarity"], answer["unfamiliar"]) == (None, None, None)


def test_the_bare_state_dict_of_the_tutorial_is_served(tmp_path: Path, png: bytes) -> None:
    names = ("conv1", "conv2", "fc1", "fc2", "fc3")
    shapes = ((6, 3, 5, 5), (16, 6, 5, 5), (120, 400), (84, 120), (10, 84))
    state = {f"{name}.weight": torch.zeros(shape) for name, shape in zip(names, shapes, strict=True)}
    state |= {f"{name}.bias": torch.zeros(shape[0]) for name, shape in zip(names, shapes, strict=True)}
    state["fc3.bias"][6] = 2.0
    torch.save(state, tmp_path / "cifar_net.pth")
    with TestClient(create_app(Settings(weights=tmp_path / "cifar_net.pth", device="cpu", threads=1))) as client:
        answer = client.post("/predict", content=png).json()
        assert answer["label"] == "frog"
        assert answer["confidence"] == pytest.approx(torch.e**2 / (torch.e**2 + 9))
        body = ErrorBody.model_validate(client.get("/metrics/per-class").json())
        assert "carry no evaluation" in body.error
