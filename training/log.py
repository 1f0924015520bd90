"""What a run leaves to read: log.jsonl, curves.png, and TensorBoard events where tensorboard is installed."""

import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from training import plots


class RunLog:
    """Writes under `folder`; one line a finished epoch, in the file and on the terminal."""

    def __init__(self, folder: Path, *, resume: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.file = folder / "log.jsonl"
        self.rows: list[dict[str, float]] = []
        if resume and self.file.exists():
            self.rows = [json.loads(line) for line in self.file.read_text().splitlines()]
        self.tensorboard = _tensorboard(folder)

    def say(self, text: str) -> None:
        tqdm.write(text)

    def epoch(self, row: dict[str, float]) -> None:
        """Record one epoch's figures."""
        # A resumed run may repeat an epoch that was logged but not yet saved.
        self.rows = [old for old in self.rows if old["epoch"] < row["epoch"]] + [row]
        self.file.write_text("".join(json.dumps(each) + "\n" for each in self.rows))
        plots.save(plots.learning_curves(self.rows), self.folder / "curves.png")
        if self.tensorboard is not None:
            for name, value in row.items():
                self.tensorboard.add_scalar(name, value, int(row["epoch"]))
            self.tensorboard.flush()
        parts = [f"epoch {row['epoch']:3.0f}", f"loss {row['loss']:.4f}"]
        if "validation_accuracy" in row:
            parts.append(f"validation {row['validation_accuracy']:.2%}, loss {row['validation_loss']:.4f}")
        parts.append(f"{row['images_per_second']:,.0f} images/s, {row['train_seconds']:.0f} s")
        self.say("  ".join(parts))


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder))
