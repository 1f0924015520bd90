"""Temperature scaling: one number that makes the probabilities mean what they say (Guo et al., 2017, arXiv:1706.04599).

Shape letters: N images, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def fit_temperature(probabilities_NK: Tensor, labels_N: Tensor) -> float:
    """The temperature that minimises the negative log likelihood of held-out images the network was not trained on.

    Args:
        probabilities_NK: At temperature 1. Their logarithms are the logits up to a constant per image, which cancels.

    Returns:
        A number above 0; above 1 where the network was too sure of itself.
    """
    logits_NK = probabilities_NK.double().clamp_min(torch.finfo(torch.float32).tiny).log()
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits_NK / log_temperature.exp(), labels_N)
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    return log_temperature.exp().item()
