"""The bodies of all answers, each field described. This is what /docs shows; nothing here computes."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import BaseModel, Field, WithJsonSchema

from app.images import Resize


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: str = Field(
        description="What was given, what it must be and what to do, in one or two sentences.",
        examples=["The picture is 640 x 480; the network takes 32 x 32. Send that size, or add ?resize=crop, ..."],
    )
    detail: Any = Field(description="Details for programs, if there are any; otherwise null.")
    request_id: str = Field(description="Also in the header X-Request-ID and in the service's log.")


class ModelInfo(BaseModel):
    """Which weights answered."""

    name: str = Field(description="The architecture.", examples=["cifar_net"])
    sha256: str = Field(description="The first 12 hexadecimal digits of the weights file's sha256.")


class Scores(BaseModel):
    """What the network makes of one picture."""

    label: str = Field(description="The most probable class.", examples=["cat"])
    class_id: int = Field(description="Index of that class, in the order of the classes.", examples=[3])
    confidence: float = Field(description="Probability of that class, from 0 to 1.", examples=[0.9316])
    probabilities: dict[str, float] = Field(
        description="The probability of every class by name, in the order of the classes, unrounded; they sum to 1. "
        "With top_k, only the k most probable, highest first."
    )
    prediction_set: list[str] | None = Field(
        description="The classes the picture may show, most probable first, at least one. Such a set holds the true "
        "class for 95 % of pictures of the kind that the network was trained on (split conformal prediction, least "
        "ambiguous sets). Null for weights without calibration.",
        examples=[["cat", "dog"]],
    )
    familiarity: float | None = Field(
        description="How much the picture resembles those the network was trained on: the share of held-out images of "
        "that kind that resemble them less, 0 to 1. Null for weights without calibration.",
        examples=[0.62],
    )
    unfamiliar: bool | None = Field(
        description="Whether `familiarity` is below 0.05: the picture may well show something else, and the "
        "probabilities mean little. Also true of one in twenty held-out images, and of somewhat more JPEGs."
    )


class Prediction(Scores):
    """What the network makes of one picture, and which weights answered."""

    model: ModelInfo = Field(description="Which weights answered.")


class PictureError(BaseModel):
    """What is wrong with one of several pictures."""

    error: str = Field(description="As in ErrorBody.")
    detail: Any = Field(description="As in ErrorBody.")


class BatchPrediction(BaseModel):
    """What the network makes of many pictures."""

    predictions: list[Scores | PictureError] = Field(
        description="One entry per picture, in order; for a picture that cannot be read, its error."
    )
    model: ModelInfo = Field(description="Which weights answered.")


class Confusion(BaseModel):
    """What images of a class are taken for."""

    label: str = Field(description="The class they are taken for.")
    images: int = Field(description="How many of them.")


class ClassReport(BaseModel):
    """How well one class is recognised."""

    class_id: int = Field(description="Index of the class.")
    label: str = Field(description="Its name.")
    support: int = Field(description="Images of this class.")
    predicted: int = Field(description="Images taken for this class, rightly or wrongly.")
    correct: int = Field(description="Images of this class recognised as such.")
    accuracy: float = Field(description="correct / support, also called recall; 0 for a class without images.")
    precision: float = Field(description="correct / predicted; 0 for a class that is never predicted.")
    f1: float = Field(description="Harmonic mean of accuracy and precision.")
    interval: tuple[float, float] = Field(description="95 % Wilson interval of the accuracy.")
    confusions: list[Confusion] = Field(
        description="The classes that its images are most often taken for, at most three, the most frequent first."
    )


class DatasetInfo(BaseModel):
    """The data set of an evaluation."""

    name: str = Field(description="Its name in words.", examples=["CIFAR-10 test"])
    sha256: str = Field(description="Digest of its pixels and labels.")
    images: int = Field(description="Number of images.")


class Certainty(BaseModel):
    """How well the probabilities agree with the share of right answers."""

    nll: float = Field(description="Mean negative log likelihood of the true class, in nats.")
    brier: float = Field(description="Mean squared distance of the probabilities from the truth, 0 to 2.")
    ece: float = Field(description="Expected calibration error, 0 to 1.")


class CalibrationReport(Certainty):
    """How well the served probabilities agree with the share of right answers, and how well before calibration."""

    ece_estimator: str = Field(description="How the calibration error is estimated.")
    uncalibrated: Certainty = Field(description="The same three before calibration.")


class PredictionSets(BaseModel):
    """How well the sets of classes keep their promise."""

    target: float = Field(description="Share of pictures whose set should hold the true class.", examples=[0.95])
    coverage: float = Field(description="Share of images whose set holds it.")
    mean_size: float = Field(description="Mean number of classes in a set.")


class WeightsInfo(BaseModel):
    """Which weights the figures belong to."""

    name: str = Field(description="The architecture.")
    sha256: str = Field(description="The weights file's sha256, in full.")


class Report(BaseModel):
    """Figures per class and overall."""

    source: Literal["checkpoint", "measured"] = Field(
        description="`checkpoint`: read from the weights file, where training put the figures. `measured`: by this "
        "service, with the loaded weights, on the test set it was given.",
        examples=["checkpoint"],
    )
    weights: WeightsInfo = Field(description="Which weights the figures belong to.")
    trained: dict[str, Any] = Field(description="Where the weights come from: recipe, seed, versions, device, time.")
    dataset: DatasetInfo = Field(description="The data set the weights were evaluated on.")
    evaluated_at: str = Field(description="Date and time in UTC, ISO 8601.")
    accuracy: float = Field(description="Share of images whose most probable class is the true one.")
    correct: int = Field(description="Number of those images.")
    interval: tuple[float, float] = Field(description="95 % Wilson interval of the accuracy.")
    calibration: CalibrationReport = Field(
        description="How well the probabilities agree with the share of right answers."
    )
    prediction_sets: PredictionSets | None = Field(
        description="How well the sets of classes keep their promise; null if these weights have none."
    )
    classes: list[ClassReport] = Field(description="One entry per class, in the order of the classes.")
    confusion: list[list[int]] = Field(description="Numbers of images; rows are true classes, columns predicted ones.")


class Reloaded(BaseModel):
    """Which weights are served after a reload."""

    model: ModelInfo = Field(description="The weights being served now.")
    changed: bool = Field(description="False if the file holds the weights that were already being served.")


class Health(BaseModel):
    """The process is alive, or ready for requests."""

    status: Literal["ok", "ready"] = Field(description="`ok` for liveness, `ready` for readiness.")


# What a query can express. The framework would also describe null, which a query cannot.
RESIZE = WithJsonSchema({"type": "string", "enum": list(get_args(Resize)), "title": "Resize"})
TOP_K = WithJsonSchema({"type": "integer", "minimum": 1, "title": "Top K"})

BINARY = {"schema": {"type": "string", "format": "binary"}}
"""A body that is not JSON: a picture, pixels, tensors."""

RETRY_AFTER = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}}}
HEADERS = {
    401: {"WWW-Authenticate": {"description": "`Bearer`.", "schema": {"type": "string"}}},
    429: RETRY_AFTER,
    503: RETRY_AFTER,
}
"""The headers of error answers, by status."""
MEANINGS = {
    400: "No picture in the body, a damaged one, or a malformed form.",
    401: "The key is missing or wrong.",
    404: "There is no such page, or no report.",
    408: "The body was not complete within the deadline.",
    409: "The weights file cannot replace the weights being served, which stay in service.",
    413: "The body has too many bytes, or the picture too many pixels or pieces.",
    415: "The service does not read this content type or content encoding.",
    422: "A picture that is not 32x32, without `resize`; or a parameter with an invalid value.",
    429: "The service is overloaded. The header Retry-After says when to try again.",
    500: "Internal error; the log has the details under the request_id.",
    501: "This service does not support this part of the protocol.",
    503: "The service is stopping. The header Retry-After says when to try again.",
    504: "The request waited too long for its turn.",
}


def error_responses(*statuses: int, meanings: Mapping[int, str] = {}) -> dict[int | str, dict[str, Any]]:
    """The documentation of a route's error answers, for its `responses`; `meanings` replace the usual ones."""
    return {
        status: {
            "model": ErrorBody,
            "description": meanings.get(status, MEANINGS[status]),
            "headers": HEADERS.get(status, {}),
        }
        for status in statuses
    }
