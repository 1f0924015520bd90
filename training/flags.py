"""The command line of `python -m training`: commands and flags. `commands` says what they do."""

import argparse
from collections.abc import Callable
from pathlib import Path

from app import model
from app.settings import KNOWN, Settings, whole
from training.config import LARGEST_SEED, RECIPES, add_flags
from training.evaluate import BATCH_SIZE

DEFAULT_WEIGHTS = Settings.weights
RUNS = Path("runs")


def _told(parse: Callable[[str], int]) -> Callable[[str], int]:
    """`parse` for argparse, which would otherwise not say what is accepted."""

    def parse_or_tell(text: str) -> int:
        try:
            return parse(text)
        except ValueError as accepted:
            raise argparse.ArgumentTypeError(f"{text!r} is not {accepted}") from None

    return parse_or_tell


_positive = _told(whole(1, 1_000_000))
_seed = _told(whole(0, LARGEST_SEED))
_threads = _told(KNOWN["threads"].parse)


def parser() -> argparse.ArgumentParser:
    """The parser for all commands and their flags; it stores the command's name as `command`."""
    root = argparse.ArgumentParser(
        prog="python -m training",
        description="Train networks, look at data, measure: `python -m training COMMAND --help`.",
    )
    commands = root.add_subparsers(dest="command", metavar="COMMAND", required=True)

    data_flags = argparse.ArgumentParser(add_help=False)
    data_flags.add_argument("--data", help="folder of the data set (default: CIFAR_DATA, else ./data)")
    device_flags = argparse.ArgumentParser(add_help=False, parents=[data_flags])
    device_flags.add_argument("--device", help="cuda, cuda:1, mps or cpu (default: the first that works)")
    split_flags = argparse.ArgumentParser(add_help=False, parents=[device_flags])
    split_flags.add_argument(
        "--validation", type=float, default=0.0, help="use this share of the training images, not the test images"
    )
    weights_flags = argparse.ArgumentParser(add_help=False, parents=[split_flags])
    weights_flags.add_argument(
        "--weights", type=Path, default=DEFAULT_WEIGHTS, help="weights to measure (default: the shipped ones)"
    )
    json_flag = argparse.ArgumentParser(add_help=False)
    json_flag.add_argument("--json", action="store_true", help="print one JSON object, and nothing else, to stdout")

    recipe_flags = argparse.ArgumentParser(add_help=False, parents=[device_flags])
    recipe_flags.add_argument(
        "--recipe",
        choices=RECIPES,
        default="default",
        help="the recipe to start from, in training/config.py (default: %(default)s)",
    )
    recipe_flags.add_argument("--threads", type=_threads, help="CPU threads (default: torch's choice)")
    recipe_flags.add_argument(
        "--teacher",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="weights to learn from, for a recipe with distillation; several are averaged",
    )

    train = commands.add_parser(
        "train",
        parents=[recipe_flags],
        help="train by a recipe; write weights, log and learning curves",
        allow_abbrev=False,
    )
    train.add_argument("--name", help="folder under runs/ (default: recipe, time and process id)")
    train.add_argument("--resume", action="store_true", help="continue the run of this name where it stopped")
    train.add_argument("--out", type=Path, help="write the weights here as well, e.g. weights/cifar_net.pth")
    train.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="weights of a run with --validation, whose calibration this run, on all images, reuses; read at the end",
    )
    add_flags(train.add_argument_group("fields of the recipe", "each overrides the recipe's value"))

    evaluate = commands.add_parser(
        "evaluate",
        parents=[weights_flags, json_flag],
        help="accuracy per class, confusion matrix and calibration of weights",
    )
    evaluate.add_argument(
        "--batch-size", type=_positive, default=BATCH_SIZE, help="images at a time (default: %(default)s)"
    )
    evaluate.add_argument(
        "--out", type=Path, help="write the weights here with these figures, for GET /metrics/per-class of the service"
    )

    robustness = commands.add_parser(
        "robustness", parents=[weights_flags, json_flag], help="accuracy on degraded pictures"
    )
    robustness.add_argument(
        "--out", type=Path, help="write the JSON here as well, e.g. weights/cifar_net.robustness.json"
    )

    ablate = commands.add_parser("ablate", parents=[recipe_flags], help="train without one ingredient at a time")
    ablate.add_argument("--seeds", type=_seed, nargs="+", default=[0, 1, 2], help="seeds of the runs (default: 0 1 2)")
    ablate.add_argument("--epochs", type=_positive, default=4, help="epochs of each run (default: %(default)s)")
    ablate.add_argument(
        "--out", type=Path, default=RUNS / "ablation.jsonl", help="file with a line for each run (default: %(default)s)"
    )

    show = commands.add_parser("show", parents=[split_flags], help="a labelled grid of images")
    show.add_argument("--weights", type=Path, help="also show what these weights predict")
    show.add_argument("--count", type=_positive, default=32, help="number of images (default: %(default)s)")
    show.add_argument("--seed", type=_seed, default=0, help="seed for choosing the images (default: %(default)s)")
    show.add_argument(
        "--out",
        type=Path,
        help="picture to write, as .png, .jpg, .svg or .pdf (default: a window if there is a display, else "
        "runs/grid.png)",
    )

    plot = commands.add_parser(
        "plot", parents=[weights_flags], help="confusion matrix, per-class bars, reliability diagram"
    )
    plot.add_argument("--out", type=Path, default=RUNS / "plots", help="folder for the PNGs (default: %(default)s)")

    unfamiliar = commands.add_parser(
        "unfamiliar",
        parents=[weights_flags, json_flag],
        help="test whether the weights notice pictures of none of the classes",
    )
    unfamiliar.add_argument(
        "--out", type=Path, help="write the JSON here as well, e.g. weights/cifar_net.unfamiliar.json"
    )
    unfamiliar.add_argument(
        "--count", type=_positive, default=500, help="pictures from each source (default: %(default)s)"
    )

    summary = commands.add_parser("summary", help="a network, layer by layer")
    summary.add_argument(
        "--network", choices=model.NETWORKS, default="cifar_net", help="one in app/model.py (default: %(default)s)"
    )

    card = commands.add_parser("card", help="write the model card of the weights in a folder")
    card.add_argument(
        "--folder", type=Path, default=DEFAULT_WEIGHTS.parent, help="folder of the weights (default: weights/)"
    )

    commands.add_parser("download", parents=[data_flags], help="download CIFAR-10")
    return root
