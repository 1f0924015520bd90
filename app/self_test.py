"""Whether a network can be trusted with pictures: asked before it is put to work."""

from collections.abc import Callable

import torch
from torch import Tensor

from app.errors import CheckpointError
from app.model import IMAGE_SIZE

TOLERANCE = 0.02
"""How far two runs of one picture may differ; the kernels for one picture and for several round differently."""


def drawings() -> Tensor:
    """What is easy and what is hard on numbers: black, white, a gradient, noise; uint8 (4, 3, 32, 32)."""
    pixels_NCHW = torch.zeros(4, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    pixels_NCHW[1] = 255
    pixels_NCHW[2] = torch.linspace(0, 255, IMAGE_SIZE)
    generator = torch.Generator().manual_seed(0)
    pixels_NCHW[3] = torch.randint(0, 256, pixels_NCHW[3].shape, dtype=torch.uint8, generator=generator)
    return pixels_NCHW


def check(predict: Callable[[Tensor], Tensor]) -> None:
    """Try `predict`, from pixels (N, 3, 32, 32) to probabilities (N, K), on a few drawings.

    Raises:
        CheckpointError: the probabilities are none, or they depend on which pictures are asked about together.
    """
    pixels_NCHW = drawings()
    together_NK = predict(pixels_NCHW)
    alone_NK = torch.cat([predict(pixels_1CHW) for pixels_1CHW in pixels_NCHW.split(1)])
    if not (together_NK.isfinite().all() and alone_NK.isfinite().all()):
        raise CheckpointError("With these weights the network gives probabilities that are not finite numbers.")
    if (together_NK - alone_NK).abs().max() > TOLERANCE:
        raise CheckpointError(
            "With these weights the network gives a picture alone other probabilities than among others."
        )
