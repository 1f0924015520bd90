"""Overload, disconnects, stopping and new weights, as clients of a real process meet them."""

import gzip
import http.client
import json
import re
import shutil
import signal
import socket
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import running
from conftest import random_checkpoint, random_evaluation
from running import SECONDS, Outcome, eventually, get, post, serving

from app import checkpoint
from app.model import IMAGE_BYTES

SLOWLY = """
import os, sys, time
from app.__main__ import main
from app.model import IMAGE_BYTES
from app.predictor import Predictor

estimate_each = Predictor.estimate_each
def slowly(predictor, items):
    time.sleep(0.002 * sum(len(pixels) // IMAGE_BYTES for pixels in items))
    return estimate_each(predictor, items)
Predictor.estimate_each = slowly
sys.exit(main(sys.argv[1:], os.environ))
"""
"""Five hundred pictures a second at most, on any machine, so that something can come in between."""


def pictures_run(url: str) -> int:
    stats = get(f"{url}/v2/models/stats")[1]["model_stats"]
    assert isinstance(stats, list)
    count = stats[0]["inference_count"]
    assert isinstance(count, int)
    return count


def metrics(url: str) -> str:
    with urllib.request.urlopen(f"{url}/metrics", timeout=SECONDS) as response:
        return str(response.read(), "utf-8")


def raw_request(body: bytes) -> bytes:
    """To /predict/batch: a single picture would not have to wait behind the many of another request."""
    head = f"POST /predict/batch HTTP/1.1\r\nhost: test\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def test_no_forward_pass_is_spent_on_clients_that_have_left(weights: Path) -> None:
    with (
        serving("--weights", str(weights), "--max-waiting", "5000", program=("-c", SLOWLY)) as (_, url, _),
        ThreadPoolExecutor(1) as pool,
    ):
        address = (urlsplit(url).hostname, urlsplit(url).port)
        many = pool.submit(post, url, "/predict/batch", bytes(1024 * IMAGE_BYTES))
        eventually(lambda: pictures_run(url) > 0)  # a batch of them; the others keep the network busy
        clients = [socket.create_connection(address, timeout=SECONDS) for _ in range(20)]
        for client in clients:
            client.sendall(raw_request(bytes(2 * IMAGE_BYTES)))
        for leaving in clients[:15]:
            leaving.close()
        for staying in clients[15:]:
            assert staying.recv(64).startswith(b"HTTP/1.1 200 OK\r\n")
            staying.close()
        assert many.result().status == 200
        assert pictures_run(url) == 1024 + 5 * 2


def test_a_single_picture_overtakes_a_large_request(weights: Path, png: bytes, patient: tuple[str, ...]) -> None:
    with (
        serving(*patient, "--weights", str(weights), program=("-c", SLOWLY)) as (_, url, _),
        ThreadPoolExecutor(1) as pool,
    ):
        many = pool.submit(post, url, "/predict/batch", bytes(1024 * IMAGE_BYTES))
        eventually(lambda: pictures_run(url) > 0)
        assert post(url, "/predict", png).status == 200
        assert pictures_run(url) < 1024
        assert many.result().status == 200


def test_bytes_that_are_not_http_get_the_usual_error_body(weights: Path) -> None:
    with serving("--weights", str(weights)) as (_, url, _):
        address = urlsplit(url)
        hello_of_tls = b"\x16\x03\x01\x00\x05hello"
        with socket.create_connection((address.hostname, address.port), SECONDS) as client:
            client.sendall(hello_of_tls)
            response = http.client.HTTPResponse(client)
            response.begin()
            body = json.loads(response.read())
            assert client.recv(1) == b""
        assert (response.status, response.headers["content-type"]) == (400, "application/json")
        assert body["error"].startswith("The bytes are not an HTTP request")
        assert body["request_id"] == response.headers["x-request-id"]
        lines = metrics(url).splitlines()
        assert 'cifar_requests_total{method="OTHER",route="unmatched",status="400"} 1.0' in lines
        assert 'cifar_refusals_total{reason="bad_request"} 1.0' in lines


