"""Checks that a network can be trusted with pictures before it is put to work.

Shape letters: N pictures, K classes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from app.errors import CheckpointError
from app.model import IMAGE_SIZE

NEIGHBOURS_TOLERANCE = 0.02
"""How far two runs of a picture may differ; kernels for one picture and for several round differently."""
TOLERANCE = 0.05
"""How far a probability may be from its float32 value. In bfloat16 the distance was up to 0.01 on these drawings and
0.015 on all test images; with the kernels of any one layer shuffled, half or more."""


def drawings() -> Tensor:
    """Pictures, numerically easy and hard: black, white, a gradient, noise, clouds; uint8 (8, 3, 32, 32)."""
    pixels_NCHW = torch.zeros(8, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    pixels_NCHW[1] = 255
    pixels_NCHW[2] = torch.linspace(0, 255, IMAGE_SIZE)
    generator = torch.Generator().manual_seed(0)
    pixels_NCHW[3] = torch.randint(0, 256, pixels_NCHW[3].shape, dtype=torch.uint8, generator=generator)
    specks_NCHW = torch.randint(0, 256, (4, 3, 4, 4), generator=generator).float()
    pixels_NCHW[4:] = F.interpolate(specks_NCHW, size=IMAGE_SIZE, mode="bilinear").round()
    return pixels_NCHW


def check(predict: Callable[[Tensor], Tensor], expected_NK: Tensor | None = None) -> None:
    """Try `predict`, from pixels (N, 3, 32, 32) to probabilities (N, K), on a few drawings.

    Args:
        expected_NK: The probabilities that the same weights gave for them in float32, if known.

    Raises:
        CheckpointError: the probabilities depend on which pictures run together, or are not as expected.
    """
    pixels_NCHW = drawings()
    together_NK = predict(pixels_NCHW)
    alone_NK = torch.cat([predict(pixels_1CHW) for pixels_1CHW in pixels_NCHW.split(1)])
    if not (together_NK - alone_NK).abs().max() <= NEIGHBOURS_TOLERANCE:  # NaN neither
        raise CheckpointError(
            "With these weights the network gives a picture different probabilities alone and in a batch."
        )
    if expected_NK is not None and not (error := (together_NK - expected_NK).abs().max().item()) <= TOLERANCE:
        raise CheckpointError(
            f"The network computes wrongly here: it gives a drawing a probability that is {error:.2f} from the one "
            "that training put into the weights file. Get the file again; if that does not help, try the engine torch "
            "(--engine torch) or another device."
        )
