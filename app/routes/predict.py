"""POST /predict."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic_core import to_json
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from app.checkpoint import Checkpoint
from app.errors import BadRequest, UnsupportedMedia
from app.images import Resize
from app.multipart import read_field
from app.routes import ServiceDep
from app.schemas import Prediction, refusals
from app.service import Service

router = APIRouter(tags=["prediction"])

WATCH_SECONDS = 0.05
"""Watching for a client that leaves takes a task for each request; it is done when the wait is at least this long."""

PICTURE = {"schema": {"type": "string", "format": "binary"}}
FORM = {"type": "object", "properties": {"file": PICTURE["schema"]}, "required": ["file"]}
BODY = {
    "required": True,
    "description": "A picture (PNG, JPEG, WebP, BMP or GIF): the body itself, or the field `file` of a form.",
    "content": {
        "multipart/form-data": {"schema": FORM},
        "image/*": PICTURE,
        "application/octet-stream": PICTURE,
    },
}


@router.post(
    "/predict",
    summary="Classify a picture",
    response_model=Prediction,
    responses=refusals(400, 413, 415, 422, 429, 500, 503, 504),
    openapi_extra={"requestBody": BODY},
)
async def predict(
    request: Request,
    service: ServiceDep,
    resize: Annotated[
        Resize | None,
        Query(
            description="What to do with a picture that is not 32x32: `crop` takes the centre square, `stretch` bends "
            "the proportions, `pad` adds white margins. Without it another size is refused."
        ),
    ] = None,
    top_k: Annotated[int | None, Query(ge=1, description="Answer only so many probabilities, highest first.")] = None,
) -> Response:
    """The probabilities of all classes. Transparency is laid over white, EXIF orientation is respected."""
    return await _respond(request, service, resize, top_k)


class FastLane:
    """Takes `POST /predict` without parameters past the router to the same code.

    Routing, dependencies and parameters take some 200 us a request, more than all the rest in this thread.
    Any other request goes the usual way.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        plain = scope["type"] == "http" and scope["path"] == "/predict" and not scope["query_string"]
        if plain and scope["method"] == "POST":
            response = await _respond(Request(scope, receive), self.service)
            await response(scope, receive, send)
        else:
            await self.app(scope, receive, send)


async def _respond(
    request: Request, service: Service, resize: Resize | None = None, top_k: int | None = None
) -> Response:
    probabilities = await _wait(request, service, await _read_picture(request), resize)
    return Response(to_json(_answer(probabilities, service.checkpoint, top_k)), media_type="application/json")


async def _read_picture(request: Request) -> bytes:
    """The bytes of the picture, wherever the request has them."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise UnsupportedMedia(f"The body has the content encoding {encoding!r}; send it without any.")
    content_type = request.headers.get("content-type", "application/octet-stream")
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        picture = read_field(await request.body(), content_type, "file")
    elif kind.startswith("image/") or kind == "application/octet-stream":
        picture = await request.body()
    else:
        raise UnsupportedMedia(
            f"The body has the content type {kind!r}. Accepted are multipart/form-data with the picture in the field "
            "`file` (curl -F file=@picture.png), or the picture itself as image/png, image/jpeg, ... or "
            "application/octet-stream."
        )
    if not picture:
        raise BadRequest("The picture is empty. Accepted are PNG, JPEG, WebP, BMP and GIF.")
    return picture


async def _wait(request: Request, service: Service, picture: bytes, resize: Resize | None) -> list[float]:
    watched = service.expected_wait_seconds > WATCH_SECONDS
    future = service.predict(picture, resize)
    if not watched:
        return await future
    leaving = asyncio.ensure_future(_leaving(request))
    try:
        await asyncio.wait((future, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not future.done():
            raise ClientDisconnect
        return future.result()
    finally:
        leaving.cancel()
        future.cancel()  # changes nothing if it is done; else no forward pass is spent on it


async def _leaving(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _answer(probabilities: list[float], checkpoint: Checkpoint, top_k: int | None) -> dict[str, Any]:
    """What `schemas.Prediction` describes; by hand, because validating our own answer takes longer than making it."""
    confidence = max(probabilities)
    class_id = probabilities.index(confidence)
    ranked = list(zip(checkpoint.classes, probabilities, strict=True))
    if top_k is not None:
        ranked = sorted(ranked, key=lambda pair: -pair[1])[:top_k]
    return {
        "label": checkpoint.classes[class_id],
        "class_id": class_id,
        "confidence": confidence,
        "probabilities": dict(ranked),
        "model": {"name": checkpoint.architecture, "sha256": checkpoint.sha256[:12]},
    }
