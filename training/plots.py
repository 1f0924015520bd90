"""Pictures of data and results. Each function makes a Figure; `save` writes it, `show` opens a window.

Right is blue and wrong is vermilion throughout, which colour-blind readers can tell apart (Okabe and Ito, 2008).
Shape letters: N images, C = 3, H = W = 32, K classes.
"""

import io
import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from matplotlib import rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg  # now, not at the first drawing, when a Ctrl-C may come
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image, ImageShow
from torch import Tensor

from app.files import write_atomically
from app.model import IMAGE_SIZE
from app.report import per_class, wilson_interval
from training.errors import TrainingError
from training.evaluate import MOST_NUMBERED_CLASSES

BLUE, VERMILION, GREY = "#0072b2", "#d55e00", "#767676"
DOTS_PER_INCH = 144
COLUMNS = 8
MOST_SHOWN = 400
"""Most images in one grid: drawing that many takes a gigabyte."""
LABEL_PIXELS = 12
"""Room under each image for two lines of text."""
KINDS = ("png", "jpg", "jpeg", "webp", "svg", "pdf")
LONGEST_LABEL = 13
LONGEST_SIDE = 20.0
"""Limit in inches for a figure with a row per class: without it, 1,000 classes would take more memory than there is."""

warnings.filterwarnings("ignore", "Glyph .* missing")  # for an emoji in a class name; a box is drawn instead
rcParams["text.parse_math"] = False  # in a class name, $ is a character like any other


def save(figure: Figure, path: Path) -> None:
    """Write a file as a whole or not at all, in the format of its suffix (.jpg, .svg, .pdf, ...); without one, as PNG.

    Raises:
        TrainingError: It is not one of `KINDS`.
    """
    kind = path.suffix[1:].lower() or "png"
    if kind not in KINDS:
        raise TrainingError(f"Pictures cannot be written as {path.suffix}; it must be one of {', '.join(KINDS)}.")
    write_atomically(path, _drawn(figure, kind))


def show(figure: Figure) -> None:
    """Show the figure in the system's own image viewer.

    Raises:
        TrainingError: There is no viewer.
    """
    if not ImageShow.show(Image.open(io.BytesIO(_drawn(figure, "png")))):
        raise TrainingError("No picture viewer was found on this system; write a file with --out FILE.png instead.")


