"""GET /metrics/per-class."""

from typing import Any

from fastapi import APIRouter

from app.routes import ServiceDep
from app.schemas import Report, refusals

router = APIRouter(tags=["metrics"])


@router.get(
    "/metrics/per-class",
    summary="How well each class is recognised",
    response_model=Report,
    response_description="The report.",
    responses=refusals(404, 500),
)
async def per_class(service: ServiceDep) -> dict[str, Any]:
    """From the weights file; or measured by this service, once it has evaluated the test set it was given."""
    return service.report()
