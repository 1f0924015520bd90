"""GET /healthz, also as /livez and /health, and GET /readyz."""

from fastapi import APIRouter

from app.routes import ServiceDep, check_ready
from app.schemas import Health, error_responses

router = APIRouter(tags=["health"])


@router.get("/health", include_in_schema=False)
@router.get("/livez", include_in_schema=False)
@router.get("/healthz", summary="Whether the process is alive", response_description="Alive.")
async def healthz() -> Health:
    """For liveness probes: says nothing about the network."""
    return Health(status="ok")


@router.get(
    "/readyz",
    summary="Whether the service is ready for requests",
    responses=error_responses(503),
    response_description="Ready.",
)
async def readyz(service: ServiceDep) -> Health:
    """For readiness probes. The port opens only when the network is warm; a stopping service is not ready."""
    check_ready(service)
    return Health(status="ready")
