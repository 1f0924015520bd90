"""GET /metrics for machines, GET /metrics/per-class for people."""

from typing import Any

from fastapi import APIRouter, Request
from prometheus_client.exposition import choose_encoder
from starlette.responses import PlainTextResponse, Response

from app.exposition import CountsCollector
from app.routes import ServiceDep, TotalDep
from app.schemas import Report, error_responses

router = APIRouter(tags=["metrics"])


@router.get(
    "/metrics",
    summary="What the service has done",
    response_class=PlainTextResponse,
    response_description="In Prometheus's text format, or as OpenMetrics if asked for.",
    responses={200: {"content": {"application/openmetrics-text": {"schema": {"type": "string"}}}}},
)
async def metrics(service: ServiceDep, total: TotalDep, request: Request) -> Response:
    """Since the start, over all serving processes. Durations are in seconds."""
    try:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
    except (TypeError, ValueError):  # a malformed version
        encode, content_type = choose_encoder("")
    return Response(encode(CountsCollector(total, service.checkpoint)), media_type=content_type)


@router.get(
    "/metrics/per-class",
    summary="How well each class is recognised",
    response_model=Report,
    response_description="The report.",
    responses=error_responses(
        404, 500, 503, meanings={503: "Not measured yet. The header Retry-After says when to ask again."}
    ),
)
async def per_class(service: ServiceDep) -> dict[str, Any]:
    """From the weights file; or measured by this service, once it has evaluated the weights on the test set it was
    given. Until then the answer for weights without figures is 503."""
    return service.report()
