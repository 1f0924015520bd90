"""Exchanging the weights while the service runs, over the route and within the batcher."""

import asyncio
import dataclasses
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import noise, random_checkpoint, random_evaluation
from fastapi.testclient import TestClient
from httpx2 import Response
from running import ROOT, eventually
from torch import nn

from app import checkpoint, data, engine, model, self_test
from app.checkpoint import CIFAR10_CLASSES
from app.data import Split
from app.errors import CheckpointError, NotReady, SettingsError, WeightsRefused
from app.main import create_app
from app.model import IMAGE_BYTES
from app.service import EVALUATION_BATCH, Service
from app.settings import Settings, parse_settings

SHIPPED = ROOT / "weights" / "cifar_net.pth"
KEY = "0123456789abcdef"
HEADERS = {"authorization": f"Bearer {KEY}"}


def other_weights(path: Path, **changes: Any) -> str:
    """Write weights that answer differently; return their short sha256."""
    given = random_checkpoint()
    given.state_dict["fc3.bias"] = torch.linspace(-3, 3, 10)
    return checkpoint.save(dataclasses.replace(given, **changes), path)[:12]


@pytest.fixture
def settings(weights: Path, tmp_path: Path) -> Settings:
    """With a weights file that may be written."""
    path = tmp_path / "served.pth"
    shutil.copy(weights, path)
    return Settings(weights=path, device="cpu", threads=1, max_batch=4, admin_key=KEY)


@pytest.fixture
def old(settings: Settings) -> str:
    return checkpoint.load(settings.weights).sha256[:12]


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield client


def reload(client: TestClient) -> Response:
    return client.post("/admin/reload", headers=HEADERS)


def served(client: TestClient, png: bytes) -> str:
    answer = client.post("/predict", content=png)
    assert answer.status_code == 200
    sha256: str = answer.json()["model"]["sha256"]
    return sha256


def test_a_reload_may_be_the_request_that_starts_the_service(settings: Settings, png: bytes) -> None:
    app = create_app(settings)
    client = TestClient(app)  # without `with`: nothing runs the lifespan
    new = other_weights(settings.weights)
    assert reload(client).json()["changed"] is True
    assert served(client, png) == new
    asyncio.run(app.service.close())


def test_new_weights_answer_and_every_answer_names_them(
    client: TestClient, settings: Settings, old: str, png: bytes
) -> None:
    before = client.post("/predict", content=png).json()
    new = other_weights(settings.weights)
    assert served(client, png) == old != new  # the file alone changes nothing
    answer = reload(client)
    assert (answer.status_code, answer.json()) == (200, {"model": {"name": "net", "sha256": new}, "changed": True})
    after = client.post("/predict", content=png).json()
    assert after["model"]["sha256"] == new
    assert after["probabilities"] != before["probabilities"]
    assert client.post("/predict/batch", content=bytes(IMAGE_BYTES)).json()["model"]["sha256"] == new
    tensor = {"name": "pixels", "shape": [1, 32, 32, 3], "datatype": "UINT8", "data": [0] * IMAGE_BYTES}
    inferred = client.post("/v2/models/cifar/infer", json={"inputs": [tensor]}).json()
    assert inferred["parameters"]["weights_sha256"] == new


def test_the_report_is_that_of_the_new_weights(client: TestClient, settings: Settings) -> None:
    assert client.get("/metrics/per-class").status_code == 200
    new = other_weights(settings.weights, evaluation=random_evaluation(), trained={"recipe": "other"})
    reload(client)
    body = client.get("/metrics/per-class").json()
    assert (body["weights"]["sha256"][:12], body["trained"]) == (new, {"recipe": "other"})
    other_weights(settings.weights)
    reload(client)
    assert client.get("/metrics/per-class").status_code == 404  # those carry no figures


def test_the_same_file_again_changes_nothing(client: TestClient, old: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "app.service"):
        assert reload(client).json() == {"model": {"name": "net", "sha256": old}, "changed": False}
    assert caplog.messages == ["The weights file was read: it is the one being served."]


def nonsense(path: Path) -> None:
    path.write_bytes(b"not a network")


def overflowing(path: Path) -> None:
    given = random_checkpoint()
    for name, tensor in given.state_dict.items():
        if name.endswith("weight"):
            tensor.fill_(1e30)
    checkpoint.save(given, path)


def other_classes(path: Path) -> None:
    checkpoint.save(dataclasses.replace(random_checkpoint(), classes=(*CIFAR10_CLASSES[:9], "lorry")), path)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (Path.unlink, "There is no weights file"),
        (nonsense, "was refused: it is not a PyTorch file"),
        (overflowing, "these weights give logits that are not finite numbers, or too few."),
        (other_classes, "dog, frog, horse, ship, lorry; the weights being served are for plane, car"),
    ],
)
def test_a_file_that_cannot_be_used_leaves_the_old_weights_serving(
    client: TestClient, settings: Settings, old: str, png: bytes, spoil: Any, sentence: str
) -> None:
    spoil(settings.weights)
    answer = reload(client)
    assert answer.status_code == 409
    assert sentence in answer.json()["error"]
    assert answer.json()["error"].endswith(f"The weights {old} stay in service.")
    assert served(client, png) == old
    new = other_weights(settings.weights)  # and a good file is taken after a bad one
    assert reload(client).json()["model"]["sha256"] == new


