"""Several processes behind one address, as clients and operators meet them: real ones, killed, stopped and reloaded."""

import asyncio
import json
import multiprocessing
import os
import pickle
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest
from conftest import random_checkpoint, random_evaluation
from running import ROOT, SECONDS, command, environment, eventually, get, post, refusal, serving

from app import checkpoint, link, processes
from app.__main__ import bind
from app.errors import SettingsError
from app.link import CountsReply, CountsRequest, Link, ReadyNotice, ReloadNotice, TotalReply, TotalRequest
from app.model import IMAGE_BYTES
from app.processes import OOM_SCORE, PATIENCE, RETRY_SECONDS, Supervisor, Worker
from app.settings import Settings
from app.statistics import Counts, Timing

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="several processes can share an address on Linux only")
KEY = "a-key-of-sixteen"
CONNECTIONS = 24
"""Dealt out by chance: that one of two processes gets none happens once in eight million times."""
LESS_PATIENT = """
import os, sys
from app import __main__, processes
processes.CHECK_SECONDS = 0.5
sys.exit(__main__.main(sys.argv[1:], os.environ))
"""

NO_ROOM = """
import os, sys
from app import processes
fork, forked, full = os.fork, [], {}
def fork_if_there_is_room():
    forked.append(None)
    if len(forked) in full:
        raise OSError(11, "no room")
    return fork()
os.fork = fork_if_there_is_room
processes.RETRY_SECONDS = 0.1
from app.__main__ import main
sys.exit(main(sys.argv[1:], os.environ))
"""


