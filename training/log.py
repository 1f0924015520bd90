"""What a run leaves to read: log.jsonl and curves.png."""

import errno
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from app.files import forget_unfinished, write_atomically
from training import plots
from training.errors import TrainingError


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The JSON objects in `file`, one per line; no rows if there is no file yet.

    Raises:
        TrainingError: it holds something else.
    """
    try:
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError
    except ValueError:
        raise TrainingError(
            f"{file} is not a log with one JSON object per line. Name another file, or remove this one."
        ) from None
    return rows


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, the file as a whole or not at all."""
    write_atomically(file, "".join(json.dumps(row) + "\n" for row in rows).encode())


REDRAW_SECONDS = 10.0
"""Least time between drawings of the curves, each of which takes as long as an epoch on a GPU."""


class RunLog:
    """Writes one line per finished epoch, to the log file in `folder` and to the terminal."""

    def __init__(self, folder: Path, *, resume: bool) -> None:
        """
        Raises:
            TrainingError: the folder has a run and `resume` is not set, the run is still going on, or it is finished
                without a state to resume from.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / ".lock")  # held as long as this object lives; a killed process loses it
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise TrainingError(
                f"The run in {folder} is still going on in another process; wait for it to end, or use another --name."
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):  # a file system without locks
                raise
        begun, ended = (folder / "state.pt").exists(), (folder / "cifar_net.pth").exists()
        if resume and ended and not begun:
            raise TrainingError(f"{folder} has a finished run, but no state.pt to resume from; choose another --name.")
        if not resume and (begun or ended):
            raise TrainingError(f"{folder} already holds a run; add --resume to continue it, or choose another --name.")
        forget_unfinished(folder / "state.pt")
        self.folder = folder
        self._drawn_at = -REDRAW_SECONDS

    def say(self, text: str) -> None:
        tqdm.write(text)

    def epoch(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Record the figures of all epochs so far, and show those of the last one."""
        write_rows(self.folder / "log.jsonl", rows)
        if monotonic() - self._drawn_at >= REDRAW_SECONDS:
            self.draw(rows)
        row = rows[-1]
        parts = [f"epoch {row['epoch']:3.0f}", f"loss {row['loss']:.4f}"]
        if "validation_accuracy" in row:
            parts.append(f"validation {row['validation_accuracy']:.2%}, loss {row['validation_loss']:.4f}")
        parts.append(f"{row['images_per_second']:,.0f} images/s, {row['train_seconds']:.0f} s")
        self.say("  ".join(parts))

    def draw(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Draw the learning curves."""
        plots.save(plots.learning_curves(rows), self.folder / "curves.png")
        self._drawn_at = monotonic()
