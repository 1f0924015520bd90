"""Where the data is, which part is held out, and how to fetch it. `app.data` reads it."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock

from app.data import Split
from app.errors import DataError
from training.errors import TrainingError

DEFAULT = Path("data")


def find(flag: str | None, environ: Mapping[str, str]) -> Path:
    """As `locate`; if that is ./data and does not exist, download CIFAR-10 into it first, like the tutorial.

    Raises:
        DataError: as `download`.
    """
    folder = locate(flag, environ)
    if folder == DEFAULT and not folder.exists():
        with FileLock("data.lock"), TemporaryDirectory(prefix="data-", dir=".") as unfinished:
            if not folder.exists():  # else another process has downloaded it meanwhile: torchrun starts several
                print(f"There is no folder {folder}; downloading CIFAR-10 into it, 170 MB.", file=sys.stderr)
                download(Path(unfinished) / folder)
                (Path(unfinished) / folder).rename(folder)
    return folder


def locate(flag: str | None, environ: Mapping[str, str]) -> Path:
    """The folder of the data set: --data if given, else CIFAR_DATA, else ./data. Its existence is not checked."""
    return Path(flag or environ.get("CIFAR_DATA") or DEFAULT)


def hold_out(train: Split, share: float) -> tuple[Split, Split]:
    """The images in two parts: the first to train on, the last `share` to choose by; 0.1 of CIFAR-10 is the last 5,000.

    Raises:
        TrainingError: `share` leaves one of the two without an image.
    """
    count = round(len(train) * share) if 0 < share < 1 else 0
    if not 0 < count < len(train):
        raise TrainingError(
            f"A share of {share} of {len(train):,} training images cannot be held out; give a number between 0 and 1 "
            "that leaves at least one image on each side, for example 0.1."
        )
    rest = replace(train, pixels_NCHW=train.pixels_NCHW[:-count], labels_N=train.labels_N[:-count])
    held = replace(
        train,
        name=f"validation ({count:,} held-out training images)",
        pixels_NCHW=train.pixels_NCHW[-count:],
        labels_N=train.labels_N[-count:],
    )
    return rest, held


def download(folder: Path) -> None:
    """Fetch CIFAR-10, about 170 MB, from its home page into `folder` unless it is already there.

    Raises:
        DataError: The network, the server or the disk failed, or the download has the wrong checksum.
    """
    from torchvision.datasets import CIFAR10  # here, because importing it takes two seconds

    try:
        CIFAR10(str(folder), download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"CIFAR-10 could not be downloaded ({type(error).__name__}). Check the connection and the free disk space "
            "and try again, or fetch cifar-10-binary.tar.gz by other means from "
            "https://www.cs.toronto.edu/~kriz/cifar.html, unpack it, and name its folder with --data."
        ) from error
