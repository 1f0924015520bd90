"""Where weights come from, and what follows from it: which runs they may teach, and which images can measure them.

Weights have seen their training images: anything fitted to those, or measured on them, looks too good.
"""

import dataclasses
import datetime
import platform
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from app.calibration import Calibration
from app.checkpoint import Checkpoint, load
from app.data import Split
from training.config import Recipe
from training.data import hold_out
from training.distill import introduce
from training.errors import TrainingError


def provenance(name: str, recipe: Recipe, train: Split, teachers: list[Checkpoint], **machine: Any) -> dict[str, Any]:
    """What a weights file records about its training: the recipe, by `name` and in full, the images, the teachers, the
    command line, and the `machine`."""
    return {
        "recipe": name,
        **dataclasses.asdict(recipe),
        "command": "python -m training " + shlex.join(sys.argv[1:]).encode(errors="replace").decode(),
        "images": f"{len(train):,} of {train.name}",
        "data_sha256": train.digest,
        "teachers": introduce(teachers),
        **machine,
        "versions": {package: metadata.version(package) for package in ("torch", "torchvision")},
        "python": platform.python_version(),
        "finished_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def load_teachers(files: list[Path], recipe: Recipe) -> list[Checkpoint]:
    """The teachers of a recipe with distillation.

    Raises:
        CheckpointError, TrainingError: a file cannot be used, or the recipe has no use for teachers, or needs some.
    """
    if recipe.distillation and not files:
        raise TrainingError(
            f"The recipe has distillation {recipe.distillation}: it learns from a teacher. Train one with --recipe "
            "teacher and name its weights with --teacher, or choose a recipe that learns from labels alone, like fast."
        )
    if files and not recipe.distillation:
        raise TrainingError(
            "The recipe has distillation 0; leave out --teacher, or choose a recipe with distillation, like default."
        )
    return [load(file) for file in files]


def check_teachers(files: list[Path], teachers: list[Checkpoint], recipe: Recipe, images: Split) -> None:
    """Check that no teacher has seen what the recipe holds out of `images`, which are all training images.

    Raises:
        TrainingError: one may have.
    """
    for file, teacher in zip(files, teachers, strict=True):
        if recipe.validation and not _unseen(teacher, images, recipe.validation):
            raise TrainingError(
                f"The teacher {file} may have seen images that this run holds out, and would pass them on. Name one "
                f"that was trained on the same images with --validation {recipe.validation}."
            )


def take_over_calibration(file: Path, recipe: Recipe, images: Split, teachers: list[Checkpoint]) -> Calibration:
    """The calibration from a run with --validation, for a run on all images, which has none left to calibrate on.

    Raises:
        CheckpointError, TrainingError: the file cannot be used, or the two runs do not match.
    """
    if not file.exists():
        raise TrainingError(
            f"The training is done, but there is no {file} to take the calibration from. Once it is there, run the "
            "same command with --resume, which only writes the weights."
        )
    found = load(file)
    if (found.architecture, found.classes) != (recipe.network, images.classes):
        raise TrainingError(
            f"The calibration in {file} is for the network {found.architecture} and the classes "
            f"{', '.join(found.classes)}; this run trains {recipe.network} for {', '.join(images.classes)}."
        )
    if found.calibration.set_threshold is None or not found.trained.get("validation"):
        whose = "no calibration" if found.calibration.set_threshold is None else "the calibration of another run"
        raise TrainingError(f"The file {file} has {whose}; name one written by a run with --validation 0.1.")
    others = hold_out(images, found.trained["validation"])[0]
    wanted = vars(recipe) | {"teachers": introduce(teachers), "data_sha256": others.digest}
    kept = wanted.keys() - {"seed", "validation", "precision", "report_every"}
    if other := sorted(name for name in kept if found.trained.get(name) != wanted[name]):
        raise TrainingError(
            f"The calibration in {file} is from a run that differs in: {', '.join(other)}. Name one from a run "
            "with the same recipe, images and teachers, and with --validation 0.1."
        )
    return found.calibration


def hold_out_for(weights: Checkpoint | None, images: Split, share: float) -> tuple[Split, Split]:
    """Like `hold_out`, for measuring `weights`.

    Raises:
        TrainingError: the weights may have seen some of the held-out images.
    """
    parts = hold_out(images, share)
    if weights is not None and not _unseen(weights, images, share):
        raise TrainingError(
            f"These weights may have seen some of the images that --validation {share} holds out. Name the weights of "
            f"a run with --validation {share} on the same images."
        )
    return parts


def _unseen(weights: Checkpoint, images: Split, share: float) -> bool:
    """Whether `weights` have seen none of the images that `share` holds out of `images`, as far as their file tells."""
    own = weights.trained.get("validation", 0.0)
    return own >= share and weights.trained.get("data_sha256") == hold_out(images, own)[0].digest
