"""/v2: the Open Inference Protocol (KServe V2), with the extensions of Triton in `spec.EXTENSIONS`.

Paths and statuses follow specification/protocol/inference_rest.md, headers the extension "binary tensor data". The
functions, and so those of generated clients, are named after the protocol's gRPC calls.
"""

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Receive

from app import compression
from app.compression import ENCODINGS
from app.errors import BadRequest, NotOffered, UnsupportedMedia
from app.exchange import JSON, Headers, Reply, encoding_of, header_text, headers_of
from app.images import OWN_FAULTS, Resize, check_raw
from app.open_inference import schemas, spec
from app.open_inference.request import Inference, decode, json_length
from app.open_inference.response import encode
from app.routes import ResizeQuery, ServiceDep, TotalDep, check_ready
from app.routes.waiting import all_unless_left
from app.schemas import BINARY, error_responses
from app.service import Rows, Service, Verdict
from app.statistics import Timing

router = APIRouter(prefix="/v2", tags=["open inference protocol"])

MODEL = f"/models/{spec.MODEL_NAME}"
VERSION = f"{MODEL}/versions/{spec.MODEL_VERSION}"
OCTETS = b"application/octet-stream"
JSON_LENGTH = b"inference-header-content-length"
WORTH_COMPRESSING_BYTES = 1024
"""The least length worth compressing: a shorter answer fits into one packet either way."""
LITTLE_JSON_BYTES = 64 * 1024
"""How much the event loop parses. More goes to a thread, which helps only with compression and base64: the parser
itself holds the GIL, 0.1 s for 8 MiB of numbers, and up to ten times that for endless brackets."""

PICTURE = "iVBORw0KGgoAAAANSUhEUgAAACAAAAAgAQAAAABbAUdZAAAAEUlEQVR42mP8z8DAwMQwaAkAswEBP25AfJYAAAAASUVORK5CYII="
"""A PNG, 32x32, drawn by Pillow."""
HEADER = {
    "name": "Inference-Header-Content-Length",
    "in": "header",
    "description": "In a request with raw tensors: how many bytes of the body are JSON. 0: the body is a picture.",
    "schema": {"type": "integer", "minimum": 0},
}
LENGTH = {
    HEADER["name"]: {
        "description": "How many bytes of an answer with raw tensors are JSON. Ask for such an answer with "
        "`binary_data`, `binary_data_output` or, if the body is a picture, by not sending `Accept: application/json`.",
        "schema": HEADER["schema"],
    }
}
BODY = {
    "required": True,
    "description": "One input, `pixels` (UINT8, [N, 32, 32, 3], raw pixels, red first), or `image` (BYTES, [N], "
    "encoded pictures; in JSON as base64). Raw tensors may follow the JSON, with its length in the header "
    "`Inference-Header-Content-Length`; if that is 0, the body is one encoded picture. The body may be compressed with "
    "gzip or deflate.",
    "content": {
        JSON.decode(): {
            "schema": {"$ref": "#/components/schemas/InferenceRequest"},
            "example": {
                "id": "42",
                "inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": [PICTURE]}],
                "outputs": [{"name": "probabilities", "parameters": {"classification": 3}}, {"name": "label"}],
            },
        },
        OCTETS.decode(): BINARY,
    },
}

MEANINGS = {
    400: "Not a valid request; or an element of its input is no picture, damaged, too large, or, without `resize`, "
    "not 32x32.",
    413: "The body has too many bytes, or the request too many pictures.",
    422: "A parameter with an invalid value.",
}


@router.get("/", include_in_schema=False)
@router.get(
    "",
    summary="The server and the extensions it supports",
    response_description="Name, version, extensions.",
    response_model=schemas.ServerMetadata,
)
async def server_metadata(request: Request) -> dict[str, Any]:
    """The rest of the protocol is also under `/v2`. A model's path may continue with `/versions/1`."""
    return {"name": "cifar-service", "version": request.app.version, "extensions": list(spec.EXTENSIONS)}


