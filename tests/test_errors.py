"""One body for every error, the right status, a helpful sentence; and no internals leak."""

import asyncio
import gc
import gzip
import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from conftest import drawing, encode, occupied
from fastapi.exceptions import RequestValidationError
from fastapi.testclient import TestClient
from starlette.types import Message

from app import boundary, entries, errors
from app.application import Application
from app.errors import Overloaded, RequestError, TooSlow, WeightsRefused
from app.exchange import Intake, error_reply
from app.main import create_app
from app.predictor import Predictor
from app.service import Service
from app.settings import Settings

OCTETS = {"content-type": "application/octet-stream"}


def refused(response: Any, status: int, sentence: str) -> dict[str, Any]:
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    body: dict[str, Any] = response.json()
    assert list(body) == ["error", "detail", "request_id"]
    assert body["request_id"] == response.headers["x-request-id"]
    assert sentence in body["error"]
    return body


def form(*fields: tuple[str, bytes], end: bytes = b"--x--\r\n") -> bytes:
    parts = (
        b'--x\r\nContent-Disposition: form-data; name="%s"; filename="a"\r\n\r\n%s\r\n' % (name.encode(), content)
        for name, content in fields
    )
    return b"".join(parts) + end


@pytest.mark.parametrize(
    ("path", "body", "content_type", "status", "sentence"),
    [
        ("/predict", b"", "image/png", 400, "The picture is empty. Send it as the body, or in"),
        ("/predict", b"abc", "image/png", 400, "The 3 bytes are not a readable picture"),
        ("/predict", b"abc", "multipart/form-data", 400, "The multipart body is malformed or cut short."),
        ("/predict", b"abc", "multipart/form-data; boundary=x", 400, "The multipart body is malformed"),
        ("/predict", form(("file", b"a"), end=b""), "multipart/form-data; boundary=x", 400, "malformed or cut short"),
        (
            "/predict",
            form(("file", b"")),
            "multipart/form-data; boundary=x",
            400,
            "The picture is empty. Send it as the body, or in",
        ),
        (
            "/predict",
            form(("picture", b"a"), ("b", b"")),
            "multipart/form-data; boundary=x",
            400,
            "exactly one field 'file' with the picture; its fields are: 'picture', 'b'.",
        ),
        ("/predict", form(("file", b"a"), ("file", b"b")), "multipart/form-data; boundary=x", 400, "exactly one field"),
        ("/predict", form(*[("a", b"")] * 40), "multipart/form-data; boundary=x", 400, "more than 32 fields"),
        ("/predict", b"a=b", "application/x-www-form-urlencoded", 400, "The 3 bytes are not a readable picture"),
        ("/predict", b"{}", "application/json", 415, "The body has the content type 'application/json'. Send"),
        ("/predict", encode(drawing(40, 40)), "image/png", 422, "The picture is 40 x 40; the network takes 32 x 32."),
        (
            "/predict?resize=zoom",
            b"",
            "image/png",
            422,
            "The parameter resize is 'zoom'; it must be 'crop',",
        ),
        (
            "/predict?top_k=0",
            b"",
            "image/png",
            422,
            "The parameter top_k is '0'; it must be a number of at least 1.",
        ),
        ("/predict?top_k=" + "9" * 5000, b"", "image/png", 422, "9...9999"),
        ("/predict?top_k=many", b"", "image/png", 422, "The parameter top_k is 'many'; it must be a whole number."),
        ("/" + "x" * 5000, b"", "image/png", 404, "There is nothing at /" + "x" * 199 + ". The page"),
        ("/nowhere", b"", "image/png", 404, "There is nothing at /nowhere. The page /docs lists all paths."),
        ("/static/nothing.js", b"", "image/png", 405, "does not take POST"),
        ("/healthz", b"", "image/png", 405, "/healthz does not take POST; it takes GET, HEAD."),
    ],
)
def test_refusals(client: TestClient, path: str, body: bytes, content_type: str, status: int, sentence: str) -> None:
    response = client.post(path, content=body, headers={"content-type": content_type})
    refused(response, status, sentence)
    assert "retry-after" not in response.headers  # the same request would be refused again


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/predict", 400),
        ("/predict?top_k=1", 400),
        ("/predict?top_k=0", 422),
        ("/predict/batch", 400),
        ("/v2/models/cifar/infer", 400),
    ],
)
def test_a_refusal_is_forgotten_without_the_garbage_collector(client: TestClient, path: str, status: int) -> None:
    """It would keep its request, body included, in memory until two hundred others have come."""
    refused(client.post(path, content=b"no picture", headers=OCTETS), status, "")
    gc.collect()
    gc.disable()
    try:
        refused(client.post(path, content=b"no picture", headers=OCTETS), status, "")
        left = [each for each in gc.get_objects() if issubclass(type(each), RequestError | RequestValidationError)]
    finally:
        gc.enable()
    assert left == []


