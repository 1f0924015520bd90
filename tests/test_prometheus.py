"""GET /metrics and Server-Timing: every request is counted once, under a label that exists, wherever it ended."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import encode, occupied
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image
from prometheus_client import generate_latest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import Message, Receive, Scope, Send

from app.admission import Limits
from app.batching import Batcher, Building
from app.entries import Answer
from app.errors import BadRequest
from app.exposition import CountsCollector
from app.logs import QUIET
from app.main import create_app
from app.model import IMAGE_BYTES
from app.predictor import Predictor
from app.routes.waiting import all_unless_left
from app.service import Service
from app.settings import Settings
from app.statistics import Histogram, Predictions, Timing

PNG = {"content-type": "image/png"}


class Metrics:
    """What a scrape said."""

    def __init__(self, text: str) -> None:
        self.samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def of(self, name: str, *labels: str) -> dict[Any, float]:
        """The samples of that name by the values of their labels."""
        found = (sample for sample in self.samples if sample.name == name)
        return {tuple(sample.labels[label] for label in labels): sample.value for sample in found}

    def one(self, name: str) -> float:
        ((_, value),) = self.of(name).items()
        return value


def scrape(client: TestClient) -> Metrics:
    response = client.get("/metrics")
    assert response.status_code == 200
    return Metrics(response.text)


def labels_of_requests(metrics: Metrics) -> dict[tuple[str, str, str], float]:
    return metrics.of("cifar_requests_total", "method", "route", "status")


def noise(width: int, height: int) -> bytes:
    """A picture that hardly compresses."""
    return encode(Image.effect_noise((width, height), 100).convert("RGB"))


def test_the_dashboard_queries_only_existing_metrics_labels_and_routes(client: TestClient, png: bytes) -> None:
    answering = ("/predict", "/predict/batch", "/v2/models/cifar/infer", "/v2/models/cifar/versions/1/infer")
    for path in answering:
        client.post(path, content=png, headers=PNG)
    for path in ("/healthz", "/metrics", "/v2/models/cifar"):
        client.get(path)
    metrics = scrape(client)
    routes = {route for route, _ in metrics.of("cifar_requests_total", "route", "status")}
    known: dict[str, set[str]] = {}
    for sample in metrics.samples:
        known.setdefault(sample.name, {"job", "instance"}).update(sample.labels)  # Prometheus adds those two
    dashboard = json.loads((Path(__file__).parent.parent / "app" / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(queries) >= len(dashboard["panels"]) > 0
    for query in queries:
        names = set(re.findall(r"cifar_\w+", query))
        assert names, query
        assert names <= known.keys(), query
        labels = set(", ".join(re.findall(r"(?:by|on|group_left) \((.*?)\)", query)).split(", "))
        assert labels - {""} <= set().union(*(known[name] for name in names)), query
        for asked in re.findall(r'route=~"(.*?)"', query):
            assert {route for route in routes if re.fullmatch(asked, route)} == set(answering)


def test_each_request_is_counted_once_under_its_route(client: TestClient, png: bytes) -> None:
    for _ in range(3):
        client.post("/predict", content=png, headers=PNG)
    client.post("/predict?top_k=2&resize=pad", content=png, headers=PNG)
    client.post("/predict", content=b"abc", headers=PNG)
    client.post("/predict?top_k=0", content=png, headers=PNG)
    client.post("/predict", content=b"x" * 200_001, headers=PNG)
    client.post("/predict", content=b"{}", headers={"content-type": "application/json"})
    client.get("/predict")
    client.request("BREW", "/predict")
    for scanned in ("/wp-login.php", "/.env", "/predict/../etc/passwd", "/metricsx", "/v2/models/cifarx"):
        client.get(scanned)
    for model in ("a", "b"):
        client.post(f"/v2/repository/models/{model}/load")
    client.post("/v2/models/cifar/infer", content=b"{}")
    client.get("/static/docs.js")
    client.get("/static/nothing.js")
    client.get("/openapi.json")
    client.get("/healthz")
    assert client.get("/metrics/per-class").json()["classes"]
    metrics = scrape(client)
    assert labels_of_requests(metrics) == {
        ("POST", "/predict", "200"): 4,
        ("POST", "/predict", "400"): 1,
        ("POST", "/predict", "422"): 1,
        ("POST", "/predict", "413"): 1,
        ("POST", "/predict", "415"): 1,
        ("GET", "/predict", "405"): 1,
        ("OTHER", "/predict", "405"): 1,
        ("GET", "unmatched", "404"): 5,
        ("POST", "/v2/repository/models/{rest:path}", "501"): 2,
        ("POST", "/v2/models/cifar/infer", "400"): 1,
        ("GET", "/static", "200"): 1,
        ("GET", "/static", "404"): 1,
        ("GET", "/openapi.json", "200"): 1,
        ("GET", "/healthz", "200"): 1,
        ("GET", "/metrics/per-class", "200"): 1,
    }
    assert metrics.of("cifar_refusals_total", "reason") == {
        ("bad_request",): 2,
        ("invalid_parameter",): 1,
        ("body_too_large",): 1,
        ("unsupported_media",): 1,
        ("method_not_allowed",): 2,
        ("not_found",): 6,
        ("not_offered",): 2,
    }
    by_route: dict[Any, float] = {}
    for (_, route, _), count in labels_of_requests(metrics).items():
        by_route[route,] = by_route.get((route,), 0) + count
    assert metrics.of("cifar_request_seconds_count", "route") == by_route
    assert labels_of_requests(scrape(client))["GET", "/metrics", "200"] == 1  # the scrape before


def test_the_histograms_have_one_value_for_each_picture_and_batch(client: TestClient, png: bytes) -> None:
    answers = [client.post("/predict", content=png, headers=PNG).json() for _ in range(5)]
    client.post("/predict", content=b"abc", headers=PNG)  # never ran
    metrics = scrape(client)
    for part in ("decode", "queue", "inference"):
        assert metrics.one(f"cifar_{part}_seconds_count") == 5
        assert metrics.one(f"cifar_{part}_seconds_sum") > 0
    assert metrics.of("cifar_batch_size_bucket", "le")[("1.0",)] == 5
    assert metrics.one("cifar_batch_size_sum") == 5
    predictions = {name: count for (name,), count in metrics.of("cifar_predictions_total", "class").items()}
    assert list(predictions) == list(answers[0]["probabilities"])
    assert predictions[answers[0]["label"]] == 5 == sum(predictions.values())
    assert metrics.one("cifar_confidence_count") == 5
    assert metrics.one("cifar_confidence_sum") == pytest.approx(sum(answer["confidence"] for answer in answers))
    assert metrics.of("cifar_weights_info", "name", "sha256") == {tuple(answers[0]["model"].values()): 1}
    assert (metrics.one("cifar_ready"), metrics.one("cifar_queue_depth")) == (1, 0)


def test_each_picture_of_a_batch_counts_as_a_prediction(client: TestClient) -> None:
    client.post("/predict/batch", content=bytes(11 * IMAGE_BYTES), headers={"content-type": "application/octet-stream"})
    metrics = scrape(client)
    assert metrics.one("cifar_confidence_count") == 11
    assert metrics.one("cifar_batch_size_sum") == 11
    assert metrics.one("cifar_inference_seconds_count") == 3  # 4 + 4 + 3, each admitted as one


def test_queue_depth_readiness_and_overload_are_exported(settings: Settings, png: bytes) -> None:
    app = create_app(Settings(weights=settings.weights, device="cpu", threads=1, max_waiting=1))
    with TestClient(app) as client, occupied(app.service):
        assert client.post("/predict", content=png, headers=PNG).status_code == 429
        app.service.draining = True
        metrics = scrape(client)
    assert (metrics.one("cifar_queue_depth"), metrics.one("cifar_ready")) == (1, 0)
    assert metrics.of("cifar_refusals_total", "reason") == {("overloaded",): 1}
    assert metrics.one("cifar_decode_seconds_count") == 0


@pytest.mark.parametrize("path", ["/predict", "/predict?top_k=1"])
def test_a_defect_is_counted(client: TestClient, png: bytes, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(Predictor, "estimate", broken)
    client.post(path, content=png, headers=PNG)
    metrics = scrape(client)
    assert labels_of_requests(metrics) == {("POST", "/predict", "500"): 1}
    assert metrics.of("cifar_refusals_total", "reason") == {("defect",): 1}
    assert metrics.one("cifar_confidence_count") == 0


async def leave(app: FastAPI, *messages: dict[str, object]) -> None:
    """Send these to /predict, then close the connection."""
    incoming = iter([*messages, {"type": "http.disconnect"}])

    async def receive() -> Any:
        return next(incoming)

    async def send(_message: Any) -> None:
        raise AssertionError("somebody was answered")

    scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"", "headers": []}
    await app(scope, receive, send)


@pytest.mark.anyio
async def test_a_client_that_left_counts_as_499(
    settings: Settings, png: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(settings)
    service: Service = app.service

    def never(*_args: object) -> "asyncio.Future[object]":
        return asyncio.get_running_loop().create_future()

    monkeypatch.setattr(service, "predict", never)
    await leave(app, {"type": "http.request", "body": png[:10], "more_body": True})
    await leave(app, {"type": "http.request", "body": png, "more_body": False})
    metrics = Metrics(generate_latest(CountsCollector(app.count(), service.checkpoint)).decode())
    assert labels_of_requests(metrics) == {("POST", "/predict", "499"): 2}
    assert metrics.of("cifar_request_seconds_count", "route") == {("/predict",): 2}
    assert metrics.of("cifar_refusals_total", "reason") == {}


def test_each_application_counts_for_itself(settings: Settings) -> None:
    with TestClient(create_app(settings)) as one, TestClient(create_app(settings)) as other:
        one.get("/healthz")
        assert ("GET", "/healthz", "200") in labels_of_requests(scrape(one))
        assert labels_of_requests(scrape(other)) == {}


def test_both_text_formats(client: TestClient) -> None:
    plain = client.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain; version=")
    names = {family.name for family in text_string_to_metric_families(plain.text)}
    asked = {"accept": "application/openmetrics-text; version=1.0.0"}
    newer = client.get("/metrics", headers=asked)
    assert newer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    families = list(openmetrics.text_string_to_metric_families(newer.text))  # type: ignore[no-untyped-call]
    assert "cifar_requests" in names & {family.name for family in families}
    assert all(family.documentation for family in families)


def test_an_unknown_format_version_gets_plain_text(client: TestClient) -> None:
    answer = client.get("/metrics", headers={"accept": "application/openmetrics-text; version=abc"})
    assert answer.headers["content-type"].startswith("text/plain; version=")


def test_the_routes_that_are_not_logged_exist(client: TestClient) -> None:
    for path in QUIET:
        assert client.get(path).status_code == 200
    assert {(method, route) for method, route, _ in labels_of_requests(scrape(client))} == {
        ("GET", path) for path in QUIET
    }


def test_route_labels_are_the_same_below_a_mount(settings: Settings, png: bytes) -> None:
    app = create_app(settings)

    @asynccontextmanager
    async def lifespan(_outer: FastAPI) -> AsyncIterator[None]:
        async with app.router.lifespan_context(app):
            yield

    async def mounted(scope: Scope, receive: Receive, send: Send) -> None:
        scope["route"] = outer.routes[-1]  # as older versions of FastAPI do
        await app(scope, receive, send)

    outer = FastAPI(lifespan=lifespan)
    outer.mount("/ml", mounted)
    with TestClient(outer) as client:
        assert client.post("/ml/predict", content=png, headers=PNG).status_code == 200
        for path in ("/ml/nothing", "/ml/openapi.json", "/ml/static/docs.js"):
            client.get(path)
        assert set(labels_of_requests(Metrics(client.get("/ml/metrics").text))) == {
            ("POST", "/predict", "200"),
            ("GET", "unmatched", "404"),
            ("GET", "/openapi.json", "200"),
            ("GET", "/static", "200"),
        }


def parse(header: str) -> dict[str, float]:
    found = re.fullmatch(r"(\w+;dur=\d+\.\d\d(?:, |$))+", header)
    assert found, header
    return {name: float(value) for name, value in re.findall(r"(\w+);dur=([\d.]+)", header)}


@pytest.mark.parametrize("path", ["/predict", "/predict?resize=crop"])
@pytest.mark.parametrize("large", [False, True])
def test_server_timing_explains_the_answer(client: TestClient, png: bytes, path: str, large: bool) -> None:
    resized = noise(200, 200) if "resize" in path else noise(32, 32) + bytes(100_000)  # trailing bytes are ignored
    body = resized if large else png
    response = client.post(path, content=body, headers=PNG)
    assert response.status_code == 200
    parts = parse(response.headers["server-timing"])
    total = parts.pop("total")
    assert list(parts) == ["queue", "decode", "inference"]
    assert sum(parts.values()) <= total + 0.02  # four numbers, rounded to hundredths
    metrics = scrape(client)
    for part, milliseconds in parts.items():
        assert milliseconds == pytest.approx(1e3 * metrics.one(f"cifar_{part}_seconds_sum"), abs=0.006)
    assert min(parts["decode"], parts["inference"]) > 0


@pytest.mark.anyio
async def test_the_timing_of_several_pictures_is_that_of_the_slowest() -> None:
    loop = asyncio.get_running_loop()
    answers: list[Answer[str]] = [Answer(loop=loop) for _ in range(3)]
    answers[0].timing, answers[1].timing = Timing(5.0, 1.0, 2.0), Timing(0.0, 8.0, 1.0)
    answers[0].set_result("first")
    answers[1].set_result("second")
    answers[2].set_exception(unreadable := BadRequest("It was never run."))
    outcomes, timing = await all_unless_left(unused, answers, deadline_seconds=5)
    assert outcomes == ["first", "second", unreadable]
    assert timing == Timing(0.0, 8.0, 1.0)
    assert await all_unless_left(unused, answers[2:], deadline_seconds=5) == ([unreadable], None)


async def unused() -> Message:
    raise AssertionError("The client is watched only while there is something to wait for.")


def test_answers_for_several_pictures_have_a_timing(client: TestClient, png: bytes) -> None:
    batch = client.post("/predict/batch", files=[("files", png), ("files", b"no picture")])
    infer = client.post("/v2/models/cifar/infer", content=png, headers={"inference-header-content-length": "0"})
    for response in (batch, infer):
        parts = parse(response.headers["server-timing"])
        assert list(parts) == ["queue", "decode", "inference", "total"]
        assert 0 < parts["inference"] < parts["total"]
    assert "server-timing" not in client.post("/predict/batch", files={"files": b"no picture"}).headers


def test_responses_without_a_prediction_have_no_server_timing(client: TestClient) -> None:
    for response in (client.post("/predict", content=b"abc", headers=PNG), client.get("/healthz")):
        assert "server-timing" not in response.headers


@pytest.mark.anyio
async def test_timing_parts_are_measured_per_item(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that ticks each time it is read, so that the parts can be told apart."""
    ticks = iter(range(1000))
    for module in ("batching", "entries"):
        monkeypatch.setattr(f"app.{module}.monotonic", lambda: float(next(ticks)))
    batcher: Batcher[int, int, int] = Batcher(
        prepare=lambda item: next(ticks) and item,
        limits=Limits(max_batch=4, max_waiting=9, max_waiting_bytes=9, deadline_seconds=99),
    )

    def building() -> Building[int, int]:
        yield
        return lambda items: [next(ticks) and item for item in items]

    batcher.start(building())
    future = batcher.submit(1, 1, light=True)
    await future
    batcher.close()
    statistics = batcher.statistics
    assert (future.timing.prepare_seconds, future.timing.run_seconds) == (2, 2)
    assert sum(future.timing) == statistics.success.sum - 1  # the hand-over back to the event loop
    assert (statistics.queue.sum, statistics.prepare.sum, statistics.run.sum) == future.timing


def test_histogram_bounds_are_inclusive() -> None:
    histogram = Histogram((1.0, 2.0))
    histogram.extend([0.5, 1.0, 1.5, 2.0])
    histogram.add(7.0)
    assert (histogram.counts, histogram.count, histogram.sum) == ([2, 2, 1], 5, 12.0)
    histogram.merge(histogram)
    assert (histogram.counts, histogram.count, histogram.sum) == ([4, 4, 2], 10, 24.0)


def test_predictions_are_counted_by_name() -> None:
    predictions = Predictions()
    predictions.record([[0.75, 0.25], [0.125, 0.875], [0.25, 0.75]], ("cat", "dog"))
    predictions.record([[1.0, 0.0]], ("frog", "dog"))
    assert predictions.classes == {"cat": 1, "dog": 2, "frog": 1}
    assert (predictions.confidence.count, predictions.confidence.sum) == (4, 3.375)