def pids_of(supervisor: "subprocess.Popen[str]") -> list[int]:
    """Ids of processes that serve or will: each has a group of its own, unlike the programs that some imports call."""
    pids = []
    for pid in map(int, Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children").read_text().split()):
        with suppress(OSError):  # it has just gone
            if os.getpgid(pid) == pid:
                pids.append(pid)
    return pids


class Running(NamedTuple):
    supervisor: "subprocess.Popen[str]"
    url: str
    weights: Path

    @property
    def address(self) -> tuple[str | None, int | None]:
        parts = urlsplit(self.url)
        return parts.hostname, parts.port

    def pids(self) -> list[int]:
        return pids_of(self.supervisor)

    def metric(self, *names: str) -> float:
        """The sum of these, from one scrape."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=SECONDS) as response:
            found = re.findall(rf"^(?:{'|'.join(names)}) (\S+)$", response.read().decode(), re.M)
        assert len(found) == len(names)
        return sum(map(float, found))

    def wait_for_both(self) -> None:
        eventually(lambda: self.metric("cifar_processes") == 2)

    def sha256s(self, png: bytes) -> set[str]:
        """Of the weights behind the answers over many connections: that all of them meet one process is improbable."""
        answers = [get(f"{self.url}/predict", png)[1]["model"] for _ in range(CONNECTIONS)]
        return {str(model["sha256"]) for model in answers}  # type: ignore[index]


@contextmanager
def running(weights: Path, *arguments: str, program: Sequence[str] = ("-m", "app")) -> Iterator[Running]:
    options = ("--processes", "2", "--drain-seconds", "0", "--weights", str(weights), *arguments)
    with serving(*options, program=program, CIFAR_ADMIN_KEY=KEY) as (supervisor, url, line):
        assert " in 2 processes on " in line
        started = Running(supervisor, url, weights)
        try:
            started.wait_for_both()
            yield started
        finally:
            for pid in started.pids() if supervisor.poll() is None else []:
                os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    path = tmp_path_factory.mktemp("served") / "served.pth"
    checkpoint.save(random_checkpoint(evaluation=random_evaluation()), path)
    with running(path) as started:
        yield started


def test_the_address_is_reserved_before_the_first_process_listens() -> None:
    settings = Settings(port=0, processes=2, threads=6)
    with bind(settings) as listener:
        address = listener.getsockname()
        supervisor = Supervisor(settings, listener)
    with pytest.raises(SettingsError, match="Choose another port"):
        bind(replace(settings, port=address[1]))
    assert supervisor._settings.threads == 3
    with supervisor._bind() as own:
        own.listen()
        socket.create_connection(address).close()
    supervisor._reserved.close()


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    """Has started nothing; the test says what processes it has."""
    settings = Settings(port=0, processes=2, threads=2)
    made = Supervisor(settings, bind(settings))
    yield made
    made._reserved.close()


class Pretended(Worker):
    """A fake process; the test holds its end of the pipe."""

    def __init__(self, supervisor: Supervisor, **given: Any) -> None:
        pid = os.spawnlp(os.P_NOWAIT, "false", "false")
        end, self.its = multiprocessing.Pipe()  # after the process, which would have it until it runs the program
        super().__init__(pid, end, **given)
        self.signals: list[int] = []
        supervisor._workers.append(self)

    def signal(self, sent: int) -> None:
        self.signals.append(sent)


def test_failed_starts_are_retried_with_increasing_delay(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "time", SimpleNamespace(monotonic=lambda: 100.0))
    supervisor._announced = True
    waits = []
    for _ in range(7):
        supervisor._bury(Pretended(supervisor))
        waits.append(supervisor._start_at - 100)
    assert waits == [1, 2, 4, 8, 16, 30, 30]


def test_sighup_during_a_process_start_is_delivered_once_it_serves(supervisor: Supervisor) -> None:
    """It may have read the file already, and no other process may serve to report other weights."""
    worker = Pretended(supervisor)
    supervisor._pass_on(signal.SIGHUP)
    assert worker.signals == []  # it ignores them
    worker.its.send(ReadyNotice("torch", "0123", ("a", "b")))
    supervisor._receive(worker)
    assert worker.signals == [signal.SIGHUP]


def test_only_processes_with_other_weights_read_the_file_again(supervisor: Supervisor) -> None:
    """One that failed to read it before is asked again whenever another one has read it, even without news."""
    first, second = (Pretended(supervisor, ready=True, weights="old") for _ in range(2))
    for weights, signals in (("old", []), ("new", [signal.SIGHUP]), ("new", [signal.SIGHUP] * 2)):
        first.its.send(ReloadNotice(weights))
        supervisor._receive(first)
        assert (first.signals, second.signals) == ([], signals)
    second.its.send(ReloadNotice("new"))
    supervisor._receive(second)
    assert (first.signals, second.signals) == ([], [signal.SIGHUP] * 2)


def test_a_process_that_sometimes_answers_late_is_not_considered_stuck(supervisor: Supervisor) -> None:
    worker = Pretended(supervisor, ready=True)
    for _ in range(PATIENCE):
        supervisor._check()
        supervisor._check()
        assert worker.its.recv() == CountsRequest()
        worker.its.send(CountsReply(Counts()))
        supervisor._receive(worker)
    assert worker.signals == []


def test_a_process_that_takes_long_to_start_is_reported_once(
    supervisor: Supervisor, caplog: pytest.LogCaptureFixture
) -> None:
    worker = Pretended(supervisor)
    for _ in range(2 * PATIENCE):
        supervisor._check()
    assert caplog.messages == [f"Process {worker.pid} has not begun to serve yet."]
    worker.its.send(ReadyNotice("torch", "0123", ("a", "b")))
    supervisor._receive(worker)
    for _ in range(PATIENCE):
        supervisor._check()
    assert worker.signals == []  # it was not ready to answer before


def test_only_cumulative_counts_of_an_ended_process_are_kept(supervisor: Supervisor) -> None:
    asker = Pretended(supervisor, ready=True)
    gone = Pretended(supervisor, ready=True, counts=Counts(lines_dropped=3, pids=(1,), waiting=5, ready=False))
    supervisor._bury(gone)
    supervisor._rounds[asker] = set(), 0.0
    supervisor._answer(asker)
    total = asker.its.recv().counts
    assert (total.lines_dropped, total.pids, total.waiting, total.ready) == (3, (), 0, True)


def test_a_failed_start_is_not_retried_in_a_tight_loop(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[None] = []

    def start() -> None:
        tries.append(None)
        raise OSError("no room") if len(tries) < 9 else AssertionError("It tries for ever.")

    monkeypatch.setattr(supervisor, "_start", start)
    supervisor._announced = True
    supervisor._fill()
    supervisor._fill()
    assert len(tries) == 1


def test_a_supervisor_crash_closes_the_pipes_to_its_processes(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise they go on, and the supervisor waits for them."""

    def look_after(_signals: Connection) -> None:
        raise RuntimeError("a defect")

    worker = Pretended(supervisor)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    for step in ("_import", "_start"):
        monkeypatch.setattr(supervisor, step, lambda: None)
    monkeypatch.setattr(supervisor, "_look_after", look_after)
    with pytest.raises(RuntimeError, match="a defect"):
        supervisor.run()
    assert worker.its.poll()
    with pytest.raises(EOFError):
        worker.its.recv()


def test_the_supervisor_releases_the_address_on_sigterm(supervisor: Supervisor) -> None:
    supervisor._pass_on(signal.SIGTERM)
    bind(Settings(port=supervisor._address[1])).close()


def test_later_processes_use_the_first_ones_engine_and_restart_quickly_after_success(
    supervisor: Supervisor,
) -> None:
    supervisor._failures = 5
    worker = Pretended(supervisor)
    worker.its.send(ReadyNotice("openvino", "0123", ("a", "b")))
    supervisor._receive(worker)
    assert supervisor._settings.engine == "openvino"
    supervisor._bury(Pretended(supervisor))
    assert supervisor._start_at - time.monotonic() <= RETRY_SECONDS


def test_any_process_reports_the_totals_of_all_processes(service: Running, png: bytes) -> None:
    service.wait_for_both()
    before = done(service)
    for number in range(1, CONNECTIONS + 1):
        assert get(f"{service.url}/predict", png)[0] == 200
        assert done(service) == before + number
    statistics = get(f"{service.url}/v2/models/stats")[1]["model_stats"]
    assert statistics[0]["inference_count"] == before + CONNECTIONS  # type: ignore[index]


def test_many_clients_may_request_metrics_at_once(service: Running) -> None:
    """Both ends of a pipe once waited for each other, which was the end of the service."""
    service.wait_for_both()
    with ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(service.address, timeout=SECONDS)) for _ in range(600)]
        for client in clients:
            client.sendall(b"GET /metrics HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n")
        for client in clients:
            # One or two: after a while the process answers for itself alone, as on a slow machine here.
            assert b"cifar_processes " in b"".join(iter(partial(client.recv, 65536), b""))


