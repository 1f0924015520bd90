"""More requests than the service can carry, for a while: `python tests/soak.py [SECONDS]`, by hand.

First wrk (install it from your system's packages) finds the peak, with connections that each wait for an answer. Then
many connections ask at intervals, together three times the peak, and a refused one does not come back before its next
interval. The service itself counts what it answers; the load is made by the same machine.
"""

import os
import re
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

from bench import LUA, check_tools, load, service, write_bodies

from app.settings import parse_settings

CROWD = 6000
"""Connections; more than the service admits, so that it has to refuse some."""
TIMES = 3

# Each connection waits INTERVAL before a request; the first time a random part of it, so that they are out of step.
DELAY = """
math.randomseed(1)
local asked = 0
delay = function()
  asked = asked + 1
  return asked > CROWD and INTERVAL or math.random(0, INTERVAL)
end
"""


class Counts(NamedTuple):
    """What the service has counted so far."""

    at: float
    by_status: dict[str, float]
    waits: dict[float, float]
    """By a number of seconds: how many had waited in the queue for at most that long."""


def read(port: int) -> Counts:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as response:
        text = response.read().decode()
    by_status = re.findall(r'^cifar_requests_total\{.*route="/predict",.*status="(\d+)".*\} (\S+)$', text, re.M)
    waits = re.findall(r'^cifar_queue_seconds_bucket\{le="(\S+)"\} (\S+)$', text, re.M)
    return Counts(
        time.perf_counter(),
        {status: float(count) for status, count in by_status},
        {float(bound): float(count) for bound, count in waits},
    )


def quantile(before: Counts, after: Counts, share: float) -> float:
    """The histogram's bound within which that share of the waits between the two counts lies."""
    counts = {bound: count - before.waits.get(bound, 0) for bound, count in after.waits.items()}
    total = max(counts.values())
    return min(bound for bound, count in counts.items() if count >= share * total)


def lone_milliseconds(port: int, path: str, data: bytes | None = None) -> float:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"content-type": "image/png"})
    start = time.perf_counter()
    with urllib.request.urlopen(request, timeout=60) as response:
        response.read()
    return (time.perf_counter() - start) * 1e3


class Probe(threading.Thread):
    """Asks for /healthz ten times a second, over a new connection each time."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.port = port
        self.taken: list[float] = []
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.1):
            self.taken.append(lone_milliseconds(self.port, "/healthz"))


def main(seconds: int) -> None:
    check_tools()
    print("| measured | value |\n| --- | --- |")
    with service() as running, tempfile.TemporaryDirectory() as name:
        port, folder = running.port, Path(name)
        (script := folder / "post.lua").write_text(LUA)
        listing, content_type = write_bodies(folder, "raw")
        picture = Path(listing.read_text().split()[0]).read_bytes()
        load(port, 64, script, listing, content_type, 3)
        peak = load(port, 64, script, listing, content_type, 10)["rate"]
        alone = statistics.median(lone_milliseconds(port, "/predict", picture) for _ in range(100))
        print(f"| peak, 64 connections | {peak:,.0f} requests/s |\n| alone, p50 | {alone:.1f} ms |")
        print(f"| memory | {running.megabytes():,.0f} MB |", flush=True)
        interval = str(round(CROWD / (TIMES * peak) * 1e3))
        script.write_text(LUA + DELAY.replace("CROWD", str(CROWD)).replace("INTERVAL", interval))
        probe = Probe(port)
        probe.start()
        before = read(port)
        load(port, CROWD, script, listing, content_type, seconds)
        after = read(port)
        probe.stopped.set()
        probe.join()
        counts = {status: n - before.by_status.get(status, 0) for status, n in after.by_status.items()}
        elapsed = after.at - before.at
        answered = counts.pop("200") / elapsed
        print(
            f"| {TIMES}x the peak offered, {seconds} s: answered | {answered:,.0f}/s, {answered / peak:.0%} of peak |"
        )
        for status, count in sorted(counts.items()):
            print(f"| ... with {status} | {count / elapsed:,.0f}/s |")
        print(
            f"| ... wait in the queue, p50 / p99 | <= {quantile(before, after, 0.5):g} / "
            f"{quantile(before, after, 0.99):g} s, deadline {parse_settings([], os.environ).deadline_seconds:g} s |"
        )
        print(
            f"| ... /healthz, p50 / p99 / longest | {statistics.median(probe.taken):.0f} / "
            f"{statistics.quantiles(probe.taken, n=100)[98]:.0f} / {max(probe.taken):.0f} ms |"
        )
        time.sleep(2)
        alone = statistics.median(lone_milliseconds(port, "/predict", picture) for _ in range(100))
        again = load(port, 64, script_plain(folder), listing, content_type, 10)["rate"]
        print(f"| afterwards: alone, p50 | {alone:.1f} ms |\n| afterwards: peak | {again:,.0f} requests/s |")
        print(f"| afterwards: memory | {running.megabytes():,.0f} MB |")


def script_plain(folder: Path) -> Path:
    (script := folder / "plain.lua").write_text(LUA)
    return script


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 60)
