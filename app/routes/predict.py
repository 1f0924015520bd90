"""POST /predict."""

from typing import Any

from fastapi import APIRouter, Request
from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive

from app.calibration import UNFAMILIAR
from app.checkpoint import Checkpoint
from app.errors import BadRequest, UnsupportedMedia
from app.exchange import Headers, Intake, Reply, encoding_of, headers_of, text
from app.images import Resize
from app.multipart import read_field
from app.predictor import Estimate
from app.routes import ResizeQuery, ServiceDep, TopKQuery
from app.routes.waiting import unless_left
from app.schemas import Prediction, refusals
from app.service import Service

router = APIRouter(tags=["prediction"])

RAW = ("application/octet-stream", "application/x-www-form-urlencoded")
"""The latter is what `curl --data-binary @picture.png` says of any body; what a body is shows in its bytes anyway."""
PICTURE = {"schema": {"type": "string", "format": "binary"}}
FORM = {"type": "object", "properties": {"file": PICTURE["schema"]}, "required": ["file"]}
BODY = {
    "required": True,
    "description": "A picture (PNG, JPEG, WebP, BMP or GIF): the body itself, or the field `file` of a form.",
    "content": {
        "multipart/form-data": {"schema": FORM},
        "image/*": PICTURE,
        RAW[0]: PICTURE,
    },
}


@router.post(
    "/predict",
    summary="Classify a picture",
    response_model=Prediction,
    response_description="The probabilities.",
    responses=refusals(400, 408, 413, 415, 422, 429, 500, 503, 504),
    openapi_extra={"requestBody": BODY},
)
async def predict(
    request: Request,
    service: ServiceDep,
    resize: ResizeQuery = None,
    top_k: TopKQuery = None,
) -> Response:
    """The probabilities of all classes. Transparency is laid over white, EXIF orientation is respected."""
    reply = await respond(headers_of(request), request.receive, service, resize, top_k)
    return reply.response(request)


async def respond(
    headers: Headers, receive: Receive, service: Service, resize: Resize | None = None, top_k: int | None = None
) -> Reply:
    """The answer to a request whose parameters are known."""
    future = service.predict(await _read_picture(headers, receive, service.intake), resize)
    verdict = await unless_left(receive, future, service.settings.deadline_seconds)
    answer = scores(verdict.rows[0], verdict.checkpoint, top_k)
    answer["model"] = model_info(verdict.checkpoint)
    return Reply(to_json(answer), timing=future.timing)


def content_kind(headers: Headers) -> tuple[str, str]:
    """The content type without its parameters, and the whole of it.

    Raises:
        UnsupportedMedia: The body is compressed.
    """
    if (encoding := encoding_of(headers)) is not None:
        raise UnsupportedMedia(
            f"The body has the content encoding {encoding!r}; send it without any.",
            headers={"Accept-Encoding": "identity"},
        )
    content_type = text(headers, b"content-type", "application/octet-stream")
    return content_type.partition(";")[0].strip().lower(), content_type


async def _read_picture(headers: Headers, receive: Receive, intake: Intake) -> bytes:
    """The bytes of the picture, wherever the request has them."""
    kind, content_type = content_kind(headers)
    if kind == "multipart/form-data":
        picture = read_field(await intake.read(headers, receive), content_type, "file")
    elif kind.startswith("image/") or kind in RAW:
        picture = await intake.read(headers, receive)
    else:
        raise UnsupportedMedia(
            f"The body has the content type {kind!r}. Accepted are multipart/form-data with the picture in the field "
            "`file` (curl -F file=@picture.png), or the picture itself as image/png, image/jpeg, ... or "
            "application/octet-stream."
        )
    if not picture:
        raise BadRequest("The picture is empty. Accepted are PNG, JPEG, WebP, BMP and GIF.")
    return picture


def scores(estimate: Estimate, checkpoint: Checkpoint, top_k: int | None) -> dict[str, Any]:
    """What `schemas.Scores` describes; by hand, because validating our own answer takes longer than making it."""
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
