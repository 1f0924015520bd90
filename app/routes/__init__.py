"""One file per group of paths, and what they share. The files translate HTTP and compute nothing."""

from typing import Annotated

from fastapi import Depends, Query, Request

from app.errors import NotReady
from app.images import Resize
from app.schemas import RESIZE, TOP_K
from app.service import Service
from app.statistics import Counts


async def _service(request: Request) -> Service:  # async: a plain function would cost a hop to another thread
    service: Service = request.app.service
    await service.start()
    return service


ServiceDep = Annotated[Service, Depends(_service)]


def check_ready(service: Service) -> None:
    """Raise unless the service is ready for requests, for readiness probes.

    Raises:
        NotReady: New requests should be sent elsewhere.
    """
    if not service.ready:
        raise NotReady("The service is stopping. Send requests elsewhere.")


async def _total(request: Request) -> Counts:
    counts: Counts = await request.app.total()
    return counts


TotalDep = Annotated[Counts, Depends(_total)]
"""The counts of all serving processes."""

ResizeQuery = Annotated[
    Resize | None,
    RESIZE,
    Query(
        description="What to do with a picture that is not 32x32: `crop` takes the centre square, `stretch` ignores "
        "the proportions, `pad` adds white margins. Without it any other size is refused."
    ),
]
TopKQuery = Annotated[int | None, TOP_K, Query(ge=1, description="Answer only this many probabilities, highest first.")]