def test_metrics_include_a_stuck_process_without_waiting_for_it(service: Running, png: bytes) -> None:
    service.wait_for_both()
    for _ in range(CONNECTIONS):
        assert get(f"{service.url}/predict", png)[0] == 200
    before = done(service)
    stuck = service.pids()[0]
    os.kill(stuck, signal.SIGSTOP)
    try:
        clients: list[socket.socket] = []
        answering: list[socket.socket] = []
        deadline = time.monotonic() + SECONDS
        while not answering:  # however often it is asked
            assert time.monotonic() < deadline
            clients.append(socket.create_connection(service.address, timeout=SECONDS))
            clients[-1].sendall(b"GET /metrics HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n")
            answering, _, _ = select.select(clients, [], [], 0.05)
        answer = b"".join(iter(partial(answering[0].recv, 65536), b""))
    finally:
        os.kill(stuck, signal.SIGCONT)
    assert f"cifar_inference_seconds_count {before}".encode() in answer
    for client in clients:
        client.close()


def test_a_stuck_process_is_killed_and_replaced(weights: Path, png: bytes) -> None:
    with running(weights, program=["-c", LESS_PATIENT]) as service:
        stuck, left = service.pids()
        os.kill(stuck, signal.SIGSTOP)
        eventually(lambda: not Path(f"/proc/{stuck}").exists())
        service.wait_for_both()
        assert left in service.pids()
        assert get(f"{service.url}/predict", png)[0] == 200
        service.supervisor.send_signal(signal.SIGTERM)
        _, err = service.supervisor.communicate(timeout=SECONDS)
        assert f"Process {stuck} is stuck and is killed." in err
        assert err.count("Another one replaces it.") == 1
        assert "for lack of memory" not in err


