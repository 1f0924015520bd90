"""What a step learns from: the labels, smoothed, and what teachers say of the images (Hinton et al., 2015,
arXiv:1503.02531: both sides are softened by one temperature, so that the network learns to be as sure as its teachers).

Teachers are asked once, before the first step, so that they cost a step nothing and may be many or large. What they say
is of clean pictures while the network sees cut and compressed ones, which is part of the lesson.
Shape letters: N images, C = 3, H = W = 32, K classes, L = 1 or 2 lessons: of the labels, and of the teachers.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from app.checkpoint import Checkpoint
from app.data import Split
from app.device import choose_dtype
from app.errors import CheckpointError
from app.report import report
from training.augment import shift_and_flip
from training.config import Recipe
from training.evaluate import forward

TEMPERATURE = 2.0
"""Of both sides: a teacher is all but certain of the pictures that it was trained on."""
SHIFTS = ((0, 0), (2, 1), (-1, -2))
"""A teacher sees each image moved by so many rows and columns, each of these mirrored as well."""


def ask(teachers: Sequence[Checkpoint], split: Split, device: torch.device) -> Tensor:
    """The probabilities (N, K) that teachers give to each image: their mean, and of each the geometric one over views.

    Raises:
        CheckpointError: A teacher has learned other classes.
    """
    answers = [_ask(teacher, split, device) for teacher in teachers]
    return torch.stack(answers).mean(dim=0)


def _ask(teacher: Checkpoint, split: Split, device: torch.device) -> Tensor:
    if teacher.classes != split.classes:
        raise CheckpointError(
            f"The teacher knows the classes {', '.join(teacher.classes)}; the images show {', '.join(split.classes)}. "
            "Name a --teacher that was trained on these images."
        )
    network, everything_N = teacher.network(), torch.arange(len(split))
    views = []
    for shift in SHIFTS:
        for mirrored in (False, True):
            seen_NCHW = shift_and_flip(
                split.pixels_NCHW,
                everything_N,
                torch.tensor([shift]).expand(len(split), 2),
                torch.full((len(split),), mirrored),
            )
            logits_NK = forward(network, seen_NCHW, device=device, dtype=choose_dtype(device))
            # As sure as it is when served; how sure it was while it trained is a matter of its recipe.
            views.append((logits_NK / teacher.calibration.temperature).log_softmax(dim=1))
    return (torch.stack(views).mean(dim=0) / TEMPERATURE).softmax(dim=1)


def introduce(teachers: Sequence[Checkpoint]) -> str:
    """Who they are and what they know, for the card."""
    return ", ".join(map(_introduce, teachers)) or "none"


def _introduce(teacher: Checkpoint) -> str:
    words = f"{teacher.architecture} {teacher.sha256[:12]}"
    if "epochs" in teacher.trained:
        words += f", {teacher.trained['epochs']} epochs"
    if teacher.evaluation is None:
        return words
    known = report(teacher.evaluation, teacher.classes)
    return f"{words} ({known['accuracy']:.2%} of {known['dataset']['name']})"


def lessons(labels_N: Tensor, num_classes: int, recipe: Recipe, answers_NK: Tensor | None = None) -> Tensor:
    """What the network is to answer, as probabilities (N, L, K).

    Args:
        answers_NK: Of teachers, if and only if the recipe has distillation.
    """
    assert (answers_NK is not None) == (recipe.distillation > 0)
    smoothing = recipe.label_smoothing
    smoothed_NK = F.one_hot(labels_N, num_classes) * (1 - smoothing) + smoothing / num_classes
    return torch.stack([smoothed_NK] if answers_NK is None else [smoothed_NK, answers_NK], dim=1)


def loss(logits_NK: Tensor, lessons_NLK: Tensor, recipe: Recipe) -> Tensor:
    """The cross-entropy, summed over the images, to labels and teachers in the shares that the recipe gives them."""
    total = (1 - recipe.distillation) * F.cross_entropy(logits_NK, lessons_NLK[:, 0], reduction="sum")
    if recipe.distillation:
        softened = F.cross_entropy(logits_NK / TEMPERATURE, lessons_NLK[:, 1], reduction="sum")
        # The square makes up for the smaller gradients of what is softened (section 2 of the paper).
        total = total + recipe.distillation * TEMPERATURE**2 * softened
    return total