def test_overload_is_refused_and_the_rest_is_answered(weights: Path, png: bytes) -> None:
    options = ("--max-waiting", "32", "--max-batch", "8", "--deadline-seconds", "30", "--weights", str(weights))
    with (
        serving(*options, program=("-c", SLOWLY)) as (process, url, _),
        ThreadPoolExecutor(13) as pool,
        ExitStack() as stack,
    ):
        assert post(url, "/predict", png).status == 200
        before = resident_bytes(process.pid)
        stop = threading.Event()
        stack.callback(stop.set)  # or the pool would wait for ever after a failure

        def watch_health() -> int:
            answers = 0
            while not stop.is_set():
                assert get(f"{url}/healthz")[0] == 200
                assert get(f"{url}/readyz")[0] == 200
                answers += 1
            return answers

        def ask() -> list[Outcome]:
            return [post(url, "/predict/batch", bytes(16 * IMAGE_BYTES)) for _ in range(20)]

        health = pool.submit(watch_health)
        asking = [pool.submit(ask) for _ in range(12)]
        outcomes = [outcome for asked in asking for outcome in asked.result()]
        stop.set()
        assert health.result() > 0
        assert len(outcomes) == 12 * 20
        statuses = [outcome.status for outcome in outcomes]
        assert set(statuses) == {200, 429}  # at most two of twelve fit in at a time
        for outcome in outcomes:
            if outcome.status == 200:
                assert len(json.loads(outcome.body)["predictions"]) == 16
            else:
                assert int(outcome.headers["retry-after"]) >= 1
                assert json.loads(outcome.body)["error"].startswith("The service has as much work as it accepts (")
        assert resident_bytes(process.pid) < before + 200e6
        assert post(url, "/predict", png).status == 200
        assert pictures_run(url) == 2 + 16 * statuses.count(200)


def resident_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        pytest.skip("this system does not show process memory")
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def test_a_request_past_its_deadline_gets_504(weights: Path, png: bytes) -> None:
    """Its body is compressed to nearly nothing."""
    count = 1000
    pixels = bytes(count * IMAGE_BYTES)
    tensor = {
        "name": "pixels",
        "shape": [count, 32, 32, 3],
        "datatype": "UINT8",
        "parameters": {"binary_data_size": len(pixels)},
    }
    text = json.dumps({"inputs": [tensor]}).encode()
    body = gzip.compress(text + pixels)
    headers = {"inference-header-content-length": str(len(text)), "content-encoding": "gzip"}
    options = ("--weights", str(weights), "--max-pictures", str(count), "--deadline-seconds", "0.05")
    with (
        serving(*options, program=("-c", SLOWLY)) as (_, url, _),
        closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=SECONDS)) as connection,
    ):
        connection.request("POST", "/v2/models/cifar/infer", body, headers)
        assert connection.getresponse().status == 504
        eventually(lambda: post(url, "/predict", png).status == 200)


