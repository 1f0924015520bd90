"""How well a network's output tells whether a picture is of the kind it was trained on.

Shape letters: N pictures, M of them known, K classes, D features.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from app import model
from app.calibration import UNFAMILIAR, energy
from app.checkpoint import Checkpoint
from app.data import Split
from training.errors import TrainingError
from training.evaluate import forward
from training.pictures import SOURCES

USED = "energy"
"""The score that the service uses, `app.calibration.energy`."""
NEIGHBOURS = 5
KNOWN_IMAGES = 10_000
"""Number of training images to search for neighbours: more take minutes on a CPU and change nothing."""


def compare(
    checkpoint: Checkpoint, train: Split, held_out: Split, count: int = 500, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """For each source of unfamiliar pictures: the AUROC of each score and the share called unfamiliar, in plain types.

    Args:
        train: Images that the network was trained on; the first ones serve as examples of what is familiar.
        held_out: Images that it was not trained on.
        count: Pictures from each source.

    Raises:
        TrainingError: the weights carry no calibration of familiarity.
    """
    if checkpoint.calibration.energy_quantiles is None:
        raise TrainingError(
            "These weights carry no calibration of familiarity; name those of a run with --validation 0.1 (or "
            "--calibration)."
        )
    body, head = model.split(checkpoint.network())
    known_MD = forward(body, train.pixels_NCHW[:KNOWN_IMAGES], device=device)
    labels_M = train.labels_N[:KNOWN_IMAGES]

    def scores(pixels_NCHW: Tensor) -> dict[str, Tensor]:
        features_ND = forward(body, pixels_NCHW, device=device)
        return score(features_ND, head(features_ND), known_MD, labels_M)

    def flagged(scores: dict[str, Tensor]) -> float:
        familiar = [checkpoint.calibration.familiarity(-value) for value in scores[USED].tolist()]
        return sum(value < UNFAMILIAR for value in familiar) / len(familiar)

    real = scores(held_out.pixels_NCHW)
    rows: list[dict[str, Any]] = []
    for name, source in SOURCES.items():
        made = scores(source(count, torch.Generator().manual_seed(0)))
        rows.append(
            {
                "source": name,
                "auroc": {method: auroc(real[method], made[method]) for method in real},
                "flagged": flagged(made),
            }
        )
    return {
        "held_out": {"name": held_out.name, "images": len(held_out), "flagged": flagged(real)},
        "pictures_per_source": count,
        "used": USED,
        "sources": rows,
        "mean_auroc": {method: sum(row["auroc"][method] for row in rows) / len(rows) for method in real},
        "mean_flagged": sum(row["flagged"] for row in rows) / len(rows),
    }


def score(features_ND: Tensor, logits_NK: Tensor, known_MD: Tensor, labels_M: Tensor) -> dict[str, Tensor]:
    """The candidate scores (N,) by name: the higher, the more familiar.

    Args:
        known_MD: Features of training images, with the classes `labels_M`.
    """
    logarithms_NK = logits_NK.log_softmax(dim=1)
    similarity_NM = F.normalize(features_ND, dim=1) @ F.normalize(known_MD, dim=1).T
    return {
        "max probability": logarithms_NK.amax(dim=1),  # Hendrycks and Gimpel, 2017, arXiv:1610.02136
        "max logit": logits_NK.amax(dim=1),  # Hendrycks et al., 2022, arXiv:1911.11132
        USED: -energy(logits_NK),  # Liu et al., 2020, arXiv:2010.03759
        "entropy": (logarithms_NK.exp() * logarithms_NK).sum(dim=1),
        "Mahalanobis": -_mahalanobis(features_ND, known_MD, labels_M),  # Lee et al., 2018, arXiv:1807.03888
        # Sun et al., 2022, arXiv:2204.06507
        f"{NEIGHBOURS} neighbours": similarity_NM.topk(min(NEIGHBOURS, len(known_MD)), dim=1).values.amin(dim=1),
    }


def _mahalanobis(features_ND: Tensor, known_MD: Tensor, labels_M: Tensor) -> Tensor:
    """Squared distance to the nearest class mean, in units of the spread within the classes.

    In float64: the covariance of few images is too nearly singular for float32.
    """
    features_ND, known_MD = features_ND.double(), known_MD.double()
    means_KD = torch.stack([known_MD[labels_M == label].mean(dim=0) for label in labels_M.unique()])
    centred_ND = known_MD - means_KD[torch.searchsorted(labels_M.unique(), labels_M)]
    covariance_DD = centred_ND.T @ centred_ND / len(known_MD)
    ridge = 1e-4 * covariance_DD.diagonal().mean() + torch.finfo(torch.float32).tiny  # some features are never active
    whitening_DD = torch.linalg.cholesky(torch.linalg.inv(covariance_DD + ridge * torch.eye(len(covariance_DD))))
    return torch.cdist(features_ND @ whitening_DD, means_KD @ whitening_DD).square().amin(dim=1)


def auroc(familiar_N: Tensor, unfamiliar_N: Tensor) -> float:
    """The probability that a familiar picture scores higher than an unfamiliar one; ties count half.

    The area under the ROC curve is the Mann-Whitney statistic (Hanley and McNeil, 1982).
    """
    sorted_N = unfamiliar_N.sort().values
    below_N = torch.searchsorted(sorted_N, familiar_N, right=False)
    up_to_N = torch.searchsorted(sorted_N, familiar_N, right=True)
    return ((below_N + up_to_N).double().mean() / 2 / len(unfamiliar_N)).item()


def format_comparison(found: dict[str, Any]) -> str:
    """The comparison as a table."""
    methods = [*found["mean_auroc"]]
    width = max(len(row["source"]) for row in found["sources"])
    lines = [
        f"AUROC of {found['held_out']['images']:,} images, {found['held_out']['name']}, against "
        f"{found['pictures_per_source']:,} pictures of each source",
        "",
        f"{'':{width}}  {'  '.join(f'{method:>15}' for method in methods)}  called unfamiliar",
    ]
    for row in [*found["sources"], {"source": "mean", "auroc": found["mean_auroc"], "flagged": found["mean_flagged"]}]:
        figures = "  ".join(f"{row['auroc'][method]:15.3f}" for method in methods)
        lines.append(f"{row['source']:{width}}  {figures}  {row['flagged']:17.1%}")
    lines.append(f"{'held out':{width}}  {' ' * (17 * len(methods) - 2)}  {found['held_out']['flagged']:17.1%}")
    return "\n".join(lines)