@router.get(
    "/health/live",
    summary="Whether the process is alive",
    response_description="Alive.",
    response_model=schemas.Live,
)
async def server_live() -> dict[str, bool]:
    """The same as /healthz, in the terms of the protocol."""
    return {"live": True}


@router.get(
    "/health/ready",
    summary="Whether the server is ready for requests",
    response_description="Ready.",
    response_model=schemas.Ready,
    responses=error_responses(503),
)
async def server_ready(service: ServiceDep) -> dict[str, bool]:
    """The same as /readyz, in the terms of the protocol."""
    check_ready(service)
    return {"ready": True, "live": True}


@router.get("/models", summary="The models", response_description="One name.", response_model=schemas.Models)
async def models() -> dict[str, list[str]]:
    """There is one. The parameters of each answer say which weights are behind it."""
    return {"models": [spec.MODEL_NAME]}


@router.get(f"{VERSION}/stats", include_in_schema=False)
@router.get(f"{MODEL}/stats", include_in_schema=False)
@router.get(
    "/models/stats",
    summary="What the model has done, and where the time went",
    response_description="Totals.",
    response_model=schemas.AllStatistics,
)
async def model_statistics(total: TotalDep) -> dict[str, Any]:
    """Since the start, over all routes. `execution_count` counts forward passes, `inference_count` pictures."""
    return spec.statistics(total.statistics)


@router.get(VERSION, include_in_schema=False)
@router.get(
    MODEL,
    summary="What the model takes and gives",
    response_description="Names, datatypes and shapes.",
    response_model=schemas.ModelMetadata,
)
async def model_metadata(service: ServiceDep) -> dict[str, Any]:
    """-1 stands for any number of pictures."""
    return spec.metadata(len(service.checkpoint.classes))


@router.get(f"{VERSION}/ready", include_in_schema=False)
@router.get(
    f"{MODEL}/ready",
    summary="Whether the model is ready for requests",
    response_description="Ready.",
    response_model=schemas.ModelReady,
    responses=error_responses(503),
)
async def model_ready(service: ServiceDep) -> dict[str, Any]:
    """The model is ready when the server is."""
    check_ready(service)
    return {"name": spec.MODEL_NAME, "ready": True}


@router.get(f"{VERSION}/config", include_in_schema=False)
@router.get(
    f"{MODEL}/config",
    summary="The same as Triton's model configuration",
    response_description="The configuration.",
    response_model=schemas.ModelConfiguration,
    response_model_exclude_unset=True,
)
async def model_config(service: ServiceDep) -> dict[str, Any]:
    """The parts of Triton's model configuration that mean something here."""
    return spec.configuration(len(service.checkpoint.classes))


@router.post(
    "/repository/index",
    summary="The models and their state",
    response_description="One entry.",
    response_model=list[schemas.IndexEntry],
)
async def repository_index(service: ServiceDep) -> list[dict[str, str]]:
    """A model whose service is stopping is UNAVAILABLE."""
    state, reason = ("READY", "") if service.ready else ("UNAVAILABLE", "stopping")
    return [{"name": spec.MODEL_NAME, "version": spec.MODEL_VERSION, "state": state, "reason": reason}]


@router.api_route("/repository/models/{rest:path}", methods=["POST"], include_in_schema=False)
@router.api_route("/systemsharedmemory/{rest:path}", methods=["GET", "POST"], include_in_schema=False)
@router.api_route("/cudasharedmemory/{rest:path}", methods=["GET", "POST"], include_in_schema=False)
@router.api_route(f"{MODEL}/trace/setting", methods=["GET", "POST"], include_in_schema=False)
@router.api_route("/trace/setting", methods=["GET", "POST"], include_in_schema=False)
@router.api_route("/logging", methods=["GET", "POST"], include_in_schema=False)
async def not_offered() -> None:
    raise NotOffered(
        "This service does not offer loading and unloading models, shared memory, traces or log settings. "
        f"The metadata at /v2 lists what it offers: {', '.join(spec.EXTENSIONS)}; of the repository only the index."
    )


