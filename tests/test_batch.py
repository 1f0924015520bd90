"""POST /predict/batch: many pictures in one request, each answered as if it had come alone."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import drawing, encode, occupied
from fastapi.testclient import TestClient
from PIL import Image

from app import engine
from app.main import create_app
from app.settings import Settings

Form = list[tuple[str, tuple[str, bytes, str]]]
OCTETS = {"content-type": "application/octet-stream"}


@pytest.fixture
def client(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    """In float32, whose rounding is smaller than the differences between the random answers."""
    monkeypatch.setattr(engine, "choose_dtype", lambda _: torch.float32)
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield client


def varied(number: int) -> Image.Image:
    return drawing().rotate(30 * number).point(lambda value: value * (1 + number) % 256)


def pictures(count: int) -> list[bytes]:
    return [encode(varied(number)) for number in range(count)]


def raw(count: int) -> bytes:
    return b"".join(varied(number).tobytes() for number in range(count))


def form(*contents: bytes, field: str = "files") -> Form:
    return [(field, (f"{index}.png", content, "image/png")) for index, content in enumerate(contents)]


def alone(client: TestClient, picture: bytes) -> dict[str, Any]:
    answer: dict[str, Any] = client.post("/predict", content=picture, headers={"content-type": "image/png"}).json()
    del answer["model"]
    return answer


def same(answer: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Equal up to rounding by batch size."""
    return bool(answer["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-5))


@pytest.mark.parametrize("field", ["files", "file"])
def test_pictures_of_a_form_are_answered_in_order(client: TestClient, field: str) -> None:
    response = client.post("/predict/batch", files=form(*pictures(4), field=field))
    assert response.status_code == 200
    body = response.json()
    assert list(body) == ["predictions", "model"]
    assert len(body["model"]["sha256"]) == 12
    expected = [alone(client, picture) for picture in pictures(4)]
    assert not any(same(*pair) for pair in itertools.combinations(expected, 2))  # or else the order would not show
    assert [same(*pair) for pair in zip(body["predictions"], expected, strict=True)] == [True] * 4


def test_raw_pixels_get_the_same_answers_as_the_encoded_pictures(client: TestClient) -> None:
    """More pictures than one batch holds, so groups must be joined in order."""
    assert client.app.service.settings.max_batch == 4  # type: ignore[attr-defined]
    response = client.post("/predict/batch", content=raw(11), headers=OCTETS)
    assert response.status_code == 200
    expected = [alone(client, picture) for picture in pictures(11)]
    assert [same(*pair) for pair in zip(response.json()["predictions"], expected, strict=True)] == [True] * 11


def test_a_bad_picture_is_reported_in_its_place_and_the_others_succeed(client: TestClient) -> None:
    good = pictures(2)
    contents = [good[0], b"no picture", encode(drawing(40, 30)), b"", good[1]]
    response = client.post("/predict/batch", files=form(*contents))
    assert response.status_code == 200
    first, unreadable, large, empty, last = response.json()["predictions"]
    assert same(first, alone(client, good[0]))
    assert same(last, alone(client, good[1]))
    assert unreadable["error"].startswith("The 10 bytes are not a readable picture")
    assert large["error"].startswith("The picture is 40 x 30; the network takes 32 x 32.")
    assert large["detail"] == {"width": 40, "height": 30, "expected": [32, 32]}
    assert empty["error"].startswith("The 0 bytes are not a readable picture")
    assert set(unreadable) == {"error", "detail"}


def test_resize_and_top_k_work_as_for_predict(client: TestClient) -> None:
    contents = [encode(drawing(40, 30)), encode(drawing(64, 64))]
    body = client.post("/predict/batch", params={"resize": "crop", "top_k": 2}, files=form(*contents)).json()
    for answer in body["predictions"]:
        assert len(answer["probabilities"]) == 2
        assert next(iter(answer["probabilities"])) == answer["label"]


@pytest.mark.parametrize("length", [0, 1, 3071, 3073, 2 * 3072 - 1])
def test_raw_pixels_must_be_whole_pictures(client: TestClient, length: int) -> None:
    response = client.post("/predict/batch", content=bytes(length), headers=OCTETS)
    assert response.status_code == 400
    assert f"have {length:,} bytes; that must be a multiple of 3,072" in response.json()["error"]


def without_jfif(jpeg: bytes) -> bytes:
    return jpeg[:2] + jpeg[4 + int.from_bytes(jpeg[4:6], "big") :]


@pytest.mark.parametrize(
    "file",
    [
        *(encode(drawing(), kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP")),
        without_jfif(encode(drawing(), "JPEG")),
        encode(drawing().convert("CMYK"), "JPEG"),
    ],
    ids=["png", "jpeg", "webp", "gif", "bmp", "jpeg without jfif", "cmyk"],
)
def test_picture_files_are_not_taken_for_raw_pixels(client: TestClient, file: bytes) -> None:
    """Even if they happen to be as long."""
    file = file.ljust(2 * 3072, b"\0")
    response = client.post("/predict/batch", content=file, headers=OCTETS)
    assert response.status_code == 400
    assert response.json()["error"].startswith("The raw pixels begin like a picture file. Send picture files as")


@pytest.mark.parametrize(
    ("kwargs", "status", "sentence"),
    [
        pytest.param({"files": form(b"x", field="photo")}, 400, "a field 'photo'; each must be", id="other field"),
        pytest.param({"json": {}}, 415, "content type 'application/json'. Send", id="content type"),
        pytest.param(
            {"content": raw(1), "headers": OCTETS | {"content-encoding": "gzip"}}, 415, "'gzip'", id="encoding"
        ),
        pytest.param(
            {"content": b"--x--\r\n", "headers": {"content-type": "multipart/form-data; boundary=x"}},
            400,
            "The form has no field; it must",
            id="no field",
        ),
        pytest.param(
            {"content": b"--x\r\n", "headers": {"content-type": "multipart/form-data; boundary=x"}},
            400,
            "malformed or cut short",
            id="cut short",
        ),
    ],
)
def test_an_invalid_batch_is_refused(client: TestClient, kwargs: dict[str, Any], status: int, sentence: str) -> None:
    response = client.post("/predict/batch", **kwargs)
    assert response.status_code == status
    assert sentence in response.json()["error"]


def test_only_more_pictures_than_max_pictures_are_refused(weights: Path) -> None:
    settings = Settings(weights=weights, device="cpu", threads=1, max_batch=2, max_pictures=3)
    with TestClient(create_app(settings)) as client:
        for kwargs in ({"files": form(*pictures(4))}, {"content": raw(4), "headers": OCTETS}):
            response = client.post("/predict/batch", **kwargs)
            assert response.status_code == 413
            assert response.json()["error"].startswith("The request has more than 3 pictures")
            assert response.json()["detail"] == {"max_pictures": 3}
        for kwargs in ({"files": form(*pictures(3))}, {"content": raw(3), "headers": OCTETS}):
            response = client.post("/predict/batch", **kwargs)
            assert len(response.json()["predictions"]) == 3


def test_a_batch_is_admitted_whole_or_not_at_all(settings: Settings) -> None:
    """Pictures are counted, not requests; a batch larger than the queue is admitted when nothing else waits."""
    app = create_app(Settings(weights=settings.weights, device="cpu", threads=1, max_batch=2, max_waiting=4))
    with TestClient(app) as client:
        with occupied(app.service):
            for kwargs in ({"files": form(*pictures(4))}, {"content": raw(4), "headers": OCTETS}):
                response = client.post("/predict/batch", **kwargs)
                assert response.status_code == 429
                assert int(response.headers["retry-after"]) >= 1
                assert app.service.waiting == 1
            assert client.post("/predict/batch", content=raw(3), headers=OCTETS).status_code == 200
        assert client.post("/predict/batch", content=raw(9), headers=OCTETS).status_code == 200
        assert app.service.waiting == 0


def test_raw_pixels_are_split_into_items_of_at_most_max_batch(client: TestClient) -> None:
    statistics = client.app.service.statistics  # type: ignore[attr-defined]
    client.post("/predict/batch", content=raw(11), headers=OCTETS)
    assert (statistics.success.count, statistics.pictures) == (3, 11)  # 4 + 4 + 3


def test_an_internal_error_fails_the_request_and_leaks_nothing(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr("app.images.decode", fail)
    response = client.post("/predict/batch", files=form(*pictures(2)))
    assert response.status_code == 500
    assert "a secret" not in response.text
