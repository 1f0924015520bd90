"""The log: one line for each request, which a program can read and a client cannot write."""

import asyncio
import http.client
import io
import json
import logging
import os
import re
import signal
import socket
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
from fastapi.testclient import TestClient
from running import SECONDS, get, serving

from app import logs
from app.logs import QUIET, AccessLog, JsonFormatter, NonBlockingStream, say
from app.main import create_app
from app.predictor import Predictor
from app.settings import Settings

PNG = {"content-type": "image/png"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Lines:
    """A client of a service that logs, and what it has logged; to be read when the service has ended."""

    def __init__(self, settings: Settings, capture: pytest.CaptureFixture[str]) -> None:
        self.settings = settings
        self.capture = capture

    @property
    def client(self) -> TestClient:
        """A client of an application made in the test: the fixtures' standard error is another one, now closed."""
        return TestClient(create_app(self.settings), raise_server_exceptions=False)

    def read(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.capture.readouterr().err.splitlines()]


@pytest.fixture
def log(settings: Settings, capsys: pytest.CaptureFixture[str]) -> Lines:
    return Lines(settings, capsys)


def test_one_line_for_each_request_with_its_id(log: Lines, png: bytes) -> None:
    with log.client as client:
        client.post("/predict", content=png, headers={**PNG, "x-request-id": "lane"})
        client.post("/predict?top_k=1", content=png, headers={**PNG, "x-request-id": "router"})
        client.post("/predict", content=b"abc", headers={**PNG, "x-request-id": "refused"})
        made = client.get("/nowhere").headers["x-request-id"]
    lines = log.read()
    told = [(line["request_id"], line["method"], line["route"], line["status"]) for line in lines]
    assert told == [
        ("lane", "POST", "/predict", 200),
        ("router", "POST", "/predict", 200),
        ("refused", "POST", "/predict", 400),
        (made, "GET", "unmatched", 404),
    ]
    fields = ["time", "level", "logger", "message", "request_id", "method", "route", "status", "milliseconds"]
    assert all(list(line) == fields for line in lines)
    assert lines[0]["message"] == "POST /predict 200"
    assert (lines[0]["level"], lines[0]["logger"]) == ("info", "app.access")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", lines[0]["time"])
    assert isinstance(lines[0]["milliseconds"], float)


def test_probes_and_scrapes_are_not_logged(log: Lines) -> None:
    with log.client as client:
        assert all(client.get(path).status_code == 200 for path in QUIET)
        client.get("/metrics/per-class")
    assert [line["route"] for line in log.read()] == ["/metrics/per-class"]


def test_client_supplied_text_is_not_logged(log: Lines, png: bytes) -> None:
    with log.client as client:
        client.post("/predict?resize=secret", content=png, headers=PNG)
        client.get("/secret/path%0A%7B%22forged%22:1%7D?token=secret")
        client.request("SECRET", "/predict", headers={"user-agent": "secret", "cookie": "secret"})
    err = log.capture.readouterr().err
    assert err.count("\n") == 3
    assert "secret" not in err.lower()
    assert "forged" not in err


@pytest.mark.parametrize("hostile", ['"}', 'a", "status": 200, "b": "', "a b", "{}", "\\u0022", "a" * 129])
def test_a_hostile_request_id_does_not_get_into_the_log(log: Lines, hostile: str) -> None:
    with log.client as client:
        made = client.get("/docs", headers={"x-request-id": hostile}).headers["x-request-id"]
    (line,) = log.read()
    assert line["request_id"] == made != hostile
    assert line["status"] == 200


def test_the_access_log_can_be_switched_off(settings: Settings, png: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    quiet = Settings(weights=settings.weights, device="cpu", threads=1, access_log=False)
    with TestClient(create_app(quiet)) as client:
        assert client.post("/predict", content=png, headers=PNG).status_code == 200
    assert capsys.readouterr().err == ""


def test_an_internal_error_is_logged_with_its_id_and_without_the_query(
    log: Lines, png: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_args: object) -> None:
        raise RuntimeError("the reason")

    with log.client as client:
        monkeypatch.setattr(Predictor, "estimate", broken)
        client.post("/predict?resize=pad", content=png, headers={**PNG, "x-request-id": "broken"})
    (record,) = [record for record in caplog.records if record.name == "app.boundary"]
    line = json.loads(JsonFormatter().format(record))
    assert (line["request_id"], line["level"]) == ("broken", "error")
    assert line["message"] == "Request broken, POST /predict:"
    assert "RuntimeError: the reason" in line["exception"]
    assert [(line["request_id"], line["status"]) for line in log.read()] == [("broken", 500)]


@pytest.mark.anyio
async def test_lines_of_one_turn_are_written_together_and_short_on_a_terminal() -> None:
    writes: list[str] = []
    stream = Terminal()
    stream.write = lambda text: writes.append(text) or len(text)  # type: ignore[method-assign, func-returns-value]
    access = AccessLog(stream)
    for status in (200, 429):
        access.note("abc", "POST", "/predict", status, 0.01234)
    assert writes == []
    await asyncio.sleep(0)
    (text,) = writes
    time = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00"
    assert re.fullmatch(rf"{time} POST /predict 200 12\.3 ms abc\n{time} POST /predict 429 12\.3 ms abc\n", text)
    access.note("next", "GET", "/docs", 200, 1.0)
    await asyncio.sleep(0)
    assert writes[1].endswith(" GET /docs 200 1000.0 ms next\n")


@pytest.mark.anyio
@pytest.mark.parametrize("error", [BrokenPipeError, ValueError("I/O operation on closed file.")])
async def test_a_broken_log_stream_fails_no_request(error: Exception) -> None:
    failures: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: failures.append(context))
    written: list[str] = []

    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            written.append(text)
            raise error

    AccessLog(Broken()).note("abc", "GET", "/docs", 200, 0.0)
    await asyncio.sleep(0)
    assert len(written) == 1
    assert failures == []


def test_lines_for_a_pipe_that_nobody_reads_are_dropped_and_counted() -> None:
    reading, writing = os.pipe()
    with open(reading) as reader, open(writing, "w") as stream:
        patient = NonBlockingStream(stream)
        for number in range(10_000):
            patient.write(f"line {number} {'x' * 100}\n" * 3)
        assert patient.dropped > 20_000
        os.set_blocking(reading, False)
        read = reader.read()
        assert read.count("\n") == 30_000 - patient.dropped
        assert read.startswith("line 0 x")
        assert {len(line) for line in read.splitlines()} <= {len(f"line {n} ") + 100 for n in (1, 10, 100, 1000)}
        dropped = patient.dropped
        patient.write("again\n")
        assert reader.read() == "again\n"
        assert patient.dropped == dropped


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="only /proc gives a second end of a pipe")
def test_writing_to_a_pipe_filled_by_another_process_does_not_block(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    with open(reading, "rb"), open(writing, "w") as stream:
        patient = NonBlockingStream(stream)
        os.set_blocking(writing, False)
        with suppress(BlockingIOError):
            while True:
                os.write(writing, b"x" * 1024)
        os.set_blocking(writing, True)
        monkeypatch.setattr(patient, "_poll", SimpleNamespace(poll=lambda _timeout: True))  # asked before it was full
        patient.write("late\n")
        assert patient.dropped == 1


def test_a_line_cut_short_does_not_spoil_the_next() -> None:
    reading, writing = os.pipe()
    with open(reading, "rb") as reader, open(writing, "w") as stream:
        patient = NonBlockingStream(stream)
        os.set_blocking(writing, False)
        with suppress(BlockingIOError):
            while True:
                os.write(writing, b"x" * NonBlockingStream.PIECE_BYTES)
        os.read(reading, NonBlockingStream.PIECE_BYTES)  # room for one piece
        patient.write("y" * 2 * NonBlockingStream.PIECE_BYTES + "\n")
        os.set_blocking(reading, False)
        assert reader.read().endswith(b"y" * NonBlockingStream.PIECE_BYTES)
        patient.write("next\n")
        assert reader.read() == b"\nnext\n"
        assert patient.dropped == 1


def test_text_that_is_not_utf8_is_written_escaped() -> None:
    reading, writing = os.pipe()
    with open(reading) as reader, open(writing, "w") as stream:
        NonBlockingStream(stream).write("caf\udce9\n")
        assert reader.readline() == "caf\\udce9\n"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="only /proc gives a second end of a pipe")
