"""What the tests of a running service share: real processes, and clients for them."""

import http.client
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 60


def command(*arguments: str, program: Sequence[str] = ("-m", "app")) -> list[str]:
    fixed = ["--port", "0", "--threads", "1", "--processes", "1", "--device", "cpu", "--engine", "torch"]
    return [sys.executable, *program, *fixed, *arguments]


def environment(**variables: str) -> dict[str, str]:
    """No access log: nobody reads the pipe, and it would fill up."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("CIFAR_")}
    return {**known, "CIFAR_ACCESS_LOG": "off", **variables}


@contextmanager
def serving(
    *arguments: str, program: Sequence[str] = ("-m", "app"), **variables: str
) -> Iterator[tuple["subprocess.Popen[str]", str, str]]:
    """A running service, its address, and the line it printed."""
    process = subprocess.Popen(
        command(*arguments, program=program),
        cwd=ROOT,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()  # empty if the process ends, so this waits no longer than it lives
        found = re.search(r"http://\S+", line)
        assert found, process.communicate(timeout=SECONDS)
        yield process, found[0], line
    finally:
        process.kill()
        process.communicate()


def get(url: str, data: bytes | None = None) -> tuple[int, dict[str, object]]:
    request = urllib.request.Request(url, data, {"content-type": "image/png"})
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def refusal(*arguments: str, **variables: str) -> str:
    ran = subprocess.run(
        command(*arguments), cwd=ROOT, env=environment(**variables), capture_output=True, text=True, timeout=SECONDS
    )
    assert ran.returncode == 1
    assert ran.stdout == ""
    assert ran.stderr.count("\n") == 1
    return ran.stderr.strip()


def says_only_that_it_stops(log: str) -> bool:
    """Or nothing, if it was told to before it had begun."""
    return all(json.loads(line)["message"].startswith("Stopping: ") for line in log.splitlines())


class Outcome(NamedTuple):
    begun_at: float
    status: int
    """0 if nobody listened; a connection that is closed without an answer is an error."""
    headers: dict[str, str]
    body: bytes


def post(url: str, path: str, body: bytes) -> Outcome:
    begun_at = time.monotonic()
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=SECONDS)
    try:
        connection.request("POST", path, body, {"content-type": "application/octet-stream"})
        response = connection.getresponse()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return Outcome(begun_at, response.status, headers, response.read())
    except ConnectionRefusedError:
        return Outcome(begun_at, 0, {}, b"")
    finally:
        connection.close()


def eventually(true: Callable[[], bool]) -> None:
    """Wait until `true()` holds, but not for ever."""
    deadline = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