def test_an_invalid_parameter_is_explained_for_programs_too(client: TestClient) -> None:
    detail = client.post("/predict?top_k=" + "9" * 5000).json()["detail"]
    assert detail == [{"parameter": "top_k", "given": "9" * 200, "problem": "must be a number of fewer digits"}]


@pytest.mark.parametrize(("path", "form"), [("/predict", "image/*, "), ("/predict/batch", "")])
def test_a_refused_content_type_names_those_accepted(client: TestClient, path: str, form: str) -> None:
    response = client.post(path, json={})
    refused(response, 415, "The body has the content type 'application/json'")
    assert response.headers["accept"] == f"multipart/form-data, {form}application/octet-stream"


def test_an_empty_content_type_is_none(client: TestClient, png: bytes) -> None:
    assert client.post("/predict", content=png, headers={"content-type": ""}).status_code == 200


def test_a_missing_file_has_the_same_body(client: TestClient) -> None:
    refused(client.get("/static/nothing.js"), 404, "There is nothing at /static/nothing.js.")


def test_wrong_method_names_the_right_one(client: TestClient) -> None:
    response = client.get("/predict")
    refused(response, 405, "/predict does not take GET; it takes POST.")
    assert response.headers["allow"] == "POST"
    assert client.post("/healthz").headers["allow"] == "GET, HEAD"


def test_a_compressed_body_is_refused(client: TestClient, png: bytes) -> None:
    headers = {**OCTETS, "content-encoding": "gzip"}
    refused(client.post("/predict", content=gzip.compress(png), headers=headers), 415, "content encoding 'gzip'")


def chunks(total: int) -> Iterator[bytes]:
    for _ in range(0, total, 1000):
        yield b"x" * 1000


@pytest.mark.parametrize("path", ["/predict", "/predict?top_k=1"])
@pytest.mark.parametrize("content_type", ["image/png", "multipart/form-data; boundary=x"])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_above_the_limit_is_refused_however_it_is_sent(
    client: TestClient, path: str, content_type: str, chunked: bool
) -> None:
    content = chunks(201_000) if chunked else b"x" * 200_001
    response = client.post(path, content=content, headers={"content-type": content_type})
    assert ("content-length" not in response.request.headers) is chunked
    body = refused(response, 413, "The request body is too large; the limit is 200,000 bytes. Send smaller")
    assert body["detail"] == {"max_body_bytes": 200_000}


@pytest.mark.anyio
async def test_a_body_with_a_too_large_content_length_is_refused_unread(settings: Settings) -> None:
    app = create_app(settings)
    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("the body was read")

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-length", b"200001"), (b"content-type", b"image/png")]
    scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"", "headers": headers}
    await app(scope, receive, send)
    assert sent[0]["status"] == 413


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_just_the_limit_is_read(client: TestClient, chunked: bool) -> None:
    content = chunks(200_000) if chunked else b"x" * 200_000
    refused(
        client.post("/predict", content=content, headers=OCTETS), 400, "The 200,000 bytes are not a readable picture"
    )