def test_a_stream_that_is_no_longer_used_keeps_no_pipe_open() -> None:
    reading, writing = os.pipe()
    with open(reading, "rb", buffering=0) as reader:
        with open(writing, "w") as stream:
            NonBlockingStream(stream).write("last\n")
        os.set_blocking(reading, False)
        assert [reader.read(99), reader.read(99)] == [b"last\n", b""]  # the end; None if somebody could still write


def test_a_service_whose_log_nobody_reads_goes_on(weights: Path) -> None:
    with serving("--drain-seconds", "0", "--weights", str(weights), CIFAR_ACCESS_LOG="on") as (_, url, _):
        address = urlsplit(url)
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=SECONDS)
        for _ in range(800):  # some 200 bytes a line; a pipe holds 65,536
            connection.request("GET", "/v2/models")
            assert connection.getresponse().read()
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
    found = re.search(r"^cifar_access_lines_dropped_total (\S+)$", text, re.MULTILINE)
    assert found
    assert 0 < float(found[1]) < 800


@pytest.fixture
def _loggers() -> Iterator[None]:
    """Put back what `configure` changes for the whole process."""
    root, uvicorn = logging.getLogger(), logging.getLogger("uvicorn")
    handlers, levels = root.handlers[:], (root.level, uvicorn.level)
    yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    uvicorn.setLevel(levels[1])


