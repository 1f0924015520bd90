"""GET /healthz and GET /readyz."""

from fastapi import APIRouter

from app.routes import ServiceDep, check_ready
from app.schemas import Health, error_responses

router = APIRouter(tags=["health"])


@router.get("/healthz", summary="The process answers", response_description="It is alive.")
async def healthz() -> Health:
    """For liveness probes: says nothing about the network."""
    return Health(status="ok")


@router.get(
    "/readyz", summary="The service accepts requests", responses=error_responses(503), response_description="It does."
)
async def readyz(service: ServiceDep) -> Health:
    """For readiness probes. The port opens only when the network is warm; a stopping service is not ready."""
    check_ready(service)
    return Health(status="ready")
