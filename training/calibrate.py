"""Calibration: what held-out images tell about the probabilities and about what is familiar.

Shape letters: N images, K classes.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from app import self_test
from app.calibration import UNCALIBRATED, Calibration, adjust, energy
from app.checkpoint import Checkpoint
from app.data import Split
from app.report import COVERAGE
from training.evaluate import forward, predict
from training.robustness import jpeg

JPEG_QUALITY = 75
"""The default of most programs that save JPEGs."""
USUAL_DISTANCE = 5.0
"""Mean distance of logits from the highest of their picture, roughly as in the networks here."""
LOG_TEMPERATURES = (-5.0, 5.0)
"""Bounds on the temperature's logarithm, for logits with that mean distance."""
QUANTILES = 1001
"""Number of quantiles, a thousandth apart."""


def complete(
    untested: Checkpoint,
    held_out: Split | None,
    taken_over: Calibration | None,
    device: torch.device | str = "cpu",
) -> Checkpoint:
    """Add the calibration and the self-test's answers to a trained checkpoint; the evaluation is still missing.

    Args:
        held_out: Images to calibrate on.
        taken_over: The calibration to use if there are none, from a run of the same recipe that had some.
    """
    known = calibrate(untested, held_out, device) if held_out is not None else taken_over or UNCALIBRATED
    found = dataclasses.replace(untested, calibration=known)
    drawn_NK = predict(found.network(), self_test.drawings(), calibration=found.calibration)
    return dataclasses.replace(found, self_test_NK=drawn_NK)


def calibrate(checkpoint: Checkpoint, held_out: Split, device: torch.device | str = "cpu") -> Calibration:
    """Calibrate a checkpoint on images that it was not trained on.

    Each image counts twice, as it is and as a JPEG: people post both, and a network errs more on JPEGs, so a fit to
    the clean images alone would promise too much.
    """
    pixels_NCHW = torch.cat([held_out.pixels_NCHW, jpeg(JPEG_QUALITY, held_out.pixels_NCHW)])
    labels_N = held_out.labels_N.repeat(2)
    logits_NK = forward(checkpoint.network(), pixels_NCHW, device=device)
    fitted = fit_probabilities(logits_NK, labels_N, views=2)
    probabilities_NK = fitted.probabilities(logits_NK)
    steps = torch.linspace(0, 1, QUANTILES, dtype=torch.float64)
    return dataclasses.replace(
        fitted,
        set_threshold=set_threshold(probabilities_NK, labels_N, views=2),
        energy_quantiles=tuple(energy(logits_NK).double().quantile(steps).tolist()),
        images=f"{held_out.name}, as they are and as JPEG of quality {JPEG_QUALITY}",
        count=len(held_out),
        digest=held_out.digest,
    )


def fit_probabilities(logits_NK: Tensor, labels_N: Tensor, views: int = 1) -> Calibration:
    """The temperature and the cubic term that minimise the negative log likelihood.

    Neither can be negative, which preserves the order of the classes. With N images, each target gives the true class
    (N + 1) / (N + 2) and the other classes the rest: a few images, all of them right, are no reason to be certain
    (Platt, 1999, section 2.2).

    Args:
        views: How often each image occurs; more views of the same images add no evidence.
    """
    # On logits of another scale, the search would start far from the minimum and might end elsewhere.
    distance = (logits_NK.amax(dim=1, keepdim=True) - logits_NK).double().mean().item()
    unit = distance / USUAL_DISTANCE or 1.0
    logits_NK = logits_NK.double() / unit
    count, num_classes = logits_NK.shape
    smoothing = num_classes / (num_classes - 1) / (count // views + 2)
    parameters = torch.tensor([0.0, 0.1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        temperature, cubic = parameters[0].clamp(*LOG_TEMPERATURES).exp(), parameters[1].square()
        adjusted_NK = adjust(logits_NK, temperature, cubic)
        loss = F.cross_entropy(adjusted_NK, labels_N, label_smoothing=smoothing)
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    logarithm, root = parameters[0].clamp(*LOG_TEMPERATURES).item(), parameters[1].item()
    return Calibration(temperature=math.exp(logarithm) * unit, cubic=root**2 / unit**3)


def set_threshold(probabilities_NK: Tensor, labels_N: Tensor, coverage: float = COVERAGE, views: int = 1) -> float:
    """The lowest probability that puts a class in a prediction set, by split conformal prediction.

    Among N + 1 exchangeable pictures, the new one is equally likely to have any rank. So the sets hold the true class
    with probability `coverage` or more if they go down to the floor((N + 1) (1 - coverage))-th smallest probability of
    a true class (Vovk, Gammerman and Shafer, 2005; Angelopoulos and Bates, 2021, arXiv:2107.07511, section 1).
    With too few images for any guarantee, the threshold is 0, which admits all classes.

    Args:
        views: How often each picture occurs; more views of the same pictures add no evidence, so a rank spans `views`
            probabilities, and the smallest of the group at that rank is the threshold.
    """
    true_N = probabilities_NK.gather(1, labels_N[:, None])[:, 0].sort().values
    pictures = math.floor((len(true_N) // views + 1) * (1 - coverage) + 1e-9)
    rank = views * (pictures - 1) + 1 if pictures else 0
    return true_N[rank - 1].item() if rank else 0.0