@pytest.mark.usefixtures("_loggers")
def test_every_record_is_one_line_of_json() -> None:
    stream = io.StringIO()
    logs.configure(stream)
    logging.getLogger("app").info("two\nlines of %s", "text")
    logging.getLogger("uvicorn.error").warning("from the server")
    logging.getLogger("uvicorn.error").info("chatter")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("from Python", stacklevel=1)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["level"], line["logger"]) for line in lines] == [
        ("info", "app"),
        ("warning", "uvicorn.error"),
        ("warning", "py.warnings"),
    ]
    assert lines[0]["message"] == "two\nlines of text"
    assert list(lines[0]) == ["time", "level", "logger", "message"]


def test_a_record_that_is_not_utf8_is_written_in_ascii() -> None:
    line = JsonFormatter().format(logging.makeLogRecord({"msg": "%s", "args": ("caf\udce9",)}))
    assert line.isascii()
    assert json.loads(line)["message"] == "caf\udce9"


@pytest.mark.usefixtures("_loggers")
def test_on_a_terminal_records_are_short_lines() -> None:
    stream = Terminal()
    logs.configure(stream)
    logging.getLogger("app").info("a line")
    assert re.fullmatch(r"\S+ \S+ INFO a line\n", stream.getvalue())


def test_a_running_service_logs_nothing_but_json(weights: Path, png: bytes) -> None:
    options = ("--drain-seconds", "0", "--weights", str(weights))
    with serving(*options, CIFAR_ACCESS_LOG="on") as (process, url, _):
        assert get(f"{url}/predict", png)[0] == 200
        address = urlsplit(url)
        with socket.create_connection((address.hostname or "", address.port or 0), SECONDS) as connection:
            connection.sendall(b"this is not HTTP\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 400")
        with socket.create_connection((address.hostname or "", address.port or 0), SECONDS) as connection:
            head = b"POST /predict HTTP/1.1\r\nhost: test\r\ncontent-type: multipart/form-data; boundary=b\r\n"
            connection.sendall(head + b"content-length: 6\r\n\r\n--b?no")  # of which the form's parser warns by itself
            assert connection.recv(100).startswith(b"HTTP/1.1 400")
        assert get(f"{url}/healthz")[0] == 200
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=SECONDS)
    lines = [json.loads(line) for line in err.splitlines()]
    assert {line["message"] for line in lines} == {
        "POST /predict 200",
        "POST /predict 400",
        "Invalid HTTP request received.",
        "OTHER unmatched 400",
        "Stopping: /readyz answers 503; requests that arrive before the socket closes are answered.",
    }


def test_a_failing_stream_prevents_nothing(tmp_path: Path) -> None:
    class Full(io.StringIO):
        def write(self, _text: str) -> int:
            raise OSError(28, "No space left on device")

        def fileno(self) -> int:
            return file.fileno()

    with (tmp_path / "stdout").open("w") as file:
        say("Serving.", Full())
        assert os.path.samestat(os.fstat(file.fileno()), os.stat(os.devnull))
    say("Serving.", None)


def test_a_line_that_finds_no_room_in_a_pipe_is_dropped() -> None:
    reader, writer = os.pipe()
    with open(reader, "rb") as read, open(writer, "w") as write:
        os.set_blocking(writer, False)
        with suppress(BlockingIOError):
            while True:
                os.write(writer, bytes(4096))
        os.set_blocking(writer, True)
        say("Serving.", write)
        os.read(reader, 65536)
        say("Stopping.", write)
        write.close()
        assert read.read().strip(b"\0") == b"Stopping.\n"
