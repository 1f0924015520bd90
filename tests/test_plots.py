"""What the figures show, read back from them; their look was checked by eye."""

import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.text import Text
from PIL import Image, ImageShow
from torch import Tensor

from app.checkpoint import CIFAR10_CLASSES
from app.report import evaluate_probabilities, wilson_interval
from training import plots
from training.errors import TrainingError

CONFUSION_KK = torch.tensor([[8, 2, 0], [1, 9, 0], [0, 0, 5]])
CLASSES = ("ant", "bee", "cow")


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def points(line: Line2D) -> list[list[float]]:
    """The (x, y) of a line."""
    return np.asarray(line.get_xydata()).tolist()  # type: ignore[no-any-return]


def values(image: AxesImage) -> Tensor:
    return torch.tensor(np.asarray(image.get_array()))


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=lambda sent: sent.name)
def test_an_interrupt_waits_until_drawing_has_finished(sent: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """While drawing, Matplotlib may take it for another error."""
    drawn: list[bool] = []

    def print_figure(*_arguments: object, **_options: object) -> None:
        signal.raise_signal(sent)
        drawn.append(True)

    monkeypatch.setattr(FigureCanvasAgg, "print_figure", print_figure)
    before = signal.signal(sent, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            plots.save(Figure(), Path("never-written.png"))
        assert drawn
        assert signal.getsignal(sent) is signal.default_int_handler
    finally:
        signal.signal(sent, before)


def test_figures_can_be_saved_from_another_thread(tmp_path: Path) -> None:
    drawing = threading.Thread(target=plots.save, args=(Figure(), tmp_path / "empty.png"))
    drawing.start()
    drawing.join()
    assert (tmp_path / "empty.png").read_bytes().startswith(b"\x89PNG")


def test_the_grid_labels_each_image() -> None:
    pixels_NCHW = torch.randint(0, 256, (11, 3, 32, 32), dtype=torch.uint8)
    labels_N = torch.arange(11) % 10
    figure = plots.image_grid(pixels_NCHW, labels_N, CIFAR10_CLASSES)
    assert texts(figure) == [CIFAR10_CLASSES[label] for label in labels_N]
    (image,) = figure.axes[0].images
    shown_HWC = values(image)
    first_CHW = shown_HWC[2:34, 2:34].permute(2, 0, 1)
    assert torch.equal(first_CHW, pixels_NCHW[0])
    ninth = figure.axes[0].texts[8].get_position()  # the first of the second row, beneath its image
    assert torch.equal(shown_HWC[48:80, 2:34].permute(2, 0, 1), pixels_NCHW[8])
    assert 2 < ninth[0] < 34
    assert 79 < ninth[1] < 92


def test_the_grid_tells_right_from_wrong_predictions() -> None:
    pixels_NCHW = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    figure = plots.image_grid(pixels_NCHW, torch.tensor([0, 1]), CLASSES, torch.tensor([0, 2]))
    right, wrong = figure.axes[0].texts
    assert (right.get_text(), wrong.get_text()) == ("ant", "cow?\nis bee")
    assert (to_hex(right.get_color()), to_hex(wrong.get_color())) == (plots.BLUE, plots.VERMILION)


def test_labels_stay_under_their_image_and_inside_the_picture() -> None:
    names = ("a class with a very long name", "another class with a long name")
    figure = plots.image_grid(
        torch.zeros(16, 3, 32, 32, dtype=torch.uint8), torch.arange(16) % 2, names, (torch.arange(16) + 1) % 2
    )
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert not any(first.overlaps(second) for i, first in enumerate(boxes) for second in boxes[:i])
    assert all(box.y0 >= 0 and box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)


@pytest.mark.parametrize("count", [0, plots.MOST_SHOWN + 1])
def test_a_grid_of_no_images_or_of_too_many_is_refused(count: int) -> None:
    with pytest.raises(TrainingError, match=f"1 to {plots.MOST_SHOWN} images"):
        plots.image_grid(torch.zeros(count, 3, 32, 32, dtype=torch.uint8), torch.zeros(count).long(), CLASSES)


@pytest.mark.parametrize(("name", "begins"), [("a.png", b"\x89PNG"), ("a.jpg", b"\xff\xd8"), ("a", b"\x89PNG")])
def test_a_picture_is_written_in_the_format_that_its_name_says(tmp_path: Path, name: str, begins: bytes) -> None:
    plots.save(Figure(figsize=(1, 1)), tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(begins)


@pytest.mark.parametrize("kind", plots.KINDS)
def test_every_kind_of_picture_can_be_written_and_no_other(tmp_path: Path, kind: str) -> None:
    plots.save(Figure(figsize=(1, 1)), tmp_path / f"a.{kind.upper()}")
    with pytest.raises(TrainingError, match=r"cannot be written as \.pgf; it must be one of png, "):
        plots.save(Figure(figsize=(1, 1)), tmp_path / "a.pgf")


def test_learning_curves_show_validation_where_there_is_one() -> None:
    rows = [
        {"epoch": 1, "loss": 2.0, "learning_rate": 0.1, "train_seconds": 1.0},
        {
            "epoch": 2,
            "loss": 1.0,
            "learning_rate": 0.05,
            "train_seconds": 1.0,
            "validation_loss": 1.5,
            "validation_accuracy": 0.5,
        },
    ]
    loss, accuracy, rate = plots.learning_curves(rows).axes
    training, validation = loss.lines
    assert points(training) == [[1, 2.0], [2, 1.0]]
    assert points(validation) == [[2, 1.5]]
    assert points(accuracy.lines[0]) == [[2, 0.5]]
    assert accuracy.get_title() == "validation accuracy"
    assert points(rate.lines[0]) == [[1, 0.1], [2, 0.05]]
    assert len(plots.learning_curves(rows[:1]).axes) == 2


def test_the_confusion_matrix_shows_each_count() -> None:
    figure = plots.confusion_matrix(CONFUSION_KK, CLASSES, "three insects")
    assert texts(figure) == [str(count) for count in CONFUSION_KK.flatten().tolist()]
    axes = figure.axes[0]
    assert axes.get_title() == "three insects: 22 of 25 right (88.00 %)"
    assert [label.get_text() for label in axes.get_yticklabels()] == list(CLASSES)
    assert values(axes.images[0])[0].tolist() == pytest.approx([0.8, 0.2, 0])


def test_the_bars_show_accuracy_and_interval() -> None:
    figure = plots.per_class_bars(CONFUSION_KK, CLASSES, "three insects")
    (axes,) = figure.axes
    assert [bar.get_extents().transformed(axes.transData.inverted()).x1 for bar in axes.patches] == pytest.approx(
        [0.8, 0.9, 1.0]
    )
    (whiskers,) = axes.collections
    assert isinstance(whiskers, LineCollection)
    assert whiskers.get_segments()[0][:, 0].tolist() == pytest.approx(wilson_interval(8, 10))
    assert "80.0 %  (8 of 10)" in texts(figure)


@pytest.mark.parametrize("draw", [plots.confusion_matrix, plots.per_class_bars])
def test_figures_of_many_classes_do_not_grow_without_bound(draw: Callable[..., Figure]) -> None:
    names = [f"class {number}" for number in range(100)]
    figure = draw(torch.eye(100).long(), names, "many")
    assert max(figure.get_size_inches()) == 20
    assert not set(texts(figure)) & {"0", "1"}  # counts in cells


def test_dollar_signs_are_not_parsed_as_formulas(tmp_path: Path) -> None:
    formula, names = r"$\frac$", (r"$\frac$", "$a$", "cow")
    for figure in (
        plots.image_grid(torch.zeros(3, 3, 32, 32, dtype=torch.uint8), torch.arange(3), names),
        plots.confusion_matrix(CONFUSION_KK, names, formula),
        plots.per_class_bars(CONFUSION_KK, names, formula),
        plots.reliability_diagram(torch.tensor([[10, 0.5, 0.5]]), 0.0, formula),
    ):
        plots.save(figure, tmp_path / "figure.png")  # an invalid formula would be an error
        assert not any(text.get_parse_math() for text in figure.findobj(Text))


def test_the_reliability_diagram_shows_the_bins() -> None:
    probabilities_NK = torch.tensor([[0.9, 0.1], [0.6, 0.4]]).repeat(30, 1)
    figures = evaluate_probabilities(
        probabilities_NK, torch.tensor([0, 1]).repeat(30), dataset="two insects", digest="", evaluated_at=""
    )
    axes = plots.reliability_diagram(figures.bins_B3, figures.ece, figures.dataset).axes[0]
    # 15 groups of 4: seven of 0.6, none right; one half of either; seven of 0.9, all right.
    confidences, accuracies = zip(*points(axes.lines[1]), strict=True)
    assert confidences == pytest.approx([0.6] * 7 + [0.75] + [0.9] * 7)
    assert accuracies == pytest.approx([0] * 7 + [0.5] + [1] * 7)
    assert f"{(7 * 0.6 + 0.25 + 7 * 0.1) / 15:.4f}" in axes.get_title()


def test_save_writes_a_picture(tmp_path: Path) -> None:
    plots.save(plots.per_class_bars(CONFUSION_KK, CLASSES, "three insects"), tmp_path / "new" / "bars.png")
    picture = Image.open(io.BytesIO((tmp_path / "new" / "bars.png").read_bytes()))
    assert picture.format == "PNG"
    assert len(set(picture.convert("L").tobytes())) > 10  # not an empty page
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["bars.png"]


def test_show_needs_a_viewer(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = plots.per_class_bars(CONFUSION_KK, CLASSES, "three insects")
    shown: list[Image.Image] = []

    def viewer(picture: Image.Image) -> bool:
        shown.append(picture)
        return True

    monkeypatch.setattr(ImageShow, "show", viewer)
    plots.show(figure)
    assert shown[0].width > 500
    monkeypatch.setattr(ImageShow, "show", lambda _picture: False)
    with pytest.raises(TrainingError, match="--out"):
        plots.show(figure)


def test_a_display_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    assert plots.has_display({"DISPLAY": ":0"})
    assert plots.has_display({"WAYLAND_DISPLAY": "wayland-0"})
    assert not plots.has_display({"DISPLAY": ""})
    monkeypatch.setattr("sys.platform", "darwin")
    assert plots.has_display({})


def test_a_matplotlib_backend_chosen_by_a_notebook_is_ignored() -> None:
    """Commands that are called from a notebook inherit its choice, which their own packages may lack."""
    environment = {**os.environ, "MPLBACKEND": "module://of_a_notebook"}
    ran = subprocess.run([sys.executable, "-c", "import training.plots"], env=environment, capture_output=True)
    assert ran.returncode == 0, ran.stderr