def test_a_content_length_may_have_any_number_of_leading_zeros(client: TestClient, png: bytes) -> None:
    headers = {"content-type": "image/png", "content-length": "0" * 5000 + str(len(png))}
    assert client.post("/predict", content=png, headers=headers).status_code == 200


def test_too_many_pixels(settings: Settings) -> None:
    app = create_app(Settings(weights=settings.weights, device="cpu", threads=1, max_pixels=1024))
    with TestClient(app) as client:
        response = client.post("/predict?resize=crop", content=encode(drawing(33, 32)), headers=OCTETS)
        refused(response, 413, "The picture is 33 x 32; the limit is 1,024 pixels.")


@pytest.mark.parametrize("path", ["/predict", "/predict?top_k=1"])
def test_an_internal_error_gives_a_fixed_sentence_and_a_log_entry(
    client: TestClient, png: bytes, path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_args: object) -> None:
        raise RuntimeError("secret of the inside")

    monkeypatch.setattr(Predictor, "estimate", broken)
    response = client.post(path, content=png, headers=OCTETS)
    body = refused(response, 500, boundary.DEFECT)
    assert body["detail"] is None
    assert "secret" not in response.text
    assert "secret of the inside" in caplog.text
    assert body["request_id"] in caplog.text
    monkeypatch.undo()
    assert client.post(path, content=png, headers=OCTETS).status_code == 200


@pytest.mark.parametrize("limit", [{"max_waiting": 1}, {"max_waiting_bytes": 1}], ids=str)
def test_a_full_queue_gives_429_with_retry_after(settings: Settings, png: bytes, limit: dict[str, Any]) -> None:
    app = create_app(replace(settings, **limit))
    with TestClient(app) as client:
        with occupied(app.service):
            response = client.post("/predict", content=png, headers=OCTETS)
        refused(response, 429, "The service has as much work as it accepts")
        assert int(response.headers["retry-after"]) >= 1
        assert client.post("/predict", content=png, headers=OCTETS).status_code == 200


def test_a_missed_deadline_gives_504(client: TestClient, png: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "monotonic", lambda: time.monotonic() + 6)
    refused(client.post("/predict", content=png, headers=OCTETS), 504, "waited longer than 5 seconds for its turn")


