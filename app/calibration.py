"""What held-out images tell about a network's answers: how sure to be, and which pictures resemble its training images.

Imports only torch. Shape letters: N pictures, K classes.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

UNFAMILIAR = 0.05
"""A picture below this familiarity is called unfamiliar, and so is this share of the held-out images themselves."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Values fitted on images that the network was not trained on. The default changes nothing and knows nothing."""

    temperature: float = 1.0
    """See `adjust` below."""
    cubic: float = 0.0
    """See `adjust` below."""
    set_threshold: float | None = None
    """The least probability of a class in the prediction set."""
    energy_quantiles: tuple[float, ...] | None = None
    """Quantiles of the `energy` of the held-out images, evenly spaced from the minimum to the maximum."""
    images: str = ""
    """The held-out images, in words."""
    count: int = 0
    """How many of them."""
    digest: str = ""
    """sha256 over their pixels and labels."""

    def adjust(self, logits_NK: Tensor) -> Tensor:
        """Calibrated logits (N, K), the highest of each picture 0."""
        return adjust(logits_NK, self.temperature, self.cubic)

    def probabilities(self, logits_NK: Tensor) -> Tensor:
        """Calibrated probabilities (N, K), in the number format of the logits."""
        return self.adjust(logits_NK).softmax(dim=1)

    def familiarity(self, energy: float) -> float:
        """The share of held-out images with a higher energy, in [0, 1]. Needs `energy_quantiles`."""
        quantiles = self.energy_quantiles
        assert quantiles is not None
        above = bisect_left(quantiles, energy)
        if above == 0 or above == len(quantiles):
            return float(above == 0)
        low, high = quantiles[above - 1], quantiles[above]
        return 1 - (above - 1 + (energy - low) / (high - low)) / (len(quantiles) - 1)

    def prediction_set(self, probabilities_K: Sequence[float]) -> list[int] | None:
        """Indices of the classes the picture may show, the most probable first, at least one; None without a threshold.

        Least ambiguous set-valued classification (LAC): if the probabilities are right, no sets with this coverage are
        smaller on average (Sadinle, Lei and Wasserman, 2019, arXiv:1609.00451).
        """
        threshold = self.set_threshold
        if threshold is None:
            return None
        likely = [index for index, probability in enumerate(probabilities_K) if probability >= threshold]
        if len(likely) > 1:
            likely.sort(key=lambda index: -probabilities_K[index])
        return likely or [probabilities_K.index(max(probabilities_K))]


UNCALIBRATED = Calibration()


def adjust(logits_NK: Tensor, temperature: float | Tensor, cubic: float | Tensor) -> Tensor:
    """Logits (N, K) rescaled to a different certainty, the highest of each picture 0.

    A logit's distance d from the highest becomes d / temperature + cubic d^3. Without the cube that is temperature
    scaling (Guo et al., 2017, arXiv:1706.04599); with it, nearly certain answers may gain while doubtful ones lose.
    While neither is negative, the order of the classes is kept (Rahimi et al., 2020, arXiv:2003.06820).
    """
    below_NK = logits_NK.amax(dim=1, keepdim=True) - logits_NK
    return -below_NK * (1 / temperature + cubic * below_NK.square())


def energy(logits_NK: Tensor) -> Tensor:
    """The energy of each picture (N,): the higher, the less it resembles the training images.

    Minus the logarithm of the summed exponentials of the logits: the free energy of Liu et al. (2020,
    arXiv:2010.03759). `python -m training unfamiliar` compares it with other scores.
    """
    return -logits_NK.logsumexp(dim=1)