@router.post(f"{VERSION}/infer", include_in_schema=False)
@router.post(
    f"{MODEL}/infer",
    summary="Classify pictures",
    response_description="The requested outputs, or all if none is requested: `probabilities`, `label`, `class_id` and "
    f"`familiarity` ({spec.UNKNOWN:g} for weights without calibration).",
    response_model=schemas.InferenceResponse,
    responses={
        200: {"content": {OCTETS.decode(): BINARY}, "headers": LENGTH},
        **error_responses(400, 408, 413, 415, 422, 429, 500, 501, 503, 504, meanings=MEANINGS),
    },
    openapi_extra={"requestBody": BODY, "parameters": [HEADER]},
)
async def model_infer(request: Request, service: ServiceDep, resize: ResizeQuery = None) -> Response:
    """The request's parameter `timeout`, in microseconds, shortens the time it may wait."""
    return (await respond(headers_of(request), request.receive, service, resize)).response(request)


async def respond(headers: Headers, receive: Receive, service: Service, resize: Resize | None = None) -> Reply:
    """The answer to an inference request whose query has been read.

    Clients send odd content types or none, so the body is read whatever its type.
    """
    body = await service.intake.read(headers, receive)
    encoding = _encoding(headers)
    length = None if JSON_LENGTH not in headers else header_text(headers, JSON_LENGTH)

    def read() -> Inference:
        # In one go: no limit would count bodies already inflated that wait for a thread to parse them.
        plain = body if encoding is None else compression.inflate(body, encoding, service.intake.max_bytes)
        binary = JSON not in headers.get(b"accept", b"").lower()
        return decode(plain, length, binary=binary, max_pictures=service.settings.max_pictures)

    if encoding is None and json_length(body, length) <= LITTLE_JSON_BYTES:
        inference = read()
    else:
        with service.intake.holding(len(body)):
            inference = await asyncio.to_thread(read)
    (rows, checkpoint), timing = await _run(receive, service, inference, resize)
    probabilities_NK, familiarity_N = zip(*rows, strict=True)
    answer, json_bytes = encode(inference, probabilities_NK, familiarity_N, checkpoint.classes, checkpoint.sha256[:12])
    extra = [] if json_bytes is None else [(JSON_LENGTH, b"%d" % json_bytes)]
    accepted = compression.accepted(header_text(headers, b"accept-encoding"))
    if accepted is not None and len(answer) > WORTH_COMPRESSING_BYTES:
        extra.append((b"content-encoding", accepted.encode()))
        answer = await asyncio.to_thread(compression.deflate, answer, accepted)
    return Reply(answer, JSON if json_bytes is None else OCTETS, tuple(extra), timing)


def _encoding(headers: Headers) -> str | None:
    """What the body is compressed with; None for nothing."""
    encoding = encoding_of(headers)
    if encoding is not None and encoding not in ENCODINGS:
        raise UnsupportedMedia(
            f"The body has the content encoding {encoding!r}; it must be {' or '.join(ENCODINGS)}.",
            headers={"Accept-Encoding": ", ".join(ENCODINGS)},
        )
    return encoding


async def _run(
    receive: Receive, service: Service, inference: Inference, resize: Resize | None
) -> tuple[Verdict, Timing | None]:
    """The verdict on all pictures of the request; if one cannot be read, the request fails and says which."""
    if inference.pixels is not None:
        answers = service.predict_pixels(check_raw(inference.pixels), inference.timeout_seconds)
    else:
        answers = service.predict_pictures(inference.pictures, resize, inference.timeout_seconds)
    outcomes, timing = await all_unless_left(receive, answers, service.settings.deadline_seconds)
    rows: Rows = []
    checkpoint = service.checkpoint
    for index, answer in enumerate(outcomes):
        if isinstance(answer, OWN_FAULTS):
            name = spec.IMAGE.name
            detail = {"input": name, "index": index} | (answer.detail or {})
            raise BadRequest(f"Input {name!r}, element {index}: {answer}", detail=detail)
        if isinstance(answer, BaseException):
            raise answer
        rows += answer.rows
        checkpoint = answer.checkpoint
    return Verdict(rows, checkpoint), timing
