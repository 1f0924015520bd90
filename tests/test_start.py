"""`python -m app` as a person or a container starts it: real processes, real sockets, real signals."""

import dataclasses
import os
import pickle
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import Hostile, random_checkpoint
from running import ROOT, SECONDS, command, environment, eventually, get, refusal, says_only_that_it_stops, serving

from app import checkpoint, self_test
from app.batching import BROKEN_BATCHES
from app.server import BROKEN

ALONE = pytest.mark.skipif(sys.platform != "linux", reason="several processes can share an address on Linux only")
TWO = pytest.param("2", marks=ALONE)


def test_the_service_announces_itself_serves_and_ends_cleanly(weights: Path, png: bytes) -> None:
    with serving("--drain-seconds", "0", CIFAR_WEIGHTS=str(weights)) as (process, url, line):
        sha256 = checkpoint.load(weights).sha256[:12]
        numbers = r"(bfloat16|float32) with torch on .*, 1 threads"
        assert re.fullmatch(rf"Serving .*net\.pth: net {sha256} \(.*% on random test\), {numbers} on http://.*\n", line)
        assert get(f"{url}/readyz")[0] == 200
        status, answer = get(f"{url}/predict", png)
        assert status == 200
        assert answer["model"] == {"name": "net", "sha256": sha256}
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=SECONDS)
        assert (process.returncode, out) == (0, "")
        assert says_only_that_it_stops(err)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_startup_ends_the_service_cleanly(weights: Path, sent: signal.Signals) -> None:
    """As soon as the server has taken over the signals, which is before the network is built."""
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED_AT_THE_START, sent.name],
        cwd=ROOT,
        env=environment(
            CIFAR_WEIGHTS=str(weights),
            CIFAR_PORT="0",
            CIFAR_DEVICE="cpu",
            CIFAR_ENGINE="torch",
            CIFAR_PROCESSES="1",
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    out, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, out, err) == (0, "", "")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not show what a process catches")
@pytest.mark.parametrize(("sent", "exit_codes"), [(signal.SIGTERM, {0}), (signal.SIGINT, {0, 130})])
def test_a_signal_while_torch_is_imported_ends_the_service_silently(
    weights: Path, sent: signal.Signals, exit_codes: set[int]
) -> None:
    """The kernel ignores SIGTERM for the first process of a container that does not catch it."""
    process = subprocess.Popen(
        command("--weights", str(weights)),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    eventually(lambda: signals(process.pid, "SigCgt", signal.SIGTERM))  # this handler is installed last
    process.send_signal(sent)
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode in exit_codes
    assert (out, err) == ("", "")


FEW_FILES = """
import resource, runpy

_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (256, most))
runpy.run_module("app", run_name="__main__")
"""


@pytest.mark.skipif(
    not Path("/proc/self/limits").exists(), reason="this system does not show limits of other processes"
)
def test_the_limit_on_open_files_is_raised_at_startup(weights: Path) -> None:
    arguments = ("--drain-seconds", "0", "--weights", str(weights))
    with serving(*arguments, program=("-c", FEW_FILES)) as (process, _, _):
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        limit, most = re.findall(r"^Max open files +(\S+) +(\S+)", limits, re.MULTILINE)[0]
        assert int(limit) == (min(int(most), 16_384) if most.isdigit() else 16_384)


@pytest.mark.parametrize("processes", ["1", TWO])
def test_a_name_that_stdout_cannot_express_is_escaped(weights: Path, tmp_path: Path, processes: str) -> None:
    named = shutil.copy(weights, tmp_path / "été.pth")
    arguments = ("--drain-seconds", "0", "--processes", processes, "--weights", str(named))
    with serving(*arguments, PYTHONIOENCODING="ascii") as (_, _, line):
        assert r"\xe9t\xe9.pth: net" in line


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no such device")
def test_a_full_disk_behind_stdout_does_not_prevent_serving(weights: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with open("/dev/full", "w") as full:
        process = subprocess.Popen(
            command("--drain-seconds", "0", "--weights", str(weights), "--port", str(port)),
            cwd=ROOT,
            env=environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    try:
        eventually(lambda: serves(port))
        process.terminate()
        _, err = process.communicate(timeout=SECONDS)
        assert process.returncode == 0
        assert says_only_that_it_stops(err)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("processes", ["1", TWO])
def test_closed_standard_streams_do_not_prevent_serving(weights: Path, processes: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started = shlex.join(command("--drain-seconds", "0", "--weights", str(weights), "--port", str(port)))
    process = subprocess.Popen(
        ["sh", "-c", f"exec {started} --processes {processes} <&- >&- 2>&-"], cwd=ROOT, env=environment()
    )
    try:
        eventually(lambda: serves(port))
        process.terminate()
        assert process.wait(SECONDS) == 0
    finally:
        process.kill()
        process.wait()


def serves(port: int) -> bool:
    try:
        return get(f"http://127.0.0.1:{port}/readyz")[0] == 200
    except OSError:
        return False


STOPPED_AT_THE_START = """
import os, signal, sys
from app import __main__ as command
from app.batching import Batcher

start = Batcher.start
def stop_and_start(batcher, building):
    os.kill(os.getpid(), signal.Signals[sys.argv[1]])
    start(batcher, building)
Batcher.start = stop_and_start
sys.exit(command.main([], os.environ))
"""


def test_after_sigterm_the_service_is_unready_but_serves_until_a_second_signal(weights: Path, png: bytes) -> None:
    with serving("--drain-seconds", "600", "--weights", str(weights)) as (process, url, _):
        process.send_signal(signal.SIGTERM)
        eventually(lambda: get(f"{url}/readyz")[0] == 503)
        for _ in range(10):  # half a second, some ticks of the server: it would have closed by now if it meant to
            assert get(f"{url}/readyz")[0] == 503
            assert get(f"{url}/predict", png)[0] == 200
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 0


def test_ctrl_c_ends_it_at_once_and_cleanly(weights: Path) -> None:
    with serving("--drain-seconds", "600", "--weights", str(weights)) as (process, _, _):
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=SECONDS)
        assert (process.returncode, out) == (0, "")
        assert says_only_that_it_stops(err)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not show what a process ignores")
def test_sighup_before_the_port_is_open_does_not_end_the_service(weights: Path) -> None:
    process = subprocess.Popen(
        command("--drain-seconds", "0", "--weights", str(weights)),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        eventually(lambda: signals(process.pid, "SigIgn", signal.SIGHUP))
        process.send_signal(signal.SIGHUP)
        assert process.stdout is not None
        assert process.stdout.readline().startswith("Serving ")
        process.terminate()
        assert process.wait(SECONDS) == 0
    finally:
        process.kill()
        process.communicate()


def signals(pid: int, kind: str, of: signal.Signals) -> bool:
    """Whether a process catches (SigCgt) or ignores (SigIgn) a signal."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(f"{kind}:"))
    return bool(int(line.split()[1], 16) & 1 << of - 1)


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    sentence = refusal(CIFAR_WEIGHTS=str(tmp_path / "none.pth"))
    assert sentence.startswith(f"There is no weights file {tmp_path / 'none.pth'}.")
    assert "python -m training train" in sentence


def test_unusable_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.pth"
    path.write_bytes(pickle.dumps(Hostile(tmp_path / "trap")))
    sentence = refusal("--weights", str(path))
    assert str(path) in sentence
    assert "It must be a file written by" in sentence
    assert not (tmp_path / "trap").exists()


def test_weights_that_compute_differently_than_when_trained_are_refused(tmp_path: Path) -> None:
    given = random_checkpoint()
    drawn_NK = given.network()(self_test.drawings()).softmax(dim=1)
    checkpoint.save(dataclasses.replace(given, self_test_NK=drawn_NK), tmp_path / "good.pth")
    with serving("--weights", str(tmp_path / "good.pth")) as (_, url, _):
        assert get(f"{url}/readyz")[0] == 200
    given.state_dict["fc3.bias"] = given.state_dict["fc3.bias"] + torch.linspace(-2, 2, 10)
    checkpoint.save(dataclasses.replace(given, self_test_NK=drawn_NK), tmp_path / "bad.pth")
    sentence = refusal("--weights", str(tmp_path / "bad.pth"))
    assert re.match(
        r"The network computes wrongly here: it gives a drawing a probability that is 0\.\d\d from", sentence
    )


def is_foreign(address: str) -> bool:
    """Whether this machine cannot listen on it."""
    with socket.socket() as tried:
        try:
            tried.bind((address, 0))
        except OSError:
            return True
    return False


def test_invalid_settings_are_refused() -> None:
    assert refusal(CIFAR_PORTS="1") == "There is no setting CIFAR_PORTS. Did you mean CIFAR_PORT?"
    for name in (
        "a..b",
        *filter(is_foreign, ("192.0.2.1", "198.51.100.1")),
    ):  # impossible, and reserved (RFC 5737)
        sentence = refusal("--host", name)
        assert sentence.startswith(f"The service cannot listen on {name}, port 0: ")
        assert sentence.endswith(" Name an address of this machine with --host or CIFAR_HOST.")
    assert refusal("--port", "many").startswith("--port is 'many'; it must be a whole number")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device that the test must miss")
def test_an_unavailable_device_is_refused(weights: Path) -> None:
    sentence = refusal("--device", "cuda", "--weights", str(weights))
    assert sentence.startswith("The device 'cuda' is not available on this machine; it has:")


def test_a_port_already_in_use_is_refused(weights: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        sentence = refusal("--port", str(port), "--weights", str(weights))
    assert sentence.startswith(f"The service cannot listen on 127.0.0.1, port {port}: Address already in use.")


BROKEN_ENGINE = """
import os, sys
from app.predictor import Predictor
def fail(*_):
    raise RuntimeError("the device is gone")
Predictor.estimate_each = fail
from app.__main__ import main
sys.exit(main(sys.argv[1:], os.environ))
"""


def test_a_process_ends_when_its_engine_is_broken(weights: Path, png: bytes) -> None:
    with serving("--weights", str(weights), program=["-c", BROKEN_ENGINE]) as (process, url, _):
        assert [get(f"{url}/predict", png)[0] for _ in range(BROKEN_BATCHES)] == [500] * BROKEN_BATCHES
        _, err = process.communicate(timeout=SECONDS)
        assert process.returncode == BROKEN
        assert "This process cannot do its work any more" in err


HUNG_ENGINE = """
import os, sys, time
from app import server
from app.predictor import Predictor
Predictor.estimate_each = lambda *_: time.sleep(1000)
server.WATCH_TICKS = 3
from app.__main__ import main
sys.exit(main(sys.argv[1:], os.environ))
"""


def test_a_process_ends_when_its_engine_hangs(weights: Path, png: bytes, tmp_path: Path) -> None:
    """Also if weights wait to be exchanged, which takes the thread that hangs."""
    file = tmp_path / "served.pth"
    shutil.copy(weights, file)
    with serving("--weights", str(file), "--deadline-seconds", "1", program=["-c", HUNG_ENGINE]) as (process, url, _):
        assert get(f"{url}/predict", png)[0] == 504
        checkpoint.save(random_checkpoint(), file)
        process.send_signal(signal.SIGHUP)
        _, err = process.communicate(timeout=SECONDS)
        assert process.returncode == BROKEN
        assert "This process cannot do its work any more" in err


HUNG_RELOAD = """
import os, sys, time
from app import service
load, calls = service.load, []
def hang_later(path):
    calls.append(path)
    if len(calls) > 1:
        print("reading", flush=True)
        time.sleep(1000)
    return load(path)
service.load = hang_later
from app.__main__ import main
sys.exit(main(sys.argv[1:], os.environ))
"""


def test_a_reload_that_hangs_does_not_keep_the_process(weights: Path) -> None:
    with serving("--weights", str(weights), program=["-c", HUNG_RELOAD]) as (process, _, _):
        process.send_signal(signal.SIGHUP)
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=SECONDS)
        assert process.returncode == 0


HUNG_DATA = """
import runpy, time
from app import data
def hang(path):
    path.with_name("reading").touch()
    time.sleep(1000)
data._decode_or_refuse = hang
runpy.run_module("app", run_name="__main__", alter_sys=True)
"""


def test_a_data_set_that_cannot_be_read_to_its_end_does_not_keep_the_process(
    weights: Path, tmp_path: Path, png: bytes
) -> None:
    for name in ("train/cat", "train/dog", "test/cat", "test/dog"):
        (folder := tmp_path / name).mkdir(parents=True)
        (folder / "a.png").write_bytes(png)
    arguments = ("--weights", str(weights), "--data", str(tmp_path), "--drain-seconds", "0")
    with serving(*arguments, program=["-c", HUNG_DATA]) as (process, _, _):
        eventually(lambda: any(tmp_path.rglob("reading")))
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=SECONDS)
        assert process.returncode == 0


@pytest.mark.parametrize("processes", ["1", TWO])
def test_an_error_message_that_nobody_reads_does_not_keep_the_process(tmp_path: Path, processes: str) -> None:
    reader, writer = os.pipe()
    with open(reader, "rb"), open(writer, "wb") as log:
        os.set_blocking(writer, False)
        with suppress(BlockingIOError):
            while True:
                os.write(writer, bytes(4096))
        os.set_blocking(writer, True)
        arguments = command("--processes", processes, "--weights", str(tmp_path / "none.pth"))
        assert subprocess.run(arguments, cwd=ROOT, env=environment(), stderr=log, timeout=SECONDS).returncode == 1


TAKEN_MEANWHILE = """
import socket, sys
from pathlib import Path
from app.server import serve
from app.settings import Settings
ours, other = socket.socket(), socket.socket()
for each in (ours, other):
    each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
ours.bind(("127.0.0.1", 0))
other.bind(ours.getsockname())
other.listen()
sys.exit(serve(Settings(weights=Path(sys.argv[1]), device="cpu", engine="torch", threads=1), ours))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere two sockets cannot be bound to one address like this")
def test_a_port_taken_by_another_program_during_startup_is_reported(weights: Path) -> None:
    program = [sys.executable, "-c", TAKEN_MEANWHILE, str(weights)]
    ran = subprocess.run(program, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=SECONDS)
    assert ran.returncode == 1
    assert "The service cannot listen: Address already in use. Choose another port with --port." in ran.stderr
    assert "Traceback" not in ran.stderr


EXCHANGED_MEANWHILE = """
import os, shutil, signal, sys
from app import server
create_app, other = server.create_app, sys.argv.pop()
def create_and_exchange(settings, classes):
    app = create_app(settings, classes)
    shutil.copy(other, settings.weights)
    os.kill(os.getpid(), signal.SIGHUP)
    return app
server.create_app = create_and_exchange
from app.__main__ import main
code = main(sys.argv[1:], os.environ)
os.kill(os.getpid(), signal.SIGHUP)
sys.exit(code)
"""


def test_weights_exchanged_during_startup_are_served_and_a_late_sighup_is_harmless(
    weights: Path, tmp_path: Path, png: bytes
) -> None:
    """The file has been read already when SIGHUP comes; and it comes again when the event loop is gone."""
    given = random_checkpoint()
    given.state_dict["fc3.bias"] = torch.linspace(-3, 3, 10)
    new = checkpoint.save(given, tmp_path / "new.pth")[:12]
    shutil.copy(weights, tmp_path / "served.pth")
    arguments = ["--drain-seconds", "0", "--weights", str(tmp_path / "served.pth"), str(tmp_path / "new.pth")]

    def served() -> object:
        model = get(f"{url}/predict", png)[1]["model"]
        assert isinstance(model, dict)
        return model["sha256"]

    with serving(*arguments, program=["-c", EXCHANGED_MEANWHILE]) as (process, url, _):
        eventually(lambda: served() == new)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=SECONDS)
        assert process.returncode == 0


def test_help_needs_no_weights() -> None:
    program = [sys.executable, "-m", "app", "--help"]
    nowhere = environment(CIFAR_WEIGHTS="nowhere")
    ran = subprocess.run(program, cwd=ROOT, env=nowhere, capture_output=True, text=True, timeout=SECONDS, check=True)
    assert "--max-body-bytes" in ran.stdout
    assert ran.stderr == ""
