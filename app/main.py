"""create_app: wiring only."""

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.routing import Route

from app import boundary, engine
from app.application import Application
from app.boundary import Ledger
from app.device import choose_device
from app.logs import AccessLog
from app.routes import admin, batch, health, metrics, open_inference, pages, predict
from app.service import Service, check_replaces, load_aside
from app.settings import Settings, parse_settings
from app.statistics import Traffic

DESCRIPTION = """Send a picture, get the probability of each class.

Every error has the same body, `ErrorBody`; every answer has the header `X-Request-ID`, copied from the request if
well-formed. Besides the statuses listed for each path: 404 for a path that does not exist, 405 for a method that a path
does not take, 400 for what is not HTTP, 408 for a head or body that comes too slowly, 431 for too long a head."""


def create_app(settings: Settings | None = None, classes: tuple[str, ...] | None = None) -> Application:
    """The application. Reads the weights file at once; builds and warms the network when the lifespan starts.

    Args:
        settings: By default read from the environment, so that other servers can make the application as well.
        classes: The classes that the weights must have; None for any.

    Raises:
        StartError: a setting, the weights file, the device or the engine cannot be used.
    """
    settings = settings or parse_settings([], os.environ)
    device = choose_device(settings.device)
    engine.check_available(settings.engine, device)
    checkpoint = load_aside(settings.weights)
    if classes is not None:
        check_replaces(checkpoint, classes)
    service = Service(settings, checkpoint, device)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await service.start()  # `python -m app` already has, to report bad weights itself
        yield
        await service.close()

    ledger = Ledger(Traffic(), AccessLog(sys.stderr) if settings.access_log else None)
    app = Application(
        service,
        ledger,
        {"/predict": predict.respond, f"/v2{open_inference.MODEL}/infer": open_inference.respond},
        title="CIFAR classification",
        description=DESCRIPTION,
        version="0.1.0",
        lifespan=lifespan,
        docs_url=None,  # the framework's pages load scripts from elsewhere; ours is in static
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,  # what generated clients call their functions
    )
    paths = {"/openapi.json"}
    administration = () if settings.admin_key is None else (admin,)
    for routes in (predict, batch, open_inference, metrics, health, pages, *administration):
        app.include_router(routes.router)
        paths |= {route.path for route in routes.router.routes if isinstance(route, Route)}
    app.mount("/static", pages.FILES, name="static")
    boundary.install(app, paths, ledger)
    return app


app: Application
"""The application with settings from the environment, for `uvicorn app.main:app`. Made on first access, so that
importing this module reads no weights."""


def __getattr__(name: str) -> Application:
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    application = globals()["app"] = create_app()
    return application


def __dir__() -> list[str]:
    return sorted({*globals(), "app"})  # `fastapi run` looks here