def test_a_process_is_not_replaced_by_one_that_answers_with_other_classes(tmp_path: Path, png: bytes) -> None:
    path = tmp_path / "served.pth"
    served = random_checkpoint()
    checkpoint.save(served, path)
    with running(path) as service:
        checkpoint.save(replace(served, classes=served.classes[::-1]), path)
        died, left = service.pids()
        tried: set[int] = set()
        os.kill(died, signal.SIGKILL)

        def two_have_been_tried() -> bool:
            tried.update(service.pids())
            return len(tried - {died, left}) == 2

        eventually(two_have_been_tried)
        answers = [get(f"{service.url}/predict", png)[1]["probabilities"] for _ in range(CONNECTIONS)]
        assert {tuple(answer) for answer in answers} == {served.classes}  # type: ignore[arg-type]
        checkpoint.save(served, path)
        service.wait_for_both()
        service.supervisor.send_signal(signal.SIGTERM)
        _, err = service.supervisor.communicate(timeout=SECONDS)
        assert "The weights file is for the classes truck, ship" in err


def test_a_process_that_cannot_be_replaced_at_once_is_replaced_later(weights: Path, png: bytes) -> None:
    with running(weights, program=["-c", NO_ROOM.format(range(3, 9))]) as service:
        died, left = service.pids()
        open_files = len(os.listdir(f"/proc/{service.supervisor.pid}/fd"))
        os.kill(died, signal.SIGKILL)
        eventually(lambda: died not in service.pids() and len(service.pids()) == 2)
        service.wait_for_both()
        assert left in service.pids()
        assert get(f"{service.url}/predict", png)[0] == 200
        assert len(os.listdir(f"/proc/{service.supervisor.pid}/fd")) == open_files
        service.supervisor.send_signal(signal.SIGTERM)
        _, err = service.supervisor.communicate(timeout=SECONDS)
        assert err.count("Another process could not be started and will be tried again: no room.") == 6
        assert "Traceback" not in err
        assert service.supervisor.returncode == 0


def test_if_not_even_one_process_can_be_started_the_service_says_so(weights: Path) -> None:
    arguments = command("--processes", "2", "--weights", str(weights), program=["-c", NO_ROOM.format([1])])
    ran = subprocess.run(arguments, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=SECONDS)
    assert (ran.returncode, ran.stderr) == (1, "No process could be started: no room.\n")


def test_process_memory_is_summed_over_all_processes(service: Running) -> None:
    service.wait_for_both()
    pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in service.pids()]
    assert service.metric("process_resident_memory_bytes") == pytest.approx(
        sum(pages) * os.sysconf("SC_PAGE_SIZE"), rel=0.1
    )
    assert abs(service.metric("process_start_time_seconds") - time.time()) < 3600


def done(service: Running) -> float:
    return service.metric("cifar_inference_seconds_count")


FORKED = """
import os, threading
from types import SimpleNamespace
from app.processes import Supervisor
Supervisor._import(SimpleNamespace(_settings=SimpleNamespace(engine="auto")))
import torch
if os.fork():
    os.wait()
    print(threading.active_count(), len(os.listdir("/proc/self/task")), flush=True)
else:
    print(getattr(torch._C, "_cuda_isInBadFork", bool)(), flush=True)
"""


