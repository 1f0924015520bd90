"""POST /predict/batch."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from pydantic_core import to_json
from starlette.responses import Response

from app.entries import Answer
from app.errors import BadRequest, BodyTooLarge, UnsupportedMedia
from app.exchange import LIGHT_BYTES, Reply, content_kind, headers_of
from app.images import OWN_FAULTS, Resize, check_raw
from app.model import IMAGE_BYTES
from app.multipart import read_fields
from app.routes import ResizeQuery, ServiceDep, TopKQuery
from app.routes.answers import model_info, scores
from app.routes.waiting import all_unless_left
from app.schemas import BINARY, BatchPrediction, error_responses
from app.service import Service, Verdict

router = APIRouter(tags=["prediction"])

FIELDS = ("file", "files")
FORM = {  # without `file`: generated clients do not work with alternatives
    "title": "PicturesForm",
    "type": "object",
    "properties": {"files": {"type": "array", "items": BINARY["schema"], "minItems": 1}},
    "required": ["files"],
}
BODY = {
    "required": True,
    "description": "Many pictures: a form with a field `files` (or `file`) for each; or, as application/octet-stream, "
    f"their raw pixels one after another, {IMAGE_BYTES:,} bytes each: 32 rows of 32 pixels of red, green and blue.",
    "content": {"multipart/form-data": {"schema": FORM}, "application/octet-stream": BINARY},
}


@router.post(
    "/predict/batch",
    summary="Classify many pictures",
    response_model=BatchPrediction,
    response_description="The probabilities for each picture, or what is wrong with it.",
    responses=error_responses(400, 408, 413, 415, 422, 429, 500, 503, 504),
    openapi_extra={"requestBody": BODY},
)
async def predict_batch(
    request: Request,
    service: ServiceDep,
    resize: ResizeQuery = None,
    top_k: TopKQuery = None,
) -> Response:
    """Answers in the order of the pictures. One that cannot be read is reported in its place, without affecting the
    others. Raw pixels cost the least: there is nothing to decode."""
    predictions: list[dict[str, Any]] = []
    checkpoint = service.checkpoint  # in case no picture can be read
    answers = await _submit(request, service, resize)
    outcomes, timing = await all_unless_left(request.receive, answers, service.settings.deadline_seconds)
    for answer in outcomes:
        if isinstance(answer, OWN_FAULTS):
            predictions.append({"error": str(answer), "detail": answer.detail})
        elif isinstance(answer, BaseException):
            raise answer
        else:
            rows, checkpoint = answer
            predictions += [scores(row, checkpoint, top_k) for row in rows]
    body = {"predictions": predictions, "model": model_info(checkpoint)}
    return Reply(to_json(body), timing=timing).response(request)


async def _submit(request: Request, service: Service, resize: Resize | None) -> list[Answer[Verdict]]:
    """For each picture, or group of raw ones, the verdict to come."""
    headers = headers_of(request)
    kind, content_type = content_kind(headers)
    most = service.settings.max_pictures
    too_many = BodyTooLarge(
        f"The request has more than {most:,} pictures, the limit for one request. Send several requests.",
        detail={"max_pictures": most},
    )
    if kind == "multipart/form-data":
        body = await service.intake.read(headers, request.receive)
        if len(body) <= LIGHT_BYTES:
            fields = read_fields(body, content_type, most, too_many)
        else:  # a thousand parts take 0.1 s
            with service.intake.holding(len(body)):
                fields = await asyncio.to_thread(read_fields, body, content_type, most, too_many)
        if unknown := [name for name, _ in fields if name not in FIELDS]:
            raise BadRequest(f"The form has a field {unknown[0]!r}; each must be `files` or `file`, with a picture.")
        if not fields:
            raise BadRequest("The form has no field; it must have a field `files` for each picture.")
        return service.predict_pictures([content for _, content in fields], resize)
    if kind == "application/octet-stream":
        body = await service.intake.read(headers, request.receive)
        if len(body) > most * IMAGE_BYTES:
            raise too_many
        return service.predict_pixels(check_raw(body))
    raise UnsupportedMedia(
        f"The body has the content type {kind!r}. Send multipart/form-data with a field `files` for each "
        "picture (curl -F files=@1.png -F files=@2.png), or raw pixels as application/octet-stream.",
        headers={"Accept": "multipart/form-data, application/octet-stream"},
    )
