"""GET /healthz and GET /readyz."""

from fastapi import APIRouter

from app.errors import NotReady
from app.routes import ServiceDep
from app.schemas import Health, refusals

router = APIRouter(tags=["health"])


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz", summary="The process answers", response_description="It is alive.")
async def healthz() -> Health:
    """For liveness probes: says nothing about the network."""
    return Health(status="ok")


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz", summary="Requests are welcome", responses=refusals(503), response_description="They are.")
async def readyz(service: ServiceDep) -> Health:
    """For readiness probes. The port opens only when the network is warm; a stopping service is not ready."""
    if not service.ready:
        raise NotReady("The service is stopping. Send requests elsewhere.", retry_after_seconds=1)
    return Health(status="ready")