@pytest.mark.parametrize(
    "headers",
    [{}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {KEY}"}, {"authorization": f"Bearer {KEY}{KEY}"}],
)
def test_a_missing_or_wrong_key_gives_401_and_changes_nothing(
    client: TestClient, settings: Settings, old: str, png: bytes, headers: dict[str, str]
) -> None:
    other_weights(settings.weights)
    answer = client.post("/admin/reload", headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"].startswith("The key is missing or wrong.")
    assert served(client, png) == old


def test_the_reload_route_does_not_exist_without_an_admin_key(settings: Settings) -> None:
    with TestClient(create_app(dataclasses.replace(settings, admin_key=None))) as client:
        assert reload(client).status_code == 404
        assert "/admin/reload" not in client.get("/openapi.json").json()["paths"]


def test_the_page_is_documented_where_it_exists(client: TestClient) -> None:
    operation = client.get("/openapi.json").json()["paths"]["/admin/reload"]["post"]
    assert set(operation["responses"]) == {"200", "401", "409", "500", "503"}
    assert operation["security"] == [{"HTTPBearer": []}]


@pytest.mark.parametrize("key", ["short", "with a space in it", "sixteen letters and möre"])
def test_a_short_or_malformed_key_is_refused(key: str) -> None:
    with pytest.raises(SettingsError, match="it must be at least 16 letters, digits or signs, without spaces"):
        parse_settings([], {"CIFAR_ADMIN_KEY": key})


def test_the_key_is_not_shown() -> None:
    settings = parse_settings([], {"CIFAR_ADMIN_KEY": KEY})
    assert settings.admin_key == KEY
    assert KEY not in repr(settings)


def test_a_waiting_request_is_answered_by_the_weights_it_was_admitted_under(
    client: TestClient, settings: Settings, old: str, monkeypatch: pytest.MonkeyPatch, png: bytes
) -> None:
    service: Service = client.app.service  # type: ignore[attr-defined]
    entered, gate = threading.Event(), threading.Event()
    predictor = service._served.predictor
    forward = predictor.estimate_each

    def held(items: Any) -> Any:
        entered.set()
        gate.wait()
        return forward(items)

    expected = client.post("/predict/batch", content=bytes(12 * IMAGE_BYTES)).json()
    monkeypatch.setattr(predictor, "estimate_each", held)
    answers: list[Response] = []
    many = threading.Thread(
        target=lambda: answers.append(client.post("/predict/batch", content=bytes(12 * IMAGE_BYTES)))
    )
    many.start()
    assert entered.wait(10)  # the first of three batches runs; the other two wait
    new = other_weights(settings.weights)
    reloaded: list[Response] = []
    reloading = threading.Thread(target=lambda: reloaded.append(reload(client)))
    reloading.start()
    gate.set()
    many.join()
    reloading.join()
    assert answers[0].json() == expected
    assert answers[0].json()["model"]["sha256"] == old
    assert reloaded[0].json()["model"]["sha256"] == new == served(client, png)


def test_no_request_fails_and_each_answer_fits_the_weights_it_names(
    client: TestClient, settings: Settings, old: str, png: bytes
) -> None:
    new = other_weights(settings.weights)
    expected = {
        sha256: client.post("/predict", content=png).json()["probabilities"]
        for sha256 in (old, new)
        if sha256 == old or reload(client).status_code == 200
    }
    content = settings.weights.read_bytes()
    answers: list[Response] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            answers.append(client.post("/predict", content=png))

    def exchange(sha256: str) -> None:
        assert reload(client).json()["model"]["sha256"] == sha256
        known = len(answers)
        while len(answers) < known + 10:  # some that were asked for after it
            time.sleep(0.001)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        checkpoint.save(random_checkpoint(evaluation=random_evaluation()), settings.weights)
        exchange(old)
        settings.weights.write_bytes(content)
        exchange(new)
    finally:  # or they would ask for ever
        stop.set()
        for thread in threads:
            thread.join()
    assert {answer.status_code for answer in answers} == {200}
    bodies = [answer.json() for answer in answers]
    assert {body["model"]["sha256"] for body in bodies} == {old, new}
    for body in bodies:
        assert body["probabilities"] == pytest.approx(expected[body["model"]["sha256"]], abs=0.005)


def test_an_evaluation_that_is_not_finished_starts_anew_with_the_new_weights(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = noise(5 * EVALUATION_BATCH)
    gate = threading.Event()

    def read(_folder: Path) -> Split:
        gate.wait()
        return split

    monkeypatch.setattr(data, "read_test", read)
    with TestClient(create_app(dataclasses.replace(settings, data=Path("anywhere")))) as client:
        new = other_weights(settings.weights, evaluation=random_evaluation())
        assert reload(client).status_code == 200
        gate.set()  # both evaluations could be made now
        eventually(lambda: client.get("/metrics/per-class").json()["source"] == "measured")
        body = client.get("/metrics/per-class").json()
        assert body["weights"]["sha256"][:12] == new
        predicted_N = checkpoint.load(settings.weights).network()(split.pixels_NCHW).argmax(dim=1)
        assert body["correct"] == pytest.approx(int((predicted_N == split.labels_N).sum()), abs=2)


@pytest.mark.anyio
async def test_a_stopped_service_refuses_to_reload(settings: Settings) -> None:
    service: Service = create_app(settings).service
    await service.start()
    other_weights(settings.weights)
    await service.close()
    with pytest.raises(NotReady):
        await service.reload()


@pytest.mark.anyio
async def test_a_failed_reload_raises_weights_refused(settings: Settings) -> None:
    service: Service = create_app(settings).service
    await service.start()
    settings.weights.unlink()
    with pytest.raises(WeightsRefused):
        await service.reload()
    await service.close()


def test_an_engine_that_computes_wrongly_is_refused_and_the_old_weights_go_on(
    client: TestClient, settings: Settings, old: str, png: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(SHIPPED, settings.weights)
    fold = model.fold

    def fold_wrongly(network: model.Normalized) -> model.Normalized:
        """As a conversion that mixes up a layer's channels would."""
        folded = fold(network)
        layer = [layer for layer in folded.modules() if isinstance(layer, nn.Conv2d)][2]
        layer.weight = nn.Parameter(layer.weight.flip(0))
        return folded

    monkeypatch.setattr(model, "fold", fold_wrongly)
    answer = reload(client)
    assert answer.status_code == 409
    assert answer.json()["error"].startswith(
        "The network computes wrongly here: it gives a drawing a probability that is "
    )
    assert answer.json()["error"].endswith(f"The weights {old} stay in service.")
    assert served(client, png) == old
    assert client.get("/readyz").status_code == 200
    monkeypatch.undo()
    assert reload(client).json()["changed"]  # the same file, when nothing is mixed up


@pytest.fixture
def wrong_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest engine mixes up its features."""
    found = pytest.importorskip("app.openvino_engine", reason="OpenVINO is not installed").OpenVinoEngine
    compute = found.__call__
    monkeypatch.setattr(found, "__call__", lambda self, pixels_NCHW: compute(self, pixels_NCHW).flip(1))
    monkeypatch.setattr(engine, "_cost", lambda each, _batch: 1.0 if each.name == "openvino" else 2.0)


@pytest.mark.usefixtures("wrong_openvino")
def test_an_engine_that_is_faster_but_wrong_is_not_taken(png: bytes, caplog: pytest.LogCaptureFixture) -> None:
    app = create_app(Settings(weights=SHIPPED, device="cpu", threads=1))
    with TestClient(app) as client:
        assert app.service.engine == "torch"
        assert client.post("/predict", content=png).status_code == 200
    assert "The engine openvino is not used. The network computes wrongly here: it gives a drawing" in caplog.text


@pytest.mark.usefixtures("wrong_openvino")
def test_an_engine_that_was_asked_for_is_not_replaced_by_another() -> None:
    app = create_app(Settings(weights=SHIPPED, device="cpu", engine="openvino", threads=1))
    with pytest.raises(CheckpointError, match="The network computes wrongly here"), TestClient(app):
        pass


def test_the_self_test_allows_for_rounding_and_for_nothing_more() -> None:
    expected_NK = torch.full((len(self_test.drawings()), 10), 0.1)
    self_test.check(lambda pixels_NCHW: expected_NK[: len(pixels_NCHW)] + 0.01, expected_NK)
    with pytest.raises(CheckpointError, match=r"a probability that is 0\.06 from the one that training put"):
        self_test.check(lambda pixels_NCHW: expected_NK[: len(pixels_NCHW)] + 0.06, expected_NK)


def test_the_self_test_refuses_answers_that_depend_on_the_batch() -> None:
    def centred(pixels_NCHW: torch.Tensor) -> torch.Tensor:
        """As a network in training mode does, by the statistics of the batch."""
        values_NK = pixels_NCHW.float().mean(dim=(2, 3))
        return (values_NK - values_NK.mean(dim=0)).softmax(dim=1)

    with pytest.raises(CheckpointError, match="different probabilities alone and in a batch"):
        self_test.check(centred)


def test_the_self_test_accepts_a_network_that_works() -> None:
    self_test.check(lambda pixels_NCHW: pixels_NCHW.float().mean(dim=(2, 3)).softmax(dim=1))