def has_display(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a window could be seen."""
    return sys.platform in ("darwin", "win32") or bool(environ.get("DISPLAY") or environ.get("WAYLAND_DISPLAY"))


def _drawn(figure: Figure, kind: str) -> bytes:
    file = io.BytesIO()
    with _interrupts_held_back():
        FigureCanvasAgg(figure).print_figure(file, format=kind, dpi=DOTS_PER_INCH)
    return file.getvalue()


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Matplotlib may mistake a Ctrl-C for an error of its own ("Invalid bounding box") and raise that instead."""
    held: list[int] = []
    in_main = threading.current_thread() is threading.main_thread()  # others get no signals and may set no handlers
    signals = (signal.SIGINT, signal.SIGTERM) if in_main else ()
    handlers = {sent: handler for sent in signals if callable(handler := signal.getsignal(sent))}
    try:
        for sent in handlers:
            signal.signal(sent, lambda number, _frame: held.append(number))
        yield
    finally:
        for sent, handler in handlers.items():
            signal.signal(sent, handler)
        for number in held:
            signal.raise_signal(number)


def image_grid(
    pixels_NCHW: Tensor, labels_N: Tensor, classes: Sequence[str], predictions_N: Tensor | None = None
) -> Figure:
    """Images with their class beneath; with predictions, the predicted class and, where that is wrong, the true one.

    Raises:
        TrainingError: There is no image, or there are too many.
    """
    if not 0 < len(pixels_NCHW) <= MOST_SHOWN:
        raise TrainingError(f"A grid shows 1 to {MOST_SHOWN} images, not {len(pixels_NCHW):,}; change --count.")
    from torchvision.utils import make_grid  # here, because importing it takes two seconds

    columns = min(COLUMNS, len(pixels_NCHW))
    tiles = F.pad(pixels_NCHW, (0, 0, 0, LABEL_PIXELS), value=255)  # white under each image, for its label
    grid_CHW = make_grid(tiles, nrow=columns, padding=2, pad_value=255)
    height, width = grid_CHW.shape[1:]
    inches = 0.028  # per pixel: 32 of them are 0.9 inches
    figure = Figure(figsize=(width * inches, height * inches))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.imshow(grid_CHW.permute(1, 2, 0).numpy(), interpolation="nearest")
    for index, label in enumerate(labels_N.tolist()):
        predicted = label if predictions_N is None else int(predictions_N[index])
        row, column = divmod(index, columns)
        x = 2 + column * (IMAGE_SIZE + 2) + IMAGE_SIZE / 2 - 0.5
        y = 2 + row * (IMAGE_SIZE + LABEL_PIXELS + 2) + IMAGE_SIZE
        text, colour = _short(classes[predicted]), "black" if predictions_N is None else BLUE
        if predicted != label:
            text, colour = f"{text}?\nis {_short(classes[label])}", VERMILION
        axes.text(x, y, text, color=colour, ha="center", va="top", fontsize=8, linespacing=1.0)
    return figure


def _short(label: str) -> str:
    return label if len(label) <= LONGEST_LABEL else label[: LONGEST_LABEL - 1] + "…"


def learning_curves(rows: Sequence[Mapping[str, float]]) -> Figure:
    """Loss, accuracy (where validated) and learning rate over epochs, from the rows of a run's log.jsonl."""
    epochs = [row["epoch"] for row in rows]
    validated = [row for row in rows if "validation_accuracy" in row]
    figure = Figure(figsize=(12 if validated else 8, 3.6), layout="constrained")
    loss, *between, rate = figure.subplots(1, 3 if validated else 2)
    marker = "o" if len(rows) < 10 else ""  # a line of one point is invisible

    loss.plot(epochs, [row["loss"] for row in rows], color=BLUE, marker=marker, label="training")
    if validated:
        (accuracy,) = between
        seen = [row["epoch"] for row in validated]
        style = {"color": VERMILION, "ls": "--", "marker": marker}
        loss.plot(seen, [row["validation_loss"] for row in validated], label="validation", **style)
        loss.legend(frameon=False)
        accuracy.plot(seen, [row["validation_accuracy"] for row in validated], **style)
        accuracy.set_title("validation accuracy", fontsize=10)
        accuracy.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    loss.set_title("loss", fontsize=10)
    rate.plot(epochs, [row["learning_rate"] for row in rows], color=GREY, marker=marker)
    rate.set_title("the last layer's learning rate, at the epoch's end", fontsize=10)
    for axes in figure.axes:
        axes.set_xlabel("epoch")
        axes.set_xlim(0.5, max(epochs, default=1) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        _plain(axes)
    return figure


def confusion_matrix(confusion_KK: Tensor, classes: Sequence[str], dataset: str) -> Figure:
    """Counts, coloured by their share of the true class."""
    size = len(classes)
    share_KK = confusion_KK / confusion_KK.sum(dim=1, keepdim=True).clamp_min(1)
    width, height = max(4.5, 2 + 0.55 * size), max(4.0, 1 + 0.55 * size)
    figure = Figure(figsize=(min(LONGEST_SIDE, width), min(LONGEST_SIDE, height)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(share_KK.tolist(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(
        image, ax=axes, shrink=0.7, format=PercentFormatter(1, symbol=" %"), label="share of the true class"
    )
    labels = [_short(name) for name in classes]
    axes.set_xticks(range(size), labels, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(size), labels)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(_accuracy_title(confusion_KK, dataset), fontsize=10)
    if size <= MOST_NUMBERED_CLASSES:
        for true, counts in enumerate(confusion_KK.tolist()):
            for predicted, count in enumerate(counts):
                light = share_KK[true, predicted] > 0.5
                colour = "white" if light else "black" if count else GREY
                axes.text(predicted, true, f"{count:,}", ha="center", va="center", fontsize=8, color=colour)
    return figure


def per_class_bars(confusion_KK: Tensor, classes: Sequence[str], dataset: str) -> Figure:
    """Accuracy of each class with its 95 % Wilson interval; the line is the accuracy over all."""
    rows = per_class(confusion_KK, tuple(classes))
    accuracies = [row["accuracy"] for row in rows]
    below = [row["accuracy"] - row["interval"][0] for row in rows]
    above = [row["interval"][1] - row["accuracy"] for row in rows]
    figure = Figure(figsize=(8, min(LONGEST_SIDE, 1.4 + 0.34 * len(rows))), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(range(len(rows)), accuracies, height=0.7, color=BLUE, alpha=0.55)
    axes.errorbar(accuracies, range(len(rows)), xerr=[below, above], fmt="none", ecolor="black", capsize=3, lw=1)
    for index, row in enumerate(rows):
        text = f"{100 * row['accuracy']:.1f} %  ({row['correct']:,} of {row['support']:,})"
        axes.text(1.02, index, text, va="center", fontsize=8, transform=axes.get_yaxis_transform())
    axes.axvline(float(confusion_KK.diagonal().sum() / confusion_KK.sum().clamp_min(1)), color=GREY, ls="--", lw=1)
    axes.set_yticks(range(len(rows)), [_short(name) for name in classes])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes.set_xlabel("accuracy, 95 % interval; dashed: all classes")
    axes.set_title(_accuracy_title(confusion_KK, dataset), fontsize=10)
    _plain(axes)
    axes.grid(visible=False, axis="y")
    return figure


def reliability_diagram(bins_B3: Tensor, ece: float, dataset: str) -> Figure:
    """How often the answer is right, against how sure the network says it is; on the diagonal, the two agree.

    Args:
        bins_B3: Count, confidence and accuracy of each group, as in `app.report.Evaluation`.
        ece: Their expected calibration error.
    """
    counts, confidences, accuracies = bins_B3.T.tolist()
    intervals = [
        wilson_interval(round(accuracy * count), round(count))
        for accuracy, count in zip(accuracies, counts, strict=True)
    ]
    below = [accuracy - low for accuracy, (low, _) in zip(accuracies, intervals, strict=True)]
    above = [high - accuracy for accuracy, (_, high) in zip(accuracies, intervals, strict=True)]
    start = math.floor(10 * min([*confidences, *(low for low, _ in intervals)])) / 10
    figure = Figure(figsize=(5.2, 5.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([start, 1], [start, 1], color=GREY, ls="--", lw=1, label="perfectly calibrated")
    axes.errorbar(
        confidences, accuracies, yerr=[below, above], fmt="o-", color=BLUE, lw=1, ms=4, capsize=3, label="measured"
    )
    margin = 0.02 * (1 - start)
    axes.set_xlim(start - margin, 1 + margin)
    axes.set_ylim(start - margin, 1 + margin)
    axes.set_aspect("equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes.set_xlabel(f"confidence, mean of each of {len(bins_B3)} equally large groups of images")
    axes.set_ylabel("accuracy, 95 % interval")
    axes.set_title(f"{dataset}\nexpected calibration error {ece:.4f}", fontsize=10)
    axes.legend(frameon=False, loc="upper left")
    _plain(axes)
    return figure


def _accuracy_title(confusion_KK: Tensor, dataset: str) -> str:
    total, correct = int(confusion_KK.sum()), int(confusion_KK.diagonal().sum())
    return f"{dataset}: {correct:,} of {total:,} right ({100 * correct / max(1, total):.2f} %)"


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e5e5e5", lw=0.6)
    axes.set_axisbelow(True)
