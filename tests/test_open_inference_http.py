"""/v2 at the edge: paths, headers, statuses and the shape of every error."""

import asyncio
import contextlib
import gc
import gzip
import json
import struct
import threading
import tomllib
import weakref
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from conftest import drawing, encode, occupied
from fastapi.testclient import TestClient
from running import ROOT
from starlette.requests import ClientDisconnect
from starlette.types import Message

from app import images
from app.admission import USUAL_BATCH
from app.errors import DeadlineExceeded
from app.exchange import LIGHT_BYTES
from app.main import create_app
from app.open_inference.request import Inference, decode
from app.routes import open_inference, waiting
from app.routes.waiting import unless_left
from app.settings import Settings

INFER = "/v2/models/cifar/infer"
LENGTH = "inference-header-content-length"
PIXELS = drawing().tobytes()


def request(count: int = 1, **parameters: Any) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a request with binary pixels and an answer in JSON."""
    tensor = {
        "name": "pixels",
        "shape": [count, 32, 32, 3],
        "datatype": "UINT8",
        "parameters": {"binary_data_size": count * 3072},
    }
    text = json.dumps({"inputs": [tensor], "parameters": parameters}).encode()
    return text + PIXELS * count, {LENGTH: str(len(text))}


def request_of_pictures(*pictures: bytes, **parameters: Any) -> tuple[bytes, dict[str, str]]:
    """The same with encoded ones."""
    tail = b"".join(struct.pack("<I", len(each)) + each for each in pictures)
    tensor = {
        "name": "image",
        "shape": [len(pictures)],
        "datatype": "BYTES",
        "parameters": {"binary_data_size": len(tail)},
    }
    text = json.dumps({"inputs": [tensor], "parameters": parameters}).encode()
    return text + tail, {LENGTH: str(len(text))}


def infer(client: TestClient, body: bytes, headers: dict[str, str], path: str = INFER) -> Any:
    return client.post(path, content=body, headers=headers)


def outputs(response: Any) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    return {output["name"]: output["data"] for output in response.json()["outputs"]}


def refused(response: Any, status: int, sentence: str) -> None:
    """Every error under /v2 has `error` at the top, which is all that a client looks for."""
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    assert sentence in response.json()["error"]


@pytest.mark.parametrize("path", ["/v2", "/v2/"])
def test_the_server_is_described_with_and_without_a_slash(client: TestClient, path: str) -> None:
    response = client.get(path, follow_redirects=False)
    assert response.status_code == 200
    assert set(response.json()) == {"name", "version", "extensions"}


def test_the_version_is_that_of_the_package(client: TestClient) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert client.get("/v2").json()["version"] == client.get("/openapi.json").json()["info"]["version"] == version


def test_live_and_ready_have_bodies(client: TestClient) -> None:
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True, "live": True}
    assert client.get("/v2/models/cifar/ready").json() == {"name": "cifar", "ready": True}
    assert client.get("/v2/models/cifar/versions/1/ready").json() == {"name": "cifar", "ready": True}
    assert client.get("/v2/models").json() == {"models": ["cifar"]}


def test_a_stopping_service_is_live_but_not_ready(client: TestClient) -> None:
    client.app.service.draining = True  # type: ignore[attr-defined]
    for path in ("/v2/health/ready", "/v2/models/cifar/ready"):
        response = client.get(path)
        refused(response, 503, "The service is stopping.")
        assert response.headers["retry-after"] == "1"
    assert client.get("/v2/health/live").status_code == 200
    (model,) = client.post("/v2/repository/index").json()
    assert (model["state"], model["reason"]) == ("UNAVAILABLE", "stopping")
    assert outputs(infer(client, *request()))["label"]  # and still answers


def test_the_statistics_have_three_paths(client: TestClient) -> None:
    infer(client, *request(3))
    known = client.get("/v2/models/stats").json()
    assert known["model_stats"][0]["inference_count"] == 3
    assert client.get("/v2/models/cifar/stats").json() == known
    assert client.get("/v2/models/cifar/versions/1/stats").json() == known


@pytest.mark.parametrize("path", [INFER, "/v2/models/cifar/versions/1/infer", f"{INFER}?resize=pad"])
@pytest.mark.parametrize("content_type", ["application/octet-stream", "application/json", "text/plain", "x"])
def test_the_content_type_does_not_matter(client: TestClient, path: str, content_type: str) -> None:
    body, headers = request()
    response = infer(client, body, headers | {"content-type": content_type}, path)
    assert response.headers["content-type"] == "application/json"
    assert LENGTH not in response.headers
    expected = client.post("/predict", content=encode(drawing()), headers={"content-type": "image/png"}).json()
    answer = outputs(response)
    assert answer["probabilities"] == pytest.approx(list(expected["probabilities"].values()), abs=1e-6)
    assert (answer["label"], answer["class_id"]) == ([expected["label"]], [expected["class_id"]])
    assert response.json()["parameters"] == {"weights_sha256": expected["model"]["sha256"]}


def test_a_picture_without_any_json(client: TestClient, png: bytes) -> None:
    """curl -H 'Inference-Header-Content-Length: 0' --data-binary @picture.png"""
    response = infer(client, png, {LENGTH: "0"})
    assert response.headers["content-type"] == "application/octet-stream"
    text = json.loads(response.content[: int(response.headers[LENGTH])])
    tail = response.content[int(response.headers[LENGTH]) :]
    assert [output["name"] for output in text["outputs"]] == ["probabilities", "label", "class_id", "familiarity"]
    assert sum(output["parameters"]["binary_data_size"] for output in text["outputs"]) == len(tail)
    probabilities, (class_id,) = struct.unpack("<10f", tail[:40]), struct.unpack("<q", tail[-12:-4])
    assert probabilities.index(max(probabilities)) == class_id

    response = infer(client, png, {LENGTH: "0", "accept": "Application/JSON"})
    assert response.headers["content-type"] == "application/json"
    assert outputs(response)["class_id"] == [class_id]


@pytest.mark.parametrize(
    ("encoding", "compress"),
    [("gzip", gzip.compress), ("x-gzip", gzip.compress), ("X-GZIP", gzip.compress), ("deflate", zlib.compress)],
)
def test_a_compressed_request(client: TestClient, encoding: str, compress: Any) -> None:
    """The length of the JSON is the one without compression."""
    body, headers = request(4)
    response = infer(client, compress(body), headers | {"content-encoding": encoding})
    assert len(outputs(response)["label"]) == 4


def test_a_decompression_bomb_is_refused(client: TestClient) -> None:
    response = infer(client, gzip.compress(bytes(50_000_000)), {"content-encoding": "gzip"})
    refused(response, 413, "too large when decompressed; the limit is 200,000 bytes")


def test_an_unsupported_encoding_is_refused_naming_those_accepted(client: TestClient) -> None:
    response = infer(client, b"", {"content-encoding": "br"})
    refused(response, 415, "content encoding 'br'; it must be gzip or deflate")
    assert response.headers["accept-encoding"] == "gzip, deflate"


def test_a_body_not_in_its_declared_encoding_is_refused(client: TestClient) -> None:
    refused(infer(client, b"{}", {"content-encoding": "gzip"}), 400, "not in the content encoding 'gzip'")


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_long_answer_is_compressed_if_the_client_asks(client: TestClient, encoding: str) -> None:
    body, headers = request(40)
    response = infer(client, body, headers | {"accept-encoding": encoding})
    assert response.headers["content-encoding"] == encoding
    assert len(outputs(response)["label"]) == 40  # httpx has inflated it
    assert "content-encoding" not in infer(client, body, headers | {"accept-encoding": "identity"}).headers


def test_nothing_else_is_compressed(client: TestClient) -> None:
    """The asyncio client always asks, and cannot read a compressed error or description."""
    asks = {"accept-encoding": "gzip"}
    responses = [client.get(path, headers=asks) for path in ("/v2", "/v2/models/cifar", "/v2/models/stats", "/v2/x")]
    responses.append(infer(client, b"x" * 5000, asks))
    responses.append(infer(client, *request()))  # too short to gain from it
    assert not any("content-encoding" in response.headers for response in responses)


def test_an_unreadable_element_fails_the_request_and_is_named(client: TestClient, png: bytes) -> None:
    response = infer(client, *request_of_pictures(png, png, png[:50], png))
    refused(response, 400, "Input 'image', element 2: The 50 bytes are not a readable picture")
    assert response.json()["detail"] == {"input": "image", "index": 2}


def test_an_element_of_the_wrong_size_keeps_its_details(client: TestClient) -> None:
    response = infer(client, *request_of_pictures(encode(drawing(40, 30))))
    refused(response, 400, "Input 'image', element 0: The picture is 40 x 30")
    assert response.json()["detail"] == {"input": "image", "index": 0, "width": 40, "height": 30, "expected": [32, 32]}


def test_two_lines_of_a_header_count_as_one(client: TestClient, png: bytes) -> None:
    lines = [(LENGTH, "5"), (LENGTH, "0"), ("accept", "application/json"), ("accept", "text/html")]  # the last length
    assert client.post(INFER, content=png, headers=lines).headers["content-type"] == "application/json"


def test_a_full_queue_gives_429(client: TestClient) -> None:
    with occupied(client.app.service, 2048):  # type: ignore[attr-defined]
        response = infer(client, *request())
    refused(response, 429, "The service has as much work as it accepts (pictures waiting: 2,048).")
    assert int(response.headers["retry-after"]) >= 1


def test_the_timeout_of_a_request_is_in_microseconds(client: TestClient, png: bytes) -> None:
    for make in (request, partial(request_of_pictures, png)):
        refused(infer(client, *make(timeout=1)), 504, "waited longer than 0.000001 seconds for its turn")
        assert outputs(infer(client, *make(timeout=60_000_000)))


def test_many_raw_pixels_run_in_batches_of_the_usual_size(settings: Settings) -> None:
    """Larger ones would hold up a single picture for longer."""
    with TestClient(create_app(replace(settings, max_batch=128, max_body_bytes=400_000))) as client:
        assert len(outputs(infer(client, *request(3 * USUAL_BATCH + 4)))["label"]) == 100
        (stats,) = client.get("/v2/models/stats").json()["model_stats"]
        assert (stats["inference_count"], stats["execution_count"]) == (100, 4)


def test_more_pictures_than_max_pictures_are_refused(settings: Settings) -> None:
    with TestClient(create_app(replace(settings, max_pictures=2))) as client:
        refused(infer(client, *request(3)), 413, "Input 'pixels' has 3 pictures; the limit for one request is 2")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models/resnet", 404),
        ("POST", "/v2/models/resnet/infer", 404),
        ("GET", "/v2/models/cifar/versions/99", 404),
        ("GET", "/v2/models/cifar/versions/99/ready", 404),
        ("GET", INFER, 405),
        ("GET", "/v2/repository/index", 405),
        ("POST", f"{INFER}?resize=bend", 422),
        ("POST", INFER, 400),
        ("POST", "/v2/repository/models/cifar/load", 501),
        ("GET", "/v2/systemsharedmemory/status", 501),
        ("POST", "/v2/cudasharedmemory/region/r/register", 501),
        ("GET", "/v2/trace/setting", 501),
        ("POST", "/v2/models/cifar/trace/setting", 501),
        ("GET", "/v2/logging", 501),
    ],
)
def test_every_error_has_the_shape_of_the_protocol(client: TestClient, method: str, path: str, status: int) -> None:
    refused(client.request(method, path), status, " ")


@pytest.mark.anyio
async def test_a_disconnect_before_the_answer_cancels_it() -> None:
    async def receive() -> Message:
        return {"type": "http.disconnect"}

    answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    with pytest.raises(ClientDisconnect):
        await unless_left(receive, answer, 60)
    assert answer.cancelled()


class Body:
    """Can be weakly referenced."""


@pytest.mark.anyio
async def test_nothing_is_kept_of_a_disconnected_client() -> None:
    """Not even until a garbage collection: a busy server has no time."""

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def answer(_body: Body) -> None:
        await unless_left(receive, asyncio.get_running_loop().create_future(), 60)

    body = Body()
    kept = weakref.ref(body)
    gc.disable()
    try:
        with contextlib.suppress(ClientDisconnect):
            await answer(body)
        del body
        await asyncio.sleep(0)  # Python 3.13 holds what a task was woken with until its next wait
        assert kept() is None
    finally:
        gc.enable()


@pytest.mark.anyio
async def test_waiting_too_long_for_a_stuck_answer_raises_deadline_exceeded() -> None:
    async def receive() -> Message:
        return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]

    answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    with pytest.raises(DeadlineExceeded, match=r"took longer than 0\.1 seconds"):
        await asyncio.wait_for(unless_left(receive, answer, 0.1), 60)
    assert answer.cancelled()


@pytest.mark.anyio
async def test_the_disconnect_watch_ends_with_the_answer() -> None:
    answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def receive() -> Message:
        answer.set_result(42)
        return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]

    tasks = asyncio.all_tasks()
    assert await unless_left(receive, answer, 60) == 42
    await asyncio.sleep(0.01)
    assert asyncio.all_tasks() == tasks


@pytest.mark.anyio
async def test_a_client_answered_at_once_is_not_watched_for_disconnect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "PATIENCE_SECONDS", 0.0)
    answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    answer.set_result(42)
    received: list[str] = []

    async def receive() -> Message:
        received.append("too late")
        return {"type": "http.disconnect"}

    assert await unless_left(receive, answer, 60) == 42
    await asyncio.sleep(0.01)
    assert received == []


@pytest.mark.parametrize(("count", "aside"), [(1, False), (8, True)])
@pytest.mark.parametrize("measured", [False, True])
def test_large_json_is_not_parsed_on_the_event_loop(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, count: int, aside: bool, measured: bool
) -> None:
    threads: dict[str, int] = {}
    run = open_inference._run

    def spy_decode(*given: Any, **options: Any) -> Any:
        threads["decode"] = threading.get_ident()
        return decode(*given, **options)

    async def spy_event_loop(*given: Any) -> Any:
        threads["event loop"] = threading.get_ident()
        return await run(*given)

    monkeypatch.setattr(open_inference, "decode", spy_decode)
    monkeypatch.setattr(open_inference, "_run", spy_event_loop)
    tensor = {"name": "pixels", "shape": [count, 32, 32, 3], "datatype": "UINT8", "data": [*PIXELS * count]}
    body = json.dumps({"inputs": [tensor]}).encode()
    headers = {LENGTH: str(len(body)), "accept": "application/json"} if measured else {}
    assert len(outputs(infer(client, body, headers))["label"]) == count
    assert (threads["decode"] != threads["event loop"]) is aside


@pytest.mark.parametrize(("size_bytes", "aside"), [(LIGHT_BYTES, False), (LIGHT_BYTES + 1, True)])
def test_a_large_picture_is_not_decoded_on_the_event_loop(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, png: bytes, size_bytes: int, aside: bool
) -> None:
    threads: list[str] = []
    decode = images.decode

    def spy(*given: Any) -> bytes:
        threads.append(threading.current_thread().name)
        return decode(*given)

    monkeypatch.setattr(images, "decode", spy)
    picture = png.ljust(size_bytes, b"\0")
    assert outputs(infer(client, picture, {LENGTH: "0", "accept": "application/json"}))
    assert [name == "decode" for name in threads] == [aside]


def test_bodies_waiting_to_be_parsed_count_towards_max_waiting_bytes(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = json.dumps({"inputs": [], "padding": " " * open_inference.LITTLE_JSON_BYTES}).encode()
    reading, read_on = threading.Event(), threading.Event()

    def slowly(*arguments: Any, **options: Any) -> Inference:
        reading.set()
        assert read_on.wait(60)
        return decode(*arguments, **options)

    monkeypatch.setattr(open_inference, "decode", slowly)
    app = create_app(replace(settings, max_waiting_bytes=len(body) + 100))
    with TestClient(app) as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, INFER, content=body)
        assert reading.wait(60)
        refused(client.post(INFER, content=body), 429, "The service is receiving as many bytes as it accepts at once.")
        read_on.set()
        refused(first.result(), 400, "it must have exactly one")
        refused(client.post(INFER, content=body), 400, "it must have exactly one")
