"""`make bench`: training speed, requests per second, start-up time and memory on this machine, as one table.

Speed does not depend on what the pictures show, so no data set is needed. Requests come from wrk, on the same machine:
install it from your system's packages. Run the benchmark while nothing else runs.
"""

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision.transforms as transforms
from bench_training import compare
from PIL import Image
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader, Dataset

from app import checkpoint, model
from app.admission import USUAL_BATCH
from app.data import Split
from app.device import choose_device, describe
from app.predictor import Predictor, build
from app.settings import Settings, parse_settings
from app.steps import finish
from training.config import RECIPES
from training.fit import fit, initialize

ROOT = Path(__file__).parent.parent
CONNECTIONS = (1, 16, 64)
SECONDS = 8
BATCH, BATCH_CONNECTIONS = 256, 4

# wrk sends each body in turn; `done` prints what the table needs.
LUA = """
local bodies, next = {}, 0
init = function(args)
  for name in io.lines(args[1]) do
    local file = io.open(name, "rb")
    bodies[#bodies + 1] = wrk.format("POST", nil, {["Content-Type"] = args[2]}, file:read("*a"))
    file:close()
  end
end
request = function() next = next % #bodies + 1; return bodies[next] end
done = function(summary, latency)
  local e = summary.errors
  print(string.format('RESULT {"rate": %f, "p50": %f, "p99": %f, "errors": %d}',
    summary.requests / summary.duration * 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    e.connect + e.read + e.write + e.status + e.timeout))
end
"""


def pictures(count: int) -> Tensor:
    """Smooth random pictures, uint8 (N, 3, 32, 32), about as compressible as photographs."""
    generator = torch.Generator().manual_seed(0)
    coarse_NCHW = torch.rand(count, 3, 6, 6, generator=generator) * 255
    smooth_NCHW = nn.functional.interpolate(coarse_NCHW, size=(32, 32), mode="bicubic")
    grain_NCHW = torch.randn(count, 3, 32, 32, generator=generator) * 2
    return (smooth_NCHW + grain_NCHW).clamp(0, 255).to(torch.uint8)


def split(count: int) -> Split:
    classes = tuple("0123456789")
    return Split(name="random", classes=classes, pixels_NCHW=pictures(count), labels_N=torch.arange(count) % 10)


class TutorialDataset(Dataset[tuple[Tensor, int]]):
    """What torchvision's CIFAR10 does for each image, on random ones."""

    def __init__(self, images: Split) -> None:
        self.pixels_NHWC = images.pixels_NCHW.permute(0, 2, 3, 1).numpy()
        self.targets = images.labels_N.tolist()
        self.transform = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))]
        )

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels_NHWC[index])), self.targets[index]


def tutorial_as_written(images: Split) -> float:
    """Images per second of the tutorial's own loop: DataLoader with two workers, batches of 4."""
    loader = DataLoader(TutorialDataset(images), batch_size=4, shuffle=True, num_workers=2)
    net = model.build("net")
    # The tutorial normalises in its loader, not in its Net; make ours skip what is done already.
    net.mean.zero_()
    net.std.fill_(1 / 255)
    criterion, optimizer = nn.CrossEntropyLoss(), optim.SGD(net.parameters(), lr=0.001, momentum=0.9)
    iterator = iter(loader)
    next(iterator)  # the workers have started
    start, count, running_loss = time.perf_counter(), 0, 0.0
    for inputs, labels in iterator:
        optimizer.zero_grad()
        loss = criterion(net(inputs), labels)
        loss.backward()
        optimizer.step()
        running_loss += loss.item()
        count += len(labels)
    return count / (time.perf_counter() - start)


def recipe_speed(name: str, images: Split) -> float:
    """Images per second of one epoch under a recipe, after a first one that warms up."""
    recipe = RECIPES[name]
    network = model.build(recipe.network)
    initialize(network, recipe, images.pixels_NCHW)
    rows = fit(network, images, replace(recipe, epochs=2), device=choose_device())
    return rows[-1]["images_per_second"]