def test_a_slow_body_gets_408_and_the_connection_stays_usable(weights: Path, png: bytes) -> None:
    with (
        serving("--weights", str(weights), "--deadline-seconds", "0.2") as (_, url, _),
        closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=SECONDS)) as connection,
    ):
        connection.putrequest("POST", "/predict")
        connection.putheader("content-length", str(len(png)))
        connection.endheaders(png[:1])
        eventually(lambda: 'route="/predict",status="408"' in metrics(url))
        for start in range(1, len(png), 100):
            connection.send(png[start : start + 100])
        response = connection.getresponse()
        assert response.status == 408
        assert "not complete within 0.2 seconds" in json.load(response)["error"]
        connection.request("POST", "/predict", png, {"content-type": "image/png"})
        assert connection.getresponse().status == 200


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Options of a service that may take as long as a slow machine needs; its clients wait, too."""
    monkeypatch.setattr(running, "SECONDS", 600)
    return "--deadline-seconds", "600", "--max-waiting", "9999"


def test_requests_within_the_drain_period_after_sigterm_are_answered(
    weights: Path, png: bytes, patient: tuple[str, ...]
) -> None:
    grace, margin = 1.5, 0.5
    started = serving(*patient, "--drain-seconds", str(grace), "--weights", str(weights), program=("-c", SLOWLY))
    with started as (process, url, _), ThreadPoolExecutor(8) as pool, ExitStack() as stack:
        stop = threading.Event()
        stack.callback(stop.set)

        asking = [pool.submit(ask_until, stop, url, png) for _ in range(4)]
        assert get(f"{url}/readyz")[0] == 200
        time.sleep(0.3)
        signalled_at = time.monotonic()
        process.send_signal(signal.SIGTERM)
        while (probe := probe_ready(url)).status == 200:
            assert time.monotonic() < signalled_at + grace
        assert (probe.status, probe.headers["retry-after"], probe.headers["connection"]) == (503, "1", "close")
        time.sleep(max(0.0, signalled_at + grace - margin - time.monotonic()))
        # Work for longer than the rest of the grace: the socket closes while it is being done.
        last = pool.submit(post, url, "/predict/batch", bytes(1024 * IMAGE_BYTES))
        assert last.result().status == 200
        assert process.wait(SECONDS) == 0
        stop.set()
        outcomes = [outcome for asked in asking for outcome in asked.result()]
        assert {outcome.status for outcome in outcomes} == {0, 200}
        assert sum(outcome.status == 200 and outcome.begun_at > signalled_at for outcome in outcomes) > 0
        refused = [outcome.begun_at for outcome in outcomes if outcome.status == 0]
        assert min(refused) > signalled_at + grace - margin


def test_pressing_ctrl_c_twice_aborts_no_request(weights: Path, patient: tuple[str, ...]) -> None:
    started = serving(*patient, "--weights", str(weights), program=("-c", SLOWLY))
    with started as (process, url, _), ThreadPoolExecutor(1) as pool:
        asked = pool.submit(post, url, "/predict/batch", bytes(1024 * IMAGE_BYTES))
        eventually(lambda: pictures_admitted(url) == 1024)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        assert asked.result().status == 200
        assert process.wait(SECONDS) == 0


def pictures_admitted(url: str) -> float:
    """Those that wait and those that have run."""
    found = re.findall(r"^cifar_(?:queue_depth|batch_size_sum) (\S+)$", metrics(url), re.M)
    return sum(map(float, found))


def ask_until(stop: threading.Event, url: str, png: bytes) -> list[Outcome]:
    outcomes = []
    while not stop.is_set():
        outcomes.append(post(url, "/predict", png))
    return outcomes


def probe_ready(url: str) -> Outcome:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=SECONDS)
    connection.request("GET", "/readyz")
    response = connection.getresponse()
    headers = {name.lower(): value for name, value in response.getheaders()}
    outcome = Outcome(time.monotonic(), response.status, headers, response.read())
    connection.close()
    return outcome


def test_sighup_reloads_the_weights_and_a_bad_file_is_logged(weights: Path, tmp_path: Path, png: bytes) -> None:
    path = tmp_path / "served.pth"
    shutil.copy(weights, path)
    with serving("--drain-seconds", "0", "--weights", str(path)) as (process, url, _):
        old = served(url, png)
        path.write_bytes(b"not a network")
        process.send_signal(signal.SIGHUP)
        assert process.stderr is not None
        while "were not replaced" not in (line := process.stderr.readline()):  # empty, and then a failure, at the end
            assert line
        assert "is not a PyTorch file" in line
        assert served(url, png) == old
        given = random_checkpoint(evaluation=random_evaluation())
        given.state_dict["fc3.bias"].fill_(1.0)
        new = checkpoint.save(given, path)[:12]
        stop = threading.Event()
        with ThreadPoolExecutor(4) as pool, ExitStack() as stack:
            stack.callback(stop.set)
            asking = [pool.submit(ask_until, stop, url, png) for _ in range(4)]
            process.send_signal(signal.SIGHUP)
            eventually(lambda: served(url, png) == new)
        assert {outcome.status for asked in asking for outcome in asked.result()} == {200}
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 0


def served(url: str, png: bytes) -> str:
    status, body = get(f"{url}/predict", png)
    assert status == 200
    assert isinstance(body["model"], dict)
    return str(body["model"]["sha256"])
