"""One file per subject. They translate HTTP and compute nothing."""

from typing import Annotated

from fastapi import Depends, Request

from app.service import Service


async def _service(request: Request) -> Service:  # async: a plain function would cost a hop to another thread
    service: Service = request.app.state.service
    return service


ServiceDep = Annotated[Service, Depends(_service)]
