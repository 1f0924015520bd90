"""What every route's answers say about a picture and about the weights."""

from typing import Any

from app.calibration import UNFAMILIAR
from app.checkpoint import Checkpoint
from app.predictor import Estimate


def scores(estimate: Estimate, checkpoint: Checkpoint, top_k: int | None) -> dict[str, Any]:
    """What `schemas.Scores` describes; built by hand, because validating our own answer takes longer than making it."""
    probabilities, familiarity = estimate
    classes = checkpoint.classes
    confidence = max(probabilities)
    class_id = probabilities.index(confidence)
    ranked = list(zip(classes, probabilities, strict=True))
    if top_k is not None:
        ranked = sorted(ranked, key=lambda pair: -pair[1])[:top_k]
    likely = checkpoint.calibration.prediction_set(probabilities)
    return {
        "label": classes[class_id],
        "class_id": class_id,
        "confidence": confidence,
        "probabilities": dict(ranked),
        "prediction_set": None if likely is None else [classes[index] for index in likely],
        "familiarity": familiarity,
        "unfamiliar": None if familiarity is None else familiarity < UNFAMILIAR,
    }


def model_info(checkpoint: Checkpoint) -> dict[str, str]:
    """What `schemas.ModelInfo` describes."""
    return {"name": checkpoint.architecture, "sha256": checkpoint.sha256[:12]}
