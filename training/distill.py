"""What a step learns from: the labels, and the teachers' answers (Hinton et al., 2015, arXiv:1503.02531).

One temperature softens both sides, so that the network learns to be as sure as its teachers.
Teachers see exactly the pictures that the network sees, shifted, cut, mixed and compressed (Beyer et al., 2022,
arXiv:2106.05237): about the original images, which they know by heart, they would say little more than the label.
Shape letters: N images, C = 3, H = W = 32, K classes, T teachers.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app import model
from app.checkpoint import Checkpoint
from app.errors import CheckpointError
from training.config import Recipe

TEMPERATURE = 2.0
"""Divisor of the logits on both sides: a teacher is all but certain about the pictures it was trained on."""


class Teachers(nn.Module):
    """Networks that answer as one."""

    places_TK: Tensor
    """The index of each class among each teacher's outputs."""

    def __init__(self, checkpoints: Sequence[Checkpoint], classes: tuple[str, ...]) -> None:
        """Fold the networks; each may order `classes` in its own way.

        Raises:
            CheckpointError: A teacher has learned different classes.
        """
        super().__init__()
        for checkpoint in checkpoints:
            if sorted(checkpoint.classes) != sorted(classes):
                raise CheckpointError(
                    f"The teacher knows the classes {', '.join(checkpoint.classes)}; the images show "
                    f"{', '.join(classes)}. Name a --teacher that was trained on these images."
                )
        self.introduction = introduce(checkpoints)
        self.networks = nn.ModuleList(model.fold(checkpoint.network()) for checkpoint in checkpoints)
        # Teachers are as sure as when served; how sure they were in training depends on their recipes.
        self.calibrations = [checkpoint.calibration for checkpoint in checkpoints]
        places = [[checkpoint.classes.index(name) for name in classes] for checkpoint in checkpoints]
        self.register_buffer("places_TK", torch.tensor(places))

    @torch.no_grad()
    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        """The mean (N, K) of the teachers' softened probabilities."""
        answers = [
            (calibration.adjust(network(pixels_NCHW).float()) / TEMPERATURE).softmax(dim=1).index_select(1, places_K)
            for network, calibration, places_K in zip(self.networks, self.calibrations, self.places_TK, strict=True)
        ]
        return torch.stack(answers).mean(dim=0)


def introduce(teachers: Sequence[Checkpoint]) -> str:
    """The teachers in words, for the card: network, sha256 and, where known, epochs and accuracy."""
    return ", ".join(map(_introduce, teachers)) or "none"


def _introduce(teacher: Checkpoint) -> str:
    words = f"{teacher.architecture} {teacher.sha256[:12]}"
    if "epochs" in teacher.trained:
        words += f", {teacher.trained['epochs']} epochs"
    if (known := teacher.evaluation) is not None:
        words += f" ({known.accuracy:.2%} of {known.dataset})"
    return words


def loss(logits_NK: Tensor, labels_NK: Tensor, answers_NK: Tensor | None, recipe: Recipe) -> Tensor:
    """The cross-entropy with labels and teachers, weighted by the recipe's shares and summed over the images.

    Args:
        answers_NK: The teachers' answers, if and only if the recipe has distillation.
    """
    assert (answers_NK is not None) == (recipe.distillation > 0)
    from_labels = F.cross_entropy(logits_NK, labels_NK, reduction="sum", label_smoothing=recipe.label_smoothing)
    total = (1 - recipe.distillation) * from_labels
    if answers_NK is not None:
        softened = F.cross_entropy(logits_NK / TEMPERATURE, answers_NK, reduction="sum")
        # The square makes up for the smaller gradients of softened logits (section 2 of the paper).
        total = total + recipe.distillation * TEMPERATURE**2 * softened
    return total
