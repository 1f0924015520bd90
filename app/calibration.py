"""What held-out images taught about the answers of a network: how sure it may be, and what is like its training.

A leaf: torch only. Shape letters: N pictures, K classes, D features, P prototypes.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

UNFAMILIAR = 0.05
"""Below this familiarity a picture is called unfamiliar; so is this share of the held-out images themselves."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Fitted on images that the network was not trained on. The default is none: temperature 1, nothing else known."""

    temperature: float = 1.0
    """What the logits are divided by before the softmax (Guo et al., 2017, arXiv:1706.04599)."""
    set_threshold: float | None = None
    """A class of at least this probability is in the prediction set."""
    strangeness_quantiles: tuple[float, ...] | None = None
    """Of the `strangeness` of the held-out images, at equal steps from the least to the greatest."""
    images: str = ""
    """Which images, in words."""
    count: int = 0
    """How many."""
    digest: str = ""
    """sha256 over their pixels and labels."""

    def familiarity(self, strangeness: float) -> float:
        """The share of held-out images that are stranger, in [0, 1]. Only with `strangeness_quantiles`."""
        quantiles = self.strangeness_quantiles
        assert quantiles is not None
        above = bisect_left(quantiles, strangeness)
        if above == 0 or above == len(quantiles):
            return float(above == 0)
        low, high = quantiles[above - 1], quantiles[above]
        return 1 - (above - 1 + (strangeness - low) / (high - low)) / (len(quantiles) - 1)

    def prediction_set(self, probabilities_K: Sequence[float]) -> list[int] | None:
        """Indices of the classes that the picture may be of, the most probable first; at least one, None if unknown.

        Least ambiguous set-valued classification (LAC): of all sets with this coverage the smallest on average
        (Sadinle, Lei and Wasserman, 2019, arXiv:1609.00451).
        """
        threshold = self.set_threshold
        if threshold is None:
            return None
        likely = [index for index, probability in enumerate(probabilities_K) if probability >= threshold]
        if len(likely) > 1:
            likely.sort(key=lambda index: -probabilities_K[index])
        return likely or [probabilities_K.index(max(probabilities_K))]


UNCALIBRATED = Calibration()


def strangeness(features_ND: Tensor, logits_NK: Tensor, prototypes_PD: Tensor) -> Tensor:
    """How little each picture resembles the training images (N,), from 0.

    Its distance to the nearest prototype (1 - cosine), the more the less the network can decide: times 1 + entropy in
    nats. As in NNGuide (Park, Jung and Teoh, 2023, arXiv:2309.14888) each makes up for what the other one misses:
    features betray drawings and noise, indecision betrays photographs. `python -m training unfamiliar` compares.
    """
    lengths_N: Tensor = torch.linalg.vector_norm(features_ND, dim=1).clamp_min(1e-12)
    distance_N = 1 - (features_ND @ prototypes_PD.T).amax(dim=1) / lengths_N
    entropy_N: Tensor = torch.special.entr(logits_NK.softmax(dim=1)).sum(dim=1)
    return distance_N * (1 + entropy_N)