class Running(NamedTuple):
    """`python -m app` on a free port."""

    port: int
    process: subprocess.Popen[bytes]
    ready_seconds: float
    """From the command until the first process served."""
    full_seconds: float
    """Until all processes did."""

    @property
    def workers(self) -> list[str]:
        """The ids of the processes that it has started."""
        return Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()

    def megabytes(self) -> float:
        """Memory of all processes. What they share is counted once, as much as the one that shares most."""
        taken = [memory_megabytes(pid) for pid in (str(self.process.pid), *self.workers)]
        return sum(own for own, _ in taken) + max(shared for _, shared in taken)

    def replacement_seconds(self) -> float:
        """Until another process has taken the place of one that was killed."""
        killed = self.workers[-1]
        start = time.perf_counter()
        os.kill(int(killed), signal.SIGKILL)
        while killed in self.workers:  # until its death is noticed, it still counts
            time.sleep(0.001)
        await_answer(self.process, self.port, "/metrics", f"\ncifar_processes {processes()}.0\n")
        return time.perf_counter() - start


def memory_megabytes(pid: str) -> tuple[float, float]:
    """What a process has for itself, and what it shares."""
    kilobytes = dict(re.findall(r"^(\w+): +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M))
    own, shared = (
        sum(int(kilobytes[f"{whose}_{state}"]) for state in ("Clean", "Dirty")) for whose in ("Private", "Shared")
    )
    return own / 1024, shared / 1024


def processes() -> int:
    """How many serve."""
    return parse_settings([], os.environ).processes


def await_answer(process: subprocess.Popen[bytes], port: int, path: str, expected: str) -> None:
    """Ask until the answer holds `expected`."""
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=1) as response:
                if expected in response.read().decode():
                    return
        except OSError:
            if process.poll() is not None:
                sys.exit("The service did not start; `make serve` says why.")
        time.sleep(0.02)


@contextmanager
def service(*flags: str) -> Iterator[Running]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "app", "--port", str(port), *flags],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    try:
        await_answer(process, port, "/readyz", "ready")
        ready_seconds = time.perf_counter() - start
        await_answer(process, port, "/metrics", f"\ncifar_processes {processes()}.0\n")
        yield Running(port, process, ready_seconds, time.perf_counter() - start)
    finally:
        process.terminate()
        process.wait(timeout=30)


def write_bodies(folder: Path, kind: str) -> tuple[Path, str]:
    """128 request bodies of that kind and their content type."""
    names = []
    boundary = "boundary7d1f3c"
    for index, image in enumerate(pictures(128)):
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG")
        body = file.getvalue()
        if kind == "multipart":
            head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
            body = head.encode() + body + f"\r\n--{boundary}--\r\n".encode()
        path = folder / f"{kind}-{index}"
        path.write_bytes(body)
        names.append(str(path))
    listing = folder / f"{kind}.txt"
    listing.write_text("\n".join(names) + "\n")
    return listing, "image/png" if kind == "raw" else f"multipart/form-data; boundary={boundary}"


def write_pixels(folder: Path) -> Path:
    """Request bodies of raw pixels, `BATCH` pictures each."""
    names = []
    for index, part_NCHW in enumerate(pictures(4 * BATCH).split(BATCH)):
        (path := folder / f"pixels-{index}").write_bytes(part_NCHW.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
        names.append(str(path))
    (listing := folder / "pixels.txt").write_text("\n".join(names) + "\n")
    return listing


def engine_speeds(architecture: str) -> tuple[float, float]:
    """The service's engine alone: milliseconds for one picture, and pictures per second in full batches."""
    settings = Settings()
    random = checkpoint.Checkpoint(
        architecture=architecture,
        arguments={},
        state_dict=model.build(architecture).state_dict(),
        classes=checkpoint.CIFAR10_CLASSES,
    )
    predictor = finish(build(random, choose_device(), threads=settings.threads, max_batch=settings.max_batch))
    return 1e3 / _pictures_a_second(predictor, 1), _pictures_a_second(predictor, USUAL_BATCH)


@torch.inference_mode()
def _pictures_a_second(predictor: Predictor, batch: int) -> float:
    pixels_NCHW = pictures(batch).contiguous(memory_format=torch.channels_last)
    for _ in range(10):
        predictor.engine(pixels_NCHW)
    start, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < SECONDS / 2:
        predictor.engine(pixels_NCHW)
        count += batch
    return count / elapsed


def load(
    port: int,
    connections: int,
    script: Path,
    listing: Path,
    content_type: str,
    seconds: int,
    path: str = "/predict",
) -> dict[str, float]:
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "20s", "-s", str(script)]
    command += [f"http://127.0.0.1:{port}{path}", "--", str(listing), content_type]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(json.loads(next(line for line in output.splitlines() if line.startswith("RESULT"))[7:]))


