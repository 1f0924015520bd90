"""POST /predict."""

from fastapi import APIRouter, Request
from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive

from app.errors import BadRequest, UnsupportedMedia
from app.exchange import Headers, Intake, Reply, content_kind, headers_of
from app.images import ACCEPTED, Resize
from app.multipart import read_field
from app.routes import ResizeQuery, ServiceDep, TopKQuery
from app.routes.answers import model_info, scores
from app.routes.waiting import unless_left
from app.schemas import BINARY, Prediction, error_responses
from app.service import Service

router = APIRouter(tags=["prediction"])

RAW = ("application/octet-stream", "application/x-www-form-urlencoded")
"""Content types of a bare picture. The latter is what `curl --data-binary @picture.png` calls any body; the bytes tell
what it is anyway."""
FORM = {
    "title": "PictureForm",
    "type": "object",
    "properties": {"file": BINARY["schema"]},
    "required": ["file"],
}
BODY = {
    "required": True,
    "description": "A picture (PNG, JPEG, WebP, BMP or GIF): the field `file` of a form, or the body itself, as "
    "`application/octet-stream`, `image/png`, `image/jpeg` or the like.",
    # Not everything accepted: with more, generated clients omit the path or do not work.
    "content": {"multipart/form-data": {"schema": FORM}, "application/octet-stream": BINARY},
}


@router.post(
    "/predict",
    summary="Classify a picture",
    response_model=Prediction,
    response_description="The probabilities.",
    responses=error_responses(400, 408, 413, 415, 422, 429, 500, 503, 504),
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
    """The answer to a request whose parameters have been read."""
    future = service.predict(await _read_picture(headers, receive, service.intake), resize)
    verdict = await unless_left(receive, future, service.settings.deadline_seconds)
    answer = scores(verdict.rows[0], verdict.checkpoint, top_k)
    answer["model"] = model_info(verdict.checkpoint)
    return Reply(to_json(answer), timing=future.timing)


async def _read_picture(headers: Headers, receive: Receive, intake: Intake) -> bytes:
    """The bytes of the picture, wherever they are in the request."""
    kind, content_type = content_kind(headers)
    if kind == "multipart/form-data":
        picture = read_field(await intake.read(headers, receive), content_type, "file")
    elif kind.startswith("image/") or kind in RAW:
        picture = await intake.read(headers, receive)
    else:
        raise UnsupportedMedia(
            f"The body has the content type {kind!r}. Send multipart/form-data with the picture in the field "
            "`file` (curl -F file=@picture.png), or the picture itself as image/png, image/jpeg, ... or "
            "application/octet-stream. A picture in JSON, as base64, goes to /v2/models/cifar/infer.",
            headers={"Accept": "multipart/form-data, image/*, application/octet-stream"},
        )
    if not picture:
        raise BadRequest(f"The picture is empty. Send it as the body, or in the form field 'file'. {ACCEPTED}")
    return picture
