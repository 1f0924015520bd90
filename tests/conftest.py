"""What several test files share: small checkpoints of random weights, pictures drawn by code, a running service."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fastapi.testclient import TestClient
from PIL import Image
from torch import Tensor

from app import checkpoint, model
from app.admission import Load
from app.checkpoint import CIFAR10_CLASSES, Checkpoint
from app.data import Split
from app.main import create_app
from app.report import Evaluation, evaluate_probabilities
from app.service import Service
from app.settings import Settings

os.environ["no_proxy"] = "*"  # urllib would ask a proxy even for what is on this machine


def random_checkpoint(architecture: str = "net", evaluation: Evaluation | None = None) -> Checkpoint:
    """A checkpoint with the same random weights each time."""
    torch.manual_seed(7)
    network = model.build(architecture, num_classes=10)
    return Checkpoint(
        architecture=architecture,
        arguments={"num_classes": 10},
        state_dict=network.state_dict(),
        classes=CIFAR10_CLASSES,
        evaluation=evaluation,
        trained={"recipe": "random", "seed": 7},
    )


def noise(count: int, classes: tuple[str, ...] = CIFAR10_CLASSES) -> Split:
    """Images that show nothing, of random classes."""
    generator = torch.Generator().manual_seed(5)
    return Split(
        name="noise test",
        classes=classes,
        pixels_NCHW=torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator),
        labels_N=torch.randint(0, len(classes), (count,), generator=generator),
    )


def random_evaluation() -> Evaluation:
    probabilities_NK = torch.rand(200, 10, generator=torch.Generator().manual_seed(3))
    labels_N = torch.randint(0, 10, (200,), generator=torch.Generator().manual_seed(4))
    return evaluate_probabilities(
        probabilities_NK / probabilities_NK.sum(1, keepdim=True),
        labels_N,
        dataset="random test",
        digest="d" * 64,
        evaluated_at="2026-01-01T00:00:00+00:00",
    )


def drawing(width: int = 32, height: int = 32) -> Image.Image:
    """A smooth colour gradient, different in every pixel's neighbourhood, so that turning or cutting it shows."""
    picture = Image.new("RGB", (width, height))
    picture.putdata(
        [
            (255 * x // max(1, width - 1), 255 * y // max(1, height - 1), (x * 5 + y * 3) % 256)
            for y in range(height)
            for x in range(width)
        ]
    )
    return picture


def encode(picture: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


class Hostile:
    """Pickled as a call of os.mkdir."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@contextmanager
def occupied(service: Service, pictures: int = 1) -> Iterator[None]:
    """Make the service believe that it is answering this many pictures."""
    admission, load = service._batcher._admission, Load(0, pictures, light=True, bulk=pictures > 1)
    admission.enter(load)
    try:
        yield
    finally:
        admission.leave(load)


needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="OpenVINO is not installed")


@pytest.fixture
def photos_NCHW() -> Tensor:
    """Eight smooth random pictures with edges, so that there is something to lose."""
    coarse = torch.rand(8, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 255
    smooth = F.interpolate(coarse, size=(32, 32), mode="bicubic").clamp(0, 255)
    smooth[:, :, 10:20, 8:24] = 255 - smooth[:, :, 10:20, 8:24]
    return smooth.to(torch.uint8)


@pytest.fixture
def png() -> bytes:
    return encode(drawing())


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the tutorial's network with an evaluation inside."""
    path = tmp_path_factory.mktemp("weights") / "net.pth"
    checkpoint.save(random_checkpoint(evaluation=random_evaluation()), path)
    return path


@pytest.fixture
def settings(weights: Path) -> Settings:
    return Settings(weights=weights, device="cpu", engine="torch", threads=1, max_batch=4, max_body_bytes=200_000)


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def anyio_backend() -> str:
    """What uvicorn runs on."""
    return "asyncio"
