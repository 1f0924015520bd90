"""What each ingredient of a recipe contributes: the same short schedule, with one removed at a time.

An ingredient is a field whose value in the recipe differs from its default, which is the plainest choice. Nothing is
retuned: a row says what removing an ingredient costs, not what the best recipe without it would reach.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from app import model
from app.checkpoint import Checkpoint
from app.data import Split
from app.device import describe
from training.calibrate import JPEG_QUALITY
from training.config import Recipe, override
from training.data import hold_out
from training.distill import Teachers, introduce
from training.errors import TrainingError
from training.evaluate import validate
from training.fit import fit, initialize
from training.log import read_rows, write_rows
from training.robustness import jpeg

VALIDATION = 0.1
NO_INGREDIENTS = {
    *("network", "seed", "validation", "epochs", "batch_size", "precision", "report_every"),
    *("optimizer", "learning_rate", "muon_learning_rate", "bias_learning_rate", "momentum"),
}
"""Fields that say what is trained, on what and how long, have no plain choice, or only make sense together."""

Row = dict[str, Any]


def settings(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """For each ingredient, by name, the fields to change to remove it; "" is the recipe unchanged."""
    plain = Recipe()
    names = [field.name for field in dataclasses.fields(Recipe) if field.name not in NO_INGREDIENTS]
    kept = [name for name in names if getattr(recipe, name) != getattr(plain, name)]
    return {"": {}} | {name: {name: getattr(plain, name)} for name in kept}


def ablate(
    images: Split,
    recipe: Recipe,
    seeds: Sequence[int],
    file: Path,
    *,
    device: torch.device,
    teachers: Sequence[Checkpoint] = (),
    on_row: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Train with and without each ingredient, with each seed, and measure on the last tenth of the training `images`.

    Each finished run becomes a line of `file`; runs on this device that it already has are not repeated.

    Args:
        teachers: For a recipe with distillation; they must not have seen that tenth.

    Returns:
        All rows of the file: `ingredient`, `setting`, `seed`, `epochs`, `validation_accuracy` and `jpeg_accuracy` (on
        the same images as JPEG of quality 75) in [0, 1], `device` and `teachers` in words, and `common`, a digest.

    Raises:
        TrainingError: The file has runs of another recipe, on other images or with other teachers.
    """
    train, held_out = hold_out(images, VALIDATION)
    compressed = dataclasses.replace(held_out, pixels_NCHW=jpeg(JPEG_QUALITY, held_out.pixels_NCHW))
    common = _digest(recipe, images, teachers)
    rows = read_rows(file)
    if any(row.get("common") != common for row in rows):
        raise TrainingError(
            f"{file} has runs of another recipe, on other images or with other teachers; choose another file with "
            "--out, or remove this one."
        )
    here = describe(device)
    finished = {(row["setting"], row["seed"], row["epochs"], row["device"]) for row in rows}
    for seed in dict.fromkeys(seeds):
        for ingredient, changes in settings(recipe).items():
            setting = ", ".join(f"{name} {value}" for name, value in changes.items()) or "the whole recipe"
            if (setting, seed, recipe.epochs, here) in finished:
                continue
            changed = override(recipe, {**changes, "seed": seed, "validation": VALIDATION})
            row = {"ingredient": ingredient, "setting": setting, "seed": seed, "epochs": recipe.epochs}
            network = _train(changed, train, teachers, device)
            row |= {
                "validation_accuracy": validate(network, held_out, device)["validation_accuracy"],
                "jpeg_accuracy": validate(network, compressed, device)["validation_accuracy"],
                "device": here,
                "teachers": introduce(teachers),
                "common": common,
            }
            rows.append(row)
            write_rows(file, rows)
            if on_row is not None:
                on_row(row)
    return rows


def _train(recipe: Recipe, train: Split, teachers: Sequence[Checkpoint], device: torch.device) -> nn.Module:
    torch.manual_seed(recipe.seed)
    network = model.build(recipe.network, num_classes=len(train.classes))
    initialize(network, recipe, train.pixels_NCHW)
    taught_by = Teachers(teachers, train.classes) if recipe.distillation else None
    fit(network, train, recipe, device=device, teachers=taught_by, show_progress=True)
    return network


def _digest(recipe: Recipe, images: Split, teachers: Sequence[Checkpoint]) -> str:
    """A digest of everything that the rows of one file have in common."""
    own = {name: value for name, value in vars(recipe).items() if value != getattr(Recipe(), name)}
    fields = {name: value for name, value in own.items() if name not in ("seed", "epochs", "validation")}
    common = [fields, images.digest, [teacher.sha256 for teacher in teachers]]
    return hashlib.sha256(json.dumps(common, sort_keys=True).encode()).hexdigest()[:12]