def check_tools() -> None:
    if shutil.which("wrk") is None:
        sys.exit("wrk is missing, the program that makes the requests: install it from your system's packages.")
    if not Path("/proc/self/smaps_rollup").exists():
        sys.exit("This measures on Linux only: it reads the memory of processes from /proc.")


def main() -> None:
    check_tools()
    print(f"{describe(choose_device())}, {os.cpu_count()} cores, torch {torch.__version__}\n")
    print("| measured | value |\n| --- | --- |")
    small, large = split(6_000), split(4_096)
    print(f"| training, the tutorial's loop as written | {tutorial_as_written(small):,.0f} images/s |")
    print(f"| training, recipe `tutorial` | {recipe_speed('tutorial', small):,.0f} images/s |")
    speeds = compare(large)
    print(f"| training, recipe `default` with its two teachers | {speeds['ours']:,.0f} images/s |")
    print(f"| ... without teachers | {speeds['ours without teachers']:,.0f} images/s |")
    print(f"| training, airbench94's network and step | {speeds['airbench94']:,.0f} images/s |", flush=True)
    for architecture in model.NETWORKS:
        milliseconds, rate = engine_speeds(architecture)
        print(f"| the engine alone, {architecture}, one picture | {milliseconds:.2f} ms |")
        print(f"| the engine alone, {architecture}, batches of 32 | {rate:,.0f} pictures/s |", flush=True)
    with service("--engine", "torch") as running:
        print(f"| start-up with the engine torch, command to ready | {running.ready_seconds:.1f} s |")
    with service() as running, tempfile.TemporaryDirectory() as name:
        script = Path(name) / "post.lua"
        script.write_text(LUA)
        print(f"| start-up, command to ready | {running.ready_seconds:.1f} s |")
        print(f"| ... to all processes ready | {running.full_seconds:.1f} s |")
        print(f"| memory when ready | {running.megabytes():,.0f} MB |")
        for kind in ("raw", "multipart"):
            listing, content_type = write_bodies(Path(name), kind)
            load(running.port, 16, script, listing, content_type, 2)
            for connections in CONNECTIONS:
                result = load(running.port, connections, script, listing, content_type, SECONDS)
                failed = f", {result['errors']:.0f} errors" if result["errors"] else ""
                print(
                    f"| `/predict`, {kind} PNG, {connections} connections | {result['rate']:,.0f} requests/s, "
                    f"p50 {result['p50']:.1f} ms, p99 {result['p99']:.1f} ms{failed} |",
                    flush=True,
                )
        listing = write_pixels(Path(name))
        octets = "application/octet-stream"
        rate = load(running.port, BATCH_CONNECTIONS, script, listing, octets, SECONDS, "/predict/batch")["rate"]
        print(f"| `/predict/batch`, raw pixels, {BATCH} a request | {BATCH * rate:,.0f} pictures/s |")
        print(f"| memory after the load | {running.megabytes():,.0f} MB |")
        if processes() > 1:
            print(f"| a killed process is replaced after | {running.replacement_seconds():.1f} s |")


if __name__ == "__main__":
    main()