def test_what_the_supervisor_imports_neither_uses_cuda_nor_leaves_a_thread_at_a_fork() -> None:
    warning = "error:This process:DeprecationWarning"  # of Python 3.12, if there are threads
    program = [sys.executable, "-W", warning, "-c", FORKED]
    ran = subprocess.run(program, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=SECONDS)
    assert (ran.returncode, ran.stdout) == (0, "False\n1 1\n")


def test_processes_share_what_imports_take(service: Running) -> None:
    service.wait_for_both()
    for pid in service.pids():
        kilobytes = dict(re.findall(r"^(\w+): +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M))
        own = int(kilobytes["Private_Clean"]) + int(kilobytes["Private_Dirty"])
        assert own < 0.4 * int(kilobytes["Rss"])


def test_the_supervisor_is_the_last_to_be_killed_for_lack_of_memory(service: Running) -> None:
    service.wait_for_both()
    supervisor, *workers = (
        int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for pid in (service.supervisor.pid, *service.pids())
    )
    assert workers == [min(supervisor + OOM_SCORE, 1000)] * 2


def test_a_killed_process_is_replaced_while_the_others_answer(service: Running, png: bytes) -> None:
    service.wait_for_both()
    assert get(f"{service.url}/predict", png)[0] == 200
    before, (killed, left) = done(service), service.pids()
    os.kill(killed, signal.SIGKILL)
    eventually(lambda: not Path(f"/proc/{killed}").exists())  # until then a connection may still be dealt to it
    asked = 0
    while len(service.pids()) < 2 or service.metric("cifar_processes") < 2:
        assert get(f"{service.url}/predict", png)[0] == 200
        asked += 1
    assert asked > 0
    assert left in service.pids()
    assert done(service) == before + asked  # what it had done is not forgotten
    assert service.supervisor.stderr is not None
    ended = f"Process {killed} ended (exit code -9). Another one replaces it."
    while ended not in (line := service.supervisor.stderr.readline()):  # other tests have their lines there
        assert line
    assert "for lack of memory" in service.supervisor.stderr.readline()


def test_a_process_that_cannot_start_again_is_tried_until_it_can(service: Running, png: bytes) -> None:
    service.wait_for_both()
    good, (killed, _) = service.weights.read_bytes(), service.pids()
    service.weights.write_bytes(b"not a network")
    os.kill(killed, signal.SIGKILL)
    assert service.supervisor.stderr is not None
    while "is not a PyTorch file" not in (line := service.supervisor.stderr.readline()):
        assert line
    assert get(f"{service.url}/predict", png)[0] == 200
    service.weights.write_bytes(good)
    eventually(lambda: service.metric("cifar_processes") == 2)


def test_new_weights_are_served_by_all_processes_and_bad_ones_by_none(service: Running, png: bytes) -> None:
    service.wait_for_both()
    old = checkpoint.load(service.weights).sha256[:12]
    service.weights.write_bytes(b"not a network")
    assert reload(service) == 409
    assert service.sha256s(png) == {old}
    service.supervisor.send_signal(signal.SIGHUP)
    assert service.supervisor.stderr is not None
    while "were not replaced" not in (line := service.supervisor.stderr.readline()):
        assert line
    assert json.loads(line)["level"] == "error"
    given = random_checkpoint(evaluation=random_evaluation())
    given.state_dict["fc3.bias"].fill_(1.0)
    new = checkpoint.save(given, service.weights)[:12]
    assert reload(service) == 200
    eventually(lambda: service.sha256s(png) == {new})
    given.state_dict["fc3.bias"].fill_(2.0)
    newer = checkpoint.save(given, service.weights)[:12]
    service.supervisor.send_signal(signal.SIGHUP)
    eventually(lambda: service.sha256s(png) == {newer})


def test_all_processes_switch_when_one_of_them_loads_new_weights(service: Running, png: bytes) -> None:
    """One alone is told to read the file; then one dies after the file has changed and nobody was told."""

    def all_serve(sha256: str) -> bool:
        with suppress(OSError):  # a connection to the process that dies
            return service.sha256s(png) == {sha256}
        return False

    service.wait_for_both()
    given = random_checkpoint(evaluation=random_evaluation())
    for bias, sent in ((3.0, signal.SIGHUP), (4.0, signal.SIGKILL)):
        given.state_dict["fc3.bias"].fill_(bias)
        new = checkpoint.save(given, service.weights)[:12]
        os.kill(service.pids()[0], sent)
        eventually(partial(all_serve, new))
        service.wait_for_both()


def reload(service: Running) -> int:
    request = urllib.request.Request(
        f"{service.url}/admin/reload", method="POST", headers={"authorization": f"Bearer {KEY}"}
    )
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_all_that_was_admitted_is_answered_before_the_processes_end(weights: Path, sent: signal.Signals) -> None:
    with (
        running(weights, "--deadline-seconds", "60", "--max-waiting", "9999") as service,
        ThreadPoolExecutor(8) as pool,
    ):
        pids = service.pids()
        body = bytes(1024 * IMAGE_BYTES)
        asked = [pool.submit(post, service.url, "/predict/batch", body) for _ in range(8)]
        admitted = ("cifar_queue_depth", "cifar_batch_size_sum")  # waiting, and run
        eventually(lambda: service.metric(*admitted) == 8 * 1024)
        service.supervisor.send_signal(sent)
        assert [each.result().status for each in asked] == 8 * [200]
        assert service.supervisor.wait(SECONDS) == 0
        assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []


def test_processes_end_when_their_supervisor_was_killed(weights: Path) -> None:
    with running(weights) as service:
        pids = service.pids()
        service.supervisor.kill()
        eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def starting(weights: Path, group: int | None = None) -> "subprocess.Popen[str]":
    """A supervisor whose first process does not serve yet; with 0, in a process group of its own."""
    supervisor = subprocess.Popen(
        command("--processes", "2", "--weights", str(weights)),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=group,
    )
    try:
        eventually(lambda: len(pids_of(supervisor)) == 1)
    except BaseException:  # an interrupt, too: no process may stay
        supervisor.kill()
        supervisor.communicate()
        raise
    return supervisor


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_first_process_starts_ends_it_cleanly(weights: Path, sent: signal.Signals) -> None:
    supervisor = starting(weights)
    supervisor.send_signal(sent)
    out, err = supervisor.communicate(timeout=SECONDS)
    assert (supervisor.returncode, out, err) == (0, "", "")


def test_ctrl_c_at_a_terminal_reaches_the_supervisor_alone(weights: Path) -> None:
    """A starting process would end at once. It leaves the group first of all."""
    supervisor = starting(weights, group=0)
    try:
        os.killpg(supervisor.pid, signal.SIGINT)
        out, err = supervisor.communicate(timeout=SECONDS)
        assert (supervisor.returncode, out, err) == (0, "", "")
    finally:
        supervisor.kill()
        supervisor.communicate()


def test_the_service_ends_if_its_first_process_is_killed_before_it_serves(weights: Path) -> None:
    supervisor = starting(weights)
    os.kill(pids_of(supervisor)[0], signal.SIGKILL)
    out, err = supervisor.communicate(timeout=SECONDS)
    assert (supervisor.returncode, out) == (1, "")
    assert "ended (exit code -9) before it could serve." in err


def test_a_startup_error_is_printed_once(tmp_path: Path) -> None:
    shutil.copy(__file__, tmp_path / "net.pth")
    assert "is not a PyTorch file" in refusal("--processes", "2", "--weights", str(tmp_path / "net.pth"))


def test_a_message_that_comes_in_pieces_is_read_whole() -> None:
    import uvloop  # which makes the pipe non-blocking

    own, its = multiprocessing.Pipe()
    gone: list[bool] = []

    def tell() -> None:
        assert own.recv() == ReadyNotice("torch", "0123", ("a", "b"))
        assert own.recv() == TotalRequest()
        message = bytes(ForkingPickler.dumps(TotalReply(Counts(lines_dropped=7))))
        os.write(own.fileno(), struct.pack("!i", len(message)))
        time.sleep(0.1)
        os.write(own.fileno(), message)

    async def ask() -> Counts:
        link = Link(its)
        link.open(ReadyNotice("torch", "0123", ("a", "b")), Counts, lambda: gone.append(True))
        return await asyncio.wait_for(link.total(), SECONDS)

    with own, its, ThreadPoolExecutor(1) as pool:
        pool.submit(tell)
        assert uvloop.run(ask()).lines_dropped == 7
    assert not gone


def test_a_process_without_its_supervisor_reports_its_own_counts() -> None:
    own, its = multiprocessing.Pipe()
    gone: list[bool] = []

    async def ask() -> tuple[Counts, Counts]:
        link = Link(its)
        link.open(ReadyNotice("torch", "0123", ("a", "b")), lambda: Counts(lines_dropped=3), lambda: gone.append(True))
        waiting = asyncio.create_task(link.total())
        await asyncio.sleep(0)
        own.close()
        before = await asyncio.wait_for(waiting, SECONDS)
        link.reloaded("4567")
        return before, await asyncio.wait_for(link.total(), SECONDS)

    with its:
        assert [counts.lines_dropped for counts in asyncio.run(ask())] == [3, 3]
    assert gone == [True]


def test_a_process_whose_supervisor_is_gone_before_it_serves_stops() -> None:
    own, its = multiprocessing.Pipe()
    own.close()

    async def begin() -> None:
        gone = asyncio.Event()
        Link(its).open(ReadyNotice("torch", "0123", ("a", "b")), Counts, gone.set)
        await asyncio.wait_for(gone.wait(), SECONDS)

    with its:
        asyncio.run(begin())


def test_a_process_whose_supervisor_is_silent_reports_its_own_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "REPLY_SECONDS", 0.01)
    own, its = multiprocessing.Pipe()

    async def ask() -> list[Counts]:
        link = Link(its)
        link.open(ReadyNotice("torch", "0123", ("a", "b")), lambda: Counts(lines_dropped=3), lambda: None)
        return [await asyncio.wait_for(link.total(), SECONDS) for _ in range(2)]

    with own, its:
        assert [counts.lines_dropped for counts in asyncio.run(ask())] == [3, 3]


def test_counts_can_be_pickled_and_merged() -> None:
    def counted(seconds: float, pictures: int) -> Counts:
        counts = Counts(pids=(pictures,), waiting=pictures, ready=pictures < 3, lines_dropped=1)
        counts.traffic.seconds["/predict", "POST", 200].add(seconds)
        counts.traffic.refusals["overloaded"] += pictures
        counts.statistics.record([Timing(seconds, seconds, seconds)], pictures, now=seconds)
        counts.predictions.record([[0.1, 0.9]] * pictures, ("cat", "dog"))
        return counts

    total = Counts()
    for counts in (counted(1.0, 2), counted(3.0, 5)):
        total.merge(pickle.loads(pickle.dumps(counts)))
    assert (total.pids, total.waiting, total.ready, total.lines_dropped) == ((2, 5), 7, False, 2)
    assert total.traffic.seconds["/predict", "POST", 200].sum == 4.0
    assert total.traffic.refusals == {"overloaded": 7}
    assert (total.statistics.pictures, total.statistics.batches.count, total.statistics.last_at) == (7, 2, 3.0)
    assert (total.statistics.queue.count, total.statistics.queue.sum) == (2, 4.0)
    assert total.statistics.batches.sum == 7
    assert total.predictions.classes == {"dog": 7}
    assert total.predictions.confidence.count == 7