@pytest.mark.parametrize("given", ["abc", "7d1f-00:9_x.Y", "Root=1-a+b/c==", "svc|42~@", "a" * 128])
def test_a_wellformed_request_id_is_kept(client: TestClient, given: str) -> None:
    assert client.get("/healthz", headers={"x-request-id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "a b", "a" * 129, "a\tb", "{}"])
def test_a_malformed_request_id_is_replaced(client: TestClient, given: str) -> None:
    made = [client.get("/healthz", headers={"x-request-id": given}).headers["x-request-id"] for _ in range(2)]
    assert all(len(each) == 16 and each != given for each in made)
    assert made[0] != made[1]


@pytest.mark.anyio
async def test_a_client_that_leaves_while_it_waits_cancels_its_work(
    settings: Settings, png: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(settings)
    service: Service = app.service
    futures: list[asyncio.Future[list[float]]] = []

    def never(_body: bytes, _resize: object) -> "asyncio.Future[list[float]]":
        futures.append(asyncio.get_running_loop().create_future())
        return futures[-1]

    monkeypatch.setattr(service, "predict", never)
    messages = iter([{"type": "http.request", "body": png, "more_body": False}, {"type": "http.disconnect"}])
    sent: list[Any] = []

    async def receive() -> Any:
        return next(messages)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"", "headers": []}
    await app(scope, receive, send)
    assert futures[0].cancelled()
    assert sent == []


def test_a_full_service_refuses_a_request_from_its_headers_alone(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = client.app
    assert isinstance(app, Application)
    portal = client.portal
    assert portal is not None
    assert portal.call(app.refuse, "/predict", [(b"content-length", b"9")]) is None

    def full() -> None:
        raise Overloaded("Too much.", retry_after_seconds=3)

    monkeypatch.setattr(app.service, "check_room", full)
    little = b"content-length", b"16384"
    # These go through the framework, which refuses them, too.
    assert portal.call(app.refuse, "/predict?top_k=1", [little]) is None
    assert portal.call(app.refuse, "/predict", [(b"content-length", b"16385")]) is None
    assert portal.call(app.refuse, "/predict", []) is None
    assert portal.call(app.refuse, "/predict", [(b"content-length", b"0" * 5000)]) is None
    answer = portal.call(app.refuse, "/predict", [little, (b"x-request-id", b"seven")])
    assert answer is not None
    status, headers, body = portal.call(answer)
    assert (status, json.loads(body)["error"]) == (429, "Too much.")
    assert {(b"x-request-id", b"seven"), (b"retry-after", b"3"), (b"content-length", b"%d" % len(body))} <= set(headers)
    counted = client.get("/metrics").text
    assert 'cifar_refusals_total{reason="overloaded"} 1.0' in counted
    assert 'cifar_requests_total{method="POST",route="/predict",status="429"} 1.0' in counted
    (seconds,) = re.findall(r'^cifar_request_seconds_sum{.*route="/predict"} (\S+)$', counted, re.MULTILINE)
    assert float(seconds) < 60


def test_slow_bodies_time_out_and_too_many_concurrent_bytes_are_refused() -> None:
    intake = Intake(max_bytes=100, max_waiting_bytes=20, seconds=0.2)
    stalled = asyncio.Event()

    async def send(*parts: bytes, then: asyncio.Event | None = None) -> bytes:
        messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]

        async def receive() -> Message:
            if messages:
                return messages.pop(0)
            if then is not None:
                await then.wait()
            return {"type": "http.request", "body": b"", "more_body": False}

        return await intake.read({}, receive)

    async def main() -> None:
        assert await send(b"a" * 30) == b"a" * 30  # alone it may
        slow = asyncio.create_task(send(b"b" * 15, then=stalled))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert await send(b"c" * 5) == b"c" * 5
        with pytest.raises(Overloaded, match="receiving as many bytes as it accepts"):
            await send(b"c" * 5, b"d")
        with pytest.raises(TooSlow, match=r"not complete within 0\.2 seconds"):
            await slow
        assert await send(b"c" * 5, b"d") == b"cccccd"
        with pytest.raises(TooSlow):
            await send(then=stalled)

    asyncio.run(main())


def test_the_docstring_of_errors_lists_each_kind_of_refusal_with_its_status() -> None:
    tree = dict(re.findall(r"-- (\w+) +(\d+)$", errors.__doc__ or "", re.M))
    assert tree == {kind.__name__: str(kind.status) for kind in RequestError.__subclasses__()}


def test_each_kind_of_refusal_has_a_name_among_the_metrics() -> None:
    kinds = RequestError.__subclasses__()
    assert len({kind.reason for kind in kinds} - {RequestError.reason}) == len(kinds)


@pytest.mark.parametrize("encoding", ["Identity", " identity "])
def test_content_encoding_identity_is_accepted(client: TestClient, png: bytes, encoding: str) -> None:
    headers = {"content-type": "image/png", "content-encoding": encoding}
    assert client.post("/predict", content=png, headers=headers).status_code == 200


def test_a_trailing_slash_gives_404(client: TestClient, png: bytes) -> None:
    assert client.post("/predict/", content=png, follow_redirects=False).status_code == 404


def test_an_error_may_name_a_file_whose_name_is_not_utf8() -> None:
    reply = error_reply(WeightsRefused("There is no weights file caf\udce9.pth."), "an id")
    assert json.loads(reply.body)["error"] == r"There is no weights file caf\udce9.pth."
